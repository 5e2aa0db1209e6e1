"""Plots of runs: time of each method, time against size, and time to a marginal error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.methods import AGAIN, OURS
from benchmarks.report import cases_of, time_of

OURS_COLOUR, OTHER_COLOUR = "#c44e52", "#7f8c9b"


def draw(runs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes what the runs hold as PNG; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for run in runs:
        suite = run["header"]["suite"]
        for name, figure in (("headline", headline(run)), ("tolerance", tolerance(run))):
            if figure is not None:
                path = folder / f"benchmarks-{suite}-{name}.png"
                # Without a date in the file, the same records give the same bytes.
                figure.savefig(path, dpi=110, metadata={"Software": None})
                plt.close(figure)
                paths.append(path)
    return paths


def headline(run: dict[str, Any]):
    """Bars: the methods of each headline case, fastest first."""
    cases = {name: records for name, records in cases_of(run).items() if run["cases"][name].get("headline")}
    if not cases:
        return None
    figure, axes = plt.subplots(1, len(cases), figsize=(4.6 * len(cases), 4.4), layout="constrained", squeeze=False)
    for axis, (name, records) in zip(axes[0], cases.items(), strict=True):
        timed = [r for r in records if r["status"] == "ok" and r["method"] not in AGAIN]
        timed.sort(key=lambda r: -r["p50_ms"])
        names, times = [r["method"] for r in timed], [r["p50_ms"] for r in timed]
        spread = [[r["p50_ms"] - r["p20_ms"] for r in timed], [r["p80_ms"] - r["p50_ms"] for r in timed]]
        colours = [OURS_COLOUR if method in OURS else OTHER_COLOUR for method in names]
        axis.barh(names, times, color=colours, xerr=spread, error_kw={"linewidth": 0.8})
        axis.set(title=name, xlabel="ms")
        axis.tick_params(axis="y", labelsize=8)
    return figure


def tolerance(run: dict[str, Any]):
    """Lines: time against the marginal error to reach, one panel for each shape and reg."""
    panels: dict[tuple[str, float], list[tuple[float, list[dict]]]] = {}
    for name, records in cases_of(run).items():
        case = run["cases"][name]
        if "tol" in case:
            panels.setdefault((name.split(" to ")[0], case.get("reg", 0.1)), []).append((case["tol"], records))
    panels = {key: points for key, points in panels.items() if len(points) > 1}
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axis, ((shape, reg), points) in zip(axes[0], panels.items(), strict=True):
        for method in dict.fromkeys(r["method"] for _, records in points for r in records):
            found = [(tol, time_of(records, method)) for tol, records in sorted(points)]
            found = [(tol, time) for tol, time in found if time is not None]
            if found and method not in AGAIN:
                style = {"color": OURS_COLOUR, "linewidth": 2.5} if method in OURS else {"linewidth": 1}
                axis.plot(*zip(*found, strict=True), marker="o", markersize=3, label=method, **style)
        axis.set(title=f"{shape}, reg {reg:g}", xlabel="marginal error", ylabel="ms", xscale="log", yscale="log")
        axis.invert_xaxis()
    # Beside the axes: within them it would lie over somebody's line.
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
