"""OTT-JAX: jit and vmap over its Sinkhorn solver, differentiated by Danskin's theorem.

Danskin is applied by stopping gradients before the solver and weighting the cost with its plan: asked to differentiate
through ``reg_ot_cost`` the package compiles an implicit linear solve, or stores the iterations, for the same result.
Forward and backward are one compiled program, so the backward cannot be timed alone. The solver updates its second side
first: it gets the sides swapped, and so does the iterations of everybody else. Weights of 0 give NaN gradients: the
padding gets 1e-30. Inputs are JAX arrays before the timing starts.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ott.geometry import geometry, pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import acceleration, sinkhorn

from benchmarks.methods import Absent, Method
from benchmarks.problems import Answer

INNER = 10  # iterations between two looks at the marginal error
# Its error is that of one marginal, which over-relaxation does not leave the other exact for: the loosest that holds.
FACTORS = (1.0, 0.5, 0.2, 0.1)


class LogDomain(Method):
    """Dense cost, lse mode."""

    lse_mode = True
    online = False
    momentum = 1.0

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        if jax.default_backend() != ("gpu" if case.device == "cuda" else "cpu"):
            raise Absent(f"this JAX runs on {jax.default_backend()}, not on {case.device}")
        if case.part == "backward":
            raise Absent("jit fuses forward and backward into one program")
        dtype = jnp.dtype(case.dtype)
        self.arrays = [jnp.asarray(cloud.float().cpu().numpy()).astype(dtype) for cloud in (clouds.x, clouds.y)]
        self.arrays += [jnp.asarray(w.clamp_min(1e-30).cpu().numpy()) for w in clouds.weights()]
        self.inner = INNER if case.iterations % INNER == 0 else 1
        self._build(0.0 if case.tol is None else case.tol)

    def _build(self, threshold: float):
        case, fixed = self.case, self.case.tol is None
        self.solver = sinkhorn.Sinkhorn(
            lse_mode=self.lse_mode,
            threshold=threshold,
            norm_error=1,
            inner_iterations=self.inner,
            min_iterations=case.iterations if fixed else 0,
            max_iterations=case.iterations,
            momentum=acceleration.Momentum(value=self.momentum),
        )
        cores = len(os.sched_getaffinity(0))
        self.setting = f"jit + vmap, {cores} cores" if case.device == "cpu" else "jit + vmap"
        if self.momentum != 1:
            self.setting += f", momentum {self.momentum}"
        if not fixed:
            self.setting += f", threshold {threshold:g}"
        both = jax.value_and_grad(self._value, argnums=(0, 1), has_aux=True)
        self._both = jax.jit(jax.vmap(both))
        self._forward = jax.jit(jax.vmap(self._value))

    def _points(self, x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        if self.case.metric == "cosine":
            # The square root of a sum of squares, not a norm per pair as the package's Cosine has it.
            return tuple(p / jnp.linalg.norm(p, axis=-1, keepdims=True) for p in (x, y))
        return x, y

    def _geometry(self, x, y):
        """The swapped geometry, and the factor between its cost and ours."""
        x, y = self._points(x, y)
        if self.online:
            factor = 2.0 if self.case.metric == "cosine" else 1.0
            return pointcloud.PointCloud(y, x, epsilon=factor * self.reg, batch_size=512), factor
        if self.case.metric == "cosine":
            cost = 1 - y @ x.T
        else:
            cost = (y * y).sum(1)[:, None] + (x * x).sum(1)[None] - 2 * y @ x.T
        return geometry.Geometry(cost_matrix=cost, epsilon=self.reg), 1.0

    def _value(self, x, y, a, b):
        geom, factor = self._geometry(x, y)
        problem = linear_problem.LinearProblem(jax.lax.stop_gradient(geom), b, a)
        out = self.solver(problem)
        if self.online:
            value = self._streamed_value(geom, out, a, b)
        else:
            value = jnp.sum(jax.lax.stop_gradient(out.matrix) * geom.cost_matrix)
        return value / factor, (out.g / factor, out.f / factor, out.n_iters)

    def _streamed_value(self, geom, out, a, b):
        """The dual objective at fixed potentials, from streamed marginals."""
        f, g = jax.lax.stop_gradient(out.f), jax.lax.stop_gradient(out.g)
        mass = geom.marginal_from_potentials(f, g, axis=1).sum()
        ent = jnp.sum(jax.scipy.special.xlogy(a, a)) + jnp.sum(jax.scipy.special.xlogy(b, b))
        return jnp.sum(a * g) + jnp.sum(b * f) - geom.epsilon * (mass - 1) - geom.epsilon * ent

    def _answer(self, out, gradients=(None, None)) -> Answer:
        value, self.out = out
        jax.block_until_ready((value, gradients))
        return Answer(value, not self.online, *gradients)

    def both(self) -> Answer:
        return self._answer(*self._both(*self.arrays))

    def forward(self) -> Answer:
        return self._answer(self._forward(*self.arrays))

    def potentials(self):
        """From its own, P = exp((f + g - C) / reg)."""
        f, g = (to_torch(t) for t in self.out[:2])
        a, b = (w.clamp_min(1e-30) for w in self.clouds.weights())
        return f.to(a.device) - self.reg * a.log(), g.to(b.device) - self.reg * b.log()

    def tune(self, reaches):
        for factor in FACTORS:
            if factor < 1:
                self._build(factor * self.case.tol)
            if reaches():
                return

    def iterations_done(self):
        return int(np.max(self.out[2]))


class KernelDomain(LogDomain):
    """Dense cost, kernel mode."""

    lse_mode = False


class Momentum(LogDomain):
    """Dense cost, lse mode, over-relaxed by a constant 1.5."""

    momentum = 1.5

    def __init__(self, case, clouds):
        if case.tol is None:
            raise Absent("over-relaxation changes the iterations that a fixed count compares")
        super().__init__(case, clouds)


class Online(LogDomain):
    """Costs computed again from the points in every iteration, 512 rows at a time."""

    online = True


def to_torch(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
