"""Speed of the CPU backend beside its peers: ``python -m benchmarks.cpu_speed [--json FILE] [--rounds N]``.

Cosine cost, d = 768, fp32, reg = 0.1, exactly 50 iterations, value and gradients of both clouds. Every method is first
checked on the very shape against an fp64 solution of its own quantity; then all run in interleaved rounds, so that
whatever else the machine does hits all of them. The first row is otkern a second time: the noise floor.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import otkern
from otkern.backends import unavailable

REG, ITERATIONS, FEATURES = 0.1, 50, 768


class Case(NamedTuple):
    """One shape: clouds (B, N, D) and (B, M, D), their true lengths, and weights that are 0 in the padding."""

    name: str
    x: Tensor
    y: Tensor
    lengths_a: Tensor
    lengths_b: Tensor
    ragged: bool

    def weights(self) -> tuple[Tensor, Tensor]:
        return tuple(
            (torch.arange(cloud.shape[1]) < lengths[:, None]).to(cloud.dtype) / lengths[:, None]
            for cloud, lengths in ((self.x, self.lengths_a), (self.y, self.lengths_b))
        )


class Answer(NamedTuple):
    """The value of each item, or its linear part, and the gradients of their sum."""

    value: Tensor
    linear: bool
    dx: Tensor
    dy: Tensor


Method = Callable[[Case], Answer]


def make_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def case(name: str, batch: int, n: int, ragged: bool = False) -> Case:
        x, y = (torch.randn(batch, n, FEATURES, generator=generator) for _ in range(2))
        y = y + 0.5 * x
        low = 8 if ragged else n
        lengths = [torch.randint(low, n + 1, (batch,), generator=generator, dtype=torch.int32) for _ in range(2)]
        return Case(name, x, y, *lengths, ragged)

    return [
        case("64 x (64x64)", 64, 64),
        case("16 x (128x128)", 16, 128),
        case("64 x (8..64)", 64, 64, ragged=True),
        case("1 x (700x700)", 1, 700),
    ]


def leaves(case: Case) -> tuple[Tensor, Tensor]:
    return case.x.detach().requires_grad_(), case.y.detach().requires_grad_()


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    return 1 - normalize(x, dim=-1) @ normalize(y, dim=-1).mT


def run_otkern(case: Case) -> Answer:
    x, y = leaves(case)
    lengths = {"lengths_a": case.lengths_a, "lengths_b": case.lengths_b} if case.ragged else {}
    result = otkern.solve_sample(x, y, metric="cosine", reg=REG, max_iter=ITERATIONS, backend="cpu", **lengths)
    result.value.sum().backward()
    return Answer(result.value.detach(), False, x.grad, y.grad)


def run_bmm_loop(case: Case) -> Answer:
    """Kernel domain in torch, envelope gradient through the cost."""
    x, y = leaves(case)
    a, b = case.weights()
    cost = cosine_cost(x, y)
    with torch.no_grad():
        kernel = torch.exp(-cost / REG)
        a, b = a.unsqueeze(2), b.unsqueeze(2)
        v = torch.ones_like(b)
        for _ in range(ITERATIONS):
            u = 1 / torch.bmm(kernel, b * v)
            v = 1 / torch.bmm(kernel.mT, a * u)
        plan = kernel * (a * u) * (b * v).mT
    value = (plan * cost).sum((1, 2))
    value.sum().backward()
    return Answer(value.detach(), True, x.grad, y.grad)


def run_logsumexp_loop(case: Case) -> Answer:
    x, y = leaves(case)
    a, b = case.weights()
    cost = cosine_cost(x, y)
    with torch.no_grad():
        log_a, log_b, scaled = a.log().unsqueeze(2), b.log().unsqueeze(1), -cost / REG
        g = torch.zeros_like(log_b)
        for _ in range(ITERATIONS):
            f = -torch.logsumexp(log_b + g + scaled, 2, keepdim=True)
            g = -torch.logsumexp(log_a + f + scaled, 1, keepdim=True)
        plan = torch.exp(f + g + scaled + log_a + log_b)
    value = (plan * cost).sum((1, 2))
    value.sum().backward()
    return Answer(value.detach(), True, x.grad, y.grad)


def pot_runner(method: str) -> Method:
    from ot.batch import solve_batch

    def run(case: Case) -> Answer:
        x, y = leaves(case)
        # POT gives NaN for weights of 0.
        a, b = (w.clamp_min(1e-12) for w in case.weights())
        cost = cosine_cost(x, y)
        # Its own envelope mode records all iterations for autograd; outside it is faster.
        with torch.no_grad():
            plan = solve_batch(cost, REG, a, b, max_iter=ITERATIONS, tol=0, method=method).plan
        value = (plan * cost).sum((1, 2))
        value.sum().backward()
        return Answer(value.detach(), True, x.grad, y.grad)

    return run


def geomloss_runner() -> Method:
    from geomloss import SamplesLoss

    # The schedule goes from the diameter to blur in ITERATIONS steps; a plain start at blur is not on offer.
    diameter = 2.0**0.5
    scaling = (REG**0.5 / diameter) ** (1 / (ITERATIONS - 3))
    loss = SamplesLoss(
        "sinkhorn", p=2, blur=REG**0.5, diameter=diameter, scaling=scaling, cost=cosine_cost, debias=False,
        backend="tensorized",
    )  # fmt: skip

    def run(case: Case) -> Answer:
        x, y = leaves(case)
        a, b = case.weights()
        value = loss(a, x, b, y)
        value.sum().backward()
        return Answer(value.detach(), False, x.grad, y.grad)

    return run


def run_cost_only(case: Case) -> Answer | None:
    """Not a competitor: the cost matrix and its backward in torch, without any iteration."""
    x, y = leaves(case)
    cosine_cost(x, y).sum().backward()
    return None


def make_methods() -> tuple[dict[str, Method], list[str]]:
    """The methods by name, and one line for each peer that is missing."""
    methods: dict[str, Method] = {
        "otkern again": run_otkern,
        "otkern": run_otkern,
        "torch bmm loop": run_bmm_loop,
        "torch logsumexp loop": run_logsumexp_loop,
    }
    missing = []
    makers = (
        ("POT log domain", lambda: pot_runner("log_sinkhorn")),
        ("POT kernel domain", lambda: pot_runner("sinkhorn")),
        ("GeomLoss tensorized", geomloss_runner),
    )
    for name, maker in makers:
        try:
            methods[name] = maker()
        except ImportError as error:
            missing.append(f"{name}: {error}")
    methods["torch cost only"] = run_cost_only
    return methods, missing


PEERS = ("torch bmm loop", "torch logsumexp loop", "POT log domain", "POT kernel domain", "GeomLoss tensorized")


def exact(case: Case) -> dict[str, Tensor]:
    """Value, linear part and gradients in fp64, by log-domain iterations item by item."""
    x, y = (cloud.double().requires_grad_() for cloud in (case.x, case.y))
    values, linears = [], []
    for i in range(len(case.x)):
        n, m = int(case.lengths_a[i]), int(case.lengths_b[i])
        cost = cosine_cost(x[i, :n], y[i, :m])
        with torch.no_grad():
            g = torch.zeros(m, dtype=torch.float64)
            for _ in range(ITERATIONS):
                f = -REG * (torch.logsumexp((g - cost) / REG, 1) - torch.log(torch.tensor(float(m))))
                g = -REG * (torch.logsumexp((f[:, None] - cost) / REG, 0) - torch.log(torch.tensor(float(n))))
            plan = torch.exp((f[:, None] + g - cost) / REG) / (n * m)
            values.append(f.mean() + g.mean())
        linears.append((plan * cost).sum())
    torch.stack(linears).sum().backward()
    return {"value": torch.stack(values), "linear": torch.stack(linears).detach(), "dx": x.grad, "dy": y.grad}


def largest_error(answer: Answer, truth: dict[str, Tensor]) -> float:
    """The largest error of the value and of the gradients, relative to the largest entry."""

    def relative(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want).abs().max() / want.abs().max())

    value = relative(answer.value, truth["linear" if answer.linear else "value"])
    return max(value, relative(answer.dx, truth["dx"]), relative(answer.dy, truth["dy"]))


def check_iterations(case: Case) -> None:
    lengths = {"lengths_a": case.lengths_a, "lengths_b": case.lengths_b} if case.ragged else {}
    result = otkern.solve_sample(
        case.x, case.y, metric="cosine", reg=REG, max_iter=ITERATIONS, backend="cpu", **lengths
    )
    if not bool((result.n_iters == ITERATIONS).all()):
        raise SystemExit(f"{case.name}: otkern ran {result.n_iters.tolist()} iterations instead of {ITERATIONS}")


def measure(case: Case, rounds: int) -> tuple[list[dict], list[str]]:
    """One record per method, and the peers that are missing."""
    methods, missing = make_methods()
    check_iterations(case)
    truth = exact(case)
    errors, seconds = {}, {name: [] for name in methods}
    for name, method in methods.items():
        answer = method(case)
        errors[name] = None if answer is None else largest_error(answer, truth)
        # GeomLoss spends most of its steps above the final epsilon: as many steps leave it less converged.
        limit = 0.1 if name.startswith("GeomLoss") else 1e-5
        if errors[name] is not None and not errors[name] <= limit:
            raise SystemExit(f"{case.name}: {name} is wrong, error {errors[name]:.1e} against fp64")
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method(case)
            seconds[name].append(time.perf_counter() - start)
    best_peer = min(statistics.median(seconds[name]) for name in PEERS if name in seconds)
    records = []
    for name, times in seconds.items():
        ordered = sorted(1e3 * seconds_taken for seconds_taken in times)
        p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
        records.append(
            {
                "case": case.name, "method": name, "error": errors[name], "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
                "min_ms": ordered[0], "ratio_to_fastest_peer": p50 / (1e3 * best_peer),
            }
        )  # fmt: skip
    return records, missing


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_speed", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the records and versions to this file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if (reason := unavailable("cpu", "cpu")) is not None:
        raise SystemExit(reason)
    records = []
    for case in make_cases():
        found, missing = measure(case, arguments.rounds)
        records += found
        print(f"\n{case.name}, d = {FEATURES}, cosine, reg {REG}, {ITERATIONS} iterations, forward and backward")
        print(f"{'':22}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'of fastest peer':>17}{'error':>10}")
        for r in found:
            error = "" if r["error"] is None else f"{r['error']:.1e}"
            print(
                f"{r['method']:22}{r['p20_ms']:9.2f}{r['p50_ms']:9.2f}{r['p80_ms']:9.2f}"
                f"{r['ratio_to_fastest_peer']:17.2f}{error:>10}"
            )
    for line in missing:
        print(f"missing: {line}")
    if arguments.json:
        about = {
            "versions": {name: version_of(name) for name in ("otkern", "torch", "POT", "geomloss")},
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "missing": missing,
        }
        arguments.json.write_text(json.dumps({"about": about, "records": records}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
