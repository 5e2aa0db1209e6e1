"""Losses as modules."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from otkern.problem import METRICS
from otkern.solve import solve_sample

_OPTIONS = tuple(name for name in inspect.signature(solve_sample).parameters if name not in ("X_a", "X_b", "metric"))


class SinkhornLoss(nn.Module):
    r"""Entropic optimal transport between clouds of points as a loss: `solve_sample(...).value`.

    Args:
        metric: cost of a pair of points: ``"cosine"``, ``"sqeuclidean"``, ``"euclidean"`` or ``"dot"``.
        reg: epsilon, in the unit of the cost, > 0.
        **options: further keyword arguments of `otkern.solve_sample`, such as ``max_iter``, ``tol``, ``debias`` or
            ``backend``.

    Raises:
        ValueError: an unknown metric.
        TypeError: an unknown option.

    Shape:
        ``loss(X_a, X_b, a, b, lengths_a=..., lengths_b=...)``: X_a (B, N, D), X_b (B, M, D) or packed with
        ``cu_seqlens_a`` and ``cu_seqlens_b``; returns (B,), float64 for float64 points, else float32. Unbatched
        points give a scalar. Differentiable with respect to points and weights.

    Example:
        >>> import torch, otkern
        >>> loss = otkern.SinkhornLoss(metric="cosine", reg=0.1, max_iter=50)
        >>> x, y = torch.eye(3).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1)
        >>> loss(x, y, lengths_a=[3, 2], lengths_b=[3, 2]).shape
        torch.Size([2])
    """

    def __init__(self, metric: str = "cosine", reg: float = 0.1, **options: Any):
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, but was {metric!r}")
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(f"{name} must be an option of otkern.solve_sample: one of {', '.join(_OPTIONS)}")
        self.metric, self.reg, self.options = metric, reg, options

    def forward(
        self, X_a: Tensor, X_b: Tensor, a: Tensor | None = None, b: Tensor | None = None, **batch: Any
    ) -> Tensor:
        """Values (B,); ``batch`` takes lengths_a, lengths_b, cu_seqlens_a, cu_seqlens_b, max_seqlen_a, max_seqlen_b."""
        return solve_sample(X_a, X_b, a, b, metric=self.metric, reg=self.reg, **batch, **self.options).value

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"metric={self.metric!r}, reg={self.reg!r}{options}"
