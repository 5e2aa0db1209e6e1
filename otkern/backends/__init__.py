"""The implementations behind the op, one module each: can_run, and a function for each op.

``choose`` picks one before the op is called, from nothing but names, so that traced code never looks at the machine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from otkern.backends import measured

# With the package and not with the first call: the module must notice a fork that comes before that.
with contextlib.suppress(ImportError):
    import otkern._native  # noqa: F401

# In order of preference where none is asked for; the first one only where it was measured to be the faster.
BACKENDS = ("cuda", "triton", "cpu", "reference")


def load(name: str) -> ModuleType:
    """The backend's module; Triton is imported here and not before."""
    return importlib.import_module(f"otkern.backends.{name}")


@functools.cache
def unavailable(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve tensors on ``device_type`` here, in one sentence; None if it can."""
    if name == "reference":
        return None
    if name == "cuda":
        return load("cuda").missing(device_type)
    if name == "cpu":
        if device_type != "cpu":
            return f"the cpu backend takes CPU tensors, not {device_type} tensors"
        return load("cpu").missing()
    if name == "triton":
        return _triton_unavailable(device_type)
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, but was {name!r}")


def choose(
    name: str | None,
    device_type: str,
    update: str = "alternating",
    overrelaxation: float = 1.0,
    grad: str = "envelope",
    size: measured.Size | None = None,
) -> str:
    """The backend for a call: the named one, or the fastest that can run on this device and serves these options.

    ``size`` is what the table of measurements is asked with; None: as if nothing had been measured.

    Raises:
        ValueError: the named backend cannot run here; it never falls back to another one.
    """
    served_by_reference = _only_reference(update, overrelaxation, grad)
    if name is not None:
        if not isinstance(name, str):
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, but was {name!r}")
        reason = unavailable(name, device_type)
        if reason is None and name != "reference":
            reason = served_by_reference
        if reason is not None:
            raise ValueError(f"backend must be one that can run here, but {name!r} cannot: {reason}")
        return name
    if served_by_reference is not None:
        return "reference"
    if device_type == "cpu":
        # The interpreter makes Triton possible on CPU tensors, never fast.
        return "reference" if unavailable("cpu", "cpu") else "cpu"
    passed_over = ("cuda",) if _cuda_is_slower(size) else ()
    return next(name for name in BACKENDS if name not in passed_over and unavailable(name, device_type) is None)


def size_of(device: torch.device, dtype: torch.dtype, longest: int) -> measured.Size | None:
    """What `choose` asks the table with; None, without a look at the size, where no table could say anything.

    An exported program is for every size, and none may decide.
    """
    if device.type != "cuda" or not measured.TABLE or torch.compiler.is_exporting():
        return None
    bracket = measured.bracket_of(longest)
    return None if bracket is None else (device.index or 0, str(dtype).removeprefix("torch."), bracket)


def _cuda_is_slower(size: measured.Size | None) -> str | None:
    """Why Triton is preferred to CUDA on a GPU, in words; None: it is not."""
    if size is None or not torch.cuda.is_available():
        return measured.UNKNOWN
    device, dtype, bracket = size
    reason = measured.slower(torch.cuda.get_device_capability(device), dtype, bracket)
    if reason is None and unavailable("cuda", "cuda") is None and not load("cuda").holds(device, dtype, bracket):
        return f"problems of up to {bracket} points a side do not fit into the clusters of this device"
    return reason


def holds_float64(name: str, device: torch.device, longest: int) -> bool:
    """Whether this backend solves problems of so many points a side in float64, too."""
    if name != "cuda":
        return True
    bracket = None if torch.compiler.is_exporting() else measured.bracket_of(longest)
    return bracket is not None and _cuda_holds_float64(device.type, device.index or 0, bracket)


def _cuda_holds_float64(device_type: str, device: int, longest: int) -> bool:
    return load("cuda").holds(device, "float64", longest, device_type)


def launches(name: str) -> bool:
    """Whether a call of this backend costs a launch, so that one call is better than several."""
    return name in ("cuda", "triton")


def refusals(
    device_type: str, update: str, overrelaxation: float, grad: str, size: measured.Size | None = None
) -> list[tuple[str, str]]:
    """The backends that `choose` passes over before it finds one, and why."""
    chosen = choose(None, device_type, update, overrelaxation, grad, size)
    served_by_reference = _only_reference(update, overrelaxation, grad)
    passed_over = []
    for name in BACKENDS:
        if name == chosen:
            return passed_over
        reason = unavailable(name, device_type) or served_by_reference
        if reason is None and name == "cuda":
            reason = _cuda_is_slower(size)
        if reason is not None:
            passed_over.append((name, reason))
    return passed_over


def _only_reference(update: str, overrelaxation: float, grad: str) -> str | None:
    """Why only the reference serves these options, in one sentence; None: every backend does."""
    if grad == "unrolled":
        return 'the history of iterations, for grad="unrolled", is kept by the reference backend only'
    if update == "symmetric":
        return "symmetric updates are done by the reference backend only"
    if overrelaxation != 1:
        return "over-relaxation is done by the reference backend only"
    return None


# A compiled graph takes the answer as a constant. This is the mark that torch.compiler.assume_constant_result sets;
# the decorator itself would import the compiler, which costs more than all of this package.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cuda_holds_float64._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_unavailable(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return None
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before the first import"
    return f"the triton backend takes CUDA tensors, not {device_type} tensors"
