"""The definition of the op, in plain PyTorch: one item at a time, over contiguous copies of its true size.

Equation numbers refer to ``docs/derivations.md``. Every other backend is tested against this file, in fp64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from otkern.problem import Inputs, check_points


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


def can_run(inputs: Inputs) -> str | None:
    """None: the reference serves every call."""
    return None


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
    scaled, norm, _ = _norm(x)
    return scaled / torch.where(norm == 0, 1, norm)


def _norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
            cost = _copy(inputs.cost[(i, rows[-1], columns[-1])], dtype)
        else:
            x, y = _copy(inputs.x_a[rows], dtype), _copy(inputs.x_b[columns], dtype)
            cost = pairwise_cost(x, y, inputs.metric)
        a = cost.new_full((cost.shape[0],), 1 / max(cost.shape[0], 1)) if inputs.a is None else inputs.a[rows]
        b = cost.new_full((cost.shape[1],), 1 / max(cost.shape[1], 1)) if inputs.b is None else inputs.b[columns]
        yield Item(i, rows, columns, x, y, cost, _copy(a, dtype), _copy(b, dtype), inputs.reg[i])


def _copy(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in its own memory: torch's products and sums depend on the alignment of what they read."""
    return part.to(dtype, copy=True, memory_format=torch.contiguous_format)


def forward(
    inputs: Inputs, g_init: Tensor | None, max_iter: int, tol: float, check: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sinkhorn in the log domain; the values, potentials, marginal errors and iteration counts of the batch."""
    if check:
        check_points(inputs)
    new = {"dtype": inputs.compute_dtype, "device": inputs.device}
    value, marginal_error = torch.zeros(inputs.batch, **new), torch.zeros(inputs.batch, **new)
    f, g = torch.zeros(inputs.shape_f, **new), torch.zeros(inputs.shape_g, **new)
    n_iters = torch.zeros(inputs.batch, dtype=torch.int32, device=inputs.device)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            start = torch.zeros_like(item.b) if g_init is None else g_init[item.columns].clone()
            i = item.index
            value[i], f[item.rows], g[item.columns], marginal_error[i], n_iters[i] = _solve(item, start, max_iter, tol)
    return value, f, g, marginal_error, n_iters


def _solve(item: Item, g: Tensor, max_iter: int, tol: float):
    cost, a, b, reg = item.cost, item.a, item.b, item.reg
    log_a, log_b = a.log(), b.log()
    f = torch.zeros_like(a)
    error, k = _marginal_error(item, f, g), 0
    if cost.numel():
        while k < max_iter:
            f = _soft_transform(cost, g, log_b, reg)  # equation (4)
            g = _soft_transform(cost.mT, f, log_a, reg)  # equation (5)
            k += 1
            error = _marginal_error(item, f, g)
            if tol >= 0 and error <= tol:
                break
        # The potential of a point without mass is free; this choice makes its marginal ratio 1.
        f = torch.where(a == 0, _soft_transform(cost, g, log_b, reg), f)
    mass_a, mass_b = a.sum(), b.sum()
    shift = (b @ g - a @ f) / torch.where(mass_a + mass_b > 0, mass_a + mass_b, 1)
    f, g = f + shift, g - shift
    value = a @ f + b @ g - reg * (mass_b - mass_a * mass_b)  # equation (6)
    unreachable_a = (cost.isposinf() | (b == 0)).all(1) & (a > 0)
    unreachable_b = (cost.isposinf() | (a == 0).unsqueeze(1)).all(0) & (b > 0)
    if unreachable_a.any() or unreachable_b.any():
        value = torch.full_like(value, float("inf"))
    return value, f, g, error, k


def _soft_transform(cost: Tensor, potential: Tensor, log_weight: Tensor, reg: Tensor) -> Tensor:
    """-reg LSE_j(log_weight_j + (potential_j - cost_ij) / reg), 0 where every term is masked; (n,)."""
    lse = torch.logsumexp(log_weight + (potential - cost) / reg, dim=1)
    return torch.where(lse.isneginf(), 0, -reg * lse)


def _marginal_error(item: Item, f: Tensor, g: Tensor) -> Tensor:
    """The L1 gap between the plan's marginals and the weights; columns without any finite cost count too."""
    p = _plan(item, f, g)
    unreachable = (item.cost.isposinf() | (item.a == 0).unsqueeze(1)).all(0)
    return (p.sum(1) - item.a).abs().sum() + torch.where(unreachable, item.b, 0).sum()


def _log_ratio(item: Item, f: Tensor, g: Tensor) -> Tensor:
    """log(P / (a b)) = (f + g - C) / reg, equation (3); (n, m)."""
    return (f.unsqueeze(1) + g - item.cost) / item.reg


def _plan(item: Item, f: Tensor, g: Tensor) -> Tensor:
    # Weights join in the exponent: exp alone overflows at pairs whose weight is 0.
    log_weights = item.a.log().unsqueeze(1) + item.b.log()
    return (_log_ratio(item, f, g) + log_weights).exp()


def backward(
    inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The partial derivatives of the dual objective at fixed potentials, times dvalue; equations (7) to (10)."""
    needs_a, needs_b, needs_cost, needs_weights, needs_reg = needs
    dx_a = torch.zeros_like(inputs.x_a, memory_format=torch.contiguous_format) if needs_a else None
    dx_b = torch.zeros_like(inputs.x_b, memory_format=torch.contiguous_format) if needs_b else None
    dcost = torch.zeros_like(inputs.cost, memory_format=torch.contiguous_format) if needs_cost else None
    da = torch.zeros_like(f) if needs_weights and inputs.a is not None else None
    db = torch.zeros_like(g) if needs_weights and inputs.b is not None else None
    dreg = torch.zeros_like(inputs.reg, memory_format=torch.contiguous_format) if needs_reg else None
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            d, i = dvalue[item.index], item.index
            if d == 0 or item.cost.numel() == 0:
                continue
            f_i, g_i = f[item.rows], g[item.columns]
            p = _plan(item, f_i, g_i)
            dplan = d * p
            if needs_cost:
                dcost[(i, item.rows[-1], item.columns[-1])] = dplan.to(dcost.dtype)
            if needs_a or needs_b:
                dx, dy = _points_backward(item, dplan, inputs.metric)
                if needs_a:
                    dx_a[item.rows] = dx.to(dx_a.dtype)
                if needs_b:
                    dx_b[item.columns] = dy.to(dx_b.dtype)
            if da is not None:
                ratio = torch.where(item.a == 0, 1, p.sum(1) / item.a)
                da[item.rows] = d * (f_i + item.reg * (item.b.sum() - ratio))
            if db is not None:
                ratio = torch.where(item.b == 0, 1, p.sum(0) / item.b)
                db[item.columns] = d * (g_i + item.reg * (item.a.sum() - ratio))
            if needs_reg:
                # Row by row, because torch splits the sum of a large matrix by the number of threads.
                entropy = torch.where(p > 0, p * _log_ratio(item, f_i, g_i), 0).sum(1).sum()
                dreg[i] = d * (item.a.sum() * item.b.sum() - p.sum(1).sum() + entropy)
    return dx_a, dx_b, dcost, da, db, dreg


def _points_backward(item: Item, dcost: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The products of dC with the derivatives of the metric, equations (8); (n, D) and (m, D)."""
    x, y = item.x, item.y
    if metric == "dot":
        return -dcost @ y, -dcost.mT @ x
    if metric == "cosine":
        return _unit_backward(x, -dcost @ unit(y)), _unit_backward(y, -dcost.mT @ unit(x))
    if metric == "sqeuclidean":
        weight = 2 * dcost
    else:
        # The subgradient of |x - y| at coincident points is 0.
        weight = torch.where(item.cost == 0, 0, dcost / torch.where(item.cost == 0, 1, item.cost))
    # Differences of points do not see a common shift; near the origin the two terms below cancel less.
    centre = y.mean(0)
    x, y = x - centre, y - centre
    return weight.sum(1, keepdim=True) * x - weight @ y, weight.sum(0).unsqueeze(1) * y - weight.mT @ x


def _unit_backward(x: Tensor, dunit: Tensor) -> Tensor:
    """The derivative of x / |x| applied to dunit: (dunit - <x/|x|, dunit> x/|x|) / |x|; (n, D)."""
    (_, norm, scale), direction = _norm(x), unit(x)
    dx = dunit - (direction * dunit).sum(-1, keepdim=True) * direction
    return torch.where(norm == 0, 0, dx / torch.where(norm == 0, 1, norm) / scale)


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    """P @ v, or P^T @ v; with ``times_cost`` the elementwise product of P and C in place of P."""
    shape = inputs.shape_g if transpose else inputs.shape_f
    out = torch.zeros((*shape, v.shape[-1]), dtype=inputs.compute_dtype, device=inputs.device)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            matrix = _plan(item, f[item.rows], g[item.columns])
            if times_cost:
                matrix = torch.where(matrix > 0, matrix * item.cost, 0)
            if transpose:
                out[item.columns] = matrix.mT @ _copy(v[item.rows], v.dtype)
            else:
                out[item.rows] = matrix @ _copy(v[item.columns], v.dtype)
    return out


def plan(inputs: Inputs, f: Tensor, g: Tensor) -> Tensor:
    """The dense plans (B, max_a, max_b), 0 in the padding; equation (3)."""
    out = torch.zeros((inputs.batch, inputs.max_a, inputs.max_b), dtype=inputs.compute_dtype, device=inputs.device)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            n, m = item.cost.shape
            out[item.index, :n, :m] = _plan(item, f[item.rows], g[item.columns])
    return out


def _spans(inputs: Inputs, side_a: bool) -> list[tuple]:
    cu_seqlens = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        return [(slice(start, stop),) for start, stop in itertools.pairwise(offsets)]
    lengths = inputs.lengths_a if side_a else inputs.lengths_b
    longest = inputs.max_a if side_a else inputs.max_b
    sizes = [longest] * inputs.batch if lengths is None else lengths.tolist()
    return [(i, slice(0, size)) for i, size in enumerate(sizes)]
