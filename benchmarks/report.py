"""Tables of a run: as text, and as Markdown between the marks ``<!-- benchmarks:NAME -->`` of the documents."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.methods import AGAIN, OURS, YARDSTICKS
from benchmarks.record import ROOT, read

DOCUMENTS = ("README.md", "docs/performance.md")
MARK = re.compile(r"(<!-- benchmarks:(?P<name>[\w-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
NOTHING = "No measurement of this kind has been committed yet.\n"
PRODUCTS, COST = "torch three products", "torch cost and its backward"


def cases_of(run: dict[str, Any]) -> dict[str, list[dict]]:
    """The records by case, in the order of the run."""
    cases: dict[str, list[dict]] = {name: [] for name in run["cases"]}
    for record in run["records"]:
        cases[record["case"]].append(record)
    return cases


def by_name(records: list[dict], method: str) -> dict:
    return next(r for r in records if r["method"] == method)


def time_of(records: list[dict], method: str) -> float | None:
    """p50 in milliseconds, None for what is absent or failed."""
    return next((r["p50_ms"] for r in records if r["method"] == method and r["status"] == "ok"), None)


def fastest_peer(records: list[dict], run: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest verified method that is neither otkern, nor a candidate, nor a yardstick."""
    candidates = {entry.partition("=")[0] for entry in run["header"]["candidates"]}
    others = {*OURS, *YARDSTICKS, *AGAIN, *candidates}
    peers = [(r["method"], r["p50_ms"]) for r in records if r["status"] == "ok" and r["method"] not in others]
    return min(peers, key=lambda peer: peer[1], default=None)


def ours_of(records: list[dict]) -> tuple[str, float] | None:
    """The record that stands for otkern: one call where there is one for the case."""
    named = ((name, time_of(records, name)) for name in ("otkern", "otkern three solves", "with otkern"))
    return next(((name, time) for name, time in named if time is not None), None)


def ratios(records: list[dict], run: dict[str, Any]) -> dict[str, float]:
    """otkern's time over that of the fastest peer and of the yardsticks, in one interleaved run."""
    found, ours, peer = {}, ours_of(records), fastest_peer(records, run)
    if ours is None:
        return found
    if peer is not None:
        found[f"fastest peer ({peer[0]})"] = ours[1] / peer[1]
    for name in (PRODUCTS, COST, "bare op", "encoder alone"):
        if time := time_of(records, name):
            found[name] = ours[1] / time
    return found


def describe(settings: dict[str, Any]) -> str:
    hidden = ("model", "headline", "batch", "n", "m")
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key not in hidden)


def text(run: dict[str, Any]) -> str:
    """Every record, the failed and absent ones by name, and the ratios."""
    head = run["header"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items() if version)
    machine = head["machine"]
    lines = [
        f"{head['suite']} suite, {head['date']}, commit {head['commit']}, {head['threads']} threads",
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, load {head['load_before']} at the start",
        versions,
        "ceilings: " + ", ".join(f"{name} {rate:.3g}" for name, rate in run["ceilings"].items()),
    ]
    for name, records in cases_of(run).items():
        lines += ["", f"{name}: {describe(run['cases'][name])}"]
        title = f"{'':30}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'cold ms':>10}{'MiB':>8}{'iter':>6}{'error':>9}"
        lines.append(title + "  of the floor")
        lines += [row(record) for record in records]
        lines += [f"  otkern / {what}: {ratio:.2f}" for what, ratio in ratios(records, run).items()]
    return "\n".join(lines)


def row(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"{record['method']:30}{record['status']}: {record['reason']}"

    def cell(key: str, form: str, width: int) -> str:
        value = record.get(key)
        return f"{'' if value is None else format(float(value), form):>{width}}"

    times = "".join(cell(key, ".4g", 10) for key in ("p20_ms", "p50_ms", "p80_ms", "cold_ms"))
    line = f"{record['method']:30}{times}{cell('peak_mib', '.1f', 8)}{cell('iterations', '.0f', 6)}"
    line += cell("error", ".1e", 9)
    if "floor_ms" in record and record["method"] not in YARDSTICKS:
        line += f"  {record['p50_ms'] / record['floor_ms']:.1f} times"
    if "noise_floor" in record:
        line += f"  noise floor {100 * record['noise_floor']:.0f} %"
    return line


def columns(names: list[str]) -> str:
    return "| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1) + "\n"


def methods_table(run: dict[str, Any], keep: Callable[[dict], bool]) -> str:
    """Methods by cases: p50 in milliseconds, with otkern's ratios below."""
    cases = {name: records for name, records in cases_of(run).items() if keep(run["cases"][name])}
    if not cases:
        return NOTHING
    methods = list(dict.fromkeys(r["method"] for records in cases.values() for r in records))
    out = columns([name.replace("x", "×", 1).replace("x", "×") for name in cases])
    for method in methods:
        cells = []
        for records in cases.values():
            found = next((r for r in records if r["method"] == method), None)
            if found is None:
                cells.append("")
            else:
                cells.append(f"{found['p50_ms']:.3g}" if found["status"] == "ok" else found["status"])
        name = f"**{method}**" if method in OURS and method not in AGAIN else method
        out += f"| {name} | " + " | ".join(cells) + " |\n"
    for what, pick in (
        ("otkern / fastest peer", lambda found: next((v for k, v in found.items() if k.startswith("fastest")), None)),
        ("otkern / three products", lambda found: found.get(PRODUCTS)),
        ("otkern / cost and its backward", lambda found: found.get(COST)),
        ("otkern / bare op", lambda found: found.get("bare op")),
    ):
        values = [pick(ratios(records, run)) for records in cases.values()]
        if any(value is not None for value in values):
            out += f"| {what} | " + " | ".join("" if v is None else f"{v:.2f}" for v in values) + " |\n"
    return out + caption(run)


def caption(run: dict[str, Any]) -> str:
    head = run["header"]
    machine = head["machine"]
    noise = [r["noise_floor"] for r in run["records"] if "noise_floor" in r]
    wanted = ("torch", "POT", "geomloss", "ott-jax", "jaxlib", "flash-sinkhorn", "pykeops")
    versions = ", ".join(f"{name} {head['versions'][name]}" for name in wanted if head["versions"].get(name))
    out = f"\nMilliseconds, median of interleaved rounds; {machine['gpu'] or machine['processor']}, "
    out += f"threads: {head['threads']}, {head['date']}, commit {head['commit']}; {versions}."
    if noise:
        out += f" The same method twice differs by {100 * sorted(noise)[len(noise) // 2]:.0f} % (median of the cases)."
    return out + "\n"


def summary_table(run: dict[str, Any]) -> str:
    """One line a case: otkern, the fastest peer, their ratio, the floor of the machine and peak memory."""
    out = columns(["otkern, ms", "fastest peer, ms", "ratio", "times the floor", "MiB", "MiB, peer"])
    for name, records in cases_of(run).items():
        ours, peer = ours_of(records), fastest_peer(records, run)
        mine, theirs = ({"method": "none"} if found is None else by_name(records, found[0]) for found in (ours, peer))
        both = ours is not None and peer is not None
        cells = [
            "none" if ours is None else f"{ours[1]:.3g}",
            "none" if peer is None else f"{peer[1]:.3g} ({peer[0]})",
            f"{ours[1] / peer[1]:.2f}" if both else "",
            f"{mine['p50_ms'] / mine['floor_ms']:.1f}" if "floor_ms" in mine else "",
            *(f"{r['peak_mib']:.0f}" if r.get("peak_mib") is not None else "" for r in (mine, theirs)),
        ]
        out += f"| {name} | {' | '.join(cells)} |\n"
    return out + caption(run)


def absences(run: dict[str, Any]) -> str:
    """What is absent or failed, and why."""
    why: dict[tuple[str, str], list[str]] = {}
    for r in run["records"]:
        if r["status"] != "ok":
            why.setdefault((r["method"], f"{r['status']}: {r['reason']}"), []).append(r["case"])
    if not why:
        return "Every method ran in every case.\n"
    return "".join(f"* {method}, {reason} ({', '.join(cases)})\n" for (method, reason), cases in why.items())


BLOCKS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "cpu": ("cpu", lambda run: methods_table(run, lambda case: case.get("headline", False))),
    "cpu-tolerance": ("cpu", lambda run: methods_table(run, lambda case: "tol" in case)),
    "cpu-overhead": ("cpu", lambda run: methods_table(run, lambda case: case.get("kind") == "overhead")),
    "cpu-all": ("cpu", summary_table),
    "cpu-absences": ("cpu", absences),
    "training": ("training", lambda run: methods_table(run, lambda case: True)),
    "gpu": ("gpu", lambda run: methods_table(run, lambda case: case.get("headline", False))),
    "gpu-all": ("gpu", summary_table),
    "gpu-absences": ("gpu", absences),
}


def newest(suite: str, folder: Path) -> dict[str, Any] | None:
    """The newest committed run of a suite."""
    runs = [(run["header"]["date"], path.name, run) for path in folder.glob("*.json") for run in [read(path)]]
    runs = [entry for entry in runs if entry[2]["header"]["suite"] == suite]
    return max(runs, key=lambda entry: entry[:2])[2] if runs else None


def block(name: str, folder: Path) -> str:
    """The Markdown of one mark.

    Raises:
        ValueError: no table has this name.
    """
    if name not in BLOCKS:
        raise ValueError(f"there is no table {name!r}; known are {', '.join(BLOCKS)}")
    suite, make = BLOCKS[name]
    run = newest(suite, folder)
    return NOTHING if run is None else make(run)


def update(document: str, folder: Path) -> str:
    """The document with every marked table made anew."""
    return MARK.sub(lambda match: match[1] + "\n" + block(match["name"], folder) + "\n" + match[3], document)


def update_documents(write: bool, root: Path = ROOT) -> list[str]:
    """The documents whose tables are not those of the committed results, which are then written if asked for."""
    changed = []
    for name in DOCUMENTS:
        path = root / name
        before = path.read_text(encoding="utf-8")
        after = update(before, root / "benchmarks" / "results")
        if after != before:
            changed.append(name)
            if write:
                path.write_text(after, encoding="utf-8")
    return changed
