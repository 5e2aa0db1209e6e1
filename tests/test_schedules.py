"""Ways to iterate: epsilon schedules, symmetric updates, over-relaxation, warm starts. The same answer, sooner."""

import pytest
import torch

import otkern
from tests.problems import METRICS, Problem, make_batch, make_problem, sinkhorn
from tests.relaxed import RELAXATIONS, make_relaxed

# Some problems here are compared after a number of iterations at which they need not have converged.
pytestmark = pytest.mark.filterwarnings("ignore:otkern. not converged")

ALL_KINDS = {"balanced": {}} | RELAXATIONS
WITHOUT_MASS = {name: relaxation for name, relaxation in ALL_KINDS.items() if "mass" not in relaxation}
SCHEDULES = {
    "scaling": {"scaling": 0.7},
    "symmetric": {"update": "symmetric"},
    "over-relaxed": {"overrelaxation": 1.3},
    "auto": {"overrelaxation": "auto"},
    "scaled and over-relaxed": {"scaling": 0.5, "overrelaxation": 1.3},
    "scaled and symmetric": {"scaling": 0.5, "update": "symmetric"},
}


def serves(backend: str, schedule: dict) -> bool:
    """The reference alone does what is not a plain alternating update."""
    return backend == "reference" or set(schedule) == {"scaling"}


def solve(problem: Problem, backend: str, device: str, **options) -> otkern.OTResult:
    points = (t.to(device) for t in problem[:4])
    return otkern.solve_sample(
        *points, **({"metric": problem.metric, "reg": problem.reg, "backend": backend} | options)
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_schedule_has_the_same_answer(backend, device, kind, schedule):
    if not serves(backend, schedule):
        pytest.skip(f"backend {backend} does plain alternating updates")
    if kind == "partial" and set(schedule) != {"scaling"}:
        pytest.skip("problems with a given mass take alternating, plain updates only")
    problem = make_problem(9, 7, reg=0.2) if kind == "balanced" else make_relaxed(9, 7, reg=0.2)
    options = {"max_iter": 2000, "tol": 1e-11} | ALL_KINDS[kind]
    expected = solve(problem, backend, device, **options)
    result = solve(problem, backend, device, **options, **schedule)
    assert result.converged
    torch.testing.assert_close(result.value, expected.value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.plan, expected.plan, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.potential_a, expected.potential_a, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_last_iteration_is_plain_and_done_at_reg(backend, device, schedule):
    # Columns are exact, the rows are off by the marginal error, and the gradient of the cost is the plan.
    if not serves(backend, schedule):
        pytest.skip(f"backend {backend} does plain alternating updates")
    problem = make_problem(9, 7, reg=0.2)
    cost, a, b = (t.to(device) for t in (problem.cost, problem.a, problem.b))
    for iterations in (1, 2, 4):
        leaf = cost.clone().requires_grad_()
        result = otkern.solve(leaf, a, b, reg=problem.reg, max_iter=iterations, backend=backend, **schedule)
        assert result.n_iters.item() == iterations
        plan = result.plan.detach()
        torch.testing.assert_close(plan.sum(0), b, rtol=1e-12, atol=1e-15)
        assert result.marginal_error.item() == pytest.approx((plan.sum(1) - a).abs().sum().item(), rel=1e-9)
        (gradient,) = torch.autograd.grad(result.value, leaf)
        torch.testing.assert_close(gradient, plan, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_one_iteration_of_every_schedule_is_the_plain_one(backend, device, schedule):
    if not serves(backend, schedule):
        pytest.skip(f"backend {backend} does plain alternating updates")
    problem = make_problem(9, 7)
    expected, result = (solve(problem, backend, device, max_iter=1, **options) for options in ({}, schedule))
    assert result.value.equal(expected.value)
    assert result.potential_a.equal(expected.potential_a)


def scale_of(problem: Problem) -> float:
    """The diameter of the box around both clouds, in the unit of the cost."""
    both = torch.cat([problem.x, problem.y])
    diameter = float((both.amax(0) - both.amin(0)).norm())
    norms = float(problem.x.norm(dim=1).max() * problem.y.norm(dim=1).max())
    return {"sqeuclidean": diameter**2, "euclidean": diameter, "cosine": 2.0, "dot": norms}[problem.metric]


@pytest.mark.parametrize("metric", METRICS)
def test_epsilon_falls_from_the_scale_of_the_cost(backend, device, metric):
    # By hand: one plain iteration at each value, warm from the one before.
    problem = make_problem(9, 7, metric=metric, reg=0.02)
    cost, a, b = problem.cost, problem.a, problem.b
    eps, factor = scale_of(problem), 0.5 ** (2 if metric == "sqeuclidean" else 1)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    iterations = 4
    for k in range(iterations):
        at = problem.reg if k == iterations - 1 else max(problem.reg, eps)
        f = -at * ((g - cost) / at + b.log()).logsumexp(1)
        g = -at * ((f - cost.mT) / at + a.log()).logsumexp(1)
        eps *= factor
    result = solve(problem, backend, device, scaling=0.5, max_iter=iterations)
    f, g = f[a > 0], g[b > 0]
    shift = (b[b > 0] @ g - a[a > 0] @ f) / 2
    torch.testing.assert_close(result.potential_a.cpu()[a > 0], f + shift, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.potential_b.cpu()[b > 0], g - shift, rtol=0, atol=1e-10)


def test_costs_have_their_largest_finite_magnitude_for_a_scale(backend, device):
    cost = torch.tensor([[0.1, -4.0], [float("inf"), 0.3]], dtype=torch.float64, device=device)
    options = {"reg": 0.5, "backend": backend, "max_iter": 2}
    # The first of two iterations is at 4.
    result = otkern.solve(cost, **options, scaling=0.5)
    at_4 = otkern.solve(cost, **(options | {"reg": 4.0, "max_iter": 1}))
    expected = otkern.solve(cost, **(options | {"max_iter": 1}), potentials_init=at_4.potentials)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-12, atol=1e-13)


def test_a_schedule_needs_fewer_iterations_at_a_small_reg(backend, device):
    # Cold, the number grows like 1 / reg; along a schedule like its logarithm, with a few at the end.
    problem = make_problem(16, 17, reg=0.003)
    options = {"max_iter": 3000, "tol": 1e-2}
    plain, scaled = (solve(problem, backend, device, **options, **more) for more in ({}, {"scaling": 0.8}))
    assert scaled.converged
    assert scaled.n_iters < 0.75 * plain.n_iters


def test_the_tolerance_counts_from_where_reg_is_reached(backend, device):
    # At the first, large epsilon the marginals are exact at once.
    problem = make_problem(9, 7, reg=0.05)
    result = solve(problem, backend, device, scaling=0.9, max_iter=500, tol=1e-3)
    steps, eps = 1, scale_of(problem)
    while eps > problem.reg:
        eps *= 0.81
        steps += 1
    assert result.converged
    assert result.n_iters >= steps
    expected = solve(problem, backend, device, max_iter=2000, tol=1e-10)
    torch.testing.assert_close(result.plan, expected.plan, rtol=0, atol=2e-3)


def test_every_item_has_its_own_schedule(backend, device):
    problems = make_batch([(9, 7)] * 3)
    problems[1] = problems[1]._replace(x=10 * problems[1].x)
    x, y, a, b = (torch.stack([p[k] for p in problems]).to(device) for k in range(4))
    reg = torch.tensor([0.5, 0.1, 0.02], dtype=torch.float64, device=device)
    options = {"scaling": 0.6, "max_iter": 60, "tol": 1e-4, "backend": backend}
    result = otkern.solve_sample(x, y, a, b, reg=reg, **options)
    for i in range(3):
        alone = otkern.solve_sample(x[i], y[i], a[i], b[i], reg=reg[i], **options)
        assert result.value[i].equal(alone.value)
        assert result.n_iters[i].equal(alone.n_iters)
        assert result.potential_a[i].equal(alone.potential_a)
    assert len(set(result.n_iters.tolist())) > 1


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES.values() if "scaling" not in s], ids=str)
def test_every_item_has_its_own_updates(schedule):
    problems = make_batch([(9, 7)] * 3, reg=0.1)
    x, y, a, b = (torch.stack([p[k] for p in problems]) for k in range(4))
    reg = torch.tensor([0.5, 0.1, 0.05], dtype=torch.float64)
    options = {"max_iter": 300, "tol": 1e-8, "backend": "reference"} | schedule
    result = otkern.solve_sample(x, y, a, b, reg=reg, **options)
    for i in range(3):
        alone = otkern.solve_sample(x[i], y[i], a[i], b[i], reg=reg[i], **options)
        assert result.value[i].equal(alone.value)
        assert result.n_iters[i].equal(alone.n_iters)


# Symmetric updates.


def symmetric_by_hand(problem: Problem, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Averaged updates, the first not averaged, and a plain iteration at the end."""
    cost, a, b, eps = problem.cost, problem.a, problem.b, problem.reg

    def rows(g):
        return -eps * ((g - cost) / eps + b.log()).logsumexp(1)

    def columns(f):
        return -eps * ((f - cost.mT) / eps + a.log()).logsumexp(1)

    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for k in range(iterations - 1):
        new_f, new_g = rows(g), columns(f)
        f, g = (new_f, new_g) if k == 0 else ((f + new_f) / 2, (g + new_g) / 2)
    f = rows(g)
    return f, columns(f)


@pytest.mark.parametrize("iterations", [1, 2, 3, 8])
def test_symmetric_updates_are_both_made_at_once_and_averaged(iterations):
    problem = make_problem(9, 7)
    f, g = symmetric_by_hand(problem, iterations)
    result = solve(problem, "reference", "cpu", update="symmetric", max_iter=iterations)
    plan = result.plan
    expected = problem.a.unsqueeze(1) * problem.b * ((f.unsqueeze(1) + g - problem.cost) / problem.reg).exp()
    torch.testing.assert_close(plan, expected, rtol=1e-11, atol=1e-300)


def test_symmetric_updates_of_one_cloud_with_itself_converge_in_few_iterations():
    # f = g from the start, which alternating updates break: the averaged fixed point of one potential contracts fast.
    problem = make_problem(17, 17, reg=0.05)
    same = problem._replace(y=problem.x, b=problem.a)
    options = {"max_iter": 2000, "tol": 1e-6}
    symmetric, plain = (solve(same, "reference", "cpu", update=u, **options) for u in ("symmetric", "alternating"))
    assert symmetric.converged
    assert symmetric.n_iters < 0.5 * plain.n_iters
    torch.testing.assert_close(symmetric.potential_a, symmetric.potential_b, rtol=0, atol=1e-6)


# Over-relaxation.


def rate_of(problem: Problem) -> float:
    """The factor by which the error of the plain iteration falls, from its last iterations."""
    errors = [solve(problem, "reference", "cpu", max_iter=k).marginal_error.item() for k in (60, 61)]
    return errors[1] / errors[0]


@pytest.mark.parametrize("factor", ["best", "auto"])
def test_over_relaxation_needs_fewer_iterations(factor):
    problem = make_problem(16, 17, reg=0.05)
    r = rate_of(problem)
    assert 0.6 < r < 0.999
    best = 2 / (1 + (1 - r) ** 0.5)
    options = {"max_iter": 5000, "tol": 1e-9}
    plain = solve(problem, "reference", "cpu", **options)
    relaxed = solve(problem, "reference", "cpu", **options, overrelaxation=best if factor == "best" else "auto")
    assert relaxed.converged
    # Theory: log(r) / log(best - 1) of the plain number, asymptotically.
    assert relaxed.n_iters < 0.7 * plain.n_iters
    torch.testing.assert_close(relaxed.value, plain.value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", WITHOUT_MASS)
def test_a_chosen_factor_never_keeps_a_problem_from_converging(kind, seed):
    problem = make_relaxed(9, 7, reg=0.03, seed=seed)
    if kind == "balanced":
        problem = make_problem(9, 7, reg=0.03, seed=seed)
    options = {"max_iter": 4000, "tol": 1e-7} | ALL_KINDS[kind]
    plain = solve(problem, "reference", "cpu", **options)
    auto = solve(problem, "reference", "cpu", **options, overrelaxation="auto")
    assert auto.converged
    assert auto.n_iters <= 1.2 * plain.n_iters + 10


def test_a_factor_of_one_is_the_plain_iteration_on_every_backend(backend, device):
    problem = make_problem(9, 7)
    one, none = (solve(problem, backend, device, overrelaxation=w, max_iter=7) for w in (1.0, None))
    assert one.value.equal(none.value)


# Who serves what.


@pytest.mark.parametrize("schedule", [{"update": "symmetric"}, {"overrelaxation": 1.5}, {"overrelaxation": "auto"}])
def test_a_named_backend_serves_a_schedule_or_says_why_not(backend, device, schedule):
    problem = make_problem(5, 4)
    if serves(backend, schedule):
        assert solve(problem, backend, device, max_iter=3, **schedule).value.isfinite()
    else:
        with pytest.raises(ValueError, match=rf"'{backend}' cannot: .* by the reference backend only"):
            solve(problem, backend, device, max_iter=3, **schedule)
    unnamed = otkern.solve(problem.cost, reg=0.5, max_iter=3, **schedule)
    assert "backend='reference'" in repr(unnamed)


# Warm starts.


@pytest.mark.parametrize("schedule", [{}, {"update": "symmetric"}, {"overrelaxation": 1.3}], ids=str)
def test_a_warm_start_at_the_solution_is_kept(backend, device, schedule):
    if not serves(backend, schedule) and schedule:
        pytest.skip(f"backend {backend} does plain alternating updates")
    problem = make_problem(9, 7, reg=0.1)
    cold = solve(problem, backend, device, max_iter=3000, tol=1e-12)
    warm = solve(problem, backend, device, max_iter=3000, tol=1e-10, potentials_init=cold.potentials, **schedule)
    assert warm.n_iters <= 2
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-10, atol=1e-12)


def test_a_warm_start_from_a_nearby_problem_saves_iterations(backend, device):
    problem = make_problem(9, 7, reg=0.1)
    options = {"max_iter": 3000, "tol": 1e-6}
    before = solve(problem, backend, device, **options)
    moved = problem._replace(x=problem.x + 1e-3)
    cold, warm = (
        solve(moved, backend, device, **options, **more) for more in ({}, {"potentials_init": before.potentials})
    )
    assert warm.n_iters < 0.75 * cold.n_iters
    f, g = sinkhorn(moved.cost, moved.a, moved.b, moved.reg, 3000)
    torch.testing.assert_close(warm.potential_b.cpu(), g, rtol=0, atol=1e-4)
    torch.testing.assert_close(warm.potential_a.cpu(), f, rtol=0, atol=1e-4)
