"""Accuracy by dtype, the extremes of reg, long runs, forbidden pairs, and everything else that makes NaN elsewhere."""

import math

import pytest
import torch

import otkern
from tests.problems import (
    METRICS,
    NARROW,
    dual_objective,
    exact_value,
    make_batch,
    make_problem,
    pack,
    plain_value,
    sinkhorn,
)

# In units of the size of the cost.
REGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


def solve(problem, backend, device, **options):
    return otkern.solve_sample(
        *(t.to(device) for t in problem[:4]), metric=problem.metric, reg=problem.reg, backend=backend, **options
    )


def within_twice_plain(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The accuracy contract, on largest errors: at most twice plain PyTorch's, plus four units in the last place."""
    unit = torch.finfo(actual.dtype).eps * exact.abs().max()
    ours = (actual.detach().cpu().double() - exact).abs().max()
    assert ours <= 2 * (plain.double() - exact).abs().max() + 4 * unit


def rounding(problem, iterations: int, dtype=torch.float64) -> float:
    """How far rounding may move a potential after k iterations: half an iteration does not expand distances in the
    largest-entry norm and adds a few roundings of costs and potentials of the size of the largest cost."""
    largest = float(problem.cost.abs().max())
    return 16 * (2 * iterations + 1) * torch.finfo(dtype).eps * (2 * largest + problem.reg * math.log(1e3))


@pytest.mark.parametrize("iterations", [1, 2, 7, 40])
@pytest.mark.parametrize("reg", REGS)
def test_every_reg_gives_the_iterates_of_the_log_domain(backend, device, reg, iterations):
    problem = make_problem(17, 9, reg=reg)
    f, g = sinkhorn(problem.cost, problem.a, problem.b, problem.reg, iterations)
    value = dual_objective(problem.cost, problem.a, problem.b, problem.reg, f, g)
    result = solve(problem, backend, device, max_iter=iterations)
    atol = rounding(problem, iterations)
    torch.testing.assert_close(result.potential_a.cpu(), f, rtol=0, atol=atol)
    torch.testing.assert_close(result.potential_b.cpu(), g, rtol=0, atol=atol)
    torch.testing.assert_close(result.value.cpu(), value, rtol=0, atol=atol)


@pytest.mark.parametrize("reg", REGS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_values_are_as_exact_as_twice_plain_pytorch(backend, device, interpreted, metric, dtype, reg):
    sizes = [(33, 17), (9, 9)] if interpreted else [(33, 17), (9, 9), (16, 31), (5, 4), (64, 65)]
    problems = [p.to(dtype) for p in make_batch(sizes, d=24, metric=metric, reg=reg)]
    result = otkern.solve_sample(**pack(problems, device), metric=metric, max_iter=10, backend=backend)
    assert torch.isfinite(torch.cat(result.potentials)).all()
    exact = torch.stack([exact_value(p.double(), 10) for p in problems])
    plain = torch.stack([plain_value(p, 10) for p in problems]).double()
    within_twice_plain(result.value, plain, exact)


@pytest.mark.parametrize("reg", [1e-3, 0.1, 10.0])
def test_narrow_potentials_are_as_exact_as_twice_plain_pytorch(backend, device, reg):
    sizes = [(33, 17), (16, 31), (9, 9), (5, 4)]
    problems = [p.to(torch.float32) for p in make_batch(sizes, d=24, metric="cosine", reg=reg)]
    result = otkern.solve_sample(**pack(problems, device), metric="cosine", max_iter=10, backend=backend)
    plain, exact = (
        [torch.cat(side) for side in zip(*(sinkhorn(p.cost, p.a, p.b, p.reg, 10) for p in kind), strict=True)]
        for kind in (problems, [p.double() for p in problems])
    )
    within_twice_plain(torch.cat(result.potentials), torch.cat(plain), torch.cat(exact))


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
@pytest.mark.parametrize("reg", REGS)
def test_gradients_are_finite_at_every_reg(backend, device, interpreted, dtype, reg):
    for metric in ("euclidean",) if interpreted else METRICS:
        problem = make_problem(17, 9, metric=metric, reg=reg).to(dtype)
        leaves = [t.to(device).clone().requires_grad_() for t in problem[:4]]
        epsilon = torch.tensor(problem.reg, device=device, requires_grad=True)
        otkern.solve_sample(*leaves, metric=metric, reg=epsilon, max_iter=10, backend=backend).value.backward()
        for leaf in (*leaves, epsilon):
            assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reg", [0.01, 1.0])
def test_long_runs_stay_where_they_converged(backend, device, interpreted, reg, dtype):
    problem = make_problem(9, 7, reg=reg).to(dtype)
    long = {"cpu": 20_000, "reference": 4000}.get(backend, 200 if interpreted else 20_000)
    result = solve(problem, backend, device, max_iter=long)
    exact = exact_value(problem.double(), 2000)
    eps = torch.finfo(dtype).eps
    # A fixed point of a map that does not expand: rounding does not pile up, unlike rounding() over as many iterations.
    slack = 0 if dtype == torch.float64 and not interpreted else result.marginal_error.item()
    assert result.value.item() == pytest.approx(exact.item(), abs=64 * eps * float(problem.cost.max()) + slack)
    assert torch.isfinite(torch.cat(result.potentials)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clouds_far_from_the_origin_lose_no_more_than_plain_pytorch(backend, device, dtype):
    for metric in ("sqeuclidean", "euclidean"):
        problems = make_batch([(33, 30), (31, 33)], d=24, metric=metric)
        problems = [p._replace(x=p.x + 30, y=p.y + 30).to(dtype) for p in problems]
        result = otkern.solve_sample(**pack(problems, device), metric=metric, max_iter=10, backend=backend)
        exact = torch.stack([exact_value(p.double(), 10) for p in problems])
        within_twice_plain(result.value, torch.stack([plain_value(p, 10) for p in problems]), exact)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("metric", METRICS)
def test_very_small_and_very_large_points_scale_the_value(backend, device, metric, scale):
    problem = make_problem(9, 7, metric=metric).to(torch.float32)
    power = {"sqeuclidean": scale**2, "dot": scale**2, "euclidean": scale, "cosine": 1.0}[metric]
    scaled = problem._replace(x=scale * problem.x, y=scale * problem.y, reg=power * problem.reg)
    one, other = (solve(p, backend, device, max_iter=10).value.item() for p in (problem, scaled))
    assert other == pytest.approx(power * one, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
def test_forbidden_pairs_carry_no_mass(backend, device, dtype):
    problem = make_problem(9, 7)
    cost = problem.cost.clone()
    forbidden = torch.rand(9, 7, generator=torch.Generator().manual_seed(5)) < 0.3
    forbidden[:, 2] = False  # side b's third point takes whatever has no other place
    forbidden[3] = torch.tensor([True] * 2 + [False] + [True] * 4)
    b = problem.b.clone()
    b[2] += 1.0
    b /= b.sum()
    cost[forbidden] = float("inf")
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.to(device).requires_grad_() for t in (cost.to(dtype), problem.a.to(weights), b.to(weights))]
    result = otkern.solve(*leaves, reg=0.5, max_iter=60, backend=backend)
    result.value.backward()
    exact_cost = cost.to(dtype).double()
    f, g = sinkhorn(exact_cost, problem.a, b, 0.5, 60)
    expected = dual_objective(exact_cost, problem.a, b, 0.5, f, g)
    assert result.value.item() == pytest.approx(expected.item(), rel=64 * torch.finfo(weights).eps)
    assert not result.plan[forbidden].any()
    assert not leaves[0].grad[forbidden].any()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert torch.isfinite(result.value_linear)
    assert torch.isfinite(result.barycentric_map(torch.eye(7, device=device))).all()


@pytest.mark.parametrize("side", ["row", "column"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_problem_without_a_feasible_plan_is_infinite_and_has_gradient_zero(backend, device, side, dtype):
    problem = make_problem(5, 4)
    cost = problem.cost.to(dtype).to(device).repeat(2, 1, 1)
    if side == "row":
        cost[1, 0] = float("inf")
    else:
        cost[1, :, 0] = float("inf")
    a, b = (w.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device) for w in problem[2:4])
    leaves = [t.clone().requires_grad_() for t in (cost, a.repeat(2, 1), b.repeat(2, 1))]
    reg = torch.full((2,), 0.3, dtype=a.dtype, device=device, requires_grad=True)
    result = otkern.solve(*leaves, reg=reg, max_iter=5, backend=backend)
    result.value.backward(torch.ones_like(result.value))
    assert result.value[1].item() == math.inf
    assert result.value_linear[1].item() == math.inf
    assert torch.isfinite(result.value[0])
    assert result.converged.tolist()[1] is False
    for leaf in (*leaves, reg):
        assert not leaf.grad[1].any()
        assert leaf.grad[0].any()
    for tensor in (*result.potentials, result.plan, result.marginal_a, result.marginal_b, result.marginal_error):
        assert torch.isfinite(tensor).all()
    assert result.marginal_error[1].item() >= 0.99 * float(a[0] if side == "row" else b[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forbidden_rows_and_columns_without_mass_are_no_obstacle(backend, device, dtype):
    problem = make_problem(9, 7)
    cost = problem.cost.to(dtype).to(device)
    a, b = (w.to(dtype).to(device) for w in problem[2:4])
    expected = otkern.solve(cost, a, b, reg=0.3, max_iter=20, backend=backend)
    cost[problem.a == 0] = float("inf")
    cost[:, problem.b == 0] = float("inf")
    leaves = [t.clone().requires_grad_() for t in (cost, a, b)]
    result = otkern.solve(*leaves, reg=0.3, max_iter=20, backend=backend)
    result.value.backward()
    assert result.value.item() == pytest.approx(expected.value.item(), rel=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(result.marginal_error, expected.marginal_error, rtol=1e-4, atol=1e-7)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_weights_of_very_different_size_are_exact(backend, device):
    problem = make_problem(9, 7).to(torch.float32)
    a = torch.tensor([1.0, 1e-30, 1e-10, 0, 1e-38, 1e-3, 1e-20, 0.5, 1e-42], dtype=torch.float32)
    problem = problem._replace(a=a / a.sum())
    result = solve(problem, backend, device, max_iter=40)
    exact = exact_value(problem.double(), 40)
    assert result.value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert torch.isfinite(torch.cat(result.potentials)).all()


@pytest.mark.parametrize("n", [1, 2, 33])
def test_identical_points_are_a_problem_like_any_other(backend, device, n):
    # GeomLoss takes the logarithm of their diameter, 0.
    x = torch.full((n, 3), 2.5, device=device)
    for metric in METRICS:
        result = otkern.solve_sample(x, x, metric=metric, reg=0.1, max_iter=5, backend=backend)
        cost = -18.75 if metric == "dot" else 0.0
        assert result.value.item() == pytest.approx(cost, abs=4 * 18.75 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("d", [1, 2, 3, 7, 16, 31, 64, 65, 200])
def test_every_number_of_features_is_served(backend, device, interpreted, d):
    for metric in METRICS[:1] if interpreted else METRICS:
        problem = make_problem(9, 7, d=d, metric=metric)
        assert solve(problem, backend, device, max_iter=10).value.item() == pytest.approx(
            exact_value(problem, 10).item(), rel=1e-12
        )


SIZES = [1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129]


@pytest.mark.parametrize("n", SIZES)
def test_values_and_gradients_are_right_at_tile_edges(backend, device, interpreted, n):
    if interpreted and n not in (1, 16, 17, 64, 65, 129):
        pytest.skip("the interpreter is slow: Triton runs every size on a GPU, six of them here")
    for m in (1, 16, 33) if not interpreted else (17,):
        problem = make_problem(n, m, d=4, metric="sqeuclidean")
        leaves = [t.clone().requires_grad_() for t in problem[:4]]
        expected = exact_value(problem._replace(x=leaves[0], y=leaves[1], a=leaves[2], b=leaves[3]), 4)
        expected.backward()
        ours = [t.to(device).clone().requires_grad_() for t in problem[:4]]
        result = otkern.solve_sample(*ours, reg=problem.reg, max_iter=4, backend=backend)
        result.value.backward()
        assert result.value.item() == pytest.approx(expected.item(), rel=1e-12)
        for leaf, wanted in zip(ours, leaves, strict=True):
            torch.testing.assert_close(leaf.grad.cpu(), wanted.grad, rtol=1e-10, atol=1e-12)


def test_units_beyond_any_sense_change_nothing_but_the_scale(backend, device):
    """Costs near the end of float32's range, one of them infinite: masked entries are not large ones."""
    cost = torch.tensor([[0.0, 1.0, torch.inf], [1.0, 0.5, 0.0]], device=device)
    a, b = torch.tensor([0.5, 0.5], device=device), torch.tensor([0.25, 0.5, 0.25], device=device)
    plans = []
    for unit in (1.0, 2.0**110):
        scaled = (cost * unit).requires_grad_()
        otkern.solve(scaled, a, b, reg=unit, max_iter=50, backend=backend).value.backward()
        plans.append(scaled.grad)
    assert plans[1][0, 2] == 0
    assert plans[1].allclose(plans[0], rtol=1e-5)
