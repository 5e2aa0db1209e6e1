"""The recipes of docs/recipes.md against the solvers that the systems used, on the same input."""

import math
import re
from pathlib import Path

import ot
import pytest
import torch

import otkern
from tests.problems import offsets

DOCUMENT = Path(__file__).parent.parent / "docs" / "recipes.md"
INF = math.inf


def sentences(device: str, dtype=torch.float64, d: int = 8):
    """Three pairs of sentences, padded with zeros, and their lengths."""
    generator = torch.Generator().manual_seed(0)
    n, m = torch.tensor([6, 4, 1]), torch.tensor([5, 7, 2])
    x, y = (torch.randn(3, size, d, generator=generator, dtype=dtype) for size in (6, 7))
    y[:, :4] = x[:, :4] + 0.3 * y[:, :4]  # words that correspond
    for tensor, lengths in ((x, n), (y, m)):
        for i, length in enumerate(lengths):
            tensor[i, length:] = 0
    return x.to(device), y.to(device), n.to(device), m.to(device)


def distorted_cost(x, y, n, m, kappa: float = 0.1) -> torch.Tensor:
    """OTAlign's: cosine, a distortion by position, scaled to [0, 1] per sentence."""
    cost = 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT
    i = torch.arange(x.shape[1], device=x.device) / n[:, None]
    j = torch.arange(y.shape[1], device=x.device) / m[:, None]
    cost = cost + kappa * (i[:, :, None] - j[:, None]).abs()
    inside = (i < 1)[:, :, None] & (j < 1)[:, None]
    low = torch.where(inside, cost, INF).amin((1, 2), keepdim=True)
    high = torch.where(inside, cost, -INF).amax((1, 2), keepdim=True)
    return (cost - low) / (high - low)


def words(cost, n, m):
    """Mass 1 a word."""
    return tuple(
        (torch.arange(size, device=cost.device) < length[:, None]).to(cost.dtype)
        for size, length in ((cost.shape[1], n), (cost.shape[2], m))
    )


def otalign(kind: str, cost, n, m, **options) -> otkern.OTResult:
    a, b = words(cost, n, m)
    sizes = {"lengths_a": n, "lengths_b": m, "max_iter": 3000, "tol": 1e-12, **options}
    if kind == "balanced":
        return otkern.solve(cost, reg=0.1, **sizes)
    if kind == "partial":
        mass = 0.8 * torch.minimum(n, m).to(cost.dtype)
        return otkern.solve(cost, a, b, reg=0.1, mass=mass, **sizes)
    return otkern.solve(cost, a, b, reg=0.1, unbalanced=0.5, **sizes)


def otalign_by_pot(kind: str, cost):
    """POT's plan of one pair of sentences."""
    n, m = cost.shape
    a, b = torch.ones(n, dtype=cost.dtype), torch.ones(m, dtype=cost.dtype)
    options = {"numItermax": 5000, "stopThr": 1e-13}
    if kind == "balanced":
        return ot.sinkhorn(a / n, b / m, cost, 0.1, method="sinkhorn_log", **options)
    if kind == "partial":
        return ot.partial.entropic_partial_wasserstein(a, b, cost, 0.1, m=0.8 * min(n, m), **options)
    return ot.unbalanced.sinkhorn_unbalanced(a, b, cost, 0.1, 0.5, reg_type="entropy", **options)


def test_pots_entropy_of_unbalanced_plans_is_a_shift_of_the_cost(backend, device):
    # Theirs is sum P log P - P, ours sum P log P, as in their balanced solvers.
    x, y, _, _ = sentences(device)
    cost = torch.cdist(x[0], y[1])
    a, b = (torch.rand(size, generator=torch.Generator().manual_seed(size)).double() for size in (6, 7))
    result = otkern.solve(
        cost - 0.1,
        a.to(device),
        b.to(device),
        reg=0.1,
        reg_type="entropy",
        unbalanced=0.5,
        max_iter=300,
        backend=backend,
    )
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost.cpu(), 0.1, 0.5, reg_type="entropy", numItermax=5000, stopThr=1e-14
    )
    torch.testing.assert_close(result.plan.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["balanced", "partial", "unbalanced"])
def test_otalign_has_the_plans_of_pot(backend, device, kind):
    x, y, n, m = sentences(device)
    cost = distorted_cost(x, y, n, m)
    plan = otalign(kind, cost, n, m, backend=backend).plan.cpu()
    for i in range(3):
        if kind == "partial" and i == 2:
            continue  # POT's stopping test divides by the first change, which is 0 for one word
        expected = otalign_by_pot(kind, cost[i, : n[i], : m[i]].cpu())
        torch.testing.assert_close(plan[i, : n[i], : m[i]], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["balanced", "partial", "unbalanced"])
def test_otalign_learns_through_the_plan(backend, device, kind):
    x, y, n, m = sentences(device)
    n, m = n[:2], m[:2]
    x, y = x[:2].clone().requires_grad_(), y[:2].clone()
    gold = torch.eye(6, 7, dtype=x.dtype, device=device).expand(2, 6, 7)
    a, b = words(torch.empty(2, 6, 7, dtype=x.dtype, device=device), n, m)
    inside = a[:, :, None] * b[:, None]

    def loss(x):
        cost = distorted_cost(x, y, n, m)
        plan = otalign(kind, cost, n, m, backend=backend, max_iter=2000, tol=1e-12, implicit_tol=1e-12).plan
        plan = plan * n[:, None, None] if kind == "balanced" else plan  # a word has mass 1
        plan = torch.where(inside > 0, plan.clamp(1e-6, 1 - 1e-6), 0.5)
        return torch.nn.functional.binary_cross_entropy(plan, gold, weight=inside, reduction="sum")

    (gradient,) = torch.autograd.grad(loss(x), x)
    words_of_x = a.bool()
    assert gradient[~words_of_x].eq(0).all()
    with torch.no_grad():
        direction = torch.where(words_of_x[..., None], torch.randn(x.shape, generator=torch.Generator().manual_seed(1),
                                                                   dtype=x.dtype).to(device), 0)  # fmt: skip
        step = 1e-6
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    actual = (torch.where(words_of_x[..., None], gradient, 0) * direction).sum()
    assert actual.item() == pytest.approx(slope.item(), rel=1e-4)


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_ottawa_has_the_plan_of_pot(backend, device, direction):
    x, y, _n, _m = sentences(device)
    cost = 1 - torch.nn.functional.normalize(x[1, :4], dim=-1) @ torch.nn.functional.normalize(y[1, :7], dim=-1).mT
    cost = cost if direction == "forwards" else cost.mT
    rows, columns = cost.shape
    with_null = torch.cat([cost, cost.median().expand(rows, 1)], 1)
    a = torch.full((rows,), 1 / rows, dtype=cost.dtype, device=device)
    b = torch.cat([torch.full((columns,), 1 / columns, dtype=cost.dtype, device=device), cost.new_ones(1)])
    options = {"reg": 0.05, "max_iter": 5000, "tol": 1e-12, "backend": backend}
    result = otkern.solve(with_null, a, b, mass=a.sum(), reg_type="entropy", **options)
    expected = ot.partial.entropic_partial_wasserstein(
        a.cpu(), b.cpu(), with_null.cpu(), 0.05, m=float(a.sum()), numItermax=20000, stopThr=1e-14
    )
    torch.testing.assert_close(result.plan.cpu(), expected, rtol=0, atol=1e-8)
    # Every row is moved whole, and no column takes more than its mass.
    torch.testing.assert_close(result.marginal_a, a, rtol=0, atol=1e-10)
    assert (result.marginal_b <= b + 1e-10).all()
    soft = otkern.solve(with_null, a, b, unbalanced=(INF, 0.1), **options)
    torch.testing.assert_close(soft.marginal_a, a, rtol=0, atol=1e-10)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a.cpu(), b.cpu(), with_null.cpu(), 0.05, (INF, 0.1), reg_type="kl", numItermax=20000, stopThr=1e-14
    )
    torch.testing.assert_close(soft.plan.cpu(), expected, rtol=0, atol=1e-8)


def test_hierarchical_values_are_a_cost_matrix_with_gradients(backend, device):
    generator = torch.Generator().manual_seed(0)
    source = [torch.randn(size, 4, generator=generator, dtype=torch.float64).to(device) for size in (3, 5)]
    target = [torch.randn(size, 4, generator=generator, dtype=torch.float64).to(device) for size in (4, 2, 6)]
    source[0].requires_grad_()
    pairs = [(s, t) for s in source for t in target]
    left, right = ([pair[k] for pair in pairs] for k in (0, 1))
    inner = otkern.solve_sample(
        torch.cat(left), torch.cat(right),
        cu_seqlens_a=offsets(left).to(device), cu_seqlens_b=offsets(right).to(device),
        metric="cosine", reg=0.1, max_iter=500, backend=backend,
    )  # fmt: skip
    outer = otkern.solve(inner.value.reshape(2, 3), reg=0.05, max_iter=500, backend=backend)
    (gradient,) = torch.autograd.grad(outer.value, source[0])

    # The same by POT, one problem at a time, with the whole graph kept.
    leaf = source[0].detach().cpu().clone().requires_grad_()
    options = {"reg_type": "KL", "grad": "autodiff", "tol": 1e-12, "max_iter": 2000}
    values = []
    for i in range(2):
        for t in target:
            s = leaf if i == 0 else source[1].cpu()
            cost = 1 - torch.nn.functional.normalize(s, dim=-1) @ torch.nn.functional.normalize(t.cpu(), dim=-1).mT
            values.append(ot.solve(cost, reg=0.1, **options).value)
    expected = ot.solve(torch.stack(values).reshape(2, 3), reg=0.05, **options).value
    torch.testing.assert_close(inner.value.detach().cpu(), torch.stack(values).detach(), rtol=1e-8, atol=0)
    assert outer.value.item() == pytest.approx(expected.item(), rel=1e-8)
    (of_pot,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(gradient.cpu(), of_pot, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rho", [0.001, 0.01])
def test_algen_has_negative_costs_and_the_plan_of_pot(backend, device, rho):
    x, y, _, _ = sentences(device)
    x, y = x[0, :6], y[1, :7]
    similarity = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT
    leaf = (-similarity).requires_grad_()
    a, b = torch.full((6,), 1 / 6).double(), torch.full((7,), 1 / 7).double()
    result = otkern.solve(leaf, reg=0.1, unbalanced=rho, max_iter=100, backend=backend)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a, b, leaf.detach().cpu(), 0.1, rho, reg_type="kl", numItermax=5000, stopThr=1e-14
    )
    # Masses of about 100; POT adds 1e-16 to what it divides by.
    torch.testing.assert_close(result.plan.detach().cpu(), expected, rtol=1e-6, atol=1e-10)
    (gradient,) = torch.autograd.grad(result.value, leaf)
    torch.testing.assert_close(gradient, result.plan.detach(), rtol=1e-8, atol=1e-12)


def test_xlm_align_normalises_twice_and_is_differentiated_as_it_was_computed():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.rand(5, 6, generator=generator, dtype=torch.float64)

    def by_hand(similarity):
        plan = (similarity / 0.1).exp()
        for _ in range(2):
            plan = plan / plan.sum(1, keepdim=True) / 5
            plan = plan / plan.sum(0) / 6
        return plan

    plan = otkern.solve(-similarity, reg=0.1, max_iter=2, grad="unrolled").plan
    torch.testing.assert_close(plan, by_hand(similarity), rtol=1e-11, atol=1e-14)
    (gradient,) = torch.autograd.grad((plan * target).sum(), similarity)
    (expected,) = torch.autograd.grad((by_hand(similarity) * target).sum(), similarity)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_a_detached_teacher_gets_no_gradient(backend, device):
    x, y, n, m = sentences(device)
    x, y = x.requires_grad_(), y.requires_grad_()
    options = {"metric": "cosine", "reg": 0.05, "lengths_a": n, "lengths_b": m, "backend": backend}
    otkern.solve_sample(x, y.detach(), **options).value.mean().backward()
    assert y.grad is None
    assert x.grad.isfinite().all() and x.grad.any()


def test_learned_token_weights_get_the_gradient_of_differences(backend, device):
    x, y, n, m = sentences(device)
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    padding = torch.arange(6, device=device) >= n[:, None]
    options = {"metric": "cosine", "reg": 0.1, "lengths_a": n, "lengths_b": m, "max_iter": 300, "backend": backend}

    def loss(scores):
        a = torch.softmax(scores.masked_fill(padding, -INF), 1)
        return otkern.solve_sample(x, y, a, None, **options).value.mean()

    leaf = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    direction, step = torch.cos(scores), 1e-6
    slope = (loss(scores + step * direction) - loss(scores - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    assert gradient[padding].eq(0).all()


def test_layers_stacked_in_the_batch_are_the_layers_one_by_one(backend, device):
    x, y, n, m = sentences(device)
    layers = 4
    hidden_a, hidden_b = (torch.stack([t * (1 + k) for k in range(layers)]).flatten(0, 1) for t in (x, y))
    options = {"reg": 0.1, "max_iter": 20, "backend": backend}
    sizes = {"lengths_a": n.repeat(layers), "lengths_b": m.repeat(layers)}
    stacked = otkern.solve_sample(hidden_a, hidden_b, **sizes, **options).value.reshape(layers, 3)
    for k in range(layers):
        one = otkern.solve_sample((1 + k) * x, (1 + k) * y, lengths_a=n, lengths_b=m, **options).value
        assert stacked[k].equal(one)


def test_the_closed_form_of_gaussians_stands_beside_the_entropic_value(backend, device):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 1, generator=generator).double() for _ in range(2))
    y = 1 + 1.5 * y
    gaussian = (x.mean(0) - y.mean(0)).square().sum() + (x.std(0) - y.std(0)).square().sum()
    exact = ot.emd2([], [], torch.cdist(x, y).square().numpy())
    assert gaussian.item() == pytest.approx(exact, rel=0.1)
    options = {"reg": 0.2, "max_iter": 300, "backend": backend}
    entropic = otkern.solve_sample(x[:40].to(device), y[:40].to(device), **options).value_linear
    assert entropic.item() == pytest.approx(ot.emd2([], [], torch.cdist(x[:40], y[:40]).square().numpy()), rel=0.2)


def test_the_code_of_the_document_is_python():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) >= 9
    for block in blocks:
        compile(block, str(DOCUMENT), "exec")
