"""Items that float32 cannot hold the digits of are solved again in float64.

The plan is exp((f + g - C) / reg). Potentials in cost units that are rounded to float32 move the exponent by up to
2^-24 max(|f|, |g|) / reg, so that one distant point or one row of large costs would spoil the plan, its gradient and
the marginal error alike. Potentials below `LIMIT` regs leave an error of 1e-4 at most. An item beyond that is solved,
differentiated and applied in float64 from the same float32 numbers; the results are rounded at the end. The choice is
made item by item, so that batch mates change no bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from otkern import dispatch
from otkern.problem import Inputs, item_sizes, masses, padded, padded_mask, spread, unpadded

if TYPE_CHECKING:
    from otkern.result import OTResult

# Potentials up to this many regs are exact enough in float32: 2^-24 * 1000 is 6e-5, below the default tolerance.
LIMIT = 1000.0
# GeomLoss's loop stops at no tolerance and divides each row by its own sum, which halves no digits but the value's.
ANNEALED_LIMIT = 16 * LIMIT
# What float64 holds to the default tolerance of its own.
LIMIT_FLOAT64 = 1e8


class Doubled(NamedTuple):
    """Which items are solved in float64, and how their numbers are put among those of the batch."""

    inputs: Inputs  # of the whole batch
    wide: Tensor  # (B,) bool: the items solved in float64
    items: Tensor | None  # (K,) their indices; None where the host does not know them: all B, the others empty

    def problem(self) -> Inputs:
        """The items in float64, padded; differentiable with respect to the batch."""
        inputs = self.inputs
        sizes = [torch.where(self.wide, item_sizes(inputs, side_a), 0).to(torch.int32) for side_a in (True, False)]
        return inputs._replace(
            x_a=self.rows(True, inputs.x_a),
            x_b=self.rows(False, inputs.x_b),
            cost=self.per_item(inputs.cost),
            a=self.rows(True, inputs.a),
            b=self.rows(False, inputs.b),
            reg=_Double.apply(self.chosen(inputs.reg)),
            relaxation=self.per_item(inputs.relaxation),
            lengths_a=self.chosen(sizes[0]),
            lengths_b=self.chosen(sizes[1]),
            cu_seqlens_a=None,
            cu_seqlens_b=None,
            first_self=self._first_self(),
        )

    def rows(self, side_a: bool, values: Tensor | None) -> Tensor | None:
        """Numbers of each point of one side, in the batch's layout, as those of the chosen items, padded."""
        if values is None:
            return None
        return self.per_item(padded(self.inputs, side_a, values) if self.inputs.packed else values)

    def per_item(self, values: Tensor | None) -> Tensor | None:
        """(B, ...) as (K, ...) in float64."""
        return None if values is None else _Double.apply(self.chosen(values))

    def merged(self, narrow: Tensor, double: Tensor, side_a: bool | None = None) -> Tensor:
        """``narrow`` of the batch with the float64 numbers in place of the chosen items'.

        ``side_a``: whose points the numbers belong to; None: one number or one matrix an item.
        """
        inputs, double = self.inputs, double.to(narrow.dtype)
        if self.items is not None:
            double = double.new_zeros((inputs.batch, *double.shape[1:])).index_copy(0, self.items, double)
        if side_a is None:
            wide = self.wide.reshape(-1, *[1] * (narrow.dim() - 1))
        else:
            double = unpadded(inputs, side_a, double)
            wide = spread(inputs, side_a, self.wide)
            wide = wide.reshape(*wide.shape, *[1] * (narrow.dim() - wide.dim()))
        return torch.where(wide, double, narrow)

    def chosen(self, values: Tensor) -> Tensor:
        """(B, ...) as (K, ...)."""
        return values if self.items is None else values.index_select(0, self.items)

    def _first_self(self) -> int:
        first = self.inputs.first_self
        return first if first < 0 or self.items is None else int((self.items < first).sum())


class _Double(torch.autograd.Function):
    """The cast to float64; a gradient beyond the range of the narrower dtype becomes its largest number, not inf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(narrow):
        return narrow.double()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, gradient):
        most = torch.finfo(ctx.dtype).max
        return gradient.clamp(-most, most).to(ctx.dtype)


class Solved(NamedTuple):
    """The float64 result of the items that needed it."""

    doubled: Doubled
    result: OTResult

    def merged(self, narrow: Tensor, double: Tensor, side_a: bool | None = None) -> Tensor:
        return self.doubled.merged(narrow, double, side_a)

    def applied(self, narrow: Tensor, v: Tensor, transpose: bool) -> Tensor:
        """``narrow``, the product of the plans with v, with those of the float64 plans."""
        columns = self.doubled.rows(transpose, v)
        assert columns is not None
        return self.merged(narrow, self.result._apply(columns, transpose), not transpose)


def may_exceed(inputs: Inputs, reg: object, limit: float = LIMIT) -> bool:
    """Whether potentials of this problem can pass ``limit`` regs, as far as is known without reading a tensor.

    Cosine distances lie in [0, 2], and with them the balanced potentials in [-4, 4], where they are not all of the
    mass's making. Costs and other distances have no bound.
    """
    if inputs.compute_dtype == torch.float64 or inputs.batch == 0:
        return False
    bounded = inputs.metric == "cosine" and inputs.kind in ("balanced", "unbalanced", "partial")
    return not (bounded and isinstance(reg, (int, float)) and limit * reg >= 4)


def doubled(
    inputs: Inputs, value: Tensor | None, potentials: Iterable[tuple[bool, Tensor]], limit: float = LIMIT
) -> Doubled | None:
    """The items to solve in float64, given the ``(side_a, potential)`` that float32 found; None: none of them.

    On a CPU the host looks at the numbers. Elsewhere, and where calls are traced, it cannot, and all items are in.
    """
    if inputs.batch == 0:
        return None
    with torch.no_grad():
        potentials = [(side_a, potential.detach()) for side_a, potential in potentials]
        known = _is_known(inputs)
        most = inputs.reg.detach() * limit
        if known and _all_below(potentials, value, most):
            return None
        wide = beyond(inputs, potentials, limit)
        if value is not None:
            # float32 overflows where float64 need not.
            wide = wide | ~value.detach().isfinite()
        if not known:
            return Doubled(inputs, wide, None)
        items = wide.nonzero().squeeze(1)
        return Doubled(inputs, wide, items) if len(items) else None


def beyond(inputs: Inputs, potentials: Iterable[tuple[bool, Tensor]], limit: float = LIMIT) -> Tensor:
    """Which items have a finite potential of more than ``limit`` regs, (B,) bool."""
    return _largest(inputs, potentials) > inputs.reg.detach() * limit


def rounding(inputs: Inputs, potentials: list[tuple[bool, Tensor]]) -> Tensor | None:
    """The marginal error that rounded potentials may leave, (B,): 0 for items where it is of no account; None: for all.

    It counts above 1000 regs in float32, and above 1e8 in float64, where it is 1e-8.
    """
    limit = LIMIT if inputs.compute_dtype == torch.float32 else LIMIT_FLOAT64
    if _is_known(inputs) and _all_below(potentials, None, inputs.reg.detach() * limit):
        return None
    regs = _largest(inputs, potentials) / inputs.reg.detach()
    error = torch.finfo(inputs.compute_dtype).eps / 2 * regs * masses(inputs, True).detach()
    return torch.where(regs > limit, error, 0)


def _is_known(inputs: Inputs) -> bool:
    """Whether the host can look at numbers without waiting, and no graph is traced."""
    return inputs.batch > 0 and inputs.device.type == "cpu" and not dispatch.is_needed(inputs)


def _largest(inputs: Inputs, potentials: Iterable[tuple[bool, Tensor]]) -> Tensor:
    """The largest magnitude of each item's finite potentials, (B,)."""
    largest = torch.zeros_like(inputs.reg.detach())
    for side_a, potential in potentials:
        magnitude = padded(inputs, side_a, potential.detach().abs())
        if magnitude.shape[1]:
            inside = padded_mask(inputs, side_a) & magnitude.isfinite()
            largest = torch.maximum(largest, torch.where(inside, magnitude, 0).amax(1))
    return largest


def without_plan(inputs: Inputs, f: Tensor, items: Tensor) -> Tensor:
    """f with a number in these items that leaves the plan 0: what float32 made of it may overflow, and 0 inf is NaN."""
    return torch.where(spread(inputs, True, items), -1e30, f)


def _all_below(potentials: list[tuple[bool, Tensor]], value: Tensor | None, most: Tensor) -> bool:
    """Whether one look over the whole batch settles that no item is beyond its limit; not where numbers are inf."""
    bound = float(most.amin())
    if value is not None and not float(value.detach().abs().amax()) < float("inf"):
        return False
    for _, potential in potentials:
        if potential.numel():
            low, top = torch.aminmax(potential)
            if not (float(top) <= bound and float(low) >= -bound):
                return False
    return True
