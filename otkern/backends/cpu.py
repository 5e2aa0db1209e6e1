"""The CPU backend: torch-free C++ kernels (``csrc/cpu``), called with addresses, strides and sizes.

Every item's result is the same to the last bit for any number of threads, alone or in a batch, padded or packed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from otkern.problem import Inputs, non_finite_points

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_METRICS = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2, "dot": 3, "cost": 4}
_ARGUMENTS = ("X_a", "X_b", "M")

# The cost of an item up to this size is kept during the iterations, with as much again for the kernel. A larger one is
# computed again from the points in every iteration, and memory stays linear in its rows and columns.
STORE_BYTES = 256 << 20


@functools.cache
def missing() -> str | None:
    """Why the native module is not there, in one sentence; None if it is."""
    try:
        import otkern._native  # noqa: F401
    except ImportError as error:
        return f"the native module cannot be imported ({error}); reinstall otkern where a C++ compiler is found"
    return None


def can_run(inputs: Inputs) -> str | None:
    """None if this backend serves the call, else one sentence that says why not."""
    if inputs.device.type != "cpu":
        return f"the cpu backend takes CPU tensors, not {inputs.device.type} tensors"
    if inputs.primary.dtype not in _DTYPES:
        return f"the cpu backend takes float64, float32, bfloat16 and float16, not {inputs.primary.dtype}"
    return missing()


def forward(
    inputs: Inputs, g_init: Tensor | None, max_iter: int, tol: float, check: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sinkhorn iterations; the values, potentials, marginal errors and iteration counts of the batch.

    Raises:
        ValueError: ``check`` is set and a point is not finite, or a cost is NaN or -inf, within the true length.
    """
    from otkern import _native

    problem, alive = _problem(inputs)
    g_init = None if g_init is None else g_init.contiguous()
    value, marginal_error = torch.empty_like(alive.reg), torch.empty_like(alive.reg)
    f, g = _empty(inputs, True, inputs.shape_f), _empty(inputs, False, inputs.shape_g)
    n_iters = torch.empty(inputs.batch, dtype=torch.int32)
    bad = _native.cpu_forward(
        problem,
        g_init=_address(g_init),
        max_iter=max_iter,
        tol=tol,
        check=check,
        store_bytes=STORE_BYTES,
        value=value.data_ptr(),
        f=f.data_ptr(),
        g=g.data_ptr(),
        marginal_error=marginal_error.data_ptr(),
        n_iters=n_iters.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if bad is not None:
        item, argument = bad
        raise non_finite_points(_ARGUMENTS[argument], item)
    return value, f, g, marginal_error, n_iters


def backward(
    inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: tuple[bool, bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """The partial derivatives of the dual objective at fixed potentials, times dvalue; None where not needed."""
    from otkern import _native

    needs_a, needs_b, needs_cost, needs_weights, needs_reg = needs
    problem, alive = _problem(inputs)
    f, g, dvalue = f.contiguous(), g.contiguous(), dvalue.contiguous()
    dtype = inputs.primary.dtype
    dx_a = _empty(inputs, True, inputs.x_a.shape, dtype) if needs_a else None
    dx_b = _empty(inputs, False, inputs.x_b.shape, dtype) if needs_b else None
    dcost = torch.empty(inputs.cost.shape, dtype=dtype) if needs_cost else None
    da = _empty(inputs, True, inputs.shape_f) if needs_weights and inputs.a is not None else None
    db = _empty(inputs, False, inputs.shape_g) if needs_weights and inputs.b is not None else None
    dreg = torch.empty_like(alive.reg) if needs_reg else None
    _native.cpu_backward(
        problem,
        f=f.data_ptr(),
        g=g.data_ptr(),
        dvalue=dvalue.data_ptr(),
        dx_a=_address(dx_a),
        dx_b=_address(dx_b),
        dcost=_address(dcost),
        da=_address(da),
        db=_address(db),
        dreg=_address(dreg),
        threads=torch.get_num_threads(),
    )
    return dx_a, dx_b, dcost, da, db, dreg


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    """P @ v, or P^T @ v; with ``times_cost`` the elementwise product of P and C in place of P."""
    from otkern import _native

    problem, alive = _problem(inputs)
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    shape = (*(inputs.shape_g if transpose else inputs.shape_f), v.shape[-1])
    out = _empty(inputs, not transpose, shape)
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

    problem, alive = _problem(inputs)
    f, g = f.contiguous(), g.contiguous()
    out = torch.empty((inputs.batch, inputs.max_a, inputs.max_b), dtype=inputs.compute_dtype)
    _native.cpu_plan(problem, f=f.data_ptr(), g=g.data_ptr(), out=out.data_ptr(), threads=torch.get_num_threads())
    del alive
    return out


def _problem(inputs: Inputs):
    """The native description of ``inputs``, and the tensors its addresses point into, which must outlive it."""
    from otkern import _native

    alive = inputs._replace(
        a=_contiguous(inputs.a),
        b=_contiguous(inputs.b),
        reg=inputs.reg.contiguous(),
        lengths_a=_contiguous(inputs.lengths_a),
        lengths_b=_contiguous(inputs.lengths_b),
        cu_seqlens_a=_contiguous(inputs.cu_seqlens_a),
        cu_seqlens_b=_contiguous(inputs.cu_seqlens_b),
    )
    problem = _native.Problem(
        batch=inputs.batch,
        max_a=inputs.max_a,
        max_b=inputs.max_b,
        total_a=inputs.shape_f[0] if inputs.packed else 0,
        total_b=inputs.shape_g[0] if inputs.packed else 0,
        features=0 if inputs.x_a is None else inputs.x_a.shape[-1],
        dtype=_DTYPES[inputs.primary.dtype],
        metric=_METRICS[inputs.metric],
        x_a=_matrix(inputs.x_a),
        x_b=_matrix(inputs.x_b),
        cost=_matrix(inputs.cost),
        a=_address(alive.a),
        b=_address(alive.b),
        reg=alive.reg.data_ptr(),
        lengths_a=_address(alive.lengths_a),
        lengths_b=_address(alive.lengths_b),
        cu_seqlens_a=_address(alive.cu_seqlens_a),
        cu_seqlens_b=_address(alive.cu_seqlens_b),
    )
    return problem, alive


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides (batch, row, column); a packed tensor has no batch stride."""
    if tensor is None:
        return 0, 0, 0, 0
    return (tensor.data_ptr(), 0, *tensor.stride()) if tensor.dim() == 2 else (tensor.data_ptr(), *tensor.stride())


def _empty(inputs: Inputs, side_a: bool, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Memory that the kernels fill, padding included; zeros where packed offsets leave rows to no item."""
    dtype = inputs.compute_dtype if dtype is None else dtype
    offsets = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    if offsets is not None and (int(offsets[0]) != 0 or int(offsets[-1]) != shape[0]):
        return torch.zeros(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype)
