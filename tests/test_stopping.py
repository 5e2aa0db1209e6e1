"""When a solve stops, what it then says about itself, and how it starts again."""

import warnings

import pytest
import torch

import otkern
from tests.problems import make_batch, make_problem, pad, plan_of


def tensors(problem, device):
    return [t.to(device) for t in problem[:4]]


def solve(problem, backend, device, **options):
    return otkern.solve_sample(
        *tensors(problem, device), metric=problem.metric, reg=problem.reg, backend=backend, **options
    )


@pytest.mark.parametrize("max_iter", [1, 2, 17])
def test_without_a_tolerance_exactly_max_iter_iterations_are_done(backend, device, max_iter):
    batch = make_batch([(5, 4), (17, 9)])
    for problem in batch:
        result = solve(problem, backend, device, max_iter=max_iter)
        assert result.n_iters.item() == max_iter
        assert result.n_iters.dtype == torch.int32


def test_a_converged_problem_still_does_every_iteration_it_was_asked_for(backend, device):
    # A benchmark of exactly 50 iterations must be one.
    cost = torch.zeros(5, 4, device=device)
    assert otkern.solve(cost, reg=1.0, max_iter=50, backend=backend).n_iters.item() == 50


@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
def test_a_solve_stops_at_the_first_iteration_within_the_tolerance(backend, device, tol):
    problem = make_problem(9, 7, reg=0.4)
    result = solve(problem, backend, device, max_iter=100, tol=tol)
    k = int(result.n_iters)
    assert 1 < k < 100
    assert result.converged
    assert result.marginal_error.item() <= tol
    assert solve(problem, backend, device, max_iter=k - 1).marginal_error.item() > tol
    exactly = solve(problem, backend, device, max_iter=k)
    assert exactly.value.item() == pytest.approx(result.value.item(), rel=1e-14)
    assert exactly.marginal_error.item() == pytest.approx(result.marginal_error.item(), rel=1e-6)


def test_the_last_permitted_iteration_counts(backend, device):
    problem = make_problem(9, 7, reg=0.4)
    k = int(solve(problem, backend, device, max_iter=100, tol=1e-5).n_iters)
    assert solve(problem, backend, device, max_iter=k, tol=1e-5).converged


def test_a_tolerance_of_zero_is_a_tolerance(backend, device):
    x = torch.tensor([[1.0]], dtype=torch.float64, device=device)
    # One point: the first iteration is exact to the bit.
    result = otkern.solve_sample(x, x, reg=1.0, tol=0.0, max_iter=20, backend=backend)
    assert result.n_iters.item() == 1


def test_every_item_stops_by_itself(backend, device):
    # One hard item among easy ones: in POT it would take them all to its number of iterations.
    problems = make_batch([(9, 7), (9, 7), (9, 7)], reg=1.0)
    problems[1] = problems[1]._replace(reg=0.05 * problems[1].reg)
    x, y, a, b = (torch.stack([p[i] for p in problems]).to(device) for i in range(4))
    reg = torch.tensor([p.reg for p in problems], dtype=torch.float64, device=device)
    with pytest.warns(UserWarning, match="not converged"):
        result = otkern.solve_sample(x, y, a, b, reg=reg, max_iter=60, tol=1e-9, backend=backend)
        assert result.converged.tolist() == [True, False, True]
    easy, hard = result.n_iters[[0, 2]], result.n_iters[1]
    assert hard == 60
    assert (easy < 30).all()
    for i in (0, 2):
        assert solve(problems[i], backend, device, max_iter=60, tol=1e-9).n_iters == result.n_iters[i]


@pytest.mark.parametrize("max_iter", [1, 5])
def test_the_marginal_error_is_that_of_the_plan(backend, device, max_iter):
    for n, m in ((5, 4), (17, 9), (1, 3), (3, 1)):
        problem = make_problem(n, m, reg=0.1)
        result = solve(problem, backend, device, max_iter=max_iter)
        gap = (result.plan.sum(1).cpu() - problem.a).abs().sum()
        columns = (result.plan.sum(0).cpu() - problem.b).abs().sum()
        assert result.marginal_error.item() == pytest.approx(gap.item(), rel=1e-9, abs=1e-14)
        assert columns.item() <= 1e-14  # exact after the last half of an iteration


def test_convergence_without_a_tolerance_means_a_thousandth_of_the_mass(backend, device):
    problem = make_problem(9, 7, reg=0.4)
    converged = []
    for k in (1, 2, 5, 30):
        result = solve(problem, backend, device, max_iter=k)
        assert result.converged.item() == (result.marginal_error.item() <= 1e-3)
        converged.append(result.converged.item())
    assert converged[0] is False
    assert converged[-1] is True


def test_a_warm_start_from_the_solution_is_done_after_one_iteration(backend, device):
    problem = make_problem(9, 7, reg=0.4)
    cold = solve(problem, backend, device, max_iter=100, tol=1e-10)
    warm = solve(problem, backend, device, max_iter=100, tol=1e-10, potentials_init=cold.potentials)
    assert 10 < cold.n_iters.item() < 100
    assert warm.n_iters.item() == 1
    assert warm.value.item() == pytest.approx(cold.value.item(), rel=1e-10)


def test_a_warm_start_continues_where_the_first_solve_stopped(backend, device):
    problem = make_problem(17, 9, reg=0.1)
    half = solve(problem, backend, device, max_iter=4)
    warm = solve(problem, backend, device, max_iter=3, potentials_init=half.potentials)
    whole = solve(problem, backend, device, max_iter=7)
    # The gauge of the start moves the rounding, nothing else.
    torch.testing.assert_close(warm.potential_a, whole.potential_a, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(warm.value, whole.value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(warm.marginal_error, whole.marginal_error, rtol=1e-8, atol=1e-14)


def test_only_the_potential_of_side_b_starts_an_iteration(backend, device):
    problem = make_problem(5, 4)
    f, g = solve(problem, backend, device, max_iter=2).potentials
    one = solve(problem, backend, device, max_iter=2, potentials_init=(f, g))
    other = solve(problem, backend, device, max_iter=2, potentials_init=(f + 1, g))
    assert one.value.equal(other.value)


def test_a_warm_start_far_away_does_not_overflow(backend, device):
    problem = make_problem(5, 4).to(torch.float32)
    near = solve(problem, backend, device, max_iter=8)
    again = solve(problem, backend, device, max_iter=4, potentials_init=near.potentials)
    f, g = near.potentials
    for shift in (1e4, -1e4):
        far = solve(problem, backend, device, max_iter=4, potentials_init=(f, g + shift))
        # Adding and removing the shift rounds at its own size.
        assert far.value.item() == pytest.approx(again.value.item(), abs=2e4 * torch.finfo(torch.float32).eps)


def test_warm_starts_of_a_padded_batch_ignore_the_padding(backend, device):
    problems = make_batch([(5, 4), (9, 7)])
    x, y, a, b = (pad([p[i].to(device) for p in problems]) for i in range(4))
    options = {"reg": 0.3, "lengths_a": [5, 9], "lengths_b": [4, 7], "max_iter": 3, "backend": backend}
    f, g = otkern.solve_sample(x, y, a, b, **options).potentials
    expected = otkern.solve_sample(x, y, a, b, potentials_init=(f, g), **options)
    f, g = f.clone(), g.clone()
    for i, (n, m) in enumerate(((5, 4), (9, 7))):
        f[i, n:], g[i, m:] = float("nan"), float("nan")
    assert otkern.solve_sample(x, y, a, b, potentials_init=(f, g), **options).value.equal(expected.value)


def test_the_plan_is_that_of_the_returned_potentials(backend, device):
    problem = make_problem(17, 9, reg=0.1)
    result = solve(problem, backend, device, max_iter=3)
    f, g = (p.cpu() for p in result.potentials)
    expected = plan_of(problem.cost, problem.a, problem.b, problem.reg, f, g)
    torch.testing.assert_close(result.plan.cpu(), expected, rtol=1e-11, atol=1e-300)


def test_the_warning_names_the_item_its_error_and_what_to_change(backend, device):
    problems = make_batch([(9, 7), (9, 7)], reg=1.0)
    x, y = (torch.stack([p[i] for p in problems]).to(device) for i in range(2))
    reg = torch.tensor([100.0, 0.001], dtype=torch.float64, device=device)
    with pytest.warns(otkern.ConvergenceWarning) as caught:
        error = otkern.solve_sample(x, y, reg=reg, max_iter=3, tol=1e-8, backend=backend).marginal_error[1]
    (warning,) = caught
    text = str(warning.message)
    for part in ("1 of 2 problems", "item 1", f"{error.item():.3g}", "3 iterations", "max_iter", "tol=1e-08"):
        assert part in text
    assert warning.filename == __file__


def test_the_warning_comes_once_per_call_site(backend, device):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for reg in (0.02, 0.03, 0.04):  # three different marginal errors
            result = solve(make_problem(9, 7, reg=reg), backend, device, max_iter=2, tol=1e-9)
            _ = result.converged, result.marginal_error
        first = len([w for w in caught if issubclass(w.category, UserWarning)])
        x = make_problem(9, 7).x.to(device)
        _ = otkern.solve_sample(x, x[:5], reg=0.01, max_iter=1, tol=1e-9, backend=backend).converged
    assert first == 1
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 2


@pytest.mark.parametrize("options", [{"max_iter": 2}, {"max_iter": 400, "tol": 1e-9}])
def test_nothing_is_said_without_a_tolerance_or_when_it_is_met(backend, device, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = solve(make_problem(9, 7), backend, device, **options)
        _ = result.converged, result.marginal_error


def test_an_infeasible_item_is_never_converged(backend, device):
    cost = torch.zeros(2, 3, 3, device=device)
    cost[1, 0] = float("inf")
    with pytest.warns(UserWarning, match="item 1"):
        result = otkern.solve(cost, reg=1.0, tol=10.0, max_iter=5, backend=backend)
        assert result.converged.tolist() == [True, False]
    assert otkern.solve(cost, reg=1.0, max_iter=5, backend=backend).converged.tolist() == [True, False]
