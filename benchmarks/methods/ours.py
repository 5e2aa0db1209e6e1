"""otkern through its public functions."""

from __future__ import annotations

import dataclasses

import otkern
from benchmarks.methods import Absent, Method, ThreeSolves


class Otkern(Method):
    """`otkern.solve_sample` on the default backend of the device."""

    debiases = True
    exact_iterations = True

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        self.options = {"metric": case.metric, "reg": case.reg, "max_iter": case.iterations, "tol": case.tol}
        if case.debias:
            self.options["debias"] = True
        if clouds.lengths_a is not None:
            self.options |= {"lengths_a": clouds.lengths_a, "lengths_b": clouds.lengths_b}

    def values(self, x, y):
        result = otkern.solve_sample(x, y, **self.options)
        # Not the result: it would keep the gradients of this call alive until the next.
        self.n_iters = result.n_iters
        return result.value

    def potentials(self):
        # Without points that need a gradient, whose potentials would be tied to them.
        return otkern.solve_sample(self.clouds.x, self.clouds.y, **self.options).potentials

    def iterations_done(self):
        return int(self.n_iters.max())


class OnBackend(Otkern):
    """The same on a backend of its own choice, to compare them."""

    backend: str

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        self.options["backend"] = self.backend
        try:
            otkern.solve_sample(
                clouds.x[:1], clouds.y[:1], metric=case.metric, reg=1.0, max_iter=1, backend=self.backend
            )
        except ValueError as error:
            raise Absent(str(error)) from error


class OtkernCuda(OnBackend):
    """Whole problems in clusters."""

    backend = "cuda"


class OtkernTriton(OnBackend):
    """Whole problems in registers up to 128 points, and tiles beyond."""

    backend = "triton"


class OtkernThreeSolves(ThreeSolves):
    """The divergence by three calls of `otkern.solve_sample`, beside the one call for all three."""

    debiases = True

    def __init__(self, case, clouds):
        super().__init__(Otkern, dataclasses.replace(case, debias=False), clouds)
