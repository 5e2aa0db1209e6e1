"""Debiased values: the problems (a, b), (a, a) and (b, b) as one batch.

Three times the batch is one call of the op, hence one launch, and autograd carries the gradients of all three back
through the copies made here. Of the symmetric problems only the row potentials are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkern import ops
from otkern.ops import Iterations
from otkern.problem import Inputs, check_points, check_values, cost_scale, item_sizes, masses, weights_of
from otkern.result import OTResult

if TYPE_CHECKING:
    from otkern.solve import Call


def run_debiased(call: Call) -> OTResult:
    """The result between the clouds of ``call``, with the value of equation (22)."""
    inputs, how, backend = call.inputs, call.differentiation, call.backend
    check_kind(inputs)
    differentiated = torch.is_grad_enabled() and (inputs.x_a.requires_grad or inputs.x_b.requires_grad)
    # The gradients of the three problems nearly cancel: they must meet before anything is rounded to 16 bits.
    stack = stacked(inputs.widened() if differentiated else inputs)
    iterations = _stacked_iterations(inputs, stack, call.iterations)
    value, f, g, multipliers, marginal_error, n_iters = on_stack(
        inputs, call.check, lambda: ops.sinkhorn(stack, iterations, how, call.check, backend)
    )
    if how.grad in ("implicit", "unrolled"):
        how = how._replace(iterations=iterations if how.grad == "unrolled" else None)
        wide = stack.widened()
        attached_f, attached_g, attached = ops.potentials(wide, f, g, multipliers, how, backend)
        value = ops.dual_value(wide, value, attached_f, attached_g, attached, backend)
    f, f_self, g_self = row_parts(inputs, stack, f)
    return OTResult(
        inputs=inputs,
        value=_debiased(inputs, value),
        f=f,
        g=column_part(inputs, stack, g),
        multipliers=multipliers[: inputs.batch],
        marginal_error=marginal_error.unflatten(0, (3, inputs.batch)).amax(0),
        n_iters=n_iters.unflatten(0, (3, inputs.batch)).amax(0),
        tol=call.tol,
        batched=call.batched,
        backend=backend,
        differentiation=call.differentiation,
        self_potentials=(f_self, g_self),
    )


def check_kind(inputs: Inputs) -> None:
    """Raise `NotImplementedError` for a problem of which no divergence is defined."""
    if inputs.kind in ("partial", "null"):
        name = "mass" if inputs.kind == "partial" else "null_cost"
        raise NotImplementedError(
            f"debias: no divergence is defined with {name}, where a cloud need not be matched with all of itself"
        )
    if inputs.entropy:
        raise NotImplementedError(
            'debias: no divergence is defined with unbalanced and reg_type="entropy"; use reg_type="KL"'
        )


def on_stack(inputs: Inputs, check: bool, solve: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``solve`` returns; bad values are reported of the argument and the item that the caller gave."""
    if not check or torch.compiler.is_compiling():
        return solve()
    try:
        return solve()
    except ValueError:
        check_values(inputs)
        check_points(inputs)
        raise


def stacked(inputs: Inputs) -> Inputs:
    """All problems (a, b), then all (a, a), then all (b, b): 3B items of the layout that needs no padding.

    A packed batch stays packed. A padded one stays padded, to the longer of its two sides, which is known on the host
    without reading lengths; with no lengths and sides of different sizes it becomes a packed one.
    """
    as_packed = inputs.packed or (
        inputs.lengths_a is None and inputs.lengths_b is None and inputs.max_a != inputs.max_b
    )
    longest = max(inputs.max_a, inputs.max_b)

    def side(tensor: Tensor, side_a: bool) -> Tensor:
        if inputs.packed:
            return tensor
        if as_packed:
            return tensor.flatten(0, 1)
        missing = longest - (inputs.max_a if side_a else inputs.max_b)
        return tensor if missing == 0 else torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))

    assert inputs.x_a is not None and inputs.x_b is not None  # costs cannot be debiased
    x, y = side(inputs.x_a, True), side(inputs.x_b, False)
    weights_a = weights_b = None
    if inputs.a is not None or inputs.b is not None:
        a, b = side(weights_of(inputs, True), True), side(weights_of(inputs, False), False)
        weights_a, weights_b = torch.cat([a, a, b]), torch.cat([b, a, b])
    offsets_a = offsets_b = lengths_a = lengths_b = None
    if as_packed:
        rows, columns = _offsets(inputs, True), _offsets(inputs, False)
        total_a, total_b = x.shape[0], y.shape[0]
        offsets_a = torch.cat([rows, rows[1:] + total_a, columns[1:] + 2 * total_a])
        offsets_b = torch.cat([columns, rows[1:] + total_b, columns[1:] + total_a + total_b])
    elif inputs.lengths_a is not None or inputs.lengths_b is not None:
        rows, columns = (item_sizes(inputs, side_a).to(torch.int32) for side_a in (True, False))
        lengths_a, lengths_b = torch.cat([rows, rows, columns]), torch.cat([columns, rows, columns])
    relaxation = inputs.relaxation
    if relaxation is not None:
        # By slices: a list of indices would be copied to the device, and waited for.
        relaxation = torch.cat([relaxation, *(relaxation[:, i : i + 1].expand(-1, 2) for i in (0, 1))])
    return inputs._replace(
        x_a=torch.cat([x, x, y]),
        x_b=torch.cat([y, x, y]),
        a=weights_a,
        b=weights_b,
        reg=inputs.reg.repeat(3),
        relaxation=relaxation,
        lengths_a=lengths_a,
        lengths_b=lengths_b,
        cu_seqlens_a=offsets_a,
        cu_seqlens_b=offsets_b,
        max_a=longest,
        max_b=longest,
    )


def _offsets(inputs: Inputs, side_a: bool) -> Tensor:
    offsets = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    if offsets is not None:
        return offsets
    size = inputs.max_a if side_a else inputs.max_b
    return torch.arange(inputs.batch + 1, dtype=torch.int32, device=inputs.device) * size


def row_parts(inputs: Inputs, stack: Inputs, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a number for each row of the stack: those of (a, b), of (a, a) and of (b, b), in the layout of ``inputs``."""
    if stack.packed:
        total_a = math.prod(inputs.shape_f)
        parts = rows.split([total_a, total_a, rows.shape[0] - 2 * total_a])
    else:
        parts = rows.unflatten(0, (3, inputs.batch)).unbind(0)
    return _as(inputs, True, parts[0]), _as(inputs, True, parts[1]), _as(inputs, False, parts[2])


def column_part(inputs: Inputs, stack: Inputs, columns: Tensor) -> Tensor:
    """Of one number for each column of the stack: those of (a, b), in the layout of ``inputs``."""
    first = math.prod(inputs.shape_g) if stack.packed else inputs.batch
    return _as(inputs, False, columns[:first])


def _as(inputs: Inputs, side_a: bool, part: Tensor) -> Tensor:
    shape = inputs.shape_f if side_a else inputs.shape_g
    return part.reshape(shape) if part.dim() == 1 else part[:, : shape[1]].contiguous()


def _stacked_iterations(inputs: Inputs, stack: Inputs, iterations: Iterations) -> Iterations:
    """The same for the stack: a schedule starts each problem at its own scale, a warm start is for (a, b) alone."""
    g_init, eps_start = iterations.g_init, iterations.eps_start
    if g_init is not None:
        missing = stack.max_b - inputs.max_b
        first = g_init.flatten() if stack.packed else torch.nn.functional.pad(g_init, (0, missing))
        g_init = torch.cat([first, first.new_zeros((stack.shape_g[0] - first.shape[0], *first.shape[1:]))])
    if eps_start is not None:
        eps_start = cost_scale(stack.detach())
    return iterations._replace(g_init=g_init, eps_start=eps_start)


def _debiased(inputs: Inputs, value: Tensor) -> Tensor:
    """OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + eps (sum a - sum b)^2 / 2 of the stack's values, equation (22); (B,)."""
    cross, self_a, self_b = value.unflatten(0, (3, inputs.batch)).unbind(0)
    value = cross - (self_a + self_b) / 2
    if inputs.kind == "unbalanced":
        value = value + inputs.reg * (masses(inputs, True) - masses(inputs, False)).square() / 2
    # Without a plan between the clouds it does not matter what is within them.
    return torch.where(cross.isposinf(), cross, value)
