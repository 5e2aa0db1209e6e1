"""The debiased value: what it is, that it is a divergence, and that one call solves its three problems."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import otkern
from otkern import backends, ops
from otkern.arguments import read_points
from otkern.debiasing import stacked
from tests.problems import METRICS, make_batch, make_problem, offsets, pad, pairwise_cost, relative_error

SIZES = [(9, 7), (5, 4), (1, 3), (17, 9)]


def clouds(problems, device) -> list[list[torch.Tensor]]:
    return [[p[i].to(device) for p in problems] for i in range(4)]


def arguments(sides, layout: str) -> tuple[list, dict]:
    """The points and weights of a batch in one of its layouts, and what describes it."""
    if layout == "padded":
        lengths = {f"lengths_{side}": [len(t) for t in sides[i]] for i, side in enumerate("ab")}
        return [pad(side) for side in sides], lengths
    packing = {f"cu_seqlens_{side}": offsets(sides[i]).to(sides[i][0].device) for i, side in enumerate("ab")}
    longest = {f"max_seqlen_{side}": max(map(len, sides[i])) for i, side in enumerate("ab")}
    return [torch.cat(side) for side in sides], packing | longest


def composed(x, y, a, b, rho=None, **options) -> torch.Tensor:
    """The definition, equation (22), from three separate solves."""
    rho_a, rho_b = rho if isinstance(rho, tuple) else (rho, rho)

    def solve(x, y, a, b, rho_a, rho_b):
        unbalanced = None if rho_a is None and rho_b is None else (rho_a, rho_b)
        return otkern.solve_sample(x, y, a, b, unbalanced=unbalanced, **options).value

    value = solve(x, y, a, b, rho_a, rho_b)
    value = value - solve(x, x, a, a, rho_a, rho_a) / 2 - solve(y, y, b, b, rho_b, rho_b) / 2
    if rho is None:
        return value
    return value + options["reg"] / 2 * (a.sum(-1) - b.sum(-1)).square()


def self_potential(x, a, reg, iterations, rho=math.inf, metric="sqeuclidean") -> torch.Tensor:
    """Equation (27), as it stands there; (n,)."""
    cost, h = pairwise_cost(x, x, metric), torch.zeros_like(a)
    for _ in range(iterations):
        s = -reg * ((h - cost) / reg + a.log()).logsumexp(1)
        h = (h + s / (1 + reg / rho)) / 2
    s = -reg * ((h - cost) / reg + a.log()).logsumexp(1)
    return torch.where(a == 0, s / (1 + reg / rho), h)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rho", [None, 0.7, (0.4, 1.5), (0.4, math.inf)])
def test_the_value_and_its_gradient_are_those_of_three_solves(backend, device, interpreted, metric, rho):
    if interpreted and metric in ("euclidean", "dot"):
        pytest.skip("the interpreter takes too long for every metric")
    problem = make_problem(9, 7, metric=metric)
    mass = 1.0 if rho is None or rho == (0.4, math.inf) else 1.3
    leaves = [t.to(device).clone().requires_grad_() for t in (*problem[:3], mass * problem.b)]
    options = {"metric": metric, "reg": 2 * problem.reg, "max_iter": 60}
    value = otkern.sinkhorn_divergence(*leaves, unbalanced=rho, backend=backend, **options)
    others = [t.detach().cpu().requires_grad_() for t in leaves]
    expected = composed(*others, rho=rho, backend="reference", **options)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    grads, wanted = torch.autograd.grad(value, leaves), torch.autograd.grad(expected, others)
    for grad, want in zip(grads, wanted, strict=True):
        assert relative_error(grad.cpu(), want) < 1e-9


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rho", [math.inf, 0.7])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_a_cloud_with_itself_is_iterated_with_one_potential(backend, device, metric, rho, iterations):
    problem = make_problem(9, 7, metric=metric)
    x, y, a, b = (t.to(device) for t in problem[:4])
    options = {"metric": metric, "unbalanced": None if rho == math.inf else rho, "max_iter": iterations}
    result = otkern.solve_sample(x, y, a, b, reg=problem.reg, debias=True, backend=backend, **options)
    for potential, points, weights in zip(result.self_potentials, (problem.x, problem.y), problem[2:4], strict=True):
        expected = self_potential(points, weights, problem.reg, iterations, rho, metric)
        torch.testing.assert_close(potential.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reg", [1e-4, 1e-2, 1.0, 100.0])
def test_one_potential_halves_its_error_in_every_iteration(backend, device, reg):
    # Two potentials take thousands of iterations at a small reg.
    x = make_problem(20, 6).x[None].to(device)
    inputs, _ = read_points(x, x, None, None, reg, "sqeuclidean", None, None, None, None, None, None)
    inputs, how = inputs._replace(first_self=0), ops.Differentiation()
    *_, error, n_iters = ops.sinkhorn(inputs, ops.Iterations(max_iter=60, tol=1e-9), how, False, backend)
    assert n_iters < 40
    assert error <= 1e-9


@pytest.mark.parametrize("sizes", [(9, 7), (7, 7), (1, 4)])
def test_uniform_weights_and_dense_batches_of_one_or_two_sizes(backend, device, sizes):
    problems = make_batch([sizes, sizes])
    x, y = (torch.stack([p[i] for p in problems]).to(device) for i in range(2))
    reg = torch.tensor([1.6, 0.9], dtype=torch.float64, device=device)
    value = otkern.sinkhorn_divergence(x, y, reg=reg, max_iter=150, backend=backend)
    expected = composed(x.cpu(), y.cpu(), None, None, reg=reg.cpu(), max_iter=150, backend="reference")
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-9, atol=0)
    alone = otkern.sinkhorn_divergence(x[1], y[1], reg=0.9, max_iter=150, backend=backend)
    assert value[1].equal(alone)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("rho", [None, (0.4, 1.5)])
def test_an_item_is_the_same_alone_padded_and_packed(backend, device, interpreted, layout, rho):
    problems = make_batch(SIZES[:2] if interpreted else SIZES)
    sides = clouds(problems, device)
    reg = torch.tensor([p.reg for p in problems], dtype=torch.float64, device=device)
    points, description = arguments(sides, layout)
    leaves = [t.requires_grad_() for t in points]
    options = {"unbalanced": rho, "max_iter": 6, "debias": True, "backend": backend}
    result = otkern.solve_sample(*leaves, reg=reg, **description, **options)
    grads = torch.autograd.grad(result.value.sum(), leaves)
    for i, problem in enumerate(problems):
        alone = [side[i].clone().requires_grad_() for side in sides]
        single = otkern.solve_sample(*alone, reg=problem.reg, **options)
        assert single.value.equal(result.value[i])
        n, m = problem.cost.shape
        assert single.plan.equal(result.plan[i, :n, :m])
        for k, (grad, want) in enumerate(zip(grads, torch.autograd.grad(single.value, alone), strict=True)):
            size = (n, m)[k % 2]
            if layout == "padded":
                assert not grad[i, size:].any()
                mine = grad[i, :size]
            else:
                mine = grad.split([len(t) for t in sides[k]])[i]
            # Three gradients are added up in an order of autograd's own.
            torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-14)


def test_plan_and_potentials_are_those_between_the_clouds(backend, device):
    problem = make_problem(9, 7)
    x, y, a, b = (t.to(device) for t in problem[:4])
    options = {"reg": problem.reg, "max_iter": 8, "backend": backend}
    plain = otkern.solve_sample(x, y, a, b, **options)
    result = otkern.solve_sample(x, y, a, b, debias=True, **options)
    assert result.plan.equal(plain.plan)
    assert result.value_linear.equal(plain.value_linear)
    for mine, other in zip(result.potentials, plain.potentials, strict=True):
        assert mine.equal(other)
    assert plain.self_potentials is None


def test_the_worst_of_the_three_problems_decides_whether_it_converged(backend, device):
    problem = make_problem(9, 7)
    x, y, a, b = (t.to(device) for t in problem[:4])
    options = {"reg": problem.reg / 4, "max_iter": 500, "tol": 1e-6, "backend": backend}
    pair = otkern.solve_sample(x, y, a, b, **options)
    result = otkern.solve_sample(x, y, a, b, debias=True, **options)
    assert (result.n_iters, result.marginal_error) == (pair.n_iters, pair.marginal_error)
    # A single point is matched in one iteration, a cloud with itself is not.
    pair = otkern.solve_sample(x, y[:1], a, b[:1] / b[:1], **options)
    assert otkern.solve_sample(x, y[:1], a, b[:1] / b[:1], debias=True, **options).n_iters > pair.n_iters
    assert result.converged
    with pytest.warns(UserWarning, match="not converged to tol=1e-06"):
        assert not otkern.solve_sample(x, y, a, b, debias=True, **(options | {"max_iter": 2})).converged


@pytest.mark.parametrize("metric", METRICS)
def test_identical_clouds_have_value_0_and_gradient_0(backend, device, interpreted, metric):
    problem = make_problem(9, 9, metric=metric)
    x, a = problem.x.to(device).requires_grad_(), problem.a.to(device)
    iterations = 30 if interpreted else 300
    value = otkern.sinkhorn_divergence(
        x, x.detach().clone(), a, a, metric=metric, reg=2 * problem.reg, max_iter=iterations, backend=backend
    )
    assert abs(value.item()) < 1e-12
    (grad,) = torch.autograd.grad(value, x)
    assert grad.abs().max() < 1e-9


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("rho", [None, 0.5])
def test_it_is_never_negative_and_grows_with_the_distance(backend, device, interpreted, metric, rho):
    problems = make_batch([(5, 4)] * (2 if interpreted else 6), metric=metric)
    x, y, a, b = (torch.stack([p[i] for p in problems]).to(device) for i in range(4))
    b = b if rho is None else 1.4 * b
    iterations = 20 if interpreted else 100
    options = {"metric": metric, "reg": 0.5, "unbalanced": rho, "max_iter": iterations, "backend": backend}
    near, far = (otkern.sinkhorn_divergence(x, y + shift, a, b, **options) for shift in (0, 3))
    assert (near > 0).all()
    assert (far > near).all()


def test_an_empty_neighbourhood_costs_its_mass(backend, device):
    # Clouds that are too far apart for anything to move: S = (rho + eps / 2) times what each is worth to itself.
    x = torch.zeros(1, 2, dtype=torch.float64, device=device)
    a, b = (torch.tensor([w], dtype=torch.float64, device=device) for w in (1.0, 1.7))
    rho, reg = 0.5, 0.3
    value = otkern.sinkhorn_divergence(x, x + 100, a, b, reg=reg, unbalanced=rho, max_iter=300, backend=backend)
    # A point alone: P = p with rho log(p / a) * 2 + eps log(p / a^2) = 0, so p = a^((2 rho + 2 eps) / (2 rho + eps)).
    own = [w ** ((2 * rho + 2 * reg) / (2 * rho + reg)) for w in (1.0, 1.7)]
    assert value.item() == pytest.approx((rho + reg / 2) * sum(own), rel=1e-12)


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unrolled"])
def test_the_gradient_is_that_of_finite_differences(grad):
    problem = make_problem(5, 4)
    rho = torch.tensor([0.8], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (*problem[:2], problem.a + 0.1, problem.b + 0.2)]
    scalars = [t.requires_grad_() for t in (torch.tensor([problem.reg], dtype=torch.float64), rho)]

    def value(x, y, a, b, reg, rho):
        return otkern.sinkhorn_divergence(
            x, y, a, b, reg=reg, unbalanced=rho, max_iter=200, grad=grad, implicit_tol=1e-13, backend="reference"
        )

    assert torch.autograd.gradcheck(value, (*leaves, *scalars), atol=1e-7)


def test_it_is_the_divergence_of_ott(backend, device):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    pytest.importorskip("ott", reason="ott is not installed")
    from ott.geometry.pointcloud import PointCloud
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    problem = make_problem(9, 7)
    with jax.enable_x64(True):
        x, y, a, b = (jax.numpy.asarray(t.numpy()) for t in problem[:4])
        options = {"threshold": 1e-12, "max_iterations": 5000}
        expected, _ = sinkhorn_divergence(PointCloud, x, y, a=a, b=b, epsilon=problem.reg, solve_kwargs=options)
        expected = float(expected)
    points = [t.to(device) for t in problem[:4]]
    value = otkern.sinkhorn_divergence(*points, reg=problem.reg, max_iter=300, backend=backend)
    assert value.item() == pytest.approx(expected, rel=1e-8)


def test_the_reference_measure_does_not_matter_when_balanced(backend, device):
    problem = make_problem(9, 7)
    points = [t.to(device) for t in problem[:4]]
    options = {"reg": problem.reg, "max_iter": 8, "backend": backend}
    kl, entropy = (otkern.sinkhorn_divergence(*points, reg_type=kind, **options) for kind in ("KL", "entropy"))
    assert kl.equal(entropy)


class _Count(TorchDispatchMode):
    """How often each op of this package is called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("otkern"):
            self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2)])
def test_nothing_has_value_0(backend, device, shape):
    x = torch.zeros(shape, device=device)
    value = otkern.sinkhorn_divergence(x, x, reg=1.0, backend=backend)
    assert value.tolist() == [0.0] * shape[0]
    assert otkern.SamplesLoss()(x, x).tolist() == [0.0] * shape[0]


def test_the_three_problems_are_one_call_where_calls_are_launches(backend, device):
    problem = make_problem(5, 4)
    x, y = (t.to(device).requires_grad_() for t in problem[:2])
    with _Count() as count:
        otkern.sinkhorn_divergence(x, y, reg=0.5, max_iter=2, backend=backend).backward()
    calls = 1 if backends.launches(backend) else 3
    assert count.calls == {"otkern.sinkhorn.default": calls, "otkern.sinkhorn_backward.default": calls}


def test_the_stack_holds_no_needless_padding():
    def shape(*size):
        return torch.zeros(*size)

    def rows(x, y, lengths=(None, None), offsets=(None, None)):
        inputs, _ = read_points(x, y, None, None, 1.0, "dot", *lengths, *offsets, None, None)
        stack = stacked(inputs)
        return tuple(stack.x_a.shape), stack.packed

    assert rows(shape(2, 5, 3), shape(2, 5, 3)) == ((6, 5, 3), False)
    assert rows(shape(2, 5, 3), shape(2, 4, 3)) == ((2 * (5 + 5 + 4), 3), True)
    assert rows(shape(9, 3), shape(4, 3), offsets=([0, 5, 9], [0, 1, 4])) == ((9 + 9 + 4, 3), True)
    # The true lengths are data, which the host does not know.
    assert rows(shape(2, 5, 3), shape(2, 4, 3), lengths=([5, 1], [4, 2])) == ((6, 5, 3), False)


def test_a_warm_start_and_a_schedule_serve_the_stack(backend, device):
    problem = make_problem(9, 7)
    points = [t.to(device) for t in problem[:4]]
    options = {"reg": problem.reg, "debias": True, "backend": backend}
    solved = otkern.solve_sample(*points, max_iter=100, **options)
    again = otkern.solve_sample(*points, max_iter=100, potentials_init=solved.potentials, scaling=0.5, **options)
    assert again.value.item() == pytest.approx(solved.value.item(), rel=1e-12)
    alone = otkern.solve_sample(*points, max_iter=1, potentials_init=solved.potentials, **(options | {"debias": False}))
    assert otkern.solve_sample(*points, max_iter=1, potentials_init=solved.potentials, **options).plan.equal(alone.plan)


def test_the_loss_module_takes_it(backend, device):
    problem = make_problem(9, 7)
    x, y = (t.float().to(device) for t in problem[:2])
    loss = otkern.SinkhornLoss(metric="sqeuclidean", reg=0.3, max_iter=8, debias=True, backend=backend)
    assert loss(x, y).equal(otkern.sinkhorn_divergence(x, y, reg=0.3, max_iter=8, backend=backend))
    batch = otkern.solve_sample_batch(x[None], y[None], 0.3, max_iter=8, debias=True, backend=backend)
    assert batch.value[0].equal(loss(x, y))


def test_what_has_no_divergence_is_refused_with_the_reason():
    x = torch.rand(4, 2)
    with pytest.raises(NotImplementedError, match="no divergence is defined with mass"):
        otkern.sinkhorn_divergence(x, x, reg=1.0, mass=0.5, backend="reference")
    with pytest.raises(NotImplementedError, match="no divergence is defined with null_cost"):
        otkern.sinkhorn_divergence(x, x, reg=1.0, null_cost=0.5, backend="reference")
    with pytest.raises(NotImplementedError, match='unbalanced and reg_type="entropy"'):
        otkern.sinkhorn_divergence(x, x, reg=1.0, unbalanced=1.0, reg_type="entropy", backend="reference")
    with pytest.raises(TypeError, match="debias"):
        otkern.solve(torch.rand(4, 4), reg=1.0, debias=True)


def test_bad_values_are_reported_of_what_the_caller_gave():
    x, y = torch.rand(2, 4, 3), torch.rand(2, 5, 3)
    b = torch.full((2, 5), 0.2)
    b[1, 3] = -0.2
    with pytest.raises(ValueError, match=r"^b must be finite and non-negative, but holds -0.2 at \(1, 3\)$"):
        otkern.sinkhorn_divergence(x, y, b=b, reg=1.0, backend="reference")
    y[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"^X_b must be finite within the true length, but item 1 is not$"):
        otkern.sinkhorn_divergence(x, y, reg=1.0, backend="reference")


def test_it_compiles_without_a_break(backend, device):
    def value_and_gradients(function):
        x, y = (t.to(device).requires_grad_() for t in (torch.ones(2, 5, 3).cumsum(1), torch.ones(2, 4, 3).cumsum(2)))
        value = function(x, y)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    def divergence(x, y):
        return otkern.sinkhorn_divergence(x, y, reg=0.5, max_iter=3, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(divergence, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(value_and_gradients(compiled), value_and_gradients(divergence), strict=True):
        torch.testing.assert_close(traced, eager)
