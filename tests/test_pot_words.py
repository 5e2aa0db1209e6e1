"""POT's words for arguments and results, and numpy input."""

import numpy
import pytest
import torch

import otkern

COST = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))


def test_words_that_cost_nothing_are_taken():
    plain = otkern.solve_batch(COST, 0.1, max_iter=30)
    for words in ({"method": "sinkhorn"}, {"method": "log_sinkhorn", "verbose": True}, {"unbalanced_type": "KL"}):
        assert torch.equal(otkern.solve_batch(COST, 0.1, max_iter=30, **words).value, plain.value)
    x = torch.rand(2, 5, 3)
    assert torch.equal(
        otkern.solve_sample_batch(x, x, 0.1, method="auto", unbalanced=1.0, unbalanced_type="Kl").value,
        otkern.solve_sample_batch(x, x, 0.1, unbalanced=1.0).value,
    )


@pytest.mark.parametrize("name", ["kl", "Kl", "KL", "Entropy", "ENTROPY"])
def test_reg_type_is_read_in_any_case(name):
    expected = "KL" if name.lower() == "kl" else "entropy"
    got = otkern.solve(COST, reg=0.1, reg_type=name).value
    assert torch.equal(got, otkern.solve(COST, reg=0.1, reg_type=expected).value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "proximal"}, "^method must not be 'proximal'"),
        ({"method": "emd"}, "^method must be one of auto, sinkhorn, log_sinkhorn, but was 'emd'"),
        ({"unbalanced_type": "l2"}, "^unbalanced_type must be 'kl'"),
        ({"verbose": "yes"}, "^verbose must be a bool"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        otkern.solve_batch(COST, 0.1, **words)


@pytest.mark.parametrize("reg", [None, 0, 0.0])
def test_exact_transport_is_refused(reg):
    with pytest.raises(ValueError, match=r"^reg must be a positive number, but was (NoneType|0|0\.0): exact transport"):
        otkern.solve_batch(COST, reg)


def test_numpy_input_is_refused_with_what_to_do():
    for call in (
        lambda: otkern.solve(numpy.ones((3, 2)), reg=0.1),
        lambda: otkern.solve(COST, numpy.ones((2, 5)), reg=0.1),
        lambda: otkern.solve_sample(numpy.ones((3, 2)), COST[0], reg=0.1),
    ):
        with pytest.raises(ValueError, match=r"must be a torch\.Tensor, but was a numpy\.ndarray: torch\.from_numpy"):
            call()


def test_a_result_has_the_names_of_pots():
    result = otkern.solve_batch(COST, 0.5, max_iter=200, tol=1e-5)
    assert result.status == "converged" and set(result.log) == {"n_iters", "marginal_error", "converged"}
    assert torch.equal(result.sparse_plan, result.plan)
    assert torch.equal(result.lazy_plan @ torch.ones(2, 4), result.marginal_a)
    with pytest.warns(otkern.ConvergenceWarning):
        short = otkern.solve_batch(COST, 0.01, max_iter=1, tol=1e-5)
    assert short.status == "2 of 2 problems not converged"
    assert issubclass(otkern.ConvergenceWarning, UserWarning)
