"""The annealed loop of GeomLoss: symmetric, averaged updates down a ladder of epsilons, equation (23)."""

from __future__ import annotations

import torch
from torch import Tensor

from otkern.problem import Inputs, check_points

from .forward import soft_min, weighted_by_a, weighted_by_b
from .items import Item, items
from .relaxation import sides


def symmetric(
    inputs: Inputs,
    eps_start: Tensor,
    n_steps: Tensor,
    eps_factor: float,
    cost_floor: float,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(s_a, s_b, f, g, r_a, r_b): f and g after the ladder, and their soft minima at ``reg``, s_a of g and s_b of f.

    r_a,i = sum_j b_j exp((s_a,i + g_j - C_ij) / reg), and r_b likewise of the columns, are 1 but for the rounding of s.
    Item i goes down eps_start_i, eps_start_i eps_factor^k for k = 0 to n_steps_i - 1, reg_i, one averaged update each.
    Costs below ``cost_floor`` count as that much. Of a cloud with itself g = f and s_b = s_a, and half of the work is
    enough. Kinds "balanced" and "unbalanced".
    """
    if check:
        check_points(inputs)
    new = {"dtype": inputs.compute_dtype, "device": inputs.device}
    s_a, f = torch.zeros(inputs.shape_f, **new), torch.zeros(inputs.shape_f, **new)
    s_b, g = torch.zeros(inputs.shape_g, **new), torch.zeros(inputs.shape_g, **new)
    r_a, r_b = torch.zeros_like(f), torch.zeros_like(g)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            if item.cost.numel() == 0:
                continue
            (row, column), cost, i = sides(item), item.cost.clamp(min=cost_floor), item.index
            first = eps_start[i]
            ladder = (first, *(first * eps_factor**k for k in range(int(n_steps[i]))), item.reg)
            f_i, g_i = torch.zeros_like(item.a), torch.zeros_like(item.b)
            for step, eps in enumerate((first, *ladder)):
                s_f, s_g = _soft_minima(item, cost, f_i, g_i, eps)
                new_f, new_g = _damped(s_f, row.rho, eps), _damped(s_g, column.rho, eps)
                f_i, g_i = (new_f, new_g) if step == 0 else ((f_i + new_f) / 2, (g_i + new_g) / 2)
            f[item.rows], g[item.columns] = f_i, g_i
            s_f, s_g = _soft_minima(item, cost, f_i, g_i, item.reg)
            s_a[item.rows], s_b[item.columns] = s_f, s_g
            floored = item._replace(cost=cost)
            r_a[item.rows] = weighted_by_b(floored, s_f, g_i).sum(1)
            r_b[item.columns] = weighted_by_a(floored, f_i, s_g).sum(0)
    return s_a, s_b, f, g, r_a, r_b


def _soft_minima(item: Item, cost: Tensor, f: Tensor, g: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Of g at the rows and of f at the columns, equations (4) and (5)."""
    of_g = soft_min(cost, g, item.b, eps)
    return of_g, of_g if item.same else soft_min(cost.mT, f, item.a, eps)


def _damped(soft_min: Tensor, rho: Tensor | None, eps: Tensor) -> Tensor:
    """Equation (13)."""
    return soft_min if rho is None else soft_min / (1 + eps / rho)
