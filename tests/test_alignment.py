"""Hard alignments from plans made by hand."""

import pytest
import torch

from otkern import alignment

PLAN = torch.tensor(
    [
        [0.20, 0.15, 0.00],
        [0.18, 0.02, 0.01],
        [0.00, 0.00, 0.00],
        [0.05, 0.03, 0.10],
    ]
)


def links(matrix: torch.Tensor) -> set:
    return {tuple(index) for index in matrix.nonzero().tolist()}


def test_mutual_keeps_what_is_largest_in_its_row_and_its_column():
    assert links(alignment.match(PLAN)) == {(0, 0), (3, 2)}
    assert links(alignment.match(PLAN, "mutual")) == {(0, 0), (3, 2)}


def test_argmax_gives_every_row_with_mass_one_link():
    assert links(alignment.match(PLAN, "argmax")) == {(0, 0), (1, 0), (3, 2)}


def test_itermax_links_in_rounds_what_mutual_left_over():
    # Round two leaves out the plan between the linked rows 0, 3 and columns 0, 2: (1, 0) and (0, 1) are mutual there.
    assert links(alignment.match(PLAN, "itermax")) == {(0, 0), (3, 2), (1, 0), (0, 1)}
    assert links(alignment.match(PLAN, "itermax", max_rounds=1)) == {(0, 0), (3, 2)}


def test_itermax_ends_where_every_point_is_linked():
    few, many = (alignment.match(PLAN, "itermax", max_rounds=k) for k in (3, 50))
    assert links(few) <= links(many)
    assert not many[2].any()


def test_threshold_is_relative_to_the_largest_of_row_and_column():
    assert links(alignment.match(PLAN, "threshold", threshold=1.0)) == {(0, 0), (3, 2)}
    assert links(alignment.match(PLAN, "threshold", threshold=0.8)) == {(0, 0), (1, 0), (3, 2)}
    assert links(alignment.match(PLAN, "threshold")) == {(0, 0), (0, 1), (1, 0), (3, 2)}


@pytest.mark.parametrize("method", alignment.METHODS)
def test_points_without_mass_have_no_link(method):
    matched = alignment.match(PLAN, method)
    assert matched.dtype == torch.bool
    assert not matched[2].any()
    assert not alignment.match(torch.zeros(3, 2), method).any()


@pytest.mark.parametrize("method", alignment.METHODS)
def test_a_batch_is_matched_item_by_item(method):
    other = PLAN.roll(1, 0).roll(1, 1)
    batch = alignment.match(torch.stack([PLAN, other, torch.zeros_like(PLAN)]), method)
    assert batch[0].equal(alignment.match(PLAN, method))
    assert batch[1].equal(alignment.match(other, method))
    assert not batch[2].any()


@pytest.mark.parametrize("method", alignment.METHODS)
def test_padding_has_no_influence_on_links(method):
    padded = torch.zeros(6, 7)
    padded[:4, :3] = PLAN
    matched = alignment.match(padded, method)
    assert matched[:4, :3].equal(alignment.match(PLAN, method))
    assert not matched[4:].any()
    assert not matched[:, 3:].any()


@pytest.mark.parametrize("method", ["mutual", "itermax", "threshold"])
def test_exchanging_the_sides_transposes_the_links(method):
    assert alignment.match(PLAN.mT, method).mT.equal(alignment.match(PLAN, method))


def test_of_equal_entries_the_first_wins():
    assert links(alignment.match(torch.full((2, 2), 0.25))) == {(0, 0)}
    assert links(alignment.match(torch.full((2, 2), 0.25), "argmax")) == {(0, 0), (1, 0)}


@pytest.mark.parametrize("method", alignment.METHODS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 3, 2), (2, 0, 3)])
def test_empty_plans_have_no_links(method, shape):
    assert alignment.match(torch.zeros(shape), method).shape == shape


@pytest.mark.parametrize("method", alignment.METHODS)
def test_links_carry_no_gradient(method):
    assert not alignment.match(PLAN.clone().requires_grad_(), method).requires_grad


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("hungarian", {}, "^method must be one of mutual.*'hungarian'"),
        ("threshold", {"threshold": 0.0}, "^threshold must be a number in .*0.0"),
        ("threshold", {"threshold": 1.5}, "^threshold must be a number in .*1.5"),
        ("mutual", {"threshold": 0.5}, "^threshold must be None .*0.5"),
        ("itermax", {"max_rounds": 0}, "^max_rounds must be an integer of at least 1.*0"),
    ],
)
def test_wrong_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        alignment.match(PLAN, method, **options)
