"""One item, the same bits however it is laid out: alone, batched, padded, packed, sliced, strided; and run to run."""

import pytest
import torch

import otkern
from tests.problems import METRICS, Problem, make_batch, make_problem, offsets, pad

# Tile edges; every pair differs in n and m.
SIZES = [(1, 3), (3, 1), (15, 16), (16, 17), (17, 15), (31, 33), (33, 16), (64, 33), (65, 64), (127, 31), (129, 128)]
FEW = [(1, 3), (33, 15)]  # for the interpreter
LARGE = [(200, 70), (40, 257)]

LAYOUTS = ("padded", "packed", "equal")


def arguments(problem: Problem, dtype: torch.dtype, device: str) -> list:
    return [t.to(device) for t in problem.to(dtype)[:4]]


def alone(problem: Problem, dtype, device, **options) -> dict:
    """Everything an unbatched solve returns, gradients included."""
    leaves = [t.clone().requires_grad_() for t in arguments(problem, dtype, device)]
    reg = torch.tensor(problem.reg, dtype=leaves[2].dtype, device=device, requires_grad=True)
    result = otkern.solve_sample(*leaves, metric=problem.metric, reg=reg, **options)
    result.value.backward()
    return collect(result, [*leaves, reg])


def collect(result: otkern.OTResult, leaves) -> dict:
    names = ("X_a", "X_b", "a", "b", "reg")
    f, g = (t.detach() for t in result.potentials)
    return {
        "value": result.value.detach(),
        "f": f,
        "g": g,
        "marginal_error": result.marginal_error,
        "n_iters": result.n_iters,
        "converged": result.converged,
        **{f"d{name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)},
    }


# What of the result has one entry a point of side a, or of side b; the rest has one entry an item.
OF_SIDE_A, OF_SIDE_B = ("f", "dX_a", "da"), ("g", "dX_b", "db")


def batched(problems: list[Problem], layout: str, dtype, device, **options) -> list[dict]:
    """The same for a batch, cut into items again; asserts that gradients and potentials in the padding are 0."""
    sides = list(zip(*(arguments(p, dtype, device) for p in problems), strict=True))
    if layout == "packed":
        leaves = [torch.cat(side) for side in sides]
        options |= {"cu_seqlens_a": offsets(sides[0]).to(device), "cu_seqlens_b": offsets(sides[1]).to(device)}
    elif layout == "padded":
        leaves = [pad(list(side)) for side in sides]
        options |= {"lengths_a": [len(p.x) for p in problems], "lengths_b": [len(p.y) for p in problems]}
    else:
        leaves = [torch.stack(side) for side in sides]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    reg = torch.tensor([p.reg for p in problems], dtype=leaves[2].dtype, device=device, requires_grad=True)
    result = otkern.solve_sample(*leaves, metric=problems[0].metric, reg=reg, **options)
    # An item among others must not feel their upstream gradients either.
    result.value.sum().backward()
    whole = collect(result, [*leaves, reg])
    starts = {"a": offsets(sides[0]).tolist(), "b": offsets(sides[1]).tolist()}
    items = []
    for i, problem in enumerate(problems):
        item = {}
        for name, tensor in whole.items():
            side = "a" if name in OF_SIDE_A else "b" if name in OF_SIDE_B else None
            if side is None:
                item[name] = tensor[i]
            elif layout == "packed":
                item[name] = tensor[starts[side][i] : starts[side][i + 1]]
            else:
                size = len(problem.x if side == "a" else problem.y)
                item[name] = tensor[i, :size]
                assert tensor[i, size:].eq(0).all(), f"{name} of item {i} in the padding"
        items.append(item)
    return items


def assert_same_bits(actual: dict, expected: dict) -> None:
    for name, tensor in expected.items():
        assert actual[name].equal(tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_padding_and_batch_mates_have_no_influence(backend, device, interpreted, layout, metric, dtype):
    problems = make_batch(FEW if interpreted else SIZES, d=5, metric=metric)
    options = {"max_iter": 5, "backend": backend}
    for problem, item in zip(problems, batched(problems, layout, dtype, device, **options), strict=True):
        assert_same_bits(item, alone(problem, dtype, device, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_other_dtypes_do_not_feel_their_batch_either(backend, device, layout, dtype):
    problems = make_batch([(17, 9)] * 3 if layout == "equal" else FEW, d=5, metric="cosine")
    options = {"max_iter": 5, "backend": backend}
    for problem, item in zip(problems, batched(problems, layout, dtype, device, **options), strict=True):
        assert_same_bits(item, alone(problem, dtype, device, **options))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_mate_that_needs_long_does_not_change_when_an_item_stops(backend, device, layout):
    problems = make_batch([(9, 7), (16, 17), (15, 5)], reg=1.0)
    problems[1] = problems[1]._replace(reg=0.03 * problems[1].reg)
    options = {"max_iter": 60, "tol": 1e-4, "backend": backend}
    with pytest.warns(UserWarning, match="not converged"):
        items = batched(problems, layout, torch.float32, device, **options)
        for problem, item in zip(problems, items, strict=True):
            assert_same_bits(item, alone(problem, torch.float32, device, **options))
    assert len({int(item["n_iters"]) for item in items}) == 3


def test_large_problems_beside_small_ones_change_nothing(backend, device, interpreted):
    sizes = [(5, 4), (130, 20)] if interpreted else [(5, 4), *LARGE]
    problems = make_batch(sizes, d=5, metric="cosine")
    options = {"max_iter": 2 if interpreted else 5, "backend": backend}
    for layout in ("padded", "packed"):
        for problem, item in zip(problems, batched(problems, layout, torch.float32, device, **options), strict=True):
            assert_same_bits(item, alone(problem, torch.float32, device, **options))


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30])
def test_what_stands_in_the_padding_does_not_matter(backend, device, filler):
    problems = make_batch([(5, 4), (9, 7)])
    lengths = {"lengths_a": [5, 9], "lengths_b": [4, 7]}
    x, y, a, b = ([p.to(torch.float32)[i].to(device) for p in problems] for i in range(4))
    results = [
        otkern.solve_sample(pad(x, v), pad(y, v), pad(a, v), pad(b, v), reg=0.3, max_iter=5, backend=backend, **lengths)
        for v in (0.0, filler)
    ]
    assert results[0].value.equal(results[1].value)
    assert results[0].plan.equal(results[1].plan)
    assert results[0].marginal_a.equal(results[1].marginal_a)
    assert results[0].value_linear.equal(results[1].value_linear)
    assert results[0].barycentric_map().equal(results[1].barycentric_map())


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_padding_has_no_influence_on_the_entropy(backend, device, layout):
    problems = make_batch(FEW)
    options = {"max_iter": 5, "reg_type": "entropy", "backend": backend}
    for problem, item in zip(problems, batched(problems, layout, torch.float64, device, **options), strict=True):
        assert item["value"].equal(alone(problem, torch.float64, device, **options)["value"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_padding_of_costs_has_no_influence(backend, device, dtype):
    problems = make_batch([(5, 4), (17, 9), (1, 3)])
    padded = torch.full((3, 20, 11), float("nan"), dtype=dtype, device=device)
    for i, problem in enumerate(problems):
        padded[i, : len(problem.x), : len(problem.y)] = problem.cost.to(dtype)
    padded.requires_grad_()
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (pad([p[i].to(device, weights) for p in problems], extra=e) for i, e in ((2, 3), (3, 2)))
    options = {"reg": 0.4, "max_iter": 8, "backend": backend}
    result = otkern.solve(padded, a, b, lengths_a=[5, 17, 1], lengths_b=[4, 9, 3], **options)
    result.value.sum().backward()
    for i, problem in enumerate(problems):
        n, m = problem.cost.shape
        cost = problem.cost.to(device, dtype).requires_grad_()
        single = otkern.solve(cost, a[i, :n], b[i, :m], **options)
        single.value.backward()
        assert result.value[i].equal(single.value)
        assert padded.grad[i, :n, :m].equal(cost.grad)
        assert padded.grad[i, n:].eq(0).all()
        assert padded.grad[i, :, m:].eq(0).all()


def strided(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers in memory laid out in other ways: transposed, every second entry, inside a larger tensor."""
    larger = tensor.new_full([s + 3 for s in tensor.shape], float("nan"))
    inside = larger[tuple(slice(1, s + 1) for s in tensor.shape)]
    spread = tensor.new_full([2 * s for s in tensor.shape], float("nan"))
    spread = spread[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return [tensor.mT.contiguous().mT, inside.copy_(tensor), spread.copy_(tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [5, 64])
def test_strides_of_points_do_not_matter(backend, device, metric, dtype, d):
    """Whole vectors are read where they are, others from copies, as are directions of extreme length."""
    problems = make_batch([(17, 9)] * 2, d=d, metric=metric)
    x, y, a, b = (torch.stack([p.to(dtype)[i] for p in problems]).to(device) for i in range(4))
    if metric == "cosine":
        x[:, 1] *= 1e12
        y[:, 2] *= 1e-12
    options = {"metric": metric, "reg": 0.3, "max_iter": 5, "backend": backend}

    def solve(x, y):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        value = otkern.solve_sample(x, y, a, b, **options).value
        value.sum().backward()
        return value.detach(), x.grad, y.grad

    expected = solve(x, y)
    for x_view, y_view in zip(strided(x), reversed(strided(y)), strict=True):
        for actual, wanted in zip(solve(x_view, y_view), expected, strict=True):
            assert actual.equal(wanted)


def test_strides_of_costs_and_weights_do_not_matter(backend, device):
    problems = make_batch([(17, 9)] * 2)
    cost, a, b = (torch.stack(t).float().to(device) for t in zip(*((p.cost, p.a, p.b) for p in problems), strict=True))
    options = {"reg": 0.3, "max_iter": 5, "backend": backend}

    def solve(cost, a, b):
        leaves = [t.detach().requires_grad_() for t in (cost, a, b)]
        value = otkern.solve(*leaves, **options).value
        value.sum().backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    expected = solve(cost, a, b)
    for views in zip(*(strided(t) for t in (cost, a, b)), strict=True):
        for actual, wanted in zip(solve(*views), expected, strict=True):
            assert actual.equal(wanted)


def test_one_cloud_expanded_to_a_batch_is_that_cloud_in_every_item(backend, device):
    problem = make_problem(9, 7).to(torch.float32)
    x, y, a, b = (t.to(device) for t in problem[:4])
    options = {"reg": 0.3, "max_iter": 5, "backend": backend}
    once = otkern.solve_sample(x, y, a, b, **options).value
    leaf = x.clone().requires_grad_()
    many = otkern.solve_sample(leaf.expand(3, 9, 3), y.expand(3, 7, 3), a.expand(3, 9), b.expand(3, 7), **options).value
    many.sum().backward()
    assert many.eq(once).all()
    assert leaf.grad.shape == (9, 3)


@pytest.mark.parametrize("lengths", [[5, 9], (5, 9), torch.tensor([5, 9]), torch.tensor([5, 9], dtype=torch.int32)])
def test_lengths_may_be_lists_or_tensors_of_either_integer(backend, device, lengths):
    problems = make_batch([(5, 4), (9, 7)])
    options = {"reg": 0.3, "max_iter": 3, "backend": backend}
    x, y = (pad([p[i].to(device) for p in problems]) for i in range(2))
    expected = [otkern.solve_sample(p.x.to(device), p.y.to(device), **options).value for p in problems]
    value = otkern.solve_sample(x, y, lengths_a=lengths, lengths_b=[4, 7], **options).value
    assert value.equal(torch.stack(expected))


def test_longest_lengths_may_be_given_or_left_out_or_too_large(backend, device):
    problems = make_batch([(5, 4), (9, 7)])
    x, y = (torch.cat([p[i].to(device) for p in problems]) for i in range(2))
    packed = {"cu_seqlens_a": offsets([p.x for p in problems]), "cu_seqlens_b": [0, 4, 11]}
    results = [
        otkern.solve_sample(x, y, reg=0.3, max_iter=3, backend=backend, **packed, **longest)
        for longest in ({}, {"max_seqlen_a": 9, "max_seqlen_b": 7}, {"max_seqlen_a": 64, "max_seqlen_b": 70})
    ]
    assert results[0].plan.shape == (2, 9, 7)
    assert results[2].plan.shape == (2, 64, 70)
    for result in results[1:]:
        assert result.value.equal(results[0].value)
        assert result.potential_a.equal(results[0].potential_a)


def test_an_empty_item_has_no_influence_on_its_neighbours(backend, device):
    problems = make_batch([(5, 4), (9, 7)])
    x, y = (torch.cat([p[i].to(device) for p in problems]) for i in range(2))
    options = {"reg": 0.3, "max_iter": 3, "backend": backend}
    without = otkern.solve_sample(x, y, cu_seqlens_a=[0, 5, 14], cu_seqlens_b=[0, 4, 11], **options)
    among = otkern.solve_sample(x, y, cu_seqlens_a=[0, 0, 5, 5, 14], cu_seqlens_b=[0, 0, 4, 4, 11], **options)
    assert among.value[[1, 3]].equal(without.value)
    assert among.value[[0, 2]].tolist() == [0, 0]
    assert among.potential_a.equal(without.potential_a)


@pytest.mark.parametrize("metric", METRICS)
def test_two_runs_give_the_same_bits(backend, device, metric):
    problem = make_problem(33, 17, d=16, metric=metric)
    options = {"max_iter": 10, "backend": backend}
    first = alone(problem, torch.float32, device, **options)
    assert_same_bits(alone(problem, torch.float32, device, **options), first)


@pytest.mark.parametrize("sizes", [[(9, 7), (16, 17), (31, 5), (3, 3)], [(257, 190)]])
def test_the_number_of_threads_changes_no_bit(backend, device, interpreted, sizes):
    problems = make_batch([(9, 7), (16, 17)] if interpreted else sizes, d=16, metric="cosine")
    options = {"max_iter": 5, "backend": backend}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(batched(problems, "packed", torch.float32, device, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)


def test_unbatched_calls_give_unbatched_results(backend, device):
    problem = make_problem(5, 4)
    x, y, a, b = (t.to(device) for t in problem[:4])
    shapes = {
        "value": (), "value_linear": (), "marginal_error": (), "n_iters": (), "converged": (), "plan": (5, 4),
        "potential_a": (5,), "potential_b": (4,), "marginal_a": (5,), "marginal_b": (4,),
    }  # fmt: skip
    options = {"reg": 0.3, "max_iter": 3, "backend": backend}
    results = (
        otkern.solve_sample(x, y, a, b, **options),
        otkern.solve(problem.cost.to(device), a, b, **options),
    )
    for result in results:
        for name, shape in shapes.items():
            assert tuple(getattr(result, name).shape) == shape, name
    batch = otkern.solve_sample(x[None], y[None], a[None], b[None], **options)
    for name, shape in shapes.items():
        assert tuple(getattr(batch, name).shape) == (1, *shape), name
        assert getattr(batch, name)[0].equal(getattr(results[0], name)), name


def test_the_positional_batch_functions_are_the_keyword_ones(backend, device):
    problems = make_batch([(9, 7)] * 2)
    x, y, a, b = (torch.stack([p[i] for p in problems]).to(device) for i in range(4))
    cost = torch.stack([p.cost for p in problems]).to(device)
    options = {"max_iter": 5, "backend": backend}
    assert otkern.solve_sample_batch(x, y, 0.3, a, b, **options).value.equal(
        otkern.solve_sample(x, y, a, b, reg=0.3, **options).value
    )
    assert otkern.solve_batch(cost, 0.3, a, b, **options).value.equal(
        otkern.solve(cost, a, b, reg=0.3, **options).value
    )


def test_an_empty_packed_batch_is_a_batch(backend, device):
    x = torch.zeros(0, 3, device=device)
    result = otkern.solve_sample(x, x, reg=0.3, cu_seqlens_a=[0], cu_seqlens_b=[0], backend=backend)
    assert result.value.shape == (0,)
    assert result.plan.shape == (0, 0, 0)
