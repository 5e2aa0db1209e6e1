"""What is computed from the plan: gradients, ratios of the marginals, products."""

from __future__ import annotations

import torch
from torch import Tensor

from otkern.problem import Inputs, PlanWeights

from .forward import log_ratio, plan_of, weighted_by_a, weighted_by_b
from .items import Item, copy, items, norm_of, unit

Needs = tuple[bool, bool, bool, bool, bool]


def backward(
    inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dvalue times the gradients of the points or costs at fixed potentials, equations (7), (8); r and c of (9); and

    sum_ij a_i b_j h(x_ij) with h(x) = 1 - exp(x) + x exp(x), equation (10). None where not needed.

    Of a cloud with itself the two gradients are equal, and that of side b is left out, 0.
    """
    needs_ratios, needs_reg = needs[3:]
    out = _Gradients(inputs, f, g, needs)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            d = dvalue[item.index]
            if d == 0 or item.cost.numel() == 0:
                continue
            f_i, g_i = f[item.rows], g[item.columns]
            out.add_cost_gradient(item, d * plan_of(item, f_i, g_i), half=True)
            if needs_ratios:
                out.rows[item.rows] = weighted_by_b(item, f_i, g_i).sum(1)
                out.columns[item.columns] = weighted_by_a(item, f_i, g_i).sum(0)
            if needs_reg:
                # Row by row, because torch splits the sum of a large matrix by the number of threads.
                p, x = plan_of(item, f_i, g_i), log_ratio(item, f_i, g_i)
                entropy = torch.where(p > 0, p * x, 0).sum(1).sum()
                out.reg[item.index] = item.a.sum() * item.b.sum() - p.sum(1).sum() + entropy
    return out.all()


def plan_backward(
    inputs: Inputs, f: Tensor, g: Tensor, weights: PlanWeights, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The sums over the plan of equation (20), with H = scale + cost_scale C + dense and

    W = P H + b E row + a E col:  W itself or its products with the metric's derivatives;
    sum_j E (b H + col) and sum_i E (a H + row);  sum W (f + g - C) / reg.
    """
    out = _Gradients(inputs, f, g, needs)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            if item.cost.numel() == 0:
                continue
            f_i, g_i, i = f[item.rows], g[item.columns], item.index
            n, m = item.cost.shape
            h = weights.scale[i].expand(n, m)
            if weights.cost_scale is not None:
                h = h + weights.cost_scale[i] * torch.where(item.cost.isposinf(), 0, item.cost)
            if weights.dense is not None:
                h = h + copy(weights.dense[i, :n, :m], item.cost.dtype)
            row = (torch.zeros_like(item.a) if weights.row is None else weights.row[item.rows]).unsqueeze(1)
            col = torch.zeros_like(item.b) if weights.col is None else weights.col[item.columns]
            by_b, by_a = weighted_by_b(item, f_i, g_i), weighted_by_a(item, f_i, g_i)
            w = plan_of(item, f_i, g_i) * h + by_b * row + by_a * col
            out.add_cost_gradient(item, w)
            if needs[3]:
                e = log_ratio(item, f_i, g_i).exp()
                out.rows[item.rows] = (by_b * h + torch.where(col != 0, e * col, 0)).sum(1)
                out.columns[item.columns] = (by_a * h + torch.where(row != 0, e * row, 0)).sum(0)
            if needs[4]:
                out.reg[i] = torch.where(w != 0, w * log_ratio(item, f_i, g_i), 0).sum(1).sum()
    return out.all()


class _Gradients:
    """Outputs of the two functions above, zeros where nothing is written."""

    def __init__(self, inputs: Inputs, f: Tensor, g: Tensor, needs: Needs):
        def like(tensor):
            return torch.zeros_like(tensor, memory_format=torch.contiguous_format)

        self.metric = inputs.metric
        self.x_a = like(inputs.x_a) if needs[0] else None
        self.x_b = like(inputs.x_b) if needs[1] else None
        self.cost = like(inputs.cost) if needs[2] else None
        self.rows, self.columns = (like(f), like(g)) if needs[3] else (None, None)
        self.reg = like(inputs.reg) if needs[4] else None

    def add_cost_gradient(self, item: Item, w: Tensor, half: bool = False) -> None:
        """Write W, or its products with the derivatives of the metric; ``half``: those of side b of two clouds only."""
        if self.cost is not None:
            self.cost[(item.index, item.rows[-1], item.columns[-1])] = w.to(self.cost.dtype)
        if self.x_a is not None or self.x_b is not None:
            dx, dy = points_backward(item, w, self.metric)
            if self.x_a is not None:
                self.x_a[item.rows] = dx.to(self.x_a.dtype)
            if self.x_b is not None and not (half and item.same):
                self.x_b[item.columns] = dy.to(self.x_b.dtype)

    def all(self):
        return self.x_a, self.x_b, self.cost, self.rows, self.columns, self.reg


def points_backward(item: Item, dcost: Tensor, metric: str) -> tuple[Tensor, Tensor]:
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
    (_, norm, scale), direction = norm_of(x), unit(x)
    dx = dunit - (direction * dunit).sum(-1, keepdim=True) * direction
    return torch.where(norm == 0, 0, dx / torch.where(norm == 0, 1, norm) / scale)


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    """P @ v, or P^T @ v; with ``times_cost`` the elementwise product of P and C in place of P."""
    shape = inputs.shape_g if transpose else inputs.shape_f
    out = torch.zeros((*shape, v.shape[-1]), dtype=inputs.compute_dtype, device=inputs.device)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            matrix = plan_of(item, f[item.rows], g[item.columns])
            if times_cost:
                matrix = torch.where(matrix > 0, matrix * item.cost, 0)
            if transpose:
                out[item.columns] = matrix.mT @ copy(v[item.rows], v.dtype)
            else:
                out[item.rows] = matrix @ copy(v[item.columns], v.dtype)
    return out


def plan(inputs: Inputs, f: Tensor, g: Tensor) -> Tensor:
    """The dense plans (B, max_a, max_b), 0 in the padding; equation (3)."""
    out = torch.zeros((inputs.batch, inputs.max_a, inputs.max_b), dtype=inputs.compute_dtype, device=inputs.device)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            n, m = item.cost.shape
            out[item.index, :n, :m] = plan_of(item, f[item.rows], g[item.columns])
    return out
