"""Never NaN or infinity from finite, valid input, and never an exception that is not documented.

Hypothesis draws the sizes, the layout in memory, the scales and the kind of problem. A few hundred draws are made with
the other tests; ``make nightly`` makes ten thousand (OTKERN_DRAWS).
"""

import math
import os
import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import otkern
from tests.problems import METRICS, offsets

DRAWS = int(os.environ.get("OTKERN_DRAWS", "0"))
SIZES = (0, 1, 2, 3, 5, 8, 17)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def scales(low: float, high: float):
    """Powers of ten, exact ends included."""
    return st.floats(math.log10(low), math.log10(high)).map(lambda power: 10.0**power)


@st.composite
def calls(draw):
    """The arguments of a call: numbers that say how tensors are made, so that failures are short to read."""
    kind = draw(st.sampled_from(("balanced", "unbalanced", "one side", "mass", "null_cost")))
    return {
        "sizes": draw(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)), min_size=1, max_size=3)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "metric": draw(st.sampled_from(("cost", *METRICS))),
        "features": draw(st.sampled_from((1, 2, 7))),
        "layout": draw(st.sampled_from(("padded", "packed", "strided", "offset"))),
        "seed": draw(st.integers(0, 2**16)),
        "scale": draw(scales(1e-6, 1e6)),
        "reg": draw(scales(1e-5, 1e3)),
        "weights": draw(st.sampled_from(("uniform", "zeros", "one", "tiny"))),
        "mass_of_b": draw(scales(1e-3, 1e3)) if kind != "balanced" else 1.0,
        "kind": kind,
        "relaxation": draw(scales(1e-6, 1e6)),
        "share": draw(st.sampled_from((1e-3, 0.5, 1.0))),
        "reg_type": draw(st.sampled_from(("KL", "entropy"))),
        "iterations": draw(st.sampled_from((1, 2, 5))),
        "scaling": draw(st.sampled_from((None, 0.5))),
        "tol": draw(st.sampled_from((None, 1e-3))),
        "repeated": draw(st.booleans()),
    }


def make_weights(n: int, how: str, generator: torch.Generator) -> torch.Tensor:
    """Of total mass 1 for n > 0."""
    weights = 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)
    if how == "zeros":
        weights[1::2] = 0
    elif how == "one":
        weights[1:] = 0
    elif how == "tiny":
        weights[1:] *= 1e-30
    return weights / weights.sum().clamp(min=1e-300)


def laid_out(tensors: list[torch.Tensor], layout: str) -> torch.Tensor:
    """One tensor of a batch: padded with NaN, packed, or padded as a view with strides and an offset."""
    if layout == "packed":
        return torch.cat(tensors)
    longest, rest = max(len(t) for t in tensors), tensors[0].shape[1:]
    shape = (len(tensors), longest, *rest)
    if layout == "padded":
        out = tensors[0].new_full(shape, math.nan)
    elif layout == "strided":
        out = tensors[0].new_full([2 * size for size in shape], math.nan)[tuple(slice(None, None, 2) for _ in shape)]
    else:
        out = tensors[0].new_full((shape[0] + 1, longest + 3, *rest), math.nan)[1:, 3:]
    for i, tensor in enumerate(tensors):
        out[i, : len(tensor)] = tensor
    return out


def solve(call: dict, backend: str, device: str):
    """(result, leaves) of a call, leaves being everything that takes a gradient."""
    generator = torch.Generator().manual_seed(call["seed"])
    dtype, layout, scale = call["dtype"], call["layout"], call["scale"]
    if dtype == torch.float16:
        scale = min(max(scale, 0.1), 10.0)  # gradients have to stay in its range
    sizes = call["sizes"]
    packed = layout == "packed" and call["metric"] != "cost"
    layout = "padded" if layout == "packed" and not packed else layout
    if call["kind"] in ("balanced", "one side"):
        sizes = [(max(n, 1), max(m, 1)) for n, m in sizes]  # a side that must be moved needs somewhere to go
    if call["kind"] == "mass":
        sizes = [(max(n, 1), max(m, 1)) for n, m in sizes]
    clouds = []
    for side in (0, 1):
        points = [torch.randn(size[side], call["features"], generator=generator, dtype=torch.float64) for size in sizes]
        if call["repeated"]:
            points = [torch.cat([p[:1]] * len(p)) if len(p) else p for p in points]
        clouds.append([(scale * p).to(dtype) for p in points])
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    factors = (1.0, min(call["mass_of_b"], 10.0) if dtype == torch.float16 else call["mass_of_b"])
    weights = [
        [factors[k] * make_weights(size[k], call["weights"], generator).to(narrow) for size in sizes] for k in (0, 1)
    ]
    size_of_cost = {"sqeuclidean": scale**2, "dot": scale**2, "cosine": 1.0}.get(call["metric"], scale)
    options = {
        "reg": call["reg"] * size_of_cost, "reg_type": call["reg_type"], "max_iter": call["iterations"],
        "tol": call["tol"], "scaling": call["scaling"], "backend": backend, "check": True,
    }  # fmt: skip
    price = call["relaxation"] * size_of_cost
    if call["metric"] == "dot" and call["kind"] in ("unbalanced", "one side"):
        # At a price below what moving mass earns, the best mass is exp(|C| / price), beyond any dtype.
        price = max(price, 10 * call["features"] * size_of_cost)
    if call["kind"] == "unbalanced":
        options["unbalanced"] = (price, 0.3 * price)
    elif call["kind"] == "one side":
        options["unbalanced"] = (price, math.inf)
    elif call["kind"] == "null_cost":
        options["null_cost"] = price * (-1 if call["seed"] % 3 == 0 else 1)
    elif call["kind"] == "mass":
        least = [min(float(w.double().sum()) for w in pair) for pair in zip(*weights, strict=True)]
        options["mass"] = torch.tensor([call["share"] * total for total in least], dtype=narrow, device=device)
    leaves = {name: laid_out(side, layout) for name, side in (("a", weights[0]), ("b", weights[1]))}
    if packed:
        options |= {f"cu_seqlens_{s}": offsets(cloud).to(device) for s, cloud in zip("ab", clouds, strict=True)}
    else:
        options |= {f"lengths_{s}": [len(t) for t in cloud] for s, cloud in zip("ab", clouds, strict=True)}
    if call["metric"] == "cost":
        costs = [(scale * torch.rand(n, m, generator=generator, dtype=torch.float64)).to(dtype) for n, m in sizes]
        shape = (len(sizes), max(n for n, _ in sizes), max(m for _, m in sizes))
        leaves["M"] = torch.full(shape, math.nan, dtype=dtype)
        for i, cost in enumerate(costs):
            leaves["M"][i, : cost.shape[0], : cost.shape[1]] = cost
    else:
        leaves |= {"X_a": laid_out(clouds[0], layout), "X_b": laid_out(clouds[1], layout)}
        options["metric"] = call["metric"]
    leaves = {name: t.to(device).requires_grad_() for name, t in leaves.items()}
    function = otkern.solve if call["metric"] == "cost" else otkern.solve_sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a few iterations need not converge
        return function(**leaves, **options), leaves


def assert_finite(call: dict, backend: str, device: str) -> None:
    result, leaves = solve(call, backend, device)
    with torch.no_grad():
        outputs = {
            "value": result.value, "potential_a": result.potential_a, "potential_b": result.potential_b,
            "marginal_error": result.marginal_error, "plan": result.plan, "value_linear": result.value_linear,
            "marginal_a": result.marginal_a, "marginal_b": result.marginal_b,
        }  # fmt: skip
    for name, output in outputs.items():
        assert output.isfinite().all(), name
    gradients = torch.autograd.grad(result.value.sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient.isfinite().all(), f"gradient of {name}"


def test_finite_input_gives_finite_output(backend, device, interpreted):
    draws = DRAWS // 50 if DRAWS and interpreted else DRAWS or (10 if interpreted else 300)
    settings = hypothesis.settings(
        max_examples=draws, suppress_health_check=list(hypothesis.HealthCheck), derandomize=not DRAWS
    )

    @settings
    @hypothesis.given(calls())
    def check(call):
        assert_finite(call, backend, device)

    check()


@pytest.mark.parametrize("kind", ["balanced", "unbalanced", "one side", "mass", "null_cost"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("reg", [1e-5, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ends_of_every_range_are_finite(backend, device, kind, scale, reg, dtype):
    for relaxation in (1e-6, 1e6):
        call = {
            "sizes": [(5, 3), (1, 8)], "dtype": dtype, "metric": "sqeuclidean", "features": 2, "layout": "padded",
            "seed": 0, "scale": scale, "reg": reg, "weights": "zeros", "mass_of_b": 1.0 if kind == "balanced" else 3.0,
            "kind": kind, "relaxation": relaxation, "share": 0.5, "reg_type": "KL", "iterations": 5, "scaling": None,
            "tol": None, "repeated": False,
        }  # fmt: skip
        assert_finite(call, backend, device)
