"""The envelope gradient against finite differences, against the formula that defines it, and against plain PyTorch."""

import functools

import pytest
import torch

import otkern
from tests.problems import (
    METRICS,
    NARROW,
    Problem,
    basis,
    central_differences,
    dual_objective,
    exact_value,
    make_batch,
    make_problem,
    pack,
    pairwise_cost,
    plain_value,
    relative_error,
    sinkhorn,
)

# The accuracy that is promised for fp64 gradients. The differences themselves err by about 1e-9, see problems.py.
FINITE_DIFFERENCES = 1e-5

# Enough, at the reg of the fixtures, for marginal errors below 1e-9.
CONVERGED = 80

INPUTS = ("X_a", "X_b", "a", "b", "reg")


def inputs_of(problem: Problem) -> dict:
    return dict(zip(INPUTS, (*problem[:4], torch.tensor(problem.reg, dtype=problem.a.dtype)), strict=True))


def plain_converged_value(problem: Problem, reg_type: str = "KL", **changed):
    """The value in plain fp64, with some inputs replaced by batches of themselves: (K, ...) -> (K,)."""
    x, y, a, b, reg = (inputs_of(problem) | changed).values()
    cost = pairwise_cost(x, y, problem.metric)
    value = dual_objective(cost, a, b, reg, *sinkhorn(cost, a, b, reg, CONVERGED))
    if reg_type == "entropy":
        # sum P log P = KL(P | a b) + sum P log(a b) + sum P - sum a sum b, where the last two cancel at mass 1.
        value = value + reg * (torch.special.xlogy(a, a).sum(-1) + torch.special.xlogy(b, b).sum(-1))
    return value


def balanced_directions(weights: torch.Tensor) -> torch.Tensor:
    """Directions that take mass from the heaviest point and give it to another one that has some; (K, n)."""
    directions = basis(weights)
    directions[:, weights.argmax()] -= 1
    return directions[(weights > 0) & (weights < weights.max())]


@functools.cache
def expected_derivatives(n: int, m: int, metric: str, reg_type: str = "KL") -> dict:
    """Per input: directions (K, ...) and central differences (K,) of the plain converged value along them."""
    problem = make_problem(n, m, metric=metric)
    result = {}
    for name, point in inputs_of(problem).items():
        directions = balanced_directions(point) if name in "ab" else basis(point)
        value = functools.partial(lambda name, points: plain_converged_value(problem, reg_type, **{name: points}), name)
        result[name] = directions, central_differences(value, point, directions)
    return result


def gradients(problem: Problem, backend: str, device: str, max_iter: int = CONVERGED, **options) -> dict:
    """The gradient of the value with respect to every input, on the CPU."""
    leaves = {name: t.to(device).detach().requires_grad_() for name, t in inputs_of(problem).items()}
    otkern.solve_sample(**leaves, metric=problem.metric, max_iter=max_iter, backend=backend, **options).value.backward()
    return {name: leaf.grad.cpu() for name, leaf in leaves.items()}


def along(gradient: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    return (directions * gradient).flatten(1).sum(1) if gradient.dim() else directions * gradient


@pytest.mark.parametrize(("n", "m"), [(5, 4), (17, 9)])
@pytest.mark.parametrize("metric", METRICS)
def test_every_gradient_is_that_of_finite_differences(backend, device, metric, n, m):
    actual = gradients(make_problem(n, m, metric=metric), backend, device)
    for name, (directions, expected) in expected_derivatives(n, m, metric).items():
        assert relative_error(along(actual[name], directions), expected) < FINITE_DIFFERENCES, name


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_with_entropy_as_regulariser_are_those_of_finite_differences(backend, device, metric):
    actual = gradients(make_problem(5, 4, metric=metric), backend, device, reg_type="entropy")
    for name, (directions, expected) in expected_derivatives(5, 4, metric, "entropy").items():
        derivatives = along(torch.where(inputs_of(make_problem(5, 4))[name] == 0, 0, actual[name]), directions)
        assert relative_error(derivatives, expected) < FINITE_DIFFERENCES, name


def test_the_entropy_of_a_weight_of_zero_has_a_finite_gradient_that_survives_normalisation(backend, device):
    problem = make_problem(5, 4)
    assert (problem.a == 0).any() and (problem.b == 0).any()
    assert all(
        gradient.isfinite().all() for gradient in gradients(problem, backend, device, reg_type="entropy").values()
    )
    weights = problem.b.to(device).detach().requires_grad_()
    cost = problem.cost.to(device)
    value = otkern.solve(cost, b=weights / weights.sum(), reg=0.3, reg_type="entropy", backend=backend).value
    (gradient,) = torch.autograd.grad(value, weights)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(5, 4), (17, 9)])
def test_the_gradient_of_a_cost_is_that_of_finite_differences(backend, device, n, m):
    problem = make_problem(n, m)
    a, b, reg = problem.a, problem.b, problem.reg

    def value(cost):
        return dual_objective(cost, a, b, reg, *sinkhorn(cost, a, b, reg, CONVERGED))

    expected = central_differences(value, problem.cost, basis(problem.cost)).reshape(n, m)
    cost = problem.cost.to(device).requires_grad_()
    otkern.solve(cost, a.to(device), b.to(device), reg=reg, max_iter=CONVERGED, backend=backend).value.backward()
    assert relative_error(cost.grad.cpu(), expected) < FINITE_DIFFERENCES


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck_passes(backend, device, interpreted, metric):
    problem = make_problem(4, 3, d=2, metric=metric, reg=1.0)
    x, y, a, b, reg = (t.to(device).requires_grad_() for t in inputs_of(problem).values())

    def value(x, y, log_a, log_b, reg):
        # A softmax keeps the masses equal under every perturbation, and the zero weights zero.
        a, b = torch.softmax(log_a, 0), torch.softmax(log_b, 0)
        return otkern.solve_sample(x, y, a, b, metric=metric, reg=reg, max_iter=30, backend=backend).value

    arguments = (x, y, a.detach().log().requires_grad_(), b.detach().log().requires_grad_(), reg)
    # In the interpreter one random direction an input stands for all of them.
    assert torch.autograd.gradcheck(value, arguments, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=interpreted)


@pytest.mark.parametrize("max_iter", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_of_a_truncated_solve_is_the_partial_derivative_at_its_potentials(
    backend, device, metric, max_iter
):
    problem = make_problem(17, 9, metric=metric, reg=0.05)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs_of(problem).items()}
    exact_value(Problem(*list(leaves.values())[:4], metric, leaves["reg"]), max_iter).backward()
    actual = gradients(problem, backend, device, max_iter)
    for name, leaf in leaves.items():
        # Both sum at most 17 terms of rounding 1e-16, amplified by 1 / 0.05 in the exponent.
        assert relative_error(actual[name], leaf.grad) < 1e-12, name


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("metric", METRICS)
def test_narrow_gradients_are_as_exact_as_twice_plain_pytorch(backend, device, interpreted, metric, dtype):
    # Largest errors over several problems, so that one lucky rounding of plain PyTorch does not decide.
    sizes = [(33, 17), (16, 31), (9, 9), (17, 16), (5, 4), (31, 33)][: 4 if interpreted else None]
    problems = [p.to(dtype) for p in make_batch(sizes, d=24, metric=metric, reg=0.1)]
    ours = {k: t.requires_grad_() if k in INPUTS else t for k, t in pack(problems, device).items()}
    otkern.solve_sample(**ours, metric=metric, max_iter=10, backend=backend).value.sum().backward()
    naive, exact = ([], [])
    for leaves_of_items, value, dtype_of in (
        (naive, plain_value, lambda t: t.dtype),
        (exact, exact_value, lambda t: torch.float64),
    ):
        for problem in problems:
            leaves = {name: t.to(dtype_of(t), copy=True).requires_grad_() for name, t in inputs_of(problem).items()}
            value(Problem(*list(leaves.values())[:4], metric, leaves["reg"]), 10).backward()
            leaves_of_items.append(leaves)
    for name in INPUTS:
        plain, expected = (
            torch.cat([leaf[name].grad.double().reshape(-1) for leaf in side]) for side in (naive, exact)
        )
        actual = ours[name].grad.cpu().double().reshape(-1)
        unit = torch.finfo(ours[name].dtype).eps * expected.abs().max()
        assert (actual - expected).abs().max() <= 2 * (plain - expected).abs().max() + 4 * unit, name


@pytest.mark.parametrize("metric", METRICS)
def test_a_point_without_mass_has_the_derivative_of_gaining_some(backend, device, metric):
    problem = make_problem(5, 4, metric=metric)
    actual = gradients(problem, backend, device)["a"]
    step = 1e-7  # one-sided, as weights are not negative: the error is of the order of the step
    for point in (problem.a == 0).nonzero().flatten():
        direction = torch.zeros(5, dtype=torch.float64)
        direction[point], direction[problem.a.argmax()] = 1, -1
        slope = plain_converged_value(problem, a=problem.a + step * direction) - plain_converged_value(problem)
        assert (actual @ direction).item() == pytest.approx(slope.item() / step, rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_points_without_mass_get_a_gradient_of_zero(backend, device, metric):
    problem = make_problem(17, 9, metric=metric)
    actual = gradients(problem, backend, device)
    assert not actual["X_a"][problem.a == 0].any()
    assert not actual["X_b"][problem.b == 0].any()


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_identical_clouds_of_one_point_have_gradient_zero(backend, device, metric, dtype):
    x = torch.full((5, 3), 0.7, dtype=dtype, device=device, requires_grad=True)
    y = torch.full((4, 3), 0.7, dtype=dtype, device=device, requires_grad=True)
    value = otkern.solve_sample(x, y, metric=metric, reg=0.1, max_iter=5, backend=backend).value
    value.backward()
    assert value.item() == pytest.approx(0, abs=4 * torch.finfo(value.dtype).eps)
    assert not x.grad.any()
    assert not y.grad.any()


def test_a_zero_vector_has_cosine_cost_one_and_gradient_zero(backend, device):
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64, device=device, requires_grad=True)
    y = torch.tensor([[3.0, 1.0]], dtype=torch.float64, device=device)
    a = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    value = otkern.solve_sample(x, y, a, metric="cosine", reg=0.1, backend=backend).value
    value.backward()
    assert value.item() == pytest.approx(1, abs=1e-14)
    assert not x.grad.any()


def test_each_item_gets_its_own_upstream_gradient(backend, device):
    problems = make_batch([(9, 7)] * 3)
    upstream = torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64, device=device)
    x, y, a, b = (torch.stack(t).to(device).requires_grad_() for t in list(zip(*problems, strict=True))[:4])
    reg = torch.tensor([p.reg for p in problems], dtype=torch.float64, device=device, requires_grad=True)
    otkern.solve_sample(x, y, a, b, reg=reg, max_iter=20, backend=backend).value.backward(upstream)
    for i, problem in enumerate(problems):
        alone = gradients(problem, backend, device, 20)
        for name, leaf in zip(INPUTS, (x, y, a, b, reg), strict=True):
            torch.testing.assert_close(leaf.grad[i].cpu(), upstream[i].cpu() * alone[name], rtol=1e-14, atol=0)


def test_a_shared_reg_gets_the_sum_of_the_items_gradients(backend, device):
    problems = make_batch([(9, 7)] * 3)
    x, y, a, b = (torch.stack(t).to(device) for t in list(zip(*problems, strict=True))[:4])
    shared = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    each = torch.full((3,), 0.3, dtype=torch.float64, device=device, requires_grad=True)
    for reg in (shared, each):
        otkern.solve_sample(x, y, a, b, reg=reg, max_iter=20, backend=backend).value.sum().backward()
    assert shared.grad.item() == pytest.approx(each.grad.sum().item(), rel=1e-14)


@pytest.mark.parametrize("wanted", INPUTS)
def test_one_gradient_alone_is_the_same_as_among_all(backend, device, wanted):
    problem = make_problem(17, 9)
    leaves = {name: t.to(device).requires_grad_(name == wanted) for name, t in inputs_of(problem).items()}
    otkern.solve_sample(**leaves, max_iter=10, backend=backend).value.backward()
    assert leaves[wanted].grad.cpu().equal(gradients(problem, backend, device, 10)[wanted])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_one_cloud_on_both_sides_gets_the_sum_of_both_gradients(backend, device):
    problem = make_problem(9, 9)
    x = problem.x.to(device, copy=True).requires_grad_()
    otkern.solve_sample(x, x, reg=problem.reg, max_iter=20, backend=backend).value.backward()
    left, right = (problem.x.to(device, copy=True).requires_grad_() for _ in range(2))
    otkern.solve_sample(left, right, reg=problem.reg, max_iter=20, backend=backend).value.backward()
    torch.testing.assert_close(x.grad, left.grad + right.grad, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("weighted", ["neither", "a", "b"])
def test_missing_weights_are_uniform_weights(backend, device, weighted):
    problem = make_problem(17, 9)
    a = problem.a if weighted == "a" else torch.full((17,), 1 / 17, dtype=torch.float64)
    b = problem.b if weighted == "b" else torch.full((9,), 1 / 9, dtype=torch.float64)
    expected = gradients(problem._replace(a=a, b=b), backend, device, 20)
    leaves = {name: t.to(device).requires_grad_() for name, t in inputs_of(problem).items()}
    for name in "ab":
        if name != weighted:
            leaves[name] = None
    otkern.solve_sample(**leaves, max_iter=20, backend=backend).value.backward()
    for name, leaf in leaves.items():
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.cpu(), expected[name], rtol=1e-12, atol=1e-14)


def test_gradients_come_back_in_the_dtype_of_the_input(backend, device):
    problem = make_problem(9, 7).to(torch.bfloat16)
    a = problem.a.to(torch.float16)
    leaves = [t.to(device).requires_grad_() for t in (problem.x, problem.y, a)]
    result = otkern.solve_sample(*leaves, problem.b.to(device), reg=problem.reg, backend=backend)
    result.value.backward()
    assert result.value.dtype == torch.float32
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.bfloat16, torch.float16]


def test_detach_gives_a_value_without_a_gradient(backend, device):
    x = make_problem(5, 4).x.to(device).requires_grad_()
    for reg_type in ("KL", "entropy"):
        result = otkern.solve_sample(x, x, reg=0.3, grad="detach", reg_type=reg_type, backend=backend)
        assert not result.value.requires_grad
        assert not result.plan.requires_grad


@pytest.mark.parametrize("name", INPUTS)
def test_a_third_derivative_raises(backend, device, name):
    leaves = {key: t.to(device).requires_grad_() for key, t in inputs_of(make_problem(5, 4)).items()}
    value = otkern.solve_sample(**leaves, max_iter=60, backend=backend).value
    (first,) = torch.autograd.grad(value, leaves[name], create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(first.square().sum(), leaves[name], create_graph=True)


def test_forward_mode_raises(backend, device):
    x = make_problem(5, 4).x.to(device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            otkern.solve_sample(dual, x, reg=0.3, backend=backend)


def test_the_graph_keeps_no_more_than_inputs_and_potentials(backend, device):
    # Neither the plan nor the iterations: (33 * 17) entries more, or 50 potentials more, would show.
    problem = make_problem(33, 17)
    leaves = {name: t.to(device).requires_grad_() for name, t in inputs_of(problem).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        otkern.solve_sample(**leaves, max_iter=50, backend=backend)
    points = problem.x.numel() + problem.y.numel()
    assert sum(kept) <= points + 2 * (33 + 17) + 8
