"""POT: batched solvers and the loop over its single-problem solver, on dense costs.

Its own envelope mode records every iteration for autograd, so the solvers run without graph and the plan is used as a
constant, which is faster; ``solve_sample_batch`` hides the cost and can only run in its own mode. Weights of 0 give NaN
in POT: the padding gets 1e-30. All scalings start at 1, those of the padding too, which later iterations forget: where
they are too few for that, a padded batch is not what it should be and fails the check.
"""

from __future__ import annotations

import ot
import torch
from ot.batch import solve_batch, solve_sample_batch
from torch.nn.functional import normalize

from benchmarks.methods import Absent, Method
from benchmarks.problems import pairwise

# POT stops at an L2 error. What L1 error that is depends on the problem: the loosest factor that holds is looked for.
FACTORS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)


class _Pot(Method):
    """What its solvers share: weights, envelope gradient, choice of the stopping threshold."""

    linear = True

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        self.a, self.b = (w.clamp_min(1e-30) for w in clouds.weights())
        # With a negative threshold it never stops early.
        self.threshold = -1.0 if case.tol is None else case.tol

    def plans(self, cost):
        """Plans (B, N, M) without graph; keeps the potentials."""
        raise NotImplementedError

    def values(self, x, y):
        cost = pairwise(self.computing(x), self.computing(y), self.case.metric)
        with torch.no_grad():
            plan = self.plans(cost)
        return (plan * cost).sum((1, 2))

    def potentials(self):
        """From the logarithms u, v of its scalings, P = exp(u + v - C / reg)."""
        u, v = self.logs()
        return self.reg * (u - self.a.log()), self.reg * (v - self.b.log())

    def logs(self):
        return self.u, self.v

    def tune(self, reaches):
        for factor in FACTORS:
            self.threshold = factor * self.case.tol
            self.setting = f"stops at an L2 error of {self.threshold:g}"
            if reaches():
                return


class SolveBatchLog(_Pot):
    """`ot.batch.solve_batch(method="log_sinkhorn")`."""

    domain = "log_sinkhorn"

    def plans(self, cost):
        result = solve_batch(
            cost, self.reg, self.a, self.b, max_iter=self.case.iterations, tol=self.threshold, method=self.domain
        )
        self.steps = result.log["n_iter"] + 1
        self.u, self.v = result.potentials
        return result.plan


class SolveBatchKernel(SolveBatchLog):
    """`ot.batch.solve_batch(method="sinkhorn")`."""

    domain = "sinkhorn"

    def logs(self):
        return self.u.log(), self.v.log()


class SolveSampleBatch(_Pot):
    """`ot.batch.solve_sample_batch`; cosine through |x - y|² = 2 (1 - cos) of normalised points."""

    setting = 'grad="envelope", log domain'

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        self.cosine = case.metric == "cosine"
        if case.tol is not None:
            raise Absent("it returns no potentials to verify beside solve_batch, whose solver it calls")

    def values(self, x, y):
        grad = "envelope" if torch.is_grad_enabled() else "detach"
        x, y = self.computing(x), self.computing(y)
        if self.cosine:
            x, y = normalize(x, dim=-1), normalize(y, dim=-1)
        factor = 2.0 if self.cosine else 1.0
        options = {"max_iter": self.case.iterations, "tol": self.threshold, "method": "log_sinkhorn", "grad": grad}
        return solve_sample_batch(x, y, factor * self.reg, self.a, self.b, **options).value_linear / factor


class SinkhornLogLoop(_Pot):
    """`ot.sinkhorn(method="sinkhorn_log")` item by item, without padding.

    It updates the columns first: it gets the transposed cost, and so does the iterations of everybody else.
    """

    domain = "sinkhorn_log"

    def plans(self, cost):
        plans, self.u, self.v = torch.zeros_like(cost), torch.zeros_like(self.a), torch.zeros_like(self.b)
        for i in range(len(cost)):
            n, m = self.clouds.sizes(i)
            plan, log = ot.sinkhorn(
                self.b[i, :m], self.a[i, :n], cost[i, :n, :m].mT, self.reg, method=self.domain, log=True, warn=False,
                numItermax=self.case.iterations, stopThr=self.threshold,
            )  # fmt: skip
            plans[i, :n, :m] = plan.mT
            self.v[i, :m], self.u[i, :n] = self.logs_of(log)
            self.steps = log["niter"] + 1
        return plans

    def logs_of(self, log):
        return log["log_u"], log["log_v"]


class SinkhornLoop(SinkhornLogLoop):
    """`ot.sinkhorn` in the kernel domain, item by item."""

    domain = "sinkhorn"

    def logs_of(self, log):
        return torch.log(log["u"]), torch.log(log["v"])
