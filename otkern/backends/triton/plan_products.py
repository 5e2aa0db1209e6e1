"""What is computed from the plan: gradients of points, costs, marginals and reg, and products with matrices.

The plan is never stored. A program owns a block of points of one side ("out"), forms the cost and the plan of one tile
after another along the other side ("in") from the potentials, and adds the tile's share to its results; nobody else
writes them, so no atomics are needed. The same kernel serves rows and columns with the two sides exchanged.
"""

import triton
import triton.language as tl

from .tiles import (
    CLOSE,
    COSINE,
    DIFFERENCE,
    DISTANCE,
    EUCLIDEAN,
    INNER,
    MATRIX,
    RUNTIME_ONLY,
    cost_tile,
    exponent_l2,
    item_base,
    item_span,
    load_points,
    load_weights,
    log2_weights,
)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def plan_backward_kernel(
    x_ptr, y_ptr, w_out_ptr, w_in_ptr, reg_ptr, h_out_ptr, h_in_ptr, sizes_out_ptr, sizes_in_ptr,
    scale_ptr, cost_scale_ptr, dense_ptr, v_out_ptr, v_in_ptr, dx_ptr, sum_ptr, marginal_ptr, part_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d, stride_dx_b, stride_dx_n,
    stride_dense_b, stride_dense_n, stride_dense_d,
    first_item, N_out, N_in, D, blocks, parts, mode_out, mode_in, has_w_out, has_w_in, metric,
    has_cost_scale, has_dense, has_v_out, has_v_in, need_x, need_marginal, need_reg,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PRECISION_PLAN: tl.constexpr, WIDEN: tl.constexpr,
    GENERAL: tl.constexpr,
):  # fmt: skip
    """Gradients of the "out" side of one item with LOWER < max(n, m) <= UPPER, for one block of its points.

    With E_rc = exp((h_r + h_c - C_rc) / reg) and P_rc = w_r w_c E_rc, the derivative of the tile's cost is
        dC = scale P, or GENERAL, with H = scale + cost_scale C + dense:  dC = P H + w_c E v_r + w_r E v_c
    With W the product of dC and the derivative of the metric, the gradient of a point is
        dx_r = alpha_r (x_r - c) - beta_r sum_c W_rc (y_c - c):
        sqeuclidean  W = 2 dC,            alpha_r = sum_c W_rc,   beta = 1,  c any point (a mean, against cancellation)
        euclidean    W = dC / C,          alpha_r = sum_c W_rc,   beta = 1   (0 at coincident points)
        dot          W = dC,              alpha = 0,              beta = 1,  c = 0
        cosine       W_rc = dC_rc / |y_c|,  beta_r = 1 / |x_r|,  c = 0,
                     alpha_r = beta_r^2 sum_c dC_rc (1 - C_rc), the projection onto the sphere
    In cosine x and y are s x and t y with the powers of two of cost_tile, and the result is multiplied by s.
    KIND MATRIX writes dC itself, to the strides (stride_dx_n, 1).

    marginal_ptr gets sum_c w_c E_rc, or GENERAL sum_c E_rc (w_c H_rc + v_c), and part_ptr for each block
    sum P (log E - 1), or GENERAL sum dC log E.
    """
    item = first_item + tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start_out, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    start_in, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    size = tl.maximum(n_out, n_in)
    if (size <= LOWER) | (size > UPPER) | (block * BLOCK >= tl.maximum(n_out, 1)):
        return
    r = block * BLOCK + tl.arange(0, BLOCK)
    reg = tl.load(reg_ptr + item)
    scale = tl.load(scale_ptr + item)
    cost_scale = scale * 0.0
    if GENERAL:
        if has_cost_scale:
            cost_scale = tl.load(cost_scale_ptr + item)
    base_x = item_base(x_ptr, item, start_out, stride_x_b, stride_x_n, mode_out)
    base_y = item_base(y_ptr, item, start_in, stride_y_b, stride_y_n, mode_in)
    base_dx = item_base(dx_ptr, item, start_out, stride_dx_b, stride_dx_n, mode_out)
    base_sum = item_base(sum_ptr, item, start_out, stride_dx_b, stride_dx_n, mode_out)
    w_out = load_weights(w_out_ptr, start_out, r, n_out, has_w_out, COMPUTE)
    h_out = tl.load(h_out_ptr + start_out + r, mask=r < n_out, other=0.0)
    # Points without weight have a marginal over their weight as well: for them it is computed as if the weight were 1.
    some_w_out = tl.where(w_out > 0, w_out, 1.0)
    v_out = tl.zeros((BLOCK,), COMPUTE)
    if GENERAL:
        if has_v_out:
            v_out = tl.load(v_out_ptr + start_out + r, mask=r < n_out, other=0.0)
    marginal = tl.zeros((BLOCK,), COMPUTE)
    entropy = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n_in, BLOCK):
        c = first + tl.arange(0, BLOCK)
        w_in = load_weights(w_in_ptr, start_in, c, n_in, has_w_in, COMPUTE)
        h_in = tl.load(h_in_ptr + start_in + c, mask=c < n_in, other=0.0)
        cost, of_x, of_y, scale_x, scale_y = cost_tile(
            base_x, base_y, stride_x_n, stride_x_d, stride_y_n, stride_y_d, r, c, n_out, n_in, D, metric,
            BLOCK, BLOCK, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
        )  # fmt: skip
        exponent = exponent_l2(cost, h_out, h_in, reg)
        if GENERAL:
            v_in = tl.zeros((BLOCK,), COMPUTE)
            if has_v_in:
                v_in = tl.load(v_in_ptr + start_in + c, mask=c < n_in, other=0.0)
            factor = scale + cost_scale * tl.where(cost < float("inf"), cost, 0.0)
            # A masked load, and no `if`: through that the compiler would carry the layout of the product's operand.
            offsets = item.to(tl.int64) * stride_dense_b + r.to(tl.int64)[:, None] * stride_dense_n
            offsets += c.to(tl.int64)[None, :] * stride_dense_d
            given = (r < has_dense * n_out)[:, None] & (c < n_in)[None, :]
            factor += tl.load(dense_ptr + offsets, mask=given, other=0.0)
            some_w_in = tl.where(w_in > 0, w_in, 1.0)
            by_in = tl.exp2(exponent + log2_weights(some_w_in)[None, :])
            of_v = tl.where((v_in != 0)[None, :], by_in, 0.0) * (v_in / some_w_in)[None, :]
            marginal += tl.sum(tl.where((w_in > 0)[None, :], by_in * factor, 0.0) + of_v, axis=1)
            dcost = tl.where((v_out != 0)[:, None] & (w_in > 0)[None, :], by_in, 0.0) * v_out[:, None]
            by_out = tl.exp2(exponent + log2_weights(w_out)[:, None])
            dcost += tl.where((v_in != 0)[None, :], by_out, 0.0) * v_in[None, :]
            dcost += tl.exp2(exponent + (log2_weights(w_out)[:, None] + log2_weights(w_in)[None, :])) * factor
            if need_reg:
                log_ratio = (h_out[:, None] + h_in[None, :] - cost) / reg
                entropy += tl.sum(tl.where(dcost != 0, dcost * log_ratio, 0.0), axis=1)
        else:
            # An item without a cotangent may have potentials whose plan overflows, and 0 * inf is NaN.
            exponent = tl.where(scale != 0, exponent, float("-inf"))
            plan = tl.exp2(exponent + (log2_weights(some_w_out)[:, None] + log2_weights(w_in)[None, :]))
            marginal += tl.sum(plan, axis=1)
            plan = tl.where((w_out > 0)[:, None], plan, 0.0)
            if need_reg:
                log_ratio = (h_out[:, None] + h_in[None, :] - cost) / reg
                entropy += tl.sum(plan * tl.where(plan > 0, log_ratio - 1.0, 0.0), axis=1)
            dcost = scale * plan
        if need_x:
            if KIND == MATRIX:
                offsets = r.to(tl.int64)[:, None] * stride_dx_n + c[None, :]
                inside = (r < n_out)[:, None] & (c < n_in)[None, :]
                tl.store(base_dx + offsets, dcost.to(dx_ptr.dtype.element_ty), mask=inside)
            else:
                alpha = tl.zeros((BLOCK,), COMPUTE)
                beta = alpha + 1.0
                weight = dcost
                near_weight = dcost
                if (KIND == DISTANCE) | (KIND == DIFFERENCE):
                    # A pair at distance 0 adds nothing to either metric's gradient.
                    weight = tl.where(cost > 0, 2.0 * dcost, 0.0)
                    square = cost
                    if metric == EUCLIDEAN:
                        weight = tl.where(cost > 0, dcost / tl.where(cost > 0, cost, 1.0), 0.0)
                        square = cost * cost
                    near_weight = weights_of_near_pairs(weight, square, of_x[:, None] + of_y[None, :])
                    weight = tl.where(near_weight != 0, 0.0, weight)
                    alpha = tl.sum(weight, axis=1)
                else:
                    if metric == COSINE:
                        weight = dcost * of_y[None, :]
                        beta = of_x
                        alpha = of_x * of_x * tl.sum(dcost * tl.where(dcost != 0, 1.0 - cost, 0.0), axis=1)
                add_points_gradient(
                    weight, near_weight, alpha, beta, scale_x, scale_y, base_x, base_y, base_dx, base_sum,
                    stride_x_n, stride_x_d, stride_y_n, stride_y_d, stride_dx_n, r, c, n_out, n_in, D,
                    first > 0, first + BLOCK >= n_in, BLOCK, BLOCK_D, KIND, COMPUTE, PRECISION_PLAN,
                )  # fmt: skip
        # another thread may hold this part of the sum when the next tile adds to it
        tl.debug_barrier()
    if need_marginal:
        if not GENERAL:
            marginal = marginal / some_w_out
        tl.store(marginal_ptr + start_out + r, marginal, mask=r < n_out)
    if need_reg:
        tl.store(part_ptr + item.to(tl.int64) * parts + block, tl.sum(entropy, axis=0))


@triton.jit
def weights_of_near_pairs(weight, square, scale):
    """The weights of those pairs whose differences have to be formed one by one, 0 elsewhere; (rows, cols).

    The difference of two products, alpha x - W y, is as accurate as the points are near to c: an error of about
    eps W |x - c| where the sum of differences has eps W |x - y|. It shows in rows that are pulled by near pairs almost
    alone; where pairs further away pull as well, their own rounding covers it.
    """
    size = tl.abs(weight)
    pull = tl.sum(tl.where(size > 0, size * square, 0.0), axis=1)
    from_centre = tl.sum(tl.where(size > 0, size * scale, 0.0), axis=1)
    near = (pull < CLOSE * from_centre)[:, None] & (square < CLOSE * scale)
    return tl.where(near, weight, 0.0)


@triton.jit
def near_differences(
    x, near_weight, y_ptr, cols, stride_y_n, stride_y_d, d0, D,
    COLS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """sum_c w_rc (x_r - y_c) for features d0 .. d0 + BLOCK_D, one pair of every row per pass; (rows, BLOCK_D)."""
    j = tl.arange(0, COLS)
    first_col = tl.min(cols, axis=0)
    total = tl.zeros_like(x)
    near = tl.min(tl.where(near_weight != 0, j[None, :], COLS), axis=1)
    while tl.min(near, axis=0) < COLS:
        w = tl.sum(tl.where(j[None, :] == near[:, None], near_weight, 0.0), axis=1)
        y = load_points(y_ptr, first_col + near, near < COLS, stride_y_n, stride_y_d, d0, D, BLOCK_D).to(COMPUTE)
        total += w[:, None] * (x - y)
        later = (near_weight != 0) & (j[None, :] > near[:, None])
        near = tl.min(tl.where(later, j[None, :], COLS), axis=1)
    return total


@triton.jit
def add_points_gradient(
    weight, near_weight, alpha, beta, scale_x, scale_y, x_ptr, y_ptr, dx_ptr, sum_ptr,
    stride_x_n, stride_x_d, stride_y_n, stride_y_d, stride_dx_n, rows, cols, n, m, D, started, complete,
    COLS: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (+)= alpha (x - c) - beta W (y - c) and the differences of near pairs, features in chunks.

    The sum over several tiles is kept in the compute dtype in sum_ptr, and rounded to that of the points at the end.
    """
    col_count = tl.maximum(tl.sum((cols < m).to(tl.int32), axis=0), 1).to(COMPUTE)
    any_near = tl.max(tl.max((near_weight != 0).to(tl.int32), axis=1), axis=0)
    for d0 in range(0, D, BLOCK_D):
        x = load_points(x_ptr, rows, rows < n, stride_x_n, stride_x_d, d0, D, BLOCK_D).to(COMPUTE)
        y = load_points(y_ptr, cols, cols < m, stride_y_n, stride_y_d, d0, D, BLOCK_D).to(COMPUTE)
        extra = tl.zeros_like(x)
        if (KIND == DISTANCE) | (KIND == DIFFERENCE):
            if any_near > 0:
                extra = near_differences(
                    x, near_weight, y_ptr, cols, stride_y_n, stride_y_d, d0, D, COLS, BLOCK_D, COMPUTE
                )
            centre = tl.sum(y, axis=0) / col_count
            x -= centre[None, :]
            y -= centre[None, :]
        if KIND == INNER:
            x *= scale_x[:, None]
            y *= scale_y[:, None]
        product = tl.dot(weight, y, input_precision=PRECISION, out_dtype=COMPUTE)  # (rows, BLOCK_D)
        dx = (alpha[:, None] * x - beta[:, None] * product) * scale_x[:, None] + extra
        d = d0 + tl.arange(0, BLOCK_D)
        offsets = rows.to(tl.int64)[:, None] * stride_dx_n + d[None, :]
        inside = (rows < n)[:, None] & (d < D)[None, :]
        if started:
            dx += tl.load(sum_ptr + offsets, mask=inside, other=0.0)
        if complete:
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(sum_ptr + offsets, dx, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def reg_backward_kernel(
    part_ptr, a_ptr, b_ptr, sizes_a_ptr, sizes_b_ptr, out_ptr,
    first_item, N, M, parts, mode_a, mode_b, has_a, has_b, with_mass,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The sum of an item's parts, one for each ROWS rows (items of smaller classes have one), plus sum a sum b."""
    item = first_item + tl.program_id(0)
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    count = tl.cdiv(n, ROWS)
    index = tl.arange(0, BLOCK)
    mass_a = tl.zeros((BLOCK,), COMPUTE)
    mass_b = tl.zeros((BLOCK,), COMPUTE)
    total = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        mass_a += load_weights(a_ptr, start_a, first + index, n, has_a, COMPUTE)
    for first in range(0, m, BLOCK):
        mass_b += load_weights(b_ptr, start_b, first + index, m, has_b, COMPUTE)
    for first in range(0, count, BLOCK):
        part = part_ptr + item.to(tl.int64) * parts + first + index
        total += tl.load(part, mask=first + index < count, other=0.0)
    mass = tl.where(with_mass != 0, tl.sum(mass_a, axis=0) * tl.sum(mass_b, axis=0), 0.0)
    tl.store(out_ptr + item, mass + tl.sum(total, axis=0))


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def plan_apply_kernel(
    x_ptr, y_ptr, w_out_ptr, w_in_ptr, reg_ptr, h_out_ptr, h_in_ptr, v_ptr, sizes_out_ptr, sizes_in_ptr, out_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
    stride_v_b, stride_v_n, stride_v_d, stride_out_b, stride_out_n,
    first_item, N_out, N_in, D, K, blocks, mode_out, mode_in, has_w_out, has_w_in, metric, times_cost,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out_r = sum_c P_rc v_c, or sum_c P_rc C_rc v_c, for one block of the "out" side of an item."""
    item = first_item + tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start_out, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    start_in, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    if block * BLOCK >= n_out:
        return
    r = block * BLOCK + tl.arange(0, BLOCK)
    reg = tl.load(reg_ptr + item)
    base_x = item_base(x_ptr, item, start_out, stride_x_b, stride_x_n, mode_out)
    base_y = item_base(y_ptr, item, start_in, stride_y_b, stride_y_n, mode_in)
    base_v = item_base(v_ptr, item, start_in, stride_v_b, stride_v_n, mode_in)
    base_out = item_base(out_ptr, item, start_out, stride_out_b, stride_out_n, mode_out)
    w_out = load_weights(w_out_ptr, start_out, r, n_out, has_w_out, COMPUTE)
    h_out = tl.load(h_out_ptr + start_out + r, mask=r < n_out, other=0.0)
    for first in range(0, n_in, BLOCK):
        c = first + tl.arange(0, BLOCK)
        w_in = load_weights(w_in_ptr, start_in, c, n_in, has_w_in, COMPUTE)
        h_in = tl.load(h_in_ptr + start_in + c, mask=c < n_in, other=0.0)
        cost, _, _, _, _ = cost_tile(
            base_x, base_y, stride_x_n, stride_x_d, stride_y_n, stride_y_d, r, c, n_out, n_in, D, metric,
            BLOCK, BLOCK, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
        )  # fmt: skip
        exponent = exponent_l2(cost, h_out, h_in, reg)
        matrix = tl.exp2(exponent + (log2_weights(w_out)[:, None] + log2_weights(w_in)[None, :]))
        if times_cost:
            matrix *= tl.where(matrix > 0, cost, 0.0)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            v = load_points(base_v, c, c < n_in, stride_v_n, stride_v_d, k0, K, BLOCK_K)
            out = tl.dot(matrix, v, input_precision=PRECISION, out_dtype=COMPUTE)
            offsets = r.to(tl.int64)[:, None] * stride_out_n + k[None, :]
            inside = (r < n_out)[:, None] & (k < K)[None, :]
            if first > 0:
                out += tl.load(base_out + offsets, mask=inside, other=0.0)
            tl.store(base_out + offsets, out, mask=inside)
        # another thread may hold this part of the sum when the next tile adds to it
        tl.debug_barrier()
