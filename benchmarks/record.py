"""The JSON file of a run: one header, the model of each case, one record for each case and method."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("otkern", "torch", "triton", "numpy", "POT", "geomloss", "pykeops", "jax", "jaxlib", "ott-jax")
PACKAGES += ("flash-sinkhorn",)
# What a continued run must have in common with its beginning.
IDENTITY = ("suite", "commit", "source", "machine", "threads", "seconds", "candidates", "versions")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the tree, with "+" if files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "otkern", "csrc", "benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def source_hash() -> str:
    """A digest of what is measured and what measures, also where there is no repository."""
    digest = hashlib.sha256()
    patterns = ("otkern/**/*.py", "otkern/*.so", "csrc/**/*", "benchmarks/**/*.py")
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def header(suite: str, threads: int, seconds: float, candidates: list[str], device: str) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers."""
    return {
        "format": 1,
        "suite": suite,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "source": source_hash(),
        "machine": {
            "processor": processor(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "capability": list(torch.cuda.get_device_capability()) if device == "cuda" else None,
        "threads": threads,
        "seconds": seconds,
        "candidates": candidates,
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES},
        "load_before": round(os.getloadavg()[0], 2),
    }


def rounded(value: Any) -> Any:
    """Numbers to four digits, which is more than a timing has; infinities and NaN as text."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value


def write(path: Path, run: dict[str, Any]) -> None:
    """Writes the run whole or not at all; one line for each case and record, so that differences can be read."""
    lines = [f' "{key}": {json.dumps(rounded(run[key]))}' for key in ("header", "ceilings")]
    cases = [f"  {json.dumps(name)}: {json.dumps(rounded(case))}" for name, case in run["cases"].items()]
    records = [f"  {json.dumps(rounded(record))}" for record in run["records"]]
    lines.append(' "cases": {\n' + ",\n".join(cases) + "\n }")
    lines.append(' "records": [\n' + ",\n".join(records) + "\n ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    run = json.loads(Path(path).read_text(encoding="utf-8"))
    if run.get("header", {}).get("format") != 1:
        raise ValueError(f"{path} is not a file of python -m benchmarks run")
    return run


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each setting in which two headers differ and which a continued run must share."""
    return [
        f"{key}: {old.get(key)} in the file, {new.get(key)} now" for key in IDENTITY if old.get(key) != new.get(key)
    ]


def find(run: dict[str, Any], case: str, method: str) -> dict[str, Any] | None:
    return next((r for r in run["records"] if r["case"] == case and r["method"] == method), None)
