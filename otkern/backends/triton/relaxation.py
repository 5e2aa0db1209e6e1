"""What the marginals of a problem ask of one side: its update, its term in the dual objective, its asked marginal.

A side's soft minimum s is taken in the log domain and is +inf at a point that reaches nothing with weight ("dead").
rho is +inf where the marginal is a constraint; the offset o is 0 unless the reference measure is constant ("entropy").
"""

import triton
import triton.language as tl

from .tiles import LN_2, LOG2_E, log2_weights

BALANCED = tl.constexpr(0)
UNBALANCED = tl.constexpr(1)
PARTIAL = tl.constexpr(2)
NULL = tl.constexpr(3)

# Below this the exponential minus one is summed as a series, of which SERIES terms are exact in fp64.
SMALL = tl.constexpr(0.5)
SERIES = tl.constexpr(15)


@triton.jit
def load_relaxation(relaxation_ptr, item, kind, unused):
    """(rho_a, rho_b, mass, null cost) of an item, +inf and 0 where its kind has none; `unused` is 0 in their dtype."""
    rho_a = unused + float("inf")
    rho_b = unused + float("inf")
    mass = unused
    null_cost = unused
    if kind == UNBALANCED:
        rho_a = tl.load(relaxation_ptr + 2 * item)
        rho_b = tl.load(relaxation_ptr + 2 * item + 1)
    if kind == PARTIAL:
        mass = tl.load(relaxation_ptr + 2 * item)
    if kind == NULL:
        null_cost = tl.load(relaxation_ptr + 2 * item)
    return rho_a, rho_b, mass, null_cost


@triton.jit
def with_null(cost, rows, cols, n, m, null_cost):
    """The cost with the null point of each side at index n and m; +inf beyond it."""
    null = tl.where((rows == n)[:, None] & (cols == m)[None, :], 0.0, null_cost)
    cost = tl.where((rows == n)[:, None] | (cols == m)[None, :], null, cost)
    return tl.where((rows <= n)[:, None] & (cols <= m)[None, :], cost, float("inf"))


@triton.jit
def soft_min_or_inf(potential, cost, log_weight_l2, eps, AXIS: tl.constexpr):
    """-eps log sum w exp((potential - C) / eps) along AXIS, +inf where every term is masked.

    The difference is taken in the unit of the cost, where it loses least; at small eps both of its terms are large.
    """
    top = tl.max((potential - cost) * (LOG2_E / eps) + log_weight_l2, axis=AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    # The exponents are formed again, in a form that the compiler cannot recognise: kept, they are a second tile.
    potential += (tl.max(top, axis=0) == float("inf")).to(potential.dtype)
    exponent = (potential - cost) * (LOG2_E / eps) + log_weight_l2
    total = tl.sum(tl.exp2(exponent - tl.expand_dims(top, AXIS)), axis=AXIS)
    return tl.where(total > 0, -(top + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2 * eps, float("inf"))


@triton.jit
def offset(w, eps, entropy):
    """o = -eps (log w + 1/2) where the reference measure is constant; 0 at points without weight."""
    log_w = log2_weights(tl.where(w > 0, w, 1.0)) * LN_2
    return tl.where((entropy != 0) & (w > 0), -eps * (log_w + 0.5), 0.0)


@triton.jit
def potential_of(s, o, rho, eps, kind):
    """The potential that a soft minimum leads to.

    partial                 min(o, s)
    else                    o + (s - o) rho / (rho + eps), which is s where rho = inf; 0 at a dead point
    """
    dead = s == float("inf")
    alive = tl.where(dead, 0.0, s)
    h = tl.where(rho == float("inf"), alive, o + (alive - o) / (1.0 + eps / rho))
    return tl.where(kind == PARTIAL, tl.minimum(o, s), tl.where(dead, 0.0, h))


@triton.jit
def asked_l2(s, o, rho, eps):
    """log2 of the marginal that the potential asks for, over the weight: -(s - o) / (rho + eps); s not dead."""
    return bounded(-(s - o) / (rho + eps)) * LOG2_E


@triton.jit
def bounded(exponent):
    """At most 60, or 600 in fp64: beyond it only iterations cut short lead, whose value is to stay finite."""
    return tl.minimum(exponent, 600.0 if exponent.dtype == tl.float64 else 60.0)


@triton.jit
def dual_term(w, s, o, rho, eps, kind):
    """A point's share of the dual objective.

    partial                 w (f - o)
    else                    -rho w (exp(-(f - o) / rho) - 1), which is w f where rho = inf; rho w at a dead point

    With x = s - o, k = rho / (rho + eps) and phi(z) = (exp(z) - 1) / z the second is w k x phi(-x / (rho + eps)),
    which loses nothing when rho is large.
    """
    dead = s == float("inf")
    x = tl.where(dead, 0.0, s) - o
    term = x / (1.0 + eps / rho) * phi(bounded(-x / (rho + eps)))
    term = tl.where(rho == float("inf"), x, term)
    # the infinite price of a dead point is left to the caller: it concerns the whole value
    term = tl.where(dead, tl.where(rho == float("inf"), 0.0, rho), term)
    term = tl.where(kind == PARTIAL, tl.minimum(o, s) - o, term)
    return tl.where(w > 0, w * term, 0.0)


@triton.jit
def phi(z):
    """(exp(z) - 1) / z, 1 at 0."""
    small = tl.abs(z) < SMALL
    series = tl.zeros_like(z) + 1.0
    x = tl.where(small, z, 0.0)
    for n in tl.static_range(SERIES, 1, -1):
        series = 1.0 + series * x * (1.0 / n)
    return tl.where(small, series, (tl.exp2(z * LOG2_E) - 1.0) / tl.where(small, 1.0, z))


@triton.jit
def marginal_gap(w, s_last, s, o, rho, eps, lam_last, lam, kind):
    """Distance of each point's marginal from what its potential asks for.

    The potential follows from s_last, and s is what the update would give now, so that the marginal is
    w exp((f - s) / eps). In `partial` each of the two is without its multiplier lam of the mass.
    """
    dead = s == float("inf")
    if kind == PARTIAL:
        f = tl.minimum(o, s_last - lam_last)
        marginal = tl.where(dead, 0.0, w * tl.exp2((f - tl.where(dead, 0.0, s - lam)) * (LOG2_E / eps)))
        gap = capped_gap(marginal, w, (f < o) & ~dead)
    else:
        last = tl.where(dead, 0.0, s_last)
        asked = asked_l2(last, o, rho, eps)
        change = (last - tl.where(dead, 0.0, s)) * (LOG2_E / eps)
        gap = w * tl.abs(tl.exp2(bounded((asked + change) * LN_2) * LOG2_E) - tl.exp2(asked))
        gap = tl.where(dead, tl.where(rho == float("inf"), w, 0.0), gap)
    return tl.where(w > 0, gap, 0.0)


@triton.jit
def capped_gap(marginal, w, below):
    """The marginal is at most w, and equal to it where the potential is below its cap."""
    excess = marginal - w
    return tl.where(below, tl.abs(excess), tl.maximum(excess, 0.0))
