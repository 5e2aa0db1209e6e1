"""GeomLoss: `SamplesLoss` with tensorized costs, and online through KeOps.

Its epsilon goes from diameter^2 to blur^2 in steps that ``scaling`` decides; a plain start at blur is not on offer. In
cases of fixed iterations the schedule has as many steps, and the answer is verified against what that schedule gives.
"""

from __future__ import annotations

import torch
from geomloss import SamplesLoss
from geomloss._legacy.sinkhorn_divergence import epsilon_schedule
from torch.nn.functional import normalize

from benchmarks.methods import Absent, Method
from benchmarks.methods.encoder import Alone
from benchmarks.problems import annealed, pairwise

# Each step moves epsilon, and the potentials lag behind by about 1 - scaling. The last takes thousands of steps.
SCALINGS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.9995)


# Beyond it, compiling the C++ code of KeOps takes minutes.
MOST_FEATURES_CPU = 100


class Tensorized(Method):
    """`SamplesLoss(backend="tensorized")`."""

    debiases = True
    backend = "tensorized"
    # Its gradient is that of the last update alone, which meets one of the two marginals only.
    gradient_slack = 0.2

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        self.a, self.b = clouds.weights()
        self.cosine = case.metric == "cosine"
        # Its cost for p = 2 is half the squared distance.
        self.factor = 1.0 if self.cosine else 2.0
        self.blur = (case.reg / self.factor) ** 0.5
        self.diameter = 2.0**0.5 if self.cosine else self._diameter()
        self._use(self._scaling_of(case.iterations) if case.tol is None else SCALINGS[0])

    def _diameter(self) -> float:
        points = torch.cat([self.clouds.x.float().flatten(0, 1), self.clouds.y.float().flatten(0, 1)])
        return float((points.amax(0) - points.amin(0)).norm())

    def _scaling_of(self, steps: int) -> float:
        """The scaling whose schedule has ``steps`` values of epsilon or one fewer."""
        ratio = max(self.diameter / self.blur, 1.0 + 1e-6)
        return min(0.9999, ratio ** (-1 / max(1.0, steps - 2.5)))

    def _use(self, scaling: float):
        self.schedule = epsilon_schedule(2, self.diameter, self.blur, scaling)
        self.steps = len(self.schedule)
        self.setting = f"{self.backend}, scaling {scaling:.5g}, {self.steps} values of epsilon"
        options = {"p": 2, "blur": self.blur, "diameter": self.diameter, "scaling": scaling, "backend": self.backend}
        options |= {"cost": self.cost(), "debias": self.case.debias}
        self.loss = SamplesLoss("sinkhorn", **options)
        self.dual = SamplesLoss("sinkhorn", potentials=True, **options)

    def cost(self):
        return lambda x, y: pairwise(x, y, self.case.metric) / self.factor

    def points(self, x):
        return self.computing(x)

    def values(self, x, y):
        return self.factor * self.loss(self.a, self.points(x), self.b, self.points(y))

    def potentials(self):
        f, g = self.dual(self.a, self.points(self.clouds.x), self.b, self.points(self.clouds.y))
        batch = self.case.batch
        return self.factor * f.detach().reshape(batch, -1), self.factor * g.detach().reshape(batch, -1)

    def tune(self, reaches):
        for scaling in SCALINGS:
            self._use(scaling)
            if reaches():
                return

    def truth(self):
        return self.setting, annealed([self.factor * value for value in self.schedule])


class Online(Tensorized):
    """`SamplesLoss(backend="online")`; cosine as half the squared distance of normalised points."""

    backend = "online"

    def __init__(self, case, clouds):
        try:
            import pykeops.torch  # noqa: F401
        except ImportError as error:
            raise Absent(f"not installed: {error}") from error
        if case.device == "cpu" and case.d > MOST_FEATURES_CPU:
            raise Absent(f"KeOps unrolls the features: it is made for about {MOST_FEATURES_CPU}, and here are {case.d}")
        super().__init__(case, clouds)

    def cost(self):
        return None

    def points(self, x):
        x = self.computing(x)
        return normalize(x, dim=-1) if self.cosine else x


class WithGeomLoss(Alone):
    """The training step with `SamplesLoss`."""

    single = Tensorized
