"""What is installed here and which backends can run: ``python -m otkern.env``, with ``--json`` for programs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import otkern
from otkern.backends import BACKENDS, load, unavailable


def report() -> dict[str, Any]:
    """Describe this machine as plain data.

    Returns:
        A dictionary that ``json.dumps`` takes: ``versions``, ``native``, ``cpu``, ``devices``, ``nvcc`` and
        ``backends``. ``backends[name][device_type]`` is None where that backend can serve tensors of that device
        type here, else the reason in one sentence; only device types that this machine has are listed.

    Example:
        >>> report()["backends"]["reference"]["cpu"] is None
        True
    """
    devices = _cuda_devices()
    device_types = ("cpu", "cuda") if devices else ("cpu",)
    return {
        "versions": {
            "otkern": otkern.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _version("triton"),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "native": _native(),
        "cpu": {
            "name": _cpu_name(),
            "simd": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "devices": devices,
        "nvcc": _nvcc(),
        "backends": {name: {kind: unavailable(name, kind) for kind in device_types} for name in BACKENDS},
    }


def describe(found: dict[str, Any]) -> str:
    """The report as text for a person, one fact a line."""
    versions, native, cpu = found["versions"], found["native"], found["cpu"]
    cuda = f", built for CUDA {versions['torch_cuda']}" if versions["torch_cuda"] else ", built without CUDA"
    lines = [
        ("otkern", versions["otkern"]),
        ("Python", f"{versions['python']} on {versions['system']}"),
        ("torch", versions["torch"] + cuda),
        ("Triton", versions["triton"] or "not installed"),
        ("native", native["missing"] or f"{native['level']} in use, {_pairs(native['build'])}, {native['path']}"),
        ("CPU", f"{cpu['name']}, {cpu['simd']} in torch, {cpu['threads']} threads"),
        ("nvcc", f"{found['nvcc']['release']} at {found['nvcc']['path']}" if found["nvcc"] else "not found"),
    ]
    for index, device in enumerate(found["devices"]):
        lines.append((f"cuda:{index}", f"{device['name']}, sm_{device['capability']}, {device['memory_gib']} GiB"))
    if not found["devices"]:
        lines.append(("CUDA", "no device that torch can use"))
    lines.append(("", ""))
    for name, reasons in found["backends"].items():
        for kind, reason in reasons.items():
            lines.append((name, f"{kind} tensors: {'no, ' + reason if reason else 'yes'}"))
    return "\n".join(f"{label:11}{text}".rstrip() for label, text in lines)


def _pairs(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {fact}" for name, fact in facts.items())


def _version(package: str) -> str | None:
    """An installed package's version from its metadata, so that nothing is imported for it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    """Why the native module is missing, or where it is, its SIMD level in use and what it says of its build."""
    missing = load("cpu").missing()
    if missing is not None:
        return {"missing": missing}
    from otkern import _native as module

    return {"missing": None, "path": module.__file__, "level": module.cpu_level(), "build": module.build_info()}


def _cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def _cuda_devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return devices


def _nvcc() -> dict[str, str] | None:
    """The CUDA compiler that a build would use; no GPU is needed to have one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", text)
    return {"path": path, "release": found.group(1) if found else "unknown"}


def main(arguments: list[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m otkern.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    as_json = parser.parse_args(arguments).json
    found = report()
    print(json.dumps(found, indent=2) if as_json else describe(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
