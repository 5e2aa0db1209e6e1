"""What only the Triton backend has: size classes, two ways to solve, absorbed potentials, launches without the host."""

import subprocess
import sys

import numpy
import pytest
import torch

import otkern
from otkern import backends
from otkern.backends import reference
from otkern.debiasing import stacked
from otkern.problem import Inputs, Schedule
from tests.problems import Problem, exact_value, make_weights, plain_value

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    backends.unavailable("triton", DEVICE) is not None, reason=str(backends.unavailable("triton", DEVICE))
)


@pytest.fixture
def triton_backend():
    return backends.load("triton")


@pytest.fixture
def small_classes(monkeypatch):
    """Only the smallest size class on chip, so that items of 17 points already take the way of the large ones."""
    from otkern.backends.triton import launch

    monkeypatch.setattr(launch, "FORWARD", {dtype: entries[:1] for dtype, entries in launch.FORWARD.items()})
    monkeypatch.setattr(launch, "RELAXED", {dtype: entries[:1] for dtype, entries in launch.RELAXED.items()})


def make_inputs(sizes, d=5, metric="cosine", reg=0.1, dtype=torch.float32, seed=0) -> Inputs:
    """A padded batch of problems of the given (n, m) with NaN in the padding and some zero weights."""
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    N, M = max(n for n, _ in sizes), max(m for _, m in sizes)
    x, y = (torch.full((len(sizes), size, d), float("nan"), dtype=dtype) for size in (N, M))
    a, b = (torch.full((len(sizes), size), float("nan"), dtype=compute) for size in (N, M))
    for i, (n, m) in enumerate(sizes):
        for points, weights, size in ((x, a, n), (y, b, m)):
            points[i, :size] = torch.randn(size, d, generator=generator, dtype=torch.float64).to(dtype)
            w = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
            if size > 2:
                w[1] = 0
            weights[i, :size] = (w / w.sum()).to(compute)
    lengths_a, lengths_b = (torch.tensor(side, dtype=torch.int32) for side in zip(*sizes, strict=True))
    tensors = [x, y, None, a, b, torch.full((len(sizes),), reg, dtype=compute), None, lengths_a, lengths_b, None, None]
    tensors = [t if t is None else t.to(DEVICE) for t in tensors]
    return Inputs(*tensors, N, M, metric)


def one_item(inputs: Inputs, i: int) -> Inputs:
    n, m = int(inputs.lengths_a[i]), int(inputs.lengths_b[i])
    return inputs._replace(
        x_a=inputs.x_a[i : i + 1, :n].contiguous(),
        x_b=inputs.x_b[i : i + 1, :m].contiguous(),
        a=inputs.a[i : i + 1, :n].contiguous(),
        b=inputs.b[i : i + 1, :m].contiguous(),
        reg=inputs.reg[i : i + 1],
        lengths_a=None,
        lengths_b=None,
        max_a=n,
        max_b=m,
    )


def in_fp64(inputs: Inputs) -> Inputs:
    fields = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs)
    return Inputs(*fields)


def assert_as_accurate_as_plain(actual, inputs: Inputs, max_iter: int, tol: float = -1.0):
    """Values and potentials against fp64: no more than twice the error of plain PyTorch in fp32, plus 4 units."""
    exact = reference.forward(in_fp64(inputs), None, max_iter, tol)
    plain = reference.forward(inputs, None, max_iter, tol)
    for name, ours, theirs, truth in zip(("value", "f", "g"), actual, plain, exact, strict=False):
        scale = truth.abs().max() + inputs.reg.max()
        allowed = 2 * (theirs.double() - truth).abs().max() + 4 * torch.finfo(ours.dtype).eps * scale
        error = (ours.double() - truth).abs().max()
        assert error <= allowed, f"{name}: {float(error)} > {float(allowed)}"
    assert torch.equal(actual[5].cpu(), exact[5].cpu())


def test_bits_do_not_depend_on_the_classes_of_batch_mates(triton_backend):
    """Sizes on both sides of every class edge that the interpreter reaches in seconds."""
    inputs = make_inputs([(16, 3), (17, 5), (2, 33), (1, 1), (16, 16)])
    together = triton_backend.forward(inputs, None, 2, -1.0)
    dvalue = torch.ones_like(together[0])
    gradients = triton_backend.backward(inputs, together[1], together[2], dvalue, (True, True, False, True, True))
    for i in range(inputs.batch):
        item = one_item(inputs, i)
        alone = triton_backend.forward(item, None, 2, -1.0)
        n, m = item.max_a, item.max_b
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours[i].reshape(-1)[: theirs.numel()], theirs[0].reshape(-1))
        alone = triton_backend.backward(item, alone[1], alone[2], dvalue[:1], (True, True, False, True, True))
        for ours, theirs, size in zip(gradients, alone, (n, m, None, n, m, None), strict=True):
            if ours is not None:
                assert torch.equal(ours[i][:size] if size is not None else ours[i], theirs[0])


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_problems_beyond_one_program_are_as_accurate(triton_backend, small_classes, metric):
    inputs = make_inputs([(40, 30), (3, 18), (5, 4)], metric=metric, reg=0.2)
    assert_as_accurate_as_plain(triton_backend.forward(inputs, None, 3, -1.0), inputs, 3)


def test_problems_beyond_one_program_stop_one_by_one(triton_backend, small_classes):
    inputs = make_inputs([(20, 17), (18, 2)], metric="cosine", reg=0.3)
    inputs.reg[1] = 30.0
    actual = triton_backend.forward(inputs, None, 12, 1e-3)
    assert actual[5][0] != actual[5][1]
    assert_as_accurate_as_plain(actual, inputs, 12, 1e-3)


def relaxed_stack(rho: float | None) -> Inputs:
    """Pairs and clouds with themselves of several size classes, in float64."""
    inputs = make_inputs([(9, 7), (40, 35), (21, 1)], metric="sqeuclidean", reg=2.0, dtype=torch.float64)
    if rho is not None:
        relaxation = torch.full((inputs.batch, 2), rho, dtype=torch.float64, device=DEVICE)
        inputs = inputs._replace(kind="unbalanced", relaxation=relaxation)
    return stacked(inputs)


@pytest.mark.parametrize("rho", [None, 0.7, 0.01])
def test_the_loop_of_geomloss_beyond_one_program_is_that_of_the_reference(triton_backend, small_classes, rho):
    inputs = relaxed_stack(rho)
    start = torch.linspace(1, 30, inputs.batch, dtype=torch.float64, device=DEVICE)
    loop = (start, torch.arange(inputs.batch, dtype=torch.int32, device=DEVICE) % 3, 0.3, 1e-4)
    for mine, want in zip(triton_backend.symmetric(inputs, *loop), reference.symmetric(inputs, *loop), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rho", [None, 0.7, 0.01])
@pytest.mark.parametrize(("tol", "max_iter"), [(-1.0, 3), (1e-3, 30), (1e-12, 4)])
def test_clouds_with_themselves_beyond_one_program_are_those_of_the_reference(
    triton_backend, small_classes, rho, tol, max_iter
):
    inputs = relaxed_stack(rho)
    schedule = Schedule(eps_start=4 * inputs.reg, eps_factor=0.5) if tol == 1e-3 else None
    outputs = triton_backend.forward(inputs, None, max_iter, tol, schedule)
    for mine, want in zip(outputs, reference.forward(inputs, None, max_iter, tol, schedule), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-11)


def test_gradients_over_several_tiles_match_the_reference(triton_backend, monkeypatch):
    from otkern.backends.triton import launch

    monkeypatch.setattr(launch, "BACKWARD", {dtype: entries[:1] for dtype, entries in launch.BACKWARD.items()})
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs([(20, 40), (3, 2)], metric="euclidean", dtype=dtype)
        _, f, g, *_ = reference.forward(inputs, None, 3, -1.0)
        dvalue = torch.tensor([1.0, -2.0], device=DEVICE)
        needs = (True, True, False, True, False)
        actual = triton_backend.backward(inputs, f, g, dvalue, needs)
        exact = reference.backward(in_fp64(inputs), f.double(), g.double(), dvalue.double(), needs)
        for ours, truth in zip(actual, exact, strict=True):
            if ours is not None:
                tolerance = 4 * torch.finfo(ours.dtype).eps if ours.dtype == torch.bfloat16 else 1e-5
                assert (ours.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("reg", [1e-4, 1e-2, 100.0])
def test_absorbed_potentials_are_as_accurate_at_extreme_reg(triton_backend, reg):
    inputs = make_inputs([(12, 9), (4, 16)], metric="sqeuclidean", reg=reg)
    assert_as_accurate_as_plain(triton_backend.forward(inputs, None, 12, -1.0), inputs, 12)


def test_tiny_weights_keep_their_marginals(triton_backend):
    inputs = make_inputs([(6, 7)], reg=0.05)
    inputs.a[0, 2], inputs.b[0, 3] = 1e-30, 1e-36
    assert_as_accurate_as_plain(triton_backend.forward(inputs, None, 8, -1.0), inputs, 8)


def test_close_pairs_keep_their_distance(triton_backend):
    """Clouds far from the origin with pairs much closer than the clouds are wide: |x|^2 + |y|^2 - 2<x, y> cancels."""
    inputs = make_inputs([(10, 10)], d=20, metric="euclidean", reg=0.01)
    inputs.x_b.copy_(inputs.x_a)
    inputs.x_b[0, ::2] += 1e-4
    inputs = inputs._replace(x_a=inputs.x_a + 50, x_b=inputs.x_b + 50)
    assert_as_accurate_as_plain(triton_backend.forward(inputs, None, 2, -1.0), inputs, 2)


def gradients(problem: Problem, solve) -> list[torch.Tensor]:
    """Gradients of the points, in fp64."""
    x, y = (t.detach().clone().requires_grad_() for t in problem[:2])
    return [t.cpu().double() for t in torch.autograd.grad(solve(problem._replace(x=x, y=y)).sum(), (x, y))]


def assert_gradients_as_accurate_as_plain(problem: Problem, iterations: int):
    def ours(p):
        points = (t.to(DEVICE) for t in p[:4])
        options = {"metric": p.metric, "reg": p.reg, "max_iter": iterations, "backend": "triton"}
        return otkern.solve_sample(*points, **options).value

    exact = gradients(problem.double(), lambda p: exact_value(p, iterations))
    plain = gradients(problem, lambda p: plain_value(p, iterations))
    for actual, theirs, truth in zip(gradients(problem, ours), plain, exact, strict=True):
        unit = torch.finfo(problem.x.dtype).eps * truth.abs().max()
        assert (actual - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 4 * unit


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_matched_near_duplicates_have_accurate_gradients(triton_backend, metric, offset):
    """Every point has its partner at a thousandth of the cloud's width, where alpha x - W y cancels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 20, generator=generator, dtype=torch.float64) + offset
    y = x + 1e-3 * torch.randn(12, 20, generator=generator, dtype=torch.float64)
    weights = make_weights(12, generator)
    for reg in (1e-2, 1.0):
        problem = Problem(x, y, weights, weights, metric, reg).to(torch.float32)
        assert_gradients_as_accurate_as_plain(problem, 5)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_tight_clusters_have_accurate_gradients(triton_backend, monkeypatch, metric):
    """Several near partners a point, copies among them, over more than one tile."""
    from otkern.backends.triton import launch

    monkeypatch.setattr(launch, "BACKWARD", {dtype: entries[:1] for dtype, entries in launch.BACKWARD.items()})
    generator = torch.Generator().manual_seed(2)
    centres = 3 + torch.randn(4, 20, generator=generator, dtype=torch.float64)
    x, y = (
        centres.repeat(5, 1)[:n] + 1e-3 * torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (18, 20)
    )
    y[3] = x[3]
    problem = Problem(x, y, make_weights(18, generator), make_weights(20, generator), metric, 1e-3)
    assert_gradients_as_accurate_as_plain(problem.to(torch.float32), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_powers_of_two_change_no_bit_of_cosine(triton_backend, dtype):
    """Points whose squares overflow or vanish, and a zero vector, against the same directions at ordinary length."""
    plain = make_inputs([(7, 5), (3, 4)], d=20, dtype=dtype)
    plain.x_a[0, 2] = 0
    exponents = (-600, 0, 600) if dtype == torch.float64 else (-90, 0, 90)
    lengths_x, lengths_y = (
        2.0 ** torch.tensor(exponents, dtype=torch.float64, device=DEVICE).repeat(x.shape[1])[: x.shape[1], None]
        for x in (plain.x_a, plain.x_b)
    )
    extreme = plain._replace(x_a=plain.x_a * lengths_x.to(dtype), x_b=plain.x_b * lengths_y.to(dtype))
    results = []
    for inputs in (plain, extreme):
        forward = triton_backend.forward(inputs, None, 4, -1.0)
        f, g, ones = forward[1], forward[2], torch.ones_like(forward[0])
        dx, dy, *rest = triton_backend.backward(inputs, f, g, ones, (True, True, False, True, True))
        product = triton_backend.apply(inputs, f, g, torch.ones_like(plain.x_b, dtype=f.dtype), False, True)
        results.append((*forward, *rest, product, dx, dy))
    ordinary, scaled = results
    for ours, theirs in zip(scaled[:-2], ordinary[:-2], strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    for ours, theirs, length in zip(scaled[-2:], ordinary[-2:], (lengths_x, lengths_y), strict=True):
        assert torch.equal(ours.double() * length, theirs.double())


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_extreme_norms_are_as_accurate_in_cosine(triton_backend, scale):
    inputs = make_inputs([(9, 7)], d=20)
    inputs = inputs._replace(x_a=inputs.x_a * scale, x_b=inputs.x_b / scale**0.5)
    actual = triton_backend.forward(inputs, None, 4, -1.0)
    assert_as_accurate_as_plain(actual, inputs, 4)
    ones, needs = torch.ones_like(actual[0]), (True, True, False, False, False)
    dx, dy, *_ = triton_backend.backward(inputs, actual[1], actual[2], ones, needs)
    exact = reference.backward(in_fp64(inputs), actual[1].double(), actual[2].double(), ones.double(), needs)
    for ours, truth in zip((dx, dy), exact, strict=False):
        assert (ours.double() - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 1, 3)])
def test_offsets_beyond_32_bits_reach_their_points(triton_backend, shape):
    """The third row, or the third item, starts after more than 2^31 elements, none of which is ever touched."""
    apart = 2**30 + 8
    elements = 2 * apart + 16
    if DEVICE == "cuda":
        storage = torch.zeros(elements, dtype=torch.int16, device=DEVICE)
    else:
        storage = torch.from_numpy(numpy.zeros(elements, dtype=numpy.int16))
    strides = (apart, 3, 1) if shape[0] == 3 else (3 * apart, apart, 1)
    x = storage.view(torch.bfloat16).as_strided(shape, strides)
    x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    y = torch.randn(shape[0], 2, 3, generator=torch.Generator().manual_seed(4)).to(DEVICE, torch.bfloat16)
    reg = torch.ones(shape[0], device=DEVICE)
    far = Inputs(x, y, None, None, None, reg, None, None, None, None, None, shape[1], 2, "cosine")
    near = far._replace(x_a=x.contiguous())
    for ours, theirs in zip(*(triton_backend.forward(inputs, None, 2, -1.0) for inputs in (far, near)), strict=True):
        assert torch.equal(ours, theirs)


def test_round_down_never_loosens_a_tolerance():
    from otkern.backends.triton.launch import round_down

    for tol in (1e-3, 0.1, 1e-12, 0.0, 0.5, 1e-45, -1.0):
        assert round_down(tol) <= tol
    assert round_down(0.5) == 0.5


def test_importing_the_package_does_not_import_triton():
    code = "import sys, otkern, otkern.backends.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the interpreter has neither streams nor graphs")


@needs_gpu
def test_nothing_waits_for_the_device(triton_backend):
    inputs = make_inputs([(200, 150), (60, 70), (5, 9)], d=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, f, g, *_ = triton_backend.forward(inputs, None, 20, 1e-3)
        triton_backend.backward(inputs, f, g, torch.ones_like(value), (True, True, False, True, True))
        triton_backend.apply(inputs, f, g, inputs.x_b.nan_to_num(), False, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_call_can_be_captured_in_a_graph(triton_backend):
    inputs = make_inputs([(100, 128), (60, 70), (5, 9)], d=64)
    expected = triton_backend.forward(inputs, None, 20, 1e-3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_backend.forward(inputs, None, 20, 1e-3)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "dot"])
def test_every_class_is_as_accurate_on_the_device(triton_backend, dtype, metric):
    sizes = [(1, 1), (16, 16), (17, 3), (32, 32), (64, 33), (64, 64), (65, 2), (128, 128), (129, 100), (300, 260)]
    for d in (64, 67):
        reg = 0.1 if metric == "cosine" else 0.1 * d
        inputs = make_inputs(sizes, d=d, metric=metric, dtype=dtype, reg=reg)
        assert_as_accurate_as_plain(triton_backend.forward(inputs, None, 10, -1.0), inputs, 10)
