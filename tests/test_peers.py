"""The peers' answers where they are right, and their proven defects: each is a check that otkern passes and they fail.

A defect's check is a function of an answer. It is applied to otkern's answer, which must pass, and to the peer's, which
must not: otherwise it would catch nothing. The peer's half runs for the releases in which the defect was seen.
"""

import math

import ot
import pytest
import torch

import otkern
from tests.problems import METRICS, Problem, exact_value, make_problem, relative_error

SEEN_IN_POT = "0.9.7.post1"
SEEN_IN_GEOMLOSS = "0.3.1"


def positive(problem: Problem) -> Problem:
    """Without weights of 0, where POT's gradients are NaN."""
    a, b = problem.a + 0.02, problem.b + 0.02
    return problem._replace(a=a / a.sum(), b=b / b.sum())


def solve_cost(problem: Problem, backend, device, **options) -> otkern.OTResult:
    cost, a, b = (t.to(device) for t in (problem.cost, problem.a, problem.b))
    return otkern.solve(cost, a, b, **({"reg": problem.reg, "max_iter": 80, "backend": backend} | options))


def fails_for_pot(check, *answer) -> None:
    if ot.__version__ == SEEN_IN_POT:
        with pytest.raises(AssertionError):
            check(*answer)


def geomloss_sinkhorn(**options):
    """GeomLoss's loss on this problem's half squared distance, or a skip that says what is missing."""
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    options = {"p": 2, "blur": 0.3, "debias": False, "backend": "tensorized"} | options
    return geomloss.SamplesLoss("sinkhorn", **options), geomloss.__version__ == SEEN_IN_GEOMLOSS


# Where the peers are right.


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
    loss, _ = geomloss_sinkhorn(blur=0.7, scaling=0.999)
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


# Defects of peers. The numbers are those of the list they were proven in.


def test_defect_1_a_batch_with_the_defaults_is_not_the_product_coupling(backend, device):
    problem = make_problem(17, 9)
    cost = problem.cost.repeat(2, 1, 1)
    exact = ot.emd2([], [], problem.cost.numpy())

    def check(value_linear):
        assert value_linear.tolist() == pytest.approx([exact] * 2, rel=0.25)

    reg = 0.1 * float(cost.mean())
    check(otkern.solve_batch(cost.to(device), reg, max_iter=30, backend=backend).value_linear)
    if ot.__version__ == SEEN_IN_POT:
        fails_for_pot(check, ot.solve_batch(cost).value_linear)


def gradients_of(solve, problem: Problem) -> list[torch.Tensor]:
    """With respect to cost, a and b; the weights' along directions that keep the mass."""
    leaves = [t.clone().requires_grad_() for t in (problem.cost, problem.a, problem.b)]
    solve(*leaves).value.backward()
    cost, a, b = (leaf.grad for leaf in leaves)
    return [cost, a - a.mean(), b - b.mean()]


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_defects_2_and_3_gradients_of_the_value_are_those_of_the_converged_value(backend, device, reg_type):
    problem = positive(make_problem(17, 9))
    options = {"reg": problem.reg, "reg_type": reg_type}

    def pot(grad):
        return gradients_of(lambda *leaves: ot.solve(*leaves, grad=grad, tol=1e-11, max_iter=2000, **options), problem)

    expected = pot("autodiff")  # right, at the price of the whole graph

    def check(gradients):
        assert all(relative_error(g, e) < 1e-6 for g, e in zip(gradients, expected, strict=True))

    check(
        gradients_of(
            lambda *leaves: otkern.solve(*(t.to(device) for t in leaves), max_iter=100, backend=backend, **options),
            problem,
        )
    )
    fails_for_pot(check, pot("last_step"))
    if reg_type == "KL":
        fails_for_pot(check, pot("envelope"))


@pytest.mark.parametrize("metric", METRICS)
def test_defect_4_gradients_are_not_doubled(backend, device, metric):
    # The derivative along x itself of a function of degree k is k times it: no constant can hide here.
    problem = make_problem(9, 7, metric=metric)
    x, y = (t.to(device).clone().requires_grad_() for t in problem[:2])
    reg = torch.tensor(problem.reg, dtype=torch.float64, device=device, requires_grad=True)
    a, b = (t.to(device) for t in problem[2:4])
    value = otkern.solve_sample(x, y, a, b, metric=metric, reg=reg, max_iter=60, backend=backend).value
    value.backward()
    degree = {"sqeuclidean": 2, "dot": 2, "euclidean": 1, "cosine": 0}[metric]
    along_scale = (x.grad * x).sum() + (y.grad * y).sum()
    # Euler: value(s x, s y, s^k reg) = s^k value(x, y, reg).
    assert along_scale.item() == pytest.approx(degree * (value - reg.grad * reg).item(), rel=1e-8, abs=1e-9)


def test_defect_6_a_second_derivative_raises_and_is_not_wrong(backend, device):
    def hessian_vector_product(solve, x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(solve(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    problem = positive(make_problem(9, 7))
    x, y, a, b = (t.to(device) for t in problem[:4])
    with pytest.raises(NotImplementedError, match="second derivatives"):
        hessian_vector_product(lambda x: otkern.solve_sample(x, y, a, b, reg=1.0, backend=backend).value, x)
    loss, seen = geomloss_sinkhorn()
    if seen:  # returns a number, which is wrong
        hessian_vector_product(lambda x: loss(problem.a, x, problem.b, problem.y), problem.x)


def test_defect_7_padding_and_batch_mates_do_not_change_a_value(backend, device):
    problem = positive(make_problem(17, 9))
    x, y, a, b = problem[:4]
    far = torch.cat([x, 50 + x[:3]]), torch.cat([a, a.new_zeros(3)])
    mate = torch.stack([x, 30 * x]), torch.stack([y, y]), torch.stack([a, a]), torch.stack([b, b])

    def check(alone, padded, beside):
        # One item's sums are over more zeros when padded with weights of 0: rounding, no more.
        assert padded == pytest.approx(alone, rel=1e-12)
        assert beside == pytest.approx(alone, rel=1e-12)

    def ours(x, y, a, b):
        x, y, a, b = (t.to(device) for t in (x, y, a, b))
        return otkern.solve_sample(x, y, a, b, reg=0.5, max_iter=10, backend=backend).value.flatten()[0].item()

    check(ours(x, y, a, b), ours(far[0], y, far[1], b), ours(*mate))
    loss, seen = geomloss_sinkhorn()
    if seen:
        theirs = [loss(a, x, b, y), loss(far[1], far[0], b, y), loss(mate[2], mate[0], mate[3], mate[1])[0]]
        with pytest.raises(AssertionError):
            check(*(t.item() for t in theirs))


def test_defect_7_identical_points_do_not_crash(backend, device):
    x = torch.full((5, 3), 0.7)

    def check(loss):
        assert float(loss(x)) == pytest.approx(0, abs=1e-6)

    check(lambda x: otkern.solve_sample(x.to(device), x.to(device), reg=0.1, max_iter=5, backend=backend).value)
    loss, seen = geomloss_sinkhorn()
    if seen:
        with pytest.raises(ValueError, match="Maximum allowed size"):
            check(lambda x: loss(x, x))


def test_defect_8_the_marginals_of_a_batch_are_those_of_its_plans(backend, device):
    problem = positive(make_problem(17, 9))
    cost, a, b = (torch.stack([t, t]) for t in (problem.cost, problem.a, problem.b))

    def check(marginal_a, marginal_b):
        assert marginal_a.shape == (2, 17)
        assert marginal_b.shape == (2, 9)
        torch.testing.assert_close(marginal_a.cpu(), a, rtol=0, atol=1e-4)
        torch.testing.assert_close(marginal_b.cpu(), b, rtol=0, atol=1e-4)

    result = otkern.solve_batch(cost.to(device), problem.reg, a.to(device), b.to(device), max_iter=60, backend=backend)
    check(result.marginal_a, result.marginal_b)
    if ot.__version__ == SEEN_IN_POT:
        theirs = ot.solve_batch(cost, problem.reg, a, b)
        fails_for_pot(check, theirs.marginal_a, theirs.marginal_b)


def test_defect_8_the_envelope_gradient_keeps_no_graph_of_the_iterations(backend, device):
    problem = positive(make_problem(17, 9))

    def kept(solve, iterations) -> int:
        numbers = []
        cost = problem.cost.repeat(2, 1, 1).to(device).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            solve(cost, iterations)
        return sum(numbers)

    def check(solve):
        assert kept(solve, 20) == kept(solve, 5)

    check(lambda cost, iterations: otkern.solve_batch(cost, problem.reg, max_iter=iterations, backend=backend))
    if device == "cpu":
        fails_for_pot(check, lambda cost, iterations: ot.solve_batch(cost, problem.reg, max_iter=iterations, tol=0))


def test_defect_8_half_precision_gives_no_nan(backend, device):
    cost = make_problem(17, 9).cost.repeat(2, 1, 1).half()
    reg = 0.01

    def check(value):
        assert torch.isfinite(value).all()

    check(otkern.solve_batch(cost.to(device), reg, max_iter=20, backend=backend).value)
    fails_for_pot(check, ot.solve_batch(cost, reg, max_iter=20).value)


@pytest.mark.parametrize("weights", ["nan", "negative", "not normalised"])
def test_defect_8_impossible_weights_do_not_pass_without_a_word(backend, device, weights):
    cost = make_problem(17, 9).cost.repeat(2, 1, 1)
    a, b = torch.full((2, 17), 1 / 17).double(), torch.full((2, 9), 1 / 9).double()
    a = {"nan": a * math.nan, "negative": a - 0.1, "not normalised": 3 * a}[weights]
    with pytest.raises(ValueError, match=r"^a "):
        otkern.solve_batch(cost.to(device), 0.5, a.to(device), b.to(device), check=True, backend=backend)
    if ot.__version__ == SEEN_IN_POT:
        ot.solve_batch(cost, 0.5, a, b, max_iter=5)  # without a word


def test_defect_9_a_warm_start_is_not_ignored(backend, device):
    problem = positive(make_problem(9, 7, reg=0.1))

    def check(cold, warm, exact):
        assert abs(warm - exact) < 1e-3 * abs(cold - exact)

    cold, exact = (solve_cost(problem, backend, device, max_iter=k) for k in (2, 150))
    warm = solve_cost(problem, backend, device, max_iter=2, potentials_init=exact.potentials)
    check(cold.value.item(), warm.value.item(), exact.value.item())
    if ot.__version__ == SEEN_IN_POT:
        arguments = (problem.cost, problem.a, problem.b, problem.reg)
        cold, exact = ot.solve(*arguments, max_iter=2), ot.solve(*arguments, max_iter=2000, tol=1e-12)
        warm = ot.solve(*arguments, max_iter=2, potentials_init=exact.potentials)
        fails_for_pot(check, cold.value.item(), warm.value.item(), exact.value.item())


@pytest.mark.parametrize("call", ["solve", "solve_sample", "solve_batch", "solve_sample_batch"])
def test_defect_9_potentials_have_one_unit(backend, device, call):
    problem = make_problem(9, 7)
    x, y, a, b = (t.to(device) for t in problem[:4])
    cost = problem.cost.to(device)
    options = {"max_iter": 20, "backend": backend}
    result = {
        "solve": lambda: otkern.solve(cost, a, b, reg=problem.reg, **options),
        "solve_sample": lambda: otkern.solve_sample(x, y, a, b, reg=problem.reg, **options),
        "solve_batch": lambda: otkern.solve_batch(cost[None], problem.reg, a[None], b[None], **options),
        "solve_sample_batch": lambda: otkern.solve_sample_batch(
            x[None], y[None], problem.reg, a[None], b[None], **options
        ),
    }[call]()
    f, g = (p.reshape(-1) for p in result.potentials)
    plan = a.unsqueeze(1) * b * ((f.unsqueeze(1) + g - cost) / problem.reg).exp()
    torch.testing.assert_close(result.plan.reshape(9, 7), plan, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_defect_10_weights_of_zero_give_finite_gradients(backend, device, metric, dtype):
    problem = make_problem(9, 7, metric=metric).to(dtype)
    assert (problem.a == 0).any()
    leaves = [t.to(device).clone().requires_grad_() for t in problem[:4]]
    otkern.solve_sample(*leaves, metric=metric, reg=0.01, max_iter=10, backend=backend).value.backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("norm", [1e3, 1e5])
def test_defect_11_padding_is_no_influence_at_a_small_reg_and_large_norms(backend, device, norm):
    # A log-weight of -1e5 for the padding is not far enough where costs over reg are larger.
    problem = make_problem(9, 7).to(torch.float32)
    x, y, a, b = (t.to(device) for t in problem[:4])
    options = {"reg": 1e-3, "max_iter": 10, "backend": backend}
    alone = otkern.solve_sample(norm * x, norm * y, a, b, **options)
    wide = [torch.zeros(1, 40, *t.shape[1:], device=device) for t in (x, y, a, b)]
    for padded, t in zip(wide, (norm * x, norm * y, a, b), strict=True):
        padded[0, : len(t)] = t
    beside = otkern.solve_sample(*wide, lengths_a=[9], lengths_b=[7], **options)
    assert torch.isfinite(alone.value)
    assert beside.value[0].equal(alone.value)
    assert beside.potential_a[0, :9].equal(alone.potential_a)


def test_defect_11_weights_that_are_far_from_uniform_converge(backend, device):
    problem = make_problem(9, 7)
    a = torch.tensor([0.9] + [0.1 / 8] * 8, dtype=torch.float64)
    b = torch.tensor([0.0, 0.001, 0.001, 0.003, 0.005, 0.01, 0.98], dtype=torch.float64)
    problem = problem._replace(a=a, b=b)
    result = solve_cost(problem, backend, device, max_iter=100, tol=1e-9)
    assert result.converged
    assert result.value.item() == pytest.approx(exact_value(problem, 500).item(), rel=1e-9)
