"""Opens the Triton backend to CPU tensors for these tests alone, and runs what it launches."""

import functools

import numpy as np
import pytest
import triton

from otkern import backends

from .driver import Driver
from .machine import program_of, run_grid
from .parse import parse


@functools.cache
def _compiled(ptx: str):
    entry = parse(ptx)
    return entry, program_of(entry)


def executor(order: np.random.Generator | None = None):
    """Runs each launch; ``order``: warps are units of their own, in random order."""

    def execute(kernel, metadata, grid, parameters, tensors):
        entry, program = _compiled(kernel)
        run_grid(entry, program, grid, parameters, tensors, 32 * metadata.num_warps, metadata.shared, order)

    return execute


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def device(request, monkeypatch):
    """The driver object for one target; ``launches`` lists the kernels that ran."""
    driver = Driver(request.param, executor())
    active = triton.runtime.driver
    before = active._active
    module = backends.load("triton")
    refuses = module.can_run

    def can_run(*args, **kwargs):
        reason = refuses(*args, **kwargs)
        return None if reason is not None and "TRITON_INTERPRET" in reason else reason

    monkeypatch.setattr(module, "can_run", can_run)
    monkeypatch.setattr(backends, "_triton_unavailable", lambda device_type: None)
    backends.unavailable.cache_clear()
    hook = triton.knobs.runtime.kernel_load_start_hook
    hook.add(driver.utils.loading)
    active.set_active(driver)
    yield driver
    hook.remove(driver.utils.loading)
    active._active = before
    backends.unavailable.cache_clear()
