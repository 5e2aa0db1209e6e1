"""The torch.library ops: schema, fake kernels, autograd. The only place that knows autograd.

``otkern::sinkhorn`` solves a batch, ``otkern::sinkhorn_backward`` is its envelope gradient, and
``otkern::apply_plan`` multiplies by the plan, ``otkern::plan`` writes it out. Each calls a function of the backend's
module.
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


_library.define(f"plan({_PROBLEM}, Tensor f, Tensor g, str backend) -> Tensor", tags=_tags)


def sinkhorn(inputs: Inputs, g_init: Tensor | None, max_iter: int, tol: float | None, check: bool, backend: str):
    """(value, f, g, marginal_error, n_iters) of a batch; ``value`` carries the envelope gradient."""
    return torch.ops.otkern.sinkhorn(*inputs, g_init, max_iter, -1.0 if tol is None else tol, check, backend)


def apply_plan(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool, backend: str):
    """P @ v or P^T @ v, with ``times_cost`` (P o C) @ v; differentiable with respect to v."""
    return torch.ops.otkern.apply_plan(*inputs, f, g, v, transpose, times_cost, backend)


def plan(inputs: Inputs, f: Tensor, g: Tensor, backend: str):
    """The dense plans (B, max_a, max_b), 0 in the padding; not differentiable."""
    return torch.ops.otkern.plan(*inputs, f, g, backend)


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


class _Sinkhorn(torch.autograd.Function):
    """The op below autograd, and its envelope gradient."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            value, f, g, marginal_error, n_iters = _sinkhorn_op(*args)
        ctx.mark_non_differentiable(f, g, marginal_error, n_iters)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:10], f, g, value)
        ctx.sizes, ctx.backend = args[10:_N_PROBLEM], args[-1]
        return value, f, g, marginal_error, n_iters

    @staticmethod
    def backward(ctx, dvalue, *_):
        need = ctx.needs_input_grad
        nothing = (None,) * len(need)
        if dvalue is None:
            return nothing
        *tensors, f, g, value = ctx.saved_tensors
        inputs = Inputs(*tensors, *ctx.sizes)
        needs = [need[0], need[1], need[2], need[3] or need[4], need[5]]
        # A problem without a feasible plan has a constant value, +inf, around it.
        dvalue = torch.where(torch.isfinite(value), dvalue, 0).contiguous()
        grads = torch.ops.otkern.sinkhorn_backward(*inputs, f, g, dvalue, needs, ctx.backend)
        return (*(grad if need[i] else None for i, grad in enumerate(grads)), *nothing[len(grads) :])


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


def _plan(*args):
    inputs, (f, g, name) = Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]
    return _serving(inputs, name).plan(inputs, f, g)


def _plan_fake(*args):
    inputs, (f, _, _) = Inputs(*args[:_N_PROBLEM]), args[_N_PROBLEM:]
    return f.new_empty((inputs.batch, inputs.max_a, inputs.max_b))


class _ApplyPlan(torch.autograd.Function):
    """The op below autograd; differentiable with respect to v, of which it is a linear map."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out = _apply_plan_op(*args)
        f, g, _, transpose, times_cost, backend = args[_N_PROBLEM:]
        ctx.save_for_backward(*args[:10], f, g)
        ctx.sizes, ctx.rest = args[10:_N_PROBLEM], (not transpose, times_cost, backend)
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, f, g = ctx.saved_tensors
        dv = apply_plan(Inputs(*tensors, *ctx.sizes), f, g, dout.contiguous(), *ctx.rest)
        return (*(None for _ in range(_N_PROBLEM + 2)), dv, None, None, None)


class _SinkhornBackward(torch.autograd.Function):
    """The gradient below autograd, with a backward that raises."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return _sinkhorn_backward_op(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "second derivatives of an entropic OT value need the implicit gradient, which this release does not have"
        )


_library.impl("sinkhorn", _sinkhorn, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _sinkhorn_backward, "CompositeExplicitAutograd")
_library.impl("apply_plan", _apply_plan, "CompositeExplicitAutograd")
_library.impl("plan", _plan, "CompositeExplicitAutograd")
torch.library.register_fake("otkern::sinkhorn", _sinkhorn_fake, lib=_library)
torch.library.register_fake("otkern::sinkhorn_backward", _sinkhorn_backward_fake, lib=_library)
torch.library.register_fake("otkern::apply_plan", _apply_plan_fake, lib=_library)
torch.library.register_fake("otkern::plan", _plan_fake, lib=_library)
# Kernels of the autograd key, and not torch.library.register_autograd: that reads the schema anew in every call, which
# takes longer than a small problem.
for _name, _function in (
    ("sinkhorn", _Sinkhorn),
    ("sinkhorn_backward", _SinkhornBackward),
    ("apply_plan", _ApplyPlan),
):
    _library.impl(_name, _function.apply, "Autograd")
_sinkhorn_op, _sinkhorn_backward_op, _apply_plan_op = (
    torch.ops.otkern.sinkhorn.default,
    torch.ops.otkern.sinkhorn_backward.default,
    torch.ops.otkern.apply_plan.default,
)
