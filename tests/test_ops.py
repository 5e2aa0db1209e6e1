"""The torch.library ops under PyTorch's own machinery: opcheck, compile, export, autocast, checkpoint, derivatives."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import otkern
from otkern import debiasing, ops
from otkern.arguments import read_costs, read_points, read_relaxation


def points(batch=2, n=5, m=4, d=3, dtype=torch.float32, requires_grad=True, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, n, d), (batch, m, d))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_(requires_grad) for s in shapes]


def weights(batch, n, m, device):
    """Non-uniform, with a zero on each side."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(batch, size, generator=generator) for size in (n, m))
    a[:, 1], b[:, 0] = 0, 0
    return [(w / w.sum(1, keepdim=True)).to(device).requires_grad_() for w in (a, b)]


def padded_problem(device):
    x, y = points(device=device)
    a = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.0, 0.4]], device=device).requires_grad_()
    b = torch.tensor([[0.25, 0.75, 0.0, 0.0], [0.0, 0.5, 0.25, 0.25]], device=device).requires_grad_()
    reg = torch.tensor([0.5, 0.7], device=device).requires_grad_()
    return read_points(x, y, a, b, reg, "cosine", [3, 5], [2, 4], None, None, None, None)[0]


def packed_problem(device):
    x, y = points(device=device)
    return read_points(x[0], y[0], None, None, 0.5, "euclidean", None, None, [0, 2, 5], [0, 3, 4], 3, 3)[0]


def cost_problem(device):
    cost = points(n=4, m=4, d=5, device=device)[0]
    a, b = weights(2, 4, 5, device)
    return read_costs(cost, a, b, 0.5, None, None)[0]


def one_sided_problem(device):
    rho = torch.tensor([0.5, 2.0], device=device).requires_grad_()
    return read_relaxation(cost_problem(device), (rho, float("inf")), None, None, entropy=True)


def partial_problem(device):
    return read_relaxation(padded_problem(device), None, 0.6, None, entropy=False)


def null_problem(device):
    return read_relaxation(packed_problem(device), None, None, 0.8, entropy=False)


def debiased_problem(device):
    """Pairs, and clouds with themselves."""
    return debiasing.stacked(padded_problem(device))


PROBLEMS = (
    *(padded_problem, packed_problem, cost_problem, debiased_problem),
    *(one_sided_problem, partial_problem, null_problem),
)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_solve_keeps_the_contract_of_torch_library(problem, backend, device):
    arguments = (*problem(device), *ops.Iterations(max_iter=3), 1e-5, 100, False, backend)
    opcheck(torch.ops.otkern.sinkhorn.default, arguments)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_other_ops_keep_the_contract_of_torch_library(problem, backend, device):
    inputs = problem(device).detach()
    value, f, g, *_ = ops.sinkhorn(inputs, ops.Iterations(max_iter=3), ops.Differentiation(), False, backend)
    is_points = inputs.cost is None
    needs = [is_points, is_points, not is_points, True, True]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")

    def check(op, *arguments):
        opcheck(op.default, (*inputs, *arguments, backend), test_utils=tests)

    check(torch.ops.otkern.sinkhorn_backward, f, g, torch.ones_like(value), needs)
    dense = torch.ones(inputs.batch, inputs.max_a, inputs.max_b, device=device)
    check(torch.ops.otkern.plan_backward, f, g, value, value, dense, f, g, needs)
    check(torch.ops.otkern.implicit, f, g, None, None, None, None, f, g, inputs.kind == "balanced", 1e-5, 20)
    v = torch.ones((*g.shape, 2), device=device, requires_grad=True)
    opcheck(torch.ops.otkern.apply_plan.default, (*inputs, f, g, v, False, False, backend))
    opcheck(torch.ops.otkern.plan.default, (*inputs, f, g, backend))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_adjoint_of_the_iterations_keeps_the_contract_of_torch_library(problem):
    # Kept by the reference alone.
    inputs = problem("cpu").detach()
    iterations = ops.Iterations(max_iter=3)
    _, f, g, multipliers, *_ = ops.sinkhorn(inputs, iterations, ops.Differentiation(), False, "reference")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*inputs, *iterations, f, g, multipliers, "reference")
    opcheck(torch.ops.otkern.unrolled.default, arguments, test_utils=tests)


def test_compiles_into_one_graph_without_recompiling_for_new_lengths(backend, device):
    def step(x, y, lengths):
        result = otkern.solve_sample(
            x, y, metric="cosine", reg=0.3, lengths_a=lengths, backend=backend, max_iter=5, tol=1e-3
        )
        return result.value.sum(), result.n_iters, result.converged

    torch._dynamo.reset()  # another backend in the same process is another graph
    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 3], [1, 4], [2, 2]):
            lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
            grads = []
            for function in (step, compiled):
                x, y = points(device=device)
                value, n_iters, converged = function(x, y, lengths)
                value.backward()
                grads.append((value.detach(), n_iters, converged, x.grad, y.grad))
            for eager, traced in zip(*grads, strict=True):
                assert torch.equal(eager, traced)


def test_compiles_with_weights_plan_and_costs(backend, device):
    def step(M, a, b, v):
        result = otkern.solve(M, a, b, reg=0.5, max_iter=4, backend=backend, grad="detach")
        return result.value, result.plan_operator.apply(v), result.marginal_a, result.value_linear

    M = points(n=4, m=4, d=5, device=device)[0].detach()
    a, b = (w.detach() for w in weights(2, 4, 5, device))
    v = torch.ones(2, 5, 3, device=device)
    for eager, traced in zip(step(M, a, b, v), torch.compile(step, fullgraph=True)(M, a, b, v), strict=True):
        assert torch.equal(eager, traced)


def test_exports(backend, device):
    x, y = points(requires_grad=False, device=device)
    loss = otkern.SinkhornLoss(metric="sqeuclidean", reg=0.5, max_iter=5, backend=backend)
    program = torch.export.export(loss, (x, y))
    assert torch.equal(program.module()(x, y), loss(x, y))


def test_autocast_changes_nothing(backend, device):
    results = []
    for enabled in (False, True):
        x, y = points(device=device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            result = otkern.solve_sample(x, y, metric="dot", reg=0.5, max_iter=5, backend=backend)
            marginal = result.marginal_a
        result.value.sum().backward()
        results.append((result.value.detach(), marginal.detach(), x.grad))
    for plain, autocast in zip(*results, strict=True):
        assert autocast.dtype == torch.float32
        assert torch.equal(plain, autocast)


def test_checkpointing_gives_the_same_gradient(backend, device):
    def value(x, y):
        return otkern.solve_sample(x, y, reg=0.5, max_iter=4, backend=backend).value.sum()

    grads = []
    for function in (value, lambda x, y: checkpoint(value, x, y, use_reentrant=False)):
        x, y = points(device=device)
        function(x, y).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_third_derivative_raises(backend, device):
    x, y = points(device=device)
    value = otkern.solve_sample(x, y, reg=0.5, max_iter=40, backend=backend).value.sum()
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(dx.square().sum(), x, create_graph=True)


def test_forward_mode_raises_instead_of_dropping_the_tangent(backend, device):
    x, y = points(requires_grad=False, device=device)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        otkern.solve_sample(torch.autograd.forward_ad.make_dual(x, x), y, reg=0.5, backend=backend)


def test_vmap_over_unbatched_problems_equals_the_batch(backend, device):
    x, y = points(requires_grad=False, device=device)

    def value(x, y):
        return otkern.solve_sample(x, y, reg=0.5, max_iter=4, backend=backend, check=False).value

    assert torch.equal(torch.vmap(value)(x, y), value(x, y))


def test_a_batch_of_cotangents_gives_each_its_gradient(backend, device):
    x, y = points(device=device)
    values = otkern.solve_sample(x, y, reg=0.5, backend=backend).value
    each = torch.eye(len(values), device=device)
    together = torch.autograd.grad(values, (x, y), each, retain_graph=True, is_grads_batched=True)
    for k, cotangent in enumerate(each):
        alone = torch.autograd.grad(values, (x, y), cotangent, retain_graph=True)
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[k], want)


def test_a_tensor_that_is_to_be_negated_is_read_as_such(backend, device):
    x, y = points(requires_grad=False, device=device)
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, x)
    for first, second in ((lazy, y), (y, lazy)):
        expected = otkern.solve_sample(first.resolve_neg(), second.resolve_neg(), reg=0.5, backend=backend)
        assert torch.equal(otkern.solve_sample(first, second, reg=0.5, backend=backend).value, expected.value)


def test_a_trace_holds_no_result(backend, device):
    def value(x, y):
        return otkern.solve_sample(x, y, reg=0.5, backend=backend, check=False).value

    first, second = (points(batch=b, requires_grad=False, device=device) for b in (2, 2))
    second[0] += 1
    try:
        traced = torch.jit.trace(value, tuple(first), check_trace=False)
    except RuntimeError:
        return  # said, and not silently wrong
    torch.testing.assert_close(traced(*second), value(*second))


def test_saves_inputs_and_potentials_but_no_matrix(backend, device):
    n, m, d = 40, 30, 3
    x, y = points(batch=1, n=n, m=m, d=d, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        otkern.solve_sample(x, y, reg=0.5, max_iter=2, backend=backend)
    # and the item's reg, value and two multipliers
    assert sum(saved) <= (n + m) * (d + 1) + 4
    assert max(saved) < n * m


def test_a_gradient_that_is_not_asked_for_is_not_computed(backend, device):
    x, y = points(device=device)
    y = y.detach()
    otkern.solve_sample(x, y, reg=0.5, max_iter=2, backend=backend).value.sum().backward()
    assert y.grad is None
    assert x.grad.abs().sum() > 0


def test_a_reg_that_changes_does_not_break_the_graph(backend):
    torch._dynamo.reset()
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    compiled = torch.compile(
        lambda reg: otkern.solve_sample(x, y, reg=reg, max_iter=5, backend=backend).value,
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for reg in (0.1, 0.2, 0.3):
        assert compiled(reg).allclose(otkern.solve_sample(x, y, reg=reg, max_iter=5, backend=backend).value)


def test_a_barycentric_map_is_part_of_a_full_graph(backend):
    torch._dynamo.reset()
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)

    def image(x):
        return otkern.solve_sample(x, y, reg=0.5, max_iter=5, backend=backend).barycentric_map()

    assert torch.compile(image, fullgraph=True, backend="aot_eager")(x).allclose(image(x))
