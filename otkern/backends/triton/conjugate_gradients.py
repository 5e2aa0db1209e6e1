"""The adjoint of the fixed point: a linear system with the plan as its matrix, solved by conjugate gradients.

With r = sum_j b E (+ extra), c = sum_i a E (+ extra) and slopes k, the unknowns p = k z, q = k z of

    z_i + sum_j (a_i E_ij / c_j) q_j = u_i,      z_j + sum_i (b_j E_ij / r_i) p_i = u_j

are scaled by d_i = sqrt(a_i r_i / k_i) and e_j = sqrt(b_j c_j / k_j), p_i = k_i d_i x_i and q_j = k_j e_j y_j, to

    x + N y = u_a / d,  y + N^T x = u_b / e      with N_ij = E_ij sqrt(a_i b_j k_i k_j / (r_i c_j)), no entry above 1,

of which (1 - N N^T) x = u_a / d - N u_b / e is left: the preconditioned system in the norm of its preconditioner.
Points with k = 0 have p = 0. "Bare" points, without weight or that reach nothing, have p = k u, and no other depends on
them but through u.
"""

import triton
import triton.language as tl

from .tiles import LOG2_E, RUNTIME_ONLY, item_base, item_cost, item_span, load_weights, log2_weights

# Below these parts of |direction|^2 a curvature is rounding: the system is singular along that direction.
ROUNDING = tl.constexpr(2.0**-22)
ROUNDING_FP64 = tl.constexpr(2.0**-51)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def onchip_implicit_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, reg_ptr, f_ptr, g_ptr, slope_a_ptr, slope_b_ptr, extra_a_ptr, extra_b_ptr,
    u_a_ptr, u_b_ptr, sizes_a_ptr, sizes_b_ptr, scratch_ptr, p_ptr, q_ptr, residual_ptr, iters_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
    first_item, N, M, D, mode_a, mode_b, has_a, has_b, has_slope_a, has_slope_b, has_extra_a, has_extra_b,
    metric, singular, max_iter, tol,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program solves item first_item + p, if it is of this size class; N stays in registers."""
    slot = tl.program_id(0)
    item = first_item + slot
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    size = tl.maximum(n, m)
    if (size <= LOWER) | (size > BLOCK):
        return
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK)
    base_x = item_base(x_ptr, item, start_a, stride_x_b, stride_x_n, mode_a)
    base_y = item_base(y_ptr, item, start_b, stride_y_b, stride_y_n, mode_b)
    cost = item_cost(
        base_x, base_y, scratch_ptr + slot.to(tl.int64) * (BLOCK * BLOCK),
        stride_x_n, stride_x_d, stride_y_n, stride_y_d, n, m, D, metric,
        BLOCK, PART, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
    )  # fmt: skip
    f = tl.load(f_ptr + start_a + i, mask=i < n, other=0.0)
    g = tl.load(g_ptr + start_b + j, mask=j < m, other=0.0)
    exponent = (f[:, None] + g[None, :] - cost) * (LOG2_E / tl.load(reg_ptr + item))
    a_l2 = log2_weights(load_weights(a_ptr, start_a, i, n, has_a, COMPUTE))
    b_l2 = log2_weights(load_weights(b_ptr, start_b, j, m, has_b, COMPUTE))
    r = tl.sum(tl.exp2(exponent + b_l2[None, :]), axis=1)
    c = tl.sum(tl.exp2(exponent + a_l2[:, None]), axis=0)
    if has_extra_a:
        r += tl.load(extra_a_ptr + start_a + i, mask=i < n, other=0.0)
    if has_extra_b:
        c += tl.load(extra_b_ptr + start_b + j, mask=j < m, other=0.0)
    # an empty side: nothing depends on anything
    r = tl.where((n == 0) | (m == 0), 0.0, r)
    c = tl.where((n == 0) | (m == 0), 0.0, c)
    slope_a = load_or_one(slope_a_ptr, start_a, i, n, has_slope_a, COMPUTE)
    slope_b = load_or_one(slope_b_ptr, start_b, j, m, has_slope_b, COMPUTE)
    u = tl.load(u_a_ptr + start_a + i, mask=i < n, other=0.0)
    v = tl.load(u_b_ptr + start_b + j, mask=j < m, other=0.0)
    p = tl.where((a_l2 == float("-inf")) | (r == 0), slope_a * u, 0.0)
    q = tl.where((b_l2 == float("-inf")) | (c == 0), slope_b * v, 0.0)
    r_l2 = log2_weights(r)
    c_l2 = log2_weights(c)
    # what the others see of the bare points
    u -= tl.sum(tl.exp2(exponent + (a_l2[:, None] - finite(c_l2)[None, :])) * q[None, :], axis=1)
    v -= tl.sum(tl.exp2(exponent + (b_l2[None, :] - finite(r_l2)[:, None])) * p[:, None], axis=0)
    half_a = half_l2(a_l2, r_l2, slope_a)
    half_b = half_l2(b_l2, c_l2, slope_b)
    tl.store(p_ptr + start_a + i, p, mask=i < n)
    tl.store(q_ptr + start_b + j, q, mask=j < m)
    tl.debug_barrier()
    matrix = tl.exp2(exponent + (half_a[:, None] + half_b[None, :]))  # N
    d = unit_of(a_l2, half_a)
    e = unit_of(b_l2, half_b)
    v = tl.where(half_b > float("-inf"), v / e, 0.0)
    rhs = u / d - tl.sum(matrix * v[None, :], axis=1)
    rhs = tl.where(half_a > float("-inf"), rhs, 0.0)
    # p = k d x where a point takes part; nothing else of a side is kept in the registers while its system is solved
    scale_p = tl.where(half_a > float("-inf"), slope_a * d, 0.0)
    scale_q = tl.where(half_b > float("-inf"), slope_b * e, 0.0)
    x, residual, k, top = solve(matrix, rhs, scale_p, singular, max_iter, tol)
    y = v - top * tl.sum(matrix * x[:, None], axis=0)
    tl.store(p_ptr + start_a + i, scale_p * (top * x), mask=(i < n) & (scale_p > 0))
    tl.store(q_ptr + start_b + j, scale_q * y, mask=(j < m) & (scale_q > 0))
    tl.store(residual_ptr + item, residual)
    tl.store(iters_ptr + item, k)


@triton.jit
def solve(matrix, rhs, null, singular, max_iter, tol):
    """x / top with (1 - N N^T) x = rhs, the relative residual, the number of iterations, and top.

    `singular`: of a system whose slopes are 1 and which has a null vector, d; the solution has no part of it.
    """
    if singular:
        rhs = without(rhs, null)
    # Squares of small numbers vanish, and gradients are often small.
    top = tl.max(tl.abs(rhs), axis=0)
    top = tl.where(top > 0, top, 1.0)
    rest = rhs / top
    direction = rest
    x = tl.zeros_like(rest)
    target = tl.sum(rest * rest, axis=0)
    square = target
    curvature = target + 1.0
    k = 0
    while (k < max_iter) & (square > tol * tol * target) & (curvature > 0):
        image = tl.sum(matrix * direction[:, None], axis=0)
        image = direction - tl.sum(matrix * image[None, :], axis=1)
        if singular:
            image = without(image, null)
        curvature = resolved(tl.sum(direction * image, axis=0), tl.sum(direction * direction, axis=0))
        step = tl.where(curvature > 0, square / tl.where(curvature > 0, curvature, 1.0), 0.0)
        x += step * direction
        rest -= step * image
        before = square
        square = tl.sum(rest * rest, axis=0)
        direction = rest + square / before * direction
        k += (curvature > 0).to(tl.int32)
    residual = tl.sqrt(square / tl.where(target > 0, target, 1.0))
    return x, residual, k, top


@triton.jit
def resolved(curvature, square):
    """<d, A d>, 0 where it is lost in the rounding of |d|^2, of which no more can be told."""
    rounding = ROUNDING
    if square.dtype == tl.float64:
        rounding = ROUNDING_FP64
    return tl.where(curvature > rounding * square, curvature, 0.0)


@triton.jit
def without(x, null):
    """x without its part along a vector, which may be 0."""
    length = tl.sum(null * null, axis=0)
    return x - tl.sum(x * null, axis=0) / tl.where(length > 0, length, 1.0) * null


@triton.jit
def load_or_one(x_ptr, start, index, length, given, COMPUTE: tl.constexpr):
    x = tl.zeros_like(index).to(COMPUTE) + 1.0
    if given:
        x = tl.load(x_ptr + start + index, mask=index < length, other=0.0)
    return x


@triton.jit
def finite(log):
    return tl.where(log == float("-inf"), 0.0, log)


@triton.jit
def half_l2(w_l2, r_l2, slope):
    """log2 sqrt(w k / r), -inf at points that take no part."""
    return 0.5 * (w_l2 + log2_weights(slope) - tl.where(r_l2 == float("-inf"), float("inf"), r_l2))


@triton.jit
def unit_of(w_l2, half):
    """d = sqrt(w r / k) = w / sqrt(w k / r), 1 at points that take no part."""
    return tl.exp2(tl.where(half > float("-inf"), w_l2 - finite(half), 0.0))


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def log_weights_kernel(
    w_out_ptr, sizes_out_ptr, sizes_in_ptr, out_ptr,
    first_item, N_out, N_in, mode_out, mode_in, has_w_out,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """log2 of the weights of one side, for items larger than ONCHIP with two sides that are not empty."""
    item = first_item + tl.program_id(0)
    start_out, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    _, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    if tl.maximum(n_out, n_in) <= ONCHIP:
        return
    for first in range(0, n_out, BLOCK):
        r = first + tl.arange(0, BLOCK)
        w = load_weights(w_out_ptr, start_out, r, n_out, has_w_out, COMPUTE)
        tl.store(out_ptr + start_out + r, tl.where(n_in > 0, log2_weights(w), float("-inf")), mask=r < n_out)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def scales_kernel(
    weight_l2_ptr, sums_ptr, extra_ptr, slope_ptr, u_ptr, sum_l2_ptr, half_l2_ptr, unit_ptr, bare_ptr,
    sizes_out_ptr, sizes_in_ptr, first_item, N_out, N_in, mode_out, mode_in, has_extra, has_slope,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The scales of one side of an item from r = sum E w, and the solution at its bare points."""
    item = first_item + tl.program_id(0)
    start, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    _, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    if tl.maximum(n_out, n_in) <= ONCHIP:
        return
    for first in range(0, n_out, BLOCK):
        i = first + tl.arange(0, BLOCK)
        weight_l2 = tl.load(weight_l2_ptr + start + i, mask=i < n_out, other=float("-inf"))
        r = tl.load(sums_ptr + start + i, mask=i < n_out, other=0.0)
        if has_extra:
            r += tl.load(extra_ptr + start + i, mask=i < n_out, other=0.0)
        r_l2 = log2_weights(r)
        slope = load_or_one(slope_ptr, start, i, n_out, has_slope, COMPUTE)
        u = tl.load(u_ptr + start + i, mask=i < n_out, other=0.0)
        half = half_l2(weight_l2, r_l2, slope)
        bare = tl.where((weight_l2 == float("-inf")) | (r == 0), slope * u, 0.0)
        tl.store(sum_l2_ptr + start + i, finite(r_l2), mask=i < n_out)
        tl.store(half_l2_ptr + start + i, half, mask=i < n_out)
        tl.store(unit_ptr + start + i, unit_of(weight_l2, half), mask=i < n_out)
        tl.store(bare_ptr + start + i, bare, mask=i < n_out)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def scaled_product_kernel(
    cost_ptr, h_out_ptr, h_in_ptr, l_out_ptr, l_in_ptr, v_ptr, out_ptr, reg_ptr, sizes_out_ptr, sizes_in_ptr, iters_ptr,
    stride_item, stride_out, stride_in, first_item, N_out, N_in, blocks, mode_out, mode_in,
    ONCHIP: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """out_r = sum_c E_rc 2^(l_r + l_c) v_c for a block of one side of an item whose solution has not been found."""
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    item = first_item + slot
    start_in, n_in = item_span(item, sizes_in_ptr, mode_in, N_in)
    start_out, n_out = item_span(item, sizes_out_ptr, mode_out, N_out)
    if (tl.maximum(n_in, n_out) <= ONCHIP) | (block * BLOCK_OUT >= n_out):
        return
    if tl.load(iters_ptr + item) >= 0:
        return
    r = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    base = cost_ptr + slot.to(tl.int64) * stride_item
    reg = tl.load(reg_ptr + item)
    h_out = tl.load(h_out_ptr + start_out + r, mask=r < n_out, other=0.0)
    l_out = tl.load(l_out_ptr + start_out + r, mask=r < n_out, other=float("-inf"))
    total = tl.zeros((BLOCK_OUT,), COMPUTE)
    for c0 in range(0, n_in, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        h_in = tl.load(h_in_ptr + start_in + c, mask=c < n_in, other=0.0)
        l_in = tl.load(l_in_ptr + start_in + c, mask=c < n_in, other=float("-inf"))
        v = tl.load(v_ptr + start_in + c, mask=c < n_in, other=0.0)
        inside = (r < n_out)[:, None] & (c < n_in)[None, :]
        offsets = r.to(tl.int64)[:, None] * stride_out + c.to(tl.int64)[None, :] * stride_in
        cost = tl.load(base + offsets, mask=inside, other=float("inf"))
        exponent = (h_out[:, None] + h_in[None, :] - cost) * (LOG2_E / reg)
        total += tl.sum(tl.exp2(exponent + (l_out[:, None] + l_in[None, :])) * v[None, :], axis=1)
    tl.store(out_ptr + start_out + r, total, mask=r < n_out)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def begin_gradients_kernel(
    rhs_ptr, null_ptr, rest_ptr, direction_ptr, scalars_ptr, sizes_a_ptr, sizes_b_ptr, iters_ptr, residual_ptr,
    first_item, N, M, mode_a, mode_b,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The state of one item's conjugate gradients before the first step; see `solve`. scalars: top, target, square."""
    item = first_item + tl.program_id(0)
    start, n = item_span(item, sizes_a_ptr, mode_a, N)
    _, m = item_span(item, sizes_b_ptr, mode_b, M)
    if tl.maximum(n, m) <= ONCHIP:
        return
    along, length = dot_products(rhs_ptr, null_ptr, start, n, BLOCK, COMPUTE)
    part = along / tl.where(length > 0, length, 1.0)
    top = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        null = tl.load(null_ptr + start + i, mask=i < n, other=0.0)
        rhs = tl.load(rhs_ptr + start + i, mask=i < n, other=0.0) - part * null
        top = tl.maximum(top, tl.abs(rhs))
    largest = tl.max(top, axis=0)
    largest = tl.where(largest > 0, largest, 1.0)
    square = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        null = tl.load(null_ptr + start + i, mask=i < n, other=0.0)
        rest = (tl.load(rhs_ptr + start + i, mask=i < n, other=0.0) - part * null) / largest
        square += rest * rest
        tl.store(rest_ptr + start + i, rest, mask=i < n)
        tl.store(direction_ptr + start + i, rest, mask=i < n)
    target = tl.sum(square, axis=0)
    tl.store(scalars_ptr + 3 * item, largest)
    tl.store(scalars_ptr + 3 * item + 1, target)
    tl.store(scalars_ptr + 3 * item + 2, target)
    if target == 0:
        tl.store(residual_ptr + item, target)
        tl.store(iters_ptr + item, 0)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def step_gradients_kernel(
    product_ptr, null_ptr, x_ptr, rest_ptr, direction_ptr, scalars_ptr, sizes_a_ptr, sizes_b_ptr,
    iters_ptr, residual_ptr,
    first_item, N, M, mode_a, mode_b, k, max_iter, tol,
    ONCHIP: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Step k of one item's conjugate gradients, given N N^T direction; marks it in `iters` when it is the last."""
    item = first_item + tl.program_id(0)
    start, n = item_span(item, sizes_a_ptr, mode_a, N)
    _, m = item_span(item, sizes_b_ptr, mode_b, M)
    if tl.maximum(n, m) <= ONCHIP:
        return
    if tl.load(iters_ptr + item) >= 0:
        return
    top = tl.load(scalars_ptr + 3 * item)
    target = tl.load(scalars_ptr + 3 * item + 1)
    before = tl.load(scalars_ptr + 3 * item + 2)
    along, length = dot_products(direction_ptr, null_ptr, start, n, BLOCK, COMPUTE)
    lost, _ = dot_products(product_ptr, null_ptr, start, n, BLOCK, COMPUTE)
    part = (along - lost) / tl.where(length > 0, length, 1.0)
    curvature = tl.zeros((BLOCK,), COMPUTE)
    lengths = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        direction = tl.load(direction_ptr + start + i, mask=i < n, other=0.0)
        null = tl.load(null_ptr + start + i, mask=i < n, other=0.0)
        image = direction - tl.load(product_ptr + start + i, mask=i < n, other=0.0) - part * null
        curvature += direction * image
        lengths += direction * direction
    slope = resolved(tl.sum(curvature, axis=0), tl.sum(lengths, axis=0))
    step = tl.where(slope > 0, before / tl.where(slope > 0, slope, 1.0), 0.0)
    squares = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        direction = tl.load(direction_ptr + start + i, mask=i < n, other=0.0)
        null = tl.load(null_ptr + start + i, mask=i < n, other=0.0)
        image = direction - tl.load(product_ptr + start + i, mask=i < n, other=0.0) - part * null
        x = tl.load(x_ptr + start + i, mask=i < n, other=0.0) + step * top * direction
        rest = tl.load(rest_ptr + start + i, mask=i < n, other=0.0) - step * image
        squares += rest * rest
        tl.store(x_ptr + start + i, x, mask=i < n)
        tl.store(rest_ptr + start + i, rest, mask=i < n)
    square = tl.sum(squares, axis=0)
    tl.debug_barrier()
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        rest = tl.load(rest_ptr + start + i, mask=i < n, other=0.0)
        direction = tl.load(direction_ptr + start + i, mask=i < n, other=0.0)
        tl.store(direction_ptr + start + i, rest + square / before * direction, mask=i < n)
    tl.store(scalars_ptr + 3 * item + 2, square)
    done = k + (slope > 0).to(tl.int32)
    if (done >= max_iter) | (square <= tol * tol * target) | (slope == 0):
        tl.store(residual_ptr + item, tl.sqrt(square / target))
        tl.store(iters_ptr + item, done)


@triton.jit
def dot_products(x_ptr, y_ptr, start, n, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """<x, y> and <y, y> of two vectors of an item."""
    xy = tl.zeros((BLOCK,), COMPUTE)
    yy = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start + i, mask=i < n, other=0.0)
        y = tl.load(y_ptr + start + i, mask=i < n, other=0.0)
        xy += x * y
        yy += y * y
    return tl.sum(xy, axis=0), tl.sum(yy, axis=0)
