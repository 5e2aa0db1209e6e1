"""The solve of problems that are too large for one program: costs in memory, two launches per iteration, log domain.

Every program owns a block of rows (or of columns) of one item. An item that has reached the tolerance is marked in
`iters`, and later launches pass over it; the host never looks.
"""

import triton
import triton.language as tl

from .tiles import LN_2, LOG2_E, RUNTIME_ONLY, cost_tile, item_base, item_span, load_weights, log2_weights


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def cost_forward_kernel(
    x_ptr, y_ptr, sizes_a_ptr, sizes_b_ptr, cost_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
    stride_item, stride_row, first_item, N, M, D, blocks_a, blocks_b, mode_a, mode_b, metric,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of the cost of an item larger than ONCHIP; nothing is written outside the item."""
    tile = tl.program_id(0)
    slot = tile // blocks_b // blocks_a
    item = first_item + slot
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    first_row = tile // blocks_b % blocks_a * BLOCK
    first_col = tile % blocks_b * BLOCK
    if (tl.maximum(n, m) <= ONCHIP) | (first_row >= n) | (first_col >= m):
        return
    rows = first_row + tl.arange(0, BLOCK)
    cols = first_col + tl.arange(0, BLOCK)
    base_x = item_base(x_ptr, item, start_a, stride_x_b, stride_x_n, mode_a)
    base_y = item_base(y_ptr, item, start_b, stride_y_b, stride_y_n, mode_b)
    cost, _, _, _, _ = cost_tile(
        base_x, base_y, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D, metric,
        BLOCK, BLOCK, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
    )  # fmt: skip
    offsets = slot.to(tl.int64) * stride_item + rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    tl.store(cost_ptr + offsets, cost, mask=(rows < n)[:, None] & (cols < m)[None, :])


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def half_update_forward_kernel(
    cost_ptr, potential_ptr, init_ptr, out_ptr, old_ptr, gap_ptr,
    w_in_ptr, w_out_ptr, reg_ptr, sizes_in_ptr, sizes_out_ptr, error_ptr, iters_ptr,
    stride_item, stride_out, stride_in, first_item, N_in, N_out, blocks, parts,
    mode_in, mode_out, has_w_in, has_w_out, has_init, k, tol,
    ONCHIP: tl.constexpr, ROW_SIDE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One half of iteration k: the potentials of a block of one side ("out") from those of the other ("in").

        out_r = -reg log sum_c w_c exp((in_c - C_rc) / reg), +inf where every term is masked (read as 0)

    The row side also leaves, per block, the marginal gap of iteration k - 1, the sum of a_r |exp((old_r - out_r) / reg)
    - 1|, because its new potentials are minus the logarithm of the row sums. The column side adds the gaps up, and
    where they are within the tolerance marks the item as finished after k iterations and changes nothing.
    """
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    item = first_item + slot
    start_in, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    start_out, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    if (tl.maximum(n_in, n_out) <= ONCHIP) | (block * BLOCK_OUT >= n_out):
        return
    if tl.load(iters_ptr + item) >= 0:
        return
    if not ROW_SIDE:
        if k > 0:
            error = sum_of_blocks(gap_ptr + slot.to(tl.int64) * parts, tl.cdiv(n_in, BLOCK_OUT), COMPUTE)
            if error <= tol:
                if block == 0:
                    tl.store(error_ptr + item, error)
                    tl.store(iters_ptr + item, k)
                return
    r = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    base = cost_ptr + slot.to(tl.int64) * stride_item
    potential_ptr += slot.to(tl.int64) * N_in
    out_ptr += slot.to(tl.int64) * N_out
    old_ptr += slot.to(tl.int64) * N_out
    reg = tl.load(reg_ptr + item)
    top = tl.full((BLOCK_OUT,), float("-inf"), COMPUTE)
    total = tl.zeros((BLOCK_OUT,), COMPUTE)
    lost = tl.zeros((BLOCK_IN,), COMPUTE)
    for c0 in range(0, n_in, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        potential = tl.zeros((BLOCK_IN,), COMPUTE)
        if (not ROW_SIDE) | (k > 0):
            potential = tl.load(potential_ptr + c, mask=c < n_in, other=0.0)
        elif has_init:
            potential = tl.load(init_ptr + start_in + c, mask=c < n_in, other=0.0)
        w = load_weights(w_in_ptr, start_in, c, n_in, has_w_in, COMPUTE)
        lost += tl.where(potential == float("inf"), w, 0.0)
        potential = tl.where(potential == float("inf"), 0.0, potential)
        inside = (r < n_out)[:, None] & (c < n_in)[None, :]
        offsets = r.to(tl.int64)[:, None] * stride_out + c.to(tl.int64)[None, :] * stride_in
        cost = tl.load(base + offsets, mask=inside, other=float("inf"))
        # the difference in the unit of the cost, where it loses least
        x = (potential[None, :] - cost) * (LOG2_E / reg) + log2_weights(w)[None, :]  # (BLOCK_OUT, BLOCK_IN)
        # the running maximum; where it is still -inf nothing has been added
        higher = tl.maximum(top, tl.max(x, axis=1))
        at = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - at) + tl.sum(tl.exp2(x - at[:, None]), axis=1)
        top = higher
    new = tl.where(total > 0, -(top + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2 * reg, float("inf"))
    tl.store(out_ptr + r, new, mask=r < n_out)
    if ROW_SIDE:
        if k > 0:
            w = load_weights(w_out_ptr, start_out, r, n_out, has_w_out, COMPUTE)
            old = tl.load(old_ptr + r, mask=r < n_out, other=0.0)
            log_ratio = (old - tl.where(new == float("inf"), 0.0, new)) * (LOG2_E / reg)
            ratio = tl.where(new == float("inf"), 0.0, tl.exp2(log_ratio))
            gap = tl.sum(tl.where(w > 0, w * tl.abs(ratio - 1.0), 0.0), axis=0)
            if block == 0:
                gap += tl.sum(lost, axis=0)
            tl.store(gap_ptr + slot.to(tl.int64) * parts + block, gap)


@triton.jit
def sum_of_blocks(part_ptr, count, COMPUTE: tl.constexpr):
    """The sum of an item's partial results, in an order that depends on their number alone."""
    total = tl.zeros((128,), COMPUTE)
    for first in range(0, count, 128):
        index = first + tl.arange(0, 128)
        total += tl.load(part_ptr + index, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def finish_forward_kernel(
    f_even_ptr, f_odd_ptr, g_last_ptr, gap_ptr, a_ptr, b_ptr, reg_ptr, sizes_a_ptr, sizes_b_ptr,
    value_ptr, f_ptr, g_ptr, error_ptr, iters_ptr,
    first_item, N, M, parts, mode_a, mode_b, has_a, has_b, max_iter,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Values, gauge and potentials of one item from the potentials of its last iteration.

    The row potentials of iteration k lie in the even or odd buffer by the parity of k; the other one holds those that
    follow from the last g, which are the potentials of rows without weight.
    """
    slot = tl.program_id(0)
    item = first_item + slot
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    if tl.maximum(n, m) <= ONCHIP:
        return
    iters = tl.load(iters_ptr + item)
    error = tl.load(error_ptr + item)
    if iters < 0:
        iters = max_iter
        error = sum_of_blocks(gap_ptr + slot.to(tl.int64) * parts, tl.cdiv(n, ROWS), COMPUTE)
    last_odd = (iters - 1) % 2
    f_even_ptr += slot.to(tl.int64) * N
    f_odd_ptr += slot.to(tl.int64) * N
    g_last_ptr += slot.to(tl.int64) * M
    mass_a = tl.zeros((BLOCK,), COMPUTE)
    mass_b = tl.zeros((BLOCK,), COMPUTE)
    af = tl.zeros((BLOCK,), COMPUTE)
    bg = tl.zeros((BLOCK,), COMPUTE)
    lost = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = load_weights(a_ptr, start_a, i, n, has_a, COMPUTE)
        f = row_potential(f_even_ptr, f_odd_ptr, i, n, a, last_odd)
        lost += tl.where(f == float("inf"), a, 0.0)
        mass_a += a
        af += a * tl.where(f == float("inf"), 0.0, f)
    for first in range(0, m, BLOCK):
        j = first + tl.arange(0, BLOCK)
        b = load_weights(b_ptr, start_b, j, m, has_b, COMPUTE)
        g = tl.load(g_last_ptr + j, mask=j < m, other=0.0)
        lost += tl.where(g == float("inf"), b, 0.0)
        mass_b += b
        bg += b * tl.where(g == float("inf"), 0.0, g)
    total_a = tl.sum(mass_a, axis=0)
    total_b = tl.sum(mass_b, axis=0)
    total_af = tl.sum(af, axis=0)
    total_bg = tl.sum(bg, axis=0)
    # gauge: <a, f> = <b, g>
    mass = total_a + total_b
    shift = tl.where(mass > 0, (total_bg - total_af) / tl.where(mass > 0, mass, 1.0), 0.0)
    # value = <a, f> + <b, g> - reg (sum b - sum a sum b)
    value = (total_af + total_a * shift) + (total_bg - total_b * shift)
    value -= tl.load(reg_ptr + item) * (total_b - total_a * total_b)
    if tl.sum(lost, axis=0) > 0:
        value = value * 0.0 + float("inf")
    if (n == 0) | (m == 0):
        iters = 0
        error = total_a + total_b
    tl.store(value_ptr + item, value)
    tl.store(error_ptr + item, error)
    tl.store(iters_ptr + item, iters)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = load_weights(a_ptr, start_a, i, n, has_a, COMPUTE)
        f = row_potential(f_even_ptr, f_odd_ptr, i, n, a, last_odd)
        tl.store(f_ptr + start_a + i, tl.where(f == float("inf"), 0.0, f) + shift, mask=i < n)
    for first in range(0, m, BLOCK):
        j = first + tl.arange(0, BLOCK)
        g = tl.load(g_last_ptr + j, mask=j < m, other=0.0)
        tl.store(g_ptr + start_b + j, tl.where(g == float("inf"), 0.0, g) - shift, mask=j < m)


@triton.jit
def row_potential(f_even_ptr, f_odd_ptr, i, n, a, last_odd):
    """Row potentials of the last iteration, those that follow from its g where a row has no weight."""
    even = tl.load(f_even_ptr + i, mask=i < n, other=0.0)
    odd = tl.load(f_odd_ptr + i, mask=i < n, other=0.0)
    return tl.where((last_odd != 0) == (a > 0), odd, even)
