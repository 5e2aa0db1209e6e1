"""Interleaved timing and peak memory of methods that have been verified."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.methods import Method
from benchmarks.problems import Answer

PAUSE = 0.01  # seconds before each sample: the idle threads of the method before stop spinning
SAMPLE = 2e-3  # seconds that a sample lasts at least; shorter calls are repeated within it
LEAST, MOST = 5, 60  # samples of a method
LEAST_SLOW = 3  # of one whose call takes more than a second


def synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def caller(method: Method, case: Case) -> Callable[[], Answer]:
    """The call that the case is about, from the points to the answer."""
    if case.part == "backward":
        return lambda: method.begin()[1]()
    return method.forward if case.part == "forward" else method.both


def sample(method: Method, case: Case, count: int) -> tuple[float, float]:
    """Seconds a call until its result is there, and until it returned, over ``count`` calls in a row."""
    backward = case.part == "backward"
    calls = [method.begin()[1] for _ in range(count)] if backward else [caller(method, case)] * count
    if count > 1:
        # Of several short calls, the first would pay for what ran before.
        caller(method, case)()
    synchronize(case)
    start = time.perf_counter()
    for call in calls:
        call()
    returned = time.perf_counter()
    synchronize(case)
    return (time.perf_counter() - start) / count, (returned - start) / count


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    ordered = sorted(values)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))


class Rounds:
    """Samples of several methods in turn, so that whatever else the machine does hits all of them.

    A method that is slow for its share of ``seconds`` joins every k-th round. The order is drawn anew in each round.
    """

    def __init__(self, methods: dict[str, Method], case: Case, seconds: float):
        self.methods, self.case = methods, case
        self.counts: dict[str, int] = {}
        self.samples: dict[str, int] = {}
        self.times: dict[str, list[float]] = {name: [] for name in methods}
        self.host: dict[str, list[float]] = {name: [] for name in methods}
        self.share = seconds / max(1, len(methods))

    def plan(self, name: str) -> None:
        """Decides from one warm call how often the method is sampled and how many calls a sample has."""
        call, _ = sample(self.methods[name], self.case, 1)
        most = 10 if self.case.part == "backward" else 2000
        self.counts[name] = max(1, min(most, round(SAMPLE / max(call, 1e-7))))
        least = LEAST if call < 1 else LEAST_SLOW
        self.samples[name] = int(max(least, min(MOST, self.share / (self.counts[name] * call + PAUSE))))

    def run(self) -> Iterator[str]:
        """Samples in turn; yields the name of the method before it runs."""
        order = random.Random(0)
        for turn in range(MOST):
            names = list(self.methods)
            order.shuffle(names)
            for name in names:
                joins = (turn + 1) * self.samples[name] // MOST > turn * self.samples[name] // MOST
                if joins:
                    yield name

    def add(self, name: str) -> None:
        time.sleep(PAUSE)
        gc.disable()
        try:
            seconds, host = sample(self.methods[name], self.case, self.counts[name])
        finally:
            gc.enable()
        self.times[name].append(seconds)
        self.host[name].append(host)

    def result(self, name: str) -> dict[str, Any]:
        low, middle, high = quantiles(self.times[name])
        out = {"p20_ms": 1e3 * low, "p50_ms": 1e3 * middle, "p80_ms": 1e3 * high, "samples": len(self.times[name])}
        if self.case.device == "cuda":
            out["host_p50_ms"] = 1e3 * quantiles(self.host[name])[1]
        return out


def peak_memory(method: Method, case: Case) -> float | None:
    """MiB that one call takes beyond what is there before it, its results included; None where that cannot be known.

    On a CPU: the peak of the resident memory, which Linux can reset, after the allocator gave back what is free.
    """
    call = caller(method, case)
    if case.device == "cuda":
        if method.__module__.endswith(".ott"):
            return None  # memory of another allocator
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        answer = call()
        peak = _status("VmHWM")
    except OSError:
        return None
    del answer
    return max(0.0, peak - before) / 1024


def _status(field: str) -> float:
    """A field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field + ":")).split()[1])
