"""Hard alignments from transport plans: which points of one side belong to which of the other."""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("mutual", "argmax", "itermax", "threshold")


def match(plan: Tensor, method: str = "mutual", *, threshold: float | None = None, max_rounds: int = 2) -> Tensor:
    """Links of a batch of plans.

    Args:
        plan: (B, N, M) or (N, M), non-negative, 0 in the padding.
        method: ``"mutual"``: the largest entry of its row and of its column; ``"argmax"``: the largest of its row;
            ``"itermax"``: mutual links, then again among points without a link and points with one, with the plan
            between two linked points left out (Jalili Sabet et al. 2020, "SimAlign"); ``"threshold"``: entries of
            at least ``threshold`` times the largest of their row and of their column.
        threshold: for ``"threshold"``, in (0, 1]; default 0.5.
        max_rounds: for ``"itermax"``, how many rounds of mutual links.

    Returns:
        (B, N, M) or (N, M) bool; no gradient. A point without mass has no link. Of equal entries the first wins.

    Raises:
        ValueError: an unknown method, or an argument out of its range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but was {method!r}")
    if threshold is not None and method != "threshold":
        raise ValueError(f"threshold must be None for method {method!r}, but was {threshold}")
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
        raise ValueError(f"max_rounds must be an integer of at least 1, but was {max_rounds!r}")
    plan = plan.detach()
    if plan.numel() == 0:
        return torch.zeros_like(plan, dtype=torch.bool)
    if method == "argmax":
        return _best(plan, -1)
    if method == "threshold":
        threshold = 0.5 if threshold is None else threshold
        if not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
            raise ValueError(f"threshold must be a number in (0, 1], but was {threshold!r}")
        largest = torch.maximum(plan.amax(-1, keepdim=True), plan.amax(-2, keepdim=True))
        return (plan >= threshold * largest) & (plan > 0)
    links = _mutual(plan)
    if method == "itermax":
        for _ in range(max_rounds - 1):
            both_linked = links.any(-1, keepdim=True) & links.any(-2, keepdim=True)
            links = links | _mutual(torch.where(both_linked, 0, plan))
    return links


def _mutual(plan: Tensor) -> Tensor:
    return _best(plan, -1) & _best(plan, -2)


def _best(plan: Tensor, dim: int) -> Tensor:
    """One link at the first largest positive entry along ``dim``."""
    index = plan.argmax(dim, keepdim=True)
    return torch.zeros_like(plan, dtype=torch.bool).scatter(dim, index, True) & (plan > 0)
