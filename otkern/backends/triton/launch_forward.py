"""The host side of the balanced solve; see `launch`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from otkern.problem import Inputs

from . import global_forward, launch, launch_symmetric, onchip_forward


def forward(inputs: Inputs, g_init: Tensor | None, max_iter: int, tol: float) -> tuple[Tensor, ...]:
    dtype, device = inputs.compute_dtype, inputs.device
    new = {"dtype": dtype, "device": device}
    value, error = torch.empty(inputs.batch, **new), torch.empty(inputs.batch, **new)
    f, g = torch.zeros(inputs.shape_f, **new), torch.zeros(inputs.shape_g, **new)
    iters = torch.full((inputs.batch,), -1, dtype=torch.int32, device=device)
    if inputs.batch == 0:
        return value, f, g, error, iters
    arguments = launch.problem_arguments(inputs) | {
        "g_init_ptr": value if g_init is None else g_init.contiguous(),
        "has_init": int(g_init is not None),
        "value_ptr": value,
        "f_ptr": f,
        "g_ptr": g,
        "error_ptr": error,
        "iters_ptr": iters,
        "max_iter": max_iter,
        "tol": launch.round_down(tol),
        **launch.relaxed_arguments(inputs),
    }
    largest = max(inputs.max_a, inputs.max_b)
    entries = launch.table("forward", launch.FORWARD, inputs.primary.dtype, device)
    with launch.on_device(device):
        for entry, lower in launch.classes(entries, largest):
            launch.launch_onchip(onchip_forward.onchip_forward_kernel, inputs, arguments, entry, lower)
        limit = entries[-1].block
        if largest > limit:
            for first, (count,) in launch.grids(
                inputs.n_pairs, 1, launch.SCRATCH_ELEMENTS // max(1, inputs.max_a * inputs.max_b)
            ):
                _forward_global(inputs, arguments | {"ONCHIP": limit}, first, count)
            launch_symmetric.self_forward(inputs, arguments | {"ONCHIP": limit})
    return value, f, g, error, iters


def _forward_global(inputs: Inputs, arguments: dict, first: int, count: int) -> None:
    """Items first .. first + count of those beyond the largest on-chip class."""
    N, M, device, dtype = inputs.max_a, inputs.max_b, inputs.device, inputs.compute_dtype
    block_out, block_in, warps = launch.table("half_update", launch.HALF_UPDATE, dtype, device)
    new = {"dtype": dtype, "device": device}
    arguments = arguments | {"first_item": first}
    cost, pitch = launch.form_costs(inputs, arguments, count)
    f_even, f_odd, g = torch.empty((count, N), **new), torch.empty((count, N), **new), torch.empty((count, M), **new)
    parts = max(1, triton.cdiv(N, block_out))
    gap = torch.empty((count, parts), **new)
    arguments |= {"cost_ptr": cost, "gap_ptr": gap, "parts": parts, "stride_item": N * pitch}
    kernel = global_forward.half_update_forward_kernel
    sides = launch.update_sides(arguments, (N, M), pitch, block_out)
    shared = launch.select(arguments, kernel) | {
        "init_ptr": arguments["g_init_ptr"],
        "BLOCK_OUT": block_out,
        "BLOCK_IN": block_in,
        **launch.options(warps),
    }
    for k in range(arguments["max_iter"] + 1):
        f_new, f_old = (f_odd, f_even) if k % 2 else (f_even, f_odd)
        grid = (count * sides["a"]["blocks"],)
        kernel[grid](**shared, **sides["a"], potential_ptr=g, out_ptr=f_new, old_ptr=f_old, k=k)
        if k < arguments["max_iter"]:
            grid = (count * sides["b"]["blocks"],)
            kernel[grid](**shared, **sides["b"], potential_ptr=f_new, out_ptr=g, old_ptr=g, k=k)
    kernel = global_forward.finish_forward_kernel
    kernel[(count,)](
        **launch.select(arguments, kernel),
        f_even_ptr=f_even,
        f_odd_ptr=f_odd,
        g_last_ptr=g,
        BLOCK=launch.FINISH_BLOCK,
        ROWS=block_out,
        **launch.options(4),
    )
