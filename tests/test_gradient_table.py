"""Every entry of the table in docs/gradients.md: each output, by each mode, with respect to each input."""

import itertools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import otkern
from tests.problems import METRICS, make_weights, offsets, relative_error

INF = math.inf
DOCUMENT = Path(__file__).parent.parent / "docs" / "gradients.md"
MODES = ("envelope", "implicit", "unrolled", "detach")
N, M, D = 2, 3, 2

# By costs and by points in turn, so that both see every kind of problem somewhere.
KINDS = {
    "balanced": {},
    "unbalanced": {"unbalanced": ("rho_a", "rho_b")},
    "one side": {"unbalanced": (INF, "rho_b")},
    "partial": {"mass": "mass"},
    "null": {"null_cost": "null_cost"},
}
PARAMETERS = {"rho_a": 0.9, "rho_b": 0.6, "mass": 0.5, "null_cost": 0.4}

# At a reg of the size of the cost.
CONVERGED = {"max_iter": 300, "tol": 1e-13, "implicit_tol": 1e-14}
STEP = 2e-5  # of central differences: errs by its square and by 1e-13 over it, about 1e-8
CLOSE = 1e-6


def inputs_of(source: str, kind: str) -> dict[str, torch.Tensor]:
    """The unbatched inputs of a problem, float64; weights far from uniform, masses that differ."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    if source == "cost":
        tensors["M"] = torch.rand(N, M, generator=generator, dtype=torch.float64)
    else:
        tensors["X_a"] = 0.7 * torch.randn(N, D, generator=generator, dtype=torch.float64)
        tensors["X_b"] = 0.7 * torch.randn(M, D, generator=generator, dtype=torch.float64) + 0.3
    tensors["a"] = 1.2 * torch.tensor([0.6, 0.4], dtype=torch.float64)
    tensors["b"] = 0.9 * torch.tensor([0.15, 0.5, 0.35], dtype=torch.float64)
    tensors["reg"] = torch.tensor(0.6, dtype=torch.float64)
    used = itertools.chain(*(v if isinstance(v, tuple) else (v,) for v in KINDS[kind].values()))
    for name in used:
        if isinstance(name, str):
            tensors[name] = torch.tensor(PARAMETERS[name], dtype=torch.float64)
    return tensors


def solve(tensors: dict[str, torch.Tensor], kind: str, metric: str, **options) -> otkern.OTResult:
    """The batch of problems that these batched inputs describe."""
    a, b = tensors["a"], tensors["b"]
    if kind == "balanced":
        a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)

    def given(value):
        return tensors[value] if isinstance(value, str) else value

    relaxation = {
        name: tuple(map(given, value)) if isinstance(value, tuple) else given(value)
        for name, value in KINDS[kind].items()
    }
    common = {"reg": tensors["reg"], **relaxation, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every solve converges
        if "M" in tensors:
            return otkern.solve(tensors["M"], a, b, **common)
        return otkern.solve_sample(tensors["X_a"], tensors["X_b"], a, b, metric=metric, **common)


def some(*shape: int) -> torch.Tensor:
    """Weights that tell every entry from every other."""
    return torch.sin(1.7 * torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)).reshape(shape)


def scalars(result: otkern.OTResult, wanted=None) -> dict[str, torch.Tensor]:
    """One number (B,) of each output, which depends on all of it; of all outputs, or of those that are wanted."""
    device = result.value.device

    def total(output: torch.Tensor) -> torch.Tensor:
        return (output * some(*output.shape[1:]).to(device)).flatten(1).sum(1)

    v = some(M, 2).to(device).expand(len(result.value), M, 2)
    outputs = {
        "value": lambda: result.value,
        "value_linear": lambda: result.value_linear,
        "plan": lambda: total(result.plan),
        "plan_operator @ v": lambda: total(result.plan_operator @ v),
        "potentials": lambda: sum(map(total, result.potentials)),
        "marginal_a, marginal_b": lambda: total(result.marginal_a) + total(result.marginal_b),
        "barycentric_map": lambda: total(result.barycentric_map(v)),
    }
    return {name: output() for name, output in outputs.items() if wanted is None or name in wanted}


def table() -> dict[tuple[str, str], str]:
    """(output, mode) -> entry, as the document has it."""
    rows = [line.strip().strip("|").split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    modes = [re.search(r'"(\w+)"', cell).group(1) for cell in rows[0][1:]]
    return {
        (row[0].replace("`", "").strip(), mode): cell.strip()
        for row in rows[2:]
        for mode, cell in zip(modes, row[1:], strict=True)
    }


def directions_of(tensor: torch.Tensor, few: bool) -> torch.Tensor:
    """Unit directions of a tensor's space (K, ...), or one that is none of them."""
    if few:
        return some(*tensor.shape).unsqueeze(0) if tensor.dim() else torch.ones(1, dtype=torch.float64)
    return torch.eye(max(tensor.numel(), 1), dtype=torch.float64).reshape(-1, *tensor.shape)


def differences(function, tensors: dict, few: bool, device: str) -> dict[str, tuple[torch.Tensor, dict]]:
    """Per input its directions (K, ...), and per output the central differences (K,); all from one batch."""
    moved = [(name, direction) for name, tensor in tensors.items() for direction in directions_of(tensor, few)]
    batch = {
        key: torch.stack(
            [t + sign * STEP * (d if name == key else torch.zeros_like(t)) for name, d in moved for sign in (1, -1)]
        ).to(device)
        for key, t in tensors.items()
    }
    slopes = {k: ((v[0::2] - v[1::2]) / (2 * STEP)).detach().cpu() for k, v in function(batch).items()}
    found, start = {}, 0
    for name, tensor in tensors.items():
        directions = directions_of(tensor, few)
        stop = start + len(directions)
        found[name] = directions, {output: slope[start:stop] for output, slope in slopes.items()}
        start = stop
    return found


def assert_derivatives(function, tensors: dict, few: bool, device: str) -> None:
    """The gradients of every output of ``function`` (a dict of (B,) from batched inputs) are those of differences."""
    expected = differences(function, tensors, few, device)
    leaves = {name: t.unsqueeze(0).to(device).requires_grad_() for name, t in tensors.items()}
    for output, value in function(leaves).items():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="otkern:")  # no implicit solve ends above its tolerance
            gradients = torch.autograd.grad(value.sum(), list(leaves.values()), retain_graph=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            directions, slopes = expected[name]
            actual = (directions * gradient.cpu()[0]).reshape(len(directions), -1).sum(1)
            scale = slopes[output].abs().max().clamp(min=0.1)
            assert ((actual - slopes[output]).abs().max() / scale) < CLOSE, f"{output} with respect to {name}"


def cases(mode: str):
    """(kind, source, metric, reg_type): each kind by costs and by points, all metrics."""
    for i, (kind, reg_type) in enumerate(itertools.product(KINDS, ("KL", "entropy"))):
        yield kind, "cost", "sqeuclidean", reg_type
        if reg_type == "KL" or mode == "unrolled":
            yield kind, "points", METRICS[i % 4], reg_type


def options_of(mode: str, backend: str) -> dict:
    options = {"grad": mode, "backend": backend, "check": False}
    return options | (CONVERGED if mode != "unrolled" else {"max_iter": 5})


@pytest.mark.parametrize(("kind", "source", "metric", "reg_type"), list(cases("envelope")))
@pytest.mark.parametrize("mode", ["envelope", "implicit"])
def test_gradients_are_exact_at_convergence(backend, device, interpreted, mode, kind, source, metric, reg_type):
    options = options_of(mode, backend) | {"reg_type": reg_type}
    # All but the value are the same in both modes.
    tested = None if mode == "envelope" else ("value", "plan")

    def function(tensors):
        return scalars(solve(tensors, kind, metric, **options), tested)

    assert_derivatives(function, inputs_of(source, kind), interpreted, device)


SCHEDULES = [{}, {"update": "symmetric"}, {"overrelaxation": 1.4}, {"scaling": 0.7, "max_iter": 9}]


@pytest.mark.parametrize(("kind", "source", "metric", "reg_type"), list(cases("unrolled")))
def test_unrolled_gradients_are_exact_for_the_iterations_that_ran(kind, source, metric, reg_type):
    def function(tensors):
        return scalars(solve(tensors, kind, metric, reg_type=reg_type, **options_of("unrolled", "reference")))

    assert_derivatives(function, inputs_of(source, kind), False, "cpu")


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=lambda schedule: next(iter(schedule)))
@pytest.mark.parametrize("kind", KINDS)
def test_unrolled_gradients_are_exact_for_every_way_to_iterate(kind, schedule):
    if kind == "partial" and "scaling" not in schedule:
        pytest.skip("problems with a given mass take alternating, plain updates only")
    inputs = inputs_of("cost", kind)
    if "scaling" in schedule:
        # The schedule starts from the largest cost, as a constant: one that no direction changes.
        inputs["M"][0, 0] = 2.0
    options = options_of("unrolled", "reference") | schedule

    def function(tensors):
        tensors = dict(tensors)
        if "scaling" in schedule:
            tensors["M"] = torch.cat(
                [tensors["M"][:, :1, :1].detach() * 0 + 2.0, tensors["M"].flatten(1)[:, None, 1:]], 2
            )
            tensors["M"] = tensors["M"].reshape(-1, N, M)
        return scalars(solve(tensors, kind, "sqeuclidean", **options))

    assert_derivatives(function, inputs, False, "cpu")


def test_unrolled_gradients_follow_a_solve_that_stopped_by_itself():
    options = options_of("unrolled", "reference") | {"max_iter": 50, "tol": 1e-3}
    tensors = inputs_of("cost", "unbalanced")
    one = {name: t.unsqueeze(0) for name, t in tensors.items()}
    assert 2 < solve(one, "unbalanced", "", **options).n_iters.item() < 50
    assert_derivatives(lambda t: scalars(solve(t, "unbalanced", "", **options)), tensors, False, "cpu")


def test_only_the_reference_unrolls(backend, device):
    tensors = {name: t.unsqueeze(0).to(device) for name, t in inputs_of("cost", "balanced").items()}
    if backend == "reference":
        assert solve(tensors, "balanced", "", grad="unrolled", backend=backend).value.isfinite()
    else:
        with pytest.raises(ValueError, match="kept by the reference backend only"):
            solve(tensors, "balanced", "", grad="unrolled", backend=backend)
    assert "reference" in repr(solve(tensors, "balanced", "", grad="unrolled"))


@pytest.mark.parametrize("kind", KINDS)
def test_detach_makes_constants(backend, device, kind):
    leaves = {name: t.unsqueeze(0).to(device).requires_grad_() for name, t in inputs_of("points", kind).items()}
    for value in scalars(solve(leaves, kind, "cosine", grad="detach", backend=backend, max_iter=5)).values():
        assert not value.requires_grad


def test_the_table_is_what_was_tested_here():
    outputs = scalars(
        solve(
            {k: t.unsqueeze(0) for k, t in inputs_of("cost", "balanced").items()}, "balanced", "", backend="reference"
        )
    )
    entries = {"envelope": "at convergence", "implicit": "at convergence", "unrolled": "exact", "detach": "none"}
    expected = {(output, mode): entries[mode] for output in outputs for mode in MODES}
    expected["value", "envelope"] = "at convergence, twice"
    assert table() == expected


# Second derivatives.


@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "one side", "partial", "null"])
@pytest.mark.parametrize("metric", ["cost", *METRICS])
def test_hessian_vector_products_are_those_of_differenced_gradients(backend, device, interpreted, metric, kind):
    source = "cost" if metric == "cost" else "points"
    options = options_of("envelope", backend)

    def function(tensors):
        tensors = {name: t if t.requires_grad else t.requires_grad_() for name, t in tensors.items()}
        value = solve(tensors, kind, metric, **options).value
        gradients = torch.autograd.grad(value.sum(), list(tensors.values()), create_graph=True)
        products = (
            (g * some(*g.shape[1:]).to(device) if g.dim() > 1 else g).reshape(len(value), -1).sum(1) for g in gradients
        )
        return {f"the gradient of {name}": product for name, product in zip(tensors, products, strict=True)}

    assert_derivatives(function, inputs_of(source, kind), interpreted, device)


def test_gradgradcheck_passes(backend, device):
    tensors = {name: t.to(device).requires_grad_() for name, t in inputs_of("cost", "unbalanced").items()}
    names = [name for name in tensors if name not in ("rho_a", "rho_b")]

    def value(*given):
        batched = {name: t.unsqueeze(0) for name, t in (tensors | dict(zip(names, given, strict=True))).items()}
        return solve(batched, "unbalanced", "", **options_of("envelope", backend)).value

    assert torch.autograd.gradgradcheck(value, [tensors[name] for name in names], fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["implicit", "unrolled"])
def test_only_the_envelope_is_differentiated_twice(kind, mode):
    leaves = {name: t.unsqueeze(0).requires_grad_() for name, t in inputs_of("cost", kind).items()}
    value = solve(leaves, kind, "", grad=mode, max_iter=5, backend="reference").value
    with pytest.raises(NotImplementedError, match="not differentiable again"):
        torch.autograd.grad(value.sum(), leaves["M"], create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_third_derivative_raises(backend, device, kind):
    leaves = {name: t.unsqueeze(0).to(device).requires_grad_() for name, t in inputs_of("points", kind).items()}
    value = solve(leaves, kind, "sqeuclidean", **options_of("envelope", backend)).value
    (first,) = torch.autograd.grad(value.sum(), leaves["X_a"], create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(first.square().sum(), leaves["X_a"], create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_raises_for_every_input(backend, device, kind):
    tensors = {name: t.unsqueeze(0).to(device) for name, t in inputs_of("points", kind).items()}
    for name in tensors:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                solve(tensors | {name: dual}, kind, "dot", max_iter=2, backend=backend)


# Agreement between modes, layouts and backends; weights of zero.


@pytest.mark.parametrize("kind", KINDS)
def test_the_modes_agree_at_convergence(kind):
    gradients = {}
    for mode in ("envelope", "implicit", "unrolled"):
        leaves = {name: t.unsqueeze(0).requires_grad_() for name, t in inputs_of("cost", kind).items()}
        value = solve(leaves, kind, "", grad=mode, max_iter=300, tol=1e-12, backend="reference").value
        gradients[mode] = torch.autograd.grad(value.sum(), list(leaves.values()))
    for mode in ("implicit", "unrolled"):
        for one, other in zip(gradients[mode], gradients["envelope"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_implicit_gradients_do_not_feel_their_batch(backend, device, kind, layout):
    sizes, generator = [(5, 4), (3, 6), (1, 2)], torch.Generator().manual_seed(0)
    sides = [
        [torch.randn(size[k], D, generator=generator, dtype=torch.float64).to(device) for size in sizes] for k in (0, 1)
    ] + [[make_weights(size[k], generator).to(device) for size in sizes] for k in (0, 1)]
    parameters = {"unbalanced": (0.9, 0.6), "one side": (INF, 0.6), "partial": 0.5, "null": 0.4}
    argument = {"unbalanced": "unbalanced", "one side": "unbalanced", "partial": "mass", "null": "null_cost"}
    options = {"reg": 0.8, "max_iter": 40, "backend": backend, "metric": "euclidean"}
    if kind != "balanced":
        options[argument[kind]] = parameters[kind]

    def gradients(leaves, **more):
        result = otkern.solve_sample(*leaves, **options, **more)
        loss = result.plan.square().sum() + result.potential_a.square().sum() + result.value_linear.sum()
        return torch.autograd.grad(loss, leaves)

    if layout == "packed":
        leaves = [torch.cat(side).requires_grad_() for side in sides]
        more = {f"cu_seqlens_{s}": offsets(side).to(device) for s, side in zip("ab", sides, strict=False)}
    else:
        leaves = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=INF) for side in sides]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        more = {f"lengths_{s}": [len(t) for t in side] for s, side in zip("ab", sides, strict=False)}
    whole = gradients(leaves, **more)
    for i in range(3):
        alone = gradients([side[i].clone().requires_grad_() for side in sides])
        for k, expected in enumerate(alone):
            start = sum(len(t) for t in sides[k][:i])
            size = len(sides[k][i])
            mine = whole[k][start : start + size] if layout == "packed" else whole[k][i, :size]
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
            if layout == "padded":
                assert whole[k][i, size:].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["value", "value_linear", "plan", "potentials"])
def test_a_weight_of_zero_has_the_one_sided_derivative(backend, device, kind, output):
    tensors = inputs_of("cost", kind)
    tensors["a"][1] = tensors["b"][0] = 0
    # A potential is as exact as its row's marginal error over its weight.
    options = options_of("envelope", backend) | {"max_iter": 100, "tol": None}
    leaves = {name: t.unsqueeze(0).to(device).requires_grad_() for name, t in tensors.items()}
    loss = scalars(solve(leaves, kind, "", **options))[output].sum()
    gradients = dict(zip("ab", torch.autograd.grad(loss, (leaves["a"], leaves["b"])), strict=True))
    step = 1e-6  # the error of a one-sided difference is of its order
    for name, index in (("a", 1), ("b", 0)):
        more = tensors[name].clone()
        more[index] += step
        moved = {k: (more if k == name else t).unsqueeze(0).to(device) for k, t in tensors.items()}
        slope = (scalars(solve(moved, kind, "", **options))[output].sum() - loss) / step
        assert gradients[name][0, index].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_implicit_gradients_are_near_those_of_float64(backend, device, kind, dtype):
    gradients = []
    for to in (torch.float64, dtype):
        inputs = inputs_of("points", kind)
        inputs |= {name: inputs[name].to(dtype).to(to) for name in ("X_a", "X_b")}
        weights = torch.float64 if to == torch.float64 else torch.float32
        inputs |= {name: t.float().to(weights) for name, t in inputs.items() if name not in ("X_a", "X_b")}
        leaves = {name: t.unsqueeze(0).to(device).requires_grad_() for name, t in inputs.items()}
        result = solve(leaves, kind, "sqeuclidean", max_iter=60, backend=backend)
        gradients.append(torch.autograd.grad(result.plan.square().sum(), list(leaves.values())))
    # The two parts of a gradient, at fixed potentials and through them, cancel: rounded once, added up.
    for narrow, exact in zip(gradients[1], gradients[0], strict=True):
        assert narrow.dtype != torch.float64
        assert relative_error(narrow.cpu(), exact.cpu()) < (1e-4 if narrow.dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_implicit_gradients_of_the_plan_do_not_depend_on_the_unit_of_the_cost(backend, device, kind, scale):
    gradients = []
    for s in (1.0, scale):
        inputs = inputs_of("cost", kind)
        inputs |= {k: s * t for k, t in inputs.items() if k in ("M", "reg", "rho_a", "rho_b", "null_cost")}
        if "mass" in inputs:  # full rows and capped ones
            inputs["mass"] = torch.tensor(0.85, dtype=torch.float64)
        leaves = {name: t.float().unsqueeze(0).to(device).requires_grad_() for name, t in inputs.items()}
        plan = solve(leaves, kind, "", max_iter=100, backend=backend).plan
        gradients.append(torch.autograd.grad((plan * some(N, M).to(plan)).sum(), leaves["M"])[0] * s)
    assert relative_error(gradients[1], gradients[0]) < 1e-3


# Memory.


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_path_keeps_points_weights_and_potentials_in_bytes(backend, device, kind):
    n, m, d = 40, 30, 3
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, size, d, generator=generator).to(device).requires_grad_() for size in (n, m))
    a, b = (make_weights(size, generator).float().repeat(2, 1).to(device).requires_grad_() for size in (n, m))
    options = {"balanced": {}, "unbalanced": {"unbalanced": (0.9, 0.6)}, "one side": {"unbalanced": (INF, 0.6)}}
    options |= {"partial": {"mass": 0.5}, "null": {"null_cost": 0.4}}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = otkern.solve_sample(x, y, a, b, reg=0.5, max_iter=50, backend=backend, **options[kind]).value
    points, potentials = 2 * (n + m) * d * 4, 2 * (n + m) * 4
    per_item = 2 * 4 * 8  # reg, value, two multipliers, two prices
    assert sum(storages.values()) <= points + potentials + potentials + per_item
    assert max(storages.values()) < 2 * n * m * 4
    value.sum().backward()
    assert x.grad.isfinite().all()
