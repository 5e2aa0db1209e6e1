"""What ``import otkern`` may cost: no other heavy package, no GPU, no time to speak of."""

import json
import subprocess
import sys

import pytest

HEAVY = ("triton", "transformers", "datasets", "accelerate", "matplotlib", "scipy", "ot", "geomloss", "training")


def run_python(code: str) -> str:
    """Standard output of ``code`` in a fresh interpreter that imports otkern from where this one does."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def after_import() -> dict:
    code = """
import json, sys, torch
before = set(sys.modules)
import otkern
print(json.dumps({"new": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized()}))
"""
    return json.loads(run_python(code))


@pytest.mark.parametrize("package", HEAVY)
def test_import_brings_no_heavy_package(after_import, package):
    brought = [name for name in after_import["new"] if name.split(".")[0] == package]
    assert brought == []


def test_import_does_not_initialise_cuda(after_import):
    assert after_import["cuda"] is False


def test_import_asks_no_cuda_question():
    # A query such as torch.cuda.is_available() already loads the driver on a machine that has one.
    code = """
import torch
def refuse(*args, **kwargs):
    raise AssertionError("import otkern queried CUDA")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "init"):
    setattr(torch.cuda, name, refuse)
import otkern
"""
    run_python(code)


def test_import_takes_under_a_fifth_of_a_second_beyond_torch():
    # Processor time, and the least of three, so that what else runs on the machine does not decide the test.
    code = """
import time, torch
start = time.process_time()
import otkern
print(time.process_time() - start)
"""
    assert min(float(run_python(code)) for _ in range(3)) < 0.2
