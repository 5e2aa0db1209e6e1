"""The validated description of a batch of entropic optimal-transport problems.

This layer reads what a user passed, refuses what is wrong with an error that names the argument, and hands the
backends one form: a batch, padded or packed, of problems given by points or by costs. It knows no backend.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")
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
    lengths_a: Tensor | None  # (B,) int32, padded layout
    lengths_b: Tensor | None
    cu_seqlens_a: Tensor | None  # (B + 1,) int32, packed layout
    cu_seqlens_b: Tensor | None
    max_a: int
    max_b: int
    metric: str  # one of METRICS, or "cost"

    @property
    def batch(self) -> int:
        return self.reg.shape[0]

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

    def detach(self) -> Inputs:
        """The same problem with no tensor attached to the autograd graph."""
        return Inputs(*(v.detach() if isinstance(v, Tensor) else v for v in self))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp64 for fp64 inputs, fp32 for every narrower one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def read_costs(M, a, b, reg, lengths_a, lengths_b) -> tuple[Inputs, bool]:
    """The `Inputs` of costs ``M`` (N, M) or (B, N, M), and whether the call was batched."""
    _require_floating("M", M)
    if M.dim() not in (2, 3):
        raise ValueError(f"M must have shape (N, M) or (B, N, M), but has shape {tuple(M.shape)}")
    batched = M.dim() == 3
    if not batched:
        _refuse_without_batch(lengths_a=lengths_a, lengths_b=lengths_b)
        M = M.unsqueeze(0)
    batch, n, m = M.shape
    dtype, device = compute_dtype(M.dtype), M.device
    inputs = Inputs(
        x_a=None,
        x_b=None,
        cost=M,
        a=_read_weights("a", a, (n,) if not batched else (batch, n), dtype, device, batched),
        b=_read_weights("b", b, (m,) if not batched else (batch, m), dtype, device, batched),
        reg=_read_reg(reg, batch, dtype, device),
        lengths_a=_read_integers("lengths_a", lengths_a, batch, device),
        lengths_b=_read_integers("lengths_b", lengths_b, batch, device),
        cu_seqlens_a=None,
        cu_seqlens_b=None,
        max_a=n,
        max_b=m,
        metric="cost",
    )
    return inputs, batched


def read_points(
    X_a, X_b, a, b, reg, metric, lengths_a, lengths_b, cu_seqlens_a, cu_seqlens_b, max_seqlen_a, max_seqlen_b
) -> tuple[Inputs, bool]:
    """The `Inputs` of point clouds, unbatched, padded or packed, and whether the call was batched."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, but was {metric!r}")
    _require_floating("X_a", X_a)
    _require_floating("X_b", X_b)
    for what in ("dtype", "device"):
        if getattr(X_a, what) != getattr(X_b, what):
            raise ValueError(f"X_b must have the {what} of X_a, {getattr(X_a, what)}, but has {getattr(X_b, what)}")
    if (cu_seqlens_a is None) != (cu_seqlens_b is None):
        missing = "cu_seqlens_b" if cu_seqlens_b is None else "cu_seqlens_a"
        raise ValueError(f"{missing} must be given when the other side is packed, but was None")
    packed = cu_seqlens_a is not None
    for name, max_seqlen in (("max_seqlen_a", max_seqlen_a), ("max_seqlen_b", max_seqlen_b)):
        if not packed and max_seqlen is not None:
            raise ValueError(
                f"{name} must be None unless cu_seqlens_a and cu_seqlens_b are given, but was {max_seqlen}"
            )
    _check_point_shapes(X_a, X_b, packed)
    dtype, device = compute_dtype(X_a.dtype), X_a.device
    if packed:
        for name, lengths in (("lengths_a", lengths_a), ("lengths_b", lengths_b)):
            if lengths is not None:
                raise ValueError(f"{name} must be None for a packed batch (cu_seqlens hold the lengths), but was given")
        cu_seqlens_a = _read_integers("cu_seqlens_a", cu_seqlens_a, None, device)
        batch = len(cu_seqlens_a) - 1
        if batch < 0:
            raise ValueError("cu_seqlens_a must hold at least one offset, but has shape (0,)")
        cu_seqlens_b = _read_integers("cu_seqlens_b", cu_seqlens_b, batch + 1, device)
        max_a = _read_max_seqlen("max_seqlen_a", max_seqlen_a, cu_seqlens_a)
        max_b = _read_max_seqlen("max_seqlen_b", max_seqlen_b, cu_seqlens_b)
        shape_a, shape_b, batched = (X_a.shape[0],), (X_b.shape[0],), True
    else:
        batched = X_a.dim() == 3
        if not batched:
            _refuse_without_batch(lengths_a=lengths_a, lengths_b=lengths_b)
            X_a, X_b = X_a.unsqueeze(0), X_b.unsqueeze(0)
        batch, max_a, max_b = X_a.shape[0], X_a.shape[1], X_b.shape[1]
        lengths_a = _read_integers("lengths_a", lengths_a, batch, device)
        lengths_b = _read_integers("lengths_b", lengths_b, batch, device)
        shape_a = (batch, max_a) if batched else (max_a,)
        shape_b = (batch, max_b) if batched else (max_b,)
    inputs = Inputs(
        x_a=X_a,
        x_b=X_b,
        cost=None,
        a=_read_weights("a", a, shape_a, dtype, device, batched),
        b=_read_weights("b", b, shape_b, dtype, device, batched),
        reg=_read_reg(reg, batch, dtype, device),
        lengths_a=lengths_a,
        lengths_b=lengths_b,
        cu_seqlens_a=cu_seqlens_a,
        cu_seqlens_b=cu_seqlens_b,
        max_a=max_a,
        max_b=max_b,
        metric=metric,
    )
    return inputs, batched


def read_potential(name: str, potential, shape: tuple[int, ...], inputs: Inputs, batched: bool) -> Tensor:
    """A warm-start potential, detached, in the compute dtype and the batched layout."""
    _require_floating(name, potential)
    if potential.device != inputs.device:
        raise ValueError(f"{name} must be on {inputs.device} like the problem, but is on {potential.device}")
    if not batched:
        potential = potential.unsqueeze(0)
    if tuple(potential.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape} of the weights, but has {tuple(potential.shape)}")
    return potential.detach().to(inputs.compute_dtype)


def _require_floating(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, but was {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, but has layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, but has dtype {tensor.dtype}")


def _refuse_without_batch(**arguments) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} must be None for an unbatched problem, but was given")


def _check_point_shapes(X_a: Tensor, X_b: Tensor, packed: bool) -> None:
    allowed = (2,) if packed else (2, 3)
    expected = "(sum of lengths, D) for a packed batch" if packed else "(N, D) or (B, N, D)"
    for name, X in (("X_a", X_a), ("X_b", X_b)):
        if X.dim() not in allowed:
            raise ValueError(f"{name} must have shape {expected}, but has shape {tuple(X.shape)}")
        if X.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one feature, but has shape {tuple(X.shape)}")
    if X_a.dim() != X_b.dim() or (X_a.dim() == 3 and X_a.shape[0] != X_b.shape[0]):
        raise ValueError(f"X_b must have the batch size of X_a, {tuple(X_a.shape)}, but has shape {tuple(X_b.shape)}")
    if X_a.shape[-1] != X_b.shape[-1]:
        raise ValueError(f"X_b must have the {X_a.shape[-1]} features of X_a, but has {X_b.shape[-1]}")


def _read_weights(name, weights, shape, dtype, device, batched: bool) -> Tensor | None:
    if weights is None:
        return None
    _require_floating(name, weights)
    if tuple(weights.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, but has shape {tuple(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"{name} must be on the device of the points or costs, {device}, but is on {weights.device}")
    weights = weights.to(dtype)
    return weights if batched else weights.unsqueeze(0)


def _read_reg(reg, batch: int, dtype, device) -> Tensor:
    if isinstance(reg, Tensor):
        if tuple(reg.shape) not in ((), (batch,)):
            raise ValueError(f"reg must be a number or a tensor of shape ({batch},), but has shape {tuple(reg.shape)}")
        if not reg.dtype.is_floating_point:
            raise ValueError(f"reg must have a floating-point dtype, but has {reg.dtype}")
        _require_reachable("reg", reg, device)
        return reg.to(device=device, dtype=dtype, non_blocking=True).expand(batch)
    if isinstance(reg, bool) or not isinstance(reg, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)):
        raise ValueError(f"reg must be a number or a tensor of shape ({batch},), but was {type(reg).__name__}")
    if not torch.finfo(dtype).tiny <= reg < math.inf:
        raise ValueError(f"reg must be positive, not subnormal, and finite, but was {reg}")
    return torch.full((batch,), reg, dtype=dtype, device=device)


def _read_integers(name: str, values, size: int | None, device) -> Tensor | None:
    if values is None:
        return None
    if isinstance(values, Sequence):
        if not all(isinstance(v, numbers.Integral) and not isinstance(v, bool) for v in values):
            raise ValueError(f"{name} must hold integers, but was {values!r}")
        if any(abs(v) >= 2**31 for v in values):
            raise ValueError(f"{name} must hold integers below 2^31, but was {values!r}")
        values = torch.tensor(values, dtype=torch.int32)
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be an integer tensor or a list of integers, but was {type(values).__name__}")
    if values.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must have dtype int32 or int64, but has {values.dtype}")
    if values.dim() != 1 or (size is not None and len(values) != size):
        expected = f"({size},)" if size is not None else "(B + 1,)"
        raise ValueError(f"{name} must have shape {expected}, but has shape {tuple(values.shape)}")
    _require_reachable(name, values, device)
    # Saturating, so that a number beyond int32 is still out of range for the checks that follow.
    limits = torch.iinfo(torch.int32)
    values = values if values.dtype == torch.int32 else values.clamp(limits.min, limits.max).to(torch.int32)
    return values.to(device, non_blocking=True)


def _require_reachable(name: str, tensor: Tensor, device) -> None:
    """Small arguments may live on the host, from where they are copied without waiting; elsewhere is a mistake."""
    if tensor.device.type not in (device.type, "cpu"):
        raise ValueError(
            f"{name} must be on {device} like the points or costs, or on the CPU, but is on {tensor.device}"
        )


def _read_max_seqlen(name: str, max_seqlen, cu_seqlens: Tensor) -> int:
    if max_seqlen is None:
        # The one host transfer of this package: launch grids and buffers need the bound as a host integer.
        return int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if len(cu_seqlens) > 1 else 0
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)) or max_seqlen < 0:
        raise ValueError(f"{name} must be a non-negative integer, but was {max_seqlen!r}")
    return max_seqlen


def check_values(inputs: Inputs) -> None:
    """Raise `ValueError` for values that no problem may hold; reads the data, so it synchronises an accelerator.

    Points and costs are left to `check_points`, or to a backend that reads them anyway.
    """
    reg = inputs.reg
    bad = ~((reg >= torch.finfo(reg.dtype).tiny) & reg.isfinite())
    if bool(bad.any()):
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
    if inputs.a is None and inputs.b is None:
        return
    mass_a, mass_b = (_check_weights(side, weights, inputs, side == "a") for side, weights, *_ in sides)
    gap = (mass_a - mass_b).abs() > MASS_TOLERANCE * torch.maximum(mass_a, mass_b)
    if bool(gap.any()):
        item = int(gap.nonzero()[0])
        raise ValueError(
            f"a and b must have the same total mass in a balanced problem, but item {item} has "
            f"{float(mass_a[item]):.6g} in a and {float(mass_b[item]):.6g} in b"
        )


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
