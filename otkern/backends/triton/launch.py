"""The host side of all kernels: the launch table, the arguments that every kernel takes, the grids, the costs.

Nothing reads device memory, but for `launch_symmetric.longest_ladder`. Which kernel serves an item, and with which
block sizes, follows from the item's own size inside the kernel; the host only launches every size class that the batch
may hold.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from otkern.problem import KINDS, METRICS, Inputs

from . import global_forward


class Launch(NamedTuple):
    """How one size class is compiled."""

    block: int  # rows and columns of a tile
    block_d: int  # features, or columns of a right-hand side, per step
    warps: int
    stages: int
    precision: str  # of tl.dot on fp32 operands; 16-bit and fp64 operands have only one
    part: int = 0  # where the whole cost is held: rows of it formed at once, all of them if 0


# tf32 alone would lose half of the digits of fp32 input. "ieee" is fp32 multiply-add; "tf32x3" uses the matrix units,
# but whether their truncating accumulation is as good over hundreds of features has to be measured on them first.
FORWARD = {
    torch.float32: (
        Launch(16, 32, 1, 1, "ieee"),
        Launch(32, 32, 4, 1, "ieee"),
        Launch(64, 32, 8, 1, "ieee"),
        Launch(128, 16, 8, 1, "ieee", 32),
    ),
    torch.bfloat16: (
        Launch(16, 64, 1, 1, "ieee"),
        Launch(32, 64, 4, 1, "ieee"),
        Launch(64, 32, 8, 1, "ieee"),
        Launch(128, 16, 8, 1, "ieee", 32),
    ),
    torch.float64: (
        Launch(16, 16, 1, 1, "ieee"),
        Launch(32, 16, 4, 1, "ieee"),
        Launch(64, 16, 8, 1, "ieee"),
    ),
}
FORWARD[torch.float16] = FORWARD[torch.bfloat16]

# Solves in the log domain, which hold the cost alone, systems of equations, which hold the plan, and clouds with
# themselves. In fp64 their vectors spill beside a tile of 64 (up to 220 bytes).
RELAXED = FORWARD | {torch.float64: FORWARD[torch.float64][:2]}
IMPLICIT = RELAXED

# Cost tiles of the problems beyond the largest class.
COST = {
    torch.float32: Launch(64, 32, 8, 1, "ieee"),
    torch.bfloat16: Launch(64, 32, 8, 1, "ieee"),
    torch.float16: Launch(64, 32, 8, 1, "ieee"),
    torch.float64: Launch(64, 16, 8, 1, "ieee"),
}
# Tiles of the gradients; items beyond the last class loop over tiles of its size. 16-bit gradients are rounded to 8 or
# 11 bits at the end, so the matrix units' three-pass product is more than they can show; in the largest tiles it does
# not fit the registers.
BACKWARD = {
    torch.float32: (Launch(16, 16, 1, 1, "ieee"), Launch(32, 16, 4, 1, "ieee"), Launch(64, 16, 8, 1, "ieee")),
    torch.bfloat16: (Launch(16, 32, 1, 1, "tf32x3"), Launch(32, 32, 4, 1, "tf32x3"), Launch(64, 16, 8, 1, "ieee")),
    torch.float64: (Launch(16, 16, 2, 1, "ieee"), Launch(32, 16, 4, 1, "ieee")),
}
BACKWARD[torch.float16] = BACKWARD[torch.bfloat16]
# With general weights the largest tile of each dtype spills (456 bytes in fp32, 1420 in fp64), and so it does (300)
# where distances are formed from differences.
BACKWARD_GENERAL = {dtype: entries[:-1] for dtype, entries in BACKWARD.items()}
# Gradients of costs, which need no product.
BACKWARD_COST = {torch.float32: Launch(64, 16, 8, 1, "ieee"), torch.float64: Launch(32, 16, 4, 1, "ieee")}
BACKWARD_COST_GENERAL = BACKWARD_COST | {torch.float64: Launch(32, 16, 8, 1, "ieee")}
APPLY = {
    torch.float32: Launch(64, 16, 8, 1, "ieee"),
    torch.bfloat16: Launch(64, 16, 8, 1, "ieee"),
    torch.float16: Launch(64, 16, 8, 1, "ieee"),
    torch.float64: Launch(64, 16, 8, 1, "ieee"),
}
# (block of the updated side, block of the other side, warps) of a half update
HALF_UPDATE = {torch.float32: (32, 128, 4), torch.float64: (32, 64, 4)}
AVERAGED_UPDATE = {torch.float32: (32, 128, 4), torch.float64: (32, 64, 8)}
FINISH_BLOCK = 128

# Settings that differ on one device: (table name, compute capability, dtype) -> what stands in that table.
OVERRIDES: dict = {}

# Of one launch. CUDA bounds the other dimensions of a grid by 65535, so every grid has only the first.
MAX_PROGRAMS = 2**31 - 1

# Bounds of the work memory: items whose cost passes through scratch at a time, and elements of the costs in global
# memory.
SCRATCH_ITEMS = 1024
SCRATCH_ELEMENTS = 2**28

# Up to as many features, distances are formed from differences.
FEW = 16
DIFFERENCE = 3
KIND = {"sqeuclidean": 0, "euclidean": 0, "cosine": 1, "dot": 1, "cost": 2}
TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def table(name: str, entries: dict, dtype: torch.dtype, device: torch.device):
    """What the launch table holds for a dtype on a device."""
    if OVERRIDES and device.type == "cuda":
        return OVERRIDES.get((name, torch.cuda.get_device_capability(device), dtype), entries[dtype])
    return entries[dtype]


def on_device(device: torch.device):
    """Triton launches on the current device, which may not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def options(warps: int, stages: int = 1) -> dict:
    # Fp fusion is stated because its default differs between Triton versions, and with it the bits. The register limit
    # is the hardware's own: left to itself the assembler spills a little in one-warp programs to fit more of them.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "maxnreg": 255}


def problem_arguments(inputs: Inputs) -> dict:
    """The arguments that every kernel over points or costs takes, by name."""
    empty = torch.empty(1, dtype=torch.int32, device=inputs.device)
    mode_a = 2 if inputs.cu_seqlens_a is not None else int(inputs.lengths_a is not None)
    mode_b = 2 if inputs.cu_seqlens_b is not None else int(inputs.lengths_b is not None)
    if inputs.cost is not None:
        x = y = inputs.cost
        D = 1
    else:
        # Loads across a feature stride would cost more than the copy, several times over.
        x, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (inputs.x_a, inputs.x_b))
        D = x.shape[-1]
    strides_x, strides_y = x.stride(), y.stride()
    if inputs.packed:
        strides_x, strides_y = (0, *strides_x), (0, *strides_y)
    reg = inputs.reg.contiguous()
    return {
        "x_ptr": x,
        "y_ptr": y,
        "a_ptr": reg if inputs.a is None else inputs.a.contiguous(),
        "b_ptr": reg if inputs.b is None else inputs.b.contiguous(),
        "reg_ptr": reg,
        "sizes_a_ptr": first_given(inputs.cu_seqlens_a, inputs.lengths_a, empty),
        "sizes_b_ptr": first_given(inputs.cu_seqlens_b, inputs.lengths_b, empty),
        **{f"stride_x_{axis}": stride for axis, stride in zip("bnd", strides_x, strict=True)},
        **{f"stride_y_{axis}": stride for axis, stride in zip("bnd", strides_y, strict=True)},
        "N": inputs.max_a,
        "M": inputs.max_b,
        "D": D,
        "mode_a": mode_a,
        "mode_b": mode_b,
        "has_a": int(inputs.a is not None),
        "has_b": int(inputs.b is not None),
        "metric": (*METRICS, "cost").index(inputs.metric),
        "KIND": kind_of_cost(inputs),
        "COMPUTE": TL_DTYPE[inputs.compute_dtype],
        "WIDEN": inputs.device.type == "cpu",
    }


def kind_of_cost(inputs: Inputs) -> int:
    """How a kernel forms the cost: one of the constants of `tiles`."""
    few = inputs.x_a is not None and inputs.x_a.shape[-1] <= FEW
    return DIFFERENCE if few and inputs.metric in ("sqeuclidean", "euclidean") else KIND[inputs.metric]


def first_given(*tensors: Tensor | None) -> Tensor:
    return next(t for t in tensors if t is not None).contiguous()


def select(arguments: dict, kernel) -> dict:
    """Those of the arguments that a kernel has."""
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def grids(stop: int, blocks: int = 1, most: int = MAX_PROGRAMS, start: int = 0):
    """The launches that cover items from `start` on with `blocks` programs each, `most` at once: (first item, grid)."""
    group = max(1, most // blocks)
    for first in range(start, stop, group):
        yield first, (min(group, stop - first) * blocks,)


def classes(entries: tuple[Launch, ...], largest: int):
    """The size classes that a batch with this largest possible size may hold: (settings, exclusive lower bound)."""
    lower = -1
    for entry in entries:
        yield entry, lower
        lower = entry.block
        if largest <= lower:
            return


def relaxed_arguments(inputs: Inputs, eps_start: Tensor | None = None, eps_factor: float = 1.0) -> dict:
    """What describes marginals, a schedule, and items that match a cloud with themselves, by name."""
    reg = inputs.reg.contiguous()
    # Only the plain balanced solve of pairs does not read the schedule.
    used = eps_start is not None or inputs.kind != "balanced" or inputs.n_pairs < inputs.batch
    return {
        "kind": KINDS.index(inputs.kind),
        "relaxation_ptr": reg if inputs.relaxation is None else inputs.relaxation.contiguous(),
        "eps_start_ptr": reg if eps_start is None else eps_start.to(reg.dtype).contiguous(),
        # in memory: a scalar argument would be rounded to fp32
        "eps_factor_ptr": torch.full((1,), eps_factor, dtype=reg.dtype, device=reg.device) if used else reg,
        "n_pairs": inputs.n_pairs,
        "SELF": inputs.n_pairs < inputs.batch,
    }


def launch_onchip(kernel, inputs: Inputs, arguments: dict, entry: Launch, lower: int) -> None:
    """One size class of a kernel that holds the whole cost of an item."""
    through_scratch = entry.part > 0
    group = min(inputs.batch, SCRATCH_ITEMS) if through_scratch else inputs.batch
    scratch = arguments["reg_ptr"]
    if through_scratch:
        scratch = torch.empty((group, entry.block, entry.block), dtype=inputs.compute_dtype, device=inputs.device)
    for first, grid in grids(inputs.batch, 1, group):
        kernel[grid](
            **select(arguments, kernel),
            scratch_ptr=scratch,
            first_item=first,
            BLOCK=entry.block,
            LOWER=lower,
            PART=entry.part or entry.block,
            BLOCK_D=entry.block_d,
            PRECISION=entry.precision,
            **options(entry.warps, entry.stages),
        )


def form_costs(inputs: Inputs, arguments: dict, count: int) -> tuple[Tensor, int]:
    """The costs (count, N, pitch) of the items from `first_item` that are larger than ONCHIP."""
    N, M = inputs.max_a, inputs.max_b
    entry = table("cost", COST, inputs.primary.dtype, inputs.device)
    # rows padded so that every one of them starts at an address that wide loads can use
    pitch = triton.cdiv(M, 16) * 16
    cost = torch.empty((count, N, pitch), dtype=inputs.compute_dtype, device=inputs.device)
    if N > 0 and M > 0:
        kernel = global_forward.cost_forward_kernel
        blocks_a, blocks_b = triton.cdiv(N, entry.block), triton.cdiv(M, entry.block)
        arguments = arguments | {"cost_ptr": cost, "stride_item": N * pitch, "stride_row": pitch}
        kernel[(count * blocks_a * blocks_b,)](
            **select(arguments, kernel),
            blocks_a=blocks_a,
            blocks_b=blocks_b,
            BLOCK=entry.block,
            BLOCK_D=entry.block_d,
            PRECISION=entry.precision,
            **options(entry.warps, entry.stages),
        )
    return cost, pitch


# Names of the arguments of one side in the kernels that treat rows and columns alike.
_SIDE_ARGUMENTS = (
    ("w_{}_ptr", "{}_ptr"),
    ("sizes_{}_ptr", "sizes_{}_ptr"),
    ("mode_{}", "mode_{}"),
    ("has_w_{}", "has_{}"),
)


def side_arguments(arguments: dict, side: str) -> dict:
    """Sizes and weights for a kernel that treats rows and columns alike, for side "a" or "b" as its "out" side."""
    other = "b" if side == "a" else "a"
    sizes = {"a": arguments["N"], "b": arguments["M"]}
    result = {"N_out": sizes[side], "N_in": sizes[other]}
    for name, key in _SIDE_ARGUMENTS:
        result[name.format("out")] = arguments[key.format(side)]
        result[name.format("in")] = arguments[key.format(other)]
    return result


def update_sides(arguments: dict, sizes: tuple[int, int], pitch: int, block_out: int) -> dict[str, dict]:
    """What an update of each side takes beside the rest: costs stand in rows of `pitch`, a program has `block_out`."""
    return {
        side: side_arguments(arguments, side)
        | {
            "stride_out": pitch if side == "a" else 1,
            "stride_in": 1 if side == "a" else pitch,
            "blocks": max(1, triton.cdiv(size, block_out)),
            "ROW_SIDE": side == "a",
        }
        for side, size in zip("ab", sizes, strict=True)
    }


def round_down(tol: float) -> float:
    """The largest fp32 number that is not above the tolerance: scalars reach a kernel as fp32."""
    rounded = torch.tensor(tol, dtype=torch.float32, device="cpu")
    if float(rounded) > tol:
        rounded = torch.nextafter(rounded, torch.full_like(rounded, -float("inf")))
    return float(rounded)
