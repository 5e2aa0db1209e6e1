"""The host side of symmetric updates: clouds with themselves, and the annealed loop of GeomLoss; see `launch`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from otkern.problem import Inputs

from . import global_symmetric, launch, onchip_annealed
from .launch import options, select, table


def self_forward(inputs: Inputs, arguments: dict) -> None:
    """The items that match a cloud with itself and are too large for one program."""
    if inputs.max_a <= arguments["ONCHIP"]:
        return
    most = launch.SCRATCH_ELEMENTS // (inputs.max_a * inputs.max_b)
    for first, (count,) in launch.grids(inputs.batch, 1, most, inputs.n_pairs):
        _self_global(inputs, arguments | {"first_item": first}, count)


def _self_global(inputs: Inputs, arguments: dict, count: int) -> None:
    N, dtype = inputs.max_a, inputs.compute_dtype
    update, gap = _updates(inputs, arguments, count)
    h, s = (_buffers(2, (count, N), dtype, inputs.device) for _ in range(2))
    h[0].zero_()
    reg, max_iter, factor = arguments["reg_ptr"], arguments["max_iter"], arguments["eps_factor_ptr"]
    eps = torch.maximum(reg, arguments["eps_start_ptr"])
    last_eps = eps
    for k in range(max_iter + 1):
        eps = reg if k >= max_iter - 1 else eps
        pointers = {"h_in_ptr": h[k % 2], "h_out_ptr": h[k % 2], "new_ptr": h[(k + 1) % 2], "s_ptr": s[k % 2]}
        update("a", k, STOPPING=True, SAME=True, FINAL=False, eps_ptr=eps, last_eps_ptr=last_eps, **pointers)
        last_eps, eps = eps, torch.maximum(reg, eps * factor)
    kernel = global_symmetric.finish_self_kernel
    kernel[(count,)](
        **select(arguments | gap, kernel),
        h_even_ptr=h[0],
        h_odd_ptr=h[1],
        s_even_ptr=s[0],
        s_odd_ptr=s[1],
        BLOCK=launch.FINISH_BLOCK,
        ROWS=table("averaged_update", launch.AVERAGED_UPDATE, dtype, inputs.device)[0],
        **options(4),
    )


def annealed(
    inputs: Inputs, eps_start: Tensor, n_steps: Tensor, eps_factor: float, cost_floor: float
) -> tuple[Tensor, ...]:
    new = {"dtype": inputs.compute_dtype, "device": inputs.device}
    s_a, f, r_a = (torch.zeros(inputs.shape_f, **new) for _ in range(3))
    s_b, g, r_b = (torch.zeros(inputs.shape_g, **new) for _ in range(3))
    results = {"s_a": s_a, "s_b": s_b, "f": f, "g": g, "r_a": r_a, "r_b": r_b}
    if inputs.batch == 0 or inputs.max_a == 0 or inputs.max_b == 0:
        return tuple(results.values())
    arguments = launch.problem_arguments(inputs) | launch.relaxed_arguments(inputs, eps_start, eps_factor)
    arguments |= {f"{name}_ptr": tensor for name, tensor in results.items()}
    arguments |= {"n_steps_ptr": n_steps.to(torch.int32).contiguous(), "floor_ptr": torch.full((1,), cost_floor, **new)}
    entries = table("relaxed", launch.RELAXED, inputs.primary.dtype, inputs.device)
    limit, largest = entries[-1].block, max(inputs.max_a, inputs.max_b)
    with launch.on_device(inputs.device):
        for entry, lower in launch.classes(entries, largest):
            launch.launch_onchip(onchip_annealed.onchip_annealed_kernel, inputs, arguments, entry, lower)
        if largest > limit:
            most, longest = launch.SCRATCH_ELEMENTS // (inputs.max_a * inputs.max_b), longest_ladder(n_steps)
            for start, stop in ((0, inputs.n_pairs), (inputs.n_pairs, inputs.batch)):
                for first, (count,) in launch.grids(stop, 1, most, start):
                    group = arguments | {"ONCHIP": limit, "first_item": first}
                    _annealed_global(inputs, group, count, longest, start == inputs.n_pairs)
    return tuple(results.values())


def _annealed_global(inputs: Inputs, arguments: dict, count: int, longest: int, same: bool) -> None:
    N, M, dtype, device = inputs.max_a, inputs.max_b, inputs.compute_dtype, inputs.device
    update, _ = _updates(inputs, arguments, count)
    f = _buffers(2, (count, N), dtype, device)
    g = f if same else _buffers(2, (count, M), dtype, device)
    f[0].zero_()
    g[0].zero_()
    start, steps, reg = arguments["eps_start_ptr"], arguments["n_steps_ptr"], arguments["reg_ptr"]
    flags = {"STOPPING": False, "SAME": same, "last_eps_ptr": reg}
    for k in range(longest + 4):
        on_the_way = start * arguments["eps_factor_ptr"] ** max(k - 2, 0)
        eps = torch.where(k < steps + 2, on_the_way, torch.where(k == steps + 2, reg, 0))
        final = k == longest + 3
        old, new = k % 2, (k + 1) % 2
        flags |= {"FINAL": final, "eps_ptr": reg if final else eps}
        update("a", k, h_in_ptr=g[old], h_out_ptr=f[old], new_ptr=f[new], s_ptr=f[new], **flags)
        if not same:
            update("b", k, h_in_ptr=f[old], h_out_ptr=g[old], new_ptr=g[new], s_ptr=g[new], **flags)


def longest_ladder(n_steps: Tensor) -> int:
    """How many steps to launch: one number read from the device, which only problems beyond one program wait for."""
    return int(n_steps.max())


def _updates(inputs: Inputs, arguments: dict, count: int):
    """A function that launches an update of one side of a group of items, and the memory of the gaps."""
    N, M, dtype, device = inputs.max_a, inputs.max_b, inputs.compute_dtype, inputs.device
    block_out, block_in, warps = table("averaged_update", launch.AVERAGED_UPDATE, dtype, device)
    cost, pitch = launch.form_costs(inputs, arguments, count)
    parts = max(1, triton.cdiv(N, block_out))
    gap = {"gap_ptr": torch.empty((count, 2, parts), dtype=dtype, device=device), "parts": parts}
    kernel = global_symmetric.averaged_update_kernel
    finals = {"h": ("f_ptr", "g_ptr"), "s": ("s_a_ptr", "s_b_ptr"), "r": ("r_a_ptr", "r_b_ptr")}
    unused = {name: arguments["reg_ptr"] for pair in finals.values() for name in pair}
    unused |= {"error_ptr": arguments["reg_ptr"], "iters_ptr": arguments["sizes_a_ptr"]}
    arguments = unused | {"floor_ptr": torch.full((1,), -float("inf"), dtype=dtype, device=device)} | arguments | gap
    arguments |= {"cost_ptr": cost, "stride_item": N * pitch}
    arguments |= {"BLOCK_OUT": block_out, "BLOCK_IN": block_in}
    sides = launch.update_sides(arguments, (N, M), pitch, block_out)
    for index, own in enumerate(sides.values()):
        own |= {f"final_{name}_ptr": arguments[pair[index]] for name, pair in finals.items()}
        own |= {f"other_{name}_ptr": arguments[pair[1 - index]] for name, pair in finals.items()}

    def update(side: str, k: int, **others) -> None:
        given = select(arguments | sides[side] | others | {"k": k}, kernel)
        kernel[(count * sides[side]["blocks"],)](**({"tol": -1.0} | given), **options(warps))

    return update, gap


def _buffers(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]
