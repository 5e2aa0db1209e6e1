"""Derivatives as sums over the plan: which sums, and what is added to them point by point.

The backends know three things: sums over the plan with given weights (`plan_backward`, and its fast case `backward`),
and the linear system of the fixed point (`implicit`). Everything here is arithmetic on vectors of n + m numbers around
them, the same for every backend. Equation numbers refer to ``docs/derivations.md``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from otkern import dispatch
from otkern.problem import Inputs, item_sizes, item_sums, masses, most_exponent, row_mask, spread, weights_of


class Gradients(NamedTuple):
    """One gradient for each tensor of a problem and for its potentials; None where it is not needed."""

    x_a: Tensor | None
    x_b: Tensor | None
    cost: Tensor | None
    a: Tensor | None
    b: Tensor | None
    reg: Tensor | None
    relaxation: Tensor | None
    f: Tensor | None = None
    g: Tensor | None = None
    multipliers: Tensor | None = None


class Side:
    """One side's vectors at given potentials, in the layout of its weights."""

    def __init__(self, inputs: Inputs, potential: Tensor, multipliers: Tensor, side_a: bool):
        self.inputs, self.side_a = inputs, side_a
        self.weights = weights_of(inputs, side_a)
        self.eps = self.spread(inputs.reg)
        self.log_weights = torch.where(self.weights > 0, self.weights, 1).log()
        # o of equation (16), and t = f - o, less its share of the mass's multiplier
        self.t = potential
        if inputs.entropy:
            self.t = self.t + torch.where(self.weights > 0, self.eps * (self.log_weights + 0.5), 0)
        if inputs.kind == "partial":
            self.t = self.t - self.spread(multipliers[:, 0]) / 2
        self.rho = None
        if inputs.kind == "unbalanced":
            self.rho = self.spread(inputs.relaxation[:, 0 if side_a else 1])

    def spread(self, per_item: Tensor) -> Tensor:
        return spread(self.inputs, self.side_a, per_item)

    def sums(self, values: Tensor) -> Tensor:
        return item_sums(self.inputs, self.side_a, values)

    def dead(self, ratio: Tensor) -> Tensor:
        """Points that reach nothing, in a side that need not move them."""
        return (ratio == 0) & (self.weights > 0) & self.rho.isfinite()

    def price(self, ratio: Tensor) -> Tensor:
        """The derivative of the side's dual term with respect to its weights: t, or -rho (exp(-t / rho) - 1)."""
        if self.rho is None:
            return self.t
        # An infinite rho may not enter even the branch that is not taken: its derivative would be NaN.
        rho = torch.where(self.rho.isinf(), 1, self.rho)
        price = torch.where(self.rho.isinf(), self.t, -rho * torch.expm1(self.exponent()))
        return torch.where(self.dead(ratio), rho, price)

    def asked(self, ratio: Tensor) -> Tensor:
        """The marginal that the potentials ask for."""
        if self.rho is None:
            return self.weights
        return torch.where(self.dead(ratio), 0, self.weights * torch.exp(self.exponent()))

    def of_rho(self, ratio: Tensor) -> Tensor:
        """The derivative of the side's dual term with respect to rho: KL of the asked marginal, equation (14); (B,)."""
        minus_u = self.exponent()
        terms = torch.where(self.dead(ratio), 1, 1 - torch.exp(minus_u) * (1 - minus_u))
        return self.sums(self.weights * terms)

    def exponent(self) -> Tensor:
        """-t / rho, 0 for an infinite rho."""
        finite = torch.where(self.rho.isinf(), 1, self.rho)
        return torch.where(self.rho.isinf(), 0, -self.t / finite).clamp(max=most_exponent(self.t.dtype))


def of_value(
    inputs: Inputs,
    f: Tensor,
    g: Tensor,
    multipliers: Tensor,
    dvalue: Tensor,
    needs: list[bool],
    potentials_too: bool,
    backend: str,
) -> Gradients:
    """The partial derivatives of the dual objective, times dvalue; equations (7) to (10), (14), (18).

    ``needs`` says of x_a, x_b, cost, a, b, reg, relaxation which are wanted.
    """
    needs_a, needs_b, needs_reg, needs_relaxation = needs[3:7]
    ratios = needs_a or needs_b or potentials_too or (needs_relaxation and inputs.kind == "unbalanced")
    ratios = ratios or (needs_reg and inputs.entropy)
    of_points, of_x_b = dvalue, needs[1]
    if inputs.first_self >= 0:
        # P is symmetric: the gradient of one side, counted twice, is that of the cloud.
        of_points = torch.cat([dvalue[: inputs.n_pairs], 2 * dvalue[inputs.n_pairs :]])
        of_x_b = of_x_b and inputs.first_self > 0
    wanted = [needs[0], of_x_b, needs[2], ratios, needs_reg]
    dx_a, dx_b, dcost, ratio_a, ratio_b, entropy = _value_sums(inputs, f, g, of_points, wanted, backend)
    dx_b = dx_b if of_x_b else None
    da = db = dreg = drelaxation = df = dg = dmultipliers = None
    if any(needs[3:7]) or potentials_too:
        row, column = Side(inputs, f, multipliers, True), Side(inputs, g, multipliers, False)
        sides = ((row, ratio_a), (column, ratio_b))
        null = NullPoints(row, column, multipliers) if inputs.kind == "null" else None
    if needs_a or needs_b:
        da, db = (
            _of_weights(side, ratio, null if null is None else null.side(side)) if needed else None
            for (side, ratio), needed in zip(sides, (needs_a, needs_b), strict=True)
        )
    if needs_reg:
        dreg = entropy
        if inputs.entropy:
            # sum P log P from sum a b h(x), with P = a b exp(x)
            dreg = dreg - masses(inputs, True) * masses(inputs, False)
            for side, ratio in sides:
                dreg = dreg + side.sums(side.weights * ratio * (side.log_weights + 0.5))
        if null is not None:
            dreg = dreg + null.entropy()
    if needs_relaxation:
        if inputs.kind == "unbalanced":
            drelaxation = torch.stack([side.of_rho(ratio) for side, ratio in sides], 1)
        else:
            first = multipliers[:, 0] if null is None else null.mass()
            drelaxation = torch.stack([first, torch.zeros_like(first)], 1)
    if potentials_too:
        df, dg = (
            side.asked(ratio) - side.weights * (ratio if null is None else null.side(side).ratio(ratio))
            for side, ratio in sides
        )
        if inputs.entropy:
            # The terms above hold f - o fixed; here f is, and o moves with the weights and reg.
            moved = [torch.where(side.weights > 0, d, 0) for (side, _), d in zip(sides, (df, dg), strict=True)]
            da, db = (
                None if dw is None else dw + side.eps * d / torch.exp(side.log_weights)
                for dw, (side, _), d in zip((da, db), sides, moved, strict=True)
            )
            for (side, _), d in zip(sides, moved, strict=True):
                dreg = dreg if dreg is None else dreg + side.sums(d * (side.log_weights + 0.5))
        dmultipliers = torch.zeros_like(multipliers)
        if inputs.kind == "partial":
            gap = inputs.relaxation[:, 0] - (masses(inputs, True) + masses(inputs, False)) / 2
            dmultipliers = torch.stack([gap, torch.zeros_like(gap)], 1)
        elif null is not None:
            dmultipliers = null.of_potentials()

    def scaled(gradient: Tensor | None, side: Side | None = None) -> Tensor | None:
        if gradient is None:
            return None
        d = dvalue if side is None else side.spread(dvalue)
        d = d.reshape(*d.shape, *[1] * (gradient.dim() - d.dim()))
        gradient = torch.where(d == 0, 0, d * gradient)
        return gradient if side is None or inputs.packed else torch.where(row_mask(inputs, side.side_a), gradient, 0)

    if not (any(needs[3:7]) or potentials_too):
        return Gradients(dx_a, dx_b, dcost, None, None, None, None)
    return Gradients(
        dx_a,
        dx_b,
        dcost,
        scaled(da, row),
        scaled(db, column),
        scaled(dreg),
        scaled(drelaxation),
        scaled(df, row),
        scaled(dg, column),
        scaled(dmultipliers),
    )


def _of_weights(side: Side, ratio: Tensor, null: NullSide | None) -> Tensor:
    """Equation (9): the side's price, and the reference measure's share where that is a ⊗ b."""
    price = side.price(ratio)
    if side.inputs.entropy:
        return price
    if null is None:
        # At a point without weight the ratio of iterations cut short has no bound.
        ratio = ratio.clamp(max=math.exp(most_exponent(ratio.dtype)))
        return price + side.eps * (side.spread(masses(side.inputs, not side.side_a)) - ratio)
    return price + null.of_weights(ratio)


class NullPoints:
    """The null row and column of equation (17) at given potentials: a_0 = sum b, b_0 = sum a."""

    def __init__(self, row: Side, column: Side, multipliers: Tensor):
        inputs = row.inputs
        self.reg, self.cost = inputs.reg, inputs.relaxation[:, 0]
        mass_a, mass_b = masses(inputs, True), masses(inputs, False)
        f_null, g_null = multipliers[:, 0], multipliers[:, 1]
        self.total = mass_a + mass_b
        # x of the corner, whose cost is 0
        self.corner = (f_null + g_null) / self.reg
        self.row = NullSide(self, row, g_null, mass_a, mass_b)
        self.column = NullSide(self, column, f_null, mass_b, mass_a)

    def side(self, side: Side) -> NullSide:
        return self.row if side.side_a else self.column

    def mass(self) -> Tensor:
        """What the null points take, (B,): the derivative of the value with respect to their cost."""
        return self.row.mass() + self.column.mass()

    def entropy(self) -> Tensor:
        """The null points' part of sum a b h(x), (B,)."""
        corner = self.row.weight * self.column.weight * _h(self.corner)
        return self.row.entropy() + self.column.entropy() + corner

    def of_potentials(self) -> Tensor:
        """The derivatives with respect to (f_0, g_0): the null points' weights less their marginals; (B, 2)."""
        corner = self.row.weight * self.column.weight * torch.exp(self.corner)
        of_f = self.column.weight - self.column.mass() - corner
        return torch.stack([of_f, self.row.weight - self.row.mass() - corner], 1)


class NullSide:
    """What the points of one side have to do with the null point of the other.

    ``weight`` is that null point's weight and ``potential`` its potential; ``own_weight`` is the weight of the null
    point of the side itself.
    """

    def __init__(self, null: NullPoints, side: Side, potential, weight, own_weight):
        self.null, self.side, self.potential, self.weight, self.own_weight = null, side, potential, weight, own_weight
        self.x = (side.t + side.spread(potential - null.cost)) / side.eps

    def ratio(self, ratio: Tensor) -> Tensor:
        """The ratio of a point's marginal to its weight, with the null point's part."""
        return ratio + self.side.spread(self.weight) * torch.exp(self.x)

    def mass(self) -> Tensor:
        """What the null point takes from this side, (B,)."""
        return self.weight * self.side.sums(self.side.weights * torch.exp(self.x))

    def entropy(self) -> Tensor:
        return self.weight * self.side.sums(self.side.weights * _h(self.x))

    def of_weights(self, ratio: Tensor) -> Tensor:
        """Less the price: the reference term, and what the null point's weight, this side's total, brings."""
        own = self.side.eps * (self.side.spread(self.null.total) - self.ratio(ratio))
        taken = self.side.sums(self.side.weights * torch.exp(self.x))
        corner = self.own_weight * torch.exp(self.null.corner)
        return own + self.side.spread(self.potential + self.null.reg * (self.null.total - taken - corner))


def _h(x: Tensor) -> Tensor:
    """1 - exp(x) + x exp(x), 1 at -inf."""
    return torch.where(x.isneginf(), 1, 1 - torch.exp(x) + torch.where(x.isneginf(), 0, x) * torch.exp(x))


def of_plan(inputs: Inputs, f: Tensor, g: Tensor, dplan: Tensor, needs: list[bool], backend: str) -> Gradients:
    """The derivatives of <dplan, P> at fixed potentials, and with respect to them; dplan (B, N, M). Equation (20)."""
    zero = torch.zeros_like(inputs.reg)
    out = _plan_backward(inputs, f, g, backend, [*needs[:3], True, needs[5]], scale=zero, dense=dplan)
    return _of_plan_sums(inputs, out, needs)


def of_linear_value(inputs: Inputs, f: Tensor, g: Tensor, d: Tensor, needs: list[bool], backend: str) -> Gradients:
    """The same of d <P, C>: the cost stands in the plan and beside it."""
    zero = torch.zeros_like(d)
    sums = _plan_backward(inputs, f, g, backend, [False] * 3 + [True, needs[5]], scale=zero, cost_scale=d)
    direct = [None] * 3
    if any(needs[:3]):
        # dC = P d (1 - C / reg)
        direct = _plan_backward(inputs, f, g, backend, [*needs[:3], False, False], scale=d, cost_scale=-d / inputs.reg)[
            :3
        ]
    gradients = _of_plan_sums(inputs, sums, [False] * 3 + list(needs[3:]))
    return gradients._replace(x_a=direct[0], x_b=direct[1], cost=direct[2])


def _value_sums(inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: list[bool], backend: str):
    """(dx_a, dx_b, dcost, ratio_a, ratio_b, entropy); nothing, or an empty tensor, for what is not needed."""
    arguments = (*inputs, f, g, dvalue)
    if dispatch.is_needed(arguments) or dispatch.is_recorded(arguments):
        return dispatch.call("sinkhorn_backward", *arguments, needs, backend)
    return dispatch.serving(inputs, backend).backward(inputs, f, g, dvalue, tuple(needs))


def _plan_backward(inputs, f, g, backend, needs, scale, cost_scale=None, dense=None, row=None, col=None):
    return torch.ops.otkern.plan_backward(*inputs, f, g, scale, cost_scale, dense, row, col, needs, backend)


def _of_plan_sums(inputs: Inputs, out, needs: list[bool]) -> Gradients:
    """From the sums with weights H = dL/dP: dC = -P H / reg, da = sum_j b E H, df = a da / reg, dreg = -sum / reg."""
    dx_a, dx_b, dcost, sum_a, sum_b, sum_reg = out
    eps = inputs.reg

    def by_item(x: Tensor) -> Tensor:
        return -x / eps.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)

    def by_row(x: Tensor, side_a: bool) -> Tensor:
        return -x / spread(inputs, side_a, eps).unsqueeze(-1).to(x.dtype) if inputs.packed else by_item(x)

    return Gradients(
        by_row(dx_a, True) if needs[0] else None,
        by_row(dx_b, False) if needs[1] else None,
        by_item(dcost) if needs[2] else None,
        sum_a if needs[3] else None,
        sum_b if needs[4] else None,
        -sum_reg / eps if needs[5] else None,
        None,
        weights_of(inputs, True) * sum_a / spread(inputs, True, eps),
        weights_of(inputs, False) * sum_b / spread(inputs, False, eps),
    )


def of_soft_minimum(
    inputs: Inputs, f: Tensor, g: Tensor, ratio: Tensor, ds: Tensor, side_a: bool, backend: str
) -> Tensor:
    """The derivative of <ds, f> with respect to x_a where f is the soft minimum of g; else of <ds, g> to x_b.

    Equation (24): of each row i, ds_i sum_j b_j E_ij dC_ij / ratio_i. The ratio, sum_j b_j E_ij, is 1 but for the
    rounding of f, which at costs of many reg would be the largest error of all.
    """
    uniform = {"a": None} if side_a else {"b": None}
    problem = inputs._replace(relaxation=None, kind="balanced", entropy=False, **uniform)
    # Weights of 1 in place of 1 / n, and 0 for items that nothing asks for.
    asked = item_sums(inputs, side_a, (ds != 0).to(ds.dtype)) > 0
    sizes = torch.where(asked, item_sizes(inputs, side_a), 0).to(ds.dtype)
    needs = [side_a, not side_a, False, False, False]
    dx = _value_sums(problem, f, g, sizes, needs, backend)[0 if side_a else 1]
    scale = torch.where(ratio > 0, ds / torch.where(ratio > 0, ratio, 1), 0)
    return (dx * scale.unsqueeze(-1)).to(dx.dtype)


def of_potentials(
    inputs: Inputs,
    f: Tensor,
    g: Tensor,
    multipliers: Tensor,
    df: Tensor,
    dg: Tensor,
    dmultipliers: Tensor,
    needs: list[bool],
    tol: float,
    max_iter: int,
    backend: str,
) -> tuple[Gradients, Tensor, Tensor]:
    """Implicit derivatives of <df, f> + <dg, g> + <dmultipliers, multipliers>; the solver's residuals, iterations (B,).

    The potentials are a fixed point, f = U(softmin(g)) and g = U(softmin(f)); its adjoint gives the weights p and q
    that the two soft minima have in the derivative, equation (19). Not for kind "null".
    """
    row, column = Side(inputs, f, multipliers, True), Side(inputs, g, multipliers, False)
    mass_a, mass_b = masses(inputs, True), masses(inputs, False)
    # gauge: f + t, g - t with t = (<b, g> - <a, f>) / (sum a + sum b), which is 0 at the potentials
    sum_df, sum_dg = row.sums(df), column.sums(dg)
    gauged = torch.ones_like(mass_a, dtype=torch.bool)
    if inputs.kind == "unbalanced":
        gauged = inputs.relaxation.isinf().all(1)
    elif inputs.kind == "partial":
        gauged = ~gauged
    dt = torch.where(gauged, (sum_df - sum_dg) / torch.where(mass_a + mass_b > 0, mass_a + mass_b, 1), 0)
    u_a, u_b = df - row.spread(dt) * row.weights, dg + column.spread(dt) * column.weights

    ones = torch.ones_like(inputs.reg)
    ratios = _value_sums(inputs, f, g, ones, [False, False, False, True, False], backend)[3:5]
    slopes = [_slope(side, multipliers) for side in (row, column)]
    singular = inputs.kind == "balanced"

    def solve(u: Tensor, v: Tensor):
        return torch.ops.otkern.implicit(*inputs, f, g, *slopes, None, None, u, v, singular, tol, max_iter, backend)

    p, q, residual, n_iters = solve(u_a, u_b)
    # A right-hand side that is not finite ends the solve at once: it must not come out as 0.
    lost = 0 * (row.sums(u_a) + column.sums(u_b))
    p, q = p + row.spread(lost), q + column.spread(lost)
    scale = torch.zeros_like(inputs.reg)
    if inputs.kind == "partial":
        # One more unknown, the multiplier of the mass, by a second solve with its column.
        mass = inputs.relaxation[:, 0]
        p_mass, q_mass, residual_mass, _ = solve(
            row.weights * ratios[0] / row.spread(mass), column.weights * ratios[1] / column.spread(mass)
        )
        dmass = dmultipliers[:, 0] + (sum_df + sum_dg) / 2 - row.sums(p) - column.sums(q)
        z = dmass / (1 - row.sums(p_mass) - column.sums(q_mass))
        p, q = p - row.spread(z) * p_mass, q - column.spread(z) * q_mass
        scale, residual = z / mass, torch.maximum(residual, residual_mass)

    by_ratio = [torch.where(r > 0, w / torch.where(r > 0, r, 1), 0) for w, r in zip((p, q), ratios, strict=True)]
    out = _plan_backward(
        inputs,
        f,
        g,
        backend,
        [*needs[:3], needs[3] or needs[4] or inputs.entropy, needs[5]],
        scale,
        None,
        None,
        *by_ratio,
    )
    dx_a, dx_b, dcost, sum_a, sum_b, sum_reg = out
    sides = ((row, p, ratios[0]), (column, q, ratios[1]))
    da = db = dreg = drelaxation = None
    # What the offsets are multiplied by, equation (19): (1 - slope) z
    of_offsets = [torch.zeros_like(f), torch.zeros_like(g)]
    if inputs.entropy:
        of_offsets = [
            _of_offset(side, w, u, total, slope)
            for (side, w, _), u, total, slope in zip(sides, (u_a, u_b), (sum_a, sum_b), slopes, strict=True)
        ]
    if needs[3]:
        da = -row.eps * sum_a - row.spread(dt) * f - row.eps * of_offsets[0] / torch.exp(row.log_weights)
    if needs[4]:
        db = -column.eps * sum_b + column.spread(dt) * g - column.eps * of_offsets[1] / torch.exp(column.log_weights)
    if needs[5]:
        dreg = sum_reg
        for (side, w, ratio), of_offset in zip(sides, of_offsets, strict=True):
            terms = -w * torch.where(ratio > 0, ratio, 1).log()
            if side.rho is not None:
                terms = terms - w * side.t / side.rho
            dreg = dreg + side.sums(terms - of_offset * (side.log_weights + 0.5))
    if needs[6]:
        if inputs.kind == "unbalanced":
            drelaxation = torch.stack(
                [side.sums(w * side.t * side.eps / side.rho / side.rho) for side, w, _ in sides], 1
            )
        else:
            first = scale * inputs.reg
            drelaxation = torch.stack([first, torch.zeros_like(first)], 1)
    gradients = Gradients(dx_a, dx_b, dcost, da, db, dreg, drelaxation)
    return gradients, residual, n_iters


def _slope(side: Side, multipliers: Tensor) -> Tensor | None:
    """The derivative of the potential with respect to the soft minimum; None: 1 everywhere."""
    if side.rho is not None:
        return (1 / (1 + side.eps / side.rho)).expand_as(side.t).contiguous()
    if side.inputs.kind == "partial":
        # A capped potential came back with half of the multiplier added to it, which rounds.
        size = side.t.abs() + side.spread(multipliers[:, 0].abs())
        if side.inputs.entropy:
            size = size + side.eps * (side.log_weights + 0.5).abs()
        rounding = (16 if side.inputs.entropy else 2) * torch.finfo(side.t.dtype).eps * size
        return (side.t < -rounding).to(side.t.dtype)
    return None


def _of_offset(side: Side, w: Tensor, u: Tensor, total: Tensor, slope: Tensor) -> Tensor:
    """(1 - slope) z at points with weight, for p = slope z; where the slope is 0, z = u - a sum_j E col."""
    z = w * (side.eps / side.rho) if side.rho is not None else torch.where(slope == 0, u - side.weights * total, 0)
    return torch.where(side.weights > 0, z, 0)
