"""Relaxed problems and their answers without otkern: by a generic convex solver, and by plain iterations in any dtype.

A relaxation is a dict of `otkern.solve`'s own arguments: ``unbalanced``, ``mass`` or ``null_cost``, and ``reg_type``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from tests.problems import Problem, make_problem

INF = math.inf

# One of each kind. The prices are in units of the cost of `make_problem`, which is about 1.
RELAXATIONS = {
    "unbalanced": {"unbalanced": (0.8, 0.5)},
    "one side": {"unbalanced": (INF, 0.5)},
    "other side": {"unbalanced": (0.7, INF)},
    "partial": {"mass": 0.6},
    "null": {"null_cost": 0.5},
}
WITH_ENTROPY = {
    f"{name}, {reg_type}": relaxation | {"reg_type": reg_type}
    for name, relaxation in RELAXATIONS.items()
    for reg_type in ("KL", "entropy")
}


def make_relaxed(n: int, m: int, metric: str = "sqeuclidean", reg: float = 0.5, seed: int = 0, d: int = 3) -> Problem:
    """`make_problem` with total masses of 1.5 and 0.8, which no relaxed problem needs to have equal."""
    problem = make_problem(n, m, d, metric, reg, seed)
    return problem._replace(a=1.5 * problem.a, b=0.8 * problem.b)


def kl(p: Tensor, q) -> Tensor:
    """sum p log(p / q) - p + q, with 0 log 0 = 0; over all entries."""
    q = torch.as_tensor(q, dtype=p.dtype).expand_as(p)
    ratio = torch.where(p > 0, p / torch.where(q > 0, q, 1), 1)
    return (torch.where(p > 0, p * ratio.log(), 0) - p + q).sum()


def price(rho: float, p: Tensor, q: Tensor) -> Tensor:
    """rho KL(p | q); nothing for a constraint."""
    return p.new_zeros(()) if math.isinf(rho) else rho * kl(p, q)


def read(relaxation: dict) -> tuple[tuple[float, float], float | None, float | None, bool]:
    """(rho_a, rho_b), mass, null cost, whether the regulariser is the entropy."""
    rho = relaxation.get("unbalanced") or (INF, INF)
    rho = rho if isinstance(rho, tuple) else (rho, rho)
    return rho, relaxation.get("mass"), relaxation.get("null_cost"), relaxation.get("reg_type") == "entropy"


def objective(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, reg: float, relaxation: dict) -> Tensor:
    """The primal objective of a plan; constraints are the caller's affair. With null points, of the enlarged plan."""
    rho, _, null_cost, entropy = read(relaxation)
    if null_cost is not None:
        cost, a, b = with_null(cost, a, b, null_cost)
    linear = torch.where(plan > 0, plan * cost, 0).sum()
    regulariser = torch.special.xlogy(plan, plan).sum() if entropy else kl(plan, a.unsqueeze(1) * b)
    return linear + reg * regulariser + price(rho[0], plan.sum(1), a) + price(rho[1], plan.sum(0), b)


def with_null(cost: Tensor, a: Tensor, b: Tensor, null_cost: float) -> tuple[Tensor, Tensor, Tensor]:
    """The balanced problem with null points as the last row and column."""
    enlarged = torch.nn.functional.pad(cost, (0, 1, 0, 1), value=null_cost)
    enlarged[-1, -1] = 0
    return enlarged, torch.cat([a, b.sum()[None]]), torch.cat([b, a.sum()[None]])


class Answer(NamedTuple):
    value: float
    plan: Tensor  # (n, m), of the real points


def by_convex_solver(cost: Tensor, a: Tensor, b: Tensor, reg: float, relaxation: dict) -> Answer:
    """The optimal plan by sequential quadratic programming over its entries.

    Where the plan may be positive: finite cost and weights. Its error is about 1e-6, the value's the square of that.
    """
    rho, mass, null_cost, _ = read(relaxation)
    n, m = cost.shape
    full = with_null(cost, a, b, null_cost) if null_cost is not None else (cost, a, b)
    free = (full[0] < INF) & (full[1] > 0).unsqueeze(1) & (full[2] > 0)
    rows, columns = free.nonzero(as_tuple=True)

    def plan_of(entries) -> Tensor:
        plan = torch.zeros_like(full[0])
        return plan.index_put((rows, columns), torch.as_tensor(entries))

    def value_and_gradient(entries):
        leaf = torch.tensor(entries, requires_grad=True)
        value = objective(plan_of(leaf), cost, a, b, reg, relaxation)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.numpy()

    of_rows = torch.nn.functional.one_hot(rows, len(full[1])).T.double().numpy()
    of_columns = torch.nn.functional.one_hot(columns, len(full[2])).T.double().numpy()
    constraints = []

    def constrain(kind: str, matrix, target) -> None:
        constraints.append({"type": kind, "fun": lambda p: target - matrix @ p, "jac": lambda p: -matrix})

    strict = mass is None
    for matrix, weights, of_side in ((of_rows, full[1], rho[0]), (of_columns, full[2], rho[1])):
        positive = (weights > 0).numpy()
        if not strict:
            constrain("ineq", matrix[positive], weights.numpy()[positive])
        elif math.isinf(of_side):
            constrain("eq", matrix[positive], weights.numpy()[positive])
    if mass is not None:
        constrain("eq", np.ones((1, len(rows))), np.array([mass]))
    elif len(constraints) == 2:
        # The last column follows from the others, and the solver wants independent constraints.
        last = constraints.pop()
        constraints.append({"type": "eq", "fun": lambda p: last["fun"](p)[:-1], "jac": lambda p: last["jac"](p)[:-1]})
    start = (full[1].unsqueeze(1) * full[2])[rows, columns].numpy()
    start = start * ((mass if mass is not None else float(full[1].sum())) / start.sum())
    found = scipy.optimize.minimize(
        value_and_gradient,
        start,
        jac=True,
        bounds=[(1e-300, None)] * len(start),
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-15},
    )
    return Answer(found.fun, plan_of(found.x)[:n, :m])


class Iterates(NamedTuple):
    value: Tensor
    f: Tensor
    g: Tensor
    multipliers: Tensor  # (2,)


def plain_iterations(cost, a, b, reg, relaxation: dict, iterations: int) -> Iterates:
    """What a user would write: the updates of the log domain, in the dtype that comes in."""
    rho, mass, null_cost, entropy = read(relaxation)
    if null_cost is not None:
        f, g, value = _balanced(*with_null(cost, a, b, null_cost), reg, iterations)
        return Iterates(value, f[:-1], g[:-1], torch.stack([f[-1], g[-1]]))
    offsets = [
        torch.where(w > 0, -reg * (torch.where(w > 0, w, 1).log() + 0.5), 0) if entropy else torch.zeros_like(w)
        for w in (a, b)
    ]
    f, g, multiplier = torch.zeros_like(a), torch.zeros_like(b), cost.new_zeros(())
    if mass is not None:
        g = torch.minimum(g, offsets[1])

    def update(soft_min: Tensor, side: int) -> Tensor:
        offset = offsets[side]
        if mass is not None:
            return torch.minimum(offset, soft_min)
        return offset + (soft_min - offset) / (1 + reg / rho[side])

    for _ in range(iterations):
        f = update(soft_min(cost, g + multiplier, b, reg), 0)
        g = update(soft_min(cost.mT, f + multiplier, a, reg), 1)
        if mass is not None:
            multiplier = multiplier + reg * (mass / plan_of(cost, a, b, reg, f, g + multiplier).sum()).log()
    f = torch.where(a == 0, update(soft_min(cost, g + multiplier, b, reg), 0), f)
    moved = plan_of(cost, a, b, reg, f, g + multiplier).sum()
    value = multiplier * (mass or 0) - reg * (moved - (0 if entropy else a.sum() * b.sum()))
    for weights, potential, offset, price in ((a, f, offsets[0], rho[0]), (b, g, offsets[1], rho[1])):
        t = torch.where(weights > 0, potential - offset, 0)
        value = value + weights @ (t if math.isinf(price) else -price * torch.expm1(-t / price))
    half = multiplier / 2
    return Iterates(value, f + half, g + half, torch.stack([multiplier, torch.zeros_like(multiplier)]))


def _balanced(cost, a, b, reg, iterations: int):
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iterations):
        f = soft_min(cost, g, b, reg)
        g = soft_min(cost.mT, f, a, reg)
    f = torch.where(a == 0, soft_min(cost, g, b, reg), f)
    shift = (b @ g - a @ f) / (a.sum() + b.sum())
    f, g = f + shift, g - shift
    return f, g, a @ f + b @ g - reg * (b.sum() - a.sum() * b.sum())


def soft_min(cost: Tensor, potential: Tensor, weight: Tensor, reg) -> Tensor:
    """-reg log sum_j weight_j exp((potential_j - cost_ij) / reg); (n,)."""
    return -reg * ((potential - cost) / reg + weight.log()).logsumexp(1)


def plan_of(cost: Tensor, a: Tensor, b: Tensor, reg, f: Tensor, g: Tensor) -> Tensor:
    """P = a b exp((f + g - C) / reg)."""
    return ((f.unsqueeze(1) + g - cost) / reg + a.log().unsqueeze(1) + b.log()).exp()


def entropy_of_weights(a: Tensor, b: Tensor, reg: float, null: bool) -> Tensor:
    """reg (sum a log a + sum b log b + (sum a + sum b) / 2 - sum a sum b): from KL to entropy, at fixed marginals."""
    if null:
        _, a, b = with_null(a.unsqueeze(1) * b, a, b, 0.0)
    return reg * (
        torch.special.xlogy(a, a).sum() + torch.special.xlogy(b, b).sum() + (a.sum() + b.sum()) / 2 - a.sum() * b.sum()
    )
