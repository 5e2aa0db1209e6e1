"""The iterations, in the log domain: potentials, values, marginal errors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otkern.problem import Inputs, Schedule, check_points

from .items import Item, items
from .relaxation import Side, sides


def forward(
    inputs: Inputs,
    g_init: Tensor | None,
    max_iter: int,
    tol: float,
    schedule: Schedule | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The values, potentials, multipliers, marginal errors and iteration counts of the batch.

    ``multipliers`` (B, 2): of the total mass in "partial"; the potentials of the null points in "null"; else 0.
    """
    if check:
        check_points(inputs)
    new = {"dtype": inputs.compute_dtype, "device": inputs.device}
    value, marginal_error = torch.zeros(inputs.batch, **new), torch.zeros(inputs.batch, **new)
    f, g = torch.zeros(inputs.shape_f, **new), torch.zeros(inputs.shape_g, **new)
    multipliers = torch.zeros(inputs.batch, 2, **new)
    n_iters = torch.zeros(inputs.batch, dtype=torch.int32, device=inputs.device)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for item in items(inputs):
            i = item.index
            start = torch.zeros_like(item.b) if g_init is None else g_init[item.columns].clone()
            solved = solve_item(item, start, max_iter, tol, schedule or Schedule())
            value[i], f[item.rows], g[item.columns], multipliers[i], marginal_error[i], n_iters[i] = solved
    return value, f, g, multipliers, marginal_error, n_iters


class State(NamedTuple):
    """The potentials between two iterations."""

    f: Tensor
    g: Tensor
    mass_multiplier: Tensor  # (), in "partial"
    column_ratio: Tensor  # (m,) marginal of the columns over their weights, after the iteration

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(f, g) with the multiplier of the mass divided between them: P = a b exp((f + g - C) / reg)."""
        half = self.mass_multiplier / 2
        return self.f + half, self.g + half


def solve_item(item: Item, g: Tensor, max_iter: int, tol: float, schedule: Schedule):
    """(value, f, g, multipliers, marginal error, iterations) of one problem."""
    if item.kind != "null":
        history, error = iterate(item, g, max_iter, tol, schedule)
        return *results(item, history[-1].after, len(history) == 1), error, len(history) - 1
    enlarged = with_null(item)
    history, error = iterate(enlarged, torch.cat([g, g.new_zeros(1)]), max_iter, tol, schedule)
    value, f, g, _ = results(enlarged, history[-1].after, len(history) == 1)
    return value, f[:-1], g[:-1], torch.stack([f[-1], g[-1]]), error, len(history) - 1


def with_null(item: Item) -> Item:
    """The balanced problem with the null points as its last row and column, equation (17)."""
    n, m = item.cost.shape
    cost = item.cost.new_zeros(n + 1, m + 1)
    cost[:n, :m] = item.cost
    cost[n, :m] = item.relaxation[0]
    cost[:n, m] = item.relaxation[0]
    a, b = torch.cat([item.a, item.b.sum().reshape(1)]), torch.cat([item.b, item.a.sum().reshape(1)])
    return item._replace(cost=cost, a=a, b=b, kind="balanced", relaxation=None)


class Step(NamedTuple):
    """What an iteration was done with, and the state it left: what a derivative of the iterations needs."""

    eps: Tensor  # ()
    factor: float  # of over-relaxation
    last: bool
    after: State


def iterate(item: Item, g: Tensor, max_iter: int, tol: float, schedule: Schedule) -> tuple[list[Step], Tensor]:
    """The steps, of which the first is the initial state, and the marginal error after the last one."""
    row, column = sides(item)
    if item.kind == "partial":
        g = torch.minimum(g, column.offset(item.reg))
    zero = torch.zeros_like(item.reg)
    history = [Step(item.reg, 1.0, False, State(torch.zeros_like(item.a), g, zero, torch.ones_like(g)))]
    if item.cost.numel() == 0:
        return history, _without_plan(item, row, column)[1]
    if item.same:
        # One potential converges fast by averaged updates, whatever two do.
        schedule = schedule._replace(update="alternating", overrelaxation=1.0)
    error, factor = torch.full_like(zero, float("inf")), OverRelaxation(schedule.overrelaxation)
    for k in range(max_iter):
        # Where iterations are not plain, a plain one has to confirm that the tolerance is reached.
        reached = tol >= 0 and not plain(schedule) and bool((error <= tol) & (history[-1].eps == item.reg))
        last = k == max_iter - 1 or reached
        eps = item.reg if last else epsilon(item, schedule, k)
        w = 1.0 if last or k == 0 else factor.value
        if item.same:
            state = self_iteration(item, row, history[-1].after, eps)
        else:
            symmetric = schedule.update == "symmetric" and not last
            state = iteration(item, row, column, history[-1].after, eps, symmetric, w, k)
        history.append(Step(eps, w, last, state))
        exact_columns = last or plain(schedule)
        error = marginal_error(item, row, column, state, eps, exact_columns and not item.same)
        factor.observe(error)
        if tol >= 0 and exact_columns and bool((error <= tol) & (eps == item.reg)):
            break
    return history, error


def plain(schedule: Schedule) -> bool:
    """Whether every iteration ends with the exact half for the columns, so that any may be the last."""
    return schedule.update == "alternating" and schedule.overrelaxation == 1


def epsilon(item: Item, schedule: Schedule, k: int) -> Tensor:
    """The regularisation of iteration k, which is not the last."""
    if schedule.eps_start is None:
        return item.reg
    eps = schedule.eps_start[item.index]
    for _ in range(k):
        eps = torch.maximum(item.reg, eps * schedule.eps_factor)
    return torch.where(eps > item.reg, eps, item.reg)


class OverRelaxation:
    """The factor of over-relaxation: given, or (0) chosen from the rate at which the marginal error falls.

    With an asymptotic rate r of the plain iteration, 2 / (1 + sqrt(1 - r)) is the best factor (Thibault et al. 2021;
    Lehmann et al. 2021). The rate is observed over plain iterations; a rising error takes half of the excess back.
    """

    PLAIN = 8  # iterations before the rate is trusted
    MOST = 1.9

    def __init__(self, factor: float):
        self.chosen, self.value = factor == 0, factor or 1.0
        self.errors: list[float] = []

    def observe(self, error: Tensor) -> None:
        if not self.chosen:
            return
        self.errors.append(float(error))
        before = self.errors[-2] if len(self.errors) > 1 else float("inf")
        if len(self.errors) == self.PLAIN and 0 < self.errors[-1] < before:
            self.value = min(2 / (1 + (1 - self.errors[-1] / before) ** 0.5), self.MOST)
        elif len(self.errors) > self.PLAIN and self.errors[-1] > before:
            self.value = 1 + (self.value - 1) / 2


def iteration(
    item: Item, row: Side, column: Side, state: State, eps: Tensor, symmetric: bool, factor: float, k: int
) -> State:
    """One full iteration: a half for the rows, one for the columns, or both at once and averaged."""
    multiplier = state.mass_multiplier
    dead_a, dead_b = _dead(item.cost, item.b), _dead(item.cost.mT, item.a)
    f = row.update(SoftMin.apply(item.cost, state.g + multiplier, item.b, eps), eps, dead_a)
    if symmetric:
        s = SoftMin.apply(item.cost.mT, state.f + multiplier, item.a, eps)
        g = column.update(s, eps, dead_b)
        if k > 0:
            f, g = (state.f + f) / 2, (state.g + g) / 2
        elif bool(state.g.any()):
            # A warm start: the first f follows from it, and it waits for that.
            g = state.g
    else:
        f = _relaxed(state.f, f, factor)
        s = SoftMin.apply(item.cost.mT, f + multiplier, item.a, eps)
        g = _relaxed(state.g, column.update(s, eps, dead_b), factor)
    # At a column without weight the ratio may leave the range of numbers, and 0 times it is to be 0.
    ratio = torch.where(dead_b | (item.b == 0), 0, ((g - s) / eps).exp())
    if item.kind == "partial":
        # log sum_j b_j exp((g_j - s_j) / eps), whose terms may all be too small for a number
        moved = torch.logsumexp(((g - s) / eps + item.b.log())[~dead_b], 0)
        scale = torch.where(moved.isneginf(), 0, item.relaxation[0].log() - moved)
        multiplier, ratio = multiplier + eps * scale, ((g - s) / eps + scale).exp()
        ratio = torch.where(dead_b | (item.b == 0), 0, ratio)
    return State(f, g, multiplier, ratio)


def self_iteration(item: Item, side: Side, state: State, eps: Tensor) -> State:
    """One averaged update of the potential of a cloud with itself, equation (27)."""
    s = SoftMin.apply(item.cost, state.f, item.b, eps)
    h = (state.f + side.update(s, eps, _dead(item.cost, item.b))) / 2
    return State(h, h, state.mass_multiplier, state.column_ratio)


def _relaxed(old: Tensor, new: Tensor, factor: float) -> Tensor:
    return new if factor == 1 else old + factor * (new - old)


def soft_min(cost: Tensor, potential: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """-eps LSE_j(log weight_j + (potential_j - cost_ij) / eps), 0 where every term is masked; (n,)."""
    lse = torch.logsumexp(weight.log() + (potential - cost) / eps, dim=1)
    return torch.where(lse.isneginf(), 0, -eps * lse)


class SoftMin(torch.autograd.Function):
    """`soft_min` with a derivative that is finite at masked pairs and at weights of 0, equation (21)."""

    @staticmethod
    def forward(ctx, cost, potential, weight, eps):
        s = soft_min(cost, potential, weight, eps)
        ctx.save_for_backward(cost, potential, weight, eps, s)
        return s

    @staticmethod
    def backward(ctx, ds):
        cost, potential, weight, eps, s = ctx.saved_tensors
        ds = torch.where(_dead(cost, weight), 0, ds).unsqueeze(1)
        x = (s.unsqueeze(1) + potential - cost) / eps
        share = (x + weight.log()).exp()
        dweight = -eps * torch.where(ds != 0, x.exp() * ds, 0).sum(0)
        deps = torch.where(share > 0, share * x * ds, 0).sum()
        return share * ds, -(share * ds).sum(0), dweight, deps


def _dead(cost: Tensor, weight: Tensor) -> Tensor:
    """Rows that reach no column with weight; (n,)."""
    return (cost.isposinf() | (weight == 0)).all(1)


def marginal_error(item: Item, row: Side, column: Side, state: State, eps: Tensor, columns_known: bool) -> Tensor:
    """The L1 gap between the plan's marginals and those that the potentials ask for."""
    p = plan_of(item._replace(reg=eps), *state.pair)
    columns = item.b * state.column_ratio if columns_known else p.sum(0)
    dead_a, dead_b = _dead(item.cost, item.b), _dead(item.cost.mT, item.a)
    if item.kind == "partial" and not (item.b * state.column_ratio).any():
        return item.relaxation[0]
    return row.gap(p.sum(1), state.f, eps, dead_a) + column.gap(columns, state.g, eps, dead_b)


def plan_of(item: Item, f: Tensor, g: Tensor) -> Tensor:
    """P, equation (3); (n, m)."""
    # Weights join in the exponent: exp alone overflows at pairs whose weight is 0.
    log_weights = item.a.log().unsqueeze(1) + item.b.log()
    return (log_ratio(item, f, g) + log_weights).exp()


def log_ratio(item: Item, f: Tensor, g: Tensor) -> Tensor:
    """log(P / (a b)) = (f + g - C) / reg, equation (3); (n, m)."""
    return (f.unsqueeze(1) + g - item.cost) / item.reg


def weighted_by_a(item: Item, f: Tensor, g: Tensor) -> Tensor:
    """a_i E_ij with E = exp((f + g - C) / reg); (n, m)."""
    return (log_ratio(item, f, g) + item.a.log().unsqueeze(1)).exp()


def weighted_by_b(item: Item, f: Tensor, g: Tensor) -> Tensor:
    """b_j E_ij; (n, m)."""
    return (log_ratio(item, f, g) + item.b.log()).exp()


def _without_plan(item: Item, row: Side, column: Side) -> tuple[Tensor, Tensor]:
    """Value and error of a problem with an empty side: nothing can be moved."""
    value, error = torch.zeros_like(item.reg), torch.zeros_like(item.reg)
    if item.kind == "partial":
        return torch.full_like(value, float("inf")), item.relaxation[0]
    for side in (row, column):
        mass = side.weights.sum()
        price = torch.full_like(mass, float("inf")) if side.rho is None else side.rho
        value = value + torch.where(mass > 0, price * mass, 0)
        error = error + (mass if side.strict() else 0)
    return value, error


def results(item: Item, state: State, empty: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(value, f, g, multipliers) of the last state; differentiable but for the value."""
    row, column = sides(item)
    cost, a, b, reg = item.cost, item.a, item.b, item.reg
    if empty:
        zeros = torch.zeros(2, dtype=reg.dtype, device=reg.device)
        return _without_plan(item, row, column)[0], torch.zeros_like(a), torch.zeros_like(b), zeros
    mass_a, mass_b = a.sum(), b.sum()
    dead_a, dead_b = _dead(cost, b), _dead(cost.mT, a)
    # The potential of a point without mass is free; this choice makes its update the identity.
    s = SoftMin.apply(cost, state.g + state.mass_multiplier, b, reg)
    state = state._replace(f=torch.where(a == 0, row.update(s, reg, dead_a), state.f))
    if item.same:
        state = state._replace(g=state.f)
    moved = b @ state.column_ratio
    reference = torch.zeros_like(reg) if item.entropy else mass_a * mass_b
    if row.strict() and column.strict():
        shift = (b @ state.g - a @ state.f) / torch.where(mass_a + mass_b > 0, mass_a + mass_b, 1)
        state = state._replace(f=state.f + shift, g=state.g - shift)
        # Every column is exact, and a sum over them would only add rounding.
        moved = mass_b
    if item.same:
        moved = mass_b + b @ torch.where(dead_b | (b == 0), -1, torch.expm1((state.f - s) / reg))
    value = row.dual(state.f, reg, dead_a) + column.dual(state.g, reg, dead_b) - reg * (moved - reference)
    stranded = (row.strict() and (dead_a & (a > 0)).any()) or (column.strict() and (dead_b & (b > 0)).any())
    if item.kind == "partial":
        stranded = moved == 0
        value = value + state.mass_multiplier * item.relaxation[0]
    if stranded:
        value = torch.full_like(value, float("inf"))
    f, g = state.pair
    return value, f, g, torch.stack([state.mass_multiplier, torch.zeros_like(reg)])
