"""A driver object for Triton that runs a compiled kernel's PTX on CPU tensors, by Triton's own launch path.

Triton specialises, compiles, caches and orders the arguments as for a GPU; this replaces only the CUDA driver.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
_SCALARS = {
    "i1": "<b", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q",
    "fp32": "<f", "fp64": "<d",
}  # fmt: skip


class Utils:
    """What Triton asks of the CUDA driver before a launch."""

    def __init__(self, arch: int):
        self.arch = arch
        self.ptx = ""

    def loading(self, module, function, name, metadata_group, key):
        """Triton's hook before a load: the only place that names the files of a compiled kernel."""
        path = next(path for file, path in metadata_group.items() if file.endswith(".ptx"))
        self.ptx = Path(path).read_text()

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES[self.arch], "multiprocessor_count": 108, "max_num_regs": 65536,
                "warpSize": 32, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}  # fmt: skip

    def load_binary(self, name, kernel, shared, device):
        # The second item is the handle that a launch is given: here the text itself.
        return 1, self.ptx, 0, 0, 1024

    def unload_module(self, module):
        pass


class Driver:
    """Set with ``triton.runtime.driver.set_active``; ``execute`` runs each launch.

    A device's number is its target, since Triton caches kernels by device.
    """

    def __init__(self, arch: int, execute):
        self.arch = arch
        self.utils = Utils(arch)
        self.execute = execute
        self.launches: list[str] = []

    def launcher_cls(self, src, metadata):
        return Launcher(src, metadata)

    def get_current_device(self):
        return self.arch

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.arch, 10)

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty


class Launcher:
    """Packs the parameters of one compiled kernel as its signature says, each at its natural alignment."""

    def __init__(self, src, metadata):
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError(
                f"{metadata.name} wants global scratch memory or clusters, which are not simulated"
            )
        self.metadata = metadata
        self.types = list(src.signature.values())

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        block, tensors = bytearray(), []
        for kind, value in zip(self.types, args, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                address = 0
                if value is not None:
                    address = value.data_ptr()
                    tensors.append(value)
                item = struct.pack("<Q", address)
            else:
                item = struct.pack(_SCALARS[kind], value)
            block.extend(b"\0" * (-len(block) % len(item)))
            block.extend(item)
        block.extend(b"\0" * (-len(block) % 8))
        block.extend(struct.pack("<QQ", 0, 0))  # the addresses of global and profile scratch, which no kernel here has
        driver = triton.runtime.driver.active  # not the one that was active when the kernel was loaded
        driver.launches.append(self.metadata.name)
        driver.execute(function, self.metadata, (x, y, z), bytes(block), tensors)
