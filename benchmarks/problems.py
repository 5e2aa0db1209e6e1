"""The data of a case, and what a method should have answered, in fp64 by code that shares nothing with otkern.

Problems of a batch do not depend on each other: the answer is computed for some of them, spread over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.cases import Case

# Entries of a cost in one piece, and fp64 exponentials that checking one case may cost.
PIECE = {"cpu": 1 << 24, "cuda": 1 << 26}
WORK = {"cpu": 1.5e9, "cuda": 4e11}


class Clouds(NamedTuple):
    """Points (B, N, D) and (B, M, D), true lengths (B,), or None where all are full."""

    x: Tensor
    y: Tensor
    lengths_a: Tensor | None
    lengths_b: Tensor | None

    def sizes(self, item: int) -> tuple[int, int]:
        full = self.x.shape[1], self.y.shape[1]
        lengths = self.lengths_a, self.lengths_b
        return tuple(size if n is None else int(n[item]) for size, n in zip(full, lengths, strict=True))

    def weights(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Uniform weights (B, N) and (B, M), 0 in the padding."""
        out = []
        for cloud, lengths in ((self.x, self.lengths_a), (self.y, self.lengths_b)):
            batch, size = cloud.shape[:2]
            if lengths is None:
                out.append(torch.full((batch, size), 1 / size, dtype=dtype, device=cloud.device))
            else:
                inside = torch.arange(size, device=cloud.device) < lengths[:, None]
                out.append(inside.to(dtype) / lengths[:, None])
        return out[0], out[1]

    def pair(self, first: str, second: str) -> Clouds:
        """The problem of two of the clouds, such as ("x", "x")."""
        lengths = {"x": self.lengths_a, "y": self.lengths_b}
        return Clouds(getattr(self, first), getattr(self, second), lengths[first], lengths[second])


class Answer(NamedTuple):
    """The values (B,) of a method, or their linear part <P, C>, and the gradients of their sum (None: not asked)."""

    value: Tensor
    linear: bool
    dx: Tensor | None = None
    dy: Tensor | None = None


class Truth(NamedTuple):
    """Dual value, linear part and gradients of one problem, in fp64; error: L1 marginal error of its potentials."""

    value: Tensor
    linear: Tensor
    dx: Tensor
    dy: Tensor
    error: float


def make_clouds(case: Case, seed: int = 0) -> Clouds:
    """Normal points whose second cloud leans on the first, so that there is something to align; or a latent space."""
    generator = torch.Generator(case.device).manual_seed(seed)
    options = {"generator": generator, "device": case.device}
    x = torch.randn(case.batch, case.n, case.d, **options)
    y = torch.randn(case.batch, case.m, case.d, **options)
    if case.latent is None:
        shared = min(case.n, case.m)
        y[:, :shared] += 0.5 * x[:, :shared]
    else:
        basis = torch.randn(case.latent, case.d, **options)
        x, y = x[..., : case.latent] @ basis, y[..., : case.latent] @ basis
    lengths: list[Tensor | None] = [None, None]
    if case.low is not None:
        draw = dict(options, dtype=torch.int32)
        lengths = [torch.randint(case.low, size + 1, (case.batch,), **draw) for size in (case.n, case.m)]
    dtype = getattr(torch, case.dtype)
    return Clouds(x.to(dtype), y.to(dtype), *lengths)


def pairwise(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The cost (..., n, m), the way a user of torch writes it."""
    if metric == "cosine":
        return 1 - normalize(x, dim=-1) @ normalize(y, dim=-1).mT
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1, keepdim=True).mT
    return squares - 2 * (x @ y.mT)


def cost_range(case: Case, clouds: Clouds) -> float:
    """The largest cost minus the smallest, about."""
    few = Clouds(clouds.x[:1, :64].double(), clouds.y[:1, :64].double(), None, None)
    cost = pairwise(few.x, few.y, case.metric)
    return float(cost.max() - cost.min())


def checked_items(case: Case) -> list[int]:
    """Items to check: all, or as many as the work allows, spread evenly over the batch."""
    work = 2 * case.n * case.m * (min(case.iterations, 500) + 2 * case.d / 50) * (3 if case.debias else 1)
    count = max(1, min(case.batch, 64, int(WORK[case.device] / work)))
    return sorted({round(i * (case.batch - 1) / max(1, count - 1)) for i in range(count)})


class Item:
    """One problem in fp64, its cost computed piece by piece, and kept if it is small."""

    def __init__(self, x: Tensor, y: Tensor, metric: str, reg: float):
        self.x, self.y, self.metric, self.reg = x.double(), y.double(), metric, reg
        self.n, self.m = len(x), len(y)
        self._kept: dict[tuple[bool, int], Tensor] = {}
        self.rows = max(1, PIECE[x.device.type] // max(self.n, self.m))
        self.keep = self.n * self.m <= PIECE[x.device.type]

    def pieces(self, swap: bool) -> Iterator[tuple[slice, Tensor]]:
        """Row blocks of the cost, or of its transpose."""
        first, second = (self.y, self.x) if swap else (self.x, self.y)
        for start in range(0, len(first), self.rows):
            rows = slice(start, start + self.rows)
            cost = self._kept.get((swap, start))
            if cost is None:
                cost = pairwise(first[rows], second, self.metric)
                if self.keep:
                    self._kept[swap, start] = cost
            yield rows, cost

    def soft_min(self, potential: Tensor, swap: bool, reg: float | None = None) -> Tensor:
        """-reg log of the mean over the other side of exp((potential - C) / reg)."""
        reg = reg or self.reg
        out = [torch.logsumexp((potential - cost) / reg, 1) for _, cost in self.pieces(swap)]
        return -reg * (torch.cat(out) - math.log(len(potential)))

    def truth(self, f: Tensor, g: Tensor, gradients: bool = True) -> Truth:
        """What potentials in cost units give: dual value, <P, C>, and dP-free gradients of <P, C>."""
        x, y = (cloud.clone().requires_grad_(gradients) for cloud in (self.x, self.y))
        linear, mass = torch.zeros((), dtype=f.dtype, device=f.device), f.new_zeros(())
        row_error, columns = f.new_zeros(()), torch.zeros_like(g)
        for start in range(0, self.n, self.rows):
            rows = slice(start, start + self.rows)
            cost = pairwise(x[rows], y, self.metric)
            plan = torch.exp((f[rows, None] + g - cost.detach()) / self.reg) / (self.n * self.m)
            part = (plan * cost).sum()
            if gradients:
                part.backward()
            linear, mass, columns = linear + part.detach(), mass + plan.sum(), columns + plan.sum(0)
            row_error = row_error + (plan.sum(1) - 1 / self.n).abs().sum()
        error = float(row_error + (columns - 1 / self.m).abs().sum())
        value = f.mean() + g.mean() - self.reg * (mass - 1)
        nothing = torch.empty(0)
        return Truth(value, linear, x.grad if gradients else nothing, y.grad if gradients else nothing, error)


Solve = Callable[[Item, bool], Truth]


def alternating(iterations: int) -> Solve:
    """Exactly so many iterations, first f from g = 0, then g from f; the envelope gradient at the end."""

    def solve(item: Item, gradients: bool) -> Truth:
        f, g = item.x.new_zeros(item.n), item.x.new_zeros(item.m)
        for _ in range(iterations):
            f = item.soft_min(g, False)
            g = item.soft_min(f, True)
        return item.truth(f, g, gradients)

    return solve


def annealed(schedule: Sequence[float]) -> Solve:
    """What GeomLoss defines: averaged updates along an epsilon schedule and a full one (Feydy 2020, algorithm 3.5).

    Its value is <a, f> + <b, g> after the last update; its gradients are those of that update at fixed right sides.
    """

    def solve(item: Item, gradients: bool) -> Truth:
        start = schedule[0]
        f = item.soft_min(item.x.new_zeros(item.m), False, start)
        g = item.soft_min(item.x.new_zeros(item.n), True, start)
        for reg in schedule:
            new_f, new_g = item.soft_min(g, False, reg), item.soft_min(f, True, reg)
            f, g = (f + new_f) / 2, (g + new_g) / 2
        last_f, last_g = item.soft_min(g, False), item.soft_min(f, True)
        by_rows, by_columns = item.truth(last_f, g, gradients), item.truth(f, last_g, gradients)
        final = item.truth(last_f, last_g, False)
        return Truth(last_f.mean() + last_g.mean(), final.linear, by_rows.dx, by_columns.dy, final.error)

    return solve


def make_item(case: Case, clouds: Clouds, index: int) -> Item:
    n, m = clouds.sizes(index)
    return Item(clouds.x[index, :n], clouds.y[index, :m], case.metric, case.reg)


def true_answer(case: Case, clouds: Clouds, index: int, solve: Solve, gradients: bool = True) -> Truth:
    """One problem's answer by ``solve``; of the divergence for a debiased case."""

    def one(first: str, second: str) -> Truth:
        return solve(make_item(case, clouds.pair(first, second), index), gradients)

    xy = one("x", "y")
    if not case.debias:
        return xy
    xx, yy = one("x", "x"), one("y", "y")
    return Truth(
        xy.value - (xx.value + yy.value) / 2,
        xy.linear - (xx.linear + yy.linear) / 2,
        xy.dx - (xx.dx + xx.dy) / 2,
        xy.dy - (yy.dx + yy.dy) / 2,
        max(xy.error, xx.error, yy.error),
    )


def errors(answer: Answer, truths: dict[int, Truth]) -> tuple[float, float]:
    """The largest errors of values and of gradients, each relative to the largest entry; NaN counts as inf.

    Without gradients in the answer the second is 0.
    """

    def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
        scale = max(float(want.abs().max()) for _, want in pairs)
        differences = [float((got.double() - want).abs().max()) for got, want in pairs]
        finite = all(math.isfinite(difference) for difference in differences)
        return max(differences) / max(scale, 1e-300) if finite else math.inf

    value = relative([(answer.value[i], t.linear if answer.linear else t.value) for i, t in truths.items()])
    if answer.dx is None or answer.dy is None:
        return value, 0.0
    dx = relative([(answer.dx[i, : len(t.dx)], t.dx) for i, t in truths.items()])
    dy = relative([(answer.dy[i, : len(t.dy)], t.dy) for i, t in truths.items()])
    return value, max(dx, dy)
