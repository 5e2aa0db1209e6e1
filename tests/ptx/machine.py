"""Executes one entry: lanes in lockstep, diverged ones lowest program counter first, barriers between units."""

from __future__ import annotations

import re

import numpy as np

from .instructions import BITS, build
from .memory import Fault, Memory, global_memory, shared_memory
from .parse import Entry, UnknownForm

_END = 1 << 60


class Block:
    """What the lanes of one thread block share."""

    def __init__(self, entry: Entry, parameters: bytes, memory: Memory, shared: int, index, grid, threads: int):
        self.entry, self.parameters, self.threads = entry, parameters, threads
        self.memory = {"global": memory, "shared": Memory("shared", shared_memory(shared))}
        self.special = {f"%ctaid.{axis}": index[i] for i, axis in enumerate("xyz")}
        self.special |= {f"%nctaid.{axis}": grid[i] for i, axis in enumerate("xyz")}
        self.special |= {"%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}


class Unit:
    """Lanes that run in lockstep: a whole block, or one warp of it."""

    def __init__(self, block: Block, first: int, count: int):
        self.block, self.count = block, count
        self.lanes = np.arange(first, first + count)
        self.pc = np.zeros(count, np.int64)
        self.waiting = np.full(count, -1, np.int64)  # the barrier that a lane waits at
        self.registers: dict[str, np.ndarray] = {}
        self.poisoned: dict[str, np.ndarray] = {}  # registers that some lanes never wrote
        self.active = np.ones(count, bool)
        self.all_active = True
        self.steps = 0

    def width(self, name: str) -> int:
        widths = self.block.entry.widths
        prefix = re.sub(r"\d+$", "", name)
        if prefix not in widths:
            raise UnknownForm(f"operand {name}")
        return widths[prefix]

    def read(self, name: str, mask: np.ndarray, instruction) -> np.ndarray:
        value = self.registers.get(name)
        if value is None or (name in self.poisoned and (self.poisoned[name] & mask).any()):
            if mask.any():
                raise Fault(f"register {name} is read before it is written: {instruction}")
            return np.zeros(self.count, BITS[self.width(name)])
        return value

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        old = self.registers.get(name)
        if mask.all():
            self.registers[name] = value
            self.poisoned.pop(name, None)
            return
        if old is None:
            old, self.poisoned[name] = np.zeros_like(value), np.ones(self.count, bool)
        self.registers[name] = np.where(mask, value, old)
        if name in self.poisoned:
            self.poisoned[name] = self.poisoned[name] & ~mask

    def run(self, program) -> None:
        """Until every lane has returned or waits at a barrier."""
        while True:
            ready = (self.waiting < 0) & (self.pc < _END)
            if not ready.any():
                return
            pc = int(self.pc[ready].min())
            self.active = ready & (self.pc == pc)
            others = self.pc[ready & ~self.active]
            stop = int(others.min()) if len(others) else _END
            self._straight(program, pc, stop)

    def _straight(self, program, pc: int, stop: int) -> None:
        """From ``pc`` until the active lanes part, end, wait, or meet lanes that stand at ``stop``."""
        active = self.active
        while pc < stop:
            _, mask_of, execute, control = program[pc]
            mask = active if mask_of is None else active & mask_of(self, active)
            self.steps += 1
            if control is None:
                execute(self, mask)
                pc += 1
                continue
            kind, value = control
            self.pc[active] = pc + 1
            if kind == "barrier":
                self.waiting[mask] = value
            else:
                self.pc[mask] = value if kind == "bra" else _END
            return
        self.pc[active] = pc


def program_of(entry: Entry) -> list:
    """(instruction, its guard, what it does, its effect on the program counter) for each instruction."""
    return [build(entry, instruction) for instruction in entry.instructions]


def run_grid(entry, program, grid, parameters: bytes, tensors, threads: int, shared: int, order=None) -> int:
    """Runs every block and counts the steps; ``order``: a numpy generator, warps are then units, in random order."""
    memory, steps = Memory("global", global_memory(tensors)), 0
    for index in np.ndindex(*grid[::-1]):
        block = Block(entry, parameters, memory, shared, index[::-1], grid, threads)
        size = threads if order is None else 32
        units = [Unit(block, first, size) for first in range(0, threads, size)]
        with np.errstate(all="ignore"):
            _run_block(units, program, order)
        steps += sum(unit.steps for unit in units)
    return steps


def _run_block(units: list[Unit], program, order) -> None:
    while True:
        for at in range(len(units)) if order is None else order.permutation(len(units)):
            units[at].run(program)
        waiting = np.concatenate([unit.waiting for unit in units])
        ended = np.concatenate([unit.pc >= _END for unit in units])
        if ended.all():
            return
        barriers = set(waiting.tolist())
        if len(barriers) != 1:
            raise Fault(f"lanes wait at different barriers or have returned (-1): {sorted(barriers)}")
        for unit in units:
            unit.waiting[:] = -1
