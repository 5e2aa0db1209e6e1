"""What only the native module has: threads, SIMD levels, low-precision loads, its input check, its build modes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from otkern import debiasing
from otkern.backends import cpu, reference
from otkern.problem import Inputs

ROOT = Path(__file__).resolve().parent.parent

needs_native = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
METRICS = ("sqeuclidean", "euclidean", "cosine", "dot", "cost")


def make_inputs(metric, dtype, sizes_a, sizes_b, *, d=40, reg=0.2, weights=True, seed=0):
    """A padded batch with NaN in the padding, zero weights, coincident points and, for costs, masked entries."""
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    batch, n, m = len(sizes_a), max(sizes_a), max(sizes_b)
    x_a = torch.randn(batch, n, d, generator=generator, dtype=torch.float64) / d**0.5
    x_b = torch.randn(batch, m, d, generator=generator, dtype=torch.float64) / d**0.5
    cost = torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    a, b = torch.rand(batch, n, generator=generator) + 0.1, torch.rand(batch, m, generator=generator) + 0.1
    for i, (rows, columns) in enumerate(zip(sizes_a, sizes_b, strict=True)):
        x_b[i, 0] = x_a[i, 0]
        if rows > 2 and columns > 2:
            a[i, 1], b[i, 2], cost[i, 0, 1], cost[i, 2, 0] = 0, 0, torch.inf, torch.inf
        x_a[i, rows:], x_b[i, columns:], cost[i, rows:], cost[i, :, columns:] = (torch.nan,) * 4
        a[i, rows:], b[i, columns:] = 0, 0
    a, b = (w.to(compute) / w.to(compute).sum(1, keepdim=True) for w in (a, b))
    points = metric != "cost"
    return Inputs(
        x_a=x_a.to(dtype) if points else None,
        x_b=x_b.to(dtype) if points else None,
        cost=None if points else cost.to(dtype),
        a=a if weights else None,
        b=b if weights else None,
        reg=torch.full((batch,), reg, dtype=compute),
        relaxation=None,
        lengths_a=torch.tensor(sizes_a, dtype=torch.int32),
        lengths_b=torch.tensor(sizes_b, dtype=torch.int32),
        cu_seqlens_a=None,
        cu_seqlens_b=None,
        max_a=n,
        max_b=m,
        metric=metric,
    )


def everything(backend, inputs, max_iter=30, tol=-1.0):
    """All outputs of forward, backward and apply, None left out."""
    value, f, g, multipliers, error, n_iters = backend.forward(inputs, None, max_iter, tol)
    dvalue = torch.linspace(0.5, 1.5, inputs.batch, dtype=value.dtype)
    points = inputs.cost is None
    grads = backend.backward(inputs, f, g, dvalue, (points, points, not points, inputs.a is not None, True))
    out = [value, f, g, multipliers, error, n_iters, *grads]
    for transpose in (False, True):
        rows = inputs.max_a if transpose else inputs.max_b
        v = torch.linspace(-1, 1, inputs.batch * rows * 3, dtype=value.dtype).reshape(inputs.batch, rows, 3)
        out += [backend.apply(inputs, f, g, v, transpose, times_cost) for times_cost in (False, True)]
    return [tensor for tensor in out if tensor is not None]


def assert_same_bits(one, other):
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first, second)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def simd_level():
    from otkern import _native

    before = _native.cpu_level()
    yield _native.set_cpu_level
    _native.set_cpu_level(before)


@needs_native
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [((5, 33, 64, 1, 70), (9, 64, 31, 2, 129)), ((300,), (261,)), ((270, 3), (40, 500))])
def test_bits_do_not_depend_on_the_number_of_threads(metric, sizes, threads):
    inputs = make_inputs(metric, torch.float32, *sizes)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(everything(cpu, inputs) + everything(cpu, inputs, 200, 1e-4))
    for result in results[1:]:
        assert_same_bits(results[0], result)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_every_simd_level_is_accurate(metric, dtype, simd_level):
    from otkern import _native

    inputs = make_inputs(metric, dtype, (5, 33, 1, 70), (9, 64, 3, 50), d=61)
    exact = everything(reference, Inputs(*(double(field) for field in inputs)))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    for level in _native.cpu_levels():
        simd_level(level)
        assert _native.cpu_level() == level
        for got, want in zip(everything(cpu, inputs), exact, strict=True):
            got, want = got.double(), want.double()
            assert torch.equal(got.isinf(), want.isinf())
            scale = max(1e-2, float(want[want.isfinite()].abs().max()))
            assert float((got - want)[want.isfinite()].abs().max()) <= tolerance * scale, level


def double(field):
    return field.double() if isinstance(field, torch.Tensor) and field.is_floating_point() else field


@needs_native
def test_an_unknown_simd_level_is_refused():
    from otkern import _native

    with pytest.raises(ValueError, match="cpu_levels"):
        _native.set_cpu_level("mmx")


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_low_precision_is_float32_arithmetic_on_the_same_numbers(metric, dtype):
    low = make_inputs(metric, dtype, (5, 33, 20), (9, 64, 3))
    full = low._replace(
        **{name: getattr(low, name).float() for name in ("x_a", "x_b", "cost") if getattr(low, name) is not None}
    )
    for got, want in zip(everything(cpu, low), everything(cpu, full), strict=True):
        assert torch.equal(got, want.to(got.dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_low_precision_number_is_read_and_rounded_as_torch_does(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    batch = len(numbers)
    one = make_inputs("cost", dtype, (1,), (1,), weights=False)
    inputs = one._replace(cost=numbers.view(-1, 1, 1), reg=torch.ones(batch), lengths_a=None, lengths_b=None)
    # A single pair: f = g = C / 2, and the gradient of the value with respect to its cost is 1.
    _, f, g, *_ = cpu.forward(inputs, None, 2, -1.0)
    assert torch.equal((f + g).flatten(), numbers.float())
    generator = torch.Generator().manual_seed(0)
    dvalue = torch.randn(batch, generator=generator) * 2.0 ** torch.randint(-30, 20, (batch,), generator=generator)
    _, _, dcost, *_ = cpu.backward(inputs._replace(cost=inputs.cost * 0), f * 0, g * 0, dvalue, (0, 0, 1, 0, 0))
    assert torch.equal(dcost.flatten(), dvalue.to(dtype))


@needs_native
def test_a_cost_too_large_to_keep_is_computed_again(monkeypatch, threads):
    inputs = make_inputs("cosine", torch.float64, (150, 30), (140, 70))
    kept = everything(cpu, inputs)
    monkeypatch.setattr(cpu, "STORE_BYTES", 1000)
    streamed = everything(cpu, inputs)
    for one, other in zip(kept, streamed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    threads(3)
    assert_same_bits(streamed, everything(cpu, inputs))


def loop(backend, inputs, eps_start=4.0):
    """GeomLoss's loop with ladders of several lengths."""
    start = torch.full((inputs.batch,), eps_start, dtype=inputs.reg.dtype)
    steps = torch.arange(inputs.batch, dtype=torch.int32) % 4
    return backend.symmetric(inputs, start, steps, 0.25, 1e-4, True)


@needs_native
@pytest.mark.parametrize("eps_start", [4.0, 1e-3])
@pytest.mark.parametrize("relaxation", [None, (0.3, torch.inf)])
@pytest.mark.parametrize("metric", METRICS)
def test_every_simd_level_runs_the_loop_of_geomloss(metric, relaxation, eps_start, simd_level):
    from otkern import _native

    # An eps_start far below the costs leaves the range in which one exponential serves rows and columns.
    inputs = make_inputs(metric, torch.float64, (5, 33, 1, 70), (9, 64, 3, 50), d=61, reg=1e-2)
    if relaxation is not None:
        relaxation = torch.tensor(relaxation, dtype=torch.float64).expand(inputs.batch, 2)
        inputs = inputs._replace(kind="unbalanced", relaxation=relaxation)
    for problem in [inputs] if metric == "cost" else [inputs, debiasing.stacked(inputs)]:
        exact = loop(reference, problem, eps_start)
        for level in _native.cpu_levels():
            simd_level(level)
            for got, want in zip(loop(cpu, problem, eps_start), exact, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loop_of_geomloss_does_not_depend_on_threads_or_batch_mates(dtype, monkeypatch, threads):
    inputs = make_inputs("euclidean", dtype, (300, 5, 33, 130), (261, 9, 64, 130))
    problem = debiasing.stacked(inputs)
    for store_bytes in (cpu.STORE_BYTES, 1000):
        monkeypatch.setattr(cpu, "STORE_BYTES", store_bytes)
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            results.append(loop(cpu, problem))
            assert_same_bits(results[0], results[-1])
        alone = (field[1:2] if isinstance(field, torch.Tensor) else field for field in inputs)  # no cloud with itself
        start, steps = torch.full((1,), 4.0, dtype=dtype), torch.ones(1, dtype=torch.int32)
        out = cpu.symmetric(Inputs(*alone), start, steps, 0.25, 1e-4, True)
        for one, many in zip(out, results[0], strict=True):
            assert torch.equal(one[0], many[1, : one.shape[1]])
        # Half of the entries of a cloud with itself say what all of them do.
        narrow = dtype == torch.float32
        for got, want in zip(results[0], loop(cpu, problem._replace(first_self=-1)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4 if narrow else 1e-12, atol=1e-5 if narrow else 1e-12)


@needs_native
@pytest.mark.parametrize("reg", [1e-5, 1e-4, 1e-2, 1.0, 100.0])
def test_iterations_match_the_log_domain_at_every_reg(reg):
    inputs = make_inputs("sqeuclidean", torch.float64, (20, 40, 7), (30, 11, 40), d=6, reg=reg)
    exact, got = reference.forward(inputs, None, 60, -1.0), cpu.forward(inputs, None, 60, -1.0)
    for mine, theirs in zip(got[:3], exact[:3], strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-12 * max(1.0, reg)


@needs_native
def test_non_finite_points_within_the_length_are_named():
    for metric, name, label in (("cosine", "x_a", "X_a"), ("dot", "x_b", "X_b"), ("cost", "cost", "M")):
        inputs = make_inputs(metric, torch.float32, (4, 5, 3), (5, 4, 5))
        bad = getattr(inputs, name).clone()
        bad[2, 1, 1] = -torch.inf
        with pytest.raises(ValueError, match=rf"^{label} must .*item 2"):
            cpu.forward(inputs._replace(**{name: bad}), None, 3, -1.0)
        cpu.forward(inputs._replace(**{name: bad}), None, 3, -1.0, check=False)
        with pytest.raises(ValueError, match=rf"^{label} must .*item 2"):
            loop(cpu, inputs._replace(**{name: bad}))


@needs_native
def test_huge_and_tiny_points_are_not_taken_for_bad_input():
    inputs = make_inputs("cosine", torch.float32, (6,), (6,), weights=False)
    want = cpu.forward(inputs, None, 20, -1.0)
    for power in (100, -130):
        scaled = inputs._replace(x_a=torch.ldexp(inputs.x_a, torch.tensor(power)))
        for got, expected in zip(cpu.forward(scaled, None, 20, -1.0), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@needs_native
def test_a_forked_child_computes_the_same_bits():
    script = """
        import os, sys, torch
        sys.path.insert(0, "tests")
        from test_native import everything, make_inputs, cpu
        torch.set_num_threads(2)
        inputs = make_inputs("cosine", torch.float32, (64,) * 16 + (300,), (64,) * 16 + (280,), d=256)
        before = everything(cpu, inputs)
        child = os.fork()
        if child == 0:
            after = everything(cpu, inputs)
            # numpy compares: torch's own parallel loops do not survive a fork.
            same = all((x.numpy() == y.numpy()).all() for x, y in zip(before, after))
            os._exit(0 if same else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True, timeout=120)


def build(mode, folder, **environment):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "build")]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OTKERN_BUILD": mode, **environment}, capture_output=True, text=True
    )


def test_python_mode_builds_nothing_native(tmp_path):
    done = build("python", tmp_path)
    assert done.returncode == 0
    assert "pure Python package" in done.stderr
    assert list(tmp_path.rglob("otkern/solve.py"))
    assert not list(tmp_path.rglob("*.so"))


def test_auto_mode_without_a_compiler_says_so(tmp_path):
    done = build("auto", tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0
    assert "no C++ compiler was found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_auto_mode_with_a_broken_compiler_says_so(tmp_path):
    done = build("auto", tmp_path, CXX="false")
    assert done.returncode == 0
    assert "the C++ build failed" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_cpu_mode_fails_loudly_without_a_working_compiler(tmp_path, compiler):
    done = build("cpu", tmp_path, CXX=compiler)
    assert done.returncode != 0
    assert "OTKERN_BUILD=cpu failed" in done.stderr


def test_cuda_mode_fails_loudly_without_nvcc(tmp_path):
    done = build("cuda", tmp_path, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "OTKERN_BUILD=cuda failed: no nvcc was found" in done.stderr


def test_unknown_modes_fail_loudly(tmp_path):
    done = build("rocm", tmp_path)
    assert done.returncode != 0
    assert "OTKERN_BUILD must be one of" in done.stderr


CHOICES = [
    # mode, OTKERN_CUDA_ARCHS, visible GPUs, torch: targets, and what the sentence says
    ("auto", None, [], "cpu", [], "torch is a CPU build"),
    ("auto", None, [], "cuda", ["80", "90", "100"], "torch is a CUDA build (OTKERN_BUILD=cpu leaves it out)"),
    ("auto", None, [], None, ["80", "90", "100"], "torch cannot be asked (OTKERN_BUILD=cpu leaves it out)"),
    ("auto", None, ["8.9"], "cpu", ["80"], "compute capability 8.9"),
    ("auto", None, ["9.0", "8.6", "9.0"], "cuda", ["80", "90"], "8.6, 9.0"),
    ("auto", None, ["12.0"], "cuda", ["100"], "12.0"),
    ("auto", None, ["7.5"], "cuda", [], "7.5"),
    ("cuda", None, [], "cpu", ["80", "90", "100"], "OTKERN_BUILD=cuda"),
    ("cuda", None, ["9.0"], "cuda", ["90"], "9.0"),
    ("auto", "all", [], "cpu", ["80", "90", "100"], "OTKERN_CUDA_ARCHS=all"),
    ("auto", "sm_90a, 80", ["10.0"], "cuda", ["80", "90"], "OTKERN_CUDA_ARCHS"),
]


@pytest.fixture(scope="module")
def setup_module_functions():
    """The functions of setup.py, which ends by building."""
    source = (ROOT / "setup.py").read_text(encoding="utf-8").rsplit("\nsetup(", 1)[0]
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "setup_functions"}
    exec(compile(source, "setup.py", "exec"), names)
    return names


@pytest.mark.parametrize(("mode", "named", "visible", "build", "targets", "sentence"), CHOICES)
def test_the_cuda_half_is_built_where_it_can_be_used(
    setup_module_functions, mode, named, visible, build, targets, sentence
):
    chosen, why = setup_module_functions["choose_targets"](mode, named, visible, build)
    assert chosen == targets and sentence in why


def test_an_unknown_target_is_named(setup_module_functions):
    with pytest.raises(
        SystemExit, match="OTKERN_CUDA_ARCHS must be all or among sm_80, sm_90a, sm_100, but was 'sm_70'"
    ):
        setup_module_functions["choose_targets"]("auto", "sm_70", [], None)


def test_torch_is_asked_without_being_imported(setup_module_functions):
    assert setup_module_functions["torch_build"]() == ("cpu" if torch.version.cuda is None else "cuda")
