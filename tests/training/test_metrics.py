"""The metrics against values worked out by hand."""

import math

import pytest
import torch

from training.metrics import alignment_scores, anisotropy, retrieval_accuracy


def test_aer_by_hand():
    # A = {00, 12, 21}, S = {00, 11}, P = S + {12}: |A∩S| = 1, |A∩P| = 2, AER = 1 − 3/5.
    scores = alignment_scores([{(0, 0), (1, 2), (2, 1)}], [{(0, 0), (1, 1)}], [{(1, 2)}])
    assert scores == pytest.approx({"aer": 0.4, "precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7})


def test_aer_sums_over_sentences_before_dividing():
    predicted = [{(0, 0)}, {(0, 0), (1, 1), (2, 2)}]
    sure = [{(0, 0)}, {(0, 1)}]
    scores = alignment_scores(predicted, sure, sure)
    assert scores == pytest.approx({"aer": 1 - 2 / 6, "precision": 1 / 4, "recall": 1 / 2, "f1": 1 / 3})


def test_perfect_and_empty_alignments():
    gold = [{(0, 0), (1, 1)}]
    assert alignment_scores(gold, gold, gold) == {"aer": 0.0, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert alignment_scores([set()], gold, gold) == {"aer": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_alignment_scores_refuse_different_numbers_of_sentences():
    with pytest.raises(ValueError, match="zip"):
        alignment_scores([set()], [set(), set()], [set(), set()])


def test_retrieval_both_ways():
    english = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    other = torch.tensor([[2.0, 0.1], [0.1, 3.0], [0.2, 1.0]])
    # Row 2 finds row 2's rival nowhere: its best is row 1 or 2 by cosine, −0.2/|·| against −0.1/|·|: row 1.
    scores = retrieval_accuracy(english, other)
    assert scores["accuracy_forward"] == pytest.approx(2 / 3)
    assert scores["accuracy_backward"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_csls_takes_hubs_down():
    # The third target is nearer to both axes (0.7) than their own counterparts are (0.6): a hub, which CSLS lowers.
    english = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.7, 0.7, 0.14]])
    other = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.6, 0.8], [0.7, 0.7, 0.14]])
    assert retrieval_accuracy(english, other)["accuracy_forward"] == pytest.approx(1 / 3)
    assert retrieval_accuracy(english, other, csls_neighbours=3)["accuracy_forward"] == 1.0


def test_retrieval_refuses_sides_of_different_length():
    with pytest.raises(ValueError, match="english and other"):
        retrieval_accuracy(torch.ones(3, 2), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]], 1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0], [-1.0, 0.0]], -1.0),
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], 2 * math.sqrt(0.5) / 3),
    ],
)
def test_anisotropy_is_the_mean_cosine_of_pairs(vectors, expected):
    assert anisotropy(torch.tensor(vectors)) == pytest.approx(expected, abs=1e-6)


def test_anisotropy_tells_a_collapsed_space_from_a_spread_one():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(500, 64, generator=generator)
    assert abs(anisotropy(spread)) < 0.02
    assert anisotropy(spread + 5) > 0.9


def test_anisotropy_needs_two_vectors():
    with pytest.raises(ValueError, match="n >= 2"):
        anisotropy(torch.ones(1, 3))
