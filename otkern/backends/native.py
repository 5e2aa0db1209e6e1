"""How the native module is told of a problem, and the memory of its results; the same for its CPU and its CUDA half."""

from __future__ import annotations

import torch
from torch import Tensor

from otkern.problem import KINDS, Inputs

Needs = tuple[bool, bool, bool, bool, bool]

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_METRICS = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2, "dot": 3, "cost": 4}


def native_problem(inputs: Inputs):
    """The native description of ``inputs``, and the tensors its addresses point into, which must outlive it."""
    from otkern import _native

    alive = inputs._replace(
        a=contiguous(inputs.a),
        b=contiguous(inputs.b),
        reg=inputs.reg.contiguous(),
        relaxation=contiguous(inputs.relaxation),
        lengths_a=contiguous(inputs.lengths_a),
        lengths_b=contiguous(inputs.lengths_b),
        cu_seqlens_a=contiguous(inputs.cu_seqlens_a),
        cu_seqlens_b=contiguous(inputs.cu_seqlens_b),
    )
    problem = _native.Problem(
        batch=inputs.batch,
        max_a=inputs.max_a,
        max_b=inputs.max_b,
        total_a=inputs.shape_f[0] if inputs.packed else 0,
        total_b=inputs.shape_g[0] if inputs.packed else 0,
        features=0 if inputs.x_a is None else inputs.x_a.shape[-1],
        dtype=DTYPES[inputs.primary.dtype],
        metric=_METRICS[inputs.metric],
        x_a=_matrix(inputs.x_a),
        x_b=_matrix(inputs.x_b),
        cost=_matrix(inputs.cost),
        a=address_of(alive.a),
        b=address_of(alive.b),
        reg=alive.reg.data_ptr(),
        kind=KINDS.index(inputs.kind),
        entropy=inputs.entropy,
        relaxation=address_of(alive.relaxation),
        lengths_a=address_of(alive.lengths_a),
        lengths_b=address_of(alive.lengths_b),
        cu_seqlens_a=address_of(alive.cu_seqlens_a),
        cu_seqlens_b=address_of(alive.cu_seqlens_b),
        n_pairs=inputs.n_pairs,
    )
    return problem, alive


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides (batch, row, column); a packed tensor has no batch stride."""
    if tensor is None:
        return 0, 0, 0, 0
    return (tensor.data_ptr(), 0, *tensor.stride()) if tensor.dim() == 2 else (tensor.data_ptr(), *tensor.stride())


def new_rows(inputs: Inputs, side_a: bool, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Memory that the kernels fill, padding included; zeros where packed offsets leave rows to no item, or may."""
    dtype = inputs.compute_dtype if dtype is None else dtype
    offsets = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    # Those of an accelerator cannot be read without waiting for it.
    full = offsets is None or (offsets.device.type == "cpu" and int(offsets[0]) == 0 and int(offsets[-1]) == shape[0])
    return (torch.empty if full else torch.zeros)(shape, dtype=dtype, device=inputs.device)


def new_gradients(inputs: Inputs, needs: Needs) -> tuple[Tensor | None, ...]:
    """Memory for what `backward` and `plan_backward` return."""
    needs_a, needs_b, needs_cost, needs_sums, needs_reg = needs
    dtype = inputs.primary.dtype
    return (
        new_rows(inputs, True, inputs.x_a.shape, dtype) if needs_a else None,
        new_rows(inputs, False, inputs.x_b.shape, dtype) if needs_b else None,
        torch.empty(inputs.cost.shape, dtype=dtype, device=inputs.device) if needs_cost else None,
        new_rows(inputs, True, inputs.shape_f) if needs_sums else None,
        new_rows(inputs, False, inputs.shape_g) if needs_sums else None,
        inputs.reg.new_empty(inputs.batch) if needs_reg else None,
    )
