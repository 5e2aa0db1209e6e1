"""Speed of the Triton backend beside plain torch on a GPU: ``python -m benchmarks.gpu_speed [--json FILE]``.

Cosine cost, d = 768, reg = 0.1, exactly 50 iterations, value and gradients of both clouds. Every shape is first
checked against an fp64 solution of some of its items; then the methods run in interleaved rounds between device
events. The first of them is otkern a second time: the noise floor.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import otkern

REG, ITERATIONS, FEATURES, CHECKED = 0.1, 50, 768, 4
# Largest error of a value, and of a gradient relative to its largest entry, in the shapes below.
ALLOWED = {torch.float32: (2e-6, 2e-5), torch.bfloat16: (2e-5, 2e-2)}


class Case(NamedTuple):
    """Clouds (B, N, D) and (B, M, D) and their true lengths."""

    name: str
    x: Tensor
    y: Tensor
    lengths_a: Tensor
    lengths_b: Tensor


def make_cases(scale: float) -> list[Case]:
    generator = torch.Generator("cuda").manual_seed(0)

    def case(name: str, batch: int, n: int, low: int, dtype: torch.dtype) -> Case:
        batch = max(CHECKED, int(batch * scale))
        x, y = (torch.randn(batch, n, FEATURES, generator=generator, device="cuda") for _ in range(2))
        y = y + 0.5 * x
        lengths = torch.randint(low, n + 1, (2, batch), generator=generator, device="cuda", dtype=torch.int32)
        return Case(f"{batch} x {name} {str(dtype).split('.')[1]}", x.to(dtype), y.to(dtype), *lengths)

    return [
        case(name, batch, n, low, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name, batch, n, low in (
            ("(16x16)", 4096, 16, 16),
            ("(8..64)", 2048, 64, 8),
            ("(64x64)", 2048, 64, 64),
            ("(128x128)", 512, 128, 128),
            ("(700x700)", 8, 700, 700),
        )
    ]


def run_otkern(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (cloud.detach().requires_grad_() for cloud in (case.x, case.y))
    lengths = {"lengths_a": case.lengths_a, "lengths_b": case.lengths_b}
    result = otkern.solve_sample(x, y, metric="cosine", reg=REG, max_iter=ITERATIONS, backend="triton", **lengths)
    return result.value.detach(), *torch.autograd.grad(result.value.sum(), (x, y))


def weights(case: Case, dtype: torch.dtype) -> list[Tensor]:
    sides = ((case.x, case.lengths_a), (case.y, case.lengths_b))
    return [(torch.arange(c.shape[1], device="cuda") < n[:, None]).to(dtype) / n[:, None] for c, n in sides]


def run_torch(case: Case, log_domain: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sinkhorn in plain torch, envelope gradient through the cost; the value is the dual objective."""
    x, y = (cloud.detach().requires_grad_() for cloud in (case.x, case.y))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    a, b = (w[:, :, None] for w in weights(case, compute))
    cost = 1 - torch.bmm(normalize(x, dim=-1), normalize(y, dim=-1).mT).to(compute)
    with torch.no_grad():
        if log_domain:
            g = torch.zeros_like(b)
            for _ in range(ITERATIONS):
                f = -REG * torch.logsumexp(b.log().mT + (g.mT - cost) / REG, 2, keepdim=True)
                g = -REG * torch.logsumexp(a.log().mT + (f.mT - cost.mT) / REG, 2, keepdim=True)
        else:
            kernel = torch.exp(-cost / REG)
            v = torch.ones_like(b)
            for _ in range(ITERATIONS):
                u = 1 / torch.bmm(kernel, b * v)
                v = 1 / torch.bmm(kernel.mT, a * u)
            f, g = REG * u.log(), REG * v.log()
        plan = torch.exp((f + g.mT - cost) / REG) * a * b.mT
        value = (a * f + b * g).sum((1, 2))
    return value, *torch.autograd.grad(cost, (x, y), plan)


def errors(case: Case) -> tuple[float, float]:
    """Largest error of the values, and of the gradients relative to their largest entry, on the first items."""
    few = Case(case.name, *(t[:CHECKED] for t in case[1:]))
    exact = run_torch(few._replace(x=few.x.double(), y=few.y.double()), log_domain=True)
    actual = [t[:CHECKED].double() for t in run_otkern(case)]
    worst = [float((ours - truth).abs().max()) for ours, truth in zip(actual, exact, strict=True)]
    return worst[0], max(worst[1] / float(exact[1].abs().max()), worst[2] / float(exact[2].abs().max()))


def milliseconds(method, case: Case) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    method(case)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def main() -> int:
    parser = argparse.ArgumentParser(description="The Triton backend beside plain torch.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the batch sizes")
    options = parser.parse_args()
    methods = {"otkern again": run_otkern, "otkern": run_otkern, "torch": run_torch}
    records, failed = [], False
    for case in make_cases(options.scale):
        began = time.perf_counter()
        value_error, gradient_error = errors(case)
        cold = time.perf_counter() - began
        allowed = ALLOWED[case.x.dtype]
        correct = value_error <= allowed[0] and gradient_error <= allowed[1]
        failed |= not correct
        record = {"case": case.name, "correct": correct, "value_error": value_error, "gradient_error": gradient_error}
        record["first_call_s"] = round(cold, 3)
        times: dict[str, list[float]] = {name: [] for name in methods}
        for turn in range(options.rounds + 3):
            for name, method in methods.items():
                elapsed = milliseconds(method, case)
                if turn >= 3:
                    times[name].append(elapsed)
        for name, values in times.items():
            low, middle, high = (sorted(values)[int(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
            record[name] = {"p20_ms": low, "p50_ms": middle, "p80_ms": high}
        record["torch_over_otkern"] = statistics.median(times["torch"]) / statistics.median(times["otkern"])
        records.append(record)
        print(json.dumps(record), flush=True)
    if options.json:
        import triton

        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        about |= {"python": platform.python_version(), "otkern": otkern.__version__}
        options.json.write_text(json.dumps({"machine": about, "records": records}, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
