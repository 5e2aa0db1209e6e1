"""What every test shares: the backends to run over, determinism, and the count of cases that ran on each backend."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

# Read when a kernel is decorated, so set before anything imports Triton; and when a backend is first asked for.
# Not where tests/ptx runs the compiled kernels: that is a call of pytest of its own.
if not torch.cuda.is_available() and os.environ.get("OTKERN_TEST_PTX") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OTKERN_CUDA_EXECUTOR", "host")

from torch.overrides import TorchFunctionMode

from otkern import backends, convergence

# Every uninitialised tensor is then filled with NaN: reading one shows. On a GPU cuBLAS asks for the variable.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.use_deterministic_algorithms(True)

# Timings decide nothing, and a run must not depend on what an earlier one left behind.
hypothesis.settings.register_profile("otkern", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("otkern")

PTX = os.environ.get("OTKERN_TEST_PTX") == "1"
collect_ignore = [] if PTX else ["ptx"]
BACKENDS = ("reference", "cpu", "triton", "cuda")
CASES_FILE = Path(__file__).parent.parent / ".cache" / "backend_cases.json"

_cases = Counter()


@pytest.fixture(autouse=True)
def _forget_warnings():
    """Not converging warns once per call site, and a parametrised test is one call site."""
    convergence.WARNED_AT.clear()


_PACKAGE = os.path.dirname(os.path.abspath(convergence.__file__)) + os.sep
_FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange as_tensor empty empty_strided eye full linspace logspace ones rand randint randn randperm range "
        "scalar_tensor tensor tril_indices triu_indices zeros"
    ).split()
}


class _DeviceIsNamed(TorchFunctionMode):
    """Fails where otkern makes a tensor on whatever device is torch's default: that need not be the inputs'."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _FACTORIES and "device" not in kwargs:
            caller = sys._getframe(1)
            assert not caller.f_code.co_filename.startswith(_PACKAGE), (
                f"{caller.f_code.co_filename}:{caller.f_lineno} calls torch.{function.__name__} without device="
            )
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def _devices_are_named(request):
    """Not where graphs are traced: the tracer would trace the mode as well."""
    if any(word in request.node.name for word in ("compile", "graph", "trace", "export")):
        yield
        return
    with _DeviceIsNamed():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """The name of each backend that can run here, one after the other."""
    name = request.param
    if (reason := backends.unavailable(name, device_of(name))) is not None:
        pytest.skip(f"backend {name}: {reason}")
    request.node.user_properties.append(("backend", name))
    return name


@pytest.fixture
def device(backend) -> str:
    """Where this backend's tensors live: a GPU for Triton and CUDA where there is one, else the CPU."""
    return device_of(backend)


@pytest.fixture
def interpreted(backend) -> bool:
    """Whether each launch runs in Triton's interpreter, thousands of times slower than the kernel."""
    return backend == "triton" and device_of(backend) == "cpu"


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def pytest_runtest_logreport(report):
    # The controller of a parallel run sees the reports of all its workers, and user_properties travel with them.
    if report.when == "call" and report.outcome != "skipped":
        _cases.update(value for name, value in report.user_properties if name == "backend")


def pytest_sessionfinish(session):
    if PTX or hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    CASES_FILE.parent.mkdir(exist_ok=True)
    CASES_FILE.write_text(json.dumps({name: _cases[name] for name in BACKENDS}, indent=2) + "\n")
