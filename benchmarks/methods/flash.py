"""flash-sinkhorn: `SamplesLoss(backend="alternating")` on CUDA, fp32 products, item by item (it has no ragged batch).

Cosine is half the squared distance of normalised points.
"""

from __future__ import annotations

import torch
from flash_sinkhorn import SamplesLoss
from torch.nn.functional import normalize

from benchmarks.methods import Absent, Method

# It stops by the change of its potentials: the loosest threshold, in units of reg times tol, that reaches the error.
FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01)


class FlashSinkhorn(Method):
    """Streaming kernels, autotuned at their first call (in the cold time)."""

    def __init__(self, case, clouds):
        super().__init__(case, clouds)
        if case.device != "cuda":
            raise Absent("flash-sinkhorn runs on CUDA only")
        self.cosine = case.metric == "cosine"
        self._use(None if case.tol is None else case.tol * case.reg)

    def _use(self, threshold: float | None):
        case = self.case
        options = {"backend": "alternating", "use_epsilon_scaling": False, "eps": case.reg, "n_iters": case.iterations}
        options |= {"half_cost": self.cosine, "allow_tf32": False, "debias": False, "threshold": threshold}
        self.loss = SamplesLoss("sinkhorn", **options)
        self.dual = SamplesLoss("sinkhorn", potentials=True, **options)
        self.setting = "alternating, no TF32, loop over the items"
        if threshold is not None:
            self.setting += f", stops at a change of {threshold:.2g}"

    def _items(self, x, y):
        x, y = (normalize(c, dim=-1) if self.cosine else c for c in (self.computing(x), self.computing(y)))
        for i in range(len(x)):
            n, m = self.clouds.sizes(i)
            yield x[i, :n], y[i, :m]

    def values(self, x, y):
        return torch.stack([self.loss(*pair) for pair in self._items(x, y)])

    def potentials(self):
        f, g = (torch.zeros(cloud.shape[:2], device=cloud.device) for cloud in self.clouds[:2])
        for i, pair in enumerate(self._items(self.clouds.x, self.clouds.y)):
            found = self.dual(*pair)
            f[i, : len(pair[0])], g[i, : len(pair[1])] = (t.flatten() for t in found)
        return f, g

    def tune(self, reaches):
        for factor in FACTORS:
            self._use(factor * self.case.tol * self.reg)
            if reaches():
                return
