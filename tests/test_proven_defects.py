"""Defects of peers, each as a check that otkern passes and that would have caught theirs.

A check is a function of an answer. otkern's answer must pass it, and the peer's must not:
otherwise it would catch nothing. A release of the peer's that passes is named in a warning: the defect is repaired
there, and its test stays as ours. The numbers are those of the list that the defects were proven in.
"""

import math
import warnings

import pytest
import torch

import otkern
from tests.calls import solve_cost
from tests.problems import (
    METRICS,
    Problem,
    exact_value,
    make_problem,
    make_weights,
    positive,
    relative_error,
)
from tests.relaxed import by_convex_solver, make_relaxed, objective


def caught(package, check, *answer) -> None:
    """The check fails for the peer, or its release is named as one that has repaired the defect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the peer says of itself
        try:
            check(*answer)
        except AssertionError:
            return
    warnings.warn(f"{package.__name__} {package.__version__} passes: the defect is repaired there", stacklevel=2)


@pytest.fixture
def pot():
    return pytest.importorskip("ot", reason="POT is not installed")


@pytest.fixture
def geomloss():
    return pytest.importorskip("geomloss", reason="geomloss is not installed")


def geomloss_sinkhorn(geomloss, **options):
    """GeomLoss's loss on half the squared distance."""
    options = {"p": 2, "blur": 0.3, "debias": False, "backend": "tensorized"} | options
    return geomloss.SamplesLoss("sinkhorn", **options)


def test_defect_1_a_batch_with_the_defaults_is_not_the_product_coupling(backend, device, pot):
    problem = make_problem(17, 9)
    cost = problem.cost.repeat(2, 1, 1)
    exact = pot.emd2([], [], problem.cost.numpy())

    def check(value_linear):
        assert value_linear.tolist() == pytest.approx([exact] * 2, rel=0.25)

    reg = 0.1 * float(cost.mean())
    check(otkern.solve_batch(cost.to(device), reg, max_iter=30, backend=backend).value_linear)
    caught(pot, check, pot.solve_batch(cost).value_linear)


def gradients_of(solve, problem: Problem) -> list[torch.Tensor]:
    """With respect to cost, a and b; the weights' along directions that keep the mass."""
    leaves = [t.clone().requires_grad_() for t in (problem.cost, problem.a, problem.b)]
    solve(*leaves).value.backward()
    cost, a, b = (leaf.grad for leaf in leaves)
    return [cost, a - a.mean(), b - b.mean()]


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_defects_2_and_3_gradients_of_the_value_are_those_of_the_converged_value(backend, device, reg_type, grad, pot):
    problem = positive(make_problem(17, 9))
    options = {"reg": problem.reg, "reg_type": reg_type}

    def theirs(grad):
        return gradients_of(lambda *leaves: pot.solve(*leaves, grad=grad, tol=1e-11, max_iter=2000, **options), problem)

    expected = theirs("autodiff")  # right, at the price of the whole graph

    def check(gradients):
        assert all(relative_error(g, e) < 1e-6 for g, e in zip(gradients, expected, strict=True))

    def ours(*leaves):
        return otkern.solve(*(t.to(device) for t in leaves), max_iter=100, grad=grad, backend=backend, **options)

    check(gradients_of(ours, problem))
    caught(pot, check, theirs("last_step"))
    if reg_type == "KL":
        caught(pot, check, theirs("envelope"))


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


def test_defect_4_the_gradient_of_the_cost_is_the_plan(backend, device, geomloss):
    # It sums to the mass, 1.
    problem = positive(make_problem(9, 7))

    def check(solve):
        cost = problem.cost.to(device).requires_grad_()
        solve(cost, problem.a.to(device), problem.b.to(device)).value.sum().backward()
        assert cost.grad.sum().item() == pytest.approx(1, rel=1e-3)

    check(lambda cost, a, b: otkern.solve(cost, a, b, reg=problem.reg, backend=backend))
    solvers = pytest.importorskip("geomloss.ot", reason="this release of geomloss has no solve")
    caught(geomloss, check, lambda cost, a, b: solvers.solve(cost, a=a, b=b, reg=problem.reg, max_iter=100))


def test_defect_5_the_unbalanced_gradient_is_that_of_differences(backend, device, geomloss):
    # Theirs is short by a factor (rho + eps / 2) / (rho + eps), rho = reach² and eps = blur².
    problem = positive(make_relaxed(9, 7))
    blur, reach = 0.7, 1.1
    # Our cost is twice theirs, and so are reg and rho.
    options = {"reg": 2 * blur**2, "unbalanced": 2 * reach**2, "max_iter": 120}
    y, a, b = (t.to(device) for t in problem[1:4])

    def ours(x):
        return otkern.solve_sample(x, y, a, b, **options, backend=backend).value / 2

    direction = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    x, step = problem.x.to(device), 1e-6
    slope = ((ours(x + step * direction) - ours(x - step * direction)) / (2 * step)).item()

    def check(loss, to):
        leaf = x.to(to).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        assert (gradient * direction.to(to)).sum().item() == pytest.approx(slope, rel=1e-2)

    check(ours, device)
    loss = geomloss_sinkhorn(geomloss, blur=blur, reach=reach, scaling=0.99)
    caught(geomloss, check, lambda x: loss(problem.a, x, problem.b, problem.y), "cpu")


def hessian_vector_product(value, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(x), x, create_graph=True)
    (product,) = torch.autograd.grad((first * v).sum(), x)
    return product


def test_defect_6_hessian_vector_products_are_those_of_differenced_gradients(backend, device, pot, geomloss):
    problem = positive(make_problem(9, 7))
    blur = 0.7
    x, y, a, b = problem[:4]
    v = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def ours(x):
        x, *rest = (t.to(device) for t in (x, y, a, b))
        return otkern.solve_sample(x, *rest, reg=2 * blur**2, max_iter=100, backend=backend).value.cpu() / 2

    def gradient(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(ours(leaf), leaf)[0]

    step = 1e-5
    expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)

    def check(value):
        assert relative_error(hessian_vector_product(value, x, v), expected) < 1e-2

    check(ours)
    loss = geomloss_sinkhorn(geomloss, blur=blur, scaling=0.99)
    caught(geomloss, check, lambda x: loss(a, x, b, y))

    def envelope_of_pot(x):
        cost = (x.unsqueeze(1) - y).square().sum(2) / 2
        # The gradient that it sets is a constant; a graph must exist for it to be differentiated at all.
        return pot.solve(cost, a, b, blur**2, grad="envelope", tol=1e-11, max_iter=2000).value

    caught(pot, check, envelope_of_pot)


def test_defect_7_padding_and_batch_mates_do_not_change_a_value(backend, device, geomloss):
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
    loss = geomloss_sinkhorn(geomloss)
    theirs = [loss(a, x, b, y), loss(far[1], far[0], b, y), loss(mate[2], mate[0], mate[3], mate[1])[0]]
    caught(geomloss, check, *(t.item() for t in theirs))


def test_defect_7_identical_points_do_not_crash(backend, device, geomloss):
    x = torch.full((5, 3), 0.7)

    def check(loss):
        try:
            value = float(loss(x))
        except ValueError as error:
            raise AssertionError("crashed") from error
        assert value == pytest.approx(0, abs=1e-6)

    check(lambda x: otkern.solve_sample(x.to(device), x.to(device), reg=0.1, max_iter=5, backend=backend).value)
    loss = geomloss_sinkhorn(geomloss)
    caught(geomloss, check, lambda x: loss(x, x))


def test_defect_8_the_marginals_of_a_batch_are_those_of_its_plans(backend, device, pot):
    problem = positive(make_problem(17, 9))
    cost, a, b = (torch.stack([t, t]) for t in (problem.cost, problem.a, problem.b))

    def check(marginal_a, marginal_b):
        assert marginal_a.shape == (2, 17)
        assert marginal_b.shape == (2, 9)
        torch.testing.assert_close(marginal_a.cpu(), a, rtol=0, atol=1e-4)
        torch.testing.assert_close(marginal_b.cpu(), b, rtol=0, atol=1e-4)

    result = otkern.solve_batch(cost.to(device), problem.reg, a.to(device), b.to(device), max_iter=60, backend=backend)
    check(result.marginal_a, result.marginal_b)
    theirs = pot.solve_batch(cost, problem.reg, a, b)
    caught(pot, check, theirs.marginal_a, theirs.marginal_b)


def test_defect_8_the_envelope_gradient_keeps_no_graph_of_the_iterations(backend, device, pot):
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
        caught(pot, check, lambda cost, iterations: pot.solve_batch(cost, problem.reg, max_iter=iterations, tol=0))


def test_defect_8_one_hard_item_does_not_hold_up_the_others(backend, device, pot):
    problems = [positive(make_problem(9, 7, seed=seed)) for seed in range(4)]
    cost = torch.stack([p.cost for p in problems])
    cost[1] *= 40

    def check(iterations, alone):
        assert iterations == pytest.approx(alone, rel=0.5, abs=2)

    def ours(cost) -> list[int]:
        return otkern.solve_batch(cost.to(device), 0.5, max_iter=300, tol=1e-6, backend=backend).n_iters.tolist()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hard one need not converge
        alone, together = [ours(c.unsqueeze(0))[0] for c in cost], ours(cost)
        assert together == alone
        check(together[0], alone[0])

    def iterations_of(cost) -> int:
        # One number for the batch: the least maximum that leaves its plans as they are.
        final = pot.solve_batch(cost, 0.5, max_iter=3000, tol=1e-6).plan
        counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        return next(k for k in counts if pot.solve_batch(cost, 0.5, max_iter=k, tol=1e-6).plan.equal(final))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        caught(pot, check, iterations_of(cost), iterations_of(cost[:1]))


def test_defect_8_half_precision_gives_no_nan(backend, device, pot):
    cost = make_problem(17, 9).cost.repeat(2, 1, 1).half()
    reg = 0.01

    def check(value):
        assert torch.isfinite(value).all()

    check(otkern.solve_batch(cost.to(device), reg, max_iter=20, backend=backend).value)
    caught(pot, check, pot.solve_batch(cost, reg, max_iter=20).value)


@pytest.mark.parametrize("weights", ["nan", "negative", "not normalised"])
def test_defect_8_impossible_weights_do_not_pass_without_a_word(backend, device, weights, pot):
    cost = make_problem(17, 9).cost.repeat(2, 1, 1)
    a, b = torch.full((2, 17), 1 / 17).double(), torch.full((2, 9), 1 / 9).double()
    a = {"nan": a * math.nan, "negative": a - 0.1, "not normalised": 3 * a}[weights]

    def check(solve):
        with pytest.raises(ValueError, match=r"^a "):
            solve()

    check(lambda: otkern.solve_batch(cost.to(device), 0.5, a.to(device), b.to(device), check=True, backend=backend))

    def silent():
        try:
            check(lambda: pot.solve_batch(cost, 0.5, a, b, max_iter=5))
        except pytest.fail.Exception as error:
            raise AssertionError("nothing was raised") from error

    caught(pot, silent)


def test_defect_8_a_marginal_error_does_not_pass_without_a_word(backend, device, pot):
    problem = positive(make_problem(17, 9, reg=0.02))

    def check(solve):
        with pytest.warns(UserWarning, match="converge"):
            solve()

    def ours():
        cost = problem.cost.to(device)
        result = otkern.solve_batch(cost[None], problem.reg, max_iter=5, tol=1e-6, backend=backend)
        assert not result.converged.any()
        assert result.marginal_error.item() > 0.05

    check(ours)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pot.solve_batch(problem.cost[None], problem.reg, max_iter=5, tol=1e-6)

    def silent():
        assert any("converge" in str(warning.message) for warning in said)

    caught(pot, silent)


def test_defect_9_a_warm_start_is_not_ignored(backend, device, pot):
    problem = positive(make_problem(9, 7, reg=0.1))

    def check(cold, warm, exact):
        assert abs(warm - exact) < 1e-3 * abs(cold - exact)

    cold, exact = (solve_cost(problem, backend, device, max_iter=k) for k in (2, 150))
    warm = solve_cost(problem, backend, device, max_iter=2, potentials_init=exact.potentials)
    check(cold.value.item(), warm.value.item(), exact.value.item())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = (problem.cost, problem.a, problem.b, problem.reg)
        cold, exact = pot.solve(*arguments, max_iter=2), pot.solve(*arguments, max_iter=2000, tol=1e-12)
        warm = pot.solve(*arguments, max_iter=2, potentials_init=exact.potentials)
    caught(pot, check, cold.value.item(), warm.value.item(), exact.value.item())


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


def test_defect_9_potentials_of_a_relaxed_problem_have_the_same_unit(backend, device):
    problem = make_relaxed(9, 7)
    cost, a, b = (t.to(device) for t in (problem.cost, problem.a, problem.b))
    for options in ({"unbalanced": 0.5}, {"mass": 0.5}, {"null_cost": 0.3}):
        for reg_type in ("KL", "entropy"):
            result = solve_cost(problem, backend, device, reg_type=reg_type, max_iter=20, **options)
            f, g = result.potentials
            plan = a.unsqueeze(1) * b * ((f.unsqueeze(1) + g - cost) / problem.reg).exp()
            torch.testing.assert_close(result.plan, plan, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_defect_10_weights_of_zero_give_finite_gradients(backend, device, metric, dtype):
    problem = make_problem(9, 7, metric=metric).to(dtype)
    assert (problem.a == 0).any()
    leaves = [t.to(device).clone().requires_grad_() for t in problem[:4]]
    otkern.solve_sample(*leaves, metric=metric, reg=0.01, max_iter=10, backend=backend).value.backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_defect_10_a_weight_of_zero_has_the_derivative_of_gaining_some(backend, device):
    problem = make_problem(9, 7)

    def check(gradient):
        assert torch.isfinite(gradient).all()

    a = problem.a.to(device).clone().requires_grad_()
    cost, b = problem.cost.to(device), problem.b.to(device)
    result = otkern.solve(cost, a, b, reg=problem.reg, max_iter=80, backend=backend)
    for output in (result.value, result.plan.square().sum(), result.potential_a.sum()):
        (gradient,) = torch.autograd.grad(output, a)
        check(gradient)
    jax = pytest.importorskip("jax", reason="jax, for OTT-JAX, is not installed")
    ott = pytest.importorskip("ott", reason="OTT-JAX is not installed")
    geometry = pytest.importorskip("ott.geometry.geometry")
    linear = pytest.importorskip("ott.problems.linear.linear_problem")
    solvers = pytest.importorskip("ott.solvers.linear.sinkhorn")

    def value(a):
        problem_of_ott = linear.LinearProblem(
            geometry.Geometry(jax.numpy.array(problem.cost.numpy()), epsilon=problem.reg),
            a,
            jax.numpy.array(problem.b.numpy()),
        )
        return solvers.Sinkhorn()(problem_of_ott).reg_ot_cost

    gradient = jax.grad(value)(jax.numpy.array(problem.a.numpy()))
    caught(ott, check, torch.tensor(gradient.tolist()))


@pytest.mark.parametrize("norm", [1e3, 1e5])
def test_defect_11_padding_is_no_influence_at_a_small_reg_and_large_norms(backend, device, norm):
    # A log-weight of -1e5 for the padding, as in flash-sinkhorn, is not far enough where costs over reg are larger. It
    # needs CUDA, so only our half runs.
    problem = make_problem(9, 7).to(torch.float32)
    x, y, a, b = (t.to(device) for t in problem[:4])
    for relaxation in ({}, {"unbalanced": 1e3}, {"null_cost": 1e3}, {"mass": 0.5}):
        options = {"reg": 1e-3, "max_iter": 10, "backend": backend} | relaxation
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


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_defect_12_the_unbalanced_value_is_its_objective(backend, device, reg_type, pot):
    problem = positive(make_relaxed(5, 4))
    relaxation = {"unbalanced": 0.5, "reg_type": reg_type}
    optimum = by_convex_solver(problem.cost, problem.a, problem.b, problem.reg, relaxation).value

    def check(value, plan):
        of_plan = objective(plan, problem.cost, problem.a, problem.b, problem.reg, relaxation)
        assert value == pytest.approx(of_plan.item(), rel=1e-6)
        assert value == pytest.approx(optimum, rel=1e-6)

    result = solve_cost(problem, backend, device, **relaxation)
    check(result.value.item(), result.plan.cpu())
    theirs = pot.solve(
        problem.cost, problem.a, problem.b, problem.reg,
        reg_type=reg_type, unbalanced=0.5, tol=1e-11, max_iter=5000, grad="detach",
    )  # fmt: skip
    caught(pot, check, theirs.value.item(), theirs.plan)


def test_defect_13_every_fixture_has_what_lets_wrong_code_through():
    for make in (make_problem, make_relaxed):
        problem = make(9, 7)
        for weights in (problem.a, problem.b):
            assert (weights == 0).any()
            assert len(weights.unique()) > 3
        assert len(problem.x) != len(problem.y)
        assert problem.x[0].equal(problem.x[1])
        assert (torch.cdist(problem.x, problem.y) == 0).any()
    relaxed = make_relaxed(9, 7)
    assert abs(relaxed.a.sum() - relaxed.b.sum()) > 0.1
    assert (make_weights(5, torch.Generator()) == 0).any()
