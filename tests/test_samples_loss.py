"""`SamplesLoss` against GeomLoss's: the same numbers from the same calls, and better ones where GeomLoss errs."""

import math

import pytest
import torch
from torch import nn

import otkern
from otkern import ops
from otkern.arguments import read_points
from tests.problems import make_problem, relative_error

geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
SEEN_IN_GEOMLOSS = "0.3.1"


def positive(problem):
    """Without weights of 0, whose logarithm GeomLoss sets to -100000."""
    a, b = problem.a + 0.02, problem.b + 0.02
    return problem._replace(a=a / a.sum(), b=b / b.sum())


def batch_of(shape, count: int | None, d: int = 3):
    """(a, x, b, y) in float64, stacked where ``count`` is given."""
    problems = [positive(make_problem(*shape, d=d, seed=seed)) for seed in range(count or 1)]
    tensors = [torch.stack([p[i] for p in problems]) for i in (2, 0, 3, 1)]
    return tensors if count else [t[0] for t in tensors]


def value_and_gradients(loss, tensors) -> tuple[torch.Tensor, tuple]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    weights = torch.arange(1.0, 1 + value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaves)


def assert_equal_losses(mine, theirs, tensors, dtype=torch.float64, device="cpu"):
    """Values and gradients of the loss on these tensors, ours in ``dtype`` and theirs in float64.

    1e-10 in float64. In float32 1e-5, or for a gradient twice the error of theirs: C / eps may be 1e3, and the plan
    then carries the rounding of 1e3.
    """
    narrow = dtype != torch.float64
    value, grads = value_and_gradients(mine, [t.to(device, dtype) for t in tensors])
    expected, wanted = value_and_gradients(theirs, tensors)
    rounded = value_and_gradients(theirs, [t.to(dtype) for t in tensors])[1]
    assert value.shape == expected.shape
    assert relative_error(value.cpu(), expected) < (1e-5 if narrow else 1e-10)
    for grad, want, other in zip(grads, wanted, rounded, strict=True):
        assert relative_error(grad.cpu(), want) < (max(1e-5, 2 * relative_error(other, want)) if narrow else 1e-10)


# Parity.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"blur": 0.3, "scaling": 0.8}, {"blur": 5.0}, {"diameter": 1.6}, {"diameter": 0.01, "blur": 0.2}],
    ids=str,
)
def test_values_and_gradients_are_those_of_geomloss(backend, device, p, debias, options, dtype):
    tensors = batch_of((9, 7), None)
    theirs = geomloss.SamplesLoss("sinkhorn", p=p, debias=debias, backend="tensorized", **options)
    mine = otkern.SamplesLoss("sinkhorn", p=p, debias=debias, backend=backend, **options)
    assert_equal_losses(mine, theirs, tensors, dtype, device)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("diameter", [2.0, "batch"])
@pytest.mark.parametrize("shape", [(9, 7), (7, 7)])
def test_batches_are_those_of_geomloss(backend, device, interpreted, p, debias, diameter, shape):
    tensors = batch_of(shape, 2 if interpreted else 3)
    theirs = geomloss.SamplesLoss(
        "sinkhorn", p=p, debias=debias, diameter=None if diameter == "batch" else diameter, backend="tensorized"
    )
    mine = otkern.SamplesLoss("sinkhorn", p=p, debias=debias, diameter=diameter, backend=backend)
    assert_equal_losses(mine, theirs, tensors, device=device)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.5])
def test_potentials_are_those_of_geomloss(backend, device, p, debias, reach):
    options = {"p": p, "debias": debias, "reach": reach, "potentials": True}
    mine = otkern.SamplesLoss("sinkhorn", backend=backend, **options)
    theirs = geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options)
    for count in (None, 2):
        tensors = batch_of((9, 7), count)
        leaves = [t.to(device).clone().requires_grad_() for t in tensors]
        expected_leaves = [t.clone().requires_grad_() for t in tensors]
        pair, expected = mine(*leaves), theirs(*expected_leaves)
        if count is None:
            for potential, want in zip(pair, expected, strict=True):
                torch.testing.assert_close(potential.cpu(), want, rtol=1e-10, atol=1e-12)
            grads = torch.autograd.grad(sum((t**2).sum() for t in pair), leaves[1::2])
            wanted = torch.autograd.grad(sum((t**2).sum() for t in expected), expected_leaves[1::2])
            for grad, want in zip(grads, wanted, strict=True):
                assert relative_error(grad.cpu(), want) < 1e-10
        else:
            assert [t.shape for t in pair] == [t.shape for t in expected]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_zero_weights_as_padding_are_those_of_geomloss(backend, device, p, debias):
    tensors = batch_of((9, 7), 2)
    tensors[0][1, 5:] = 0
    tensors[2][0, 4:] = 0
    tensors[0], tensors[2] = (w / w.sum(1, keepdim=True) for w in tensors[::2])
    theirs = geomloss.SamplesLoss("sinkhorn", p=p, debias=debias, diameter=3.0, backend="tensorized")
    mine = otkern.SamplesLoss("sinkhorn", p=p, debias=debias, diameter=3.0, backend=backend)
    assert_equal_losses(mine, theirs, tensors, device=device)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_with_a_reach_values_are_those_of_geomloss_and_gradients_the_right_ones(backend, device, p, debias):
    a, x, b, y = batch_of((9, 7), None)
    a = 1.3 * a
    options = {"p": p, "debias": debias, "blur": 0.3, "reach": 0.6, "scaling": 0.9}
    mine = otkern.SamplesLoss("sinkhorn", backend=backend, **options)
    theirs = geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options)
    value, grads = value_and_gradients(mine, [t.to(device) for t in (a, x, b, y)])
    expected, wanted = value_and_gradients(theirs, (a, x, b, y))
    assert relative_error(value.cpu(), expected) < 1e-10
    rho, eps = 0.6**p, 0.3**p
    factor = (rho + eps) / (rho + eps / 2) if geomloss.__version__ == SEEN_IN_GEOMLOSS else 1
    for k in (1, 3):
        assert relative_error(grads[k].cpu(), factor * wanted[k]) < 1e-10


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_with_a_reach_many_steps_lead_to_the_exact_gradients(p, debias):
    a, x, b, y = batch_of((9, 7), None)
    a = 1.3 * a
    options = {"p": p, "debias": debias, "blur": 0.3, "reach": 0.6, "backend": "reference"}
    _, grads = value_and_gradients(otkern.SamplesLoss(scaling=0.998, **options), (a, x, b, y))
    # Exact by test_divergence.py. A factor of (rho + eps / 2) / (rho + eps) would be off by 0.1 and more.
    _, exact = value_and_gradients(otkern.SamplesLoss(tol=1e-10, max_iter=5000, **options), (a, x, b, y))
    for grad, want in zip(grads, exact, strict=True):
        assert relative_error(grad, want) < 0.02


@pytest.mark.parametrize("diameter", [None, 2.0])
def test_an_item_does_not_depend_on_its_batch_or_its_padding(backend, device, diameter):
    tensors = [t.to(device) for t in batch_of((9, 7), 2)]
    loss = otkern.SamplesLoss(diameter=diameter, backend=backend)
    alone = [loss(*(t[i] for t in tensors)) for i in range(2)]
    assert loss(*tensors).equal(torch.stack(alone))
    padded = [torch.full((2, 12, *t.shape[2:]), math.nan, dtype=t.dtype, device=device) for t in tensors]
    for wide, t in zip(padded, tensors, strict=True):
        wide[:, : t.shape[1]] = t
    assert loss(*padded, lengths_a=[9, 9], lengths_b=[7, 7]).equal(torch.stack(alone))


def test_identical_points_are_ordinary_input(backend, device):
    # GeomLoss takes the logarithm of their diameter, 0.
    x = torch.ones(3, 2, device=device, requires_grad=True)
    for p in (1, 2):
        value = otkern.SamplesLoss(p=p, backend=backend)(x, x.detach().clone())
        assert value.item() == pytest.approx(0, abs=1e-7)
        (grad,) = torch.autograd.grad(value, x)
        assert not grad.any()
        assert otkern.SamplesLoss(p=p, backend=backend)(x, x.detach() + 1).item() > 0.5


def test_the_call_forms_are_those_of_geomloss(backend, device):
    a, x, b, y = (t.to(device) for t in batch_of((9, 7), 2))
    loss = otkern.SamplesLoss(backend=backend)
    value = loss(a, x, b, y)
    assert loss(a.unsqueeze(2), x, b.unsqueeze(2), y).equal(value)
    assert loss(None, a, x, None, b, y).equal(value)
    assert loss(a[0], x[0], b[0], y[0]).equal(value[0])
    uniform = loss(x, y)
    assert uniform.shape == (2,)
    torch.testing.assert_close(uniform, loss(torch.full_like(a, 1 / 9), x, torch.full_like(b, 1 / 7), y))
    assert loss(x[0], y[0]).shape == ()


# Modules that switch by changing the import.


class WordOT(nn.Module):
    """Word vectors of two languages, pooled over a batch of sentences."""

    def __init__(self, SamplesLoss, p):
        super().__init__()
        self.loss = SamplesLoss(loss="sinkhorn", p=p, blur=0.05)

    def forward(self, x, y):
        return self.loss(x, y)


class CtcOt(nn.Module):
    """Speech frames and text tokens with their relative position as one more coordinate, p = 2, one item at a time."""

    def __init__(self, SamplesLoss):
        super().__init__()
        self.loss = SamplesLoss("sinkhorn", p=2, blur=0.05, diameter=3.0)

    def forward(self, speech, text):
        clouds = []
        for cloud in (speech, text):
            position = torch.linspace(0, 1, cloud.shape[1], dtype=cloud.dtype).expand(len(cloud), -1).unsqueeze(2)
            clouds.append(torch.cat([cloud, position], 2))
        return 0.1 * self.loss(*clouds).mean()


class ZeroSwot(nn.Module):
    """Weights of 0 on the padding, and layers stacked along the batch."""

    def __init__(self, SamplesLoss):
        super().__init__()
        self.loss = SamplesLoss(loss="sinkhorn", p=2, blur=0.05, scaling=0.5, debias=False, diameter=6.0)

    def forward(self, x, y):
        a, b = torch.ones(x.shape[:2], dtype=x.dtype), torch.ones(y.shape[:2], dtype=y.dtype)
        a[1, 5:] = b[0, 4:] = 0
        return self.loss(a / a.sum(1, keepdim=True), x, b / b.sum(1, keepdim=True), y).sum()


class UniPsda(nn.Module):
    """Many clouds of five points, p = 1."""

    def __init__(self, SamplesLoss):
        super().__init__()
        self.losses = nn.ModuleList(SamplesLoss("sinkhorn", p=1, blur=blur, diameter=4.0) for blur in (0.1, 0.5))

    def forward(self, x, y):
        return sum(loss(x, y).mean() for loss in self.losses)


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (lambda SamplesLoss: WordOT(SamplesLoss, 1), [(70, 64), (64, 64)]),
        (lambda SamplesLoss: WordOT(SamplesLoss, 2), [(70, 64), (64, 64)]),
        (CtcOt, [(3, 40, 15), (3, 9, 15)]),
        (ZeroSwot, [(4, 12, 16), (4, 9, 16)]),
        (UniPsda, [(50, 5, 8), (50, 5, 8)]),
    ],
    ids=["WordOT-1", "WordOT-2", "CtcOt", "ZeroSwot", "UniPsda"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_modules_switch_by_changing_the_import(module, shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    clouds = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    assert_equal_losses(module(otkern.SamplesLoss), module(geomloss.SamplesLoss), clouds, dtype)


def test_autocast_does_not_touch_the_arithmetic(backend, device):
    tensors = [t.float().to(device).requires_grad_() for t in batch_of((9, 7), 2)]
    loss = otkern.SamplesLoss(backend=backend)
    expected, wanted = value_and_gradients(loss, tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        value, grads = value_and_gradients(loss, tensors)
    assert value.equal(expected)
    assert all(grad.equal(want) for grad, want in zip(grads, wanted, strict=True))


# The converged mode.


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.8])
def test_the_converged_loss_is_what_many_steps_lead_to(backend, device, p, debias, reach):
    a, x, b, y = batch_of((9, 7), None)
    a, b = (a, b) if reach is None else (1.3 * a, b)
    options = {"p": p, "debias": debias, "reach": reach, "blur": 0.5}
    loop = otkern.SamplesLoss(scaling=0.995, backend="reference", **options)
    converged = otkern.SamplesLoss(tol=1e-9, max_iter=2000, backend=backend, **options)
    expected, wanted = value_and_gradients(loop, (a, x, b, y))
    value, grads = value_and_gradients(converged, [t.to(device) for t in (a, x, b, y)])
    assert relative_error(value.cpu(), expected) < 1e-3
    for k, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        grad = grad.cpu()
        if k % 2 == 0 and reach is None:
            # The mass is fixed, and so is the constant of this gradient.
            grad, want = grad - grad.mean(), want - want.mean()
        assert relative_error(grad, want) < 0.02
    points = [t.to(device) for t in (a, x, b, y)]
    functions = otkern.SamplesLoss(tol=1e-9, max_iter=2000, potentials=True, backend=backend, **options)(*points)
    steps = otkern.SamplesLoss(potentials=True, scaling=loop.scaling, backend="reference", **options)(a, x, b, y)
    for function, want in zip(functions, steps, strict=True):
        function = function.cpu()
        if reach is None:
            function, want = function - function.mean(), want - want.mean()
        assert relative_error(function, want) < 0.02


def test_the_converged_loss_takes_batches_and_lengths(backend, device):
    a, x, b, y = (t.to(device) for t in batch_of((9, 7), 2))
    loss = otkern.SamplesLoss(blur=0.5, tol=1e-6, backend=backend)
    value = loss(a, x, b, y)
    assert value.shape == (2,)
    assert value[1].equal(loss(a[1], x[1], b[1], y[1]))
    assert loss(x, y, lengths_a=[9, 4], lengths_b=[7, 7])[1].equal(loss(x[1, :4], y[1]))


# What is refused, and the op.


def test_what_is_not_served_is_refused_with_the_reason():
    x = torch.rand(4, 2)
    for options, error, message in (
        ({"loss": "l1"}, ValueError, "^loss must be 'sinkhorn' or one of energy"),
        ({"loss": "hausdorff"}, NotImplementedError, "^loss='hausdorff' is not served"),
        ({"p": 3}, ValueError, "^p must be 1 or 2"),
        ({"blur": 0}, ValueError, "^blur must be a positive"),
        ({"blur": torch.ones(2)}, ValueError, "^blur must be a positive"),
        ({"reach": -1.0}, ValueError, "^reach must be None or a positive"),
        ({"diameter": "item"}, ValueError, "^diameter must be None, 'batch' or a positive"),
        ({"scaling": 1}, ValueError, "^scaling must be a number between 0 and 1"),
        ({"cost": "Norm2(X-Y)"}, NotImplementedError, "formula of KeOps: for a squared distance give p=2"),
        ({"cost": torch.cdist, "tol": 1e-3}, NotImplementedError, r"^tol: .* otkern\.solve"),
        ({"cost": 3}, ValueError, "^cost must be None or a function"),
        ({"backend": "keops"}, ValueError, "^backend must be one of auto, "),
    ):
        with pytest.raises(error, match=message):
            otkern.SamplesLoss(**options)
        loss = otkern.SamplesLoss()
        for name, value in options.items():
            setattr(loss, name, value)
        with pytest.raises(error, match=message):
            loss(x, x)
    with pytest.raises(ValueError, match="not 3 tensors"):
        otkern.SamplesLoss()(x, x, x)
    with pytest.raises(ValueError, match=r"^a and b must have the same total mass"):
        otkern.SamplesLoss(tol=1e-3)(torch.ones(4), x, torch.ones(4) / 4, x)
    with pytest.raises(ValueError, match=r"^cost must return a tensor of shape \(1, 4, 4\)"):
        otkern.SamplesLoss(cost=lambda x, y: x)(x, x)


def test_a_second_derivative_is_refused(backend, device):
    x = torch.rand(4, 2, device=device, requires_grad=True)
    value = otkern.SamplesLoss(backend=backend)(x, torch.rand(5, 2, device=device))
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="GeomLoss's loop is not differentiable again"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("kind", ["balanced", "unbalanced"])
def test_the_op_keeps_its_contract_with_torch(backend, device, kind):
    x, y = (torch.rand(3, n, 2, device=device, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    inputs, _ = read_points(x, y, None, None, 0.5, "sqeuclidean", None, None, None, None, None, None)
    if kind == "unbalanced":
        inputs = inputs._replace(kind=kind, relaxation=torch.full((3, 2), 0.7, dtype=x.dtype, device=device))
    start, steps = torch.full_like(inputs.reg, 2), torch.tensor([2, 0, 3], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.otkern.symmetric, (*inputs, start, steps, 0.5, 0.0, False, backend))

    def soft_minima(x, y):
        problem = inputs._replace(x_a=x, x_b=y)
        return ops.symmetric(problem, start, steps, 0.5, 0.0, False, backend)

    s_a, s_b, f, g, r_a, r_b = soft_minima(x, y)
    cost = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3)
    torch.testing.assert_close(s_a, -0.5 * ((g.unsqueeze(1) - cost) / 0.5).logsumexp(2) + 0.5 * math.log(5))
    torch.testing.assert_close(s_b, -0.5 * ((f.unsqueeze(2) - cost) / 0.5).logsumexp(1) + 0.5 * math.log(4))
    for ratio in (r_a, r_b):
        torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_the_loss_compiles_without_a_break():
    x, y = torch.rand(2, 5, 3), torch.rand(2, 4, 3)
    loss = otkern.SamplesLoss(blur=0.3)
    torch._dynamo.reset()
    # A compiled graph adds the terms of the loss in its own order.
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y), loss(x, y))


def test_the_representation_names_the_options():
    assert "p=1, blur=0.1, reach=None" in repr(otkern.SamplesLoss(p=1, blur=0.1))


def test_what_stands_in_the_padding_has_no_mass_in_the_converged_loss():
    x, y, a, b = torch.randn(1, 4, 3), torch.randn(1, 5, 3), torch.rand(1, 4) + 0.1, torch.rand(1, 5) + 0.1
    a, b = a / a.sum(), b / b.sum()
    loss = otkern.SamplesLoss(blur=0.5, debias=False, tol=1e-6)
    wide_a = torch.cat([a, torch.full((1, 2), 9.0)], 1)
    wide_x = torch.cat([x, torch.full((1, 2, 3), torch.nan)], 1)
    assert loss(wide_a, wide_x, b, y, lengths_a=torch.tensor([4])).equal(loss(a, x, b, y))


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_a_cloud_that_is_not_there_costs_all_of_the_other(tol):
    x, y = torch.randn(2, 3, 3), torch.randn(2, 4, 3)
    lengths = {"lengths_a": [0, 3], "lengths_b": [4, 4]}
    assert otkern.SamplesLoss(tol=tol)(x, y, **lengths)[0] == torch.inf
    priced = otkern.SamplesLoss(reach=1.0, tol=tol)(x, y, **lengths)
    # all of y at a price of rho = reach^2 / 2 of GeomLoss's cost |x - y|^2 / 2 (its weight is rho + eps / 2)
    assert priced[0].item() == pytest.approx(1.0, abs=5e-3)
    assert priced[1].isfinite()


def test_one_graph_serves_clouds_of_every_size():
    def loss(x, y):
        return otkern.SamplesLoss(blur=0.5)(x, y).sum() + otkern.solve_sample(x, y, reg=0.1).value_linear.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    y = torch.randn(2, 4, 3)
    for n in range(5, 16):
        x = torch.randn(2, n, 3)
        torch.testing.assert_close(compiled(x, y), loss(x, y))


# Calls as people write them.


def _cosine_cost(x, y):
    return 1 - nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).mT


def _cosine_cost_undefined_at_zero(x, y):
    return 1 - (x / x.norm(dim=-1, keepdim=True)) @ (y / y.norm(dim=-1, keepdim=True)).mT


def _manhattan(x, y):
    return (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(-1)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("options", [{}, {"reach": 0.7}, {"p": 1, "potentials": True}], ids=str)
@pytest.mark.parametrize("cost", [_cosine_cost, _manhattan])
def test_a_cost_of_ones_own_is_that_of_geomloss(backend, device, cost, options, debias):
    options = options | {"cost": cost, "blur": 0.3, "debias": debias}
    mine, theirs = otkern.SamplesLoss(**options, backend=backend, diameter="batch"), geomloss.SamplesLoss(**options)
    for tensors in (batch_of((7, 5), None), batch_of((7, 5), 2)):
        if options.get("reach"):  # whose gradients lack a factor in GeomLoss
            assert relative_error(mine(*(t.to(device) for t in tensors)).cpu(), theirs(*tensors)) < 1e-10
            continue
        if not options.get("potentials"):
            assert_equal_losses(mine, theirs, tensors, device=device)
            continue
        for got, want in zip(mine(*(t.to(device) for t in tensors)), theirs(*tensors), strict=True):
            torch.testing.assert_close(got.cpu().view_as(want), want, rtol=1e-9, atol=1e-9)


def test_a_cost_of_ones_own_takes_lengths(backend, device):
    _, x, _, y = (t.to(device) for t in batch_of((7, 5), 2))
    x_padded = torch.cat([x, torch.full_like(x, math.nan)], 1)
    lengths = {"lengths_a": [7, 4], "lengths_b": [5, 3]}
    for cost in (_manhattan, _cosine_cost_undefined_at_zero):
        loss = otkern.SamplesLoss(cost=cost, blur=0.3, backend=backend)
        value, (grad, _) = value_and_gradients(lambda x, y, loss=loss: loss(x, y, **lengths)[1], [x_padded, y])
        expected, (want, _) = value_and_gradients(loss, [x[1, :4], y[1, :3]])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad[1, :4], want)
        assert not grad[0].any() and not grad[1, 4:].any()


@pytest.mark.parametrize("name", ["energy", "gaussian", "laplacian"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernel_norms_are_those_of_geomloss(monkeypatch, name, dtype):
    mine, theirs = otkern.SamplesLoss(name, blur=0.4), geomloss.SamplesLoss(name, blur=0.4)
    for tensors in (batch_of((9, 6), None), batch_of((9, 6), 3)):
        for entries in (1 << 22, 20):
            monkeypatch.setattr("otkern.kernel_losses.BLOCK_ENTRIES", entries)
            assert_equal_losses(mine, theirs, tensors, dtype)
    mine.potentials = theirs.potentials = True
    for got, want in zip(mine(*tensors), theirs(*tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["energy", "gaussian", "laplacian"])
def test_kernel_norms_read_no_option_of_transport_and_no_autocast(name):
    tensors = [t.float() for t in batch_of((9, 6), 2)]
    expected, wanted = value_and_gradients(otkern.SamplesLoss(name, blur=0.4), tensors)
    for options in ({"p": 3}, {"tol": 1e-3}, {"cost": _manhattan}, {"reach": 0.5}, {"debias": False}):
        assert otkern.SamplesLoss(name, blur=0.4, **options)(*tensors).equal(expected), options
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = value_and_gradients(otkern.SamplesLoss(name, blur=0.4), tensors)
    assert value.equal(expected) and all(map(torch.equal, grads, wanted))


def test_kernel_norms_save_memory_linear_in_the_points(monkeypatch):
    monkeypatch.setattr("otkern.kernel_losses.BLOCK_ENTRIES", 4000)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, y = (torch.rand(n, 3, requires_grad=True) for n in (600, 500))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = otkern.SamplesLoss("energy")(x, y)
    assert value.requires_grad
    # One kernel matrix has 600 x 500 entries of 4 bytes.
    assert sum(saved.values()) < 600 * 500


def test_kernel_norms_take_lengths_a_kernel_and_coincident_points():
    a, x, b, y = batch_of((7, 5), 2)
    loss = otkern.SamplesLoss("energy", backend="online")
    padded = torch.cat([x, torch.full_like(x, math.nan)], 1)
    assert torch.allclose(loss(padded, y, lengths_a=[7, 4], lengths_b=[5, 5])[1], loss(x[1, :4], y[1]))
    leaf = x[0].clone().requires_grad_()
    assert loss(leaf, x[0]).abs() < 1e-12
    assert torch.autograd.grad(loss(leaf, x[0]), leaf)[0].abs().max() < 1e-12

    def kernel(x, y, blur, use_keops, ranges):
        return torch.exp(-_manhattan(x, y) / blur)

    options = {"loss": "gaussian", "kernel": kernel, "blur": 0.3}
    assert_equal_losses(otkern.SamplesLoss(**options), geomloss.SamplesLoss(**options), [a, x, b, y])


@pytest.mark.parametrize(
    "name", ["blur", "p", "reach", "loss", "cost", "debias", "scaling", "potentials", "backend", "tol"]
)
def test_attributes_set_later_are_obeyed(name):
    value = {"blur": 0.3, "p": 1, "reach": 0.6, "loss": "energy", "cost": _manhattan, "debias": False, "scaling": 0.8,
             "potentials": True, "backend": "online", "tol": 1e-6}[name]  # fmt: skip
    tensors = batch_of((7, 5), None)
    start = {"p": 1} if name == "backend" else {}
    loss = otkern.SamplesLoss(**start)
    setattr(loss, name, value)
    got, want = loss(*tensors), otkern.SamplesLoss(**start, **{name: value})(*tensors)
    assert all(map(torch.equal, got, want)) if name == "potentials" else torch.equal(got, want)


def test_a_subclass_may_set_its_attributes_before_it_calls():
    class Loss(otkern.SamplesLoss):
        def __init__(self):
            super().__init__()
            self.cost = _cosine_cost
            self.blur = torch.tensor(0.2, dtype=torch.float64)

    tensors = batch_of((7, 5), None)
    assert_equal_losses(Loss(), geomloss.SamplesLoss(cost=_cosine_cost, blur=0.2), tensors)


@pytest.mark.parametrize("options", [{}, {"reach": 0.5}, {"debias": False}, {"loss": "energy"}], ids=str)
def test_masses_that_differ_are_taken_as_geomloss_takes_them(backend, device, options):
    a, x, b, y = batch_of((7, 5), 2)
    tensors = [3 * a, x, 1.7 * b, y]
    mine = otkern.SamplesLoss(blur=0.4, diameter="batch", backend=backend, **options)
    theirs = geomloss.SamplesLoss(blur=0.4, **options)
    if options.get("reach"):  # whose gradients lack a factor in GeomLoss
        assert relative_error(mine(*(t.to(device) for t in tensors)).cpu(), theirs(*tensors)) < 1e-10
    else:
        assert_equal_losses(mine, theirs, tensors, device=device)


def test_options_may_be_tensors_of_one_element():
    tensors = batch_of((7, 5), None)
    numbers = {"blur": 0.3, "diameter": 2.0, "reach": 0.8}
    loss = otkern.SamplesLoss(**{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()})
    assert torch.equal(loss(*tensors), otkern.SamplesLoss(**numbers)(*tensors))


def test_weights_of_another_dtype_and_points_of_16_bits():
    a, x, b, y = batch_of((7, 5), None)
    loss = otkern.SamplesLoss(blur=0.4)
    weights = a.clone().requires_grad_()
    value = loss(weights, x.float(), b, y.float())
    assert value.dtype == torch.float32 and relative_error(value.double(), loss(a, x, b, y)) < 1e-5
    assert torch.autograd.grad(value, weights)[0].dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(half, y.to(dtype))
        assert value.dtype == torch.float32 and torch.autograd.grad(value, half)[0].dtype == dtype


def test_labels_and_multiscale_give_the_exact_answer():
    a, x, b, y = batch_of((7, 5), None)
    labels = torch.zeros(7, dtype=torch.long), torch.zeros(5, dtype=torch.long)
    exact = otkern.SamplesLoss()(a, x, b, y)
    assert torch.equal(otkern.SamplesLoss(backend="multiscale")(labels[0], a, x, labels[1], b, y), exact)
    assert torch.equal(otkern.SamplesLoss()(None, a, x, None, b, y), exact)


def test_distances_have_a_floor_where_geomloss_has_one():
    x = torch.zeros(1, 2, dtype=torch.float64)
    for backend, floor in (("tensorized", 1e-4), ("auto", 1e-4), ("online", 0.0), ("multiscale", 0.0)):
        value = otkern.SamplesLoss(p=1, debias=False, backend=backend)(x, x)
        assert abs(float(value) - floor) < 1e-12, backend
    assert abs(float(geomloss.SamplesLoss(p=1, debias=False, diameter=1.0)(x, x)) - 1e-4) < 1e-12
