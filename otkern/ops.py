"""The torch.library ops: schema, fake kernels, autograd. The only place that knows autograd.

``otkern::sinkhorn`` solves a batch, ``otkern::sinkhorn_backward`` is its envelope gradient, and
``otkern::apply_plan`` multiplies by the plan. Each calls the function of that name in the backend's module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otkern import backends
from otkern.problem import Inputs, check_values, check_warm_start

_PROBLEM = (
    "Tensor? x_a, Tensor? x_b, Tensor? cost, Tensor? a, Tensor? b, Tensor reg, "
    "Tensor? lengths_a, Tensor? lengths_b, Tensor? cu_seqlens_a, Tensor? cu_seqlens_b, "
    "SymInt max_a, SymInt max_b, str metric"
)
_N_PROBLEM = len(Inputs._fields)

_library = torch.library.Library("otkern", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library.define(
    f"sinkhorn({_PROBLEM}, Tensor? g_init, int max_iter, float tol, bool check, str backend)"
    " -> (Tensor value, Tensor f, Tensor g, Tensor marginal_error, Tensor n_iters)",
    tags=_tags,
)
_library.define(
    f"sinkhorn_backward({_PROBLEM}, Tensor f, Tensor g, Tensor dvalue, bool[] needs, str backend)"
    " -> (Tensor dx_a, Tensor dx_b, Tensor dcost, Tensor da, Tensor db, Tensor dreg)",
    tags=_tags,
)
_library.define(
    f"apply_plan({_PROBLEM}, Tensor f, Tensor g, Tensor v, bool transpose, bool times_cost, str backend) -> Tensor",
    tags=_tags,
)


def sinkhorn(inputs: Inputs, g_init: Tensor | None, max_iter: int, tol: float | None, check: bool, backend: str):
    """(value, f, g, marginal_error, n_iters) of a batch; ``value`` carries the envelope gradient."""
    return torch.ops.otkern.sinkhorn(*inputs, g_init, max_iter, -1.0 if tol is None else tol, check, backend)


def apply_plan(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool, backend: str):
    """P @ v or P^T @ v, with ``times_cost`` (P o C) @ v; differentiable with respect to v."""
    return torch.ops.otkern.apply_plan(*inputs, f, g, v, transpose, times_cost, backend)


def _serving(inputs: Inputs, name: str):
    backend = backends.load(name)
    if (reason := backend.can_run(inputs)) is not None:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
    return backend


def _sinkhorn(*args):
    inputs, (g_init, max_iter, tol, check, name) = Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]
    backend = _serving(inputs, name)
    if check:
        # Inside the op, where data may be read without breaking a compiled graph.
        check_values(inputs)
        check_warm_start(inputs, g_init)
    return backend.forward(inputs, g_init, max_iter, tol, check)


def _sinkhorn_fake(*args):
    inputs = Inputs(*args[:_N_PROBLEM])
    new, dtype = inputs.primary.new_empty, inputs.compute_dtype
    value, marginal_error = new((inputs.batch,), dtype=dtype), new((inputs.batch,), dtype=dtype)
    f, g = new(inputs.shape_f, dtype=dtype), new(inputs.shape_g, dtype=dtype)
    return value, f, g, marginal_error, new((inputs.batch,), dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    value, f, g, marginal_error, n_iters = output
    problem = Inputs(*inputs[:_N_PROBLEM])
    ctx.mark_non_differentiable(f, g, marginal_error, n_iters)
    ctx.save_for_backward(*problem[:10], f, g, value)
    ctx.sizes, ctx.backend = problem[10:], inputs[-1]


def _sinkhorn_backward_formula(ctx, dvalue, *_):
    *tensors, f, g, value = ctx.saved_tensors
    inputs = Inputs(*tensors, *ctx.sizes)
    need = ctx.needs_input_grad
    needs = [need[0], need[1], need[2], need[3] or need[4], need[5]]
    # A problem without a feasible plan has a constant value, +inf, around it.
    dvalue = torch.where(torch.isfinite(value), dvalue, 0).contiguous()
    grads = torch.ops.otkern.sinkhorn_backward(*inputs, f, g, dvalue, needs, ctx.backend)
    grads = [grad if need[i] else None for i, grad in enumerate(grads)]
    return (*grads, *(None for _ in range(len(need) - len(grads))))


def _sinkhorn_backward(*args):
    inputs, (f, g, dvalue, needs, name) = Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]
    grads = _serving(inputs, name).backward(inputs, f, g, dvalue, tuple(needs))
    # A schema cannot say "Tensor or None" for an output: what is not needed is an empty tensor.
    return tuple(f.new_empty(0) if grad is None else grad for grad in grads)


def _sinkhorn_backward_fake(*args):
    inputs, (f, g, _, needs, _) = Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]
    wanted = (
        inputs.x_a if needs[0] else None,
        inputs.x_b if needs[1] else None,
        inputs.cost if needs[2] else None,
        f if needs[3] and inputs.a is not None else None,
        g if needs[3] and inputs.b is not None else None,
        inputs.reg if needs[4] else None,
    )
    return tuple(f.new_empty(0) if like is None else like.new_empty(like.shape) for like in wanted)


def _apply_plan(*args):
    inputs, (f, g, v, transpose, times_cost, name) = Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]
    return _serving(inputs, name).apply(inputs, f, g, v, transpose, times_cost)


def _apply_plan_fake(*args):
    inputs, (f, _, v, transpose, _, _) = Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]
    return f.new_empty((*(inputs.shape_g if transpose else inputs.shape_f), v.shape[-1]))


def _apply_plan_setup(ctx, inputs, output):
    problem, (f, g, _, transpose, times_cost, backend) = Inputs(*inputs[:_N_PROBLEM]), inputs[_N_PROBLEM:]
    ctx.save_for_backward(*problem[:10], f, g)
    ctx.sizes, ctx.rest = problem[10:], (not transpose, times_cost, backend)


def _apply_plan_backward_formula(ctx, dout):
    *tensors, f, g = ctx.saved_tensors
    transpose, times_cost, backend = ctx.rest
    dv = apply_plan(Inputs(*tensors, *ctx.sizes), f, g, dout.contiguous(), transpose, times_cost, backend)
    return (*(None for _ in range(_N_PROBLEM + 2)), dv, None, None, None)


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "second derivatives of an entropic OT value need the implicit gradient, which this release does not have"
    )


_library.impl("sinkhorn", _sinkhorn, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _sinkhorn_backward, "CompositeExplicitAutograd")
_library.impl("apply_plan", _apply_plan, "CompositeExplicitAutograd")
torch.library.register_fake("otkern::sinkhorn", _sinkhorn_fake, lib=_library)
torch.library.register_fake("otkern::sinkhorn_backward", _sinkhorn_backward_fake, lib=_library)
torch.library.register_fake("otkern::apply_plan", _apply_plan_fake, lib=_library)
torch.library.register_autograd(
    "otkern::sinkhorn", _sinkhorn_backward_formula, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("otkern::sinkhorn_backward", _refuse_second_derivative, lib=_library)
torch.library.register_autograd(
    "otkern::apply_plan", _apply_plan_backward_formula, setup_context=_apply_plan_setup, lib=_library
)
