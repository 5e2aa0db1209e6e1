"""Extraction methods on similarities small enough to read."""

import pytest
import torch

from training import extract

FULL = torch.tensor([3]), torch.tensor([3])


def both(directions):
    return directions[0] & directions[1]


def own(result):
    return result[0][0]


def pairs(links):
    return {tuple(link) for link in links[0].nonzero().tolist()}


def test_mutual_keeps_what_is_best_both_ways():
    similarity = torch.tensor([[[0.9, 0.8, 0.1], [0.7, 0.2, 0.1], [0.1, 0.1, 0.5]]])
    assert pairs(extract.mutual_links(similarity, *FULL)) == {(0, 0), (2, 2)}


def test_itermax_links_what_is_left():
    similarity = torch.tensor([[[0.9, 0.8, 0.1], [0.7, 0.2, 0.1], [0.1, 0.1, 0.5]]])
    # Second round: pairs between linked points are out; row 1 prefers column 0 (discounted), column 1 prefers row 0.
    first = pairs(extract.itermax_links(similarity, *FULL, rounds=1))
    second = pairs(extract.itermax_links(similarity, *FULL, rounds=2))
    assert first == {(0, 0), (2, 2)}
    assert second == {(0, 0), (2, 2), (1, 0), (0, 1)}


def test_softmax_needs_both_directions():
    scores = torch.log(torch.tensor([[[0.90, 0.05, 0.05], [0.45, 0.10, 0.45], [0.001, 0.001, 0.998]]]))
    # Rows give these shares; of column 0 row 1 has 0.45/1.351 and of column 2 0.45/1.498.
    assert pairs(both(extract.softmax_directions(scores, *FULL, threshold=0.32))) == {(0, 0), (1, 0), (2, 2)}
    assert pairs(both(extract.softmax_directions(scores, *FULL, threshold=0.4))) == {(0, 0), (2, 2)}


@pytest.mark.parametrize("method", extract.METHODS)
@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_a_permutation_is_found_and_padding_has_no_influence(method, prior):
    generator = torch.Generator().manual_seed(3)
    x = torch.nn.functional.normalize(torch.randn(1, 6, 16, generator=generator), dim=-1)
    order = torch.tensor([1, 0, 2, 4, 3, 5])
    y = x[:, order]
    settings = extract.complete({"position_prior": prior, "reg": 0.05, "softmax_temperature": 0.05})
    six = torch.tensor([6])
    expected = {(int(i), j) for j, i in enumerate(order)}
    assert pairs(own(extract.links_of(method, x, y, six, six, settings))) == expected
    padded = torch.full((1, 9, 16), 7.0)
    padded[:, :6] = x
    assert pairs(own(extract.links_of(method, padded, torch.cat([y, y], 1), six, six, settings))) == expected


def test_position_cost_is_the_distance_to_the_diagonal():
    cost = extract.position_cost(3, 2, torch.tensor([2]), torch.tensor([2]))
    assert torch.equal(cost[0, :2], torch.tensor([[0.0, 0.5], [0.5, 0.0]]))


def test_the_prior_decides_between_equal_words():
    word = torch.ones(1, 3, 4)
    settings = extract.complete({"position_prior": 0.5})
    assert pairs(own(extract.links_of("ot", word, word, *FULL, settings))) == {(0, 0), (1, 1), (2, 2)}


@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean", "euclidean"])
def test_pairwise_cost_agrees_with_its_definition(metric):
    x, y = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    difference = x[:, :, None] - y[:, None]
    inner = (x[:, :, None] * y[:, None]).sum(-1)
    expected = {
        "cosine": 1 - inner / (x.norm(dim=-1)[:, :, None] * y.norm(dim=-1)[:, None]),
        "dot": -inner,
        "sqeuclidean": difference.square().sum(-1),
        "euclidean": difference.norm(dim=-1),
    }[metric]
    torch.testing.assert_close(extract.pairwise_cost(x, y, metric), expected, rtol=1e-4, atol=1e-4)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="alignment settings"):
        extract.complete({"no_such": 1})
    with pytest.raises(ValueError, match="unit"):
        extract.complete({"unit": "sentence"})
    with pytest.raises(ValueError, match="method must be one of"):
        extract.links_of(
            "argmin", torch.ones(1, 1, 2), torch.ones(1, 1, 2), *(torch.tensor([1]),) * 2, extract.complete({})
        )
