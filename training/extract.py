"""Word links from two lists of contextual vectors: softmax both ways, mutual argmax, itermax and the transport plan."""

from collections.abc import Sequence

import torch
from torch import Tensor

import otkern
from training import encoder
from training.data import GoldPair

METHODS = ("softmax", "mutual", "itermax", "ot")

# What a model's card does not say is taken from here. `center`: subtract each side's mean over the whole file, which
# takes the language out of the vectors. `position_prior`: weight of the distance to the diagonal in the plan's cost.
# The values are those that did best on XL-WA's development sets before and after tuning. As published, softmax reads
# inner products (temperature null) above 1e-3, SimAlign and softmax link subwords (unit subword).
DEFAULTS = {
    "unit": "word",
    "word_vector": "mean",
    "center": True,
    "metric": "cosine",
    "reg": 0.1,
    "max_iter": 30,
    "position_prior": 0.3,
    "match": "mutual",
    "match_threshold": None,
    "softmax_threshold": 0.2,
    "softmax_temperature": 0.1,
    "itermax_rounds": 2,
    "itermax_discount": 0.9,
}


def complete(settings: dict | None) -> dict:
    """Return `settings` with the defaults filled in.

    Raises:
        ValueError: a name or value that extraction does not know.
    """
    settings = dict(settings or {})
    if unknown := set(settings) - set(DEFAULTS):
        raise ValueError(f"alignment settings must be among {sorted(DEFAULTS)}, but had {sorted(unknown)}")
    settings = DEFAULTS | settings
    if settings["unit"] not in encoder.UNITS:
        raise ValueError(f"unit must be one of {encoder.UNITS}, but was {settings['unit']!r}")
    return settings


def position_cost(n: int, m: int, lengths_a: Tensor, lengths_b: Tensor) -> Tensor:
    """Distance of each pair from the diagonal, |(i+½)/n − (j+½)/m|.

    Args:
        n: padded size of the first side.
        m: padded size of the second side.
        lengths_a: (B,) true sizes of the first side.
        lengths_b: (B,) true sizes of the second side.

    Returns:
        (B, n, m) float32, 0…1 within the true sizes.
    """
    device = lengths_a.device
    rows = (torch.arange(n, device=device) + 0.5) / lengths_a.clamp_min(1)[:, None]
    columns = (torch.arange(m, device=device) + 0.5) / lengths_b.clamp_min(1)[:, None]
    return (rows[:, :, None] - columns[:, None, :]).abs()


def inside(n: int, lengths: Tensor) -> Tensor:
    """(B, n) bool: true positions of a padded batch."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]


def softmax_links(scores: Tensor, lengths_a: Tensor, lengths_b: Tensor, threshold: float) -> Tensor:
    """Pairs whose softmax is above the threshold both along the row and along the column (Dou and Neubig 2021).

    Args:
        scores: (B, N, M) inner products.
        lengths_a: (B,) true N.
        lengths_b: (B,) true M.
        threshold: 0…1.

    Returns:
        (B, N, M) bool.
    """
    valid = inside(scores.shape[1], lengths_a)[:, :, None] & inside(scores.shape[2], lengths_b)[:, None, :]
    masked = scores.float().masked_fill(~valid, torch.finfo(torch.float32).min)
    return (masked.softmax(2) > threshold) & (masked.softmax(1) > threshold) & valid


def mutual_links(similarity: Tensor, lengths_a: Tensor, lengths_b: Tensor) -> Tensor:
    """Pairs that are each other's most similar (the first of equals): (B, N, M) similarity to (B, N, M) bool."""
    valid = inside(similarity.shape[1], lengths_a)[:, :, None] & inside(similarity.shape[2], lengths_b)[:, None, :]
    masked = similarity.float().masked_fill(~valid, -torch.inf)
    forward = torch.zeros_like(valid).scatter(2, masked.argmax(2, keepdim=True), True)
    backward = torch.zeros_like(valid).scatter(1, masked.argmax(1, keepdim=True), True)
    return forward & backward & valid


def itermax_links(
    similarity: Tensor, lengths_a: Tensor, lengths_b: Tensor, rounds: int = 2, discount: float = 0.9
) -> Tensor:
    """Mutual argmax again and again among what is left (Jalili Sabet et al. 2020, algorithm "itermax").

    After each round, similarities of points with one linked end are multiplied by `discount`, those between two linked
    points are set to 0; similarities are taken as (1 + cos) / 2, so that the discount lowers them.

    Args:
        similarity: (B, N, M) cosines.
        lengths_a: (B,) true N.
        lengths_b: (B,) true M.
        rounds: how many rounds, ≥ 1.
        discount: 0…1.

    Returns:
        (B, N, M) bool.
    """
    if rounds < 1:
        raise ValueError(f"itermax_rounds must be at least 1, but was {rounds}")
    base = (1 + similarity.float()) / 2
    links = mutual_links(base, lengths_a, lengths_b)
    for _ in range(rounds - 1):
        row, column = links.any(2, keepdim=True), links.any(1, keepdim=True)
        scale = torch.where(row & column, 0.0, torch.where(row | column, discount, 1.0))
        links = links | (mutual_links(base * scale, lengths_a, lengths_b) & ~(row & column))
    return links


def plan_links(x_a: Tensor, x_b: Tensor, lengths_a: Tensor, lengths_b: Tensor, settings: dict) -> Tensor:
    """Links of the entropic transport plan between uniform masses.

    Args:
        x_a: (B, N, D) vectors.
        x_b: (B, M, D) vectors.
        lengths_a: (B,) true N.
        lengths_b: (B,) true M.
        settings: completed settings; `metric`, `reg`, `max_iter`, `position_prior`, `match`, `match_threshold`.

    Returns:
        (B, N, M) bool.
    """
    plan = transport(x_a, x_b, lengths_a, lengths_b, settings)
    options = {} if settings["match_threshold"] is None else {"threshold": settings["match_threshold"]}
    return plan.match(method=settings["match"], **options)


def transport(x_a: Tensor, x_b: Tensor, lengths_a: Tensor, lengths_b: Tensor, settings: dict):
    """Solve the batch of transport problems that `plan_links` reads its links from; returns an `OTResult`."""
    sizes = {"lengths_a": lengths_a, "lengths_b": lengths_b, "reg": settings["reg"], "max_iter": settings["max_iter"]}
    if not settings["position_prior"]:
        return otkern.solve_sample(x_a, x_b, metric=settings["metric"], **sizes)
    prior = settings["position_prior"] * position_cost(x_a.shape[1], x_b.shape[1], lengths_a, lengths_b)
    return otkern.solve(pairwise_cost(x_a, x_b, settings["metric"]) + prior, **sizes)


def pairwise_cost(x_a: Tensor, x_b: Tensor, metric: str) -> Tensor:
    """Cost tensor (B, N, M) of points (B, N, D) and (B, M, D), by otkern's metric names; differentiable."""
    if metric == "cosine":
        directions_a, directions_b = (torch.nn.functional.normalize(x, dim=-1) for x in (x_a, x_b))
        return 1 - directions_a @ directions_b.mT
    if metric == "dot":
        return -(x_a @ x_b.mT)
    squared = (x_a.square().sum(-1)[:, :, None] + x_b.square().sum(-1)[:, None, :] - 2 * x_a @ x_b.mT).clamp_min(0)
    if metric == "sqeuclidean":
        return squared
    if metric == "euclidean":
        return squared.clamp_min(1e-12).sqrt()
    raise ValueError(f"metric must be 'cosine', 'dot', 'sqeuclidean' or 'euclidean', but was {metric!r}")


def links_of(method: str, x_a: Tensor, x_b: Tensor, lengths_a: Tensor, lengths_b: Tensor, settings: dict) -> Tensor:
    """Apply one extraction method to a padded batch of vectors.

    Args:
        method: one of `METHODS`.
        x_a: (B, N, D).
        x_b: (B, M, D).
        lengths_a: (B,) true N.
        lengths_b: (B,) true M.
        settings: completed settings.

    Returns:
        (B, N, M) bool.

    Raises:
        ValueError: an unknown method.
    """
    if method == "ot":
        return plan_links(x_a, x_b, lengths_a, lengths_b, settings)
    if method == "softmax":
        temperature = settings["softmax_temperature"]
        # Inner products of raw vectors as published, or cosines over a temperature for contrastively tuned ones.
        scores = x_a @ x_b.mT if temperature is None else (1 - pairwise_cost(x_a, x_b, "cosine")) / temperature
        return softmax_links(scores, lengths_a, lengths_b, settings["softmax_threshold"])
    similarity = 1 - pairwise_cost(x_a, x_b, "cosine")
    if method == "mutual":
        return mutual_links(similarity, lengths_a, lengths_b)
    if method == "itermax":
        rounds, discount = settings["itermax_rounds"], settings["itermax_discount"]
        return itermax_links(similarity, lengths_a, lengths_b, rounds, discount)
    raise ValueError(f"method must be one of {METHODS}, but was {method!r}")


class GoldEncoder:
    """The vectors of a gold file's sentences at some layers, ready for every extraction method.

    Args:
        model: the encoder.
        tokenizer: its fast tokenizer.
        pairs: gold pairs; only their words are used.
        layers: layers wanted.
        settings: completed settings; `unit`, `word_vector` and `center` count here.
    """

    def __init__(self, model, tokenizer, pairs: Sequence[GoldPair], layers: Sequence[int], settings: dict):
        self.settings, self.pairs = settings, pairs
        self.units, self.vectors = [], []
        for words in ([pair.english for pair in pairs], [pair.other for pair in pairs]):
            sentences = encoder.tokenize(tokenizer, words, max_length=256)
            if settings["unit"] == "word":
                gather = lambda hidden, tokens: encoder.word_vectors(hidden, tokens, settings["word_vector"])  # noqa: E731
                self.units.append([list(range(sentence.n_words)) for sentence in sentences])
            else:
                gather = encoder.subword_vectors
                self.units.append([[w for w in sentence.words if w >= 0] for sentence in sentences])
            vectors = encoder.encode(model, sentences, layers, tokenizer.pad_token_id, gather)
            self.vectors.append({layer: self._center(vectors[layer]) for layer in layers})

    def _center(self, vectors: list[Tensor]) -> list[Tensor]:
        if not self.settings["center"]:
            return vectors
        mean = torch.cat(vectors).mean(0)
        return [x - mean for x in vectors]

    def links(self, method: str, layer: int, overrides: dict | None = None, batch: int = 64) -> list[set]:
        """Extract word links: a word pair is linked when any of its units are.

        Args:
            method: one of `METHODS`.
            layer: one of the layers given before.
            overrides: settings of the method that differ from the given ones.
            batch: sentence pairs solved at once.

        Returns:
            Per sentence pair a set of (English word, other word).
        """
        settings = self.settings | (overrides or {})
        sides = [self.vectors[side][layer] for side in (0, 1)]
        order = sorted(range(len(self.pairs)), key=lambda s: len(sides[0][s]))
        result = [set() for _ in self.pairs]
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            x_a, x_b = (torch.nn.utils.rnn.pad_sequence([side[s] for s in chosen], True) for side in sides)
            lengths = [torch.tensor([len(side[s]) for s in chosen]) for side in sides]
            for row, i, j in links_of(method, x_a, x_b, *lengths, settings).nonzero().tolist():
                s = chosen[row]
                result[s].add((self.units[0][s][i], self.units[1][s][j]))
        return result

    def plan(self, layer: int, index: int) -> Tensor:
        """The transport plan of one sentence pair, each row scaled to 1: (n, m) over units."""
        x_a, x_b = (self.vectors[side][layer][index][None] for side in (0, 1))
        lengths = [torch.tensor([x.shape[1]]) for x in (x_a, x_b)]
        plan = transport(x_a, x_b, *lengths, self.settings).plan[0]
        return plan / plan.sum(1, keepdim=True).clamp_min(1e-12)
