"""The host side of the solve for every kind of marginals and with a schedule of eps; see `launch`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from otkern.problem import Inputs, Schedule

from . import global_relaxed, launch, launch_symmetric, onchip_relaxed
from .launch import options, select, table


def forward(
    inputs: Inputs, g_init: Tensor | None, max_iter: int, tol: float, schedule: Schedule | None
) -> tuple[Tensor, ...]:
    new = {"dtype": inputs.compute_dtype, "device": inputs.device}
    value, error = torch.empty(inputs.batch, **new), torch.empty(inputs.batch, **new)
    multipliers = torch.zeros((inputs.batch, 2), **new)
    f, g = torch.zeros(inputs.shape_f, **new), torch.zeros(inputs.shape_g, **new)
    iters = torch.full((inputs.batch,), -1, dtype=torch.int32, device=inputs.device)
    if inputs.batch == 0:
        return value, f, g, multipliers, error, iters
    schedule = schedule or Schedule()
    arguments = launch.problem_arguments(inputs)
    arguments |= launch.relaxed_arguments(inputs, schedule.eps_start, schedule.eps_factor)
    arguments |= {
        "g_init_ptr": value if g_init is None else g_init.contiguous(),
        "has_init": int(g_init is not None),
        "value_ptr": value,
        "f_ptr": f,
        "g_ptr": g,
        "multipliers_ptr": multipliers,
        "error_ptr": error,
        "iters_ptr": iters,
        "entropy": int(inputs.entropy),
        "max_iter": max_iter,
        "tol": launch.round_down(tol),
    }
    null = int(inputs.kind == "null")
    largest = max(inputs.max_a, inputs.max_b) + null
    entries = table("relaxed", launch.RELAXED, inputs.primary.dtype, inputs.device)
    with launch.on_device(inputs.device):
        for entry, lower in launch.classes(entries, largest):
            kernel = onchip_relaxed.onchip_relaxed_forward_kernel
            launch.launch_onchip(kernel, inputs, arguments, entry, lower)
        limit = entries[-1].block
        if largest > limit:
            _forward_global(inputs, arguments | {"ONCHIP": limit}, schedule.eps_factor)
            launch_symmetric.self_forward(inputs, arguments | {"ONCHIP": limit})
    return value, f, g, multipliers, error, iters


def _forward_global(inputs: Inputs, arguments: dict, factor: float) -> None:
    """The items beyond the largest on-chip class, as many at a time as the work memory holds."""
    null = int(inputs.kind == "null")
    weights = {f"{side}_ptr": enlarged_weights(inputs, arguments, side) for side in "ab"}
    most = launch.SCRATCH_ELEMENTS // max(1, (inputs.max_a + null) * (inputs.max_b + null))
    for first, (count,) in launch.grids(inputs.n_pairs, 1, most):
        _solve_group(inputs, arguments | weights | {"first_item": first}, count, factor)


def _solve_group(inputs: Inputs, arguments: dict, count: int, factor: float) -> None:
    null, device, dtype = int(inputs.kind == "null"), inputs.device, inputs.compute_dtype
    N, M = inputs.max_a + null, inputs.max_b + null
    block_out, block_in, warps = table("half_update", launch.HALF_UPDATE, dtype, device)
    new = {"dtype": dtype, "device": device}
    # An item of the largest class has one point more with null points, and its cost is needed here.
    cost, pitch = launch.form_costs(inputs, arguments | {"ONCHIP": arguments["ONCHIP"] - null}, count)
    s_even, s_odd, t = torch.empty((count, N), **new), torch.empty((count, N), **new), torch.empty((count, M), **new)
    parts = max(1, triton.cdiv(N, block_out))
    arguments = arguments | {
        "cost_ptr": cost,
        "gap_ptr": torch.empty((count, parts), **new),
        "lam_ptr": torch.zeros((count, 2), **new),
        "parts": parts,
        "stride_item": inputs.max_a * pitch,
    }
    kernel = global_relaxed.half_update_relaxed_kernel
    shared = select(arguments, kernel) | {
        "init_ptr": arguments["g_init_ptr"],
        "BLOCK_OUT": block_out,
        "BLOCK_IN": block_in,
        **options(warps),
    }
    sides = launch.update_sides(arguments, (N, M), pitch, block_out)
    sides = {side: select(values, kernel) for side, values in sides.items()}
    reg, max_iter = arguments["reg_ptr"], arguments["max_iter"]
    eps = last_eps = torch.maximum(reg, arguments["eps_start_ptr"])
    for k in range(max_iter + 1):
        if k >= max_iter - 1:
            eps = reg
        s_new, s_old = (s_odd, s_even) if k % 2 else (s_even, s_odd)
        kernel[(count * sides["a"]["blocks"],)](
            **(shared | sides["a"]),
            s_in_ptr=t,
            s_out_ptr=s_new,
            s_old_ptr=s_old,
            eps_ptr=eps,
            eps_in_ptr=last_eps if k > 0 else eps,
            k=k,
        )
        if k < max_iter:
            kernel[(count * sides["b"]["blocks"],)](
                **(shared | sides["b"]), s_in_ptr=s_new, s_out_ptr=t, s_old_ptr=t, eps_ptr=eps, eps_in_ptr=eps, k=k
            )
        last_eps, eps = eps, torch.maximum(reg, eps * factor)
    kernel = global_relaxed.finish_relaxed_kernel
    kernel[(count,)](
        **select(arguments, kernel),
        s_even_ptr=s_even,
        s_odd_ptr=s_odd,
        t_ptr=t,
        BLOCK=launch.FINISH_BLOCK,
        ROWS=block_out,
        **options(4),
    )


def enlarged_weights(inputs: Inputs, arguments: dict, side: str) -> Tensor:
    """The weights (B, N), or (B, N + 1) with the null point's behind the true ones, 0 beyond."""
    null = int(inputs.kind == "null")
    sided = launch.side_arguments(arguments, side)
    out = torch.empty((inputs.batch, sided["N_out"] + null), dtype=inputs.compute_dtype, device=inputs.device)
    kernel = global_relaxed.enlarged_weights_kernel
    for first, grid in launch.grids(inputs.batch):
        kernel[grid](
            **select(arguments | sided, kernel), out_ptr=out, first_item=first, BLOCK=launch.FINISH_BLOCK, **options(4)
        )
    return out
