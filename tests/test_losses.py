"""`SinkhornLoss` is `solve_sample(...).value` as a module."""

import pytest
import torch

import otkern
from tests.problems import METRICS, make_batch, offsets, pad


@pytest.mark.parametrize("metric", METRICS)
def test_the_loss_is_the_value_of_solve_sample(backend, device, metric):
    problems = make_batch([(9, 7)] * 2, metric=metric)
    x, y, a, b = (torch.stack([p[i] for p in problems]).float().to(device) for i in range(4))
    loss = otkern.SinkhornLoss(metric=metric, reg=0.2, max_iter=20, backend=backend)
    expected = otkern.solve_sample(x, y, a, b, metric=metric, reg=0.2, max_iter=20, backend=backend)
    assert loss(x, y, a, b).equal(expected.value)
    assert loss(x, y).shape == (2,)
    assert loss(x[0], y[0]).shape == ()


def test_the_loss_takes_padded_and_packed_batches(backend, device):
    problems = make_batch([(5, 4), (9, 7)])
    xs, ys = ([p[i].float().to(device) for p in problems] for i in range(2))
    loss = otkern.SinkhornLoss(reg=0.2, max_iter=20, backend=backend)
    padded = loss(pad(xs), pad(ys), lengths_a=[5, 9], lengths_b=[4, 7])
    packed = loss(
        torch.cat(xs), torch.cat(ys), cu_seqlens_a=offsets(xs), cu_seqlens_b=offsets(ys), max_seqlen_a=9, max_seqlen_b=7
    )
    assert padded.equal(packed)


def test_the_default_is_the_cosine_cost_at_a_tenth():
    loss = otkern.SinkhornLoss()
    assert (loss.metric, loss.reg) == ("cosine", 0.1)
    assert not list(loss.parameters())


def test_training_points_with_the_loss_brings_them_together(backend, device, interpreted):
    problem = make_batch([(9, 7)])[0]
    x, y = problem.x.float().to(device).clone().requires_grad_(), problem.y.float().to(device)
    loss = otkern.SinkhornLoss(metric="sqeuclidean", reg=0.05, max_iter=30, backend=backend)
    optimiser = torch.optim.SGD([x], lr=1.0)
    before = loss(x, y).item()
    for _ in range(3 if interpreted else 20):
        optimiser.zero_grad()
        loss(x, y).backward()
        optimiser.step()
    assert loss(x, y).item() < before / 2


def test_the_representation_names_the_options():
    text = repr(otkern.SinkhornLoss("dot", 0.5, max_iter=7, tol=1e-3))
    assert text == "SinkhornLoss(metric='dot', reg=0.5, max_iter=7, tol=0.001)"


def test_wrong_options_are_refused_where_they_are_given():
    with pytest.raises(ValueError, match=r"^metric must be one of"):
        otkern.SinkhornLoss(metric="l1")
    with pytest.raises(TypeError, match=r"^iterations must be an option of"):
        otkern.SinkhornLoss(iterations=3)
