"""The CUDA half as it was built: code for every target, registers, no spills, and what a launch says without a driver.

The numbers are read from the module itself, the code that ships. `cuobjdump` comes with CUDA and with Triton.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from otkern.backends import cuda

from .test_native import make_inputs

missing = cuda.missing("cuda")
needs_cuda_half = pytest.mark.skipif(missing is not None, reason=str(missing))

TARGETS = ("sm_80", "sm_90a", "sm_100")
KERNELS = (
    "sinkhorn_forward_kernel",
    "symmetric_kernel",
    "implicit_kernel",
    "plan_backward_kernel",
    "plan_apply_kernel",
    "sum_terms_kernel",
)
THREADS = 256  # of a block; a multiprocessor has 64 Ki registers
STATIC_SHARED = 1024  # bytes that the system takes of a block, no more: ours are dynamic


def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    if (spec := importlib.util.find_spec("triton")) is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.is_file() else None


def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(target, kernel<type>) -> registers and bytes, of the module that is imported."""
    from otkern import _native

    command = [cuobjdump(), "--dump-resource-usage", _native.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, target = {}, None
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            target = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            kernel = re.search(r"|".join(KERNELS), match.group(1)).group()
            wide = "double" if re.search(kernel + "Id", match.group(1)) else "float"
            name = f"{kernel}<{wide}>"
        elif "REG:" in line and target is not None:
            found[target, name] = {
                key: int(number) for key, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            }
    return found


@needs_cuda_half
@pytest.mark.skipif(cuobjdump() is None, reason="neither CUDA nor Triton has a cuobjdump here")
def test_every_kernel_has_code_for_every_target_without_a_spill():
    found = resources()
    wanted = {(target, f"{kernel}<{kind}>") for target in TARGETS for kernel in KERNELS for kind in ("float", "double")}
    assert wanted <= set(found)
    for key, used in found.items():
        assert used["REG"] <= 65536 // THREADS, (key, used)
        # Spilled registers, and arrays that could not stay in registers, would be here.
        assert used["STACK"] == 0 and used["LOCAL"] == 0, (key, used)
        assert used["SHARED"] <= STATIC_SHARED, (key, used)


# Pieces of 16 bytes, or bulk copies and their barrier.
COPIES = {"sm_80": {"LDGSTS"}, "sm_90a": {"UBLKCP", "SYNCS"}, "sm_100": {"UBLKCP", "SYNCS"}}


@needs_cuda_half
@pytest.mark.skipif(cuobjdump() is None, reason="neither CUDA nor Triton has a cuobjdump here")
@pytest.mark.parametrize("target", TARGETS)
def test_copies_are_asynchronous_and_products_are_made_in_matrix_units(target):
    from otkern import _native

    tools = {"PATH": os.pathsep.join([str(Path(cuobjdump()).parent), os.environ["PATH"]])}  # it calls nvdisasm
    command = [cuobjdump(), "-sass", "-arch", target, _native.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | tools).stdout
    used = set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z0-9_.]+)", text, re.MULTILINE))
    assert {name.split(".")[0] for name in used} >= COPIES[target] | {"LDSM"}
    assert {"HMMA.16816.F32", "HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"} <= used
    # Address spaces are known: nothing is loaded or stored in local memory.
    assert not {"LDL", "STL"} & {name.split(".")[0] for name in used}


@needs_cuda_half
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_a_launch_without_a_driver_raises_and_names_the_kernel(monkeypatch):
    from otkern import _native

    monkeypatch.setattr(cuda, "_limits", lambda device: (227 << 10, 16))
    monkeypatch.setattr(cuda, "_module", lambda device: _native)
    inputs = make_inputs("cosine", torch.float32, (5, 3), (4, 4))
    with pytest.raises(
        RuntimeError, match=r"launch of sinkhorn_forward_kernel<float> \(2 blocks.*threads.*bytes.*failed"
    ):
        cuda.forward(inputs, None, 3, -1.0)
    f = torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match="launch of plan_apply_kernel<float>"):
        cuda.plan(inputs, f, torch.zeros(2, 4))


@needs_cuda_half
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_asking_a_device_that_is_not_there_raises():
    from otkern import _native

    with pytest.raises(RuntimeError, match=r"device 0 .*failed"):
        _native.cuda_limits(0)
