"""The peers' answers where they are right; `test_proven_defects` has those where they are not."""

import ot
import pytest
import torch

import otkern
from tests.calls import solve_cost
from tests.problems import METRICS, make_problem, positive, relative_error


def geomloss_sinkhorn(**options):
    """GeomLoss's loss on this problem's half squared distance, or a skip that says what is missing."""
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    options = {"p": 2, "blur": 0.3, "debias": False, "backend": "tensorized"} | options
    return geomloss.SamplesLoss("sinkhorn", **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m"), [(5, 4), (17, 9)])
def test_the_plan_is_that_of_pots_log_domain_sinkhorn(backend, device, metric, n, m):
    problem = make_problem(n, m, metric=metric)
    expected = ot.sinkhorn(
        problem.a, problem.b, problem.cost, problem.reg, method="sinkhorn_log", stopThr=1e-12, numItermax=2000
    )
    result = solve_cost(problem, backend, device, max_iter=80)
    # POT stops at a marginal error of 1e-12; 80 iterations leave less than 1e-10.
    torch.testing.assert_close(result.plan.cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_values_are_those_of_pots_solve(backend, device, metric, reg_type):
    problem = make_problem(17, 9, metric=metric)
    expected = ot.solve(problem.cost, problem.a, problem.b, problem.reg, reg_type=reg_type, tol=1e-12, max_iter=2000)
    result = solve_cost(problem, backend, device, reg_type=reg_type, max_iter=60)
    assert result.value.item() == pytest.approx(expected.value.item(), abs=1e-9)
    assert result.value_linear.item() == pytest.approx(expected.value_linear.item(), abs=1e-9)


def test_the_gradients_are_those_of_pots_unrolled_iterations(backend, device):
    problem = positive(make_problem(9, 7))
    theirs = [t.clone().requires_grad_() for t in (problem.cost, problem.a, problem.b)]
    ot.solve(*theirs, problem.reg, grad="autodiff", tol=1e-12, max_iter=500).value.backward()
    ours = [t.to(device).clone().requires_grad_() for t in (problem.cost, problem.a, problem.b)]
    otkern.solve(*ours, reg=problem.reg, max_iter=80, backend=backend).value.backward()
    assert relative_error(ours[0].grad.cpu(), theirs[0].grad) < 1e-9
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        # Weights: equal along directions that keep the mass.
        mine = mine.grad.cpu()
        assert relative_error(mine - mine.mean(), other.grad - other.grad.mean()) < 1e-9


def test_a_value_and_its_gradient_are_those_of_geomloss_with_many_steps(backend, device):
    loss = geomloss_sinkhorn(blur=0.7, scaling=0.999)
    problem = positive(make_problem(9, 7))
    theirs = problem.x.clone().requires_grad_()
    expected = loss(problem.a, theirs, problem.b, problem.y)
    expected.backward()
    ours = problem.x.to(device).clone().requires_grad_()
    y, a, b = (t.to(device) for t in problem[1:4])
    # GeomLoss's cost is |x - y|² / 2 and its epsilon blur²: twice both is our squared distance.
    value = otkern.solve_sample(ours, y, a, b, reg=2 * 0.7**2, max_iter=80, backend=backend).value / 2
    value.backward()
    # GeomLoss anneals without a tolerance: its gradient errs in proportion to 1 - scaling, here by about 2e-4.
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(ours.grad.cpu(), theirs.grad) < 1e-3


def test_a_small_reg_gives_the_plan_of_the_linear_programme(backend, device):
    # Nothing here is near a tie: the exact plan is unique, and the entropic one is within exp(-gap / reg) of it.
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[3.1, 0.2], [0.1, 5.2], [0.3, 0.1]], dtype=torch.float64)
    a = torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=torch.float64)
    b = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    exact = ot.emd(a, b, (x.unsqueeze(1) - y).square().sum(2))
    result = otkern.solve_sample(
        x.to(device), y.to(device), a.to(device), b.to(device), reg=0.05, max_iter=50, backend=backend
    )
    torch.testing.assert_close(result.plan.cpu(), exact, rtol=0, atol=1e-9)
