"""The solve of a cloud with itself by one program: one potential, averaged updates, equation (27)."""

import triton
import triton.language as tl

from .log_domain import PLAN_SCALE, not_before, scaled_exp2, soft_min
from .relaxation import UNBALANCED, bounded, dual_term, load_relaxation
from .tiles import LN_2, LOG2_E, item_base, item_cost, item_span, load_weights, log2_weights

# Scalings within 2^-16 and 2^16 of the absorbed potential are safe, see `log_domain`.
SCALING_L2 = tl.constexpr(16.0)


@triton.jit
def solve_self(
    x_ptr, a_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, sizes_a_ptr, sizes_b_ptr, scratch_ptr,
    value_ptr, f_ptr, g_ptr, error_ptr, iters_ptr, stride_x_b, stride_x_n, stride_x_d,
    slot, item, N, M, D, mode_a, mode_b, has_a, metric, kind, max_iter, tol,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program solves an item that matches a cloud with itself, if LOWER < n <= BLOCK: equation (27).

    With S = 2^60, the plan of the absorbed potential is K_ij = S a_i a_j exp((h_i + h_j - C_ij) / eps), and the current
    one 2^(z_i + z_j) K_ij. An update at eps = reg changes z alone; any other absorbs the new h.
    """
    start, n = item_span(item, sizes_a_ptr, mode_a, N)
    if (n <= LOWER) | (n > BLOCK):
        return
    i = tl.arange(0, BLOCK)
    base = item_base(x_ptr, item, start, stride_x_b, stride_x_n, mode_a)
    cost = item_cost(
        base, base, scratch_ptr + slot.to(tl.int64) * (BLOCK * BLOCK),
        stride_x_n, stride_x_d, stride_x_n, stride_x_d, n, n, D, metric,
        BLOCK, PART, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
    )  # fmt: skip
    reg = tl.load(reg_ptr + item)
    rho, _, _, _ = load_relaxation(relaxation_ptr, item, kind, reg * 0.0)
    eps = tl.where(max_iter > 1, tl.maximum(reg, tl.load(eps_start_ptr + item)), reg)
    # an empty cloud leaves nothing to iterate
    tol += tl.where(n == 0, float("inf"), 0.0)
    tl.store(f_ptr + start + i, tl.zeros((BLOCK,), COMPUTE), mask=i < n)
    z, error, k = iterate_self(
        cost, a_ptr, f_ptr, start, n, has_a, reg, eps, tl.load(eps_factor_ptr), rho, kind, max_iter, tol, BLOCK, COMPUTE
    )

    i = not_before(i, error)
    item = not_before(item, error)
    start, n = item_span(item, sizes_a_ptr, mode_a, N)
    a = load_weights(a_ptr, start, i, n, has_a, COMPUTE)
    h = tl.load(f_ptr + start + i, mask=i < n, other=0.0) + z * (LN_2 * reg)
    s = soft_min(h[None, :], cost, log2_weights(a)[None, :], reg, 1)
    h = tl.where(a > 0, h, s / (1.0 + reg / rho))
    value = self_value(tl.where(a > 0, h, 0.0), s, a, reg, rho, kind)
    start_b, _ = item_span(item, sizes_b_ptr, mode_b, M)
    tl.store(f_ptr + start + i, h, mask=i < n)
    tl.store(g_ptr + start_b + i, h, mask=i < n)
    tl.store(value_ptr + item, value)
    tl.store(error_ptr + item, tl.where(k > 0, error, 0.0))
    tl.store(iters_ptr + item, k)


@triton.jit
def iterate_self(
    cost, a_ptr, h_ptr, start, n, has_a, reg, eps, factor, rho, kind, max_iter, tol,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The scalings of the absorbed potential, the marginal error and how many iterations there were.

    Weights and the absorbed potential, h_ptr, are read in every iteration: a vector over 128 rows takes 16 registers a
    thread.
    """
    i = tl.arange(0, BLOCK)
    kernel = tl.zeros((BLOCK, BLOCK), COMPUTE)
    z = tl.zeros((BLOCK,), COMPUTE)
    # NaN: h has to be absorbed anew
    row_sum = tl.zeros((BLOCK,), COMPUTE) + float("nan")
    error = reg + float("inf")
    k = 0
    while (k < max_iter) & (error > tol):
        # s = h + eps log(S a / row sum), and half of the way to k s: equation (27). The slope k is formed in the loop:
        # kept, it and what follows from it take more registers than rho.
        slope = 1.0 / (1.0 + reg / not_before(rho, error))
        tl.debug_barrier()
        h = tl.load(h_ptr + start + not_before(i, error), mask=i < n, other=0.0)
        scaled_a = load_weights(a_ptr, start, not_before(i, error), n, has_a, COMPUTE) * PLAN_SCALE
        ratio = tl.where(scaled_a > 0, scaled_a / tl.where(scaled_a > 0, row_sum, 1.0), 1.0)
        target = slope * tl.log2(ratio) - (1.0 - slope) * h * (LOG2_E / reg)
        next_z = tl.where(scaled_a > 0, 0.5 * (z + target), 0.0)
        unsafe = tl.sum((~(tl.abs(next_z) <= SCALING_L2)).to(tl.int32), axis=0)
        if (unsafe > 0) | (eps != reg):
            log_a_l2 = log2_weights(scaled_a * (1.0 / PLAN_SCALE))
            h += z * (LN_2 * reg)
            s = soft_min(h[None, :], cost, log_a_l2[None, :], eps, 1)
            h = 0.5 * (h + s / (1.0 + eps / rho))
            tl.debug_barrier()
            tl.store(h_ptr + start + i, h, mask=i < n)
            # the weights again, so that the two passes over the tile are not mixed
            again = not_before(i, tl.max(tl.abs(s), axis=0))
            log_a_l2 = log2_weights(load_weights(a_ptr, start, again, n, has_a, COMPUTE))
            exponent = (h[:, None] + h[None, :] - cost) * (LOG2_E / eps)
            kernel = scaled_exp2(exponent + (log_a_l2[:, None] + log_a_l2[None, :]))
            z = tl.zeros((BLOCK,), COMPUTE)
        else:
            z = next_z
        row_sum = tl.sum(kernel * tl.exp2(z)[None, :], axis=1)
        k += 1
        if (eps == reg) & ((tol >= 0) | (k == max_iter)):
            again = not_before(i, tl.sum(row_sum, axis=0))
            asked = load_weights(a_ptr, start, again, n, has_a, COMPUTE) * PLAN_SCALE
            if kind == UNBALANCED:
                tl.debug_barrier()
                h = tl.load(h_ptr + start + again, mask=again < n, other=0.0)
                asked *= tl.exp2(bounded(-(h + z * (LN_2 * reg)) / rho) * LOG2_E)
            error = tl.sum(tl.abs(tl.exp2(z) * row_sum - asked), axis=0) * (2.0 / PLAN_SCALE)
        # K at another eps does not serve the next iteration. Scalings know h to the rounding of eps, and a small rho
        # asks for it in its own unit.
        row_sum = tl.where((eps == reg) & (8.0 * rho >= reg), row_sum, float("nan"))
        # the last allowed iteration is at reg
        eps = tl.where(k < max_iter - 1, tl.maximum(reg, eps * factor), reg)
    return z, error, k


@triton.jit
def self_value(h, s, a, reg, rho, kind):
    """2 A(h) - reg (sum P - (sum a)^2), equations (6) and (12); s are the soft minima of h, which say the mass of P."""
    dual = tl.sum(dual_term(a, h * (1.0 + reg / rho), h * 0.0, rho, reg, kind), axis=0)
    mass = tl.sum(a, axis=0)
    excess = tl.sum(tl.where(a > 0, a * (tl.exp2((h - s) * (LOG2_E / reg)) - 1.0), 0.0), axis=0)
    return 2.0 * dual - reg * (excess + (mass - mass * mass))
