"""Answers known without an iteration: by hand, in closed form, or from a linear programme."""

import math

import ot
import pytest
import torch

import otkern
from tests.problems import METRICS, make_problem, make_weights, pairwise_cost

# Rounding of a converged fp64 solve: a few hundred operations of unit size at 1.1e-16 each.
ROUNDING = 1e-13


@pytest.mark.parametrize("metric", METRICS)
def test_one_point_against_one_costs_their_cost(backend, device, metric):
    x, y = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 3.0, 2.0]]], dtype=torch.float64, device=device)
    result = otkern.solve_sample(x, y, metric=metric, reg=0.1, max_iter=3, backend=backend)
    expected = pairwise_cost(x, y, metric)[0, 0]
    assert result.value.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert result.plan.item() == pytest.approx(1, rel=ROUNDING)
    assert result.marginal_error.item() <= ROUNDING


def test_one_target_takes_all_mass(backend, device):
    problem = make_problem(17, 1)
    x, y, a = problem.x.to(device), problem.y.to(device), problem.a.to(device)
    result = otkern.solve_sample(x, y, a, reg=0.5, max_iter=5, backend=backend)
    assert result.value.item() == pytest.approx((problem.a @ problem.cost).item(), rel=ROUNDING)
    torch.testing.assert_close(result.plan.cpu().squeeze(1), problem.a, rtol=ROUNDING, atol=0)


def test_a_constant_cost_gives_the_product_plan(backend, device):
    problem = make_problem(17, 9)
    a, b = problem.a.to(device), problem.b.to(device)
    result = otkern.solve(torch.full((17, 9), 0.7, dtype=torch.float64, device=device), a, b, reg=0.1, backend=backend)
    assert result.value.item() == pytest.approx(0.7, rel=ROUNDING)
    assert result.value_linear.item() == pytest.approx(0.7, rel=ROUNDING)
    torch.testing.assert_close(result.plan, a.unsqueeze(1) * b, rtol=1e-12, atol=0)
    f, g = result.potentials
    torch.testing.assert_close(f, torch.full_like(f, 0.35), rtol=1e-12, atol=0)
    torch.testing.assert_close(g, torch.full_like(g, 0.35), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("c", "reg"), [(1.0, 0.05), (1.0, 1.0), (3.0, 50.0), (0.0, 1.0)])
def test_two_against_two_uniform_by_hand(backend, device, c, reg):
    # The diagonal entry of the plan is s / 2 with s = 1 / (1 + exp(-c / reg)); the value is reg log(2 s).
    cost = torch.tensor([[0.0, c], [c, 0.0]], dtype=torch.float64, device=device, requires_grad=True)
    result = otkern.solve(cost, reg=reg, backend=backend)
    s, t = 1 / (1 + math.exp(-c / reg)), 1 / (1 + math.exp(c / reg))
    plan = torch.tensor([[s / 2, t / 2], [t / 2, s / 2]], dtype=torch.float64)
    result.value.backward()
    assert result.value.item() == pytest.approx(reg * math.log(2 * s), rel=1e-12, abs=ROUNDING)
    torch.testing.assert_close(result.plan.detach().cpu(), plan, rtol=1e-12, atol=0)
    torch.testing.assert_close(cost.grad.cpu(), plan, rtol=1e-12, atol=0)


def test_two_against_two_with_weights_by_hand(backend, device):
    # p = P_11 solves p (1 - a1 - b1 + p) = K (a1 - p)(b1 - p), with K = exp(-(C11 + C22 - C12 - C21) / reg).
    cost = torch.tensor([[0.2, 1.0], [0.7, 0.1]], dtype=torch.float64, device=device)
    a1, b1, reg = 0.3, 0.6, 0.4
    ratio = math.exp(-(0.2 + 0.1 - 1.0 - 0.7) / reg)
    linear = 1 - a1 - b1 + ratio * (a1 + b1)
    p = (linear - math.sqrt(linear**2 - 4 * (ratio - 1) * ratio * a1 * b1)) / (2 * (ratio - 1))
    plan = torch.tensor([[p, a1 - p], [b1 - p, 1 - a1 - b1 + p]], dtype=torch.float64)
    weights = torch.tensor([[a1, 1 - a1], [b1, 1 - b1]], dtype=torch.float64)
    product = weights[0].unsqueeze(1) * weights[1]
    value = (plan * cost.cpu()).sum() + reg * (plan * (plan / product).log()).sum()
    a, b = weights.to(device)
    result = otkern.solve(cost, a, b, reg=reg, backend=backend)
    torch.testing.assert_close(result.plan.cpu(), plan, rtol=1e-12, atol=0)
    assert result.value.item() == pytest.approx(value.item(), rel=1e-12)
    assert result.value_linear.item() == pytest.approx((plan * cost.cpu()).sum().item(), rel=1e-12)


@pytest.mark.parametrize("n", [2, 15, 16, 17, 33])
def test_a_permuted_cloud_is_matched_point_by_point(backend, device, n):
    # Points 1 apart at reg 0.01: what leaks to a wrong partner is below exp(-1 / 0.01) ~ 4e-44.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(device)
    x = torch.arange(n, dtype=torch.float64, device=device).unsqueeze(1)
    result = otkern.solve_sample(x, x[order], reg=0.01, max_iter=20, backend=backend)
    expected = torch.zeros(n, n, dtype=torch.float64, device=device)
    expected[order, torch.arange(n, device=device)] = 1 / n
    torch.testing.assert_close(result.plan, expected, rtol=1e-11, atol=1e-14)
    assert result.value_linear.item() == pytest.approx(0, abs=ROUNDING)
    assert result.value.item() == pytest.approx(0.01 * math.log(n), rel=1e-11)
    torch.testing.assert_close(result.match(), expected > 0)


def gaussian_value(mean: float, sd_a: float, sd_b: float, reg: float) -> float:
    """Entropic OT of N(0, sd_a²) and N(mean, sd_b²), |x - y|², KL to the product (Janati et al. 2020, theorem 1)."""
    half = reg / 2
    d = math.sqrt(4 * sd_a**2 * sd_b**2 + half**2)
    return mean**2 + sd_a**2 + sd_b**2 - d + half * (1 - math.log(2 * half)) + half * math.log(d + half)


def gaussian_grid(mean: float, sd: float, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights (n,) of a Gaussian: the trapezoid rule over 7 deviations errs by less than 1e-9."""
    x = torch.linspace(mean - 7 * sd, mean + 7 * sd, n, dtype=torch.float64)
    weights = (-0.5 * ((x - mean) / sd) ** 2).exp()
    return x, weights / weights.sum()


@pytest.mark.parametrize("reg", [0.5, 2.0, 10.0])
def test_gaussians_have_the_value_and_gradients_of_the_closed_form(backend, device, reg):
    mean, sd_a, sd_b = 0.8, 1.0, 0.7
    (x, a), (y, b) = gaussian_grid(0.0, sd_a, 61), gaussian_grid(mean, sd_b, 57)
    x, y = x.unsqueeze(1).to(device).requires_grad_(), y.unsqueeze(1).to(device)
    epsilon = torch.tensor(reg, dtype=torch.float64, device=device, requires_grad=True)
    result = otkern.solve_sample(x, y, a.to(device), b.to(device), reg=epsilon, max_iter=100, backend=backend)
    result.value.backward()
    assert result.value.item() == pytest.approx(gaussian_value(mean, sd_a, sd_b, reg), abs=1e-6)
    # Moving all of side a moves its mean: the derivative of (mean_b - mean_a)² is -2 mean.
    assert x.grad.sum().item() == pytest.approx(-2 * mean, abs=1e-6)
    step = 1e-5
    slope = gaussian_value(mean, sd_a, sd_b, reg + step) - gaussian_value(mean, sd_a, sd_b, reg - step)
    assert epsilon.grad.item() == pytest.approx(slope / (2 * step), abs=1e-6)


def test_gaussians_are_sent_along_their_conditional_means(backend, device):
    # The plan is Gaussian with covariance (d - reg / 2) / 2 between the sides: E[y | x] is linear in x.
    mean, sd_a, sd_b, reg = 0.8, 1.0, 0.7, 1.0
    (x, a), (y, b) = gaussian_grid(0.0, sd_a, 61), gaussian_grid(mean, sd_b, 57)
    result = otkern.solve_sample(
        x.unsqueeze(1).to(device), y.unsqueeze(1).to(device), a.to(device), b.to(device), reg=reg, backend=backend
    )
    covariance = (math.sqrt(4 * sd_a**2 * sd_b**2 + reg**2 / 4) - reg / 2) / 2
    middle = a > 1e-4  # farther out the end of the grid of y shows
    image = result.barycentric_map().cpu().squeeze(1)
    torch.testing.assert_close(image[middle], (mean + covariance / sd_a**2 * x)[middle], rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_small_reg_approaches_the_linear_programme(backend, device, interpreted, metric):
    # LP <= value <= LP + reg min(H(a), H(b)), since 0 <= KL(P | a b) <= min(H(a), H(b)).
    problem = make_problem(12, 9, metric=metric)
    # A smaller reg needs more iterations than the interpreter has time for.
    reg = (0.2 if interpreted else 0.02) * float(problem.cost.abs().mean())
    x, y, a, b = (t.to(device) for t in problem[:4])
    result = otkern.solve_sample(x, y, a, b, metric=metric, reg=reg, max_iter=3000, tol=1e-9, backend=backend)
    assert result.converged
    exact = ot.emd2(problem.a.numpy(), problem.b.numpy(), problem.cost.numpy())
    entropy = min(-torch.special.xlogy(w, w).sum().item() for w in (problem.a, problem.b))
    slack = 1e-9 * float(problem.cost.abs().max())  # what the remaining marginal error can move
    assert exact - slack <= result.value.item() <= exact + reg * entropy + slack
    assert exact - slack <= result.value_linear.item() <= exact + reg * entropy + slack


def test_masses_other_than_one_scale_the_plan(backend, device):
    # With masses s the plan is s P for the same reg: value(s) = s value(1) + reg (s² - s): the terms sum P and sum a b,
    # and s log(1/s) from the product measure.
    problem = make_problem(9, 7)
    x, y, a, b = (t.to(device) for t in problem[:4])
    one = otkern.solve_sample(x, y, a, b, reg=problem.reg, max_iter=60, backend=backend)
    s = 2.5
    more = otkern.solve_sample(x, y, s * a, s * b, reg=problem.reg, max_iter=60, backend=backend)
    torch.testing.assert_close(more.plan, s * one.plan, rtol=1e-9, atol=0)
    expected = s * one.value.item() + problem.reg * (s * math.log(1 / s) - s + s * s)
    assert more.value.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_empty_sides_and_empty_batches_are_problems(backend, device, dtype):
    x = torch.zeros(3, 4, 2, dtype=dtype, device=device)
    value = otkern.solve_sample(x, x, reg=0.1, lengths_a=[0, 0, 4], lengths_b=[0, 3, 4], backend=backend).value
    assert value.tolist() == [0, math.inf, 0]
    assert otkern.solve_sample(x[:0], x[:0], reg=0.1, backend=backend).value.shape == (0,)


def test_weights_that_are_all_zero_have_value_zero(backend, device):
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=device, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64, device=device, requires_grad=True)
    result = otkern.solve_sample(x, x + 1, zero, zero, reg=0.1, backend=backend)
    result.value.backward()
    assert result.value.item() == 0
    assert result.marginal_error.item() == 0
    assert x.grad.abs().sum().item() == 0
    assert torch.isfinite(zero.grad).all()
    assert not any(p.any() for p in result.potentials)


def test_the_weights_of_fixtures_hold_zeros_and_differ():
    weights = make_weights(17, torch.Generator().manual_seed(0))
    assert (weights == 0).sum() == 2
    assert weights.unique().numel() == 16
