"""The adjoint of the fixed point, for gradients of plans and potentials: a linear system made of the plan."""

from __future__ import annotations

import torch
from torch import Tensor

from otkern.problem import Inputs

from .forward import weighted_by_a, weighted_by_b
from .items import items


def implicit(
    inputs: Inputs,
    f: Tensor,
    g: Tensor,
    slope_a: Tensor | None,
    slope_b: Tensor | None,
    extra_a: Tensor | None,
    extra_b: Tensor | None,
    u_a: Tensor,
    u_b: Tensor,
    singular: bool,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve z_i + sum_j tau_ij q_j = u_i, z_j + sum_i pi_ij p_i = u_j with p = slope z, q = slope z; equation (19).

    pi = b E / r and tau = a E / c are the plan with its rows, its columns normalised; r and c include the extras.
    Returns (p, q), the relative residuals (B,) and the iterations of conjugate gradients (B,).
    """
    p, q = torch.zeros_like(f), torch.zeros_like(g)
    residual = torch.zeros_like(inputs.reg, memory_format=torch.contiguous_format)
    n_iters = torch.zeros(inputs.batch, dtype=torch.int32, device=inputs.device)

    def part(vector: Tensor | None, index: tuple, like: Tensor, default: float) -> Tensor:
        return torch.full_like(like, default) if vector is None else vector[index]

    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            if item.cost.numel() == 0:
                p[item.rows] = part(slope_a, item.rows, item.a, 1) * u_a[item.rows]
                q[item.columns] = part(slope_b, item.columns, item.b, 1) * u_b[item.columns]
                continue
            f_i, g_i = f[item.rows], g[item.columns]
            system = System(
                weighted_by_b(item, f_i, g_i),
                weighted_by_a(item, f_i, g_i),
                item.a,
                item.b,
                part(extra_a, item.rows, item.a, 0),
                part(extra_b, item.columns, item.b, 0),
                part(slope_a, item.rows, item.a, 1),
                part(slope_b, item.columns, item.b, 1),
            )
            i = item.index
            solved = system.solve(u_a[item.rows], u_b[item.columns], singular, tol, max_iter)
            p[item.rows], q[item.columns], residual[i], n_iters[i] = solved
    return p, q, residual, n_iters


class System:
    """The equations of one item, in the unit of mass: D_a x + P y = u, P^T x + D_b y = v, p = mu x and q = nu y."""

    def __init__(self, by_b, by_a, a, b, extra_a, extra_b, slope_a, slope_b):
        self.r, self.c = by_b.sum(1) + extra_a, by_a.sum(0) + extra_b
        self.pi = torch.where((self.r > 0).unsqueeze(1), by_b / torch.where(self.r > 0, self.r, 1).unsqueeze(1), 0)
        self.tau = torch.where(self.c > 0, by_a / torch.where(self.c > 0, self.c, 1), 0)
        self.mu, self.nu = a * self.r, b * self.c
        self.slope_a, self.slope_b = slope_a, slope_b
        # Points without mass, or that reach nothing, depend on the others and not the others on them.
        self.bare_a, self.bare_b = self.mu == 0, self.nu == 0
        self.rows, self.columns = ~self.bare_a & (slope_a > 0), ~self.bare_b & (slope_b > 0)
        self.plan = self.pi * self.mu.unsqueeze(1)

    def solve(self, u: Tensor, v: Tensor, singular: bool, tol: float, max_iter: int):
        p_bare = torch.where(self.bare_a, self.slope_a * u, 0)
        q_bare = torch.where(self.bare_b, self.slope_b * v, 0)
        u, v = u - self.tau @ q_bare, v - self.pi.mT @ p_bare
        plan = torch.where(self.rows.unsqueeze(1) & self.columns, self.plan, 0)
        d_a = torch.where(self.rows, self.mu / torch.where(self.rows, self.slope_a, 1), 1)
        d_b = torch.where(self.columns, self.nu / torch.where(self.columns, self.slope_b, 1), 1)
        u, v = torch.where(self.rows, u, 0), torch.where(self.columns, v, 0)
        rhs = u - plan @ (v / d_b)
        if singular:
            # Its sum is zero but for rounding.
            mass = torch.where(self.rows, self.mu, 0)
            rhs = rhs - rhs.sum() / torch.where(mass.sum() > 0, mass.sum(), 1) * mass
        x, residual, k = _conjugate_gradients(lambda x: d_a * x - plan @ ((plan.mT @ x) / d_b), rhs, d_a, tol, max_iter)
        y = (v - plan.mT @ x) / d_b
        return (
            p_bare + torch.where(self.rows, self.mu * x, 0),
            q_bare + torch.where(self.columns, self.nu * y, 0),
            residual,
            k,
        )


def _conjugate_gradients(matrix, rhs: Tensor, diagonal: Tensor, tol: float, max_iter: int):
    """x with matrix(x) = rhs, preconditioned by the diagonal; the relative residual and the iterations.

    The start is rhs / diagonal, and residuals are relative to what it leaves: the norm of rhs itself may be that of one
    row of tiny mass, which the start solves.
    """
    x = rhs / diagonal
    residual = rhs - matrix(x)
    direction = residual / diagonal
    square = target = residual @ direction
    k = 0
    while k < max_iter and square > tol * tol * target and square > 0:
        image = matrix(direction)
        curvature = direction @ image
        if not curvature > 0:
            break
        step = square / curvature
        x, residual = x + step * direction, residual - step * image
        scaled = residual / diagonal
        before, square = square, residual @ scaled
        direction = scaled + square / before * direction
        k += 1
    return x, torch.where(target > 0, (square / torch.where(target > 0, target, 1)).sqrt(), 0), k
