"""The alignment loss: WordOT through otkern, the regulariser to the frozen model, word and sentence contrast.

For each language pair of a step, with source vectors x (the other language) and target vectors y (English):

    transport  S(x, y) = OT(x, y) − ½ OT(x, x) − ½ OT(y, y)                          (Alqahtani et al. 2021)
    regulariser  λ ‖c − c₀‖² over the English tokens, c₀ from the frozen initial model
    contrast  −Σ_ij P_ij log softmax_j(⟨x_i, y_j⟩ / τ) over the words of the whole batch, and the same from y to x;
              P is the transport plan, taken as given
    sentence contrast  the same over mean-pooled sentences with P the identity
    spread  ‖mean of x̂ and ŷ‖², which is the mean cosine of random word pairs: the guard against collapse

The loss is the mean over the language pairs and over the layers, the published sum up to a constant factor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import otkern
from training import encoder
from training.extract import inside, pairwise_cost, position_cost
from training.metrics import anisotropy

# What the stage option `relaxation` is called in otkern.
RELAXATIONS = {"balanced": None, "unbalanced": "unbalanced", "partial": "mass", "null_points": "null_cost"}
REDUCTIONS = ("token_mean", "sum", "element_mean")


@dataclass
class Cloud:
    """The points of one side of a step: (P, N, D) vectors, 0 in the padding, with (P,) lengths."""

    vectors: Tensor
    lengths: Tensor

    def of(self, rows: slice) -> "Cloud":
        """The sentences of one language pair."""
        return Cloud(self.vectors[rows], self.lengths[rows])

    def flat(self) -> Tensor:
        """All true points: (Σ lengths, D)."""
        return self.vectors[inside(self.vectors.shape[1], self.lengths)]

    def detach(self) -> "Cloud":
        """The same points without gradient."""
        return Cloud(self.vectors.detach(), self.lengths)

    def centered(self) -> "Cloud":
        """The points minus their mean, 0 in the padding."""
        mask = inside(self.vectors.shape[1], self.lengths)[..., None]
        mean = (self.vectors * mask).sum((0, 1)) / self.lengths.sum().clamp_min(1)
        return Cloud((self.vectors - mean) * mask, self.lengths)

    def pooled(self) -> "Cloud":
        """All true points as the points of one problem."""
        points = self.flat()[None]
        return Cloud(points, torch.tensor([points.shape[1]], device=points.device))


def gather_cloud(hidden: Tensor, tokens: encoder.Tokens, options: dict) -> Cloud:
    """Points of a batch by the options `unit`, `word_vector` and `special_tokens`."""
    if options["unit"] == "word":
        return Cloud(*encoder.word_vectors(hidden, tokens, options["word_vector"]))
    return Cloud(*encoder.subword_vectors(hidden, tokens, keep_special=options["special_tokens"] == "keep"))


def solve_pairs(x: Cloud, y: Cloud, options: dict, prior: float = 0.0):
    """Solve one transport problem for each row of the clouds, between uniform masses.

    Args:
        x: source points.
        y: target points.
        options: `metric`, `reg`, `max_iter`, `tol`, `relaxation`, `relaxation_value`.
        prior: weight of the distance to the diagonal in the cost.

    Returns:
        An `otkern.OTResult`; its value is differentiable with respect to the points.
    """
    solver = {"reg": options["reg"], "max_iter": options["max_iter"], "tol": options["tol"]}
    solver |= {"lengths_a": x.lengths, "lengths_b": y.lengths}
    if (argument := RELAXATIONS[options["relaxation"]]) is not None:
        solver[argument] = options["relaxation_value"]
    if not prior:
        return otkern.solve_sample(x.vectors, y.vectors, metric=options["metric"], **solver)
    shape = x.vectors.shape[1], y.vectors.shape[1]
    cost = pairwise_cost(x.vectors, y.vectors, options["metric"])
    return otkern.solve(cost + prior * position_cost(*shape, x.lengths, y.lengths), **solver)


def plan_of_mass_one(result, options: dict) -> Tensor:
    """The plans without gradient; relaxed ones over the mass that they move, so that every pair counts the same."""
    plan = result.plan.detach()
    if options["relaxation"] == "balanced":
        return plan
    return plan / plan.sum((1, 2), keepdim=True).clamp_min(torch.finfo(plan.dtype).tiny)


def self_transport(x: Cloud, y: Cloud, options: dict) -> Tensor:
    """The debiasing terms ½ OT(x, x) + ½ OT(y, y) of each problem: (P,)."""
    return (solve_pairs(x, x, options).value + solve_pairs(y, y, options).value) / 2


def cost_under(plan: Tensor, x: Cloud, y: Cloud, metric: str) -> Tensor:
    """⟨P, C⟩ of each problem under a plan from elsewhere: (P,), differentiable with respect to the points."""
    return (plan * pairwise_cost(x.vectors, y.vectors, metric)).sum((1, 2))


def contrast_loss(x: Cloud, y: Cloud, plan: Tensor, temperature: float) -> Tensor:
    """Softmax over all words of the batch against the plan, both ways, in nats a word.

    Args:
        x: source points (P, N, D).
        y: target points (P, M, D).
        plan: (P, N, M), each sentence pair of total mass 1, without gradient.
        temperature: τ > 0 of the cosines.

    Returns:
        Scalar, the mean of both directions.
    """
    unit_x, unit_y = (Cloud(torch.nn.functional.normalize(c.vectors, dim=-1), c.lengths) for c in (x, y))
    scores = unit_x.flat() @ unit_y.flat().T / temperature
    within = unit_x.vectors @ unit_y.vectors.mT / temperature
    mask_x, mask_y = inside(plan.shape[1], x.lengths), inside(plan.shape[2], y.lengths)
    # A plan of mass 1 becomes one of mass n (m): every source (target) word counts once.
    forward, backward = plan * x.lengths[:, None, None], plan * y.lengths[:, None, None]
    matched_x = (forward.sum(2)[mask_x] * scores.logsumexp(1)).sum() - (forward * within).sum()
    matched_y = (backward.sum(1)[mask_y] * scores.logsumexp(0)).sum() - (backward * within).sum()
    return matched_x / (2 * x.lengths.sum()) + matched_y / (2 * y.lengths.sum())


def sentence_contrast_loss(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """In-batch softmax between sentence vectors and their translations, (P, D) each, both ways, in nats."""
    scores = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).T / temperature
    truth = torch.arange(len(scores), device=scores.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(scores, truth) + cross_entropy(scores.T, truth)) / 2


def regulariser_loss(current: Tensor, initial: Tensor, tokens: encoder.Tokens, reduction: str) -> Tensor:
    """Squared distance of the tokens' vectors (S, T, D) to those of the frozen model, special tokens left out.

    Raises:
        ValueError: `reduction` is not `token_mean`, `sum` or `element_mean`.
    """
    squared = (current - initial)[tokens.word_index >= 0].square()
    if reduction == "sum":
        return squared.sum()
    if reduction == "element_mean":
        return squared.mean()
    if reduction == "token_mean":
        return squared.sum(-1).mean()
    raise ValueError(f"reg_reduction must be one of {REDUCTIONS}, but was {reduction!r}")


class Parts:
    """Adds up the weighted loss and keeps the parts' unweighted values for the log."""

    def __init__(self):
        self.total, self.values = 0.0, {}

    def add(self, name: str, weight: float, share: float, value: Tensor) -> None:
        """Add `value`, of which there are 1 / `share`, to the part `name`."""
        self.total = self.total + weight * share * value
        self.values[name] = self.values.get(name, 0.0) + share * float(value.detach())


def word_loss(x: Cloud, y: Cloud, options: dict, prior: float, plan: Tensor | None, parts: Parts, share: float) -> None:
    """Add the transport and contrast terms of one language pair at one layer.

    Args:
        x: source points.
        y: target points.
        options: a stage of the configuration.
        prior: weight of the position prior.
        plan: None: these points' own; else the plan of another layer.
        parts: where the terms are added.
        share: their share of the mean.
    """
    contrast = options["contrast"]
    if plan is None and (options["ot_weight"] or contrast["weight"]):
        result = solve_pairs(x, y, options, prior)
        value = result.value
        plan = plan_of_mass_one(result, options) if contrast["weight"] else None
    elif options["ot_weight"]:
        value = cost_under(plan, x, y, options["metric"])
    if options["ot_weight"]:
        value = value - self_transport(x, y, options) if options["debias"] else value
        parts.add("transport", options["ot_weight"], share, value.mean())
    if contrast["weight"]:
        parts.add("contrast", contrast["weight"], share, contrast_loss(x, y, plan, contrast["temperature"]))


def alignment_loss(
    states: list[dict[int, Tensor]],
    frozen: dict[int, Tensor],
    tokens: list[encoder.Tokens],
    groups: list[slice],
    options: dict,
    prior: float,
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss of one step.

    Args:
        states: hidden states by layer of the other languages' and of the English sentences, (P, T, D) each.
        frozen: the initial model's hidden states of the English sentences at the layers to regularise; may be empty.
        tokens: the two batches that gave them.
        groups: the rows of each language pair.
        options: a stage of the configuration.
        prior: weight of the position prior at this step.

    Returns:
        (scalar loss, its parts by name as floats, with the anisotropy of the words at the first layer).
    """
    parts, plan_layer, sentence = Parts(), options["plan_layer"], options["sentence_contrast"]
    layers = {*options["layers"], *([] if plan_layer is None else [plan_layer])}
    points = {layer: [gather_cloud(states[side][layer], tokens[side], options) for side in (0, 1)] for layer in layers}

    def clouds(layer: int, rows: slice) -> list[Cloud]:
        x, y = (side.of(rows) for side in points[layer])
        pair = [x, y.detach() if options["target_gradient"] == "detach" else y]
        pair = [side.pooled() for side in pair] if options["scope"] == "batch" else pair
        return [side.centered() for side in pair] if options["center"] else pair

    for rows in groups:
        plan = None
        if plan_layer is not None:
            result = solve_pairs(*(side.detach() for side in clouds(plan_layer, rows)), options, prior)
            plan = plan_of_mass_one(result, options)
        share = 1 / len(groups)
        for layer in options["layers"]:
            word_loss(*clouds(layer, rows), options, prior, plan, parts, share / len(options["layers"]))
        if sentence["weight"]:
            x, y = (encoder.sentence_vectors(states[s][sentence["layer"]], tokens[s])[rows] for s in (0, 1))
            x, y = (x - x.mean(0), y - y.mean(0)) if options["center"] else (x, y)
            value = sentence_contrast_loss(x, y, sentence["temperature"])
            parts.add("sentence", sentence["weight"], share, value)
    for layer, initial in frozen.items():
        value = regulariser_loss(states[1][layer], initial, tokens[1], options["reg_reduction"])
        parts.add("regulariser", options["regulariser"], 1 / len(frozen), value)
    words = {layer: torch.cat([side.flat() for side in points[layer]]) for layer in options["layers"]}
    if options["spread"]:
        for vectors in words.values():
            mean = torch.nn.functional.normalize(vectors, dim=-1).mean(0)
            parts.add("spread", options["spread"], 1 / len(words), mean.square().sum())
    return parts.total, parts.values | {"anisotropy": anisotropy(words[options["layers"][0]].detach())}
