"""One problem at a time, over contiguous copies of its true size: its cost, weights and relaxation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from otkern.problem import Inputs


class Item(NamedTuple):
    """One problem at its true size, in the compute dtype, and where its rows and columns stand in the batch."""

    index: int
    rows: tuple  # index of its entries in f, da, x_a
    columns: tuple
    x: Tensor | None  # (n, D)
    y: Tensor | None  # (m, D)
    cost: Tensor  # (n, m)
    a: Tensor  # (n,)
    b: Tensor  # (m,)
    reg: Tensor  # ()
    relaxation: Tensor | None  # (2,)
    kind: str
    entropy: bool
    same: bool  # a cloud with itself


def pairwise_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The cost C (..., n, m) of points x (..., n, D) and y (..., m, D), equation (1); differentiable."""
    if metric == "dot":
        return -(x @ y.mT)
    if metric == "cosine":
        return 1 - unit(x) @ unit(y).mT
    # Differences, never |x|^2 + |y|^2 - 2<x,y>: that form cancels where clouds lie close together, and only this
    # one gives coincident points a cost and a subgradient of exactly 0.
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() if metric == "sqeuclidean" else distance


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis; a zero vector has direction 0 and gradient 0."""
    scaled, norm, _ = norm_of(x)
    return scaled / torch.where(norm == 0, 1, norm)


def norm_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x / s, |x / s| and s, the largest entry's magnitude (1 for a zero vector): no square leaves the dtype's range."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale == 0, 1, scale)
    scaled = x / scale
    return scaled, scaled.norm(dim=-1, keepdim=True), scale


def items(inputs: Inputs) -> Iterator[Item]:
    """The batch's problems one by one."""
    sizes_a, sizes_b = _spans(inputs, True), _spans(inputs, False)
    dtype = inputs.compute_dtype
    for i in range(inputs.batch):
        rows, columns = sizes_a[i], sizes_b[i]
        x = y = None
        if inputs.cost is not None:
            cost = copy(inputs.cost[(i, rows[-1], columns[-1])], dtype)
        else:
            x, y = copy(inputs.x_a[rows], dtype), copy(inputs.x_b[columns], dtype)
            cost = pairwise_cost(x, y, inputs.metric)
        a = cost.new_full((cost.shape[0],), 1 / max(cost.shape[0], 1)) if inputs.a is None else inputs.a[rows]
        b = cost.new_full((cost.shape[1],), 1 / max(cost.shape[1], 1)) if inputs.b is None else inputs.b[columns]
        relaxation = None if inputs.relaxation is None else inputs.relaxation[i]
        a, b = copy(a, dtype), copy(b, dtype)
        same = i >= inputs.n_pairs
        yield Item(i, rows, columns, x, y, cost, a, b, inputs.reg[i], relaxation, inputs.kind, inputs.entropy, same)


def copy(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in its own memory: torch's products and sums depend on the alignment of what they read."""
    return part.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _spans(inputs: Inputs, side_a: bool) -> list[tuple]:
    cu_seqlens = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        return [(slice(start, stop),) for start, stop in itertools.pairwise(offsets)]
    lengths = inputs.lengths_a if side_a else inputs.lengths_b
    longest = inputs.max_a if side_a else inputs.max_b
    sizes = [longest] * inputs.batch if lengths is None else lengths.tolist()
    return [(i, slice(0, size)) for i, size in enumerate(sizes)]
