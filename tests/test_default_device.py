"""Calls where torch's default device is not that of the inputs, as after ``torch.set_default_device("cuda")``."""

import pytest
import torch

import otkern
from otkern import selftest


def _points():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)


CALLS = {
    "solve": lambda x, y, b: otkern.solve(torch.cdist(x, y), reg=0.5, max_iter=20, lengths_a=[6, 4, 2], backend=b).plan,
    "solve_sample": lambda x, y, b: otkern.solve_sample(x, y, reg=0.5, max_iter=20, backend=b).value_linear,
    "lengths": lambda x, y, b: otkern.solve_sample(x, y, reg=0.5, max_iter=20, lengths_b=[5, 1, 0], backend=b).plan,
    "packed": lambda x, y, b: otkern.solve_sample(
        x.flatten(0, 1), y.flatten(0, 1), reg=0.5, max_iter=20, cu_seqlens_a=[0, 6, 12, 18], cu_seqlens_b=[0, 5, 9, 15],
        backend=b,
    ).barycentric_map(),
    "relaxed": lambda x, y, b: otkern.solve_sample(x, y, reg=0.5, unbalanced=(1.0, None), max_iter=20, backend=b).plan,
    "mass": lambda x, y, b: otkern.solve_sample(x, y, reg=0.5, mass=0.5, scaling=0.5, max_iter=20, backend=b).plan,
    "implicit": lambda x, y, b: torch.autograd.grad(
        otkern.solve_sample(x.requires_grad_(), y, reg=5.0, max_iter=50, grad="implicit", backend=b).plan[:, 0].sum(), x
    )[0],
    "unrolled": lambda x, y, b: torch.autograd.grad(
        otkern.solve_sample(x.requires_grad_(), y, reg=5.0, max_iter=9, null_cost=1.0, grad="unrolled").plan[0, 0, 0], x
    )[0],
    "loss": lambda x, y, b: otkern.SinkhornLoss(reg=0.5, debias=True, max_iter=20, backend=b)(x, y),
    "divergence": lambda x, y, b: otkern.sinkhorn_divergence(x, y, reg=0.5, max_iter=20, backend=b),
    "samples_loss": lambda x, y, b: otkern.SamplesLoss(blur=0.5, backend=b)(x, y),
    "match": lambda x, y, b: otkern.solve_sample(x, y, reg=0.5, max_iter=20, backend=b).match("itermax").float(),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_the_default_device_has_no_influence(backend, device, call):
    x, y = (points.to(device) for points in _points())
    expected = CALLS[call](x, y, backend)
    with torch.device("meta"):
        got = CALLS[call](x, y, backend)
    assert torch.equal(getattr(got, "value", got), getattr(expected, "value", expected))


def test_selftest_and_explain_name_their_devices():
    x, y = _points()
    with torch.device("meta"):
        assert otkern.explain(x, y, reg=0.5).backend == "cpu"
        assert selftest.largest_error("cpu", "cpu") <= selftest.TOLERANCE
