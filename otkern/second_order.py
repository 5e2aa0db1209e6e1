"""What is formed densely in torch, with autograd: second derivatives, and problems with null points as plain ones.

These paths hold matrices of the size of the cost. They serve Hessian-vector products of the value, and implicit
derivatives of plans with null points, where no kernel would be worth its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otkern.problem import Inputs, item_sizes, item_sums, masses, padded, padded_mask, spread, unpadded, weights_of


def dense_cost(inputs: Inputs) -> Tensor:
    """C of equation (1), (B, N, M) in the compute dtype, anything in the padding; twice differentiable."""
    if inputs.cost is not None:
        return inputs.cost.to(inputs.compute_dtype)
    x = padded(inputs, True, inputs.x_a.to(inputs.compute_dtype))
    y = padded(inputs, False, inputs.x_b.to(inputs.compute_dtype))
    if inputs.metric == "dot":
        return -(x @ y.mT)
    if inputs.metric == "cosine":
        return 1 - _unit(x) @ _unit(y).mT
    square = _SquaredDistance.apply(x, y)
    if inputs.metric == "sqeuclidean":
        return square
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


class _SquaredDistance(torch.autograd.Function):
    """|x - y|^2 of points (B, N, D), (B, M, D) from differences; keeps the points only, and is twice differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, w):
        x, y = ctx.saved_tensors
        # Differences do not see a common shift; near the origin the two terms cancel less.
        centre = y.detach().mean(1, keepdim=True)
        x, y = x - centre, y - centre
        dx = 2 * (w.sum(2).unsqueeze(2) * x - w @ y)
        return dx, 2 * (w.sum(1).unsqueeze(2) * y - w.mT @ x)


def _unit(x: Tensor) -> Tensor:
    scale = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(scale == 0, 1, scale)
    square = x.square().sum(-1, keepdim=True)
    return torch.where(square > 0, x / torch.where(square > 0, square, 1).sqrt(), 0)


def _inside(inputs: Inputs) -> Tensor:
    """Which entries of (B, N, M) are pairs of true points."""
    return padded_mask(inputs, True).unsqueeze(2) & padded_mask(inputs, False).unsqueeze(1)


def of_value_sums(inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: list[bool], cotangents):
    """The derivative of `sinkhorn_backward`'s sums: of the problem's tensors, f, g and dvalue; None where none is."""
    tensors = inputs[: Inputs._fields.index("relaxation")]
    leaves = [None if t is None else t.detach().requires_grad_() for t in (*tensors, f, g, dvalue)]
    with torch.enable_grad():
        x_a, x_b, cost, a, b, reg, f, g, dvalue = leaves
        problem = inputs._replace(x_a=x_a, x_b=x_b, cost=cost, a=a, b=b, reg=reg)
        sums = _value_sums(problem, f, g, dvalue, needs)
        pairs = [(s, c) for s, c in zip(sums, cotangents, strict=True) if s is not None and c is not None]
        present = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad([s for s, _ in pairs], present, [c for _, c in pairs], allow_unused=True))
    grads = [None if leaf is None else next(found) for leaf in leaves]
    return (*grads[:6], None), *grads[6:]


def _value_sums(inputs: Inputs, f: Tensor, g: Tensor, dvalue: Tensor, needs: list[bool]):
    """The sums of `backward`, differentiable once more with respect to everything."""
    cost, inside = dense_cost(inputs), _inside(inputs)
    inside = inside & ~cost.detach().isposinf()
    eps = inputs.reg.reshape(-1, 1, 1)
    x = padded(inputs, True, f).unsqueeze(2) + padded(inputs, False, g).unsqueeze(1)
    x = (x - torch.where(inside, cost, 0)) / eps
    a = padded(inputs, True, weights_of(inputs, True)).unsqueeze(2)
    b = padded(inputs, False, weights_of(inputs, False)).unsqueeze(1)
    e = torch.where(inside, _bounded_exp(x), 0)
    p = a * b * e
    dp = dvalue.reshape(-1, 1, 1) * p
    dx_a = dx_b = dcost = ratio_a = ratio_b = entropy = None
    if needs[0] or needs[1]:
        wanted = [t for t, n in ((inputs.x_a, needs[0]), (inputs.x_b, needs[1])) if n]
        found = iter(torch.autograd.grad(cost, wanted, dp, create_graph=True))
        dx_a, dx_b = next(found) if needs[0] else None, next(found) if needs[1] else None
    if needs[2]:
        dcost = dp.to(inputs.cost.dtype)
    if needs[3]:
        ratio_a, ratio_b = unpadded(inputs, True, (b * e).sum(2)), unpadded(inputs, False, (a * e).sum(1))
    if needs[4]:
        h = torch.where(inside, 1 - e + x * e, 1)
        entropy = torch.where(_inside(inputs), a * b * h, 0).sum((1, 2))
    return dx_a, dx_b, dcost, ratio_a, ratio_b, entropy


def _bounded_exp(x: Tensor) -> Tensor:
    """exp, cut where only points without weight lead: their products with weights are of no account there."""
    return x.clamp(max=80.0 if x.dtype == torch.float32 else 600.0).exp()


def with_null(inputs: Inputs) -> Inputs:
    """The balanced problem of equation (17) by its costs, (B, N + 1, M + 1), the null points first; differentiable."""
    cost = dense_cost(inputs)
    price = inputs.relaxation[:, 0].reshape(-1, 1, 1)
    corner = torch.zeros_like(price)
    top = torch.cat([corner, price.expand(-1, 1, cost.shape[2])], 2)
    cost = torch.cat([top, torch.cat([price.expand(-1, cost.shape[1], 1), cost], 2)], 1)
    mass_a, mass_b = masses(inputs, True), masses(inputs, False)
    a = torch.cat([mass_b.unsqueeze(1), padded(inputs, True, weights_of(inputs, True))], 1)
    b = torch.cat([mass_a.unsqueeze(1), padded(inputs, False, weights_of(inputs, False))], 1)
    return Inputs(
        x_a=None,
        x_b=None,
        cost=cost,
        a=a,
        b=b,
        reg=inputs.reg,
        relaxation=None,
        lengths_a=(item_sizes(inputs, True) + 1).to(torch.int32),
        lengths_b=(item_sizes(inputs, False) + 1).to(torch.int32),
        cu_seqlens_a=None,
        cu_seqlens_b=None,
        max_a=inputs.max_a + 1,
        max_b=inputs.max_b + 1,
        metric="cost",
    )


def potentials_with_null(inputs: Inputs, f: Tensor, g: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
    """The potentials of `with_null`'s problem."""
    return (
        torch.cat([multipliers[:, :1], padded(inputs, True, f)], 1),
        torch.cat([multipliers[:, 1:], padded(inputs, False, g)], 1),
    )


def potentials_without_null(inputs: Inputs, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `potentials_with_null`: (f, g, multipliers)."""
    multipliers = torch.stack([f[:, 0], g[:, 0]], 1)
    return unpadded(inputs, True, f[:, 1:]), unpadded(inputs, False, g[:, 1:]), multipliers


def null_cost_moved(inputs: Inputs, f: Tensor, g: Tensor, multipliers: Tensor) -> Tensor:
    """The null points' part of <P, C>, (B,); differentiable."""
    infinite = inputs.relaxation[:, 0].isposinf()
    price = torch.where(infinite, 0, inputs.relaxation[:, 0])
    moved = torch.zeros_like(price)
    for side_a, potential, null in ((True, f, multipliers[:, 1]), (False, g, multipliers[:, 0])):
        x = (potential + spread(inputs, side_a, null - price)) / spread(inputs, side_a, inputs.reg)
        part = weights_of(inputs, side_a) * _bounded_exp(x)
        moved = moved + masses(inputs, side_a) * item_sums(inputs, side_a, part)
    return torch.where(infinite, 0, price * moved)
