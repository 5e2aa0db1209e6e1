"""The Triton backend: NVIDIA GPUs, and CPU tensors in Triton's interpreter.

Problems of up to 128 x 128 points (64 x 64 in fp64) are solved whole by one program each, larger ones by launches over
their blocks. Triton is imported with the first call, not before.

    launch.py          the launch table, the arguments and the grids; launch_*.py: the host side of each function
    tiles.py           the cost tile that every kernel starts from
    onchip_forward.py  the balanced solve in one launch
    global_forward.py  the same of larger problems
    relaxation.py      what other marginals than balanced ones change about one side
    onchip_relaxed.py  the solve for every kind of marginals, or with a schedule, in one launch
    global_relaxed.py  the same of larger problems
    log_domain.py      soft minima of a tile, and its plan
    onchip_self.py     the solve of a cloud with itself, in the launch of either solve
    onchip_annealed.py the annealed loop of GeomLoss in one launch
    global_symmetric.py  both of these of larger problems
    plan_products.py   everything that needs the plan: gradients and products
    conjugate_gradients.py  the adjoint of the fixed point
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from otkern.problem import Inputs, PlanWeights, Schedule, check_points, padded

Needs = tuple[bool, bool, bool, bool, bool]


def can_run(inputs: Inputs, schedule: Schedule | None = None) -> str | None:
    """None if this backend can serve the call, else one sentence why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if schedule is not None and (schedule.update != "alternating" or schedule.overrelaxation != 1):
        return "the triton backend iterates by alternating updates without over-relaxation; use the reference backend"
    if inputs.device.type == "cuda":
        return None
    if inputs.device.type != "cpu":
        return f"the triton backend takes CUDA tensors, not {inputs.device.type} tensors"
    # What counts is how the kernels were decorated, not what the environment says by now.
    from . import tiles

    if type(tiles.cost_tile).__name__ == "InterpretedFunction":
        return None
    return "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before the first import"


def regime(inputs: Inputs, schedule: Schedule | None = None) -> str:
    """What is done with problems of this size, in a sentence."""
    from . import launch

    relaxed = inputs.kind != "balanced" or (schedule is not None and schedule.eps_start is not None)
    limit = (launch.RELAXED if relaxed else launch.FORWARD)[inputs.primary.dtype][-1].block
    longest = max(inputs.max_a, inputs.max_b) + (inputs.kind == "null")
    onchip = f"items of up to {limit} x {limit} points whole on chip, one program each"
    if longest <= limit:
        return onchip
    return f"{onchip}; larger ones with their cost in memory, two launches an iteration"


def forward(
    inputs: Inputs,
    g_init: Tensor | None,
    max_iter: int,
    tol: float,
    schedule: Schedule | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The values (B,), potentials, multipliers (B, 2), marginal errors (B,) and iteration counts (B,) of the batch."""
    from . import launch_forward, launch_relaxed

    if check:
        check_points(inputs)
    if inputs.kind != "balanced" or (schedule is not None and schedule.eps_start is not None):
        return launch_relaxed.forward(inputs, g_init, max_iter, tol, schedule)
    value, f, g, error, iters = launch_forward.forward(inputs, g_init, max_iter, tol)
    return value, f, g, value.new_zeros(inputs.batch, 2), error, iters


def symmetric(
    inputs: Inputs, eps_start: Tensor, n_steps: Tensor, eps_factor: float, cost_floor: float, check: bool = False
) -> tuple[Tensor, ...]:
    """(s_a, s_b, f, g, r_a, r_b) of GeomLoss's loop, as of the reference backend's function of this name."""
    from . import launch_symmetric

    if check:
        check_points(inputs)
    return launch_symmetric.annealed(inputs, eps_start, n_steps, eps_factor, cost_floor)


def backward(inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """Gradients (x_a, x_b, cost) of the values at fixed potentials, sum_j b E, sum_i a E, and sum a b h(log E) (B,)."""
    from . import launch_plan

    return launch_plan.backward(inputs, f.contiguous(), g.contiguous(), dvalue, needs)


def plan_backward(
    inputs: Inputs, f: Tensor, g: Tensor, weights: PlanWeights, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Sums over the plan with general weights: (x_a, x_b, cost), one per row, one per column, and one per item."""
    from . import launch_plan

    return launch_plan.plan_backward(inputs, f.contiguous(), g.contiguous(), weights, needs)


def implicit(
    inputs: Inputs,
    f: Tensor,
    g: Tensor,
    slope_a: Tensor | None,
    slope_b: Tensor | None,
    extra_a: Tensor | None,
    extra_b: Tensor | None,
    u_a: Tensor,
    u_b: Tensor,
    singular: bool,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint (p, q) of the fixed point, its relative residuals (B,) and conjugate-gradient iterations (B,)."""
    from . import launch_implicit

    sides = (slope_a, slope_b, extra_a, extra_b)
    return launch_implicit.implicit(inputs, f.contiguous(), g.contiguous(), sides, u_a, u_b, singular, tol, max_iter)


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    """P @ v or P^T @ v, with `times_cost` the elementwise product of P and C in place of P; compute dtype."""
    from . import launch_plan

    return launch_plan.apply(inputs, f.contiguous(), g.contiguous(), v, transpose, times_cost)


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
    return padded(inputs, True, packed)
