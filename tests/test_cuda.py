"""What only the CUDA backend has: clusters, the cost formed again, the order of threads, its refusals."""

import math

import pytest
import torch

import otkern
from otkern import backends, debiasing
from otkern.backends import cuda, measured, reference
from otkern.backends.reference.items import items
from otkern.problem import Inputs, PlanWeights, Schedule

from .test_native import double, loop, make_inputs

needs_executor = pytest.mark.skipif(cuda.missing("cpu") is not None, reason=str(cuda.missing("cpu")))

SIZES = ((5, 17, 64, 90, 0, 3), (4, 33, 70, 81, 3, 1))
KINDS = {"balanced": None, "unbalanced": (0.5, math.inf), "partial": (0.3, 0.0), "null": (0.4, 0.0)}
# What makes small problems take the roads of large ones: (bytes of shared memory, blocks of a cluster).
SMALL = {"clusters": (24 << 10, 4), "large clusters": (16 << 10, 16), "one block": (52 << 10, 1)}


def make(kind, metric, dtype, sizes=SIZES, **options):
    inputs = make_inputs(metric, dtype, *sizes, **options)
    if KINDS[kind] is None:
        return inputs
    relaxation = torch.tensor([KINDS[kind]] * inputs.batch, dtype=inputs.reg.dtype)
    return inputs._replace(kind=kind, relaxation=relaxation)


ORDERS = (
    {"backward": True},
    {"ahead": True},
    {"backward": True, "ahead": True},
    {"pieces": True},
    {"pieces": True, "backward": True, "ahead": True},
    {"eager": True},
    {"eager": True, "pieces": True, "ahead": True},
)


@pytest.fixture
def limits(monkeypatch):
    """Sets what the device allows."""
    return lambda given: monkeypatch.setattr(cuda, "_limits", lambda device: given)


@pytest.fixture
def executor():
    from otkern import _cuda_host

    yield _cuda_host
    _cuda_host.set_order()


def everything(inputs, max_iter=12, schedule=None):
    """All that the backend computes of a batch."""
    g_init = 3 * torch.rand(inputs.shape_g, generator=torch.Generator().manual_seed(0)).to(inputs.reg.dtype)
    value, f, g, multipliers, error, iters = cuda.forward(inputs, g_init, max_iter, -1.0, schedule)
    found = [value, f, g, multipliers, error, iters]
    points = inputs.cost is None
    needs = (points, points, not points, True, True)
    dvalue = torch.linspace(-1, 2, inputs.batch, dtype=inputs.reg.dtype)
    found += [t for t in cuda.backward(inputs, f, g, dvalue, needs) if t is not None]
    weights = PlanWeights(torch.full_like(inputs.reg, 0.7), dvalue, None, f, g)
    found += [t for t in cuda.plan_backward(inputs, f, g, weights, needs) if t is not None]
    found += [cuda.plan(inputs, f, g), cuda.apply(inputs, f, g, g.unsqueeze(-1), False, True)]
    found += cuda.implicit(inputs, f, g, None, None, None, None, f, g, inputs.kind == "balanced", 1e-6, 30)
    return found


def alone_in(inputs, item, n, m):
    """An item of n x m points without its batch."""
    return inputs._replace(
        x_a=inputs.x_a[item : item + 1, :n], x_b=inputs.x_b[item : item + 1, :m],
        a=inputs.a[item : item + 1, :n], b=inputs.b[item : item + 1, :m], reg=inputs.reg[item : item + 1],
        lengths_a=None, lengths_b=None, max_a=n, max_b=m,
    )  # fmt: skip


def shares(inputs, s_a, s_b, f, g):
    """r_a, r_b of equation (24) in float64, from soft minima and potentials as they are, costs at least 1e-4."""
    inputs = Inputs(*map(double, inputs))
    r_a, r_b = torch.zeros_like(s_a, dtype=torch.float64), torch.zeros_like(s_b, dtype=torch.float64)
    for item in items(inputs):
        cost = item.cost.clamp(min=1e-4)
        s_f, s_g, h_f, h_g = (
            v[where].double() for v, where in zip((s_a, s_b, f, g), (item.rows, item.columns) * 2, strict=True)
        )
        real_a, real_b = item.a > 0, item.b > 0  # between two points without weight the exponential may be infinite
        of_a, of_b = (((u.unsqueeze(1) + v - cost) / item.reg).exp() for u, v in ((s_f, h_g), (h_f, s_g)))
        r_a[item.rows] = of_a[:, real_b] @ item.b[real_b]
        r_b[item.columns] = item.a[real_a] @ of_b[real_a]
    return r_a, r_b


def same(found, expected) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(found, expected, strict=True))


def assert_as_exact(found, expected, dtype) -> None:
    slack = 2e-5 if dtype == torch.float32 else 1e-12
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=slack, atol=slack)


@needs_executor
@pytest.mark.parametrize("number", range(9))
def test_every_class_solves_its_largest_problem(number):
    cpu = pytest.importorskip("otkern.backends.cpu")
    if cpu.missing() is not None:
        pytest.skip(cpu.missing())
    inputs = make_inputs("cosine", torch.float32, (1,), (1,), d=6)
    side = 1
    while cuda._bytes(inputs, number, side + 1, side + 1) <= cuda._classes(inputs)[number]["bytes"]:
        side += 1
    inputs = make_inputs("cosine", torch.float32, (side,), (side,), d=6, reg=0.05)._replace(
        lengths_a=None, lengths_b=None
    )
    assert cuda._size_class(inputs) == number
    found, expected = (backend.forward(inputs, None, 6, -1.0) for backend in (cuda, cpu))
    assert_as_exact(found[:3], expected[:3], torch.float32)
    needs, one = (True, True, False, True, True), torch.ones(1)
    found, expected = (backend.backward(inputs, *found[1:3], one, needs) for backend in (cuda, cpu))
    assert_as_exact(*([t for t in grads if t is not None] for grads in (found, expected)), torch.float32)


@needs_executor
@pytest.mark.parametrize("number", range(8))
def test_every_class_runs_the_loop_of_geomloss_on_its_largest_problem(number):
    cpu = pytest.importorskip("otkern.backends.cpu")
    if cpu.missing() is not None:
        pytest.skip(cpu.missing())
    from otkern import _cuda_host

    allowed = cuda._limits(torch.device("cpu"))
    most = _cuda_host.cuda_classes("symmetric", allowed)[number]["bytes"]
    side = 1
    while _cuda_host.cuda_bytes("symmetric", allowed, number, False, side + 1, side + 1, True) <= most:
        side += 1
    inputs = make_inputs("cosine", torch.float32, (side,), (side,), d=6, reg=0.05)
    # What serves the forward's largest problem serves the loop's.
    assert number < 7 or side >= cuda._largest_square(inputs)
    inputs = inputs._replace(lengths_a=None, lengths_b=None)
    assert_as_exact(loop(cuda, inputs), loop(cpu, inputs), torch.float32)


@needs_executor
@pytest.mark.parametrize("allowed", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("metric", "reg"), [("cosine", 0.2), ("sqeuclidean", 0.02), ("cost", 0.2)])
def test_clusters_and_costs_formed_again_have_the_potentials_of_the_reference(limits, allowed, kind, metric, reg):
    sizes = ((5, 17, 30, 0, 3), (4, 33, 29, 3, 1))
    for dtype in (torch.float32, torch.float64):
        inputs = make(kind, metric, dtype, sizes, reg=reg, d=12)
        limits(allowed)
        if cuda.can_run(inputs) is not None:
            assert dtype == torch.float64
            continue
        expected = reference.forward(inputs.widened(), None, 12, -1.0)
        assert_as_exact(cuda.forward(inputs, None, 12, -1.0)[:3], expected[:3], dtype)


@needs_executor
@pytest.mark.parametrize("kind", KINDS)
def test_few_columns_and_few_rows_have_the_potentials_of_the_reference(executor, kind):
    # Warps share the rows of a column, more of them the fewer columns there are.
    inputs = make(kind, "cosine", torch.float32, ((300, 4, 90, 200, 31), (3, 300, 33, 64, 97)), d=12)
    expected = reference.forward(inputs.widened(), None, 12, -1.0)
    found = cuda.forward(inputs, None, 12, -1.0)
    assert_as_exact(found[:3], expected[:3], torch.float32)
    for order in ORDERS[:3]:
        executor.set_order(**order)
        assert same(cuda.forward(inputs, None, 12, -1.0), found)


@needs_executor
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reg", [0.002, 0.2, 20.0])
def test_absorbed_kernels_have_the_potentials_of_the_log_domain(limits, monkeypatch, kind, reg):
    for allowed in ((227 << 10, 16), SMALL["clusters"]):
        limits(allowed)
        inputs = make(kind, "cost", torch.float32, reg=reg)
        absorbed = cuda.forward(inputs, None, 20, -1.0)
        monkeypatch.setattr(cuda, "LOG_DOMAIN_ONLY", True)
        plain = cuda.forward(inputs, None, 20, -1.0)
        monkeypatch.setattr(cuda, "LOG_DOMAIN_ONLY", False)
        for x, y in zip(absorbed[:3], plain[:3], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-6 * max(1.0, reg))


@needs_executor
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_threads_changes_no_bit(limits, executor, kind):
    schedule = Schedule(eps_start=torch.full((6,), 1.0), eps_factor=0.5)
    for allowed in (SMALL["clusters"], (227 << 10, 16)):
        limits(allowed)
        for metric in ("cosine", "euclidean", "cost"):
            inputs = make(kind, metric, torch.float32, d=12)._replace(entropy=kind == "partial")
            forward = everything(inputs, schedule=schedule)
            for order in ORDERS:
                executor.set_order(**order)
                assert same(everything(inputs, schedule=schedule), forward), (allowed, metric, order)
            executor.set_order()


def make_self(metric, dtype, sizes=(5, 17, 64, 70), rho=None, **options):
    """Two pairs of clouds, then two clouds with themselves, all with clouds of one size."""
    inputs = make_inputs(metric, dtype, sizes, sizes, **options)
    x_b, b = inputs.x_b.clone(), inputs.b.clone()
    x_b[2:], b[2:] = inputs.x_a[2:], inputs.a[2:]
    inputs = inputs._replace(x_b=x_b, b=b, first_self=2)
    if rho is None:
        return inputs
    relaxation = torch.full((len(sizes), 2), rho, dtype=inputs.reg.dtype)
    return inputs._replace(kind="unbalanced", relaxation=relaxation)


@needs_executor
@pytest.mark.parametrize("rho", [None, 0.7])
@pytest.mark.parametrize(("metric", "reg"), [("cosine", 0.2), ("euclidean", 0.02)])
def test_clouds_with_themselves_are_those_of_the_reference_in_any_order(limits, executor, metric, reg, rho):
    for allowed in ((227 << 10, 16), SMALL["clusters"]):
        limits(allowed)
        inputs = make_self(metric, torch.float32, reg=reg, rho=rho, d=12)
        found = cuda.forward(inputs, None, 12, -1.0)
        assert_as_exact(found[:3], reference.forward(inputs, None, 12, -1.0)[:3], torch.float32)
        for order in ORDERS:
            executor.set_order(**order)
            assert same(cuda.forward(inputs, None, 12, -1.0), found)
        executor.set_order()
        assert torch.equal(found[1][2:], found[2][2:])


@needs_executor
@pytest.mark.parametrize("rho", [None, (0.3, math.inf)])
@pytest.mark.parametrize(("metric", "eps_start"), [("cosine", 4.0), ("euclidean", 1e-3), ("cost", 4.0)])
@pytest.mark.parametrize("allowed", [(227 << 10, 16), SMALL["clusters"]])
def test_the_loop_of_geomloss_is_that_of_the_reference_in_any_order(limits, executor, allowed, metric, eps_start, rho):
    limits(allowed)
    for dtype in (torch.float32, torch.float64):
        # In fp64 no item larger than the small device's clusters hold.
        sizes = SIZES if dtype == torch.float32 else ((5, 17, 30, 0, 3), (4, 33, 29, 3, 1))
        inputs = make_inputs(metric, dtype, *sizes, d=12, reg=1e-2)
        if rho is not None:
            relaxation = torch.tensor(rho, dtype=inputs.reg.dtype).expand(inputs.batch, 2).contiguous()
            inputs = inputs._replace(kind="unbalanced", relaxation=relaxation)
        for problem in [inputs] if metric == "cost" else [inputs, debiasing.stacked(inputs)]:
            found = loop(cuda, problem, eps_start)
            exact = loop(reference, Inputs(*map(double, problem)), eps_start)
            assert_as_exact([t.double() for t in found], exact, dtype)
            for order in ORDERS:
                executor.set_order(**order)
                assert same(loop(cuda, problem, eps_start), found), (dtype, order)
            executor.set_order()
            if problem.first_self >= 0:
                for of_a, of_b in zip(found[::2], found[1::2], strict=True):
                    assert torch.equal(of_a[problem.n_pairs :], of_b[problem.n_pairs :])


@needs_executor
@pytest.mark.parametrize("allowed", [(227 << 10, 16), SMALL["clusters"]])
def test_the_shares_of_the_loop_are_those_of_the_soft_minima_as_rounded(limits, allowed):
    limits(allowed)
    inputs = make_inputs("cost", torch.float32, *SIZES, reg=1e-5)
    s_a, s_b, f, g, *ratios = loop(cuda, inputs)
    for got, want in zip(ratios, shares(inputs, s_a, s_b, f, g), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
        # Rounding has moved them from 1 by much more than that.
        assert (want[2, :64] - 1).abs().max() > 5e-5


@needs_executor
def test_batch_mates_change_no_bit_of_the_loop_of_geomloss(limits):
    limits(SMALL["clusters"])
    inputs = make("balanced", "euclidean", torch.float32, d=12)
    together = loop(cuda, inputs)
    for item, (n, m) in enumerate(zip(*SIZES, strict=True)):
        if n == 0:
            assert not any(out[item].any() for out in together)
            continue
        alone = alone_in(inputs, item, n, m)
        found = cuda.symmetric(alone, torch.full((1,), 4.0), torch.tensor([item % 4], dtype=torch.int32), 0.25, 1e-4)
        for got, out, size in zip(found, together, (n, m) * 3, strict=True):
            assert torch.equal(got[0], out[item, :size]) and not out[item, size:].any()


def extreme(inputs):
    """The same with a short row, and with rows whose squares would leave the range of fp32: those are scaled first."""
    tiny = 2.0**-23 if inputs.x_a.dtype == torch.float16 else 2.0**-80
    inputs.x_a[2, 3] *= 2.0**-14
    inputs.x_a[2, 5] *= tiny
    inputs.x_b[1, 30] *= tiny
    return inputs


def in_matrix_units(test):
    """Over what the matrix units take, and few and many features."""
    test = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])(test)
    test = pytest.mark.parametrize("metric", ["cosine", "dot"])(test)
    return needs_executor(pytest.mark.parametrize("d", [1, 16, 45, 200])(test))


@in_matrix_units
def test_the_matrix_units_form_the_cost_of_fp32(dtype, metric, d):
    inputs = extreme(make("balanced", metric, dtype, d=d))
    found = cuda.forward(inputs, None, 12, -1.0)
    exact = reference.forward(Inputs(*map(double, inputs)), None, 12, -1.0)
    for x, y in zip(found[:3], exact[:3], strict=True):
        torch.testing.assert_close(x, y.float(), rtol=2e-6, atol=2e-6)


@in_matrix_units
def test_the_matrix_units_make_gradients_of_no_more_than_rounding(dtype, metric, d):
    inputs = extreme(make("balanced", metric, dtype, d=d))
    _, f, g, *_ = reference.forward(inputs.widened(), None, 12, -1.0)
    # Weights of a plan and of a loss that is scaled down are far below what 16 bits can hold.
    dvalue = 2.0 ** torch.linspace(-14, 3, inputs.batch).round()
    needs = (True, True, False, False, False)
    found = cuda.backward(inputs, f, g, dvalue, needs)[:2]
    wide = Inputs(*map(double, inputs))
    exact = reference.backward(wide, f.double(), g.double(), dvalue.double(), needs)[:2]
    plan = reference.plan(wide, f.double(), g.double()) * dvalue.double().abs().view(-1, 1, 1)
    # What is rounded: the gradient to its dtype, and sums of weighted points, of which little may be left, to fp32.
    ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    least = 2.0**-24 if dtype == torch.float16 else 0.0
    for got, want, weights, x, y in (
        (found[0], exact[0], plan, wide.x_a, wide.x_b),
        (found[1], exact[1], plan.mT, wide.x_b, wide.x_a),
    ):
        lengths = [z.nan_to_num(0).norm(dim=-1, keepdim=True) for z in (x, y)]  # NaN is the padding
        size = weights @ lengths[1] if metric == "dot" else weights.sum(-1, keepdim=True) / lengths[0].clamp(min=1e-30)
        assert ((got.double() - want).abs() <= ulp * want.abs() + 4e-6 * size + least).all()


@needs_executor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_where_points_lie_changes_no_bit(executor, dtype, metric):
    # Copied by the engine, in pieces, element by element for the last features, and for all of them.
    inputs = make("balanced", metric, dtype, d=48)
    expected = everything(inputs)
    executor.set_order(pieces=True)
    assert same(everything(inputs), expected)
    executor.set_order()
    wide = torch.full((*inputs.x_a.shape[:2], 51), math.nan, dtype=dtype)
    wide[..., 1:49] = inputs.x_a
    columns = inputs.x_b.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(everything(inputs._replace(x_a=wide[..., 1:49])), expected)
    assert same(everything(inputs._replace(x_b=columns)), expected)
    # An odd number of features, of which the last ones are zeros.
    padded = torch.cat([inputs.x_a, torch.zeros_like(inputs.x_a[..., :16])], -1)[..., :53]
    other = torch.cat([inputs.x_b, torch.zeros_like(inputs.x_b[..., :16])], -1)[..., :53]
    for got, want in zip(everything(inputs._replace(x_a=padded, x_b=other)), expected, strict=True):
        assert torch.equal(got[..., : want.shape[-1]].nan_to_num(7), want.nan_to_num(7))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the executor has no streams")


def on_gpu(dtype=torch.float32):
    """Items of every class, clusters among them."""
    sizes = ((5, 60, 100, 160, 300, 640, 900), (9, 64, 90, 150, 310, 600, 890))
    inputs = make_inputs("cosine", dtype, *sizes, d=64)
    return type(inputs)(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in inputs))


@needs_gpu
def test_nothing_waits_for_the_device():
    inputs = on_gpu()
    cuda._limits(inputs.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, f, g, *_ = cuda.forward(inputs, None, 20, 1e-3)
        cuda.backward(inputs, f, g, torch.ones_like(value), (True, True, False, True, True))
        cuda.apply(inputs, f, g, g.unsqueeze(-1), False, False)
        cuda.implicit(inputs, f, g, None, None, None, None, f, g, True, 1e-4, 10)
        cuda.symmetric(inputs, torch.ones_like(value), torch.ones_like(value, dtype=torch.int32), 0.5, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_call_can_be_captured_in_a_graph_and_repeats_its_bits():
    inputs = on_gpu()
    expected = cuda.forward(inputs, None, 20, 1e-3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.forward(inputs, None, 20, 1e-3)
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_class_agrees_with_the_cpu_on_the_device(dtype):
    cpu = pytest.importorskip("otkern.backends.cpu")
    inputs = on_gpu(dtype)
    on_cpu = type(inputs)(*(v.cpu() if isinstance(v, torch.Tensor) else v for v in inputs))
    found = [t.cpu() for t in cuda.forward(inputs, None, 20, -1.0)[:3]]
    assert_as_exact(found, cpu.forward(on_cpu, None, 20, -1.0)[:3], torch.float32)


@needs_executor
def test_batch_mates_of_other_classes_change_no_bit(limits):
    limits(SMALL["clusters"])
    inputs = make("balanced", "cosine", torch.float32, d=12)
    together = everything(inputs)
    for item, (n, m) in enumerate(zip(*SIZES, strict=True)):
        if n == 0:
            continue
        alone = alone_in(inputs, item, n, m)
        g_init = 3 * torch.rand(inputs.shape_g, generator=torch.Generator().manual_seed(0))[item : item + 1, :m]
        value, f, g, *_ = cuda.forward(alone, g_init, 12, -1.0)
        assert torch.equal(value, together[0][item : item + 1])
        assert torch.equal(f, together[1][item : item + 1, :n]) and torch.equal(g, together[2][item : item + 1, :m])


@needs_executor
def test_rows_of_a_tile_change_no_bit(limits):
    inputs = make("balanced", "cosine", torch.float32, d=12)
    _, f, g, *_ = cuda.forward(inputs, None, 12, -1.0)
    found = []
    for allowed in ((227 << 10, 16), (14 << 10, 16)):
        limits(allowed)
        gradients = cuda.backward(inputs, f, g, torch.ones_like(inputs.reg), (True, True, False, True, True))
        found.append([t for t in gradients if t is not None])
    from otkern import _cuda_host

    rows = [
        _cuda_host.cuda_plan_rows(allowed, False, 1000, inputs.max_b, inputs.batch, True)[0]
        for allowed in ((227 << 10, 1), (14 << 10, 1))
    ]
    assert rows == [32, 8] or rows == [32, 16]
    assert same(*found)


@needs_executor
def test_what_does_not_fit_is_refused_with_the_size_that_does():
    x = torch.zeros(1000, 2)
    with pytest.raises(ValueError, match=r"up to 9\d\d points a side here, and 1000 x 1000 do not fit"):
        otkern.solve_sample(x, x, reg=1.0, backend="cuda")


@needs_executor
def test_explain_names_cluster_and_shared_memory():
    regime = otkern.explain(
        torch.zeros(2, 700, 8), torch.zeros(2, 700, 8), reg=1.0, metric="cosine", backend="cuda"
    ).regime
    assert "a cluster of 16 blocks of 256 threads" in regime
    assert "KiB of shared memory" in regime and "formed again" in regime
    assert "one block" in otkern.explain(torch.zeros(30, 20), reg=1.0, backend="cuda").regime


RATIOS = {"float32": {"64": 0.5, "128": 0.5, "512": 2.0}}
TIMED = {"9.0": {"gpu": "a GPU", "date": "today", "commit": "0", "cuda_over_triton": RATIOS}}


@pytest.fixture
def on_hopper(monkeypatch):
    """As on a machine with a GPU of compute capability 9.0, for the choice of a backend."""
    monkeypatch.setattr(backends, "unavailable", lambda name, device: None if name != "cpu" else "CPU tensors only")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "holds", lambda device, dtype, longest: longest <= 64)
    return lambda table: monkeypatch.setattr(measured, "TABLE", table)


@pytest.mark.parametrize(
    ("table", "dtype", "longest", "chosen", "why"),
    [
        ({}, torch.float32, 50, "triton", "not been timed"),
        (TIMED, torch.float32, 50, "cuda", None),
        (TIMED, torch.float32, 100, "triton", "up to 128 points a side do not fit"),
        (TIMED, torch.float32, 300, "triton", "2.00 times as long as Triton in float32 at up to 512 points"),
        (TIMED, torch.float32, 20, "triton", "not been timed"),  # a smaller bracket, without an entry
        (TIMED, torch.float32, 5000, "triton", "not been timed"),
        (TIMED, torch.bfloat16, 50, "triton", "not been timed"),
    ],
)
def test_cuda_is_chosen_where_it_was_measured_to_be_faster(on_hopper, table, dtype, longest, chosen, why):
    on_hopper(table)
    size = backends.size_of(torch.device("cuda"), dtype, longest)
    assert backends.choose(None, "cuda", size=size) == chosen
    assert backends.choose("triton", "cuda", size=size) == "triton"
    assert backends.choose(None, "cuda", update="symmetric", size=size) == "reference"
    refused = dict(backends.refusals("cuda", "alternating", 1.0, "envelope", size))
    assert ("cuda" in refused) == (why is not None)
    assert why is None or why in refused["cuda"]
    assert backends.choose(None, "cpu", size=size) != "cuda"


def test_a_compiled_graph_asks_the_table(monkeypatch):
    asked = []
    monkeypatch.setattr(measured, "TABLE", TIMED)
    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)
    monkeypatch.setattr(backends, "_cuda_is_slower", lambda size: asked.append(size) or "no")

    def solve(x):
        # What a call on a GPU asks, of a tensor that is on none.
        size = backends.size_of(torch.device("cuda", 1), x.dtype, x.shape[0])
        return x + len(backends.choose(None, "cuda", size=size))

    compiled = torch.compile(solve, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(torch.zeros(50)), torch.full((50,), 6.0))
    assert asked[-1] == (1, "float32", 64)


@needs_executor
def test_the_largest_measured_size_fits_into_a_cluster():
    inputs = make_inputs("cosine", torch.float32, (1,), (1,))._replace(max_a=measured.BRACKETS[-1] + 1, kind="null")
    assert measured.BRACKETS[-1] + 1 <= cuda._largest_square(inputs)


def test_cpu_tensors_are_refused_without_the_executor(monkeypatch):
    monkeypatch.delenv("OTKERN_CUDA_EXECUTOR", raising=False)
    cuda.missing.cache_clear()
    backends.unavailable.cache_clear()
    try:
        with pytest.raises(ValueError, match="can run here, but 'cuda' cannot: the cuda backend takes CUDA tensors"):
            otkern.solve(torch.zeros(2, 2), reg=1.0, backend="cuda")
    finally:
        monkeypatch.undo()
        cuda.missing.cache_clear()
        backends.unavailable.cache_clear()
