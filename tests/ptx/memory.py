"""Global and shared memory: each access lies inside what was passed and is aligned, or is a fault."""

from __future__ import annotations

import ctypes

import numpy as np

SHARED_BASE = 0x400  # not zero, so that a missing base address shows


class Fault(Exception):
    """What hardware leaves undefined or refuses, with the instruction that did it."""


class Region:
    """Bytes from ``base`` on."""

    def __init__(self, base: int, data: np.ndarray):
        self.base, self.data = base, data


def extent(tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to its last one's end, in the order of memory."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (count if tensor.numel() else 0) * tensor.element_size()


def global_memory(tensors) -> list[Region]:
    """The tensors' extents; overlapping ones become one region."""
    merged: list[list[int]] = []
    for start, end in sorted({extent(tensor) for tensor in tensors if tensor.numel()}):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return [
        Region(start, np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8))
        for start, end in merged
    ]


def shared_memory(size: int) -> list[Region]:
    """Filled with ones: NaN in every floating-point format."""
    return [Region(SHARED_BASE, np.full(size, 255, np.uint8))]


class Memory:
    """One state space. Addresses are arrays, one for each lane that takes part."""

    def __init__(self, name: str, regions: list[Region]):
        self.name, self.regions = name, regions

    def _places(self, addresses: np.ndarray, size: int, instruction):
        """(region, lanes, byte indices) of every region that is met."""
        if (addresses % np.uint64(size)).any():
            bad = int(addresses[np.flatnonzero(addresses % np.uint64(size))[0]])
            raise Fault(f"{self.name} address {bad:#x} is not a multiple of {size}: {instruction}")
        left = np.ones(len(addresses), bool)
        places = []
        for region in self.regions:
            low, high = np.uint64(region.base), np.uint64(region.base + len(region.data))
            inside = (addresses >= low) & (addresses + np.uint64(size) <= high)
            if inside.any():
                start = (addresses[inside] - low).astype(np.int64)
                places.append((region, np.flatnonzero(inside), start[:, None] + np.arange(size)))
                left &= ~inside
        if left.any():
            bad = int(addresses[np.flatnonzero(left)[0]])
            known = ", ".join(f"[{r.base:#x}, {r.base + len(r.data):#x})" for r in self.regions)
            raise Fault(f"{self.name} address {bad:#x}, {size} bytes, is outside of {known}: {instruction}")
        return places

    def load(self, addresses: np.ndarray, size: int, instruction) -> np.ndarray:
        """(lanes, size) bytes."""
        out = np.empty((len(addresses), size), np.uint8)
        for region, lanes, at in self._places(addresses, size, instruction):
            out[lanes] = region.data[at]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, instruction) -> None:
        for region, lanes, at in self._places(addresses, values.shape[1], instruction):
            region.data[at] = values[lanes]
