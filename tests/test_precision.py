"""Items whose potentials float32 cannot hold: solved, differentiated and applied in float64, item by item.

The judge is the float64 reference solving the same float32 numbers.
"""

import pytest
import torch

import otkern
from otkern import precision

OUTLIER = 1000.0


def _costs(where: str, size: float) -> torch.Tensor:
    cost = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    if where in ("row", "both"):
        cost[3] = size
    if where in ("column", "both"):
        cost[:, 2] = size
    if where == "entry":
        cost[3, 2] = size
    return cost


def _clouds(shared: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(7, 3, generator=generator), torch.randn(6, 3, generator=generator)
    x[2] = torch.tensor([OUTLIER, 0.0, 0.0])
    return x, torch.cat([y, x[2:3]]) if shared else y


def _leaf(tensor: torch.Tensor, device="cpu", dtype=None) -> torch.Tensor:
    return tensor.detach().to(device, dtype, copy=True).requires_grad_()


def _close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert torch.isfinite(ours).all()
    assert (ours.cpu().double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("where", ["row", "column", "both", "entry"])
@pytest.mark.parametrize("size", [1e4, 2e7, 1e9])
def test_constants_of_rows_and_columns_cost_no_digits(backend, device, where, size):
    options = {"reg": 0.05, "max_iter": 200, "tol": 1e-4}
    cost, exact_cost = _leaf(_costs(where, size), device), _leaf(_costs(where, size), dtype=torch.float64)
    ours = otkern.solve(cost, **options, backend=backend)
    exact = otkern.solve(exact_cost, **options, backend="reference")
    assert torch.equal(ours.converged, exact.converged) and int(ours.n_iters) == int(exact.n_iters)
    _close(ours.plan, exact.plan, 1e-5)
    _close(ours.value, exact.value, 1e-6)
    _close(ours.plan_operator @ torch.ones(5, device=device), exact.plan.sum(1), 1e-5)
    rows, columns = ours.plan.sum(1) - 1 / 6, ours.plan.sum(0) - 1 / 5
    assert ours.marginal_error.item() == pytest.approx((rows.abs().sum() + columns.abs().sum()).item(), abs=2e-6)
    ours.value.backward()
    exact.value.backward()
    _close(cost.grad, exact_cost.grad, 1e-5)


@pytest.mark.parametrize("iterations", [5, 1000])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "in both clouds"])
def test_a_distant_point_leaves_the_gradient_exact(backend, device, interpreted, iterations, shared):
    if interpreted and iterations > 5:
        iterations = 100
    x, y = _clouds(shared)
    options = {"reg": 0.05, "max_iter": iterations, "tol": None}
    x, x_exact, y = _leaf(x, device), _leaf(x, dtype=torch.float64), y.to(device)
    ours = otkern.solve_sample(x, y, **options, backend=backend)
    exact = otkern.solve_sample(x_exact, y.cpu().double(), **options, backend="reference")
    ours.value.backward()
    exact.value.backward()
    _close(ours.value, exact.value, 1e-6)
    _close(x.grad, x_exact.grad, 2e-5)
    assert ours.marginal_error.item() == pytest.approx(exact.marginal_error.item(), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("grad", ["implicit", "unrolled"])
def test_what_follows_from_the_potentials_is_differentiated_in_float64(grad):
    x, y = _clouds()
    grads, second = [], []
    for dtype in (torch.float32, torch.float64):
        leaf = _leaf(x, dtype=dtype)
        result = otkern.solve_sample(leaf, y.to(dtype), reg=50.0, max_iter=20, tol=None, grad=grad)
        weights = torch.linspace(0, 1, 42, dtype=dtype).reshape(7, 6)
        outputs = (result.plan * weights).sum() + result.potential_a[0] + result.value_linear + result.marginal_a[1]
        grads.append(torch.autograd.grad(outputs, leaf)[0])
        value = otkern.solve_sample(leaf, y.to(dtype), reg=50.0, max_iter=300, tol=None).value
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    _close(grads[0], grads[1], 1e-4)
    _close(second[0], second[1], 1e-4)


def test_batch_mates_and_layout_change_no_bit(backend, device):
    x, y = (cloud.to(device) for cloud in _clouds())
    near = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(2)).to(device)
    batch, others = torch.stack([near[0], x, near[1]]), torch.stack([y, y, y])
    options = {"reg": 0.05, "max_iter": 5, "tol": None, "backend": backend}
    together = otkern.solve_sample(batch, others, **options)
    offsets = [torch.arange(4, dtype=torch.int32, device=device) * size for size in (7, 6)]
    packed = otkern.solve_sample(
        batch.flatten(0, 1), others.flatten(0, 1), cu_seqlens_a=offsets[0], cu_seqlens_b=offsets[1], **options
    )
    for i in range(3):
        alone = otkern.solve_sample(batch[i], others[i], **options)
        for result in (together, packed):
            assert torch.equal(result.plan[i], alone.plan)
            assert torch.equal(result.value[i], alone.value)
            assert torch.equal(result.marginal_error[i], alone.marginal_error)
        assert torch.equal(packed.potential_a.reshape(3, 7)[i], alone.potential_a)
        assert torch.equal(together.marginal_b[i], alone.marginal_b)


def test_a_debiased_value_and_geomlosses_loop_are_exact_beside_a_distant_point(backend, device):
    x, y = _clouds()
    losses = (
        otkern.SinkhornLoss(metric="sqeuclidean", reg=0.05, max_iter=20, tol=None, debias=True, backend=backend),
        otkern.SamplesLoss(blur=0.05, diameter=1000.0, backend=backend),
    )
    for loss in losses:
        leaf, exact_leaf = _leaf(x, device), _leaf(x, dtype=torch.float64)
        exact_loss = type(loss).__new__(type(loss))
        exact_loss.__dict__.update(loss.__dict__)
        exact_loss.backend = "reference"
        value, exact = loss(leaf, y.to(device)), exact_loss(exact_leaf, y.double())
        value.sum().backward()
        exact.sum().backward()
        _close(value, exact, 1e-6)
        _close(leaf.grad, exact_leaf.grad, 1e-5)


def test_a_traced_call_solves_both_ways_and_chooses_on_the_device():
    x, y = _clouds()

    def call(x, y):
        return otkern.solve_sample(x, y, reg=0.05, max_iter=5, tol=None).value

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x, y), call(x, y))


def test_only_what_can_exceed_is_looked_at():
    x = torch.zeros(1, 2, 3)
    for metric, reg, expected in (("cosine", 0.1, False), ("cosine", 1e-3, True), ("dot", 0.1, True)):
        inputs, _ = otkern.arguments.read_points(x, x, None, None, reg, metric, *[None] * 6)
        assert precision.may_exceed(inputs, reg) is expected


def test_what_float64_does_not_hold_on_the_chip_says_so(monkeypatch):
    from otkern import backends

    monkeypatch.setattr(backends, "holds_float64", lambda *_: False)
    with pytest.warns(Warning, match="not converged"):
        result = otkern.solve(_costs("row", 1e6), reg=0.05, max_iter=200, tol=1e-4)
    assert not bool(result.converged) and result.marginal_error > 1e-2


def test_what_float64_cannot_hold_says_so():
    cost = _costs("row", 1e3).double()
    cost[3, 0] = cost[:, 2] = 3e37
    with pytest.warns(otkern.ConvergenceWarning):
        result = otkern.solve(cost, reg=0.01, max_iter=200, tol=1e-6)
    assert not bool(result.converged) and result.marginal_error > 1e-2
    with pytest.warns(otkern.ConvergenceWarning):
        assert not bool(otkern.solve(cost.float(), reg=0.01, max_iter=200, tol=1e-6).converged)
    assert bool(otkern.solve(_costs("row", 1e6).double(), reg=0.5, max_iter=5000, tol=1e-6).converged)
