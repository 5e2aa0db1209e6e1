"""Triton kernels that do nothing but multiply-adds or exponentials, to measure their rates on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024
UNROLLED = 16


@triton.jit
def chain_kernel(out_ptr, steps, exponential: tl.constexpr):
    """With four warps, eight independent chains a thread: enough to hide the latency of one."""
    offsets = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    x = offsets.to(tl.float32) * 1e-6
    for _ in range(steps):
        for _unrolled in tl.static_range(16):
            x = tl.exp2(-x) if exponential else x * 0.999 + 1e-3
    tl.store(out_ptr + offsets, x)
