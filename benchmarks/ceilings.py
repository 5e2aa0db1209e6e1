"""What this machine can do, measured in the run that uses it: copy, multiply-add, exponential and matrix rates."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MATRIX_DTYPES = ("float32", "bfloat16", "float16")


def best_seconds(call: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest of as many calls as fit into ``seconds``, three at least."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    best, start, count = once(), time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < seconds:
        best, count = min(best, once()), count + 1
    return best


def measure(device: str, seconds: float = 0.7) -> dict[str, float]:
    """Rates a second: copy (bytes read and written), multiply_add, exponential, and matrix_<dtype> (FLOP).

    On a CPU the multiply-adds are those of a large fp32 product, which is what its vector units are rated by.
    """
    gpu = device == "cuda"
    out = {"copy": _copy_rate(device, seconds)}
    for name in MATRIX_DTYPES:
        size = 8192 if gpu else (1536 if name == "float32" else 512)
        left = torch.ones(size, size, device=device, dtype=getattr(torch, name))
        out[f"matrix_{name}"] = 2 * size**3 / best_seconds(lambda a=left: a @ a, device, seconds)
    if gpu:
        return out | _vector_rates(seconds)
    # In the caches of each core, so that it is the arithmetic that is measured.
    values = torch.linspace(-8, 0, 1 << 17)
    result = torch.empty_like(values)
    out["exponential"] = values.numel() / best_seconds(lambda: torch.exp(values, out=result), device, seconds)
    return out | {"multiply_add": out["matrix_float32"] / 2}


def _copy_rate(device: str, seconds: float) -> float:
    source = torch.ones(1 << (28 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, seconds)


def _vector_rates(seconds: float) -> dict[str, float]:
    """Multiply-adds and exponentials a second in registers, by Triton kernels of nothing else."""
    from benchmarks.chains import BLOCK, UNROLLED, chain_kernel

    programs, steps = 64 * torch.cuda.get_device_properties(0).multi_processor_count, 64
    out = torch.empty(programs * BLOCK, device="cuda")
    rates = {}
    for name, exponential in (("multiply_add", False), ("exponential", True)):

        def call(exponential=exponential):
            chain_kernel[(programs,)](out, steps, exponential, num_warps=4, enable_fp_fusion=True)

        rates[name] = out.numel() * steps * UNROLLED / best_seconds(call, "cuda", seconds)
    return rates
