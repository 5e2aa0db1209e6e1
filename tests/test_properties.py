"""What must hold of every problem: symmetries, monotonicity, duality. Problems are drawn by Hypothesis."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import otkern
from tests.problems import (
    METRICS,
    Problem,
    make_problem,
    primal_objective,
    round_to_feasible,
)

# Converged solves in fp64 agree to the marginal error that is left (below 1e-12 here) and to rounding.
CONVERGED = {"max_iter": 400, "tol": 1e-12}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

SIZES = (1, 2, 3, 5, 9, 16, 17)


@st.composite
def problems(draw, smallest: int = 1, metrics=METRICS, least_reg: float = 0.3):
    n, m = (draw(st.sampled_from([s for s in SIZES if s >= smallest])) for _ in range(2))
    metric, seed = draw(st.sampled_from(metrics)), draw(st.integers(0, 99))
    return make_problem(n, m, draw(st.sampled_from([1, 2, 5])), metric, draw(st.floats(least_reg, 3.0)), seed)


@pytest.fixture
def for_all(interpreted):
    """Calls a function with problems drawn from a strategy; with few of them where launches are interpreted."""

    def run(strategy, check):
        settings = hypothesis.settings(max_examples=3 if interpreted else 20)
        settings(hypothesis.given(strategy)(check))()

    return run


@pytest.fixture
def solve(backend, device):
    """`otkern.solve_sample` of a `Problem`, and of a cost with `solve.cost`."""

    def solve_points(problem: Problem, **options):
        x, y, a, b = (t.to(device) for t in problem[:4])
        return otkern.solve_sample(x, y, a, b, metric=problem.metric, reg=problem.reg, backend=backend, **options)

    def solve_cost(cost, a, b, reg, **options):
        return otkern.solve(cost.to(device), a.to(device), b.to(device), reg=reg, backend=backend, **options)

    solve_points.cost = solve_cost
    return solve_points


def test_exchanging_the_sides_transposes_the_plan(for_all, solve):
    def check(problem):
        x, y, a, b, metric, reg = problem
        one, other = solve(problem, **CONVERGED), solve(Problem(y, x, b, a, metric, reg), **CONVERGED)
        torch.testing.assert_close(one.value, other.value, **CLOSE)
        torch.testing.assert_close(one.plan, other.plan.mT, **CLOSE)

    for_all(problems(), check)


def test_the_value_scales_with_cost_and_reg(for_all, solve):
    def check(problem):
        cost, a, b, reg = problem.cost, problem.a, problem.b, problem.reg
        one = solve.cost(cost, a, b, reg, max_iter=10)
        for s in (1e-3, 8.0, 1e4):
            scaled = solve.cost(s * cost, a, b, s * reg, max_iter=10)
            torch.testing.assert_close(scaled.value, s * one.value, rtol=1e-12, atol=1e-13 * s)
            torch.testing.assert_close(scaled.plan, one.plan, rtol=1e-11, atol=0)
            torch.testing.assert_close(scaled.potential_a, s * one.potential_a, rtol=1e-11, atol=1e-12 * s)

    for_all(problems(), check)


def test_a_constant_added_to_the_cost_is_added_to_the_value(for_all, solve):
    def check(problem):
        cost, a, b, reg = problem.cost, problem.a, problem.b, problem.reg
        one = solve.cost(cost, a, b, reg, max_iter=10)
        for c in (-3.0, 50.0):
            shifted = solve.cost(cost + c, a, b, reg, max_iter=10)
            torch.testing.assert_close(shifted.value, one.value + c, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(shifted.plan, one.plan, rtol=1e-10, atol=1e-15)

    for_all(problems(), check)


def test_costs_of_one_row_shift_the_potential_of_that_row(for_all, solve):
    def check(problem):
        cost, a, b, reg = problem.cost, problem.a, problem.b, problem.reg
        one = solve.cost(cost, a, b, reg, max_iter=10)
        row = torch.zeros_like(a).scatter_(0, a.argmax(), 0.7)
        shifted = solve.cost(cost + row.unsqueeze(1), a, b, reg, max_iter=10)
        torch.testing.assert_close(shifted.value.cpu(), one.value.cpu() + a @ row, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(shifted.plan, one.plan, rtol=1e-10, atol=1e-15)

    for_all(problems(), check)


def test_splitting_a_point_in_two_changes_nothing(for_all, solve):
    def check(problem):
        x, y, a, b, metric, reg = problem
        split = Problem(torch.cat([x, x[:1]]), y, torch.cat([a, 0.25 * a[:1]]), b, metric, reg)
        split.a[0] = 0.75 * a[0]
        one, two = solve(problem, max_iter=10), solve(split, max_iter=10)
        torch.testing.assert_close(two.value, one.value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(two.plan[0] + two.plan[-1], one.plan[0], rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(two.plan[1:-1], one.plan[1:], rtol=1e-10, atol=1e-15)

    for_all(problems(), check)


def test_a_point_without_mass_changes_nothing_for_the_others(for_all, solve):
    def check(problem):
        x, y, a, b, metric, reg = problem
        more = Problem(torch.cat([x, 3 * x[:1] + 1]), y, torch.cat([a, a.new_zeros(1)]), b, metric, reg)
        one, two = solve(problem, max_iter=10), solve(more, max_iter=10)
        torch.testing.assert_close(two.value, one.value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(two.plan[:-1], one.plan, rtol=1e-10, atol=1e-15)
        assert not two.plan[-1].any()

    for_all(problems(), check)


def test_permuting_points_permutes_the_plan(for_all, solve):
    def check(problem):
        x, y, a, b, metric, reg = problem
        rows = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))
        columns = torch.randperm(len(b), generator=torch.Generator().manual_seed(2))
        one = solve(problem, max_iter=10)
        other = solve(Problem(x[rows], y[columns], a[rows], b[columns], metric, reg), max_iter=10)
        torch.testing.assert_close(other.value, one.value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(other.plan, one.plan[rows][:, columns], rtol=1e-10, atol=1e-15)

    for_all(problems(), check)


def test_translation_and_rotation_change_no_distance(for_all, solve):
    def check(problem):
        x, y = problem.x, problem.y
        d = x.shape[1]
        rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d)).double())
        moved = problem._replace(x=x @ rotation + 5, y=y @ rotation + 5)
        one, other = solve(problem, max_iter=10), solve(moved, max_iter=10)
        torch.testing.assert_close(other.value, one.value, rtol=1e-10, atol=1e-12)

    for_all(problems(metrics=("sqeuclidean", "euclidean")), check)


def test_norms_of_points_do_not_matter_to_cosine(for_all, solve):
    def check(problem):
        scaled = problem._replace(x=problem.x * torch.linspace(0.1, 50, len(problem.x)).double().unsqueeze(1))
        one, other = solve(problem, max_iter=10), solve(scaled, max_iter=10)
        torch.testing.assert_close(other.value, one.value, rtol=1e-11, atol=1e-13)

    for_all(problems(metrics=("cosine",)), check)


@pytest.mark.parametrize("max_iter", [1, 4])
def test_the_value_is_below_the_objective_of_every_feasible_plan(for_all, solve, max_iter):
    # Weak duality, for any potentials; the gap closes at convergence.
    def check(problem):
        result = solve(problem, max_iter=max_iter)
        a, b = problem.a, problem.b
        feasible = round_to_feasible(result.plan.cpu(), a, b)
        torch.testing.assert_close(feasible.sum(1), a, rtol=0, atol=1e-12)
        torch.testing.assert_close(feasible.sum(0), b, rtol=0, atol=1e-12)
        primal = primal_objective(feasible, problem.cost, a, b, problem.reg)
        assert result.value.item() <= primal.item() + 1e-12

    for_all(problems(least_reg=0.02), check)


def test_the_duality_gap_closes(for_all, solve):
    def check(problem):
        result = solve(problem, **CONVERGED)
        a, b = problem.a, problem.b
        primal = primal_objective(round_to_feasible(result.plan.cpu(), a, b), problem.cost, a, b, problem.reg)
        torch.testing.assert_close(result.value.cpu(), primal, **CLOSE)

    for_all(problems(), check)


def test_more_iterations_never_lower_the_value(for_all, solve):
    # Each half of an iteration maximises the dual objective over one potential.
    def check(problem):
        values = [solve(problem, max_iter=k).value.item() for k in (1, 2, 3, 5, 9)]
        assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))

    for_all(problems(least_reg=0.02), check)


def test_a_larger_reg_never_lowers_the_value(for_all, solve):
    # The derivative in reg is KL(P | a b) >= 0.
    def check(problem):
        values = [solve(problem._replace(reg=s * problem.reg), **CONVERGED).value.item() for s in (1.0, 2.0, 10.0)]
        assert all(later >= earlier - 1e-11 for earlier, later in itertools.pairwise(values))

    for_all(problems(), check)


def test_the_gradient_of_the_cost_is_the_plan(for_all, solve):
    def check(problem):
        cost = problem.cost.requires_grad_()
        result = solve.cost(cost, problem.a, problem.b, problem.reg, max_iter=5)
        result.value.backward()
        torch.testing.assert_close(cost.grad, result.plan.detach().cpu(), rtol=1e-11, atol=1e-300)

    for_all(problems(), check)


def test_the_value_is_the_linear_value_plus_the_entropy_term(for_all, solve):
    def check(problem):
        result = solve(problem, **CONVERGED)
        plan, a, b = result.plan.cpu(), problem.a, problem.b
        torch.testing.assert_close(result.value_linear.cpu(), (plan * problem.cost).sum(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(result.value.cpu(), primal_objective(plan, problem.cost, a, b, problem.reg), **CLOSE)

    for_all(problems(), check)


def test_the_potentials_are_in_cost_units_and_fixed_by_their_gauge(for_all, solve):
    def check(problem):
        result = solve(problem, max_iter=10)
        (f, g), a, b = (p.cpu() for p in result.potentials), problem.a, problem.b
        torch.testing.assert_close(a @ f, b @ g, rtol=1e-12, atol=1e-13)
        plan = a.unsqueeze(1) * b * ((f.unsqueeze(1) + g - problem.cost) / problem.reg).exp()
        torch.testing.assert_close(result.plan.cpu(), plan, rtol=1e-10, atol=1e-300)

    for_all(problems(), check)
