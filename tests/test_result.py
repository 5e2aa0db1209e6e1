"""What a result computes on demand, and that what is not differentiable says so."""

import pytest
import torch

import otkern
from tests.problems import METRICS, make_batch, make_problem, offsets, pad

SIZES = [(33, 16), (17, 9), (5, 4), (1, 3)]


@pytest.fixture(params=["padded", "packed"])
def batch(request, backend, device):
    """(problems, result) of a batch of different lengths, with NaN where there is padding."""
    problems = make_batch(SIZES, d=4, metric="euclidean")
    sides = [[p[i].to(device) for p in problems] for i in range(4)]
    options = {"metric": "euclidean", "reg": 0.3, "max_iter": 5, "backend": backend}
    if request.param == "padded":
        lengths = {f"lengths_{side}": [len(t) for t in sides[i]] for i, side in enumerate("ab")}
        return problems, otkern.solve_sample(*(pad(side, extra=0) for side in sides), **lengths, **options)
    packing = {f"cu_seqlens_{side}": offsets(sides[i]).to(device) for i, side in enumerate("ab")}
    return problems, otkern.solve_sample(*(torch.cat(side) for side in sides), **packing, **options)


def per_item(tensor: torch.Tensor, problems, side: str) -> list[torch.Tensor]:
    """The entries of each item, of a padded or a packed tensor."""
    sizes = [len(p.x if side == "a" else p.y) for p in problems]
    if tensor.shape[0] == sum(sizes):
        return list(tensor.split(sizes))
    return [tensor[i, :size] for i, size in enumerate(sizes)]


def test_the_plan_has_the_marginals_it_reports(batch):
    problems, result = batch
    plan = result.plan.cpu()
    assert plan.shape == (4, 33, 16)
    for i, problem in enumerate(problems):
        n, m = problem.cost.shape
        assert not plan[i, n:].any()
        assert not plan[i, :, m:].any()
        a = per_item(result.marginal_a.cpu(), problems, "a")[i]
        b = per_item(result.marginal_b.cpu(), problems, "b")[i]
        torch.testing.assert_close(a, plan[i, :n].sum(1), rtol=1e-13, atol=1e-16)
        torch.testing.assert_close(b, plan[i, :, :m].sum(0), rtol=1e-13, atol=1e-16)
        torch.testing.assert_close(b, problem.b, rtol=1e-12, atol=1e-16)  # exact after the second half
        assert (a - problem.a).abs().sum().item() == pytest.approx(result.marginal_error[i].item(), rel=1e-9, abs=1e-14)


def test_the_linear_value_is_the_cost_of_the_plan(batch):
    problems, result = batch
    for i, problem in enumerate(problems):
        n, m = problem.cost.shape
        expected = (result.plan[i, :n, :m].cpu() * problem.cost).sum()
        assert result.value_linear[i].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("columns", [None, 1, 3, 40])
def test_the_plan_operator_multiplies_by_the_plan(batch, device, columns):
    problems, result = batch
    shape = (result.potential_b.shape, result.potential_a.shape)
    generator = torch.Generator().manual_seed(0)
    for side, operator in (("b", result.plan_operator), ("a", result.plan_operator.T)):
        points = shape[0] if side == "b" else shape[1]
        v = torch.randn(*points, *(() if columns is None else (columns,)), generator=generator, dtype=torch.float64)
        out = operator @ v.to(device)
        out_side = "a" if side == "b" else "b"
        assert tuple(out.shape[: len(points)]) == tuple(shape[1] if side == "b" else shape[0])
        for i, (item_v, item_out) in enumerate(
            zip(per_item(v, problems, side), per_item(out.cpu(), problems, out_side), strict=True)
        ):
            n, m = problems[i].cost.shape
            plan = result.plan[i, :n, :m].cpu()
            expected = (plan if side == "b" else plan.mT) @ item_v
            torch.testing.assert_close(item_out, expected, rtol=1e-11, atol=1e-14)
    assert result.plan_operator.shape == (4, 33, 16)
    assert result.plan_operator.T.shape == (4, 16, 33)
    assert result.plan_operator.T.T.shape == (4, 33, 16)


def test_nan_in_the_padding_of_a_vector_does_not_matter(backend, device):
    problems = make_batch([(5, 4), (9, 7)])
    x, y = (pad([p[i].to(device) for p in problems]) for i in range(2))
    result = otkern.solve_sample(x, y, reg=0.3, lengths_a=[5, 9], lengths_b=[4, 7], max_iter=5, backend=backend)
    v = torch.ones(2, 8, dtype=torch.float64, device=device)
    expected = result.plan_operator @ v
    v[0, 4:], v[1, 7:] = float("nan"), float("inf")
    assert (result.plan_operator @ v).equal(expected)
    assert not expected[0, 5:].any()


def test_the_plan_operator_is_differentiable_in_its_vector(backend, device):
    problem = make_problem(9, 7)
    result = otkern.solve_sample(problem.x.to(device), problem.y.to(device), reg=0.3, max_iter=5, backend=backend)
    v = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device).requires_grad_()
    weight = torch.arange(18, dtype=torch.float64, device=device).reshape(9, 2)
    ((result.plan_operator @ v) * weight).sum().backward()
    torch.testing.assert_close(v.grad, result.plan.mT @ weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(4,), (9,), (7, 2, 1), (1, 7), ()])
def test_a_vector_of_the_wrong_shape_is_refused(backend, device, shape):
    problem = make_problem(9, 7)
    result = otkern.solve_sample(problem.x.to(device), problem.y.to(device), reg=0.3, max_iter=1, backend=backend)
    with pytest.raises(ValueError, match=r"^v must be a tensor of shape .*7.* but has shape"):
        _ = result.plan_operator @ torch.zeros(shape, device=device)
    with pytest.raises(ValueError, match=r"^v must be a tensor of shape .*9.* but was list"):
        _ = result.plan_operator.T @ [1.0]


def test_the_barycentric_map_is_the_mean_target_of_each_point(batch):
    problems, result = batch
    image = result.barycentric_map().cpu()
    for i, problem in enumerate(problems):
        n, m = problem.cost.shape
        plan = result.plan[i, :n, :m].cpu()
        mass = plan.sum(1, keepdim=True)
        expected = torch.where(mass > 0, plan @ problem.y / mass.clamp(min=1e-300), 0)
        torch.testing.assert_close(per_item(image, problems, "a")[i], expected, rtol=1e-11, atol=1e-13)
        assert not per_item(image, problems, "a")[i][problem.a == 0].any()


def test_the_barycentric_map_takes_other_targets_with_gradients(backend, device):
    problem = make_problem(9, 7)
    x, y, a, b = (t.to(device) for t in problem[:4])
    result = otkern.solve_sample(x, y, a, b, reg=0.3, max_iter=5, backend=backend)
    target = torch.eye(7, dtype=torch.float64, device=device, requires_grad=True)
    image = result.barycentric_map(target)
    rows = problem.a > 0
    torch.testing.assert_close(image[rows].sum(1), torch.ones_like(image[rows, 0]), rtol=1e-13, atol=0)
    image.sum().backward()
    expected = (result.plan[rows] / result.plan[rows].sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close(target.grad[:, 0], expected, rtol=1e-11, atol=1e-14)


def test_a_problem_of_costs_has_no_points_to_map_to(backend, device):
    result = otkern.solve(torch.zeros(3, 2, device=device), reg=0.3, max_iter=1, backend=backend)
    with pytest.raises(ValueError, match=r"^target must be given"):
        result.barycentric_map()
    assert result.barycentric_map(torch.ones(2, 4, device=device)).shape == (3, 4)


@pytest.mark.parametrize("method", ["mutual", "argmax", "itermax", "threshold"])
def test_matches_are_those_of_the_plan(batch, method):
    problems, result = batch
    links = result.match(method)
    assert links.dtype == torch.bool
    for i, problem in enumerate(problems):
        n, m = problem.cost.shape
        assert links[i, :n, :m].equal(otkern.alignment.match(result.plan[i, :n, :m], method))
        assert not links[i, n:].any()
        assert not links[i, :, m:].any()


def test_what_is_computed_on_demand_does_not_feel_its_batch(batch, backend, device):
    problems, result = batch
    for i, problem in enumerate(problems):
        alone = otkern.solve_sample(
            *(t.to(device) for t in problem[:4]), metric="euclidean", reg=0.3, max_iter=5, backend=backend
        )
        n, m = problem.cost.shape
        assert result.plan[i, :n, :m].equal(alone.plan)
        assert per_item(result.marginal_a, problems, "a")[i].equal(alone.marginal_a)
        assert per_item(result.marginal_b, problems, "b")[i].equal(alone.marginal_b)
        assert per_item(result.barycentric_map(), problems, "a")[i].equal(alone.barycentric_map())
        assert result.value_linear[i].equal(alone.value_linear)


def problem_with_gradient(backend, device):
    x, y, a, b = (t.to(device) for t in make_problem(5, 4)[:4])
    return otkern.solve_sample(x.clone().requires_grad_(), y, a, b, reg=0.3, max_iter=5, backend=backend)


DIFFERENTIABLE = {
    "plan": lambda result: result.plan,
    "potential_a": lambda result: result.potential_a,
    "potential_b": lambda result: result.potential_b,
    "potentials": lambda result: result.potentials[1],
    "marginal_a": lambda result: result.marginal_a,
    "marginal_b": lambda result: result.marginal_b,
    "value_linear": lambda result: result.value_linear,
    "plan_operator": lambda result: result.plan_operator @ torch.ones_like(result.potential_b),
    "plan_operator.T": lambda result: result.plan_operator.T @ torch.ones_like(result.potential_a),
    "barycentric_map": lambda result: result.barycentric_map(),
}


def gradient_of(result, output) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(output.square().sum(), result._inputs.x_a)
    return gradient


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_every_output_has_a_gradient_and_never_a_silent_zero(backend, device, name):
    result = problem_with_gradient(backend, device)
    gradient = gradient_of(result, DIFFERENTIABLE[name](result))
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["plan", "marginal_a", "plan_operator"])
def test_an_output_that_was_read_without_gradients_still_has_one_later(backend, device, name):
    result = problem_with_gradient(backend, device)
    expected = gradient_of(result, DIFFERENTIABLE[name](result))
    result = problem_with_gradient(backend, device)
    with torch.no_grad():
        result.match()
        assert not DIFFERENTIABLE[name](result).requires_grad
    assert gradient_of(result, DIFFERENTIABLE[name](result)).equal(expected)


def test_a_gradient_adds_up_over_outputs(backend, device):
    def x_of(result):
        return result._inputs.x_a

    result = problem_with_gradient(backend, device)
    of_both = torch.autograd.grad(result.value.sum() + result.plan.square().sum(), x_of(result))[0]
    other = problem_with_gradient(backend, device)
    of_value = torch.autograd.grad(other.value.sum(), x_of(other), retain_graph=True)[0]
    of_plan = torch.autograd.grad(other.plan.square().sum(), x_of(other))[0]
    torch.testing.assert_close(of_both, of_value + of_plan, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_of_what_is_not_the_value_raises(backend, device, name):
    result = problem_with_gradient(backend, device)
    output = DIFFERENTIABLE[name](result)
    with pytest.raises(NotImplementedError, match="not differentiable again"):
        torch.autograd.grad(output.square().sum(), result._inputs.x_a, create_graph=True)


def test_diagnostics_carry_no_gradient(backend, device):
    result = problem_with_gradient(backend, device)
    assert result.value.requires_grad
    for tensor in (result.marginal_error, result.n_iters, result.converged, result.match()):
        assert not tensor.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_in_the_dtype_of_the_arithmetic(backend, device, dtype):
    problem = make_problem(5, 4).to(dtype)
    result = otkern.solve_sample(*(t.to(device) for t in problem[:4]), reg=0.3, max_iter=2, backend=backend)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("value", "value_linear", "plan", "potential_a", "marginal_a", "marginal_error"):
        assert getattr(result, name).dtype == expected, name
    assert result.n_iters.dtype == torch.int32
    assert result.converged.dtype == torch.bool
    assert (result.plan_operator @ torch.ones(4, device=device, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("metric", METRICS)
def test_entropy_as_regulariser_has_the_same_plan_and_another_value(backend, device, metric):
    problem = make_problem(9, 7, metric=metric)
    x, y, a, b = (t.to(device) for t in problem[:4])
    options = {"metric": metric, "reg": problem.reg, "max_iter": 80, "backend": backend}
    kl, entropy = (otkern.solve_sample(x, y, a, b, reg_type=kind, **options) for kind in ("KL", "entropy"))
    assert kl.plan.equal(entropy.plan)
    plan = entropy.plan.cpu()
    expected = (plan * problem.cost).sum() + problem.reg * torch.special.xlogy(plan, plan).sum()
    assert entropy.value.item() == pytest.approx(expected.item(), rel=1e-8)


def test_a_result_says_what_it_is():
    result = otkern.solve(torch.zeros(2, 5, 4), reg=0.3, max_iter=1, backend="reference")
    assert repr(result) == "OTResult(batch=2, max_a=5, max_b=4, backend='reference')"


def test_changing_the_inputs_afterwards_is_the_callers_affair_but_the_value_stays(backend, device):
    problem = make_problem(5, 4)
    x, y = problem.x.to(device, copy=True), problem.y.to(device)
    result = otkern.solve_sample(x, y, reg=0.3, max_iter=5, backend=backend)
    before = result.value.clone()
    x.zero_()
    assert result.value.equal(before)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "dot"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_plan_is_that_of_the_potentials(backend, device, metric, layout):
    """At a small reg the plan feels the last bits of the cost, which must be the ones that the solve saw."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(2, size, 768, generator=generator) / 2 + 0.3 for size in (9, 6))
    lengths_a, lengths_b = [9, 5], [4, 6]
    if layout == "packed":
        x, y = (torch.cat([t[i, :n] for i, n in enumerate(ns)]) for t, ns in ((x, lengths_a), (y, lengths_b)))
        sizes = {"cu_seqlens_a": [0, 9, 14], "cu_seqlens_b": [0, 4, 10]}
    else:
        sizes = {"lengths_a": lengths_a, "lengths_b": lengths_b}
    reg = {"sqeuclidean": 2.5, "euclidean": 0.05, "cosine": 0.0025, "dot": 1.0}[metric]
    result = otkern.solve_sample(
        x.to(device), y.to(device), metric=metric, reg=reg, max_iter=20, backend=backend, **sizes
    )
    plan = result.plan.cpu()
    # Two roundings of the largest cost.
    largest = {"sqeuclidean": 450, "euclidean": 21, "cosine": 1.3, "dot": 90}[metric]
    tolerance = 2 * torch.finfo(torch.float32).eps * largest / reg
    for i, (n, m) in enumerate(zip(lengths_a, lengths_b, strict=True)):
        assert plan[i, n:].eq(0).all() and plan[i, :, m:].eq(0).all()
        # A column half came last: the columns are exact, and the rows as far off as marginal_error says.
        assert (plan[i, :n, :m].sum(0) * m - 1).abs().max() < tolerance
        gap = (plan[i, :n, :m].sum(1) - 1 / n).abs().sum()
        assert abs(float(gap - result.marginal_error[i].cpu())) < tolerance


def test_a_result_refuses_tensors_that_were_changed_since(backend, device):
    x, y = torch.randn(5, 3, device=device, requires_grad=True), torch.randn(6, 3, device=device)
    result = otkern.solve_sample(x, y, reg=0.5, backend=backend)
    result.value.backward()
    before = otkern.solve_sample(x, y, reg=0.5, grad="detach", backend=backend)
    plan = before.plan
    torch.optim.SGD([x], 0.1).step()
    for use in (lambda: result.plan, lambda: result.marginal_a, lambda: result.barycentric_map(), result.match):
        with pytest.raises(RuntimeError, match="X_a must be unchanged"):
            use()
    assert before.plan.equal(plan)
    result = otkern.solve_sample(x, y, reg=0.5, grad="detach", backend=backend)
    result.potential_a.zero_()
    with pytest.raises(RuntimeError, match="potential_a must be unchanged"):
        _ = result.plan


def test_a_barycentric_map_takes_one_number_a_point_and_names_its_argument(backend, device):
    cost = torch.rand(2, 3, 4, device=device)
    result = otkern.solve(cost, reg=0.1, backend=backend)
    numbers = torch.randn(2, 4, device=device)
    assert torch.equal(result.barycentric_map(numbers), result.barycentric_map(numbers.unsqueeze(-1)).squeeze(-1))
    single = otkern.solve(cost[0], reg=0.1, backend=backend)
    assert single.barycentric_map(torch.ones(4, device=device)).allclose(torch.ones(3, device=device))
    with pytest.raises(ValueError, match="target must be a tensor of shape"):
        result.barycentric_map(torch.randn(2, 5, device=device))


def test_a_gradient_with_respect_to_what_the_plan_multiplies_passes(backend, device):
    x = torch.randn(5, 3, device=device, requires_grad=True)
    result = otkern.solve_sample(x, torch.randn(6, 3, device=device), reg=0.5, backend=backend)
    v = torch.randn(6, 2, device=device, requires_grad=True)
    (dv,) = torch.autograd.grad((result.plan_operator @ v).sum(), v)
    assert dv.allclose(result.plan.detach().sum(0)[:, None].expand(6, 2), atol=1e-6)
    (dv,) = torch.autograd.grad(result.barycentric_map(v).sum(), v)
    assert dv.isfinite().all()
    dx, dv = torch.autograd.grad((result.plan_operator @ v).square().sum(), (x, v))
    assert dx.abs().sum() > 0 and dv.abs().sum() > 0
