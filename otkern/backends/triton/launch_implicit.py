"""The host side of the adjoint of the fixed point; see `launch` and `conjugate_gradients`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from otkern.problem import Inputs

from . import conjugate_gradients, launch
from .launch import grids, options, select, table


def implicit(
    inputs: Inputs, f: Tensor, g: Tensor, given: tuple, u_a: Tensor, u_b: Tensor, singular: bool, tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    device = inputs.device
    p, q = torch.zeros_like(f), torch.zeros_like(g)
    residual = torch.zeros(inputs.batch, dtype=inputs.compute_dtype, device=device)
    iters = torch.full((inputs.batch,), -1, dtype=torch.int32, device=device)
    if inputs.batch == 0:
        return p, q, residual, iters
    slopes_and_extras = dict(zip(("slope_a", "slope_b", "extra_a", "extra_b"), given, strict=True))
    arguments = launch.problem_arguments(inputs) | {
        **{f"{name}_ptr": f if tensor is None else tensor.contiguous() for name, tensor in slopes_and_extras.items()},
        **{f"has_{name}": int(tensor is not None) for name, tensor in slopes_and_extras.items()},
        "f_ptr": f,
        "g_ptr": g,
        "u_a_ptr": u_a.contiguous(),
        "u_b_ptr": u_b.contiguous(),
        "p_ptr": p,
        "q_ptr": q,
        "residual_ptr": residual,
        "iters_ptr": iters,
        "singular": int(singular),
        "max_iter": max_iter,
        "tol": launch.round_down(tol),
    }
    largest = max(inputs.max_a, inputs.max_b)
    entries = table("implicit", launch.IMPLICIT, inputs.primary.dtype, device)
    with launch.on_device(device):
        for entry, lower in launch.classes(entries, largest):
            kernel = conjugate_gradients.onchip_implicit_kernel
            launch.launch_onchip(kernel, inputs, arguments, entry, lower)
        limit = entries[-1].block
        if largest > limit:
            sides = {"a": _Side(f, u_a, given[0], given[2]), "b": _Side(g, u_b, given[1], given[3])}
            system = _System(inputs, arguments | {"ONCHIP": limit}, sides)
            most = launch.SCRATCH_ELEMENTS // max(1, inputs.max_a * inputs.max_b)
            for first, (count,) in grids(inputs.batch, 1, most):
                system.solve(first, count, singular)
            a, b = sides["a"], sides["b"]
            p, q = torch.where(a.inside, a.solution, p), torch.where(b.inside, b.solution, q)
    return p, q, residual, iters


class _Side:
    """The vectors of one side, shaped like its potential; those of the scaled system are 0 where a point has no part.

    What is computed from them elementwise is computed for the whole batch, again with every group of items: what a
    group's products have not filled yet is finite and overwritten later.
    """

    def __init__(self, h: Tensor, u: Tensor, slope: Tensor | None, extra: Tensor | None):
        self.h, self.u, self.slope, self.extra = h, u.contiguous(), slope, extra
        # +inf at points of items that are not solved here
        self.weight_l2 = torch.full_like(h, float("inf"))
        self.zeros, self.ones = torch.zeros_like(h), torch.ones_like(h)
        # what `conjugate_gradients` calls log2 r, log2 sqrt(a k / r) and d, and the solution at bare points
        self.sum_l2, self.unit, self.bare = torch.zeros_like(h), torch.ones_like(h), torch.zeros_like(h)
        self.half_l2 = torch.full_like(h, -float("inf"))
        self.sums, self.seen = torch.zeros_like(h), torch.zeros_like(h)  # r or c; what the bare points add to u
        self.product, self.x = torch.zeros_like(h), torch.zeros_like(h)

    @property
    def inside(self) -> Tensor:
        return self.weight_l2 < float("inf")

    @property
    def part(self) -> Tensor:
        return self.half_l2 > -float("inf")

    @property
    def scaled_u(self) -> Tensor:
        return torch.where(self.part, (self.u - self.seen) / self.unit, 0)

    @property
    def solution(self) -> Tensor:
        slope = self.ones if self.slope is None else self.slope
        return torch.where(self.part, slope * self.unit * self.x, self.bare)


class _System:
    """The items beyond the largest on-chip class."""

    def __init__(self, inputs: Inputs, arguments: dict, sides: dict[str, _Side]):
        self.inputs, self.arguments, self.sides = inputs, arguments, sides
        new = {"dtype": inputs.compute_dtype, "device": inputs.device}
        self.scalars = torch.zeros((inputs.batch, 3), **new)
        # Products are formed for items whose entry is negative.
        self.all_items = torch.full((inputs.batch,), -1, dtype=torch.int32, device=inputs.device)

    def solve(self, first: int, count: int, singular: bool) -> None:
        a, b = self.sides["a"], self.sides["b"]
        self.count, self.group = count, self.arguments | {"first_item": first}
        self.cost, self.pitch = launch.form_costs(self.inputs, self.group, count)
        for side in "ab":
            values = self.group | launch.side_arguments(self.arguments, side)
            self._by_item(conjugate_gradients.log_weights_kernel, values, out_ptr=self.sides[side].weight_l2)
        self._product("a", a.zeros, b.weight_l2, b.ones, a.sums)
        self._product("b", b.zeros, a.weight_l2, a.ones, b.sums)
        for side in "ab":
            self._read_sums(side)
        self._product("a", a.weight_l2, -b.sum_l2, b.bare, a.seen)
        self._product("b", b.weight_l2, -a.sum_l2, a.bare, b.seen)
        v = b.scaled_u
        self._product("a", a.half_l2, b.half_l2, v, a.product)
        state = {
            "null_ptr": torch.where(a.part, a.unit, 0) if singular else a.zeros,
            "rest_ptr": torch.zeros_like(a.h),
            "direction_ptr": torch.zeros_like(a.h),
            "scalars_ptr": self.scalars,
        }
        rhs = a.scaled_u - a.product
        self._by_item(conjugate_gradients.begin_gradients_kernel, self.group | state, rhs_ptr=rhs)
        iters = self.arguments["iters_ptr"]
        for k in range(self.arguments["max_iter"]):
            self._product("b", b.half_l2, a.half_l2, state["direction_ptr"], b.product, iters)
            self._product("a", a.half_l2, b.half_l2, b.product, a.product, iters)
            kernel = conjugate_gradients.step_gradients_kernel
            self._by_item(kernel, self.group | state, product_ptr=a.product, x_ptr=a.x, k=k)
        self._product("b", b.half_l2, a.half_l2, a.x, b.product)
        b.x = v - b.product

    def _read_sums(self, name: str) -> None:
        side, unused = self.sides[name], self.sides[name].h
        self._by_item(
            conjugate_gradients.scales_kernel,
            self.group | launch.side_arguments(self.arguments, name),
            weight_l2_ptr=side.weight_l2,
            sums_ptr=side.sums,
            extra_ptr=unused if side.extra is None else side.extra.contiguous(),
            slope_ptr=unused if side.slope is None else side.slope.contiguous(),
            u_ptr=side.u,
            sum_l2_ptr=side.sum_l2,
            half_l2_ptr=side.half_l2,
            unit_ptr=side.unit,
            bare_ptr=side.bare,
            has_extra=int(side.extra is not None),
            has_slope=int(side.slope is not None),
        )

    def _product(self, out: str, l_out, l_in, v, result, iters: Tensor | None = None) -> None:
        """result_r = sum_c E_rc 2^(l_r + l_c) v_c for the rows ("a") or the columns."""
        other = "b" if out == "a" else "a"
        kernel = conjugate_gradients.scaled_product_kernel
        block_out, block_in, warps = table(
            "half_update", launch.HALF_UPDATE, self.inputs.compute_dtype, self.inputs.device
        )
        values = self.group | launch.side_arguments(self.arguments, out)
        blocks = max(1, triton.cdiv(values["N_out"], block_out))
        values |= {
            "iters_ptr": self.all_items if iters is None else iters,
            "stride_item": self.inputs.max_a * self.pitch,
            "stride_out": self.pitch if out == "a" else 1,
            "stride_in": 1 if out == "a" else self.pitch,
        }
        kernel[(self.count * blocks,)](
            **select(values, kernel),
            cost_ptr=self.cost,
            h_out_ptr=self.sides[out].h,
            h_in_ptr=self.sides[other].h,
            l_out_ptr=l_out,
            l_in_ptr=l_in,
            v_ptr=v,
            out_ptr=result,
            blocks=blocks,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            **options(warps),
        )

    def _by_item(self, kernel, values: dict, **more) -> None:
        """One program an item."""
        kernel[(self.count,)](**(select(values, kernel) | more), BLOCK=launch.FINISH_BLOCK, **options(4))
