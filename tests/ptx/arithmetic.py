"""Arithmetic that numpy does not have: one rounding in fma, PTX's minima and maxima, flushed subnormals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def two_sum(a, b):
    """a + b rounded, and its exact error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def round_to_odd(a, b):
    """a + b in float64, rounded to odd, so that a second rounding, to fewer bits, is correct (Boldo, Melquiond)."""
    total, error = two_sum(a, b)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even & np.isfinite(total), np.nextafter(total, toward), total)


def fma32(a, b, c):
    """float32: the product is exact in float64, the sum is rounded to odd there."""
    return round_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(np.float32)


def _two_product(a, b):
    """a * b rounded, and its exact error (Dekker, Veltkamp)."""

    def halves(x):
        big = x * 134217729.0
        high = big - (big - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def fma64(a, b, c):
    """float64 with one rounding; exact rationals where an intermediate result could overflow or be subnormal."""
    high, low = _two_product(a, b)
    sum_high, sum_low = two_sum(c, low)
    top, rest = two_sum(high, sum_high)
    result = top + round_to_odd(sum_low, rest)
    plain = a * b + c
    sizes = np.abs(np.stack([a, b, c, high, plain]))
    extreme = ((sizes != 0) & ((sizes < 1e-140) | (sizes > 1e140))).any(0) & np.isfinite(sizes[:3]).all(0)
    extreme |= (plain == 0) & np.isfinite(sizes[:3]).all(0) & (high == 0)
    result = np.where(np.isfinite(plain), result, plain)
    finite = np.isfinite(a) & np.isfinite(b)
    result = np.where(finite & np.isinf(c), c, result)  # though the product alone would overflow
    for lane in np.flatnonzero(extreme):
        exact = Fraction(a[lane]) * Fraction(b[lane]) + Fraction(c[lane])
        try:
            result[lane] = float(exact) if exact else plain[lane]
        except OverflowError:
            result[lane] = np.inf if exact > 0 else -np.inf
    return result


def extremum(a, b, larger: bool):
    """max and min: the other operand where one is NaN, NaN where both are, and -0 < +0."""
    result = np.fmax(a, b) if larger else np.fmin(a, b)
    bits = np.uint32 if a.dtype == np.float32 else np.uint64
    x, y = a.view(bits), b.view(bits)
    zeros = (x & y if larger else x | y).view(a.dtype)
    return np.where((a == 0) & (b == 0), zeros, result)


def flush(x):
    """.ftz: a subnormal becomes a zero of its sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)
