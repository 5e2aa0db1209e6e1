"""Symmetric updates of problems that are too large for one program: costs in memory, one launch per side and update."""

import triton
import triton.language as tl

from .global_forward import sum_of_blocks
from .onchip_self import self_value
from .relaxation import bounded, load_relaxation
from .tiles import LN_2, LOG2_E, RUNTIME_ONLY, exponent_l2, item_span, load_weights, log2_weights


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def averaged_update_kernel(
    cost_ptr, h_in_ptr, h_out_ptr, new_ptr, s_ptr, gap_ptr, final_h_ptr, final_s_ptr, final_r_ptr,
    other_h_ptr, other_s_ptr, other_r_ptr, w_in_ptr, w_out_ptr, eps_ptr, last_eps_ptr, reg_ptr, relaxation_ptr,
    floor_ptr, sizes_in_ptr, sizes_out_ptr, error_ptr, iters_ptr,
    stride_item, stride_out, stride_in, first_item, N_in, N_out, blocks, parts,
    mode_in, mode_out, has_w_in, has_w_out, kind, k, tol,
    ONCHIP: tl.constexpr, ROW_SIDE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STOPPING: tl.constexpr, SAME: tl.constexpr, FINAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Update k of a block of one side ("out") at eps_k: its soft minima s over the other side ("in"), and

        new = (h + s / (1 + eps / rho)) / 2;  at k = 0 of the annealed loop without the average;  h itself at eps = 0

    STOPPING (a cloud with itself): each block leaves the marginal gap of h, and all of them find in the gaps of the
    update before whether that h is final; then the item is marked as finished after k - 1 updates. The buffers are by
    the parity of k: those of k - 1 are still there.
    FINAL: h, s and r_i = sum_j w_j exp((s_i + h_j - C_ij) / eps) go to the results; SAME: to those of both sides.
    """
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    item = first_item + slot
    start_in, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    start_out, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    if (tl.maximum(n_in, n_out) <= ONCHIP) | (block * BLOCK_OUT >= n_out):
        return
    reg = tl.load(reg_ptr + item)
    if STOPPING:
        if tl.load(iters_ptr + item) >= 0:
            return
        if k > 1:
            gaps = gap_ptr + (2 * slot + (k + 1) % 2).to(tl.int64) * parts
            error = sum_of_blocks(gaps, tl.cdiv(n_out, BLOCK_OUT), COMPUTE)
            error = tl.where(tl.load(last_eps_ptr + item) == reg, error, float("inf"))
            if error <= tol:
                if block == 0:
                    tl.store(error_ptr + item, error)
                    tl.store(iters_ptr + item, k - 1)
                return
    r = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    h_in_ptr += slot.to(tl.int64) * N_in
    row = slot.to(tl.int64) * N_out + r
    h = tl.load(h_out_ptr + row, mask=r < n_out, other=0.0)
    eps = tl.load(eps_ptr + item)
    if eps == 0:
        tl.store(new_ptr + row, h, mask=r < n_out)
        return
    rho_a, rho_b, _, _ = load_relaxation(relaxation_ptr, item, kind, reg * 0.0)
    rho = rho_a
    if not ROW_SIDE:
        rho = rho_b
    base = cost_ptr + slot.to(tl.int64) * stride_item
    floor = tl.load(floor_ptr)
    top = tl.full((BLOCK_OUT,), float("-inf"), COMPUTE)
    total = tl.zeros((BLOCK_OUT,), COMPUTE)
    for c0 in range(0, n_in, BLOCK_IN):
        x = exponents(
            base, h_in_ptr, w_in_ptr, start_in, r, c0, n_out, n_in, stride_out, stride_in, has_w_in, floor,
            h * 0.0, eps, BLOCK_IN, COMPUTE,
        )  # fmt: skip
        # the running maximum; where it is still -inf nothing has been added
        higher = tl.maximum(top, tl.max(x, axis=1))
        at = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - at) + tl.sum(tl.exp2(x - at[:, None]), axis=1)
        top = higher
    s = tl.where(total > 0, -(top + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2 * eps, 0.0)
    if FINAL:
        shares = tl.zeros((BLOCK_OUT,), COMPUTE)
        for c0 in range(0, n_in, BLOCK_IN):
            x = exponents(
                base, h_in_ptr, w_in_ptr, start_in, r, c0, n_out, n_in, stride_out, stride_in, has_w_in, floor,
                s, eps, BLOCK_IN, COMPUTE,
            )  # fmt: skip
            shares += tl.sum(tl.exp2(x), axis=1)
        tl.store(final_h_ptr + start_out + r, h, mask=r < n_out)
        tl.store(final_s_ptr + start_out + r, s, mask=r < n_out)
        tl.store(final_r_ptr + start_out + r, shares, mask=r < n_out)
        if SAME:
            tl.store(other_h_ptr + start_in + r, h, mask=r < n_out)
            tl.store(other_s_ptr + start_in + r, s, mask=r < n_out)
            tl.store(other_r_ptr + start_in + r, shares, mask=r < n_out)
    else:
        damped = s / (1.0 + eps / rho)
        averaged = 0.5 * (h + damped)
        if not STOPPING:
            averaged = tl.where(k == 0, damped, averaged)
        tl.store(new_ptr + row, averaged, mask=r < n_out)
    if STOPPING:
        tl.store(s_ptr + row, s, mask=r < n_out)
        w = load_weights(w_out_ptr, start_out, r, n_out, has_w_out, COMPUTE)
        asked = tl.exp2(bounded(-h / rho) * LOG2_E)
        marginal = tl.exp2(bounded((h - s) / eps) * LOG2_E)
        gap = 2.0 * tl.sum(tl.where(w > 0, w * tl.abs(marginal - asked), 0.0), axis=0)
        tl.store(gap_ptr + (2 * slot + k % 2).to(tl.int64) * parts + block, gap)


@triton.jit
def exponents(
    base, h_in_ptr, w_in_ptr, start_in, r, c0, n_out, n_in, stride_out, stride_in, has_w_in, floor, h_out, eps,
    BLOCK_IN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """log2 of w_c exp((h_r + h_c - C_rc) / eps) in a tile, -inf outside; the difference in the unit of the cost."""
    c = c0 + tl.arange(0, BLOCK_IN)
    w = load_weights(w_in_ptr, start_in, c, n_in, has_w_in, COMPUTE)
    h = tl.load(h_in_ptr + c, mask=c < n_in, other=0.0)
    inside = (r < n_out)[:, None] & (c < n_in)[None, :]
    offsets = r.to(tl.int64)[:, None] * stride_out + c.to(tl.int64)[None, :] * stride_in
    cost = tl.maximum(tl.load(base + offsets, mask=inside, other=float("inf")), floor)
    return exponent_l2(cost, h_out, h, eps) + log2_weights(w)[None, :]


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def finish_self_kernel(
    h_even_ptr, h_odd_ptr, s_even_ptr, s_odd_ptr, gap_ptr, a_ptr, reg_ptr, relaxation_ptr, sizes_a_ptr, sizes_b_ptr,
    value_ptr, f_ptr, g_ptr, error_ptr, iters_ptr,
    first_item, N, M, parts, mode_a, mode_b, has_a, kind, max_iter,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Value and potentials of one cloud with itself from the buffers of its last update."""
    slot = tl.program_id(0)
    item = first_item + slot
    start, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, _ = item_span(item, sizes_b_ptr, mode_b, M)
    if n <= ONCHIP:
        return
    iters = tl.load(iters_ptr + item)
    error = tl.load(error_ptr + item)
    if iters < 0:
        iters = max_iter
        error = sum_of_blocks(gap_ptr + (2 * slot + max_iter % 2).to(tl.int64) * parts, tl.cdiv(n, ROWS), COMPUTE)
    reg = tl.load(reg_ptr + item)
    rho, _, _, _ = load_relaxation(relaxation_ptr, item, kind, reg * 0.0)
    odd = iters % 2
    base = slot.to(tl.int64) * N
    value = reg * 0.0
    mass = reg * 0.0
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = load_weights(a_ptr, start, i, n, has_a, COMPUTE)
        h = by_parity(h_even_ptr, h_odd_ptr, base + i, i < n, odd)
        s = by_parity(s_even_ptr, s_odd_ptr, base + i, i < n, odd)
        h = tl.where(a > 0, h, s / (1.0 + reg / rho))
        part = tl.sum(a, axis=0)
        # Of the parts each counts its own mass squared; the whole is squared below.
        value += self_value(tl.where(a > 0, h, 0.0), s, a, reg, rho, kind) - reg * part * part
        mass += part
        tl.store(f_ptr + start + i, h, mask=i < n)
        tl.store(g_ptr + start_b + i, h, mask=i < n)
    tl.store(value_ptr + item, value + reg * mass * mass)
    tl.store(error_ptr + item, error)
    tl.store(iters_ptr + item, iters)


@triton.jit
def by_parity(even_ptr, odd_ptr, index, inside, odd):
    """What stands in the even or in the odd buffer."""
    return tl.load(tl.where(odd != 0, odd_ptr, even_ptr) + index, mask=inside, other=0.0)
