"""What every kernel shares: the place of an item in its batch, its weights, and one tile of its cost."""

import triton
import triton.language as tl

# How a cost tile is formed; the metric within a kind is a run-time flag, to keep the number of compiled kernels small.
DISTANCE = tl.constexpr(0)  # |x - y|^2 or |x - y|, from centred points
INNER = tl.constexpr(1)  # -<x, y> or 1 - cos(x, y)
MATRIX = tl.constexpr(2)  # read from memory
DIFFERENCE = tl.constexpr(3)  # |x - y|^2 or |x - y| as sums of squared differences, for few features

SQEUCLIDEAN = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(1)
COSINE = tl.constexpr(2)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# |x|^2 + |y|^2 - 2<x, y> has an absolute error of about 2^-24 (|x|^2 + |y|^2); below this fraction of it too little of
# the distance is left, and it is summed again from differences.
CLOSE = tl.constexpr(0.125)
# Marks a squared distance that has been summed again and is exactly zero.
TINY = tl.constexpr(1e-37)

# Points whose squared norms lie in this range have products that cannot overflow, and what they lose to underflow is
# below the rounding of fp32 for up to 2^22 features.
SAFE_MIN = tl.constexpr(2.0**-80)
SAFE_MAX = tl.constexpr(2.0**80)


# Integers on whose value no code is specialised: each would compile the same kernel several times. What remains are
# strides, which decide how wide the loads are.
RUNTIME_ONLY = (
    *("first_item", "N", "M", "N_out", "N_in", "blocks", "blocks_a", "blocks_b", "parts"),
    *("n_pairs", "K", "k", "max_iter", "tol", "metric", "times_cost"),
    *("mode_a", "mode_b", "mode_out", "mode_in", "has_a", "has_b", "has_w_out", "has_w_in", "has_init"),
    *("need_x", "need_marginal", "need_reg", "with_mass", "kind", "entropy", "singular"),
    *("has_v_out", "has_v_in", "has_dense", "has_cost_scale"),
    *("has_slope", "has_extra", "has_slope_a", "has_slope_b", "has_extra_a", "has_extra_b"),
)


@triton.jit
def exponent_l2(cost, h_out, h_in, reg):
    """log2 of exp((h_r + h_c - C_rc) / reg), the sum with one rounding: what its two steps lose is collected (Knuth).

    A small reg multiplies that error, and nothing after it can undo it. Weights join the exponent before it is raised;
    exp alone could overflow.
    """
    finite = cost < float("inf")
    c = tl.where(finite, cost, 0.0)
    s = h_in[None, :] - c
    minus_c = s - h_in[None, :]
    lost = (h_in[None, :] - (s - minus_c)) - (c + minus_c)
    t = s + h_out[:, None]
    just_h = t - s
    lost += (s - (t - just_h)) + (h_out[:, None] - just_h)
    return tl.where(finite, t + lost, float("-inf")) * (LOG2_E / reg)


@triton.jit
def item_span(item, sizes_ptr, mode, size):
    """Start of the item among the rows of its side, and its length. mode 0: all `size` rows, 1: lengths, 2: offsets."""
    start = item.to(tl.int64) * size
    length = item * 0 + size
    if mode == 1:
        length = tl.load(sizes_ptr + item)
    if mode == 2:
        first = tl.load(sizes_ptr + item)
        length = tl.load(sizes_ptr + item + 1) - first
        start = first.to(tl.int64)
    # Lengths are not checked on a GPU by default: a wrong one must not reach another item's memory.
    return start, tl.minimum(tl.maximum(length, 0), size)


@triton.jit
def item_base(x_ptr, item, start, stride_b, stride_n, mode):
    """Address of the item's first row; a packed batch has no batch stride."""
    base = x_ptr + item.to(tl.int64) * stride_b
    if mode == 2:
        base = x_ptr + start * stride_n
    return base


@triton.jit
def load_weights(w_ptr, start, index, length, has_weights, COMPUTE: tl.constexpr):
    """Weights of the rows `index` of an item, 0 beyond its length; uniform ones where none were given."""
    inside = index < length
    w = tl.where(inside, 1.0 / tl.maximum(length, 1).to(COMPUTE), 0.0).to(COMPUTE)
    if has_weights:
        w = tl.load(w_ptr + start + index, mask=inside, other=0.0)
    return w


@triton.jit
def log2_weights(w):
    """log2 of weights with log2(0) = -inf, without computing the logarithm of 0."""
    return tl.where(w > 0, tl.log2(tl.where(w > 0, w, 1.0)), float("-inf"))


@triton.jit
def load_points(x_ptr, rows, row_inside, stride_n, stride_d, d0, D, BLOCK_D: tl.constexpr):
    """Features d0 .. d0 + BLOCK_D of some rows, 0 outside.  # (rows, BLOCK_D)"""
    d = d0 + tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    return tl.load(x_ptr + offsets, mask=row_inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def squared_distance_again(
    d2, scale, x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D,
    COLS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Squared distances of near pairs summed from differences, one pair of every row per pass.

    Few rows have a near pair at all; in a cloud against itself each has one, its own copy, which comes out exactly 0.
    A pair that is done is kept negative, so that no second tile is needed to tell.
    """
    j = tl.arange(0, COLS)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    near = tl.min(tl.where(inside & (d2 >= 0) & (d2 < CLOSE * scale), j[None, :], COLS), axis=1)
    first_col = tl.min(cols, axis=0)
    while tl.min(near, axis=0) < COLS:
        chosen = near < COLS
        total = tl.zeros_like(near).to(COMPUTE)
        for d0 in range(0, D, BLOCK_D):
            x = load_points(x_ptr, rows, chosen, stride_x_n, stride_x_d, d0, D, BLOCK_D).to(COMPUTE)
            y = load_points(y_ptr, first_col + near, chosen, stride_y_n, stride_y_d, d0, D, BLOCK_D).to(COMPUTE)
            total += tl.sum((x - y) * (x - y), axis=1)
        d2 = tl.where(j[None, :] == near[:, None], -tl.maximum(total, TINY)[:, None], d2)
        near = tl.min(tl.where(inside & (d2 >= 0) & (d2 < CLOSE * scale), j[None, :], COLS), axis=1)
    return tl.where(d2 < 0, tl.where(d2 == -TINY, 0.0, -d2), d2)


@triton.jit
def power_of_two(x_ptr, rows, row_inside, stride_n, stride_d, D, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):
    """Powers of two that bring the largest entry of each row to at least 2^10, or as near as one factor can.

    Made from the bits of its exponent: exact, and a power of two rounds nothing.
    """
    top = tl.zeros_like(rows).to(COMPUTE)
    for d0 in range(0, D, BLOCK_D):
        x = load_points(x_ptr, rows, row_inside, stride_n, stride_d, d0, D, BLOCK_D).to(COMPUTE)
        top = tl.maximum(top, tl.max(tl.abs(x), axis=1))
    if top.dtype == tl.float64:
        exponent = top.to(tl.int64, bitcast=True) >> 52
        scale = (tl.minimum(2 * 1023 + 10 - exponent, 2046) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = top.to(tl.int32, bitcast=True) >> 23
        scale = (tl.minimum(2 * 127 + 10 - exponent, 254) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def products(
    x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D, scale_x, scale_y,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """<x, y> of every pair, |x|^2 and |y|^2: of centred points (DISTANCE), of points times their scale (SCALED)."""
    xy = tl.zeros((ROWS, COLS), COMPUTE)
    xx = tl.zeros((ROWS,), COMPUTE)
    yy = tl.zeros((COLS,), COMPUTE)
    col_count = tl.maximum(tl.sum((cols < m).to(tl.int32), axis=0), 1).to(COMPUTE)
    for d0 in range(0, D, BLOCK_D):
        x = load_points(x_ptr, rows, rows < n, stride_x_n, stride_x_d, d0, D, BLOCK_D)
        y = load_points(y_ptr, cols, cols < m, stride_y_n, stride_y_d, d0, D, BLOCK_D)
        if SCALED:
            # exact in 16 bits as well, where the matrix units want them
            x = (x.to(COMPUTE) * scale_x[:, None]).to(x.dtype)
            y = (y.to(COMPUTE) * scale_y[:, None]).to(y.dtype)
        if (KIND == DISTANCE) | WIDEN:
            x = x.to(COMPUTE)
            y = y.to(COMPUTE)
        if KIND == DISTANCE:
            # Distances do not change when both clouds are shifted; the subtraction must not round to 16 bits.
            centre = tl.sum(y, axis=0) / col_count
            x -= centre[None, :]
            y -= centre[None, :]
        xy = tl.dot(x, tl.trans(y), xy, input_precision=PRECISION, out_dtype=COMPUTE)
        xx += tl.sum(x.to(COMPUTE) * x.to(COMPUTE), axis=1)
        yy += tl.sum(y.to(COMPUTE) * y.to(COMPUTE), axis=1)
    return xy, xx, yy


@triton.jit
def squared_differences(
    x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """|x - y|^2 of every pair, feature by feature, and |x|^2 and |y|^2 of the centred points.

    With few features this costs little, and the error of the product form is much where reg is small.
    """
    square = tl.zeros((ROWS, COLS), COMPUTE)
    xx = tl.zeros((ROWS,), COMPUTE)
    yy = tl.zeros((COLS,), COMPUTE)
    col_count = tl.maximum(tl.sum((cols < m).to(tl.int32), axis=0), 1).to(COMPUTE)
    for d in range(0, D):
        x = tl.load(x_ptr + rows.to(tl.int64) * stride_x_n + d * stride_x_d, mask=rows < n, other=0.0).to(COMPUTE)
        y = tl.load(y_ptr + cols.to(tl.int64) * stride_y_n + d * stride_y_d, mask=cols < m, other=0.0).to(COMPUTE)
        difference = x[:, None] - y[None, :]
        square += difference * difference
        centre = tl.sum(y, axis=0) / col_count
        xx += (x - centre) * (x - centre)
        yy += (y - centre) * (y - centre)
    return square, xx, yy


@triton.jit
def cost_tile(
    x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D, metric,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Cost of the rows against the columns, +inf outside the item, and two numbers per point that the gradients need.

    INNER: 1 / |s x| (0 for a zero vector) and s, the power of two by which an extreme point is multiplied, else 1.
    DISTANCE, DIFFERENCE: |x|^2 of the centred points, and 1.
    MATRIX reads x_ptr with the strides (stride_x_n, stride_x_d).
    16-bit points are multiplied as they are, which is exact, unless WIDEN: the interpreter has no bfloat16 product.
    """
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    xx = tl.zeros((ROWS,), COMPUTE)
    yy = tl.zeros((COLS,), COMPUTE)
    scale_x = xx + 1.0
    scale_y = yy + 1.0
    if KIND == MATRIX:
        offsets = rows.to(tl.int64)[:, None] * stride_x_n + cols.to(tl.int64)[None, :] * stride_x_d
        cost = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(COMPUTE)
    elif KIND == DIFFERENCE:
        cost, xx, yy = squared_differences(
            x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D, ROWS, COLS, COMPUTE
        )
        if metric == EUCLIDEAN:
            cost = tl.sqrt(cost)
    else:
        xy, xx, yy = products(
            x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D, scale_x, scale_y,
            ROWS, COLS, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN, False,
        )  # fmt: skip
        if KIND == DISTANCE:
            # |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>  # (ROWS, COLS)
            scale = xx[:, None] + yy[None, :]
            cost = squared_distance_again(
                tl.maximum(scale - 2 * xy, 0.0), scale, x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d,
                rows, cols, n, m, D, COLS, BLOCK_D, COMPUTE,
            )  # fmt: skip
            if metric == EUCLIDEAN:
                cost = tl.sqrt(cost)
        else:
            unsafe = count_unsafe(xx, rows < n) + count_unsafe(yy, cols < m)
            # A loop of one pass or none: through an `if` the compiler carries the layout of a later product's operand,
            # which takes far more registers, back into all that is computed from the tile.
            for _ in range(0, ((metric == COSINE) & (unsafe > 0)).to(tl.int32)):
                scale_x = power_of_two(x_ptr, rows, rows < n, stride_x_n, stride_x_d, D, BLOCK_D, COMPUTE)
                scale_y = power_of_two(y_ptr, cols, cols < m, stride_y_n, stride_y_d, D, BLOCK_D, COMPUTE)
                xy, xx, yy = products(
                    x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, rows, cols, n, m, D,
                    scale_x, scale_y, ROWS, COLS, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN, True,
                )  # fmt: skip
            xx = tl.where(xx > 0, 1.0 / tl.sqrt(tl.where(xx > 0, xx, 1.0)), 0.0)
            yy = tl.where(yy > 0, 1.0 / tl.sqrt(tl.where(yy > 0, yy, 1.0)), 0.0)
            cost = -xy
            if metric == COSINE:
                # normalised after the product: x and y stay in their own dtype for the matrix units
                cost = 1.0 - xy * xx[:, None] * yy[None, :]
    return tl.where(inside, cost, float("inf")), xx, yy, scale_x, scale_y


@triton.jit
def item_cost(
    x_ptr, y_ptr, tile_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, n, m, D, metric,
    BLOCK: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The whole cost of one item of at most BLOCK x BLOCK points, in one tile of registers.

    The product of points needs room for its operands beside the result, and leaves it in a layout with more vectors
    than a loop over a large tile can have. There the cost is formed PART rows at a time, and passes through scratch,
    tile_ptr, into the layout of a load, once.
    """
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK)
    if PART == BLOCK:
        cost, _, _, _, _ = cost_tile(
            x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, i, j, n, m, D, metric,
            BLOCK, BLOCK, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
        )  # fmt: skip
    else:
        for first in range(0, n, PART):
            part = first + tl.arange(0, PART)
            rows_cost, _, _, _, _ = cost_tile(
                x_ptr, y_ptr, stride_x_n, stride_x_d, stride_y_n, stride_y_d, part, j, n, m, D, metric,
                PART, BLOCK, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN,
            )  # fmt: skip
            tl.store(tile_ptr + part[:, None] * BLOCK + j[None, :], rows_cost)
        tl.debug_barrier()
        # rows beyond the item may never have been written
        cost = tl.load(tile_ptr + i[:, None] * BLOCK + j[None, :], mask=(i < n)[:, None], other=float("inf"))
    return cost


@triton.jit
def count_unsafe(square, inside):
    """How many squared norms lie outside the safe range, NaN among them."""
    return tl.sum((inside & ~((square >= SAFE_MIN) & (square <= SAFE_MAX))).to(tl.int32), axis=0)
