"""Word links from two lists of contextual vectors: softmax both ways, mutual argmax, itermax and the transport plan."""

from collections.abc import Sequence

import torch
from torch import Tensor

import otkern
from otkern.alignment import match
from training import encoder
from training.data import GoldPair
from training.symmetrization import symmetrize

METHODS = ("softmax", "mutual", "itermax", "ot")
# Subwords of a sentence at most, with the special tokens; the model may allow fewer.
MAX_LENGTH = 256

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
    for name, default in DEFAULTS.items():
        value = settings[name]
        numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
        optional = name == "softmax_temperature" and value is None
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
        if numeric and not optional and not number:
            raise ValueError(f"{name} must be a number, but was {value!r}")
    for name in ("max_iter", "itermax_rounds"):
        if settings[name] != int(settings[name]) or settings[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, but was {settings[name]!r}")
        settings[name] = int(settings[name])  # such as 1e2
    for name in ("reg", "softmax_temperature"):
        if settings[name] is not None and not 0 < settings[name] < float("inf"):
            raise ValueError(f"{name} must be a number above 0, but was {settings[name]!r}")
    if not isinstance(settings["center"], bool):
        raise ValueError(f"center must be true or false, but was {settings['center']!r}")
    if settings["word_vector"] not in encoder.WORD_VECTORS:
        raise ValueError(f"word_vector must be one of {encoder.WORD_VECTORS}, but was {settings['word_vector']!r}")
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


def _valid(shape: torch.Size, lengths_a: Tensor, lengths_b: Tensor) -> Tensor:
    """(B, N, M) bool: pairs of true positions."""
    return inside(shape[1], lengths_a)[:, :, None] & inside(shape[2], lengths_b)[:, None, :]


def softmax_directions(
    products: Tensor, lengths_a: Tensor, lengths_b: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs whose softmax along the row, or along the column, is above the threshold (Dou and Neubig 2021).

    Args:
        products: (B, N, M) inner products.
        lengths_a: (B,) true N.
        lengths_b: (B,) true M.
        threshold: 0…1.

    Returns:
        (links along rows, links along columns, the smaller probability), each (B, N, M); Dou and Neubig take links of
        both.
    """
    valid = _valid(products.shape, lengths_a, lengths_b)
    masked = products.float().masked_fill(~valid, torch.finfo(torch.float32).min)
    along_rows, along_columns = masked.softmax(2), masked.softmax(1)
    scores = torch.minimum(along_rows, along_columns)
    return (along_rows > threshold) & valid, (along_columns > threshold) & valid, scores


def argmax_directions(similarity: Tensor, lengths_a: Tensor, lengths_b: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar point of each row, and of each column (the first of equals): (B, N, M) bool each."""
    valid = _valid(similarity.shape, lengths_a, lengths_b)
    masked = similarity.float().masked_fill(~valid, -torch.inf)
    forward = torch.zeros_like(valid).scatter(2, masked.argmax(2, keepdim=True), True)
    backward = torch.zeros_like(valid).scatter(1, masked.argmax(1, keepdim=True), True)
    return forward & valid, backward & valid


def mutual_links(similarity: Tensor, lengths_a: Tensor, lengths_b: Tensor) -> Tensor:
    """Pairs that are each other's most similar: (B, N, M) similarity to (B, N, M) bool."""
    forward, backward = argmax_directions(similarity, lengths_a, lengths_b)
    return forward & backward


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


def transport(x_a: Tensor, x_b: Tensor, lengths_a: Tensor, lengths_b: Tensor, settings: dict):
    """Solve the batch of transport problems that `links_of` reads links from; returns an `OTResult`."""
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


def links_of(
    method: str, x_a: Tensor, x_b: Tensor, lengths_a: Tensor, lengths_b: Tensor, settings: dict, directed: bool = False
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Apply one extraction method to a padded batch of vectors.

    Args:
        method: one of `METHODS`.
        x_a: (B, N, D).
        x_b: (B, M, D).
        lengths_a: (B,) true N.
        lengths_b: (B,) true M.
        settings: completed settings.
        directed: return the links of each direction, from a to b and from b to a, in place of the method's own.

    Returns:
        (links, or the links of both directions; scores): (B, N, M) bool, and float32 in [0, 1] for `ot`, where it is
        the share of the row's mass, and `softmax`, the smaller of both probabilities, or a cosine.

    Raises:
        ValueError: an unknown method, or directions of `itermax`, which has none.
    """
    sizes = lengths_a, lengths_b
    if method == "ot":
        result = transport(x_a, x_b, *sizes, settings)
        plan = result.plan
        scores = plan / plan.sum(2, keepdim=True).clamp_min(torch.finfo(plan.dtype).tiny)
        if directed:
            return (match(plan, "argmax"), match(plan.mT, "argmax").mT), scores
        options = {} if settings["match_threshold"] is None else {"threshold": settings["match_threshold"]}
        return (result.match(method=settings["match"], **options),), scores
    similarity = 1 - pairwise_cost(x_a, x_b, "cosine")
    if method == "softmax":
        temperature = settings["softmax_temperature"]
        # Inner products of raw vectors as published, or cosines over a temperature for contrastively tuned ones.
        products = x_a @ x_b.mT if temperature is None else similarity / temperature
        forward, backward, scores = softmax_directions(products, *sizes, settings["softmax_threshold"])
    elif method == "mutual":
        forward, backward, scores = *argmax_directions(similarity, *sizes), similarity
    elif method == "itermax":
        if directed:
            raise ValueError("symmetrization must not be given with method 'itermax', whose links have no direction")
        rounds, discount = settings["itermax_rounds"], settings["itermax_discount"]
        return (itermax_links(similarity, *sizes, rounds, discount),), similarity
    else:
        raise ValueError(f"method must be one of {METHODS}, but was {method!r}")
    return ((forward, backward) if directed else (forward & backward,)), scores


def extract(
    vectors: tuple[Sequence[Tensor], Sequence[Tensor]],
    method: str,
    settings: dict,
    *,
    units: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None,
    symmetrization: str | None = None,
    batch: int = 64,
) -> list[dict[tuple[int, int], float]]:
    """Word links of sentence pairs from their vectors: what evaluation and the alignment of new text share.

    Args:
        vectors: of each side one (n, D) tensor a sentence.
        method: one of `METHODS`.
        settings: completed settings.
        units: of each side and sentence the word of each vector; None: one vector a word. Two words are linked when
            any of their units are.
        symmetrization: how the links of both directions are combined, one of `symmetrization.METHODS`; None: as the
            method does it by itself.
        batch: sentence pairs solved at once.

    Returns:
        Of each sentence pair {(word, word): score}, the score as `links_of` has it, the largest of a pair's units.
    """
    order = sorted(range(len(vectors[0])), key=lambda s: len(vectors[0][s]))
    result: list[dict[tuple[int, int], float]] = [{} for _ in order]
    for start in range(0, len(order), batch):
        chosen = [s for s in order[start : start + batch] if len(vectors[0][s]) and len(vectors[1][s])]
        if not chosen:
            continue  # nothing to link, and nothing to take an argmax of
        x_a, x_b = (torch.nn.utils.rnn.pad_sequence([side[s] for s in chosen], True) for side in vectors)
        lengths = [torch.tensor([len(side[s]) for s in chosen], device=x_a.device) for side in vectors]
        directions, scores = links_of(method, x_a, x_b, *lengths, settings, symmetrization is not None)
        found: list[list[dict[tuple[int, int], float]]] = []
        for direction in directions:
            found.append([{} for _ in chosen])
            at = direction.nonzero(as_tuple=True)
            for row, i, j, score in zip(*(index.tolist() for index in at), scores[at].tolist(), strict=True):
                s = chosen[row]
                pair = (i, j) if units is None else (units[0][s][i], units[1][s][j])
                found[-1][row][pair] = max(score, found[-1][row].get(pair, -1.0))
        for row, s in enumerate(chosen):
            links = {pair: score for direction in reversed(found) for pair, score in direction[row].items()}
            if symmetrization is not None:
                forward, backward = (set(direction[row]) for direction in found)
                links = {pair: links[pair] for pair in symmetrize(forward, backward, symmetrization)}
            result[s] = links
    return result


def encode_words(
    model, tokenizer, sentences: Sequence[Sequence[str]], layers: Sequence[int], settings: dict
) -> tuple[list[list[int]], dict[int, list[Tensor]]]:
    """The units of sentences and their vectors at some layers.

    Args:
        model: the encoder.
        tokenizer: its fast tokenizer.
        sentences: words of each sentence.
        layers: layers wanted.
        settings: completed settings; `unit` and `word_vector` count here.

    Returns:
        (of each sentence the word of each vector, {layer: one (n, D) tensor a sentence}).
    """
    tokenized = encoder.tokenize(tokenizer, sentences, max_length=MAX_LENGTH)
    if settings["unit"] == "word":
        gather = lambda hidden, tokens: encoder.word_vectors(hidden, tokens, settings["word_vector"])  # noqa: E731
        units = [sentence.kept for sentence in tokenized]
    else:
        gather = encoder.subword_vectors
        units = [[sentence.kept[w] for w in sentence.words if w >= 0] for sentence in tokenized]
    return units, encoder.encode(model, tokenized, layers, tokenizer.pad_token_id, gather)


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
            units, vectors = encode_words(model, tokenizer, words, layers, settings)
            self.units.append(units)
            self.vectors.append({layer: self._center(vectors[layer]) for layer in layers})

    def _center(self, vectors: list[Tensor]) -> list[Tensor]:
        if not self.settings["center"] or not any(map(len, vectors)):
            return vectors
        mean = torch.cat(vectors).mean(0)
        return [x - mean for x in vectors]

    def links(self, method: str, layer: int, overrides: dict | None = None, batch: int = 64) -> list[set]:
        """Extract word links.

        Args:
            method: one of `METHODS`.
            layer: one of the layers given before.
            overrides: settings of the method that differ from the given ones.
            batch: sentence pairs solved at once.

        Returns:
            Per sentence pair a set of (English word, other word).
        """
        settings = self.settings | (overrides or {})
        sides = self.vectors[0][layer], self.vectors[1][layer]
        return [set(links) for links in extract(sides, method, settings, units=tuple(self.units), batch=batch)]

    def plan(self, layer: int, index: int) -> Tensor:
        """The transport plan of one sentence pair, each row scaled to 1: (n, m) over units."""
        x_a, x_b = (self.vectors[side][layer][index][None] for side in (0, 1))
        lengths = [torch.tensor([x.shape[1]]) for x in (x_a, x_b)]
        plan = transport(x_a, x_b, *lengths, self.settings).plan[0]
        return plan / plan.sum(1, keepdim=True).clamp_min(1e-12)
