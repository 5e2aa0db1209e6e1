"""Every argument that is wrong is named, with what it must be and what it was."""

import re

import pytest
import torch

import otkern

X, Y = torch.zeros(2, 5, 3), torch.zeros(2, 4, 3)
A, B = torch.full((2, 5), 0.2), torch.full((2, 4), 0.25)
COST = torch.zeros(2, 5, 4)
NAN, INF = float("nan"), float("inf")


def points(**changed) -> otkern.OTResult:
    """A call of `solve_sample` that is right but for the arguments given here."""
    return otkern.solve_sample(**({"X_a": X, "X_b": Y, "a": A, "b": B, "reg": 0.1} | changed))


def costs(**changed) -> otkern.OTResult:
    return otkern.solve(**({"M": COST, "a": A, "b": B, "reg": 0.1} | changed))


def packed(**changed) -> otkern.OTResult:
    arguments = {"X_a": X.flatten(0, 1), "X_b": Y.flatten(0, 1), "cu_seqlens_a": [0, 5, 10], "cu_seqlens_b": [0, 4, 8]}
    return otkern.solve_sample(**(arguments | {"reg": 0.1} | changed))


def changed(tensor: torch.Tensor, index, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def assert_refused(call, argument: str, must: str, was: str, **arguments) -> None:
    """The message begins with the argument, and tells what it must be and what it was."""
    with pytest.raises(ValueError, match=f"^{re.escape(argument)}\\b") as caught:
        call(**arguments)
    message = str(caught.value)
    assert must in message, message
    assert was in message, message
    assert "\n" not in message


def test_the_calls_that_these_tests_change_are_right():
    for call in (points, costs, packed):
        assert torch.isfinite(call().value).all()


# (call, argument, value, what it must be, what it was)
WRONG_TYPES = [
    (points, "X_a", [[0.0]], "torch.Tensor", "list"),
    (points, "X_a", None, "torch.Tensor", "NoneType"),
    (points, "X_a", X.numpy(), "torch.Tensor", "ndarray"),
    (points, "X_b", 3.0, "torch.Tensor", "float"),
    (points, "X_b", None, "torch.Tensor", "NoneType"),
    (points, "a", [0.2] * 5, "torch.Tensor", "list"),
    (points, "b", 1.0, "torch.Tensor", "float"),
    (costs, "M", [[0.0]], "torch.Tensor", "list"),
    (costs, "M", None, "torch.Tensor", "NoneType"),
    (costs, "a", (0.2,) * 5, "torch.Tensor", "tuple"),
    (costs, "b", 0.25, "torch.Tensor", "float"),
    (points, "reg", "0.1", "number", "str"),
    (points, "reg", None, "number", "NoneType"),
    (points, "reg", True, "number", "bool"),
    (points, "reg", [0.1, 0.1], "number", "list"),
    (points, "lengths_a", 5, "integer", "int"),
    (points, "lengths_b", [4.0, 4.0], "integers", "[4.0, 4.0]"),
    (points, "lengths_a", [True, 5], "integers", "[True, 5]"),
    (points, "lengths_a", "55", "integers", "55"),
    (costs, "lengths_a", {5}, "integer", "set"),
    (packed, "cu_seqlens_a", [0, 5.0, 10], "integers", "[0, 5.0, 10]"),
    (packed, "cu_seqlens_a", 10, "integer", "int"),
    (packed, "cu_seqlens_b", 8, "integer", "int"),
    (packed, "max_seqlen_a", 5.0, "integer", "5.0"),
    (packed, "max_seqlen_b", True, "integer", "True"),
    (points, "max_iter", 5.0, "integer", "5.0"),
    (points, "max_iter", True, "integer", "True"),
    (points, "max_iter", None, "integer", "None"),
    (points, "tol", "1e-3", "number", "1e-3"),
    (points, "tol", True, "number", "True"),
    (points, "metric", None, "sqeuclidean", "None"),
    (points, "metric", ["cosine"], "sqeuclidean", "cosine"),
    (points, "reg_type", None, "KL", "None"),
    (points, "grad", None, "envelope", "None"),
    (points, "update", None, "alternating", "None"),
    (points, "backend", 3, "reference", "3"),
    (points, "potentials_init", A, "pair", "Tensor"),
    (points, "potentials_init", (A,), "pair", "1"),
    (points, "check", "yes", "bool", "yes"),
    (points, "unbalanced", "1.0", "number", "str"),
    (points, "unbalanced", True, "number", "bool"),
    (points, "unbalanced", (1.0, "inf"), "number", "str"),
    (points, "mass", "half", "number", "str"),
    (points, "mass", [0.5, 0.5], "number", "list"),
    (costs, "null_cost", [0.5, 0.5], "number", "list"),
    (costs, "null_cost", False, "number", "bool"),
    (points, "scaling", "0.5", "number", "0.5"),
    (points, "scaling", True, "number", "True"),
    (points, "overrelaxation", "fast", "auto", "fast"),
    (points, "overrelaxation", True, "auto", "True"),
    (points, "implicit_tol", "1e-5", "number", "1e-5"),
    (points, "implicit_max_iter", 10.0, "integer", "10.0"),
    (points, "implicit_max_iter", None, "integer", "None"),
]

WRONG_SHAPES = [
    (points, "X_a", torch.zeros(5), "(N, D)", "(5,)"),
    (points, "X_a", torch.zeros(1, 2, 5, 3), "(B, N, D)", "(1, 2, 5, 3)"),
    (points, "X_b", torch.zeros(3, 4, 3), "batch size", "(3, 4, 3)"),
    (points, "X_b", torch.zeros(4, 3), "batch", "(4, 3)"),
    (points, "X_b", torch.zeros(2, 4, 2), "3 features", "2"),
    (points, "X_b", torch.zeros(2, 4, 0), "feature", "(2, 4, 0)"),
    (points, "a", torch.full((5,), 0.2), "(2, 5)", "(5,)"),
    (points, "a", torch.full((2, 4), 0.25), "(2, 5)", "(2, 4)"),
    (points, "b", torch.full((2, 4, 1), 0.25), "(2, 4)", "(2, 4, 1)"),
    (costs, "M", torch.zeros(4), "(B, N, M)", "(4,)"),
    (costs, "M", torch.zeros(1, 2, 5, 4), "(B, N, M)", "(1, 2, 5, 4)"),
    (costs, "a", torch.full((2, 4), 0.25), "(2, 5)", "(2, 4)"),
    (costs, "b", torch.full((2, 5), 0.2), "(2, 4)", "(2, 5)"),
    (points, "reg", torch.ones(3), "(2,)", "(3,)"),
    (points, "reg", torch.ones(2, 1), "(2,)", "(2, 1)"),
    (points, "lengths_a", [5], "(2,)", "(1,)"),
    (points, "lengths_b", torch.tensor([[4, 4]]), "(2,)", "(1, 2)"),
    (packed, "X_a", X, "(sum of lengths, D)", "(2, 5, 3)"),
    (packed, "X_b", Y, "(sum of lengths, D)", "(2, 4, 3)"),
    (packed, "a", A, "(10,)", "(2, 5)"),
    (packed, "cu_seqlens_b", [0, 8], "(3,)", "(2,)"),
    (packed, "cu_seqlens_a", torch.tensor([[0, 5, 10]]), "shape", "(1, 3)"),
    (packed, "cu_seqlens_a", torch.tensor(10), "shape", "()"),
    (points, "potentials_init", (A, A), "(2, 4)", "(2, 5)"),
    (points, "unbalanced", torch.ones(3), "(2,)", "(3,)"),
    (points, "unbalanced", (torch.ones(2, 1), 1.0), "(2,)", "(2, 1)"),
    (points, "unbalanced", (1.0, 1.0, 1.0), "pair", "length 3"),
    (points, "unbalanced", (), "pair", "length 0"),
    (costs, "mass", torch.ones(3), "(2,)", "(3,)"),
    (costs, "null_cost", torch.ones(1, 2), "(2,)", "(1, 2)"),
]

WRONG_DTYPES = [
    (points, "X_a", X.long(), "float32", "int64"),
    (points, "X_a", X.to(torch.complex64), "float32", "complex64"),
    (points, "X_b", Y.double(), "float32", "float64"),
    (points, "X_b", Y.bool(), "float32", "bool"),
    (costs, "M", COST.int(), "float32", "int32"),
    (points, "a", torch.ones(2, 5, dtype=torch.int64), "float32", "int64"),
    (points, "reg", torch.tensor([1, 1]), "floating", "int64"),
    (points, "lengths_a", torch.tensor([5.0, 5.0]), "int32", "float32"),
    (points, "lengths_a", torch.tensor([5, 5], dtype=torch.int16), "int32", "int16"),
    (packed, "cu_seqlens_a", torch.tensor([0.0, 5, 10]), "int32", "float32"),
    (points, "potentials_init", (A.long(), B), "float", "int64"),
    (points, "unbalanced", torch.tensor([1, 1]), "floating", "int64"),
    (points, "mass", torch.tensor(1), "floating", "int64"),
    (points, "null_cost", torch.tensor([True, True]), "floating", "bool"),
]

WRONG_DEVICES = [
    (points, "X_b", Y.to("meta"), "cpu", "meta"),
    (points, "a", A.to("meta"), "cpu", "meta"),
    (points, "b", B.to("meta"), "cpu", "meta"),
    (costs, "a", A.to("meta"), "cpu", "meta"),
    (points, "reg", torch.ones(2, device="meta"), "cpu", "meta"),
    (points, "lengths_a", torch.ones(2, dtype=torch.int32, device="meta"), "cpu", "meta"),
    (packed, "cu_seqlens_b", torch.zeros(3, dtype=torch.int32, device="meta"), "cpu", "meta"),
    (points, "potentials_init", (A, B.to("meta")), "cpu", "meta"),
    (points, "unbalanced", torch.ones(2, device="meta"), "cpu", "meta"),
    (costs, "mass", torch.ones(2, device="meta"), "cpu", "meta"),
    (costs, "null_cost", torch.ones((), device="meta"), "cpu", "meta"),
]

WRONG_VALUES = [
    (points, "reg", 0.0, "positive", "0.0"),
    (points, "reg", -1, "positive", "-1"),
    (points, "reg", NAN, "finite", "nan"),
    (points, "reg", INF, "finite", "inf"),
    (points, "reg", torch.tensor([0.1, 0.0]), "positive", "0 at 1"),
    (points, "reg", torch.tensor([NAN, 0.1]), "finite", "nan at 0"),
    (points, "reg", torch.tensor(-2.0), "positive", "-2"),
    (points, "a", changed(A, (1, 2), -0.1), "non-negative", "-0.1 at (1, 2)"),
    (points, "a", changed(A, (0, 4), NAN), "finite", "nan at (0, 4)"),
    (points, "b", changed(B, (1, 0), INF), "finite", "inf at (1, 0)"),
    (costs, "b", changed(B, (1, 0), -1.0), "non-negative", "-1 at (1, 0)"),
    (points, "a", 2 * A, "same total mass", "2"),
    (points, "b", changed(B, (1, 0), 0.0), "same total mass", "item 1"),
    (costs, "a", 0 * A, "same total mass", "0 in a"),
    (points, "lengths_a", [5, 6], "between 0 and 5", "6 at 1"),
    (points, "lengths_b", [-1, 4], "between 0 and 4", "-1 at 0"),
    (costs, "lengths_a", [9, 5], "between 0 and 5", "9 at 0"),
    (packed, "cu_seqlens_a", [0, 5, 9], "from 0 to the 10", "9"),
    (packed, "cu_seqlens_a", [1, 5, 10], "from 0 to the 10", "1"),
    (packed, "cu_seqlens_b", [0, 9, 8], "not decrease", "-1"),
    (packed, "cu_seqlens_b", [], "(3,)", "(0,)"),
    (packed, "cu_seqlens_a", [], "offset", "(0,)"),
    (packed, "max_seqlen_a", 4, "longest length", "4"),
    (packed, "max_seqlen_b", -1, "non-negative", "-1"),
    (points, "max_iter", 0, "at least 1", "0"),
    (points, "max_iter", -5, "at least 1", "-5"),
    (points, "tol", -1e-3, "at least 0", "-0.001"),
    (points, "tol", NAN, "finite", "nan"),
    (points, "tol", INF, "finite", "inf"),
    (points, "metric", "manhattan", "sqeuclidean", "manhattan"),
    (points, "metric", "cost", "sqeuclidean", "cost"),
    (points, "reg_type", "l2", "KL", "l2"),
    (points, "grad", "autodiff", "envelope", "autodiff"),
    (points, "update", "gauss-seidel", "alternating", "gauss-seidel"),
    (points, "backend", "numpy", "reference", "numpy"),
    (points, "unbalanced", 0.0, "positive", "0.0"),
    (points, "unbalanced", (1.0, -1), "positive", "-1"),
    (points, "unbalanced", NAN, "positive", "nan"),
    (points, "unbalanced", torch.tensor([1.0, 0.0]), "positive", "0 at (1, 0)"),
    (points, "unbalanced", (1.0, torch.tensor([NAN, 1.0])), "positive", "nan at (0, 1)"),
    (points, "mass", 0.0, "positive", "0.0"),
    (points, "mass", NAN, "positive", "nan"),
    (points, "mass", torch.tensor([0.5, 0.0]), "positive", "item 1 has mass 0"),
    (costs, "null_cost", -INF, "above -inf", "-inf"),
    (costs, "null_cost", NAN, "above -inf", "nan"),
    (costs, "null_cost", torch.tensor([0.3, NAN]), "above -inf", "nan at 1"),
    (points, "scaling", 0.0, "between 0 and 1", "0.0"),
    (points, "scaling", 1.0, "between 0 and 1", "1.0"),
    (points, "scaling", NAN, "between 0 and 1", "nan"),
    (points, "overrelaxation", 0.9, "[1, 2)", "0.9"),
    (points, "overrelaxation", 0.0, "[1, 2)", "0.0"),
    (points, "overrelaxation", 2.0, "[1, 2)", "2.0"),
    (points, "implicit_tol", 0.0, "between 0 and 1", "0.0"),
    (points, "implicit_tol", 1.0, "between 0 and 1", "1.0"),
    (points, "implicit_max_iter", 0, "at least 1", "0"),
    (points, "potentials_init", (A, changed(B, (0, 1), NAN)), "finite", "nan at (0, 1)"),
]


@pytest.mark.parametrize(("call", "argument", "value", "must", "was"), WRONG_TYPES)
def test_a_wrong_type_is_refused(call, argument, value, must, was):
    assert_refused(call, argument, must, was, **{argument: value})


@pytest.mark.parametrize(("call", "argument", "value", "must", "was"), WRONG_SHAPES)
def test_a_wrong_shape_is_refused(call, argument, value, must, was):
    assert_refused(call, argument, must, was, **{argument: value})


@pytest.mark.parametrize(("call", "argument", "value", "must", "was"), WRONG_DTYPES)
def test_a_wrong_dtype_is_refused(call, argument, value, must, was):
    assert_refused(call, argument, must, was, **{argument: value})


@pytest.mark.parametrize(("call", "argument", "value", "must", "was"), WRONG_DEVICES)
def test_a_wrong_device_is_refused(call, argument, value, must, was):
    assert_refused(call, argument, must, was, **{argument: value})


@pytest.mark.parametrize(("call", "argument", "value", "must", "was"), WRONG_VALUES)
def test_a_wrong_value_is_refused(call, argument, value, must, was):
    # Unequal masses are the fault of both weights, whichever was meant.
    named = "a and b" if must == "same total mass" else argument
    assert_refused(call, named, must, was, **{argument: value})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_points_that_are_not_finite_are_refused_by_every_backend(backend, device, dtype, value):
    options = {"backend": backend, "check": True, "max_iter": 1}
    x, y = X.to(device, dtype), Y.to(device, dtype)
    for name, tensor in (("X_a", x), ("X_b", y)):
        bad = {name: changed(tensor, (1, 3, 2), value)}
        arguments = {"X_a": x, "X_b": y, "a": A.to(device), "b": B.to(device)} | bad
        for metric in ("cosine", "sqeuclidean"):
            arguments["metric"] = metric
            assert_refused(points, name, "finite within the true length", "item 1", **arguments, **options)
    flat = changed(x, (1, 3, 2), value).flatten(0, 1)
    packing = {"cu_seqlens_a": [0, 5, 10], "cu_seqlens_b": [0, 4, 8]}
    assert_refused(packed, "X_a", "finite", "item 1", X_a=flat, X_b=y.flatten(0, 1), **packing, **options)
    in_the_padding = {"X_a": changed(x, (1, 4, 0), value), "X_b": y, "a": None, "b": None, "lengths_a": [5, 4]}
    assert torch.isfinite(points(**in_the_padding, **options).value).all()


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_costs_that_are_nan_or_minus_infinity_are_refused_by_every_backend(backend, device, dtype, value):
    options = {"a": None, "b": None, "backend": backend, "check": True, "max_iter": 1}
    bad = changed(COST, (1, 4, 1), value).to(device, dtype)
    assert_refused(costs, "M", "no NaN and no -inf", "item 1", M=bad, **options)
    assert torch.isfinite(costs(M=bad, lengths_a=[5, 4], **options).value).all()


def test_without_checks_bad_values_are_the_callers_affair(backend, device):
    # The shape is still looked at, the data is not: that is what keeps an accelerator from being waited for.
    bad = changed(X, (1, 0, 0), NAN).to(device)
    result = points(X_a=bad, X_b=Y.to(device), a=None, b=None, check=False, max_iter=1, backend=backend)
    assert torch.isfinite(result.value[0])


def test_weights_normalised_in_bfloat16_are_accepted():
    a = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.isfinite(points(a=a / a.sum(1, keepdim=True)).value).all()


OPTIONS = [
    ("unbalanced", 1.0),
    ("unbalanced", (1.0, INF)),
    ("unbalanced", (None, 0.5)),
    ("unbalanced", torch.tensor([0.5, 2.0])),
    ("unbalanced", (torch.tensor([0.5, 2.0]), INF)),
    ("mass", 0.5),
    ("mass", torch.tensor([0.5, 1.0])),
    ("null_cost", 0.3),
    ("null_cost", -0.3),
    ("null_cost", INF),
    ("null_cost", torch.tensor(0.3)),
    ("scaling", 0.5),
    ("update", "symmetric"),
    ("overrelaxation", 1.2),
    ("overrelaxation", "auto"),
    ("grad", "implicit"),
    ("grad", "unrolled"),
    ("implicit_tol", 1e-3),
    ("implicit_max_iter", 5),
]


@pytest.mark.parametrize("call", [points, costs, packed])
@pytest.mark.parametrize(("argument", "value"), OPTIONS)
def test_every_option_has_a_finite_answer(call, argument, value):
    result = call(**{argument: value})
    assert torch.isfinite(result.value).all()
    assert torch.isfinite(result.plan).all()


@pytest.mark.parametrize("argument", ["update", "overrelaxation"])
def test_what_is_not_supported_together_says_so_in_a_sentence(argument):
    value = {"update": "symmetric", "overrelaxation": 1.5}[argument]
    with pytest.raises(NotImplementedError, match=f"^{argument}") as caught:
        costs(mass=0.5, **{argument: value})
    assert len(str(caught.value).split()) >= 6


RELAXATIONS = {"unbalanced": 1.0, "mass": 0.5, "null_cost": 0.3}


@pytest.mark.parametrize(("one", "other"), [("unbalanced", "mass"), ("unbalanced", "null_cost"), ("mass", "null_cost")])
def test_only_one_relaxation_at_a_time(one, other):
    both = {name: RELAXATIONS[name] for name in (one, other)}
    assert_refused(costs, other, f"None together with {one}", "given", **both)


@pytest.mark.parametrize("relaxation", ["unbalanced", "null_cost"])
def test_masses_that_differ_are_right_where_a_side_may_keep_some(relaxation):
    assert torch.isfinite(costs(a=3 * A, **{relaxation: RELAXATIONS[relaxation]}).value).all()
    assert torch.isfinite(costs(a=3 * A, mass=1.0).value).all()


def test_masses_that_differ_are_refused_where_both_sides_are_strict():
    for rho in (INF, (INF, None), torch.full((2,), INF)):
        assert_refused(costs, "a and b", "same total mass", "item 0", a=3 * A, unbalanced=rho)
    assert_refused(costs, "a and b", "same total mass", "item 1", a=3 * A, unbalanced=torch.tensor([1.0, INF]))


def test_more_mass_than_there_is_cannot_be_moved():
    assert_refused(costs, "mass", "at most the smaller total", "item 0 has mass 1.1", mass=1.1)
    assert_refused(costs, "mass", "at most the smaller total", "item 1 has mass 2", mass=torch.tensor([1.0, 2.0]))
    assert_refused(costs, "mass", "at most the smaller total", "3 in a", a=3 * A, mass=1.5)


def test_an_unbatched_problem_takes_no_lengths():
    for name in ("lengths_a", "lengths_b"):
        for call, unbatched in ((otkern.solve_sample, {"X_a": X[0], "X_b": Y[0]}), (otkern.solve, {"M": COST[0]})):
            assert_refused(call, name, "None for an unbatched", "given", reg=1.0, **unbatched, **{name: [5]})


def test_a_packed_batch_takes_no_lengths_and_both_offsets():
    assert_refused(packed, "lengths_a", "None for a packed", "given", lengths_a=[5, 5])
    assert_refused(packed, "cu_seqlens_b", "given", "None", cu_seqlens_b=None)
    assert_refused(packed, "cu_seqlens_a", "given", "None", cu_seqlens_a=None)
    assert_refused(points, "max_seqlen_a", "None", "5", max_seqlen_a=5)
    assert_refused(points, "max_seqlen_b", "None", "4", max_seqlen_b=4)


def test_the_batch_functions_take_batches():
    assert_refused(otkern.solve_batch, "M", "(B, N, M)", "(5, 4)", M=COST[0], reg=1.0)
    assert_refused(otkern.solve_sample_batch, "X_a", "(B, N, D)", "(5, 3)", X_a=X[0], X_b=Y[0], reg=1.0)
    assert_refused(otkern.solve_batch, "M", "torch.Tensor", "list", M=[[0.0]], reg=1.0)


def test_an_unknown_argument_is_a_type_error():
    for call in (points, costs):
        with pytest.raises(TypeError, match="epsilon"):
            call(epsilon=0.1)
    with pytest.raises(TypeError, match="reg"):
        otkern.solve(COST)


def test_a_named_backend_never_falls_back():
    # A meta tensor is on a device that the cpu and triton backends do not serve.
    with pytest.raises(ValueError, match=r"^backend must be one that can run here, but 'cpu' cannot: .*meta"):
        points(X_a=X.to("meta"), X_b=Y.to("meta"), a=None, b=None, backend="cpu", check=False)
