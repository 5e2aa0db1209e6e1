"""The kernels of `global_forward` for every kind of marginals and with a schedule of eps.

What lies in memory between two launches are the soft minima of rows and columns; whoever needs a potential forms it
from them. Weights come padded, one row of N + 1 an item where there are null points, so that layouts end at the points.
"""

import triton
import triton.language as tl

from .global_forward import sum_of_blocks
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
    with_null,
)
from .tiles import LN_2, LOG2_E, RUNTIME_ONLY, item_span, load_weights, log2_weights


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def enlarged_weights_kernel(
    w_out_ptr, w_in_ptr, sizes_out_ptr, sizes_in_ptr, out_ptr,
    first_item, N_out, N_in, mode_out, mode_in, has_w_out, has_w_in, kind,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The weights of one side of an item, followed by that of its null point, the mass of the other side, and zeros."""
    item = first_item + tl.program_id(0)
    start_out, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    start_in, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    null = (kind == NULL).to(tl.int32)
    mass_in = tl.zeros((BLOCK,), COMPUTE)
    if kind == NULL:
        for first in range(0, n_in, BLOCK):
            c = first + tl.arange(0, BLOCK)
            mass_in += load_weights(w_in_ptr, start_in, c, n_in, has_w_in, COMPUTE)
    total_in = tl.sum(mass_in, axis=0)
    out_ptr += item.to(tl.int64) * (N_out + null)
    for first in range(0, N_out + null, BLOCK):
        r = first + tl.arange(0, BLOCK)
        w = load_weights(w_out_ptr, start_out, r, n_out, has_w_out, COMPUTE)
        tl.store(out_ptr + r, tl.where(r == n_out, total_in, w), mask=r < N_out + null)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def half_update_relaxed_kernel(
    cost_ptr, s_in_ptr, s_out_ptr, s_old_ptr, init_ptr, gap_ptr, lam_ptr, w_in_ptr, w_out_ptr,
    eps_ptr, eps_in_ptr, reg_ptr, relaxation_ptr, sizes_in_ptr, sizes_out_ptr, error_ptr, iters_ptr,
    stride_item, stride_out, stride_in, first_item, N_in, N_out, blocks, parts,
    mode_in, mode_out, has_init, kind, entropy, k, tol,
    ONCHIP: tl.constexpr, ROW_SIDE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One half of iteration k at eps_k: the soft minima of a block of one side ("out") over the other one ("in").

    The potentials of "in" were made at eps_in: eps_(k - 1) for the row side, which begins an iteration. It also gives
    the mass its multiplier after iteration k - 1, and leaves per block the marginal gap of that iteration, because its
    soft minima are minus the logarithm of the row sums. The column side adds the gaps up, and where they are within
    the tolerance marks the item as finished after k iterations and changes nothing.
    """
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    item = first_item + slot
    null = (kind == NULL).to(tl.int32)
    start_in, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    _, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    if (tl.maximum(n_in, n_out) + null <= ONCHIP) | (block * BLOCK_OUT >= n_out + null):
        return
    if tl.load(iters_ptr + item) >= 0:
        return
    gap_ptr += slot.to(tl.int64) * parts
    if not ROW_SIDE:
        if k > 0:
            error = sum_of_blocks(gap_ptr, tl.cdiv(n_in + null, BLOCK_OUT), COMPUTE)
            if error <= tol:
                if block == 0:
                    tl.store(error_ptr + item, error)
                    tl.store(iters_ptr + item, k)
                return
    eps = tl.load(eps_ptr + item)
    eps_in = tl.load(eps_in_ptr + item)
    rho_a, rho_b, mass, null_cost = load_relaxation(relaxation_ptr, item, kind, eps * 0.0)
    rho_out = rho_a
    rho_in = rho_b
    if not ROW_SIDE:
        rho_out = rho_b
        rho_in = rho_a
    s_in_ptr += slot.to(tl.int64) * (N_in + null)
    s_out_ptr += slot.to(tl.int64) * (N_out + null)
    w_in_ptr += item.to(tl.int64) * (N_in + null)
    w_out_ptr += item.to(tl.int64) * (N_out + null)
    lam_ptr += 2 * slot
    # the multiplier with which the potentials of "in" are formed, and the one after that iteration
    lam_in = eps * 0.0
    lam = lam_in
    moved_l2 = lam_in
    if kind == PARTIAL:
        if not ROW_SIDE:
            lam_in = tl.load(lam_ptr + k % 2)
        elif k > 0:
            lam_in = tl.load(lam_ptr + (k - 1) % 2)
            moved_l2 = log2_moved_columns(s_in_ptr, w_in_ptr, n_in, lam_in, eps_in, rho_in, entropy, BLOCK_IN, COMPUTE)
            lam = lam_in + multiplier_step_l2(moved_l2, mass) * LN_2 * eps_in
            if block == 0:
                tl.store(lam_ptr + k % 2, lam)

    r = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    base = cost_ptr + slot.to(tl.int64) * stride_item
    top = tl.full((BLOCK_OUT,), float("-inf"), COMPUTE)
    total = tl.zeros((BLOCK_OUT,), COMPUTE)
    gap_in = tl.zeros((BLOCK_IN,), COMPUTE)
    for c0 in range(0, n_in + null, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        w = tl.load(w_in_ptr + c, mask=c < n_in + null, other=0.0)
        o = offset(w, eps_in, entropy)
        potential = tl.zeros((BLOCK_IN,), COMPUTE)
        if (not ROW_SIDE) | (k > 0):
            s = tl.load(s_in_ptr + c, mask=c < n_in + null, other=float("inf")) - lam_in
            potential = potential_of(s, o, rho_in, eps_in, kind)
            if ROW_SIDE:
                dead = s == float("inf")
                gap = tl.where(dead, tl.where(rho_in == float("inf"), w, 0.0), 0.0)
                if kind == PARTIAL:
                    log_ratio = (potential - tl.where(dead, 0.0, s)) * (LOG2_E / eps_in)
                    marginal = w * tl.exp2(log_ratio + multiplier_step_l2(moved_l2, mass))
                    gap = capped_gap(tl.where(dead | (w == 0), 0.0, marginal), w, (potential < o) & ~dead)
                gap_in += gap
        else:
            if has_init:
                potential = tl.load(init_ptr + start_in + c, mask=c < n_in, other=0.0)
            if kind == PARTIAL:
                potential = tl.minimum(potential, offset(w, tl.load(reg_ptr + item), entropy))
        inside = (r < n_out)[:, None] & (c < n_in)[None, :]
        offsets = r.to(tl.int64)[:, None] * stride_out + c.to(tl.int64)[None, :] * stride_in
        cost = tl.load(base + offsets, mask=inside, other=float("inf"))
        if kind == NULL:
            cost = with_null(cost, r, c, n_out, n_in, null_cost)
        # the difference in the unit of the cost, where it loses least
        x = (potential[None, :] - cost) * (LOG2_E / eps) + log2_weights(w)[None, :]  # (BLOCK_OUT, BLOCK_IN)
        # the running maximum; where it is still -inf nothing has been added
        higher = tl.maximum(top, tl.max(x, axis=1))
        at = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - at) + tl.sum(tl.exp2(x - at[:, None]), axis=1)
        top = higher
    new = tl.where(total > 0, -(top + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2 * eps, float("inf"))
    tl.store(s_out_ptr + r, new, mask=r < n_out + null)
    if ROW_SIDE:
        if k > 0:
            old = tl.load(s_old_ptr + slot.to(tl.int64) * (N_out + null) + r, mask=r < n_out + null, other=0.0)
            w = tl.load(w_out_ptr + r, mask=r < n_out + null, other=0.0)
            o = offset(w, eps_in, entropy)
            gap = tl.sum(marginal_gap(w, old, new, o, rho_out, eps_in, lam_in, lam, kind), axis=0)
            if block == 0:
                gap += tl.sum(gap_in, axis=0)
            # without anything to move, and before eps has come down to reg, nothing has converged
            gap = tl.where(moved_l2 == float("-inf"), tl.where(block == 0, mass, 0.0), gap)
            gap = tl.where(eps_in == tl.load(reg_ptr + item), gap, float("inf"))
            tl.store(gap_ptr + block, gap)


@triton.jit
def multiplier_step_l2(moved_l2, mass):
    """What makes the moved mass the asked one, in units of eps log 2; 0 where nothing can be moved."""
    return tl.where(moved_l2 > float("-inf"), tl.log2(mass) - tl.where(moved_l2 > float("-inf"), moved_l2, 0.0), 0.0)


@triton.jit
def log2_moved_columns(
    t_ptr, w_ptr, m, lam, eps, rho, entropy,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """log2 of sum b exp((g - t) / eps) in `partial`, -inf if all columns are dead; with a running maximum."""
    top = eps * 0.0 + float("-inf")
    total = eps * 0.0
    for first in range(0, m, BLOCK):
        j = first + tl.arange(0, BLOCK)
        b = tl.load(w_ptr + j, mask=j < m, other=0.0)
        t = tl.load(t_ptr + j, mask=j < m, other=float("inf")) - lam
        g = potential_of(t, offset(b, eps, entropy), rho, eps, PARTIAL)
        x = tl.where((b > 0) & (t < float("inf")), (g - t) * (LOG2_E / eps) + log2_weights(b), float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        at = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - at) + tl.sum(tl.exp2(x - at), axis=0)
        top = higher
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def finish_relaxed_kernel(
    s_even_ptr, s_odd_ptr, t_ptr, gap_ptr, lam_ptr, a_ptr, b_ptr, reg_ptr, relaxation_ptr, sizes_a_ptr, sizes_b_ptr,
    value_ptr, f_ptr, g_ptr, multipliers_ptr, error_ptr, iters_ptr,
    first_item, N, M, parts, mode_a, mode_b, kind, entropy, max_iter,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Value, gauge and potentials of one item from the soft minima of its last iteration.

    The soft minima of the rows in iteration k lie in the even or odd buffer by the parity of k; the other one holds
    those that follow from the last g, which serve the rows without weight.
    """
    slot = tl.program_id(0)
    item = first_item + slot
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    null = (kind == NULL).to(tl.int32)
    if tl.maximum(n, m) + null <= ONCHIP:
        return
    iters = tl.load(iters_ptr + item)
    error = tl.load(error_ptr + item)
    if iters < 0:
        iters = max_iter
        error = sum_of_blocks(gap_ptr + slot.to(tl.int64) * parts, tl.cdiv(n + null, ROWS), COMPUTE)
    reg = tl.load(reg_ptr + item)
    rho_a, rho_b, mass, _ = load_relaxation(relaxation_ptr, item, kind, reg * 0.0)
    empty = ((n == 0) | (m == 0)) & (kind != NULL)
    last_odd = (iters - 1) % 2
    s_even_ptr += slot.to(tl.int64) * (N + null)
    s_odd_ptr += slot.to(tl.int64) * (N + null)
    t_ptr += slot.to(tl.int64) * (M + null)
    a_ptr += item.to(tl.int64) * (N + null)
    b_ptr += item.to(tl.int64) * (M + null)
    lam_last = tl.load(lam_ptr + 2 * slot + last_odd)
    lam = tl.load(lam_ptr + 2 * slot + iters % 2)
    strict_a = (rho_a == float("inf")) & (kind != PARTIAL)
    strict_b = (rho_b == float("inf")) & (kind != PARTIAL)

    mass_a = tl.zeros((BLOCK,), COMPUTE)
    dual_a = tl.zeros((BLOCK,), COMPUTE)
    af = tl.zeros((BLOCK,), COMPUTE)
    lost_a = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n + null, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + i, mask=i < n + null, other=0.0)
        s = row_soft_min(s_even_ptr, s_odd_ptr, i, n + null, a, last_odd, lam_last, lam)
        o = offset(a, reg, entropy)
        mass_a += a
        lost_a += tl.where(s == float("inf"), a, 0.0)
        dual_a += dual_term(a, s, o, rho_a, reg, kind)
        af += a * potential_of(s, o, rho_a, reg, kind)
    mass_b = tl.zeros((BLOCK,), COMPUTE)
    dual_b = tl.zeros((BLOCK,), COMPUTE)
    bg = tl.zeros((BLOCK,), COMPUTE)
    lost_b = tl.zeros((BLOCK,), COMPUTE)
    asked = tl.zeros((BLOCK,), COMPUTE)
    reached = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, m + null, BLOCK):
        j = first + tl.arange(0, BLOCK)
        b = tl.load(b_ptr + j, mask=j < m + null, other=0.0)
        t = tl.load(t_ptr + j, mask=j < m + null, other=float("inf")) - lam_last
        o = offset(b, reg, entropy)
        dead = t == float("inf")
        mass_b += b
        lost_b += tl.where(dead, b, 0.0)
        dual_b += dual_term(b, t, o, rho_b, reg, kind)
        bg += b * potential_of(t, o, rho_b, reg, kind)
        asked += tl.where(dead, 0.0, b * tl.exp2(asked_l2(tl.where(dead, 0.0, t), o, rho_b, reg)))
        reached += ((b > 0) & ~dead).to(tl.int32)
    total_a = tl.sum(mass_a, axis=0)
    total_b = tl.sum(mass_b, axis=0)
    moved = tl.where(kind == PARTIAL, mass, tl.where(rho_b == float("inf"), total_b, tl.sum(asked, axis=0)))
    # gauge: <a, f> = <b, g>, where adding a constant to f and taking it from g changes nothing
    total = total_a + total_b
    shift = (tl.sum(bg, axis=0) - tl.sum(af, axis=0)) / tl.where(total > 0, total, 1.0)
    shift = tl.where(strict_a & strict_b & (total > 0), shift, 0.0)
    # value = A + B + lam mass - reg (sum P - R), equation (6) where both sides are strict
    value = (tl.sum(dual_a, axis=0) + total_a * shift) + (tl.sum(dual_b, axis=0) - total_b * shift) + lam * mass
    value -= reg * (moved - tl.where(entropy != 0, 0.0, total_a * total_b))
    lost = tl.where(strict_a, tl.sum(lost_a, axis=0), 0.0) + tl.where(strict_b, tl.sum(lost_b, axis=0), 0.0)
    unmoved = tl.where(kind == PARTIAL, mass, lost)
    none = tl.where(kind == PARTIAL, (tl.sum(reached, axis=0) == 0) | empty, unmoved > 0)
    tl.store(value_ptr + item, tl.where(none, float("inf"), value))
    tl.store(error_ptr + item, tl.where(empty, unmoved, error))
    tl.store(iters_ptr + item, tl.where(empty, 0, iters))

    null_f = tl.zeros((BLOCK,), COMPUTE)
    null_g = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n + null, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + i, mask=i < n + null, other=0.0)
        s = row_soft_min(s_even_ptr, s_odd_ptr, i, n + null, a, last_odd, lam_last, lam)
        f = potential_of(s, offset(a, reg, entropy), rho_a, reg, kind) + shift + 0.5 * lam
        tl.store(f_ptr + start_a + i, tl.where(empty, 0.0, f), mask=i < n)
        null_f += tl.where(i == n, f, 0.0)
    for first in range(0, m + null, BLOCK):
        j = first + tl.arange(0, BLOCK)
        b = tl.load(b_ptr + j, mask=j < m + null, other=0.0)
        t = tl.load(t_ptr + j, mask=j < m + null, other=float("inf")) - lam_last
        g = potential_of(t, offset(b, reg, entropy), rho_b, reg, kind) - shift + 0.5 * lam
        tl.store(g_ptr + start_b + j, tl.where(empty, 0.0, g), mask=j < m)
        null_g += tl.where(j == m, g, 0.0)
    first_multiplier = tl.where(kind == PARTIAL, tl.where(empty, 0.0, lam), 0.0)
    tl.store(multipliers_ptr + 2 * item, tl.where(null > 0, tl.sum(null_f, axis=0), first_multiplier))
    tl.store(multipliers_ptr + 2 * item + 1, tl.where(null > 0, tl.sum(null_g, axis=0), 0.0))


@triton.jit
def row_soft_min(s_even_ptr, s_odd_ptr, i, n, a, last_odd, lam_last, lam):
    """Soft minima of the rows in the last iteration, those that follow from its g where a row has no weight."""
    even = tl.load(s_even_ptr + i, mask=i < n, other=float("inf"))
    odd = tl.load(s_odd_ptr + i, mask=i < n, other=float("inf"))
    s = tl.where((last_odd != 0) == (a > 0), odd, even)
    return s - tl.where(a > 0, lam_last, lam)
