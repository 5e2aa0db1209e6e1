"""Soft minima of a tile, and its plan: what the solves on chip are made of."""

import triton
import triton.language as tl

from .tiles import LN_2, LOG2_E

# The plan is kept times S = 2^60: an entry that was flushed to zero (below 2^-126) is then less than 2^-154 of the
# total mass at any scaling between 2^-16 and 2^16 of the absorbed potentials.
PLAN_SCALE = tl.constexpr(2.0**60)


@triton.jit
def not_before(x, known):
    """x itself, in a form that cannot be computed before `known`, which is never negative.

    What is derived from a row index or a weight would otherwise be computed ahead of a loop and occupy registers in
    it: addresses and masks of a tile as many as the tile.
    """
    return x + (known < 0).to(x.dtype)


@triton.jit
def soft_min(potential, cost, log_weight_l2, reg, AXIS: tl.constexpr):
    """-reg log sum w exp((potential - C) / reg) along AXIS, 0 where every term is masked.

    The difference is taken in the unit of the cost, where it loses least; at small reg both of its terms are large.
    """
    top = tl.max((potential - cost) * (LOG2_E / reg) + log_weight_l2, axis=AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    # The exponents are formed a second time, in a form that the compiler cannot recognise: kept, they are a third tile.
    potential += (tl.max(top, axis=0) == float("inf")).to(potential.dtype)
    exponent = (potential - cost) * (LOG2_E / reg) + log_weight_l2
    total = tl.sum(tl.exp2(exponent - tl.expand_dims(top, AXIS)), axis=AXIS)
    return tl.where(total > 0, -(top + tl.log2(tl.where(total > 0, total, 1.0))) * LN_2 * reg, 0.0)


@triton.jit
def scaled_exp2(x):
    """S 2^x for S = 2^60: added to a large negative exponent, where 2^x is flushed, and multiplied where it is not.

    Added everywhere it would round exponents of about 1 to the accuracy of those of about 60.
    """
    y = tl.exp2(tl.where(x < -60.0, x + 60.0, x))
    # Written this way, because as one product with 1 or S it needs a tile of predicates at once, and registers spill.
    return tl.where(x < -60.0, y, y * PLAN_SCALE)
