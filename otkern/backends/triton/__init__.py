"""The Triton backend: NVIDIA GPUs, and CPU tensors in Triton's interpreter.

Problems of up to 128 x 128 points (64 x 64 in fp64) are solved whole by one program each, larger ones by launches over
their blocks. Triton is imported with the first call, not before.

    launch.py          the launch table and the grids
    tiles.py           the cost tile that every kernel starts from
    onchip_forward.py  the solve in one launch
    global_forward.py  the solve of larger problems
    plan_backward.py   everything that needs the plan: gradients and products
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from otkern.problem import Inputs, check_points, item_sizes


def can_run(inputs: Inputs) -> str | None:
    """None if this backend can serve the call, else one sentence why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if inputs.device.type == "cuda":
        return None
    if inputs.device.type != "cpu":
        return f"the triton backend takes CUDA tensors, not {inputs.device.type} tensors"
    # What counts is how the kernels were decorated, not what the environment says by now.
    from . import tiles

    if type(tiles.cost_tile).__name__ == "InterpretedFunction":
        return None
    return "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before the first import"


def forward(
    inputs: Inputs, g_init: Tensor | None, max_iter: int, tol: float, check: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The values (B,), potentials, marginal errors (B,) and iteration counts (B,) of the batch."""
    from . import launch

    if check:
        check_points(inputs)
    return launch.forward(inputs, g_init, max_iter, tol)


def backward(
    inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients (x_a, x_b, cost, a, b, reg) of the values at fixed potentials, None where not needed."""
    from . import launch

    return launch.backward(inputs, f.contiguous(), g.contiguous(), dvalue, needs)


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    """P @ v or P^T @ v, with `times_cost` the elementwise product of P and C in place of P; compute dtype."""
    from . import launch

    return launch.apply(inputs, f.contiguous(), g.contiguous(), v, transpose, times_cost)


def plan(inputs: Inputs, f: Tensor, g: Tensor) -> Tensor:
    """The dense plans (B, max_a, max_b), 0 in the padding: products with unit vectors, which are exact."""
    unit = torch.eye(inputs.max_b, dtype=inputs.compute_dtype, device=inputs.device)
    if not inputs.packed:
        return apply(inputs, f, g, unit.expand(inputs.batch, -1, -1), False, False)
    # Row i of the packed side b is point i - start of its item.
    rows = torch.arange(inputs.shape_g[0], device=inputs.device, dtype=torch.int32)
    item = torch.searchsorted(inputs.cu_seqlens_b, rows, right=True) - 1
    inside = (item >= 0) & (item < inputs.batch)
    place = rows - inputs.cu_seqlens_b[torch.where(inside, item, 0)]
    packed = apply(inputs, f, g, torch.where(inside.unsqueeze(1), unit[torch.where(inside, place, 0)], 0), False, False)
    position = torch.arange(inputs.max_a, device=inputs.device)
    inside = position < item_sizes(inputs, True).unsqueeze(1)
    source = torch.where(inside, inputs.cu_seqlens_a[:-1].unsqueeze(1) + position, 0)
    return torch.where(inside.unsqueeze(2), packed[source], 0)
