"""The whole solve of one problem by one program, in one launch: its cost and the iterated matrix stay in registers."""

import triton
import triton.language as tl

from .log_domain import PLAN_SCALE, not_before, scaled_exp2, soft_min
from .onchip_self import solve_self
from .tiles import (
    LN_2,
    LOG2_E,
    RUNTIME_ONLY,
    item_base,
    item_cost,
    item_span,
    load_weights,
    log2_weights,
)

# Scalings of the absorbed potentials that are safe, see `log_domain`.
SCALING_MIN = tl.constexpr(2.0**-16)
SCALING_MAX = tl.constexpr(2.0**16)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def onchip_forward_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, g_init_ptr,
    sizes_a_ptr, sizes_b_ptr, scratch_ptr, value_ptr, f_ptr, g_ptr, error_ptr, iters_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
    first_item, n_pairs, N, M, D, mode_a, mode_b, has_a, has_b, has_init, metric, kind, max_iter, tol,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """One program solves item first_item + p, if it is of this size class, LOWER < max(n, m) <= BLOCK.

    With S = 2^60, the plan of the absorbed potentials is K_ij = S a_i b_j exp((f_i + g_j - C_ij) / reg) and the current
    one p_i K_ij q_j. Of the potentials only g is kept: in a tile of 128 rows a vector over the rows costs 16 registers
    a thread.

    The cost and K are two tiles of registers, and at 128 x 128 just fit.

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
    size = tl.maximum(n, m)
    if (size <= LOWER) | (size > BLOCK):
        return
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK)
    reg = tl.load(reg_ptr + item)
    base_x = item_base(x_ptr, item, start_a, stride_x_b, stride_x_n, mode_a)
    base_y = item_base(y_ptr, item, start_b, stride_y_b, stride_y_n, mode_b)
    cost = item_cost(
        base_x, base_y, scratch_ptr + slot.to(tl.int64) * (BLOCK * BLOCK),
        stride_x_n, stride_x_d, stride_y_n, stride_y_d, n, m, D, metric,
        BLOCK, PART, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
    )  # fmt: skip
    a = load_weights(a_ptr, start_a, i, n, has_a, COMPUTE)
    b = load_weights(b_ptr, start_b, j, m, has_b, COMPUTE)
    g = tl.zeros((BLOCK,), COMPUTE)
    if has_init:
        g = tl.load(g_init_ptr + start_b + j, mask=j < m, other=0.0)
    # An empty side leaves nothing to iterate.
    tol += tl.where((n == 0) | (m == 0), float("inf"), 0.0)
    g, error, k = iterate(cost, g, a, b, reg, max_iter, tol, BLOCK, COMPUTE)

    # All that the results need is read or formed again, to keep it out of the registers during the iterations.
    i = not_before(i, error)
    j = not_before(j, error)
    item = not_before(item, error)
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    a = load_weights(a_ptr, start_a, i, n, has_a, COMPUTE)
    b = load_weights(b_ptr, start_b, j, m, has_b, COMPUTE)
    f, g, value, lost = results(cost, g, a, b, tl.load(reg_ptr + item), i < n)
    tl.store(f_ptr + start_a + i, f, mask=i < n)
    tl.store(g_ptr + start_b + j, g, mask=j < m)
    tl.store(value_ptr + item, value)
    tl.store(error_ptr + item, tl.where(k > 0, error, 0.0) + lost)
    tl.store(iters_ptr + item, k)


@triton.jit
def unreached(cost, a, b):
    """Weight of rows that reach no column of positive weight, 0 for the others, and the same of columns."""
    reached_a = tl.min(cost + tl.where(b > 0, 0.0, float("inf"))[None, :], axis=1) < float("inf")
    reached_b = tl.min(cost + tl.where(a > 0, 0.0, float("inf"))[:, None], axis=0) < float("inf")
    return tl.where(reached_a, 0.0, a), tl.where(reached_b, 0.0, b)


@triton.jit
def iterate(cost, g, a, b, reg, max_iter, tol, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """The g before the last iteration, the marginal gap after it (without unreached weight) and how many there were."""
    lost_a, lost_b = unreached(cost, a, b)
    # the gap that may remain besides the weight that no iteration can move
    tol -= tl.sum(lost_a, axis=0) + tl.sum(lost_b, axis=0)
    a = (a - lost_a) * PLAN_SCALE
    b = (b - lost_b) * PLAN_SCALE
    kernel = tl.zeros((BLOCK, BLOCK), COMPUTE)
    q = tl.zeros((BLOCK,), COMPUTE) + 1.0
    row_sum = tl.zeros((BLOCK,), COMPUTE) + 1.0
    g_last = g
    error = reg + float("inf")
    k = 0
    while (k < max_iter) & (error > tol):
        # p_i = S a_i / sum_j K_ij q_j;  q_j = S b_j / sum_i K_ij p_i
        g_last = g + tl.log2(q) * LN_2 * reg
        p = tl.where(a > 0, a / tl.where(a > 0, row_sum, 1.0), 1.0)
        # A p out of range becomes NaN and makes every q NaN, which fails the test below: one reduction for both sides.
        p = tl.where((p >= SCALING_MIN) & (p <= SCALING_MAX), p, float("nan"))
        col_sum = tl.sum(kernel * p[:, None], axis=0)
        q = tl.where(b > 0, b / tl.where((b > 0) & (col_sum != 0), col_sum, 1.0), 1.0)
        unsafe = tl.sum((~((q >= SCALING_MIN) & (q <= SCALING_MAX))).to(tl.int32), axis=0)
        if (k == 0) | (unsafe > 0):
            # The same iteration once more, in the log domain, then absorb it.
            log_a_l2 = log2_weights(not_before(a, error) * (1.0 / PLAN_SCALE))
            log_b_l2 = log2_weights(not_before(b, error) * (1.0 / PLAN_SCALE))
            f = soft_min(g_last[None, :], cost, log_b_l2[None, :], reg, 1)
            g = soft_min(f[:, None], cost, log_a_l2[:, None], reg, 0)
            exponent = (f[:, None] + g[None, :] - cost) * (LOG2_E / reg)
            kernel = scaled_exp2(exponent + (log_a_l2[:, None] + log_b_l2[None, :]))
            p = tl.zeros((BLOCK,), COMPUTE) + 1.0
            q = tl.zeros((BLOCK,), COMPUTE) + 1.0
        # The row sums of the next iteration are the marginals of this one: S P1 = p (K q).
        row_sum = tl.sum(kernel * q[None, :], axis=1)
        k += 1
        if (tol >= 0) | (k == max_iter):
            error = tl.sum(tl.abs(p * row_sum - a), axis=0) * (1.0 / PLAN_SCALE)
    return g_last, error, k


@triton.jit
def results(cost, g_last, a, b, reg, row_inside):
    """Potentials with their gauge, value and unreached weight: the last iteration once more, in the log domain.

    That serves the points of zero weight as well.
    """
    log_a_l2 = log2_weights(a)
    log_b_l2 = log2_weights(b)
    f = soft_min(g_last[None, :], cost, log_b_l2[None, :], reg, 1)
    g = soft_min(f[:, None], cost, log_a_l2[:, None], reg, 0)
    unweighted = (a == 0) & row_inside
    if tl.sum(unweighted.to(tl.int32), axis=0) > 0:
        f = tl.where(unweighted, soft_min(g[None, :], cost, log_b_l2[None, :], reg, 1), f)

    mass_a = tl.sum(a, axis=0)
    mass_b = tl.sum(b, axis=0)
    af = tl.sum(a * f, axis=0)
    bg = tl.sum(b * g, axis=0)
    # gauge: <a, f> = <b, g>
    mass = mass_a + mass_b
    shift = tl.where(mass > 0, (bg - af) / tl.where(mass > 0, mass, 1.0), 0.0)
    # value = <a, f> + <b, g> - reg (sum b - sum a sum b)
    value = (af + mass_a * shift) + (bg - mass_b * shift) - reg * (mass_b - mass_a * mass_b)
    lost_a, lost_b = unreached(cost, a, b)
    lost = tl.sum(lost_a, axis=0) + tl.sum(lost_b, axis=0)
    return f + shift, g - shift, tl.where(lost > 0, float("inf"), value), lost
