"""`otkern.explain` says what a call would do."""

import pytest
import torch

import otkern


def test_it_names_the_backend_that_the_call_takes(backend, device):
    x, y = torch.rand(2, 5, 3, device=device), torch.rand(2, 4, 3, device=device)
    explanation = otkern.explain(x, y, reg=0.1, backend=backend)
    assert explanation.backend == backend
    assert explanation.reason == "it was asked for"
    assert explanation.regime in str(explanation)


def test_a_choice_gives_the_reasons_against_the_others():
    x = torch.rand(5, 3)
    chosen = otkern.explain(x, x, reg=0.1)
    assert repr(chosen.backend) in repr(otkern.solve_sample(x, x, reg=0.1))
    assert "not cuda, because" in chosen.reason
    unrolled = otkern.explain(x, x, reg=0.1, grad="unrolled")
    assert unrolled.backend == "reference"
    assert "not cpu, because" in unrolled.reason


def test_costs_are_explained_as_solve_takes_them():
    cost = torch.rand(3, 5, 4)
    assert otkern.explain(cost, reg=0.1, mass=0.5, lengths_a=[5, 4, 3]).backend == otkern.explain(cost, reg=0.1).backend


def test_the_regime_depends_on_the_size(monkeypatch):
    cpu = pytest.importorskip("otkern.backends.cpu")
    if cpu.missing() is not None:
        pytest.skip(cpu.missing())
    x = torch.rand(100, 3)
    assert "kept" in otkern.explain(x, x, reg=0.1, backend="cpu").regime
    monkeypatch.setattr(cpu, "STORE_BYTES", 1 << 10)
    assert "in panels" in otkern.explain(x, x, reg=0.1, backend="cpu").regime


def test_what_the_call_refuses_is_refused():
    x = torch.rand(5, 3)
    with pytest.raises(ValueError, match="'cpu' cannot"):
        otkern.explain(x, x, reg=0.1, grad="unrolled", backend="cpu")
    with pytest.raises(ValueError, match="reg must be positive"):
        otkern.explain(x, x, reg=-1.0)


def test_a_debiased_call_is_explained_as_what_it_runs():
    x, y = torch.rand(6, 3), torch.rand(9, 3)
    assert "9 x 9" in otkern.explain(x, y, reg=0.1, debias=True, backend="cpu").regime
    with pytest.raises(NotImplementedError, match="debias"):
        otkern.explain(x, y, reg=0.1, debias=True, mass=0.5)
