"""The solve of one problem by one program for every kind of marginals and with a schedule of eps.

Every iteration is done in the log domain from the cost, the only tile that stays in registers.
"""

import triton
import triton.language as tl

from .log_domain import not_before
from .onchip_self import solve_self
from .relaxation import (
    NULL,
    PARTIAL,
    asked_l2,
    capped_gap,
    dual_term,
    load_relaxation,
    marginal_gap,
    offset,
    potential_of,
    soft_min_or_inf,
    with_null,
)
from .tiles import LN_2, LOG2_E, RUNTIME_ONLY, item_base, item_cost, item_span, load_weights, log2_weights


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def onchip_relaxed_forward_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, g_init_ptr,
    sizes_a_ptr, sizes_b_ptr, scratch_ptr, value_ptr, f_ptr, g_ptr, multipliers_ptr, error_ptr, iters_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
    first_item, n_pairs, N, M, D, mode_a, mode_b, has_a, has_b, has_init, metric, kind, entropy, max_iter, tol,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """One program solves item first_item + p, if it is of this size class, LOWER < max(n, m) (+ 1: null) <= BLOCK.

    s and t are the soft minima of rows and columns, f and g follow from them. The s that an iteration ends with give
    its marginal error, and are what the next one begins with.

    SELF: items from n_pairs on match a cloud with itself.
    """
    slot = tl.program_id(0)
    item = first_item + slot
    if SELF:
        if item >= n_pairs:
            solve_self(
                x_ptr, a_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, sizes_a_ptr, sizes_b_ptr,
                scratch_ptr, value_ptr, f_ptr, g_ptr, error_ptr, iters_ptr, stride_x_b, stride_x_n, stride_x_d,
                slot, item, N, M, D, mode_a, mode_b, has_a, metric, kind, max_iter, tol,
                BLOCK, LOWER, PART, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
            )  # fmt: skip
            return
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    null = (kind == NULL).to(tl.int32)
    size = tl.maximum(n, m) + null
    if (size <= LOWER) | (size > BLOCK):
        return
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK)
    reg = tl.load(reg_ptr + item)
    rho_a, rho_b, mass, null_cost = load_relaxation(relaxation_ptr, item, kind, reg * 0.0)
    base_x = item_base(x_ptr, item, start_a, stride_x_b, stride_x_n, mode_a)
    base_y = item_base(y_ptr, item, start_b, stride_y_b, stride_y_n, mode_b)
    cost = item_cost(
        base_x, base_y, scratch_ptr + slot.to(tl.int64) * (BLOCK * BLOCK),
        stride_x_n, stride_x_d, stride_y_n, stride_y_d, n, m, D, metric,
        BLOCK, PART, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
    )  # fmt: skip
    a = load_weights(a_ptr, start_a, i, n, has_a, COMPUTE)
    b = load_weights(b_ptr, start_b, j, m, has_b, COMPUTE)
    # the weights of the null points
    mass_b = tl.where(kind == NULL, tl.sum(b, axis=0), 0.0)
    mass_a = tl.where(kind == NULL, tl.sum(a, axis=0), 0.0)
    b = tl.where(j == m, mass_a, b)
    if kind == NULL:
        cost = with_null(cost, i, j, n, m, null_cost)
    g = tl.zeros((BLOCK,), COMPUTE)
    if has_init:
        g = tl.load(g_init_ptr + start_b + j, mask=j < m, other=0.0)
    if kind == PARTIAL:
        g = tl.minimum(g, offset(b, reg, entropy))

    factor = tl.load(eps_factor_ptr)
    eps = tl.where(max_iter > 1, tl.maximum(reg, tl.load(eps_start_ptr + item)), reg)
    s = soft_min_or_inf(g[None, :], cost, log2_weights(b)[None, :], eps, 1)
    # New values, not names for s and lam: Triton carries a variable through a loop only if the body changes it, and
    # `s_last = s` there would be the same value as here.
    s_last = s + 0.0
    t = tl.zeros((BLOCK,), COMPUTE) + float("inf")
    lam = reg * 0.0
    lam_last = lam + 0.0
    step_l2 = lam
    moved_l2 = lam + float("-inf")
    error = reg + float("inf")
    # An empty side leaves nothing to iterate, but for null points.
    empty = ((n == 0) | (m == 0)) & (kind != NULL)
    tol += tl.where(empty, float("inf"), 0.0)
    k = 0
    while (k < max_iter) & (error > tol):
        lam_last = lam
        s_last = s
        # Weights are read again where they are needed: a vector over 128 rows takes 16 registers a thread.
        again = not_before(i, error)
        a = tl.where(again == n, mass_b, load_weights(a_ptr, start_a, again, n, has_a, COMPUTE))
        f = potential_of(s - lam, offset(a, eps, entropy), rho_a, eps, kind)
        t = soft_min_or_inf(f[:, None], cost, log2_weights(a)[:, None], eps, 0) - lam
        o_b = offset(b, eps, entropy)
        g = potential_of(t, o_b, rho_b, eps, kind)
        if kind == PARTIAL:
            # P = a b exp((f + g + lam - C) / eps); lam gives it its mass
            moved_l2 = log2_moved(g, t, b, eps)
            step_l2 = tl.where(moved_l2 > float("-inf"), tl.log2(mass) - moved_l2, 0.0)
            lam += step_l2 * LN_2 * eps
        k += 1
        at_reg = eps == reg
        # the last allowed iteration is at reg
        next_eps = tl.where(k < max_iter - 1, tl.maximum(reg, eps * factor), reg)
        s = soft_min_or_inf(g[None, :], cost, log2_weights(b)[None, :], next_eps, 1)
        again = not_before(i, tl.max(tl.abs(s), axis=0))
        a = tl.where(again == n, mass_b, load_weights(a_ptr, start_a, again, n, has_a, COMPUTE))
        gap_a = marginal_gap(a, s_last, s, offset(a, eps, entropy), rho_a, eps, lam_last, lam, kind)
        gap_b = tl.where(t == float("inf"), tl.where(rho_b == float("inf"), b, 0.0), 0.0)
        if kind == PARTIAL:
            marginal = tl.where(b > 0, b * tl.exp2((g - t) * (LOG2_E / eps) + step_l2), 0.0)
            gap_b = capped_gap(marginal, b, (g < o_b) & (t < float("inf")))
        error = tl.sum(gap_a, axis=0) + tl.sum(gap_b, axis=0)
        if kind == PARTIAL:
            error = tl.where(moved_l2 > float("-inf"), error, mass)
        error = tl.where(at_reg, error, float("inf"))
        eps = next_eps

    a = tl.where(i == n, mass_b, load_weights(a_ptr, start_a, not_before(i, error), n, has_a, COMPUTE))
    f, g, value, lost = results(s_last, s, t, g, a, b, reg, rho_a, rho_b, mass, lam_last, lam, moved_l2, entropy, kind)
    tl.store(f_ptr + start_a + i, tl.where(empty, 0.0, f), mask=i < n)
    tl.store(g_ptr + start_b + j, tl.where(empty, 0.0, g), mask=j < m)
    first = tl.where(kind == PARTIAL, tl.where(empty, 0.0, lam), 0.0)
    f_null = tl.sum(tl.where(i == n, f, 0.0), axis=0)
    g_null = tl.sum(tl.where(j == m, g, 0.0), axis=0)
    tl.store(multipliers_ptr + 2 * item, tl.where(kind == NULL, f_null, first))
    tl.store(multipliers_ptr + 2 * item + 1, tl.where(kind == NULL, g_null, 0.0))
    tl.store(value_ptr + item, value)
    tl.store(error_ptr + item, tl.where(k > 0, error, lost))
    tl.store(iters_ptr + item, k)


@triton.jit
def log2_moved(g, t, b, eps):
    """log2 of sum b exp((g - t) / eps), the mass that the columns receive; -inf if all of them are dead.

    With costs many times eps it would vanish in the first iterations.
    """
    exponent = tl.where((b > 0) & (t < float("inf")), (g - t) * (LOG2_E / eps) + log2_weights(b), float("-inf"))
    top = tl.max(exponent, axis=0)
    at = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(exponent - at), axis=0)
    return tl.where(total > 0, at + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def results(s_last, s, t, g, a, b, reg, rho_a, rho_b, mass, lam_last, lam, moved_l2, entropy, kind):
    """Potentials with their gauge, the value, and the marginal error of an item without a plan."""
    o_a = offset(a, reg, entropy)
    o_b = offset(b, reg, entropy)
    # what follows from the last g serves the points without weight
    f = potential_of(tl.where(a > 0, s_last - lam_last, s - lam), o_a, rho_a, reg, kind)
    strict_a = (rho_a == float("inf")) & (kind != PARTIAL)
    strict_b = (rho_b == float("inf")) & (kind != PARTIAL)
    lost_a = tl.sum(tl.where(s == float("inf"), a, 0.0), axis=0)
    lost_b = tl.sum(tl.where(t == float("inf"), b, 0.0), axis=0)
    lost = tl.where(strict_a, lost_a, 0.0) + tl.where(strict_b, lost_b, 0.0)
    lost = tl.where(kind == PARTIAL, mass, lost)
    none = tl.where(kind == PARTIAL, moved_l2 == float("-inf"), lost > 0)

    mass_a = tl.sum(a, axis=0)
    mass_b = tl.sum(b, axis=0)
    asked = tl.where(t < float("inf"), b * tl.exp2(asked_l2(tl.where(t < float("inf"), t, 0.0), o_b, rho_b, reg)), 0.0)
    moved = tl.where(kind == PARTIAL, mass, tl.where(rho_b == float("inf"), mass_b, tl.sum(asked, axis=0)))
    dual_a = tl.sum(dual_term(a, s_last - lam_last, o_a, rho_a, reg, kind), axis=0)
    dual_b = tl.sum(dual_term(b, t, o_b, rho_b, reg, kind), axis=0)
    # gauge: <a, f> = <b, g>, where adding a constant to f and taking it from g changes nothing
    total = mass_a + mass_b
    shift = (tl.sum(b * g, axis=0) - tl.sum(a * f, axis=0)) / tl.where(total > 0, total, 1.0)
    shift = tl.where(strict_a & strict_b & (total > 0), shift, 0.0)
    # value = A + B + lam mass - reg (sum P - R), equation (6) where both sides are strict
    value = (dual_a + mass_a * shift) + (dual_b - mass_b * shift) + lam * mass
    value -= reg * (moved - tl.where(entropy != 0, 0.0, mass_a * mass_b))
    f = f + shift + 0.5 * lam
    g = g - shift + 0.5 * lam
    return f, g, tl.where(none, float("inf"), value), lost
