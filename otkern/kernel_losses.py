"""Kernel norms between clouds of points: the losses of GeomLoss's `SamplesLoss` that are no transport.

Half the squared norm of a - b in the kernel's space (Feydy et al. 2019, "Interpolating between optimal transport and
MMD using Sinkhorn divergences"):

    value = 1/2 sum a_i a_i' k(x_i, x_i') + 1/2 sum b_j b_j' k(y_j, y_j') - sum a_i b_j k(x_i, y_j)

    "energy"     k(x, y) = -|x - y|
    "gaussian"   k(x, y) = exp(-|x - y|^2 / (2 blur^2))
    "laplacian"  k(x, y) = exp(-|x - y| / blur)

Sums run over blocks of rows that the backward forms again: memory is linear in the number of points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from otkern.problem import Inputs, padded, padded_mask, unpadded, weights_of

NAMES = ("energy", "gaussian", "laplacian")
# Entries of the kernel's matrix that are formed at a time.
BLOCK_ENTRIES = 1 << 22

Kernel = Callable[[Tensor, Tensor], Tensor]


def kernel_of(name: str, blur: float, least_distance: float) -> Kernel:
    """k(x, y) of points (B, N, D) and (B, M, D) as (B, N, M); a distance counts for at least ``least_distance``."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        # Differences give coincident points a distance, and a subgradient, of exactly 0.
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=least_distance)

    if name == "energy":
        return lambda x, y: -distance(x, y)
    if name == "laplacian":
        return lambda x, y: torch.exp(-distance(x / blur, y / blur))
    if name == "gaussian":
        return lambda x, y: torch.exp(
            -torch.cdist(x / blur, y / blur, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
        )
    raise ValueError(f"loss must be one of {', '.join(NAMES)}, but was {name!r}")


def kernel_norm(inputs: Inputs, kernel: Kernel) -> Tensor:
    """The value above, (B,), in the compute dtype; differentiable with respect to points and weights."""
    (x, a), (y, b) = _sides(inputs)
    within = (a * _product(kernel, x, x, a)).sum(1) + (b * _product(kernel, y, y, b)).sum(1)
    return within / 2 - (a * _product(kernel, x, y, b)).sum(1)


def kernel_potentials(inputs: Inputs, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The value's derivatives with respect to the weights: (k * (α - β))(x), (B, N), and (k * (β - α))(y), (B, M)."""
    (x, a), (y, b) = _sides(inputs)
    at_x = _product(kernel, x, x, a) - _product(kernel, x, y, b)
    at_y = _product(kernel, y, y, b) - _product(kernel, y, x, a)
    return unpadded(inputs, True, at_x), unpadded(inputs, False, at_y)


def _sides(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Of each side the points and the weights, padded, in the compute dtype; both 0 in the padding."""
    sides = []
    for side_a, points in ((True, inputs.x_a), (False, inputs.x_b)):
        assert points is not None
        inside = padded_mask(inputs, side_a).unsqueeze(2)
        cloud = torch.where(inside, padded(inputs, side_a, points.to(inputs.compute_dtype)), 0)
        sides.append((cloud, padded(inputs, side_a, weights_of(inputs, side_a))))
    return sides


def _product(kernel: Kernel, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """sum_j k(x_i, y_j) v_j, (B, N), of x (B, N, D), y (B, M, D) and v (B, M)."""

    def rows_of(rows: Tensor, y: Tensor, v: Tensor) -> Tensor:
        # Not a matrix product, which autocast would take in 16 bits.
        return (kernel(rows, y) * v.unsqueeze(1)).sum(2)

    size = max(1, BLOCK_ENTRIES // max(1, y.shape[0] * y.shape[1]))
    if x.shape[1] <= size:
        return rows_of(x, y, v)
    blocks = [checkpoint(rows_of, rows, y, v, use_reentrant=False) for rows in x.split(size, 1)]
    return torch.cat(blocks, 1)
