"""The host side of what is computed from the plan: gradients, sums, products; see `launch`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from otkern.problem import Inputs, PlanWeights

from . import launch, plan_products
from .launch import Launch, grids, options, select, table


def sided(inputs: Inputs, arguments: dict, f: Tensor, g: Tensor, side: str) -> dict:
    """The arguments of a kernel that treats rows and columns alike, for side "a" or "b" as its "out" side."""
    result = arguments | launch.side_arguments(arguments, side)
    result["h_out_ptr"], result["h_in_ptr"] = (f, g) if side == "a" else (g, f)
    if "row_ptr" in arguments:
        names = ("row", "col") if side == "a" else ("col", "row")
        for end, name in zip(("out", "in"), names, strict=True):
            result[f"v_{end}_ptr"], result[f"has_v_{end}"] = arguments[f"{name}_ptr"], arguments[f"has_{name}"]
        if side == "b":
            result["stride_dense_n"], result["stride_dense_d"] = (
                arguments["stride_dense_d"],
                arguments["stride_dense_n"],
            )
    if side == "b" and inputs.cost is not None:
        result["stride_x_n"], result["stride_x_d"] = arguments["stride_x_d"], arguments["stride_x_n"]
    elif side == "b":
        result["x_ptr"], result["y_ptr"] = arguments["y_ptr"], arguments["x_ptr"]
        for axis in "bnd":
            result[f"stride_x_{axis}"] = arguments[f"stride_y_{axis}"]
            result[f"stride_y_{axis}"] = arguments[f"stride_x_{axis}"]
    return result


Needs = tuple[bool, bool, bool, bool, bool]


def backward(inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    return _sums_over_plan(inputs, f, g, PlanWeights(dvalue), needs, False)


def plan_backward(
    inputs: Inputs, f: Tensor, g: Tensor, weights: PlanWeights, needs: Needs
) -> tuple[Tensor | None, ...]:
    return _sums_over_plan(inputs, f, g, weights, needs, True)


def _sums_over_plan(
    inputs: Inputs, f: Tensor, g: Tensor, weights: PlanWeights, needs: Needs, general: bool
) -> tuple[Tensor | None, ...]:
    needs_a, needs_b, needs_cost, needs_marginals, needs_reg = needs
    device, dtype = inputs.device, inputs.compute_dtype
    rows, columns = (torch.zeros_like(f), torch.zeros_like(g)) if needs_marginals else (None, None)
    total = torch.zeros(inputs.batch, dtype=dtype, device=device) if needs_reg else None
    # The interpreter truncates where a GPU rounds to bfloat16: there the rounding is left to torch.
    new = {"dtype": dtype if device.type == "cpu" else inputs.primary.dtype, "device": device}
    dx_a = torch.zeros(inputs.x_a.shape, **new) if needs_a else None
    dx_b = torch.zeros(inputs.x_b.shape, **new) if needs_b else None
    dcost = torch.zeros(inputs.cost.shape, **new) if needs_cost else None
    if inputs.batch > 0:
        arguments = launch.problem_arguments(inputs) | _weight_arguments(weights)
        parts = None
        if needs_reg:
            blocks = max(1, triton.cdiv(inputs.max_a, _backward_classes(inputs, general)[-1].block))
            parts = torch.empty((inputs.batch, blocks), dtype=dtype, device=device)
        with launch.on_device(device):
            if needs_a or needs_cost or needs_marginals or needs_reg:
                dx = dcost if needs_cost else dx_a
                of_rows = sided(inputs, arguments, f, g, "a")
                _backward_side(inputs, of_rows, dx, rows, parts, inputs.max_a, general, range(inputs.batch))
            # Of a cloud with itself the value's gradient is that of side a; what is left here are the marginals.
            pairs = inputs.batch if general else inputs.n_pairs
            of_columns = sided(inputs, arguments, f, g, "b")
            if needs_b or needs_marginals:
                _backward_side(inputs, of_columns, dx_b, columns, None, inputs.max_b, general, range(pairs))
            if needs_marginals:
                others = range(pairs, inputs.batch)
                _backward_side(inputs, of_columns, None, columns, None, inputs.max_b, general, others)
            if needs_reg:
                _backward_reg(inputs, arguments, parts, total, general)
    gradients = (None if dx is None else dx.to(inputs.primary.dtype) for dx in (dx_a, dx_b, dcost))
    return (*gradients, rows, columns, total)


def _weight_arguments(weights: PlanWeights) -> dict:
    unused = weights.scale.contiguous()
    given = {"cost_scale": weights.cost_scale, "row": weights.row, "col": weights.col}
    arguments = {"scale_ptr": unused, "has_dense": int(weights.dense is not None)}
    for name, tensor in given.items():
        arguments[f"{name}_ptr"] = unused if tensor is None else tensor.contiguous()
        arguments[f"has_{name}"] = int(tensor is not None)
    strides = (0, 0, 0) if weights.dense is None else weights.dense.stride()
    arguments["dense_ptr"] = unused if weights.dense is None else weights.dense
    return arguments | {f"stride_dense_{axis}": stride for axis, stride in zip("bnd", strides, strict=True)}


def _backward_classes(inputs: Inputs, general: bool) -> tuple[Launch, ...]:
    if inputs.cost is not None and general:
        return (table("backward_cost_general", launch.BACKWARD_COST_GENERAL, inputs.compute_dtype, inputs.device),)
    if inputs.cost is not None:
        return (table("backward_cost", launch.BACKWARD_COST, inputs.compute_dtype, inputs.device),)
    if general or launch.kind_of_cost(inputs) == launch.DIFFERENCE:
        return table("backward_general", launch.BACKWARD_GENERAL, inputs.primary.dtype, inputs.device)
    return table("backward", launch.BACKWARD, inputs.primary.dtype, inputs.device)


def _backward_side(
    inputs: Inputs, arguments: dict, dx, marginal, parts, n_out: int, general: bool, items: range
) -> None:
    kernel = plan_products.plan_backward_kernel
    unused = arguments["scale_ptr"]
    strides = (0, 0) if dx is None else ((0, *dx.stride()) if inputs.packed else dx.stride())[:2]
    entries = _backward_classes(inputs, general)
    sums = dx
    if dx is not None and dx.dtype != inputs.compute_dtype and max(inputs.max_a, inputs.max_b) > entries[-1].block:
        sums = torch.empty(dx.shape, dtype=inputs.compute_dtype, device=dx.device)
    elif dx is None or dx.dtype != inputs.compute_dtype:
        sums = unused
    for entry, lower in launch.classes(entries, max(inputs.max_a, inputs.max_b)):
        # An item of any class but the last is one block.
        blocks = max(1, triton.cdiv(n_out, entry.block)) if entry is entries[-1] else 1
        for first, grid in grids(items.stop, blocks, start=items.start):
            kernel[grid](
                **select(arguments, kernel),
                dx_ptr=unused if dx is None else dx,
                sum_ptr=sums,
                marginal_ptr=unused if marginal is None else marginal,
                part_ptr=unused if parts is None else parts,
                stride_dx_b=strides[0],
                stride_dx_n=strides[1],
                first_item=first,
                blocks=blocks,
                parts=0 if parts is None else parts.shape[1],
                need_x=int(dx is not None),
                need_marginal=int(marginal is not None),
                need_reg=int(parts is not None),
                BLOCK=entry.block,
                LOWER=lower,
                UPPER=2**31 - 1 if entry is entries[-1] else entry.block,
                BLOCK_D=entry.block_d,
                PRECISION="ieee",
                PRECISION_PLAN=entry.precision,
                GENERAL=general,
                **options(entry.warps, entry.stages),
            )


def _backward_reg(inputs: Inputs, arguments: dict, parts: Tensor, total: Tensor, general: bool) -> None:
    kernel = plan_products.reg_backward_kernel
    for first, grid in grids(inputs.batch):
        kernel[grid](
            **select(arguments, kernel),
            part_ptr=parts,
            out_ptr=total,
            first_item=first,
            parts=parts.shape[1],
            with_mass=int(not general),
            ROWS=_backward_classes(inputs, general)[-1].block,
            BLOCK=launch.FINISH_BLOCK,
            **options(4),
        )


def apply(inputs: Inputs, f: Tensor, g: Tensor, v: Tensor, transpose: bool, times_cost: bool) -> Tensor:
    shape = inputs.shape_g if transpose else inputs.shape_f
    out = torch.zeros((*shape, v.shape[-1]), dtype=inputs.compute_dtype, device=inputs.device)
    if out.numel() == 0:
        return out
    kernel = plan_products.plan_apply_kernel
    entry = table("apply", launch.APPLY, inputs.primary.dtype, inputs.device)
    arguments = sided(inputs, launch.problem_arguments(inputs), f, g, "b" if transpose else "a")
    strides_v, strides_out = v.stride(), out.stride()
    if inputs.packed:
        strides_v, strides_out = (0, *strides_v), (0, *strides_out)
    blocks = triton.cdiv(arguments["N_out"], entry.block)
    with launch.on_device(inputs.device):
        for first, grid in grids(inputs.batch, blocks):
            kernel[grid](
                **select(arguments, kernel),
                v_ptr=v,
                out_ptr=out,
                **{f"stride_v_{axis}": stride for axis, stride in zip("bnd", strides_v, strict=True)},
                stride_out_b=strides_out[0],
                stride_out_n=strides_out[1],
                first_item=first,
                blocks=blocks,
                K=v.shape[-1],
                times_cost=int(times_cost),
                BLOCK=entry.block,
                BLOCK_D=entry.block_d,
                BLOCK_K=entry.block_d,
                PRECISION=entry.precision,
                **options(entry.warps, entry.stages),
            )
    return out
