"""The table by which otkern chooses between its CUDA and its Triton backend, from a run of the GPU suite."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cases import BACKENDS
from benchmarks.record import ROOT
from benchmarks.report import cases_of, time_of
from otkern.backends import measured

TABLE = ROOT / "otkern" / "backends" / "measured.json"


def entry_of(run: dict[str, Any]) -> dict[str, Any]:
    """Time of CUDA over that of Triton, by dtype and bracket of the longest side: the geometric mean over the cases
    that both have passed.

    Raises:
        ValueError: the run was not made on a GPU, or in no case did both pass.
    """
    header = run["header"]
    if header.get("capability") is None:
        raise ValueError("file must be a run of the gpu suite, but this one was made without a GPU")
    found: dict[str, dict[int, list[float]]] = {}
    for name, records in cases_of(run).items():
        case = run["cases"][name]
        cuda, triton = (time_of(records, method) for method in BACKENDS)
        bracket = measured.bracket_of(max(case["n"], case["m"]))
        if cuda is None or triton is None or bracket is None:
            continue
        found.setdefault(case.get("dtype", "float32"), {}).setdefault(bracket, []).append(cuda / triton)
    if not found:
        raise ValueError(f"file must have a case that {' and '.join(BACKENDS)} both passed, but had none")
    ratios = {
        dtype: {str(bracket): round(statistics.geometric_mean(times), 3) for bracket, times in sorted(brackets.items())}
        for dtype, brackets in sorted(found.items())
    }
    origin = {"gpu": header["machine"]["gpu"], "date": header["date"], "commit": header["commit"]}
    return {measured.name_of(header["capability"]): {**origin, "cuda_over_triton": ratios}}


def write(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """Put the entry of the run's device into the table; what it has of other devices stays. Returns the entry."""
    entry = entry_of(run)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(table | entry, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return entry


def text(entry: dict[str, Any]) -> str:
    """A line for each dtype and bracket."""
    lines = []
    for capability, found in entry.items():
        lines.append(f"compute capability {capability}, {found['gpu']}, {found['date']}, commit {found['commit']}")
        for dtype, brackets in found["cuda_over_triton"].items():
            for bracket, ratio in brackets.items():
                lines.append(f"  {dtype}, up to {bracket}: {'cuda' if ratio < 1 else 'triton'} ({ratio:.2f} times)")
    return "\n".join(lines)
