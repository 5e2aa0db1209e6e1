"""Measures one case in a process of its own: ``python -m benchmarks.worker ORDER EVENTS``, called by ``sweep``.

ORDER is a JSON file with the case; EVENTS gets one JSON line before each step that may fail, and one for each finished
record: the caller knows what was running when the process died, and runs the case once more without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings
from benchmarks.cases import Case
from benchmarks.methods import AGAIN, YARDSTICKS, Absent, Method, find, make
from benchmarks.model import shares, work_of
from benchmarks.problems import checked_items, make_clouds
from benchmarks.timing import Rounds, caller, peak_memory, synchronize
from benchmarks.verify import Failed, Verifier


class Measurement:
    """One case and the methods that are left in it."""

    def __init__(self, case: Case, order: dict[str, Any], events: Path):
        self.case, self.events = case, events
        self.rates, self.seconds, self.candidates = order["rates"], order["seconds"], order["candidates"]
        self.clouds = make_clouds(case)
        self.verifier = Verifier(case, self.clouds, checked_items(case))
        self.names = [name for name in case.methods if name not in order["skip"]]
        self.methods: dict[str, Method] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def tell(self, **event) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def run(self) -> None:
        for name in self.names:
            self.records[name] = {"case": self.case.name, "method": name, "status": "ok"}
            with self.step(name, "first call"):
                self.prepare(name)
        for name in list(self.methods):
            with self.step(name, "memory"):
                self.records[name]["peak_mib"] = peak_memory(self.methods[name], self.case)
        self.time()
        work = work_of(self.case, self.clouds)
        for name, method in self.methods.items():
            record = self.records[name]
            record |= shares(work, self.case, record["p50_ms"] / 1e3, method.iterations_done(), self.rates)
        for name, other in AGAIN.items():
            if name in self.methods and other in self.methods:
                pair = self.records[name]["p50_ms"], self.records[other]["p50_ms"]
                self.records[name]["noise_floor"] = max(pair) / min(pair) - 1
        items = len(self.verifier.items)
        self.tell(work=work | {"checked_items": items, "allowed_error": self.verifier.allowed})
        for record in self.records.values():
            self.tell(record=record)

    @contextlib.contextmanager
    def step(self, name: str, what: str):
        """Announces a step of a method; what goes wrong in it becomes the method's record."""
        self.tell(begin=what, method=name)
        record, status = self.records[name], "failed"
        try:
            yield
            return
        except Absent as reason:
            status, text = "absent", str(reason)
        except Failed as reason:
            text = str(reason)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        record |= {"status": status, "reason": text[:300]}
        # A method that is wrong or broken has no times.
        for key in [key for key in record if key.endswith("_ms")]:
            del record[key]
        self.methods.pop(name, None)

    def prepare(self, name: str) -> None:
        """Builds the method, calls it once for the cold time, and checks that very shape against fp64."""
        found = find(name, self.candidates)  # without the time that its package takes to import
        start = time.perf_counter()
        method = make(found, self.case, self.clouds)
        answer = caller(method, self.case)()
        synchronize(self.case)
        if name not in AGAIN:
            self.records[name]["cold_ms"] = 1e3 * (time.perf_counter() - start)
        self.records[name]["setting"] = method.setting
        if name not in YARDSTICKS:
            self.tell(begin="check", method=name)
            self.records[name] |= self.verifier.check(method, answer)
            self.records[name]["setting"] = method.setting
        self.methods[name] = method

    def time(self) -> None:
        rounds = Rounds(self.methods, self.case, self.seconds)
        for name in list(self.methods):
            with self.step(name, "warm call"):
                rounds.plan(name)
        for name in rounds.run():
            if name in self.methods:
                with self.step(name, "timing"):
                    rounds.add(name)
        for name in self.methods:
            self.records[name] |= rounds.result(name)


def limit_to(cores: int) -> None:
    """All libraries see so many cores and use as many threads; JAX takes its number from the affinity."""
    torch.set_num_threads(cores)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with contextlib.suppress(AttributeError, OSError):
        # If the caller is killed, so is this process; if memory runs out, this process goes first.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(order_file: str, events_file: str) -> None:
    order, events = json.loads(Path(order_file).read_text(encoding="utf-8")), Path(events_file)
    limit_to(order["threads"])
    if "ceilings" in order:
        rates = ceilings.measure(order["ceilings"], order["seconds"] / 10)
        events.write_text(json.dumps({"ceilings": rates}) + "\n", encoding="utf-8")
        return
    fields = order["case"]
    case = Case(**fields | {"methods": tuple(fields["methods"]), "encoder": tuple(fields["encoder"])})
    Measurement(case, order, events).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
