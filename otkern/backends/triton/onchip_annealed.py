"""The annealed loop of GeomLoss for one problem by one program."""

import triton
import triton.language as tl

from .log_domain import soft_min
from .relaxation import load_relaxation
from .tiles import (
    RUNTIME_ONLY,
    exponent_l2,
    item_base,
    item_cost,
    item_span,
    load_weights,
    log2_weights,
)


@triton.jit(do_not_specialize=RUNTIME_ONLY)
def onchip_annealed_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, floor_ptr, n_steps_ptr,
    sizes_a_ptr, sizes_b_ptr, scratch_ptr, s_a_ptr, s_b_ptr, f_ptr, g_ptr, r_a_ptr, r_b_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
    first_item, n_pairs, N, M, D, mode_a, mode_b, has_a, has_b, metric, kind,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """One program anneals item first_item + p, if LOWER < max(n, m) <= BLOCK: equation (23).

    SELF: items from n_pairs on match a cloud with itself. Results as of `otkern.backends.reference.symmetric`.
    """
    slot = tl.program_id(0)
    item = first_item + slot
    if SELF:
        if item >= n_pairs:
            anneal(
                x_ptr, y_ptr, a_ptr, b_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, floor_ptr,
                n_steps_ptr, sizes_a_ptr, sizes_b_ptr, scratch_ptr, s_a_ptr, s_b_ptr, f_ptr, g_ptr, r_a_ptr, r_b_ptr,
                stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
                slot, item, N, M, D, mode_a, mode_b, has_a, has_b, metric, kind,
                BLOCK, LOWER, PART, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN, True,
            )  # fmt: skip
            return
    anneal(
        x_ptr, y_ptr, a_ptr, b_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, floor_ptr, n_steps_ptr,
        sizes_a_ptr, sizes_b_ptr, scratch_ptr, s_a_ptr, s_b_ptr, f_ptr, g_ptr, r_a_ptr, r_b_ptr,
        stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
        slot, item, N, M, D, mode_a, mode_b, has_a, has_b, metric, kind,
        BLOCK, LOWER, PART, BLOCK_D, KIND, COMPUTE, PRECISION, WIDEN, False,
    )  # fmt: skip


@triton.jit
def anneal(
    x_ptr, y_ptr, a_ptr, b_ptr, reg_ptr, relaxation_ptr, eps_start_ptr, eps_factor_ptr, floor_ptr, n_steps_ptr,
    sizes_a_ptr, sizes_b_ptr, scratch_ptr, s_a_ptr, s_b_ptr, f_ptr, g_ptr, r_a_ptr, r_b_ptr,
    stride_x_b, stride_x_n, stride_x_d, stride_y_b, stride_y_n, stride_y_d,
    slot, item, N, M, D, mode_a, mode_b, has_a, has_b, metric, kind,
    BLOCK: tl.constexpr, LOWER: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The loop of one item; SAME: of a cloud with itself."""
    start_a, n = item_span(item, sizes_a_ptr, mode_a, N)
    start_b, m = item_span(item, sizes_b_ptr, mode_b, M)
    size = tl.maximum(n, m)
    if (size <= LOWER) | (size > BLOCK) | (n == 0) | (m == 0):
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
    cost = tl.maximum(cost, tl.load(floor_ptr))
    reg = tl.load(reg_ptr + item)
    rho_a, rho_b, _, _ = load_relaxation(relaxation_ptr, item, kind, reg * 0.0)
    factor = tl.load(eps_factor_ptr)
    start_eps = tl.load(eps_start_ptr + item)
    last = tl.load(n_steps_ptr + item) + 2
    b_l2 = log2_weights(load_weights(b_ptr, start_b, j, m, has_b, COMPUTE))
    a_l2 = b_l2
    if not SAME:
        a_l2 = log2_weights(load_weights(a_ptr, start_a, i, n, has_a, COMPUTE))
    f = tl.zeros((BLOCK,), COMPUTE)
    g = tl.zeros((BLOCK,), COMPUTE)
    eps = start_eps
    k = 0
    while k <= last:
        eps = tl.where(k == last, reg, tl.where(k > 2, eps * factor, start_eps))
        # the first step is not averaged
        keep = tl.where(k == 0, 0.0, 0.5)
        s = soft_min(g[None, :], cost, b_l2[None, :], eps, 1) / (1.0 + eps / rho_a)
        if SAME:
            g = keep * g + (1.0 - keep) * s
        else:
            t = soft_min(f[:, None], cost, a_l2[:, None], eps, 0) / (1.0 + eps / rho_b)
            f = keep * f + (1.0 - keep) * s
            g = keep * g + (1.0 - keep) * t
        k += 1

    s = soft_min(g[None, :], cost, b_l2[None, :], reg, 1)
    t = s
    if SAME:
        f = g
    else:
        t = soft_min(f[:, None], cost, a_l2[:, None], reg, 0)
    tl.store(f_ptr + start_a + i, f, mask=i < n)
    tl.store(g_ptr + start_b + j, g, mask=j < m)
    tl.store(s_a_ptr + start_a + i, s, mask=i < n)
    tl.store(s_b_ptr + start_b + j, t, mask=j < m)
    # r of rows and columns: the exponents take more registers than a loop over a large tile leaves, so there they are
    # formed PART rows at a time, from the cost in scratch.
    tl.debug_barrier()
    u = tl.zeros((BLOCK,), COMPUTE)
    for first in range(0, n, PART):
        part = first + tl.arange(0, PART)
        rows_cost = cost
        if PART < BLOCK:
            place = scratch_ptr + slot.to(tl.int64) * (BLOCK * BLOCK) + part[:, None] * BLOCK + j[None, :]
            rows_cost = tl.load(place, mask=(part < n)[:, None], other=float("inf"))
            rows_cost = tl.maximum(rows_cost, tl.load(floor_ptr))
        s_part = tl.load(s_a_ptr + start_a + part, mask=part < n, other=0.0)
        r = tl.sum(tl.exp2(exponent_l2(rows_cost, s_part, g, reg) + b_l2[None, :]), axis=1)
        tl.store(r_a_ptr + start_a + part, r, mask=part < n)
        if SAME:
            tl.store(r_b_ptr + start_b + part, r, mask=part < n)
        else:
            f_part = tl.load(f_ptr + start_a + part, mask=part < n, other=0.0)
            part_l2 = log2_weights(load_weights(a_ptr, start_a, part, n, has_a, COMPUTE))
            u += tl.sum(tl.exp2(exponent_l2(rows_cost, f_part, t, reg) + part_l2[:, None]), axis=0)
    if not SAME:
        tl.store(r_b_ptr + start_b + j, u, mask=j < m)
