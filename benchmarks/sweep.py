"""Goes through a suite: each case in a process of its own, each finished case written to the file at once."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import record
from benchmarks.cases import Case
from benchmarks.methods import OURS

POLL = 0.05  # seconds between two looks at a worker
START = 180.0  # seconds that a worker may take to begin


class Refused(Exception):
    """The file holds another run."""


@dataclasses.dataclass
class Settings:
    """How a suite is run.

    Attributes:
        seconds: spent on the samples of a case, about; the first calls and checks come on top.
        limit: seconds that one step of one method may take (a first call, a check, a sample).
        threads: CPU threads, and cores, of everybody.
        candidates: further methods by name, "module:Class".
        minutes: no further case begins after so long; the same command continues. None: all of them.
    """

    suite: str
    path: Path
    device: str
    threads: int
    seconds: float = 6.0
    limit: float = 180.0
    only: str | None = None
    candidates: dict[str, str] = dataclasses.field(default_factory=dict)
    minutes: float | None = None
    restart: bool = False


def chosen(cases: list[Case], only: str | None) -> list[Case]:
    """The cases whose name contains ``only`` or matches it as a shell pattern."""
    if only is None:
        return cases
    return [case for case in cases if only in case.name or fnmatch.fnmatch(case.name, only)]


def begin(settings: Settings) -> dict[str, Any]:
    """The run of the file to continue, or a new one.

    Raises:
        Refused: the file holds a run of other code or settings.
    """
    candidates = [f"{name}={path}" for name, path in settings.candidates.items()]
    head = record.header(settings.suite, settings.threads, settings.seconds, candidates, settings.device)
    if settings.path.exists() and not settings.restart:
        run = record.read(settings.path)
        if differ := record.differences(run["header"], head):
            raise Refused(
                f"{settings.path} holds another run and cannot be continued: {'; '.join(differ)}. "
                "Give another file, or --restart to measure everything anew."
            )
        return run
    return {"header": head, "ceilings": {}, "cases": {}, "records": []}


def run(settings: Settings, cases: list[Case]) -> dict[str, Any]:
    """Measures what the file does not hold yet; returns all of it."""
    result = begin(settings)
    started = time.monotonic()
    if not result["ceilings"]:
        order = {"ceilings": settings.device, "threads": settings.threads, "seconds": settings.seconds}
        events, reason = call_worker(order, settings)
        result["ceilings"] = next((e["ceilings"] for e in events if "ceilings" in e), {"failed": reason})
        record.write(settings.path, result)
    left = [case for case in chosen(cases, settings.only) if case.name not in result["cases"]]
    with tqdm(left, unit="case", dynamic_ncols=True) as bar:
        for done, case in enumerate(bar):
            if settings.minutes is not None and time.monotonic() - started > 60 * settings.minutes:
                bar.write(f"time is up, {len(left) - done} cases are left: the same command continues")
                break
            bar.set_description(case.name)
            case = dataclasses.replace(case, methods=(*case.methods, *settings.candidates))
            work, records = measure(
                case, result["ceilings"], settings, lambda text: bar.set_postfix_str(text, bar.fp.isatty())
            )
            result["cases"][case.name] = case.settings() | {"headline": case.headline, "model": work}
            result["records"] += records
            record.write(settings.path, result)
    return result


def measure(case: Case, rates: dict, settings: Settings, show) -> tuple[dict, list[dict]]:
    """The model and the records of one case: once more without a method that took the process down with it."""
    fields = dataclasses.asdict(case)
    if "failed" in rates:
        rates = {}
    lost: dict[str, dict] = {}
    while True:
        order = {"case": fields, "rates": rates, "skip": list(lost), "seconds": settings.seconds}
        order |= {"threads": settings.threads, "candidates": settings.candidates}
        events, reason = call_worker(order, settings, show)
        records = {e["record"]["method"]: e["record"] for e in events if "record" in e}
        # A process that crashes while it ends has measured all the same.
        if reason is None or len(records) == len(case.methods) - len(lost):
            break
        begun = [e for e in events if "begin" in e]
        names = [begun[-1]["method"]] if begun else [name for name in case.methods if name not in lost]
        where = f" during its {begun[-1]['begin']}" if begun else " before its first call"
        lost |= {n: {"case": case.name, "method": n, "status": "failed", "reason": reason + where} for n in names}
        records = {}
        if len(lost) == len(case.methods):
            break
    work = next((e["work"] for e in events if "work" in e), {})
    records |= lost
    return work, [records[name] for name in case.methods]


def call_worker(order: dict, settings: Settings, show=lambda text: None) -> tuple[list[dict], str | None]:
    """The events of a worker, and why it ended too early, if it did."""
    with tempfile.TemporaryDirectory(prefix="otkern-benchmarks-") as folder:
        order_file, events_file, errors = (Path(folder) / name for name in ("order.json", "events", "errors"))
        order_file.write_text(json.dumps(order), encoding="utf-8")
        events_file.touch()
        environment = dict(os.environ, OMP_NUM_THREADS=str(settings.threads), MKL_NUM_THREADS=str(settings.threads))
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        with errors.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(order_file), str(events_file)],
                cwd=record.ROOT, env=environment, stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip
            try:
                reason = wait(process, events_file, settings.limit, show)
            finally:
                if process.poll() is None:
                    stop(process)
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        events = [json.loads(line) for line in events_file.read_text(encoding="utf-8").splitlines()]
        if reason is not None and lines and "signal" not in reason and "limit" not in reason:
            reason += f": {lines[-1][:200]}"
        return events, reason


def wait(process: subprocess.Popen, events_file: Path, limit: float, show) -> str | None:
    """Waits for a worker; None if it ended well, else what happened. The limit begins anew with each event."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(POLL)
        now = events_file.stat().st_size
        if now != size:
            size, since = now, time.monotonic()
            show(last_step(events_file))
        # Before the first event the process imports torch, which says nothing about a method.
        if time.monotonic() - since > (limit if size > 0 else max(limit, START)):
            stop(process)
            return f"stopped at its limit of {limit:g} s"
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        return f"ended by signal {name}{memory}"
    return f"ended with status {process.returncode}"


def last_step(events_file: Path) -> str:
    """What the worker is at, for the progress bar."""
    lines = events_file.read_text(encoding="utf-8").splitlines()
    begun = [line for line in lines if line.startswith('{"begin"') and line.endswith("}")]
    return "{method}, {begin}".format(**json.loads(begun[-1])) if begun else ""


def stop(process: subprocess.Popen) -> None:
    """Ends a worker with what it started, such as compilers: it is the leader of their session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wrong(result: dict[str, Any]) -> list[str]:
    """One line for each record of otkern or of a candidate that failed."""
    judged = {*OURS, *(name.partition("=")[0] for name in result["header"]["candidates"])}
    failed = [r for r in result["records"] if r["status"] == "failed" and r["method"] in judged]
    return [f"{r['case']}, {r['method']}: {r['reason']}" for r in failed]
