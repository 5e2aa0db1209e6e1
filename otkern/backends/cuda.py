"""The CUDA backend: torch-free kernels (``csrc/cuda``), called with addresses, strides, sizes and a stream.

An item's iterations run on the chip, in one launch: by one block, or by a cluster of up to sixteen whose shared memory
holds the cost. Its size alone decides which. Nothing here reads device memory or waits for the device. Where there is
no GPU, the same kernels serve CPU tensors on the host executor, thread by thread, for tests: it is built with
``OTKERN_BUILD_HOST_EXECUTOR=1`` and used where ``OTKERN_CUDA_EXECUTOR=host`` is set.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from otkern.backends.native import DTYPES, Needs, address_of, contiguous, native_problem, new_gradients, new_rows
from otkern.problem import Inputs, PlanWeights, Schedule, check_points

# Never on an absorbed kernel: the iteration that the other one is checked against.
LOG_DOMAIN_ONLY = False


@functools.cache
def missing(device_type: str) -> str | None:
    """Why tensors on ``device_type`` cannot be served here, in one sentence; None if they can."""
    if device_type == "cuda":
        try:
            from otkern import _native
        except ImportError as error:
            return f"the native module cannot be imported ({error}); reinstall otkern where compilers are found"
        if not hasattr(_native, "cuda_forward"):
            return "the native module was built without its CUDA half; reinstall otkern where nvcc is found"
        if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < (8, 0):
            return f"the cuda backend takes devices of compute capability 8.0 and up, not {capability}"
        return None
    if device_type != "cpu":
        return f"the cuda backend takes CUDA tensors, not {device_type} tensors"
    if os.environ.get("OTKERN_CUDA_EXECUTOR") != "host":
        return "the cuda backend takes CUDA tensors; on CPU tensors it runs only for tests, on the host executor"
    try:
        from otkern import _cuda_host  # noqa: F401
    except ImportError as error:
        return f"the host executor cannot be imported ({error}); build it with OTKERN_BUILD_HOST_EXECUTOR=1"
    return None


def can_run(inputs: Inputs, schedule: Schedule | None = None) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if (reason := missing(inputs.device.type)) is not None:
        return reason
    if inputs.primary.dtype not in DTYPES:
        return f"the cuda backend takes float64, float32, bfloat16 and float16, not {inputs.primary.dtype}"
    if schedule is not None and (schedule.update != "alternating" or schedule.overrelaxation != 1):
        return "the cuda backend iterates with update='alternating' and overrelaxation=1 only"
    if _size_class(inputs) < 0 or not _plan_fits(inputs):
        return (
            f"the cuda backend holds whole problems on the chip, in {str(inputs.compute_dtype).removeprefix('torch.')} "
            f"up to {_largest_square(inputs)} points a side here, and {inputs.max_a} x {inputs.max_b} do not fit"
            f"{'' if inputs.first_self < 0 else ', the larger cloud with itself'}; use the triton backend"
        )
    return None


def holds(device: int, dtype: str, longest: int, device_type: str = "cuda") -> bool:
    """Whether problems of so many points a side fit on the chip, whatever the metric, null points included."""
    side = longest + 1
    return _class_of(device_type, _device_limits(device_type, device), dtype == "float64", True, side, side) >= 0


def regime(inputs: Inputs, schedule: Schedule | None = None) -> str:
    """What is done with problems of this size, in a sentence."""
    number = _size_class(inputs)
    found = _classes(inputs)[number]
    used = _bytes(inputs, number, *_sizes(inputs))
    blocks = "one block" if found["cluster"] == 1 else f"a cluster of {found['cluster']} blocks"
    kept = "its cost and its kernel" if found["keeps_cost"] else "its kernel, the cost formed again to absorb anew,"
    return (
        f"the largest item, {inputs.max_a} x {inputs.max_b}, whole on the chip by {blocks} of {found['threads']} "
        f"threads, with {kept} in {used / 1024:.1f} KiB of shared memory each (size class {number}); iterations by "
        "multiply-adds on exp(-C / reg)"
    )


def _module(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from otkern import _native

        return _native
    from otkern import _cuda_host

    return _cuda_host


def _limits(device: torch.device) -> tuple[int, int]:
    """Shared memory of a block in bytes, and blocks of a cluster."""
    return _device_limits(device.type, _index(device))


@functools.cache
def _device_limits(device_type: str, index: int) -> tuple[int, int]:
    return _module(torch.device(device_type, index)).cuda_limits(index)


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _where(inputs: Inputs) -> dict[str, int]:
    """Stream and device of a call."""
    index = _index(inputs.device)
    stream = torch.cuda.current_stream(index).cuda_stream if inputs.device.type == "cuda" else 0
    return {"stream": stream, "device": index}


def _exact(inputs: Inputs) -> bool:
    """Whether every item has the longest sides, so that one launch serves them all."""
    return not inputs.packed and inputs.lengths_a is None and inputs.lengths_b is None


def _sizes(inputs: Inputs) -> tuple[int, int]:
    """The longest sides, null points counted."""
    null = inputs.kind == "null"
    return inputs.max_a + null, inputs.max_b + null


def _classes(inputs: Inputs) -> list[dict]:
    """The size classes of the forward, smallest first."""
    return _module(inputs.device).cuda_classes("forward", _limits(inputs.device))


def _bytes(inputs: Inputs, number: int, n: int, m: int) -> int:
    """Shared memory that an item of n x m takes in a size class."""
    wide, directions = inputs.compute_dtype == torch.float64, inputs.metric == "cosine"
    return _module(inputs.device).cuda_bytes("forward", _limits(inputs.device), number, wide, n, m, directions)


def _size_class(inputs: Inputs) -> int:
    """The number of the class of the largest item, -1 where none holds it."""
    wide, directions = inputs.compute_dtype == torch.float64, inputs.metric == "cosine"
    return _class_of(inputs.device.type, _limits(inputs.device), wide, directions, *_sizes(inputs))


# Every call asks for this and the next one, and the answers take a dozen calls of the native module.
@functools.lru_cache(maxsize=4096)
def _class_of(device_type: str, limits: tuple[int, int], wide: bool, directions: bool, n: int, m: int) -> int:
    if n == 0 or m == 0:
        return 0
    module = _module(torch.device(device_type))
    for number, found in enumerate(module.cuda_classes("forward", limits)):
        if module.cuda_bytes("forward", limits, number, wide, n, m, directions) <= found["bytes"]:
            return number
    return -1


def _plan_fits(inputs: Inputs) -> bool:
    """Whether rows of the plan fit, and columns: what every gradient needs."""
    wide, directions = inputs.compute_dtype == torch.float64, inputs.metric == "cosine"
    sides = (max(1, inputs.max_a), max(1, inputs.max_b))
    return all(_rows_fit(inputs.device.type, _limits(inputs.device), wide, side, directions) for side in sides)


@functools.lru_cache(maxsize=4096)
def _rows_fit(device_type: str, limits: tuple[int, int], wide: bool, columns: int, directions: bool) -> bool:
    rows, _ = _module(torch.device(device_type)).cuda_plan_rows(limits, wide, 1, columns, 1, directions)
    return rows > 0


def _largest_square(inputs: Inputs) -> int:
    number, limit = len(_classes(inputs)) - 1, _classes(inputs)[-1]["bytes"]
    low, high = 1, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _bytes(inputs, number, middle, middle) <= limit else (low, middle)
    return low


def forward(
    inputs: Inputs,
    g_init: Tensor | None,
    max_iter: int,
    tol: float,
    schedule: Schedule | None = None,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sinkhorn iterations; the values, potentials, multipliers, marginal errors and iteration counts of the batch."""
    if check:
        check_points(inputs)
    problem, alive = native_problem(inputs)
    g_init = contiguous(g_init)
    schedule = schedule or Schedule()
    eps_start = contiguous(schedule.eps_start)
    value, marginal_error = torch.empty_like(alive.reg), torch.empty_like(alive.reg)
    f, g = new_rows(inputs, True, inputs.shape_f), new_rows(inputs, False, inputs.shape_g)
    multipliers = alive.reg.new_empty((inputs.batch, 2))
    n_iters = torch.empty(inputs.batch, dtype=torch.int32, device=inputs.device)
    _module(inputs.device).cuda_forward(
        problem,
        g_init=address_of(g_init),
        eps_start=address_of(eps_start),
        eps_factor=schedule.eps_factor,
        max_iter=max_iter,
        tol=tol,
        value=value.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        multipliers=multipliers.data_ptr(),
        marginal_error=marginal_error.data_ptr(),
        n_iters=n_iters.data_ptr(),
        exact_sizes=_exact(inputs),
        log_domain_only=LOG_DOMAIN_ONLY,
        limits=_limits(inputs.device),
        **_where(inputs),
    )
    return value, f, g, multipliers, marginal_error, n_iters


def symmetric(
    inputs: Inputs,
    eps_start: Tensor,
    n_steps: Tensor,
    eps_factor: float,
    cost_floor: float,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(s_a, s_b, f, g, r_a, r_b) of GeomLoss's loop: the potentials f and g after the ladder, their soft minima at
    ``reg``, and the sums of shares that belong to those, which are 1 but for rounding.
    """
    if check:
        check_points(inputs)
    problem, alive = native_problem(inputs)
    eps_start, n_steps = eps_start.to(alive.reg.dtype).contiguous(), n_steps.to(torch.int32).contiguous()
    s_a, f, r_a = (new_rows(inputs, True, inputs.shape_f) for _ in range(3))
    s_b, g, r_b = (new_rows(inputs, False, inputs.shape_g) for _ in range(3))
    _module(inputs.device).cuda_symmetric(
        problem,
        eps_start=eps_start.data_ptr(),
        n_steps=n_steps.data_ptr(),
        eps_factor=eps_factor,
        cost_floor=cost_floor,
        s_a=s_a.data_ptr(),
        s_b=s_b.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        r_a=r_a.data_ptr(),
        r_b=r_b.data_ptr(),
        exact_sizes=_exact(inputs),
        limits=_limits(inputs.device),
        **_where(inputs),
    )
    return s_a, s_b, f, g, r_a, r_b


def backward(inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """(dx_a, dx_b, dcost) at fixed potentials, times dvalue, and (ratio_a, ratio_b, entropy), not times dvalue.

    None where not needed; where dvalue is 0, everything is.
    """
    problem, alive = native_problem(inputs)
    f, g, dvalue = f.contiguous(), g.contiguous(), dvalue.contiguous()
    grads, terms = new_gradients(inputs, needs), _terms(inputs, needs)
    names = ("dx_a", "dx_b", "dcost", "ratio_a", "ratio_b", "entropy")
    _module(inputs.device).cuda_backward(
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        dvalue=dvalue.data_ptr(),
        **{name: address_of(grad) for name, grad in zip(names, grads, strict=True)},
        terms_reg=address_of(terms),
        limits=_limits(inputs.device),
        **_where(inputs),
    )
    del alive
    return grads


def plan_backward(
    inputs: Inputs, f: Tensor, g: Tensor, weights: PlanWeights, needs: Needs
) -> tuple[Tensor | None, ...]:
    """(dx_a, dx_b, dcost, sum_a, sum_b, sum_reg): sums over the plan with given weights; None where not needed."""
    problem, alive = native_problem(inputs)
    f, g, weights = f.contiguous(), g.contiguous(), PlanWeights(*map(contiguous, weights))
    grads, terms = new_gradients(inputs, needs), _terms(inputs, needs)
    names = ("dx_a", "dx_b", "dcost", "sum_a", "sum_b", "sum_reg")
    _module(inputs.device).cuda_plan_backward(
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        **{name: address_of(weight) for name, weight in weights._asdict().items()},
        **{name: address_of(grad) for name, grad in zip(names, grads, strict=True)},
        terms_reg=address_of(terms),
        limits=_limits(inputs.device),
        **_where(inputs),
    )
    del alive
    return grads


def _terms(inputs: Inputs, needs: Needs) -> Tensor | None:
    """Scratch for the rows' terms of the sum for reg."""
    return new_rows(inputs, True, inputs.shape_f) if needs[4] else None


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
    """The adjoint of the fixed point: p, q, the relative residuals and the iterations of conjugate gradients."""
    problem, alive = native_problem(inputs)
    vectors = {"f": f, "g": g, "slope_a": slope_a, "slope_b": slope_b}
    vectors |= {"extra_a": extra_a, "extra_b": extra_b, "u_a": u_a, "u_b": u_b}
    vectors = {name: contiguous(vector) for name, vector in vectors.items()}
    p, q = new_rows(inputs, True, inputs.shape_f), new_rows(inputs, False, inputs.shape_g)
    residual = torch.empty_like(alive.reg)
    n_iters = torch.empty(inputs.batch, dtype=torch.int32, device=inputs.device)
    _module(inputs.device).cuda_implicit(
        problem,
        **{name: address_of(vector) for name, vector in vectors.items()},
        singular=singular,
        tol=tol,
        max_iter=max_iter,
        p=p.data_ptr(),
        q=q.data_ptr(),
        residual=residual.data_ptr(),
        n_iters=n_iters.data_ptr(),
        exact_sizes=_exact(inputs),
        limits=_limits(inputs.device),
        **_where(inputs),
    )
    return p, q, residual, n_iters


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    """P @ v, P^T @ v, or with ``times_cost`` the same with P * C; v and the result have the compute dtype."""
    problem, alive = native_problem(inputs)
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    shape = inputs.shape_g if transpose else inputs.shape_f
    out = new_rows(inputs, not transpose, (*shape, v.shape[-1]))
    _apply(inputs, problem, f, g, v=v, out=out, channels=v.shape[-1], transpose=transpose, times_cost=times_cost)
    del alive
    return out


def plan(inputs: Inputs, f: Tensor, g: Tensor) -> Tensor:
    """The dense plans (B, max_a, max_b), 0 in the padding."""
    problem, alive = native_problem(inputs)
    f, g = f.contiguous(), g.contiguous()
    out = torch.zeros((inputs.batch, inputs.max_a, inputs.max_b), dtype=inputs.compute_dtype, device=inputs.device)
    _apply(inputs, problem, f, g, plan=out)
    del alive
    return out


def _apply(
    inputs: Inputs,
    problem,
    f: Tensor,
    g: Tensor,
    v: Tensor | None = None,
    out: Tensor | None = None,
    plan: Tensor | None = None,
    channels: int = 0,
    transpose: bool = False,
    times_cost: bool = False,
) -> None:
    _module(inputs.device).cuda_apply(
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        v=address_of(v),
        out=address_of(out),
        plan=address_of(plan),
        channels=channels,
        transpose=transpose,
        times_cost=times_cost,
        limits=_limits(inputs.device),
        **_where(inputs),
    )
