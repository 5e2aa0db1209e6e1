"""Relaxed marginals, given mass, null points: against a generic convex solver, POT, closed forms and plain PyTorch."""

import math

import ot
import pytest
import torch

import otkern
from tests.problems import METRICS, Problem, make_problem, offsets, pad
from tests.relaxed import (
    INF,
    RELAXATIONS,
    WITH_ENTROPY,
    by_convex_solver,
    entropy_of_weights,
    kl,
    make_relaxed,
    objective,
    plain_iterations,
    with_null,
)

CONVERGED = {"max_iter": 3000, "tol": 1e-13}

relaxations = pytest.mark.parametrize("relaxation", WITH_ENTROPY.values(), ids=WITH_ENTROPY)
kinds = pytest.mark.parametrize("relaxation", RELAXATIONS.values(), ids=RELAXATIONS)


def solve(problem: Problem, backend: str, device: str, **options) -> otkern.OTResult:
    """By costs, in the dtype of the points."""
    cost, a, b = (t.to(device) for t in (problem.cost, problem.a, problem.b))
    return otkern.solve(cost, a, b, **({"reg": problem.reg, "backend": backend} | options))


def solve_points(problem: Problem, backend: str, device: str, **options) -> otkern.OTResult:
    points = (t.to(device) for t in problem[:4])
    return otkern.solve_sample(*points, metric=problem.metric, reg=problem.reg, backend=backend, **options)


# Independent solvers.


@pytest.mark.parametrize(("n", "m"), [(5, 4), (3, 6), (1, 4)])
@relaxations
def test_the_optimum_is_that_of_a_convex_solver(backend, device, relaxation, n, m):
    problem = make_relaxed(n, m)
    expected = by_convex_solver(problem.cost, problem.a, problem.b, problem.reg, relaxation)
    result = solve(problem, backend, device, **relaxation, **CONVERGED)
    assert result.converged
    assert result.value.item() == pytest.approx(expected.value, rel=1e-11, abs=1e-11)
    torch.testing.assert_close(result.plan.cpu(), expected.plan, rtol=0, atol=1e-7)


@relaxations
def test_the_optimum_with_negative_costs_is_that_of_a_convex_solver(backend, device, relaxation):
    problem = make_relaxed(5, 4, "dot")
    assert (problem.cost < 0).any() and (problem.cost > 0).any()
    expected = by_convex_solver(problem.cost, problem.a, problem.b, problem.reg, relaxation)
    result = solve_points(problem, backend, device, **relaxation, **CONVERGED)
    assert result.value.item() == pytest.approx(expected.value, rel=1e-11, abs=1e-11)
    torch.testing.assert_close(result.plan.cpu(), expected.plan, rtol=0, atol=1e-7)


@relaxations
def test_the_optimum_with_forbidden_pairs_is_that_of_a_convex_solver(backend, device, relaxation):
    problem = make_relaxed(5, 4)
    cost = problem.cost
    cost[0, 1] = cost[1, 0] = cost[3, 2] = INF
    expected = by_convex_solver(cost, problem.a, problem.b, problem.reg, relaxation)
    result = otkern.solve(
        *(t.to(device) for t in (cost, problem.a, problem.b)),
        reg=problem.reg, backend=backend, **relaxation, **CONVERGED,
    )  # fmt: skip
    assert result.value.item() == pytest.approx(expected.value, rel=1e-11, abs=1e-11)
    torch.testing.assert_close(result.plan.cpu(), expected.plan, rtol=0, atol=1e-7)
    assert not result.plan.cpu()[cost.isinf()].any()


@relaxations
def test_the_value_is_the_primal_objective_of_the_plan(backend, device, relaxation):
    problem = make_relaxed(9, 7)
    result = solve(problem, backend, device, **relaxation, **CONVERGED)
    plan, a, b = result.plan.cpu(), problem.a, problem.b
    if "null_cost" in relaxation:
        # The null points take what is left, and from each other the rest.
        left_a, left_b = a - plan.sum(1), b - plan.sum(0)
        plan = torch.cat([torch.cat([plan, left_a[:, None]], 1), torch.cat([left_b, plan.sum()[None]])[None]])
    expected = objective(plan, problem.cost, a, b, problem.reg, relaxation)
    assert result.value.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("rho", [0.3, (0.8, 0.5), (INF, 0.5), (0.7, INF)])
def test_the_plan_is_that_of_pots_unbalanced_sinkhorn(backend, device, rho):
    # POT divides by weights of zero.
    problem = make_relaxed(9, 7)
    rows, columns = problem.a > 0, problem.b > 0
    expected = torch.zeros(9, 7, dtype=torch.float64)
    expected[rows.nonzero(), columns.nonzero().T] = ot.unbalanced.sinkhorn_unbalanced(
        problem.a[rows], problem.b[columns], problem.cost[rows][:, columns], problem.reg, rho,
        reg_type="kl", numItermax=5000, stopThr=1e-13,
    )  # fmt: skip
    result = solve(problem, backend, device, unbalanced=rho, **CONVERGED)
    torch.testing.assert_close(result.plan.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.75])
def test_the_plan_is_that_of_pots_entropic_partial_transport(backend, device, mass):
    # POT starts from exp(-C / reg) without weights: its regulariser is the entropy.
    problem = make_relaxed(9, 7)
    rows, columns = problem.a > 0, problem.b > 0
    expected = torch.zeros(9, 7, dtype=torch.float64)
    expected[rows.nonzero(), columns.nonzero().T] = ot.partial.entropic_partial_wasserstein(
        problem.a[rows], problem.b[columns], problem.cost[rows][:, columns], problem.reg,
        m=mass, numItermax=5000, stopThr=1e-13,
    )  # fmt: skip
    result = solve(problem, backend, device, mass=mass, reg_type="entropy", **CONVERGED)
    torch.testing.assert_close(result.plan.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reg", [1e-3, 1e-4])
def test_a_small_reg_comes_near_the_partial_linear_programme(backend, device, dtype, reg):
    # exp(-C / reg) is 0 everywhere in both dtypes, and nothing may be lost by that.
    problem = make_relaxed(9, 7)._replace(reg=reg)
    problem = problem._replace(x=problem.x + 1.5)
    rows, columns = problem.a > 0, problem.b > 0
    cost = problem.cost[rows][:, columns].numpy()
    plan = ot.partial.partial_wasserstein(problem.a[rows].numpy(), problem.b[columns].numpy(), cost, m=0.5)
    result = solve_points(problem.to(dtype), backend, device, mass=0.5, max_iter=300)
    # A rounding of the cost, over reg, is in the exponent.
    rounding = 64 * torch.finfo(dtype).eps * cost.max() / reg
    assert result.plan.sum().item() == pytest.approx(0.5, rel=rounding)
    if reg == 1e-3:
        assert result.value_linear.item() == pytest.approx((plan * cost).sum(), rel=0.02)
    else:  # 300 iterations are too few here
        assert result.value.isfinite()


# Known answers.

C, A, B, EPS = 0.7, 1.3, 0.6, 0.5


def one_point(backend, device, **options):
    """One point of mass A, one of mass B, at cost C: (value, moved mass)."""
    cost, a, b = (torch.tensor(t, dtype=torch.float64, device=device) for t in ([[C]], [A], [B]))
    result = otkern.solve(cost, a, b, reg=EPS, backend=backend, **options, **CONVERGED)
    return result.value.item(), result.plan.item()


def of_one(p: float, rho_a: float, rho_b: float, entropy: bool = False) -> float:
    """The primal objective of moving p."""
    p, a, b = (torch.tensor(t, dtype=torch.float64) for t in (p, A, B))
    regulariser = p * p.log() if entropy else kl(p, a * b)
    return float(C * p + EPS * regulariser + rho_a * kl(p, a) + rho_b * kl(p, b))


@pytest.mark.parametrize(("rho_a", "rho_b"), [(0.8, 0.4), (3.0, 0.01), (1e-3, 1e-3)])
def test_one_point_each_unbalanced(backend, device, rho_a, rho_b):
    # The derivative in log p of the objective vanishes.
    log_p = (EPS * math.log(A * B) + rho_a * math.log(A) + rho_b * math.log(B) - C) / (EPS + rho_a + rho_b)
    value, p = one_point(backend, device, unbalanced=(rho_a, rho_b))
    assert p == pytest.approx(math.exp(log_p), rel=1e-11)
    assert value == pytest.approx(of_one(math.exp(log_p), rho_a, rho_b), rel=1e-11)
    log_p = (-EPS + rho_a * math.log(A) + rho_b * math.log(B) - C) / (EPS + rho_a + rho_b)
    value, p = one_point(backend, device, unbalanced=(rho_a, rho_b), reg_type="entropy")
    assert p == pytest.approx(math.exp(log_p), rel=1e-11)
    assert value == pytest.approx(of_one(math.exp(log_p), rho_a, rho_b, entropy=True), rel=1e-11)


@pytest.mark.parametrize("strict", ["a", "b"])
def test_one_point_each_with_one_strict_side(backend, device, strict):
    rho = (INF, 0.4) if strict == "a" else (0.4, INF)
    value, p = one_point(backend, device, unbalanced=rho)
    moved = A if strict == "a" else B
    assert p == pytest.approx(moved, rel=1e-12)
    assert value == pytest.approx(of_one(moved, *(0 if math.isinf(r) else r for r in rho)), rel=1e-12)


@pytest.mark.parametrize("mass", [1e-3, 0.3, 0.6])
@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_one_point_each_moves_the_mass_it_is_told_to(backend, device, mass, reg_type):
    value, p = one_point(backend, device, mass=mass, reg_type=reg_type)
    assert p == pytest.approx(mass, rel=1e-12)
    assert value == pytest.approx(of_one(mass, 0, 0, reg_type == "entropy"), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("null_cost", [-0.4, 0.2, 0.35, 1.0])
def test_one_point_each_and_a_null(backend, device, null_cost):
    # Two by two, where the corner holds p as well: p p = exp((2 null - C) / reg) (A - p)(B - p).
    k = math.exp((2 * null_cost - C) / EPS)
    # (k - 1) p² - k (A + B) p + k A B = 0
    linear, constant = k * (A + B), k * A * B
    p = A * B / (A + B) if k == 1 else (linear - math.sqrt(linear**2 - 4 * (k - 1) * constant)) / (2 * (k - 1))
    value, moved = one_point(backend, device, null_cost=null_cost)
    assert moved == pytest.approx(p, rel=1e-10)
    plan = torch.tensor([[p, A - p], [B - p, p]], dtype=torch.float64)
    cost, a, b = (torch.tensor(t, dtype=torch.float64) for t in ([[C]], [A], [B]))
    assert value == pytest.approx(objective(plan, cost, a, b, EPS, {"null_cost": null_cost}).item(), rel=1e-10)


@pytest.mark.parametrize("rho", [1e9, 1e15, (1e12, INF), (INF, 1e12)])
@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_a_large_rho_is_nearly_balanced(backend, device, rho, reg_type):
    problem = make_problem(9, 7)
    options = {"max_iter": 60, "reg_type": reg_type}
    balanced = solve(problem, backend, device, **options)
    result = solve(problem, backend, device, unbalanced=rho, **options)
    torch.testing.assert_close(result.value, balanced.value, rtol=1e-8, atol=0)
    torch.testing.assert_close(result.plan, balanced.plan, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rho", [INF, (INF, INF), (None, None), (None, INF)])
def test_an_infinite_rho_is_balanced_to_the_bit(backend, device, rho):
    problem = make_problem(9, 7)
    balanced, result = (
        solve_points(problem, backend, device, max_iter=20, unbalanced=unbalanced) for unbalanced in (None, rho)
    )
    assert result.value.equal(balanced.value)
    assert result.plan.equal(balanced.plan)
    assert result.marginal_error.equal(balanced.marginal_error)


def test_an_infinite_rho_among_finite_ones_is_balanced(backend, device):
    problem = make_problem(9, 7)
    balanced = solve(problem, backend, device, max_iter=20)
    batch = problem._replace(x=torch.stack([problem.x] * 2), y=torch.stack([problem.y] * 2))
    batch = batch._replace(a=torch.stack([problem.a] * 2), b=torch.stack([problem.b] * 2))
    result = solve(batch, backend, device, max_iter=20, unbalanced=torch.tensor([INF, 1.0]))
    torch.testing.assert_close(result.value[0], balanced.value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(result.potential_a[0], balanced.potential_a, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result.marginal_error[0], balanced.marginal_error, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("rho", [1e-9, 1e-30, 1e-300])
def test_a_rho_of_nothing_leaves_the_regulariser_alone(backend, device, rho):
    problem = make_relaxed(9, 7)
    a, b, eps = problem.a, problem.b, problem.reg
    result = solve(problem, backend, device, unbalanced=rho, **CONVERGED)
    plan = a.unsqueeze(1) * b * (-problem.cost / eps).exp()
    torch.testing.assert_close(result.plan.cpu(), plan, rtol=1e-7, atol=0)
    assert result.value.item() == pytest.approx(eps * (a.sum() * b.sum() - plan.sum()).item(), rel=1e-7)
    # With one side strict, each row chooses its columns freely.
    result = solve(problem, backend, device, unbalanced=(INF, rho), **CONVERGED)
    plan = a.unsqueeze(1) * torch.softmax(b.log() - problem.cost / eps, 1)
    torch.testing.assert_close(result.plan.cpu(), plan, rtol=1e-7, atol=0)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_all_of_the_mass_is_the_balanced_problem(backend, device, reg_type):
    problem = make_problem(9, 7)
    balanced = solve(problem, backend, device, max_iter=100, reg_type=reg_type)
    result = solve(problem, backend, device, mass=1.0, reg_type=reg_type, max_iter=3000, tol=1e-10)
    assert result.value.item() == pytest.approx(balanced.value.item(), rel=1e-9)
    torch.testing.assert_close(result.plan, balanced.plan, rtol=0, atol=1e-9)


@pytest.mark.parametrize("null_cost", [30.0, 1e6, INF])
def test_a_high_price_of_staying_unmatched_is_the_balanced_problem(backend, device, null_cost):
    problem = make_problem(9, 7)
    balanced = solve(problem, backend, device, max_iter=100)
    result = solve(problem, backend, device, null_cost=null_cost, max_iter=100)
    torch.testing.assert_close(result.plan, balanced.plan, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.value_linear, balanced.value_linear, rtol=0, atol=1e-9)
    # Beside it the null points move their mass of 1 to each other: their part of the KL term is -1 + 1 * 1 each.
    expected = objective(torch.block_diag(balanced.plan.cpu(), torch.ones(1, 1)), problem.cost, problem.a, problem.b,
                         problem.reg, {"null_cost": 0.0})  # fmt: skip
    assert result.value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_bounty_on_staying_unmatched_leaves_everything_unmatched(backend, device):
    problem = make_relaxed(9, 7)
    result = solve(problem, backend, device, null_cost=-50.0, max_iter=100)
    a, b = problem.a, problem.b
    assert result.plan.max() < 1e-20
    plan = torch.zeros(10, 8, dtype=torch.float64)
    plan[:-1, -1], plan[-1, :-1] = a, b
    assert result.value.item() == pytest.approx(
        objective(plan, problem.cost, a, b, problem.reg, {"null_cost": -50.0}).item(), rel=1e-12
    )
    assert result.value_linear.item() == pytest.approx(-50 * (a.sum() + b.sum()).item(), rel=1e-12)


def test_a_pair_is_matched_below_twice_the_null_cost(backend, device):
    cost = torch.tensor([[0.5, 5.0], [5.0, 1.5]], dtype=torch.float64, device=device)
    result = otkern.solve(cost, reg=0.01, null_cost=0.5, max_iter=200, backend=backend)
    assert result.plan[0, 0].item() == pytest.approx(0.5, rel=1e-6)
    assert result.plan[1].max().item() < 1e-6


class Gaussian:
    """Mass, mean and standard deviation of a measure on the line, its grid, and potentials that are parabolas on it."""

    def __init__(self, mass: float, mean: float, deviation: float, points: int):
        self.mass, self.mean, self.deviation = mass, mean, deviation
        self.grid = torch.linspace(mean - 8 * deviation, mean + 8 * deviation, points, dtype=torch.float64)
        weights = (-0.5 * ((self.grid - mean) / deviation) ** 2).exp()
        self.weights = mass * weights / weights.sum()

    def integral(self, k0: float, k1: float, k2: float) -> float:
        """Of exp(k0 + k1 x + k2 x²) with respect to the measure."""
        h = 1 / self.deviation**2 - 2 * k2
        j = self.mean / self.deviation**2 + k1
        k = k0 - self.mean**2 / (2 * self.deviation**2)
        return self.mass / (self.deviation * math.sqrt(h)) * math.exp(j * j / (2 * h) + k)

    def soft_min(self, potential, eps: float):
        """The parabola -eps log of the integral over y of exp((g(y) - (x - y)²) / eps); coefficients of 1, x, x²."""
        g0, g1, g2 = potential
        h = 1 / self.deviation**2 + 2 * (1 - g2) / eps
        j0, j1 = self.mean / self.deviation**2 + g1 / eps, 2 / eps
        k = g0 / eps - self.mean**2 / (2 * self.deviation**2) + math.log(self.mass / (self.deviation * math.sqrt(h)))
        return -eps * (j0 * j0 / (2 * h) + k), -eps * j0 * j1 / h, 1 - eps * j1 * j1 / (2 * h)


@pytest.mark.parametrize("rho", [(0.7, 0.7), (2.0, 0.3), (INF, 0.5)])
def test_unbalanced_gaussians_have_parabolas_for_potentials(backend, device, interpreted, rho):
    # Janati, Muzellec, Peyré and Cuturi 2020: the iteration maps parabolas to parabolas, and runs on three numbers.
    points, eps = 48 if interpreted else 96, 0.5
    alpha, beta = Gaussian(1.2, -0.3, 0.6, points), Gaussian(0.7, 0.4, 0.9, points)
    kappa = [1 / (1 + eps / r) for r in rho]
    f = g = (0.0, 0.0, 0.0)
    for _ in range(2000):
        f = tuple(kappa[0] * c for c in beta.soft_min(g, eps))
        g = tuple(kappa[1] * c for c in alpha.soft_min(f, eps))

    def dual(measure, potential, price):
        if math.isinf(price):
            mean, square = measure.mean, measure.mean**2 + measure.deviation**2
            return measure.mass * (potential[0] + potential[1] * mean + potential[2] * square)
        return price * (measure.mass - measure.integral(*(-c / price for c in potential)))

    # The mass of the plan is what side b asks for.
    moved = beta.integral(*(-c / rho[1] for c in g))
    expected = dual(alpha, f, rho[0]) + dual(beta, g, rho[1]) - eps * (moved - alpha.mass * beta.mass)
    result = otkern.solve_sample(
        alpha.grid.unsqueeze(1).to(device), beta.grid.unsqueeze(1).to(device),
        alpha.weights.to(device), beta.weights.to(device),
        reg=eps, unbalanced=rho, max_iter=60 if interpreted else 300, backend=backend,
    )  # fmt: skip
    # Sums over a grid of steps well below the deviations integrate Gaussians to rounding.
    assert result.value.item() == pytest.approx(expected, rel=1e-7)
    near = (alpha.grid - alpha.mean).abs() < 2
    parabola = f[0] + f[1] * alpha.grid + f[2] * alpha.grid**2
    torch.testing.assert_close(result.potential_a.cpu()[near], parabola[near], rtol=0, atol=1e-6)


# The iterates, in every dtype.


@pytest.mark.parametrize("iterations", [1, 2, 9])
@pytest.mark.parametrize("reg", [0.02, 0.5, 20.0])
@relaxations
def test_the_iterates_are_those_of_the_plain_iteration(backend, device, relaxation, reg, iterations):
    problem = make_relaxed(17, 9, reg=reg)
    cost, a, b, eps = problem.cost, problem.a, problem.b, problem.reg
    expected = plain_iterations(cost, a, b, eps, relaxation, iterations)
    value = expected.value
    if "null_cost" in relaxation and relaxation["reg_type"] == "entropy":
        value = value + entropy_of_weights(a, b, eps, null=True)
    result = solve_points(problem, backend, device, max_iter=iterations, **relaxation)
    close = {"rtol": 1e-11, "atol": 1e-11 * max(1, eps)}
    torch.testing.assert_close(result.potential_a.cpu(), expected.f, **close)
    torch.testing.assert_close(result.potential_b.cpu(), expected.g, **close)
    torch.testing.assert_close(result._multipliers[0].cpu(), expected.multipliers, **close)
    torch.testing.assert_close(result.value.cpu(), value, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@relaxations
def test_narrow_values_are_as_exact_as_twice_plain_pytorch(backend, device, interpreted, relaxation, metric, dtype):
    sizes = [(9, 7), (5, 4)] if interpreted else [(33, 17), (9, 9), (16, 31), (5, 4)]
    problems = [make_relaxed(n, m, metric, reg=0.1, seed=i, d=24).to(dtype) for i, (n, m) in enumerate(sizes)]
    exact, plain, actual = [], [], []
    for problem in problems:
        relaxed = relaxation | ({"mass": 0.5} if "mass" in relaxation else {})
        values = []
        for p, cost in ((problem.double(), problem.double().cost), (problem, None)):
            cost = plain_cost(problem).to(p.a.dtype) if cost is None else cost
            eps = torch.tensor(p.reg, dtype=p.a.dtype)
            value = plain_iterations(cost, p.a, p.b, eps, relaxed, 10).value
            if "null_cost" in relaxed and relaxed["reg_type"] == "entropy":
                value = value + entropy_of_weights(p.a, p.b, eps, null=True)
            values.append(value.double())
        exact.append(values[0])
        plain.append(values[1])
        actual.append(solve_points(problem, backend, device, max_iter=10, **relaxed).value.cpu().double())
    exact, plain, actual = (torch.stack(v) for v in (exact, plain, actual))
    # A value is a sum of terms of the size of the cost, which may cancel.
    largest = max(float(p.double().cost.abs().max()) for p in problems)
    unit = torch.finfo(torch.float32).eps * max(float(exact.abs().max()), largest)
    assert (actual - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4 * unit


def plain_cost(problem: Problem) -> torch.Tensor:
    """The cost by torch's own functions in the dtype of the arithmetic."""
    x, y = (t.to(problem.a.dtype) for t in problem[:2])
    if problem.metric == "dot":
        return -(x @ y.mT)
    if problem.metric == "cosine":
        normalize = torch.nn.functional.normalize
        return 1 - normalize(x, dim=-1) @ normalize(y, dim=-1).mT
    distance = torch.cdist(x, y)
    return distance.square() if problem.metric == "sqeuclidean" else distance


# What makes others fail.


def test_a_row_that_reaches_nothing_stays_where_it_is(backend, device):
    cost = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    cost[1] = INF
    a = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, device=device)
    b = torch.full((4,), 0.25, dtype=torch.float64, device=device)
    rest = torch.tensor([True, False, True], device=device)
    options = {"reg": 0.3, "backend": backend} | CONVERGED
    for rho in (0.4, (0.4, INF)):
        result = otkern.solve(cost, a, b, unbalanced=rho, **options)
        # its price is all of its mass, and its reference measure is part of the regulariser
        without = otkern.solve(cost[rest], a[rest], b, unbalanced=rho, **options)
        assert result.value.item() == pytest.approx(without.value.item() + 0.4 * 0.3 + 0.3 * 0.3, rel=1e-11)
        assert result.plan[1].eq(0).all()
        assert result.potential_a[1] == 0
        assert result.converged
    result = otkern.solve(cost, a, b, unbalanced=(INF, 0.4), reg=0.3, max_iter=20, backend=backend)
    assert result.value == INF
    assert not result.converged
    result = otkern.solve(cost, a, b, mass=0.6, **options)
    assert result.value.isfinite()
    assert result.plan[1].eq(0).all()
    assert result.plan.sum().item() == pytest.approx(0.6, rel=1e-12)
    result = otkern.solve(cost, a, b, null_cost=0.4, **options)
    assert result.value.isfinite()
    assert result.plan[1].eq(0).all()


@pytest.mark.parametrize("kind", ["unbalanced", "mass", "null_cost"])
def test_a_problem_where_nothing_can_be_moved(backend, device, kind):
    cost = torch.full((3, 4), INF, dtype=torch.float64, device=device)
    a = torch.tensor([0.5, 0.3, 0.0], dtype=torch.float64, device=device)
    b = torch.full((4,), 0.25, dtype=torch.float64, device=device)
    options = {"unbalanced": {"unbalanced": (0.4, 0.7)}, "mass": {"mass": 0.5}, "null_cost": {"null_cost": 0.3}}[kind]
    leaf = cost.clone().requires_grad_()
    result = otkern.solve(leaf, a, b, reg=0.5, max_iter=20, backend=backend, **options)
    plan = result.plan
    assert plan.eq(0).all()
    if kind == "mass":
        assert result.value == INF
        assert result.marginal_error.item() == pytest.approx(0.5, rel=1e-6)
        assert not result.converged
    elif kind == "unbalanced":
        assert result.value.item() == pytest.approx(0.4 * 0.8 + 0.7 * 1.0 + 0.5 * 0.8, rel=1e-12)
        assert result.converged
    else:
        assert result.value.isfinite()
    (gradient,) = torch.autograd.grad(result.value, leaf)
    assert gradient.eq(0).all()


@pytest.mark.parametrize(("n", "m"), [(0, 3), (4, 0), (0, 0)])
def test_an_empty_cloud_has_nothing_to_move(backend, device, n, m):
    x, y = torch.zeros(1, n, 2, device=device), torch.zeros(1, m, 2, device=device)
    options = {"reg": 0.5, "backend": backend, "max_iter": 5}
    mass_a, mass_b = float(n > 0), float(m > 0)
    result = otkern.solve_sample(x, y, unbalanced=(0.4, 0.7), **options)
    assert result.value.item() == pytest.approx(0.4 * mass_a + 0.7 * mass_b)
    assert result.n_iters.item() == 0
    assert result.marginal_error.item() == 0
    result = otkern.solve_sample(x, y, unbalanced=(0.4, INF), **options)
    assert result.value.item() == (INF if m else pytest.approx(0.4 * mass_a))
    assert result.marginal_error.item() == mass_b
    result = otkern.solve_sample(x, y, mass=0.5, check=False, **options)
    assert result.value.item() == INF
    assert result.marginal_error.item() == pytest.approx(0.5)
    result = otkern.solve_sample(x, y, null_cost=0.3, **options)
    # Every point goes to the null point of the other side.
    assert result.value.item() == pytest.approx(0.3 * (mass_a + mass_b), rel=1e-6, abs=1e-7)
    assert result.plan.shape == (1, n, m)


@relaxations
def test_identical_clouds_are_an_ordinary_problem(backend, device, interpreted, relaxation):
    x = torch.full((5, 3), 0.7, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.full((4, 3), 0.7, dtype=torch.float64, device=device)
    options = relaxation | {"reg": 0.3, "backend": backend, "max_iter": 50 if interpreted else 200}
    result = otkern.solve_sample(x, y, **options)
    assert result.value.isfinite()
    (gradient,) = torch.autograd.grad(result.value, x)
    assert gradient.eq(0).all()
    # One point of the same mass each is the same problem, but for the entropy that splitting brings.
    if relaxation["reg_type"] == "KL":
        one = otkern.solve_sample(x[:1].detach(), y[:1], **options)
        assert result.value.item() == pytest.approx(one.value.item(), rel=1e-9, abs=1e-12)


@relaxations
def test_points_without_mass_change_nothing_for_the_others(backend, device, relaxation):
    problem = make_relaxed(9, 7)
    far = Problem(
        torch.cat([problem.x, 9 * problem.x[:2] + 3]), problem.y,
        torch.cat([problem.a, problem.a.new_zeros(2)]), problem.b, problem.metric, problem.reg,
    )  # fmt: skip
    one, two = (solve_points(p, backend, device, max_iter=20, **relaxation) for p in (problem, far))
    torch.testing.assert_close(two.value, one.value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(two.plan[:9], one.plan, rtol=1e-11, atol=1e-15)
    assert two.plan[9:].eq(0).all()
    assert two.potential_a.isfinite().all()


# Per-item values, layouts, stopping.


def batch_options(device, dtype=torch.float64) -> dict:
    """One value of each relaxation's parameter for each of three items."""

    def of(*values):
        return torch.tensor(values, dtype=dtype, device=device)

    return {
        "unbalanced": {"unbalanced": (of(0.8, 0.2, 3.0), of(0.5, 1.0, 0.1))},
        "one side": {"unbalanced": (of(0.8, INF, 3.0), of(INF, 1.0, 0.1))},
        "partial": {"mass": of(0.1, 0.79, 0.6)},
        "null": {"null_cost": of(0.5, -0.1, 2.0)},
    }


def item_options(options: dict, i: int) -> dict:
    return {
        key: tuple(v[i].item() for v in value) if isinstance(value, tuple) else value[i].item()
        for key, value in options.items()
    }


def parts(result: otkern.OTResult, leaves) -> list[tuple[str, torch.Tensor]]:
    """Everything that an item has, each with the axis its length is on: "item", "a" or "b"."""
    result.value.sum().backward()
    return [
        ("item", result.value.detach()), ("item", result.n_iters), ("item", result.marginal_error),
        ("item", result._multipliers), ("item", result.value_linear.detach()),
        ("a", result.potential_a.detach()), ("b", result.potential_b.detach()),
        ("a", result.marginal_a.detach()), ("b", result.marginal_b.detach()),
        *zip("abab", (leaf.grad for leaf in leaves), strict=True),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["unbalanced", "one side", "partial", "null"])
def test_an_item_has_the_same_bits_alone_padded_and_packed(backend, device, kind, layout, dtype):
    sizes = [(17, 9), (1, 3), (5, 16)]
    problems = [make_relaxed(n, m, seed=i).to(dtype) for i, (n, m) in enumerate(sizes)]
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    options = batch_options(device, narrow)[kind]
    sides = [[p[k].to(device) for p in problems] for k in range(4)]
    reg = torch.tensor([p.reg for p in problems], dtype=narrow, device=device)
    common = {"max_iter": 30, "tol": 1e-5, "backend": backend, "reg_type": "entropy"}
    if layout == "packed":
        leaves = [torch.cat(side).requires_grad_() for side in sides]
        sizes_of = {"cu_seqlens_a": offsets(sides[0]).to(device), "cu_seqlens_b": offsets(sides[1]).to(device)}
    else:
        leaves = [pad(side).requires_grad_() for side in sides]
        sizes_of = {"lengths_a": [len(t) for t in sides[0]], "lengths_b": [len(t) for t in sides[1]]}
    whole = parts(otkern.solve_sample(*leaves, reg=reg, **options, **sizes_of, **common), leaves)
    starts = {"a": offsets(sides[0]).tolist(), "b": offsets(sides[1]).tolist()}
    for i, (n, m) in enumerate(sizes):
        alone_leaves = [side[i].clone().requires_grad_() for side in sides]
        alone = otkern.solve_sample(*alone_leaves, reg=reg[i], **item_options(options, i), **common)
        for (axis, mine), (_, expected) in zip(whole, parts(alone, alone_leaves), strict=True):
            if axis == "item":
                assert mine[i].equal(expected if expected.dim() == mine[i].dim() else expected[0])
            elif layout == "packed":
                assert mine[starts[axis][i] : starts[axis][i + 1]].equal(expected)
            else:
                size = n if axis == "a" else m
                assert mine[i, :size].equal(expected)
                assert mine[i, size:].eq(0).all()


@pytest.mark.parametrize("kind", ["unbalanced", "one side", "partial", "null"])
def test_every_item_stops_by_itself_with_its_own_flag(backend, device, kind):
    problems = [make_relaxed(9, 7, seed=i) for i in range(3)]
    x, y, a, b = (torch.stack([p[k] for p in problems]).to(device) for k in range(4))
    reg = torch.tensor([1.0, 0.02, 0.3], dtype=torch.float64, device=device)
    options = batch_options(device)[kind] | {"max_iter": 25, "tol": 1e-8, "backend": backend}
    with pytest.warns(UserWarning, match="not converged"):
        result = otkern.solve_sample(x, y, a, b, reg=reg, **options)
        errors, converged = result.marginal_error, result.converged
    assert (converged == (errors <= 1e-8)).all()
    assert converged[0] and not converged[1]
    assert result.n_iters[1] == 25
    assert result.n_iters[0] < 25
    # The reported error is that of the plan itself, from its marginals and its potentials.
    for i in range(3):
        error = marginal_error(result, i, a[i], b[i], item_options(batch_options("cpu")[kind], i))
        assert errors[i].item() == pytest.approx(error, rel=1e-6, abs=1e-12)


def marginal_error(result: otkern.OTResult, i: int, a, b, options: dict) -> float:
    """By its definition, in docs/derivations.md."""
    plan, f, g = result.plan[i], result.potential_a[i], result.potential_b[i]
    multipliers = result._multipliers[i]
    total = 0.0
    if "null_cost" in options:
        eps, price = result._inputs.reg[i], options["null_cost"]
        to_null = a * a.sum() * ((f + multipliers[1] - price) / eps).exp()
        from_null = b * b.sum() * ((g + multipliers[0] - price) / eps).exp()
        corner = a.sum() * b.sum() * (multipliers.sum() / eps).exp()
        total += (plan.sum(1) + to_null - a).abs().sum() + (plan.sum(0) + from_null - b).abs().sum()
        total += (to_null.sum() + corner - a.sum()).abs() + (from_null.sum() + corner - b.sum()).abs()
        return float(total)
    rho = options.get("unbalanced", (INF, INF))
    for marginal, weights, potential, of_side in ((plan.sum(1), a, f, rho[0]), (plan.sum(0), b, g, rho[1])):
        if "mass" in options:
            capped = potential - multipliers[0] / 2 >= -1e-12
            total += torch.where(capped, (marginal - weights).clamp(min=0), (marginal - weights).abs()).sum()
        else:
            total += (marginal - weights * (-potential / of_side).exp()).abs().sum()
    return float(total)


@kinds
def test_a_warm_start_at_the_solution_needs_one_iteration(backend, device, relaxation):
    problem = make_relaxed(9, 7)
    first = solve(problem, backend, device, **relaxation, max_iter=2000, tol=1e-12)
    again = solve(problem, backend, device, **relaxation, max_iter=2000, tol=1e-10, potentials_init=first.potentials)
    # The null points' and the mass's multipliers start anew.
    assert again.n_iters <= (1 if "unbalanced" in relaxation else first.n_iters)
    torch.testing.assert_close(again.value, first.value, rtol=1e-9, atol=1e-10)


@kinds
def test_uniform_weights_are_the_default(backend, device, relaxation):
    problem = make_relaxed(9, 7)
    a, b = torch.full((9,), 1 / 9, dtype=torch.float64), torch.full((7,), 1 / 7, dtype=torch.float64)
    expected = solve(problem._replace(a=a, b=b), backend, device, max_iter=10, **relaxation)
    cost = problem.cost.to(device)
    result = otkern.solve(cost, reg=problem.reg, max_iter=10, backend=backend, **relaxation)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(result.plan, expected.plan, rtol=1e-12, atol=1e-15)


def test_the_linear_value_of_null_points_counts_what_they_take(backend, device):
    problem = make_relaxed(9, 7)
    result = solve(problem, backend, device, null_cost=0.5, **CONVERGED)
    plan = result.plan.cpu()
    unmatched = (problem.a - plan.sum(1)).sum() + (problem.b - plan.sum(0)).sum()
    expected = (plan * problem.cost).sum() + 0.5 * unmatched
    assert result.value_linear.item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_null_is_the_balanced_problem_with_one_more_point_on_each_side(backend, device):
    problem = make_relaxed(9, 7)
    enlarged = [t.to(device) for t in with_null(problem.cost, problem.a, problem.b, 0.5)]
    for iterations in (1, 4, 200):
        expected = otkern.solve(*enlarged, reg=problem.reg, max_iter=iterations, backend=backend)
        result = solve(problem, backend, device, null_cost=0.5, max_iter=iterations)
        torch.testing.assert_close(result.value, expected.value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(result.plan, expected.plan[:-1, :-1], rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(result.potential_a, expected.potential_a[:-1], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(result.marginal_error, expected.marginal_error, rtol=1e-6, atol=1e-13)
