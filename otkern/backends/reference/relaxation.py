"""One side of a problem: its weights, what its marginal constraint does to an update, and its term in the dual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otkern.problem import most_exponent

from .items import Item


class Side(NamedTuple):
    """Rows or columns. f is the potential, o the offset of the reference measure, equation (16)."""

    weights: Tensor  # (n,)
    rho: Tensor | None  # (), inf: the marginal is a constraint; None: it is one for the whole batch
    capped: bool  # the marginal is at most the weights
    entropy: bool

    def offset(self, eps: Tensor) -> Tensor:
        """o_i = eps log(e^-1/2 / a_i): 0 where the reference measure is a ⊗ b, and at points without weight."""
        if not self.entropy:
            return torch.zeros_like(self.weights)
        positive = self.weights > 0
        return torch.where(positive, -eps * (torch.where(positive, self.weights, 1).log() + 0.5), 0)

    def update(self, soft_min: Tensor, eps: Tensor, dead: Tensor) -> Tensor:
        """The best potential for a soft minimum s of the other side, equations (4), (13), (15).

        A `dead` point, that reaches nothing, has s = inf but for the 0 that stands for it.
        """
        offset = self.offset(eps)
        if self.capped:
            return torch.where(dead, offset, torch.minimum(offset, soft_min))
        if self.rho is None:
            return soft_min
        return torch.where(dead, 0, offset + (soft_min - offset) / (1 + eps / self.rho))

    def asked(self, potential: Tensor, eps: Tensor, dead: Tensor) -> Tensor:
        """The marginal that the potential asks for; 0 for a row that reaches nothing and need not."""
        if self.rho is None:
            return self.weights
        exponent = (-(potential - self.offset(eps)) / self.rho).clamp(max=most_exponent(potential.dtype))
        asked = self.weights * exponent.exp()
        return torch.where((dead & self.rho.isfinite()) | (self.weights == 0), 0, asked)

    def dual(self, potential: Tensor, eps: Tensor, dead: Tensor) -> Tensor:
        """The side's term of the dual objective, sum a f or -rho sum a (exp(-f / rho) - 1), equations (6), (12)."""
        t = torch.where(self.weights > 0, potential - self.offset(eps), 0)
        if self.rho is None or self.rho.isinf():
            return self.weights @ t
        exponent = (-t / self.rho).clamp(max=most_exponent(t.dtype))
        return self.weights @ torch.where(dead, self.rho, -self.rho * torch.expm1(exponent))

    def gap(self, marginal: Tensor, potential: Tensor, eps: Tensor, dead: Tensor) -> Tensor:
        """L1 distance of a marginal from what the potential asks for."""
        if self.capped:
            excess = marginal - self.weights
            below = potential < self.offset(eps)
            return torch.where(below & ~dead, excess.abs(), excess.clamp(min=0)).sum()
        return (marginal - self.asked(potential, eps, dead)).abs().sum()

    def strict(self) -> bool:
        """Whether mass on this side has to be moved."""
        return not self.capped and (self.rho is None or bool(self.rho.isinf()))


def sides(item: Item) -> tuple[Side, Side]:
    """The rows and the columns of an item."""
    capped = item.kind == "partial"
    if item.kind == "unbalanced":
        rho_a, rho_b = item.relaxation
    else:
        rho_a = rho_b = None
    return Side(item.a, rho_a, capped, item.entropy), Side(item.b, rho_b, capped, item.entropy)
