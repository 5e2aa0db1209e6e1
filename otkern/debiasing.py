"""Debiased values: the problems (a, b), (a, a) and (b, b).

On an accelerator they are one batch of three times the items, hence one call of the op; autograd carries the gradients
of all three back through the copies made here. A CPU launches nothing, and copies of large clouds would take it longer
than solving: there each of the three is a call of its own, on the clouds as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otkern import backends, ops, precision
from otkern.ops import Iterations
from otkern.precision import Solved
from otkern.problem import Inputs, check_points, check_values, cost_scale, item_sizes, masses, weights_of
from otkern.result import OTResult

if TYPE_CHECKING:
    from otkern.calls import Call

Outputs = tuple[Tensor, ...]


def run_debiased(call: Call) -> OTResult:
    """The result between the clouds of ``call``, with the value of equation (22)."""
    inputs, how, backend = call.inputs, call.differentiation, call.backend
    check_kind(inputs)
    differentiated = torch.is_grad_enabled() and (inputs.x_a.requires_grad or inputs.x_b.requires_grad)

    def solve(problem: Inputs) -> Outputs:
        iterations = _iterations_of(inputs, problem, call.iterations)
        value, f, g, multipliers, error, n_iters = ops.sinkhorn(problem, iterations, how, call.check, backend)
        if how.grad in ("implicit", "unrolled"):
            wide = problem.widened()
            differentiation = how._replace(iterations=iterations if how.grad == "unrolled" else None)
            attached = ops.potentials(wide, f, g, multipliers, differentiation, backend)
            value = ops.dual_value(wide, value, *attached, backend)
        return value, f, g, multipliers, error, n_iters

    # The gradients of the three problems nearly cancel: they must meet before anything is rounded to 16 bits.
    wide = inputs.widened() if differentiated else inputs
    kinds = ("item", "row", "column", "item", "item", "item")
    pair, self_a, self_b = solve_three(wide, call.check, backend, solve, kinds)
    potentials = [(True, pair[1]), (False, pair[2]), (True, self_a[1]), (False, self_b[1])]
    again = call.in_float64(pair[0], potentials)
    values, errors, counts = (torch.stack([part[i] for part in (pair, self_a, self_b)]) for i in (0, 4, 5))
    return OTResult(
        inputs=inputs,
        value=_debiased(inputs, values),
        f=pair[1] if again is None else precision.without_plan(inputs, pair[1], again[0].wide),
        g=pair[2],
        multipliers=pair[3],
        marginal_error=call.error_with_rounding(errors.amax(0), potentials),
        n_iters=counts.amax(0),
        tol=call.tol,
        batched=call.batched,
        backend=backend,
        differentiation=call.differentiation,
        self_potentials=(self_a[1], self_b[1]),
        in_float64=None if again is None else Solved(again[0], run_debiased(again[1])),
    )


def solve_three(
    inputs: Inputs, check: bool, backend: str, solve: Callable[[Inputs], Outputs], kinds: tuple[str, ...]
) -> list[Outputs]:
    """What ``solve`` returns of (a, b), (a, a) and (b, b); ``kinds``: whether of each "item", "row" or "column"."""
    if not backends.launches(backend):
        return [solve(inputs), solve(within(inputs, True)), solve(within(inputs, False))]
    stack = stacked(inputs)
    outputs = _on_stack(inputs, check, lambda: solve(stack))
    parts = (_unstacked(inputs, stack, output, kind) for output, kind in zip(outputs, kinds, strict=True))
    return list(zip(*parts, strict=True))


def within(inputs: Inputs, side_a: bool) -> Inputs:
    """The problem of matching one of the clouds with itself."""
    names = [f"{name}_{'a' if side_a else 'b'}" for name in ("x", "lengths", "cu_seqlens", "max")]
    x, lengths, offsets, longest = (getattr(inputs, name) for name in names)
    weights = inputs.a if side_a else inputs.b
    relaxation = inputs.relaxation
    if relaxation is not None:
        relaxation = relaxation[:, 0 if side_a else 1].unsqueeze(1).expand(-1, 2)
    return inputs._replace(
        x_a=x,
        x_b=x,
        a=weights,
        b=weights,
        relaxation=relaxation,
        lengths_a=lengths,
        lengths_b=lengths,
        cu_seqlens_a=offsets,
        cu_seqlens_b=offsets,
        max_a=longest,
        max_b=longest,
        first_self=0,
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


def _on_stack(inputs: Inputs, check: bool, solve: Callable[[], Outputs]) -> Outputs:
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
        first_self=inputs.batch,
    )


def _offsets(inputs: Inputs, side_a: bool) -> Tensor:
    offsets = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    if offsets is not None:
        return offsets
    size = inputs.max_a if side_a else inputs.max_b
    return torch.arange(inputs.batch + 1, dtype=torch.int32, device=inputs.device) * size


def _unstacked(inputs: Inputs, stack: Inputs, output: Tensor, kind: str) -> list[Tensor]:
    """Of numbers for each item, row or column of the stack those of (a, b), (a, a) and (b, b), as `within` has them."""
    if kind == "item":
        return list(output.unflatten(0, (3, inputs.batch)).unbind(0))
    shapes = [inputs.shape_f if kind == "row" else inputs.shape_g, inputs.shape_f, inputs.shape_g]
    if stack.packed:
        parts = output.split([math.prod(shape) for shape in shapes])
    else:
        parts = output.unflatten(0, (3, inputs.batch)).unbind(0)
    return [
        part.reshape(shape) if part.dim() == 1 else part[:, : shape[1]].contiguous()
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _iterations_of(inputs: Inputs, problem: Inputs, iterations: Iterations) -> Iterations:
    """Those of the call for the stack or a part: a schedule starts at its own scale, a warm start is for (a, b)."""
    if problem.first_self < 0:
        return iterations
    g_init, eps_start = iterations.g_init, iterations.eps_start
    if problem.first_self == 0:
        g_init = None
    elif g_init is not None:
        missing = problem.max_b - inputs.max_b
        first = g_init.flatten() if problem.packed else torch.nn.functional.pad(g_init, (0, missing))
        g_init = torch.cat([first, first.new_zeros((problem.shape_g[0] - first.shape[0], *first.shape[1:]))])
    if eps_start is not None:
        eps_start = cost_scale(problem.detach())
    return iterations._replace(g_init=g_init, eps_start=eps_start)


def _debiased(inputs: Inputs, values: Tensor) -> Tensor:
    """OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + eps (sum a - sum b)^2 / 2 of the values (3, B), equation (22); (B,)."""
    cross, self_a, self_b = values.unbind(0)
    value = cross - (self_a + self_b) / 2
    if inputs.kind == "unbalanced":
        value = value + inputs.reg * (masses(inputs, True) - masses(inputs, False)).square() / 2
    # Without a plan between the clouds it does not matter what is within them.
    return torch.where(cross.isposinf(), cross, value)
