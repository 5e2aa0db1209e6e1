"""The validated description of a batch of entropic optimal-transport problems.

One form for all of them: a batch, padded or packed, of problems given by points or by costs. `otkern.arguments` makes
from what a user passed; here it is checked, and summed over. This layer knows no backend.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")
# What becomes of the marginals: equal to the weights; near them (KL); at most them, with a given total; equal to them
# together with a null point on each side.
KINDS = ("balanced", "unbalanced", "partial", "null")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# How far the total masses of a balanced problem may differ, relative to the larger: the rounding of weights that
# were normalised in bfloat16 passes, weights that were never normalised do not.
MASS_TOLERANCE = 5e-3


class Inputs(NamedTuple):
    """What every backend function receives: B problems of n_i <= max_a and m_i <= max_b points.

    Padded: ``x_a (B, N, D)``, sizes in ``lengths_a``. Packed: ``x_a (sum n_i, D)``, offsets in ``cu_seqlens_a``.
    """

    x_a: Tensor | None  # points (B, N, D) or (T_a, D); None for a cost problem
    x_b: Tensor | None  # points (B, M, D) or (T_b, D)
    cost: Tensor | None  # (B, N, M); None for a point problem
    a: Tensor | None  # (B, N) or (T_a,), compute dtype; None: uniform
    b: Tensor | None  # (B, M) or (T_b,)
    reg: Tensor  # (B,), compute dtype
    relaxation: Tensor | None  # (B, 2): (rho_a, rho_b), (mass, -) or (null cost, -); None for "balanced"
    lengths_a: Tensor | None  # (B,) int32, padded layout
    lengths_b: Tensor | None
    cu_seqlens_a: Tensor | None  # (B + 1,) int32, packed layout
    cu_seqlens_b: Tensor | None
    max_a: int
    max_b: int
    metric: str  # one of METRICS, or "cost"
    kind: str = "balanced"  # one of KINDS
    # The plan's KL term refers to the constant exp(-1) in place of a ⊗ b: the entropy of reg_type="entropy". Only where
    # that changes the plan, "unbalanced" and "partial".
    entropy: bool = False
    # Items from this one on match a cloud with itself: both sides hold the same points, weights and rho, and one
    # potential serves both. -1: there is none. Kinds "balanced" and "unbalanced", without the entropy.
    first_self: int = -1

    @property
    def batch(self) -> int:
        return self.reg.shape[0]

    @property
    def n_pairs(self) -> int:
        """How many items, the first ones, match two clouds."""
        return self.batch if self.first_self < 0 else self.first_self

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_a is not None

    @property
    def primary(self) -> Tensor:
        """The tensor that fixes device and dtype: the cost, or the points of side a."""
        tensor = self.cost if self.cost is not None else self.x_a
        assert tensor is not None
        return tensor

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.primary.dtype)

    @property
    def device(self) -> torch.device:
        return self.primary.device

    @property
    def shape_f(self) -> tuple[int, ...]:
        return (self.x_a.shape[0],) if self.packed else (self.batch, self.max_a)

    @property
    def shape_g(self) -> tuple[int, ...]:
        return (self.x_b.shape[0],) if self.packed else (self.batch, self.max_b)

    def widened(self) -> Inputs:
        """The same problem with points or costs in the compute dtype, by a differentiable cast."""
        wide = {name: getattr(self, name) for name in ("x_a", "x_b", "cost")}
        return self._replace(**{n: None if t is None else t.to(self.compute_dtype) for n, t in wide.items()})

    def detach(self) -> Inputs:
        """The same problem with no tensor attached to the autograd graph."""
        return Inputs(*(v.detach() if isinstance(v, Tensor) else v for v in self))


class Schedule(NamedTuple):
    """How the iterations go; the solution they converge to does not depend on it."""

    eps_start: Tensor | None = None  # (B,): iteration k is done at max(reg, eps_start * eps_factor^k), the last at reg
    eps_factor: float = 1.0
    update: str = "alternating"  # or "symmetric": both potentials at once, averaged with the ones before
    overrelaxation: float = 1.0  # f <- f + w (new f - f); 0: w from the observed rate


class PlanWeights(NamedTuple):
    """The weights of a sum over the plan, equation (20): W = P (scale + cost_scale C + dense) + b E row + a E col."""

    scale: Tensor  # (B,)
    cost_scale: Tensor | None = None  # (B,)
    dense: Tensor | None = None  # (B, max_a, max_b)
    row: Tensor | None = None  # like f
    col: Tensor | None = None  # like g


def most_exponent(dtype: torch.dtype) -> float:
    """Where exponents are cut that only iterations cut short can reach: their exponential keeps room for weights."""
    return 600.0 if dtype == torch.float64 else 60.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp64 for fp64 inputs, fp32 for every narrower one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_values(inputs: Inputs, equal_masses: bool = True) -> None:
    """Raise `ValueError` for values that no problem may hold; reads the data, so it synchronises an accelerator.

    ``equal_masses``: the sides of a balanced problem must have the same mass; GeomLoss's loop takes any. Points and
    costs are left to `check_points`, or to a backend that reads them anyway.
    """
    reg, tiny = inputs.reg, torch.finfo(inputs.reg.dtype).tiny
    # One pass for what nearly always holds; a NaN fails both comparisons.
    if inputs.batch and not (reg.amin() >= tiny and reg.amax() < math.inf):
        bad = ~((reg >= tiny) & reg.isfinite())
        raise ValueError(f"reg must be positive, not subnormal, and finite, but holds {_first_bad(reg, bad)}")
    sides = (
        ("a", inputs.a, inputs.lengths_a, inputs.cu_seqlens_a, inputs.max_a, inputs.shape_f),
        ("b", inputs.b, inputs.lengths_b, inputs.cu_seqlens_b, inputs.max_b, inputs.shape_g),
    )
    for side, _, lengths, cu_seqlens, longest, shape in sides:
        if lengths is not None and bool(((lengths < 0) | (lengths > longest)).any()):
            bad = _first_bad(lengths, (lengths < 0) | (lengths > longest))
            raise ValueError(f"lengths_{side} must lie between 0 and {longest}, but holds {bad}")
        if cu_seqlens is not None:
            _check_offsets(side, cu_seqlens, shape[0], longest)
    if inputs.relaxation is None and inputs.a is None and inputs.b is None:
        return
    mass_a, mass_b = (_check_weights(side, weights, inputs, side == "a") for side, weights, *_ in sides)
    if inputs.relaxation is not None:
        _check_relaxation(inputs, mass_a, mass_b)
    if not equal_masses:
        return
    gap = (mass_a - mass_b).abs() > MASS_TOLERANCE * torch.maximum(mass_a, mass_b)
    if inputs.kind == "unbalanced":
        gap = gap & inputs.relaxation.isinf().all(1)
    if inputs.kind in ("balanced", "unbalanced") and bool(gap.any()):
        item = int(gap.nonzero()[0])
        raise ValueError(
            f"a and b must have the same total mass in a balanced problem, but item {item} has "
            f"{float(mass_a[item]):.6g} in a and {float(mass_b[item]):.6g} in b"
        )


def _check_relaxation(inputs: Inputs, mass_a: Tensor, mass_b: Tensor) -> None:
    first = inputs.relaxation[:, 0]
    if inputs.kind == "unbalanced":
        bad = ~(inputs.relaxation > 0)
        if bool(bad.any()):
            raise ValueError(f"unbalanced must be positive, but holds {_first_bad(inputs.relaxation, bad)}")
    elif inputs.kind == "partial":
        # The rounding of weights that sum to the mass passes.
        most = torch.minimum(mass_a, mass_b) * (1 + MASS_TOLERANCE)
        bad = ~((first > 0) & (first <= most))
        if bool(bad.any()):
            item = int(bad.nonzero()[0])
            raise ValueError(
                f"mass must be positive and at most the smaller total of a and b, but item {item} has mass "
                f"{float(first[item]):.6g} with {float(mass_a[item]):.6g} in a and {float(mass_b[item]):.6g} in b"
            )
    else:
        bad = ~(first > -math.inf)
        if bool(bad.any()):
            raise ValueError(f"null_cost must be a number above -inf, but holds {_first_bad(first, bad)}")


def check_points(inputs: Inputs) -> None:
    """Raise `ValueError` for points that are not finite, or costs that are NaN or -inf, within the true lengths."""
    if inputs.cost is not None:
        bad = (inputs.cost.isnan() | inputs.cost.isneginf()) & (
            row_mask(inputs, True).unsqueeze(2) & row_mask(inputs, False).unsqueeze(1)
        )
        if bool(bad.any()):
            item = int(bad.flatten(1).any(1).nonzero()[0])
            raise ValueError(f"M must hold no NaN and no -inf, but item {item} does")
        return
    for name, points, side_a in (("X_a", inputs.x_a, True), ("X_b", inputs.x_b, False)):
        bad = ~points.isfinite().all(-1) & row_mask(inputs, side_a)
        if bool(bad.any()):
            raise ValueError(f"{name} must be finite within the true length, but {_where(inputs, side_a, bad)} is not")


def check_warm_start(inputs: Inputs, g_init: Tensor | None) -> None:
    """Raise `ValueError` for a warm start that is not finite within the true lengths."""
    if g_init is not None and bool((~g_init.isfinite() & row_mask(inputs, False)).any()):
        bad = ~g_init.isfinite() & row_mask(inputs, False)
        raise ValueError(f"potentials_init[1] must be finite, but holds {_first_bad(g_init, bad)}")


def non_finite_points(name: str, item: int) -> ValueError:
    """The error a backend raises that found bad points or costs itself: ``name`` is X_a, X_b or M."""
    if name == "M":
        return ValueError(f"M must hold no NaN and no -inf, but item {item} does")
    return ValueError(f"{name} must be finite within the true length, but item {item} is not")


def row_mask(inputs: Inputs, side_a: bool) -> Tensor:
    """Which entries of a potential are true points: (B, N) or (T_a,) for side a, (B, M) or (T_b,) for side b."""
    lengths = inputs.lengths_a if side_a else inputs.lengths_b
    shape = inputs.shape_f if side_a else inputs.shape_g
    if lengths is None:
        return torch.ones(shape, dtype=torch.bool, device=inputs.device)
    return torch.arange(shape[1], device=inputs.device) < lengths.unsqueeze(1)


def masses(inputs: Inputs, side_a: bool) -> Tensor:
    """Total mass of each item's weights, (B,); differentiable with respect to the weights."""
    weights = inputs.a if side_a else inputs.b
    if weights is None:
        return (item_sizes(inputs, side_a) > 0).to(inputs.compute_dtype)
    return item_sums(inputs, side_a, weights)


def item_sums(inputs: Inputs, side_a: bool, values: Tensor) -> Tensor:
    """Sums (B,) over each item's true points of ``values``, shaped like that side's weights; differentiable."""
    longest = inputs.max_a if side_a else inputs.max_b
    if torch.compiler.is_compiling():
        # The width below would bind a graph to one size, and a compiler orders sums as it likes anyway.
        return padded(inputs, side_a, values).sum(1)
    width = 1 << int(max(longest - 1, 0)).bit_length()
    position = torch.arange(width, device=inputs.device)
    inside = position < item_sizes(inputs, side_a).unsqueeze(1)
    if inputs.packed:
        starts = (inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b)[:-1]
        index = torch.where(inside, starts.unsqueeze(1) + position, 0)
        values = torch.cat([values, values.new_zeros(1)])[index]  # an index for empty clouds, too
    else:
        values = torch.nn.functional.pad(values, (0, width - longest))
    total = torch.where(inside, values, 0)
    # Halves of a power of two: zeros behind the true points change no sum, so that no layout changes a bit.
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0]


def cost_scale(inputs: Inputs) -> Tensor:
    """About the largest cost of each item, (B,): where an epsilon schedule starts.

    The diameter of the box around both clouds, as GeomLoss takes it, squared for "sqeuclidean"; 2 for "cosine"; the
    product of the largest norms for "dot"; the largest finite magnitude of costs. Reads no value on the host.
    """
    tiny = torch.finfo(inputs.compute_dtype).tiny
    if inputs.cost is not None:
        inside = row_mask(inputs, True).unsqueeze(2) & row_mask(inputs, False).unsqueeze(1) & inputs.cost.isfinite()
        scale = torch.where(inside, inputs.cost.abs(), 0).to(inputs.compute_dtype)
        return scale.flatten(1).amax(1).clamp(min=tiny) if scale[0:1].numel() else inputs.reg
    if inputs.metric == "cosine" or inputs.batch == 0 or inputs.max_a == 0 or inputs.max_b == 0:
        return torch.full_like(inputs.reg, 2)
    if inputs.metric == "dot":
        largest = [torch.where(inside, cloud, 0).norm(dim=2).amax(1) for cloud, inside in _clouds(inputs)]
        return (largest[0] * largest[1]).clamp(min=tiny)
    low, top = bounding_box(inputs)
    diameter = torch.where(top >= low, top - low, 0).norm(dim=1)
    return (diameter.square() if inputs.metric == "sqeuclidean" else diameter).clamp(min=tiny)


def bounding_box(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The least and the largest coordinates of each item's points, of both clouds, (B, D); inf and -inf of none."""
    clouds = _clouds(inputs)
    low = torch.minimum(*(torch.where(inside, cloud, math.inf).amin(1) for cloud, inside in clouds))
    top = torch.maximum(*(torch.where(inside, cloud, -math.inf).amax(1) for cloud, inside in clouds))
    return low, top


def _clouds(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Of each side the points (B, N, D) in the compute dtype, and which are true ones (B, N, 1)."""
    clouds = []
    for side_a, points in ((True, inputs.x_a), (False, inputs.x_b)):
        cloud = padded(inputs, side_a, points.to(inputs.compute_dtype))
        clouds.append((cloud, padded_mask(inputs, side_a).unsqueeze(2)))
    return clouds


def spread(inputs: Inputs, side_a: bool, per_item: Tensor) -> Tensor:
    """A number (B,) of each item at each of its points, in a shape that broadcasts with that side's weights."""
    if not inputs.packed:
        return per_item.unsqueeze(1)
    if inputs.batch == 0:
        return per_item.new_zeros(inputs.shape_f if side_a else inputs.shape_g)
    return per_item[item_of_rows(inputs, side_a)]


def item_of_rows(inputs: Inputs, side_a: bool) -> Tensor:
    """The item that each row of a packed batch belongs to."""
    cu_seqlens = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    rows = torch.arange((inputs.shape_f if side_a else inputs.shape_g)[0], device=inputs.device, dtype=torch.int32)
    item = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    return item.clamp(0, max(inputs.batch - 1, 0))


def weights_of(inputs: Inputs, side_a: bool) -> Tensor:
    """The weights of one side, uniform ones included, 0 in the padding; differentiable."""
    weights = inputs.a if side_a else inputs.b
    if weights is None:
        shape = inputs.shape_f if side_a else inputs.shape_g
        sizes = item_sizes(inputs, side_a).clamp(min=1).to(inputs.compute_dtype)
        weights = spread(inputs, side_a, 1 / sizes).expand(shape)
    return weights if inputs.packed else torch.where(row_mask(inputs, side_a), weights, 0)


def padded_mask(inputs: Inputs, side_a: bool) -> Tensor:
    """Which entries of one side are true points when it is padded, (B, N) or (B, M), whatever its layout."""
    longest = inputs.max_a if side_a else inputs.max_b
    return torch.arange(longest, device=inputs.device) < item_sizes(inputs, side_a).unsqueeze(1)


def padded(inputs: Inputs, side_a: bool, values: Tensor) -> Tensor:
    """Rows of one side, (B, N) or (sum of lengths,) and any further axes, as (B, N, ...) with zeros in the padding."""
    inside = padded_mask(inputs, side_a)
    if inputs.packed:
        starts = (inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b)[:-1]
        position = torch.arange(inside.shape[1], device=inputs.device)
        index = torch.where(inside, starts.unsqueeze(1) + position, 0)
        values = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])[index]
    return torch.where(inside.reshape(*inside.shape, *[1] * (values.dim() - 2)), values, 0)


def unpadded(inputs: Inputs, side_a: bool, values: Tensor) -> Tensor:
    """The inverse of `padded`: (B, N, ...) in the layout of that side's rows."""
    if not inputs.packed:
        return values
    if inputs.batch == 0:
        return values.new_zeros((*(inputs.shape_f if side_a else inputs.shape_g), *values.shape[2:]))
    item = item_of_rows(inputs, side_a)
    starts = (inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b)[:-1]
    return values[item, torch.arange(len(item), device=inputs.device) - starts[item]]


def item_sizes(inputs: Inputs, side_a: bool) -> Tensor:
    """True number of points of each item, (B,) integers."""
    cu_seqlens = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    if cu_seqlens is not None:
        return cu_seqlens[1:] - cu_seqlens[:-1]
    lengths = inputs.lengths_a if side_a else inputs.lengths_b
    longest = inputs.max_a if side_a else inputs.max_b
    return torch.full((inputs.batch,), longest, device=inputs.device) if lengths is None else lengths


def _check_weights(name: str, weights: Tensor | None, inputs: Inputs, side_a: bool) -> Tensor:
    if weights is not None:
        bad = ~((weights >= 0) & weights.isfinite()) & row_mask(inputs, side_a)
        if bool(bad.any()):
            raise ValueError(f"{name} must be finite and non-negative, but holds {_first_bad(weights, bad)}")
    return masses(inputs, side_a)


def _check_offsets(side: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    name = f"cu_seqlens_{side}"
    sizes = cu_seqlens[1:] - cu_seqlens[:-1]
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
        raise ValueError(
            f"{name} must run from 0 to the {total} rows of X_{side}, but runs from {int(cu_seqlens[0])} to "
            f"{int(cu_seqlens[-1])}"
        )
    if bool((sizes < 0).any()):
        raise ValueError(f"{name} must not decrease, but holds a step of {_first_bad(sizes, sizes < 0)}")
    if bool((sizes > longest).any()):
        raise ValueError(
            f"max_seqlen_{side} must be at least the longest length, {int(sizes.max())}, but was {longest}"
        )


def _first_bad(values: Tensor, bad: Tensor) -> str:
    index = tuple(int(i) for i in bad.nonzero()[0])
    return f"{values[index].item():g} at {index if len(index) > 1 else index[0]}"


def _where(inputs: Inputs, side_a: bool, bad: Tensor) -> str:
    index = [int(i) for i in bad.nonzero()[0]]
    if not inputs.packed:
        return f"item {index[0]}"
    cu_seqlens = inputs.cu_seqlens_a if side_a else inputs.cu_seqlens_b
    return f"item {int((cu_seqlens[1:] <= index[0]).sum())}"
