"""The transforms of `torch.func`, and copies of results."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch.func import grad, jacrev, jvp, vjp, vmap

import otkern


def _points():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=generator), torch.randn(5, 4, generator=generator)


def _functions(backend, y):
    options = {"max_iter": 20, "tol": None, "backend": backend}
    offsets = {"cu_seqlens_a": [0, 2, 6], "cu_seqlens_b": [0, 3, 5], "max_seqlen_a": 4, "max_seqlen_b": 3}
    return {
        "points": lambda x: otkern.solve_sample(x, y, reg=0.5, **options).value,
        "cosine": lambda x: otkern.SinkhornLoss(reg=0.5, **options)(x, y),
        "debiased": lambda x: otkern.SinkhornLoss("sqeuclidean", reg=0.5, debias=True, **options)(x, y),
        "cost": lambda x: otkern.solve(x @ y.T, reg=0.5, unbalanced=1.0, **options).value,
        "null": lambda x: otkern.solve_sample(x, y, reg=0.5, null_cost=1.0, **options).value,
        "packed": lambda x: otkern.solve_sample(x, y, reg=0.5, **offsets, **options).value.sum(),
        "samples": lambda x: otkern.SamplesLoss(blur=0.5, backend=backend)(x, y),
    }


NAMES = ("points", "cosine", "debiased", "cost", "null", "packed", "samples")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_autograd(backend, device, name):
    x, y = (points.to(device) for points in _points())
    function = _functions(backend, y)[name]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(grad(function)(x), expected)
    value, pull = vjp(function, x)
    torch.testing.assert_close((value, pull(torch.ones_like(value))[0]), (function(x), expected))
    torch.testing.assert_close(jacrev(lambda x: torch.stack([function(x), 2 * function(x)]))(x)[1], 2 * expected)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop_without_a_word(backend, device, name, capfd):
    x, y = (points.to(device) for points in _points())
    function = _functions(backend, y)[name]
    batch = torch.stack([x, 2 * x, x - 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        values, gradients = vmap(function)(batch), vmap(grad(function))(batch)
    assert "performance drop" not in capfd.readouterr().err
    torch.testing.assert_close(values, torch.stack([function(x) for x in batch]))
    torch.testing.assert_close(gradients, torch.stack([grad(function)(x) for x in batch]))


@pytest.mark.parametrize("name", ["points", "samples", "cosine"])
def test_forward_mode_is_refused(name):
    x, y = _points()
    with pytest.raises(NotImplementedError, match="forward-mode derivatives of an entropic OT problem"):
        jvp(_functions("cpu", y)[name], (x,), (x,))


def test_second_derivatives_are_refused():
    x, y = (points.double() for points in _points())
    functions = _functions("cpu", y)
    with pytest.raises(NotImplementedError, match=r"second derivatives .* use torch\.autograd\.grad"):
        grad(lambda x: grad(functions["points"])(x).sum())(x)
    with pytest.raises(NotImplementedError, match="GeomLoss's loop is not differentiable again"):
        grad(lambda x: grad(functions["samples"])(x).sum())(x)


def _used(result) -> list[torch.Tensor]:
    return [
        result.value, result.plan, result.marginal_a, result.marginal_b, result.potential_a, result.value_linear,
        result.match().float(), result.plan_operator @ torch.ones(5), result.barycentric_map(), result.marginal_error,
    ]  # fmt: skip


def _torch_save(result):
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _queue(result):
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(result)
    return queue.get()


COPIES = {
    "copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda result: pickle.loads(pickle.dumps(result)),
    "torch.save": _torch_save, "queue": _queue,
}  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_copies_of_a_result_are_complete(how, wide):
    x, y = _points()
    x[0, 0] += 1000.0 * wide
    x.requires_grad_()
    result = otkern.solve_sample(x + 0, y, reg=0.5, max_iter=50)
    for got, want in zip(_used(COPIES[how](result)), _used(result), strict=True):
        assert torch.equal(got, want)


def test_a_copy_of_a_changed_problem_says_so_as_the_result_does():
    x, y = _points()
    result = otkern.solve_sample(x, y, reg=0.5, max_iter=50)
    duplicate = copy.deepcopy(result)
    x.add_(1)
    assert duplicate.plan.sum() > 0.99  # it has its own points
    with pytest.raises(RuntimeError, match="X_a must be unchanged"):
        copy.deepcopy(result)


def test_a_pickle_is_read_by_another_process(tmp_path):
    x, y = _points()
    result = otkern.solve_sample(x, y, reg=0.5, max_iter=50)
    (tmp_path / "result.pkl").write_bytes(pickle.dumps(result))
    code = f"import pickle; print(float(pickle.load(open({str(tmp_path / 'result.pkl')!r}, 'rb')).plan.sum()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1)
