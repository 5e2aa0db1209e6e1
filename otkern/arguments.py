"""From the arguments of the public functions to `Inputs`; errors name what is wrong with which argument.

Shapes, dtypes and devices are checked here, values by `otkern.problem.check_values` inside the op.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from otkern.problem import DTYPES, METRICS, Inputs, compute_dtype


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
        relaxation=None,
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
        relaxation=None,
        lengths_a=lengths_a,
        lengths_b=lengths_b,
        cu_seqlens_a=cu_seqlens_a,
        cu_seqlens_b=cu_seqlens_b,
        max_a=max_a,
        max_b=max_b,
        metric=metric,
    )
    return inputs, batched


def read_relaxation(inputs: Inputs, unbalanced, mass, null_cost, entropy: bool) -> Inputs:
    """The problem with its marginals relaxed: at most one of the three is not None.

    ``entropy``: ``reg_type`` is "entropy".
    """
    given = [name for name, value in _named(unbalanced=unbalanced, mass=mass, null_cost=null_cost) if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]} must be None together with {given[0]}, but both were given")
    if not given:
        return inputs
    if unbalanced is not None:
        pair = unbalanced if isinstance(unbalanced, (tuple, list)) else (unbalanced, unbalanced)
        if len(pair) != 2:
            raise ValueError(f"unbalanced must be a number, a tensor or a pair of these, but has length {len(pair)}")
        if all(rho is None or (is_number(rho) and rho == math.inf) for rho in pair):
            return inputs
        columns = [
            _read_per_item("unbalanced", math.inf if rho is None else rho, inputs, positive=True) for rho in pair
        ]
        return inputs._replace(relaxation=torch.stack(columns, 1), kind="unbalanced", entropy=entropy)
    name, value = ("mass", mass) if mass is not None else ("null_cost", null_cost)
    column = _read_per_item(name, value, inputs, positive=name == "mass")
    relaxation = torch.stack([column, torch.zeros_like(column)], 1)
    kind = "partial" if name == "mass" else "null"
    return inputs._replace(relaxation=relaxation, kind=kind, entropy=entropy and kind == "partial")


def _named(**arguments):
    return arguments.items()


def is_number(value) -> bool:
    """Whether this is a number of Python or numpy, or a traced one, and no bool."""
    return isinstance(value, (int, float, torch.SymFloat, torch.SymInt, numbers.Real)) and not isinstance(value, bool)


def _read_per_item(name: str, value, inputs: Inputs, positive: bool) -> Tensor:
    """A number, or a tensor of shape () or (B,), as a (B,) tensor in the compute dtype; differentiable."""
    batch, dtype, device = inputs.batch, inputs.compute_dtype, inputs.device
    if isinstance(value, Tensor):
        if tuple(value.shape) not in ((), (batch,)):
            raise ValueError(
                f"{name} must be a number or a tensor of shape ({batch},), but has shape {tuple(value.shape)}"
            )
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} must have a floating-point dtype, but has {value.dtype}")
        _require_reachable(name, value, device)
        return value.to(device=device, dtype=dtype, non_blocking=True).expand(batch)
    if not is_number(value):
        raise ValueError(f"{name} must be a number or a tensor of shape ({batch},), but was {type(value).__name__}")
    if positive and not value > 0:
        raise ValueError(f"{name} must be positive, but was {value}")
    if not positive and not value > -math.inf:
        raise ValueError(f"{name} must be a number above -inf, but was {value}")
    return torch.full((batch,), value, dtype=dtype, device=device)


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
    if type(tensor).__module__ == "numpy":
        raise ValueError(f"{name} must be a torch.Tensor, but was a numpy.ndarray: torch.from_numpy makes one of it")
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
    if reg is None or (isinstance(reg, (int, float)) and reg == 0):
        got = "NoneType" if reg is None else reg
        raise ValueError(f"reg must be a positive number, but was {got}: exact transport is not done here")
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
        values = torch.tensor(values, dtype=torch.int32, device="cpu")
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
