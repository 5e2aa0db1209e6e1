"""Fixture problems and the formulas they are judged by, in plain PyTorch that shares no code with otkern.

Every problem holds what lets wrong code through when it is missing: weights of zero, weights that are not uniform,
sizes that differ, points that coincide (within a cloud and between the two).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot")
NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """One problem given by points, its weights and an epsilon at which Sinkhorn's iteration converges quickly."""

    x: Tensor  # (n, D)
    y: Tensor  # (m, D)
    a: Tensor  # (n,)
    b: Tensor  # (m,)
    metric: str
    reg: float

    @property
    def cost(self) -> Tensor:
        return pairwise_cost(self.x, self.y, self.metric)

    def to(self, dtype: torch.dtype) -> Problem:
        """Points in ``dtype``, weights in the dtype of the arithmetic."""
        weights = torch.float64 if dtype == torch.float64 else torch.float32
        return self._replace(x=self.x.to(dtype), y=self.y.to(dtype), a=self.a.to(weights), b=self.b.to(weights))

    def double(self) -> Problem:
        """The same numbers, held exactly, in float64."""
        return self.to(torch.float64)


def make_problem(n: int, m: int, d: int = 3, metric: str = "sqeuclidean", reg: float = 0.5, seed: int = 0) -> Problem:
    """Clouds of points at distances of about 1, in float64; ``reg`` is in units of the mean finite cost's size."""
    generator = torch.Generator().manual_seed(1000 * seed + 37 * n + m)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5
    y = torch.randn(m, d, generator=generator, dtype=torch.float64) / d**0.5 + 0.25
    if n > 2:
        x[1] = x[0]
    y[-1] = x[0]
    if n > 3 and m > 3:
        y[1] = x[2]
    problem = Problem(x, y, make_weights(n, generator), make_weights(m, generator), metric, 1.0)
    scale = float(problem.cost.abs().mean())
    return problem._replace(reg=reg * max(scale, 0.1))


def make_weights(n: int, generator: torch.Generator) -> Tensor:
    """Non-negative weights of sum 1, no two alike, with zeros in the middle and at the end where n allows it; (n,)."""
    weights = 0.2 + torch.rand(n, generator=generator, dtype=torch.float64)
    if n > 2:
        weights[n // 2] = 0
    if n > 4:
        weights[-1] = 0
    return weights / weights.sum()


def make_batch(sizes, d: int = 3, metric: str = "sqeuclidean", reg: float = 0.5) -> list[Problem]:
    """Problems of the given (n, m), all different."""
    return [make_problem(n, m, d, metric, reg, seed) for seed, (n, m) in enumerate(sizes)]


def pad(tensors: list[Tensor], filler: float = float("nan"), extra: int = 1) -> Tensor:
    """A padded batch (B, longest + extra, ...) of tensors that differ in their first size."""
    longest = max(len(t) for t in tensors) + extra
    out = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[1:]), filler)
    for i, tensor in enumerate(tensors):
        out[i, : len(tensor)] = tensor
    return out


def offsets(tensors: list[Tensor]) -> Tensor:
    """The (B + 1,) int32 offsets of a packed batch."""
    return torch.tensor([0, *(len(t) for t in tensors)]).cumsum(0).to(torch.int32)


def pack(problems: list[Problem], device: str = "cpu") -> dict:
    """The arguments of a packed batch: new leaf tensors for points, weights and reg, and the offsets."""
    x, y, a, b = ([p[i] for p in problems] for i in range(4))
    return {
        "X_a": torch.cat(x).to(device),
        "X_b": torch.cat(y).to(device),
        "a": torch.cat(a).to(device),
        "b": torch.cat(b).to(device),
        "reg": torch.tensor([p.reg for p in problems], dtype=a[0].dtype, device=device),
        "cu_seqlens_a": offsets(x).to(device),
        "cu_seqlens_b": offsets(y).to(device),
        "max_seqlen_a": max(map(len, x)),
        "max_seqlen_b": max(map(len, y)),
    }


def pairwise_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The cost by its definition, from differences of points; (..., n, m). What fp64 answers are made from."""
    if metric == "dot":
        return -(x.unsqueeze(-2) * y.unsqueeze(-3)).sum(-1)
    if metric == "cosine":
        x, y = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)
        return 1 - (x.unsqueeze(-2) * y.unsqueeze(-3)).sum(-1)
    square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if metric == "sqeuclidean":
        return square
    # The square root has an infinite slope at 0, where the subgradient is defined to be 0.
    return torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())


def sinkhorn(cost: Tensor, a: Tensor, b: Tensor, reg, iterations: int) -> tuple[Tensor, Tensor]:
    """Potentials after exactly ``iterations`` of the log-domain iteration, in whatever dtype comes in; any batch."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    log_a, log_b = a.log(), b.log()
    reg = torch.as_tensor(reg, dtype=a.dtype)[..., None]

    def rows(g):
        f = -reg * ((g.unsqueeze(-2) - cost) / reg[..., None] + log_b.unsqueeze(-2)).logsumexp(-1)
        return torch.where(f.isposinf(), 0, f)  # every term masked

    def columns(f):
        g = -reg * ((f.unsqueeze(-1) - cost) / reg[..., None] + log_a.unsqueeze(-1)).logsumexp(-2)
        return torch.where(g.isposinf(), 0, g)

    for _ in range(iterations):
        f = rows(g)
        g = columns(f)
    f = torch.where(a == 0, rows(g), f)
    shift = ((b * g).sum(-1, keepdim=True) - (a * f).sum(-1, keepdim=True)) / (a.sum(-1) + b.sum(-1))[..., None]
    return f + shift, g - shift


def dual_objective(cost: Tensor, a: Tensor, b: Tensor, reg, f: Tensor, g: Tensor) -> Tensor:
    """<a, f> + <b, g> - reg (sum P - sum a sum b) at given potentials; differentiable in all but the potentials."""
    reg = torch.as_tensor(reg, dtype=a.dtype)
    plan = plan_of(cost, a, b, reg, f, g)
    mass = plan.sum((-1, -2)) - a.sum(-1) * b.sum(-1)
    return (a * f).sum(-1) + (b * g).sum(-1) - reg * mass


def plan_of(cost: Tensor, a: Tensor, b: Tensor, reg, f: Tensor, g: Tensor) -> Tensor:
    """P = a b exp((f + g - C) / reg)."""
    reg = torch.as_tensor(reg, dtype=a.dtype)[..., None, None]
    ratio = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / reg
    # An iteration keeps every exponential within 1 / weight, but for pairs of two zero weights.
    neither = (a == 0).unsqueeze(-1) & (b == 0).unsqueeze(-2)
    return a.unsqueeze(-1) * b.unsqueeze(-2) * torch.where(neither, 0, ratio).exp()


def primal_objective(plan: Tensor, cost: Tensor, a: Tensor, b: Tensor, reg: float) -> Tensor:
    """<P, C> + reg KL(P | a b) of one plan."""
    product = a.unsqueeze(-1) * b
    ratio = torch.where(plan > 0, plan / torch.where(product > 0, product, 1), 1)
    divergence = (plan * ratio.log()).sum() - plan.sum() + product.sum()
    return torch.where(plan > 0, plan * cost, 0).sum() + reg * divergence


def round_to_feasible(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A plan near ``plan`` with exactly the marginals a and b (Altschuler, Weed and Rigollet 2017, algorithm 2)."""
    plan = plan * (a / plan.sum(1).clamp(min=1e-300)).clamp(max=1).unsqueeze(1)
    plan = plan * (b / plan.sum(0).clamp(min=1e-300)).clamp(max=1)
    missing_a, missing_b = a - plan.sum(1), b - plan.sum(0)
    return plan + missing_a.unsqueeze(1) * missing_b / missing_a.sum().clamp(min=1e-300)


def exact_value(problem: Problem, iterations: int) -> Tensor:
    """The value after ``iterations`` in float64, attached to the graph of its points, weights and reg."""
    cost = problem.cost
    with torch.no_grad():
        f, g = sinkhorn(cost, problem.a, problem.b, problem.reg, iterations)
    return dual_objective(cost, problem.a, problem.b, problem.reg, f, g)


def plain_value(problem: Problem, iterations: int) -> Tensor:
    """What a user writes without otkern, in the dtype of the points: cost by torch's own functions, a logsumexp loop.

    The gradient is autograd's, at fixed potentials. The accuracy of otkern is measured against the error of this.
    """
    x, y, metric = problem.x, problem.y, problem.metric
    if metric == "dot":
        cost = -(x @ y.mT)
    elif metric == "cosine":
        normalize = torch.nn.functional.normalize
        cost = 1 - normalize(x, dim=-1) @ normalize(y, dim=-1).mT
    elif x.dtype in (torch.bfloat16, torch.float16):  # torch.cdist takes no 16-bit points
        square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        distance = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
        cost = square if metric == "sqeuclidean" else distance
    else:
        distance = torch.cdist(x, y)
        cost = distance.square() if metric == "sqeuclidean" else distance
    cost = cost.to(problem.a.dtype)
    with torch.no_grad():
        f, g = sinkhorn(cost, problem.a, problem.b, problem.reg, iterations)
    return dual_objective(cost, problem.a, problem.b, problem.reg, f, g)


def central_differences(function, point: Tensor, directions: Tensor, step: float = 1e-6) -> Tensor:
    """Derivatives of ``function`` ((K, ...) -> (K,)) at ``point`` along ``directions`` (K, ...); (K,).

    The error is the curvature's step² ~ 1e-12 plus the rounding of the values over the step, ~ 1e-16 / 1e-6.
    """
    with torch.no_grad():
        forward, backward = function(point + step * directions), function(point - step * directions)
    return (forward - backward) / (2 * step)


def basis(point: Tensor) -> Tensor:
    """The unit directions of a tensor's space; (numel, ...)."""
    return torch.eye(point.numel(), dtype=point.dtype).reshape(-1, *point.shape)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected entry."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-300))


def positive(problem: Problem) -> Problem:
    """Without weights of 0, where POT's gradients are NaN."""
    a, b = problem.a + 0.02, problem.b + 0.02
    return problem._replace(a=a / a.sum(), b=b / b.sum())
