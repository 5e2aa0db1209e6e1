"""The held-out split: the same everywhere, decided by the English side alone, about a ninth of all sentences."""

import os
from pathlib import Path

import pytest

from training.data import read_pairs
from training.splits import HELD_OUT_FRACTION, held_out_pairs, is_held_out, normalise_english

SENTENCES = [f"The farmer sold {number} sheep and {number % 7} goats." for number in range(4000)]


def test_known_sentences_stay_on_their_side():
    """These answers are fixed for ever: a change would move sentences between training and evaluation."""
    assert is_held_out("Hello, world!")
    assert is_held_out("Where is my dog?")
    assert not any(map(is_held_out, ["I'm not home.", "The house is red.", "She sings well.", "Good night."]))


def test_case_punctuation_spaces_and_width_do_not_matter():
    variants = ["I'm not home.", "i'm  NOT home", "I’m not home!", "Ｉ'm not home …"]
    assert {normalise_english(text) for text in variants} == {"imnothome"}
    assert len({is_held_out(text) for text in variants}) == 1


def test_letters_of_every_script_and_combining_marks_are_kept():
    assert normalise_english("Ще се видим!") == "щесевидим"
    assert normalise_english("e\u0301te\u0301") == normalise_english("été")
    assert normalise_english("…?!") == ""


def test_the_share_is_as_stated():
    share = sum(map(is_held_out, SENTENCES)) / len(SENTENCES)
    # Four standard deviations of a binomial share.
    assert abs(share - HELD_OUT_FRACTION) < 4 * (HELD_OUT_FRACTION * (1 - HELD_OUT_FRACTION) / len(SENTENCES)) ** 0.5


def test_held_out_pairs_do_not_depend_on_the_order_of_the_corpus():
    pairs = [(english, f"fremd {number}") for number, english in enumerate(SENTENCES)]
    chosen = held_out_pairs(pairs, limit=100)
    assert len(chosen) == 100
    assert chosen == held_out_pairs(pairs[::-1], limit=100)
    assert chosen[:10] == held_out_pairs(pairs, limit=10)


def test_held_out_pairs_are_disjoint_from_what_may_be_trained_on():
    pairs = [(english, f"fremd {number}") for number, english in enumerate(SENTENCES)]
    kept = {english for english, _ in pairs if not is_held_out(english)}
    chosen = {english for english, _ in held_out_pairs(pairs, limit=len(pairs))}
    assert chosen
    assert not chosen & kept
    assert len(chosen) + len(kept) == len(pairs)


def test_held_out_pairs_are_distinct_on_both_sides():
    held_out = [sentence for sentence in SENTENCES if is_held_out(sentence)][:3]
    pairs = [(held_out[0], "eins"), (held_out[0].upper(), "zwei"), (held_out[1], "Drei!"), (held_out[2], "drei")]
    chosen = held_out_pairs(pairs)
    assert len(chosen) == 2
    assert len({normalise_english(other) for _, other in chosen}) == 2


def test_empty_sides_are_left_out():
    held_out = next(sentence for sentence in SENTENCES if is_held_out(sentence))
    assert held_out_pairs([(held_out, "…")]) == []


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be a positive number of pairs"):
        held_out_pairs([], limit=limit)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("OTKERN_DATA"), reason="needs the data folder that OTKERN_DATA names")
@pytest.mark.parametrize("language", ["bg", "el", "de", "es", "fr"])
def test_every_language_has_a_thousand_held_out_pairs(language):
    path = Path(os.environ["OTKERN_DATA"], "parallel", "train", f"tatoeba.en-{language}.tsv.gz")
    assert len(held_out_pairs(read_pairs(str(path), language))) == 1000
