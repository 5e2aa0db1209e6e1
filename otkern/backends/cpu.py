"""The CPU backend: torch-free C++ kernels (``csrc/cpu``), called with addresses, strides and sizes.

Every item's result is the same to the last bit for any number of threads, alone or in a batch, padded or packed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from otkern.backends.native import DTYPES, Needs, address_of, contiguous, native_problem, new_gradients, new_rows
from otkern.problem import Inputs, PlanWeights, Schedule, non_finite_points

_ARGUMENTS = ("X_a", "X_b", "M")

# The cost of an item up to this size is kept during the iterations, with as much again for the kernel; so is the plan
# of the implicit gradient. A larger one is computed again from the points in every iteration, and memory stays linear
# in its rows and columns.
STORE_BYTES = 256 << 20


@functools.cache
def missing() -> str | None:
    """Why the native module is not there, in one sentence; None if it is."""
    try:
        import otkern._native  # noqa: F401
    except ImportError as error:
        return f"the native module cannot be imported ({error}); reinstall otkern where a C++ compiler is found"
    return None


def can_run(inputs: Inputs, schedule: Schedule | None = None) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if inputs.device.type != "cpu":
        return f"the cpu backend takes CPU tensors, not {inputs.device.type} tensors"
    if inputs.primary.dtype not in DTYPES:
        return f"the cpu backend takes float64, float32, bfloat16 and float16, not {inputs.primary.dtype}"
    if schedule is not None and (schedule.update != "alternating" or schedule.overrelaxation != 1):
        return "the cpu backend iterates with update='alternating' and overrelaxation=1 only"
    return missing()


def regime(inputs: Inputs, schedule: Schedule | None = None) -> str:
    """What is done with problems of this size, in a sentence."""
    entries = inputs.max_a * inputs.max_b
    size = entries * (8 if inputs.compute_dtype == torch.float64 else 4)
    threads = torch.get_num_threads()
    if size <= STORE_BYTES:
        kept = f"the largest cost, {inputs.max_a} x {inputs.max_b}, is formed once and kept ({size >> 10} KiB)"
    else:
        kept = f"costs above {STORE_BYTES >> 20} MiB are formed again in each iteration, in panels"
    return (
        f"{_native_level()} kernels on at most {threads} threads; {kept}; iterations by multiply-adds on exp(-C / reg)"
    )


def _native_level() -> str:
    from otkern import _native

    return _native.cpu_level()


def forward(
    inputs: Inputs,
    g_init: Tensor | None,
    max_iter: int,
    tol: float,
    schedule: Schedule | None = None,
    check: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sinkhorn iterations; the values, potentials, multipliers, marginal errors and iteration counts of the batch.

    Raises:
        ValueError: ``check`` is set and a point is not finite, or a cost is NaN or -inf, within the true length.
    """
    from otkern import _native

    problem, alive = native_problem(inputs)
    g_init = contiguous(g_init)
    schedule = schedule or Schedule()
    eps_start = contiguous(schedule.eps_start)
    value, marginal_error = torch.empty_like(alive.reg), torch.empty_like(alive.reg)
    f, g = new_rows(inputs, True, inputs.shape_f), new_rows(inputs, False, inputs.shape_g)
    multipliers = alive.reg.new_empty((inputs.batch, 2))
    n_iters = torch.empty(inputs.batch, dtype=torch.int32, device="cpu")
    bad = _native.cpu_forward(
        problem,
        g_init=address_of(g_init),
        eps_start=address_of(eps_start),
        eps_factor=schedule.eps_factor,
        max_iter=max_iter,
        tol=tol,
        check=check,
        store_bytes=STORE_BYTES,
        value=value.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        multipliers=multipliers.data_ptr(),
        marginal_error=marginal_error.data_ptr(),
        n_iters=n_iters.data_ptr(),
        threads=torch.get_num_threads(),
    )
    _refuse(bad)
    return value, f, g, multipliers, marginal_error, n_iters


def _refuse(bad: tuple[int, int] | None) -> None:
    """Raise for the first item, and its argument, that a kernel found bad."""
    if bad is not None:
        item, argument = bad
        raise non_finite_points(_ARGUMENTS[argument], item)


def symmetric(
    inputs: Inputs,
    eps_start: Tensor,
    n_steps: Tensor,
    eps_factor: float,
    cost_floor: float,
    check: bool = True,
) -> tuple[Tensor, ...]:
    """(s_a, s_b, f, g, r_a, r_b) of GeomLoss's loop: the potentials f and g after the ladder, their soft minima at
    ``reg``, and the sums of shares that belong to those, which are 1 but for rounding.

    Raises:
        ValueError: as `forward` does.
    """
    from otkern import _native

    problem, alive = native_problem(inputs)
    eps_start, n_steps = eps_start.to(alive.reg.dtype).contiguous(), n_steps.to(torch.int32).contiguous()
    s_a, f, r_a = (new_rows(inputs, True, inputs.shape_f) for _ in range(3))
    s_b, g, r_b = (new_rows(inputs, False, inputs.shape_g) for _ in range(3))
    bad = _native.cpu_symmetric(
        problem,
        eps_start=eps_start.data_ptr(),
        n_steps=n_steps.data_ptr(),
        eps_factor=eps_factor,
        cost_floor=cost_floor,
        check=check,
        store_bytes=STORE_BYTES,
        s_a=s_a.data_ptr(),
        s_b=s_b.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        r_a=r_a.data_ptr(),
        r_b=r_b.data_ptr(),
        threads=torch.get_num_threads(),
    )
    _refuse(bad)
    return s_a, s_b, f, g, r_a, r_b


def backward(inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """(dx_a, dx_b, dcost) at fixed potentials, times dvalue, and (ratio_a, ratio_b, entropy), not times dvalue.

    None where not needed; where dvalue is 0, everything is.
    """
    from otkern import _native

    problem, alive = native_problem(inputs)
    f, g, dvalue = f.contiguous(), g.contiguous(), dvalue.contiguous()
    grads = new_gradients(inputs, needs)
    names = ("dx_a", "dx_b", "dcost", "ratio_a", "ratio_b", "entropy")
    _native.cpu_backward(
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        dvalue=dvalue.data_ptr(),
        **{name: address_of(grad) for name, grad in zip(names, grads, strict=True)},
        threads=torch.get_num_threads(),
    )
    del alive
    return grads


def plan_backward(
    inputs: Inputs, f: Tensor, g: Tensor, weights: PlanWeights, needs: Needs
) -> tuple[Tensor | None, ...]:
    """(dx_a, dx_b, dcost, sum_a, sum_b, sum_reg): sums over the plan with given weights; None where not needed."""
    from otkern import _native

    problem, alive = native_problem(inputs)
    f, g, weights = f.contiguous(), g.contiguous(), PlanWeights(*map(contiguous, weights))
    grads = new_gradients(inputs, needs)
    names = ("dx_a", "dx_b", "dcost", "sum_a", "sum_b", "sum_reg")
    _native.cpu_plan_backward(
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        **{name: address_of(weight) for name, weight in weights._asdict().items()},
        **{name: address_of(grad) for name, grad in zip(names, grads, strict=True)},
        threads=torch.get_num_threads(),
    )
    del alive
    return grads


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
    from otkern import _native

    problem, alive = native_problem(inputs)
    vectors = {"f": f, "g": g, "slope_a": slope_a, "slope_b": slope_b}
    vectors |= {"extra_a": extra_a, "extra_b": extra_b, "u_a": u_a, "u_b": u_b}
    vectors = {name: contiguous(vector) for name, vector in vectors.items()}
    p, q = new_rows(inputs, True, inputs.shape_f), new_rows(inputs, False, inputs.shape_g)
    residual, n_iters = torch.empty_like(alive.reg), torch.empty(inputs.batch, dtype=torch.int32, device="cpu")
    _native.cpu_implicit(
        problem,
        **{name: address_of(vector) for name, vector in vectors.items()},
        singular=singular,
        tol=tol,
        max_iter=max_iter,
        store_bytes=STORE_BYTES,
        p=p.data_ptr(),
        q=q.data_ptr(),
        residual=residual.data_ptr(),
        n_iters=n_iters.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return p, q, residual, n_iters


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    """P @ v, or P^T @ v; with ``times_cost`` the elementwise product of P and C in place of P."""
    from otkern import _native

    problem, alive = native_problem(inputs)
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    shape = (*(inputs.shape_g if transpose else inputs.shape_f), v.shape[-1])
    out = new_rows(inputs, not transpose, shape)
    _native.cpu_apply(
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        channels=v.shape[-1],
        transpose=transpose,
        times_cost=times_cost,
        threads=torch.get_num_threads(),
    )
    del alive
    return out


def plan(inputs: Inputs, f: Tensor, g: Tensor) -> Tensor:
    """The dense plans (B, max_a, max_b), 0 in the padding."""
    from otkern import _native

    problem, alive = native_problem(inputs)
    f, g = f.contiguous(), g.contiguous()
    out = torch.empty((inputs.batch, inputs.max_a, inputs.max_b), dtype=inputs.compute_dtype, device="cpu")
    _native.cpu_plan(problem, f=f.data_ptr(), g=g.data_ptr(), out=out.data_ptr(), threads=torch.get_num_threads())
    del alive
    return out
