"""Regressions of one run against another on the same machine, beyond the noise of both."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.methods import AGAIN, OURS

LEAST_FLOOR = 0.05  # two runs of one process image differ by so much through memory layout alone


def ours(run: dict[str, Any]) -> set[str]:
    """The methods whose code is judged; the others show what the machine did."""
    return {*OURS, *(entry.partition("=")[0] for entry in run["header"]["candidates"])} - set(AGAIN)


def floor_of(records: dict[str, dict], method: str) -> float:
    """The noise floor of a case in one run: the same method twice, or the middle half of its own samples."""
    again = [r["noise_floor"] for r in records.values() if "noise_floor" in r]
    own = records[method]
    return max([LEAST_FLOOR, *again, (own["p80_ms"] - own["p20_ms"]) / own["p50_ms"] / 2])


def drift_of(old: dict[str, dict], new: dict[str, dict], judged: set[str]) -> float:
    """New over old of the methods whose code did not change: the machine. 1 if fewer than three tell."""
    ratios = [
        new[name]["p50_ms"] / old[name]["p50_ms"]
        for name in old
        if name not in judged and name not in AGAIN and name in new
        if "p50_ms" in old[name] and "p50_ms" in new[name]
    ]
    return statistics.median(ratios) if len(ratios) >= 3 else 1.0


def by_case(run: dict[str, Any]) -> dict[str, dict[str, dict]]:
    cases: dict[str, dict[str, dict]] = {}
    for record in run["records"]:
        cases.setdefault(record["case"], {})[record["method"]] = record
    return cases


def compare(old_run: dict[str, Any], new_run: dict[str, Any]) -> tuple[list[str], int]:
    """One line for each case and judged method of both runs, and the number of regressions.

    A regression is a time beyond the larger noise floor of the two runs, after what the unchanged methods say of the
    machine is divided out; or a record that was right and now failed.
    """
    lines, regressions = [], 0
    heads = old_run["header"], new_run["header"]
    for key in ("machine", "threads", "versions"):
        if heads[0][key] != heads[1][key]:
            lines.append(f"note: the runs differ in {key}")
    judged = ours(old_run) | ours(new_run)
    new_cases = by_case(new_run)
    for name, old in by_case(old_run).items():
        new = new_cases.get(name, {})
        drift = drift_of(old, new, judged)
        for method in [m for m in old if m in judged and m in new]:
            verdict, text = judge(old, new, method, drift)
            regressions += verdict == "REGRESSION"
            lines.append(f"{verdict:12}{name}, {method}: {text}")
    missing = [name for name in by_case(old_run) if name not in new_cases]
    lines += [f"{'not in NEW':12}{name}" for name in missing]
    return [*lines, f"{regressions} regressions"], regressions


def judge(old: dict[str, dict], new: dict[str, dict], method: str, drift: float) -> tuple[str, str]:
    before, after = old[method], new[method]
    if before["status"] != "ok":
        return "no verdict", f"was {before['status']} in OLD"
    if after["status"] != "ok":
        return "REGRESSION", f"{after['status']}: {after['reason']}"
    floor = max(floor_of(old, method), floor_of(new, method))
    ratio = after["p50_ms"] / before["p50_ms"] / drift
    text = f"{before['p50_ms']:.4g} ms -> {after['p50_ms']:.4g} ms, {ratio:.2f} times"
    text += f" after the machine's {drift:.2f}" if drift != 1 else ""
    text += f", noise {100 * floor:.0f} %"
    if ratio > 1 + floor:
        return "REGRESSION", text
    return ("faster" if ratio < 1 / (1 + floor) else "same"), text
