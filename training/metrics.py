"""What is measured: alignment error rate, sentence and word retrieval, and how far the vectors have collapsed."""

from collections.abc import Iterable

import torch
from torch import Tensor

Links = set[tuple[int, int]] | frozenset[tuple[int, int]]


def alignment_scores(predicted: Iterable[Links], sure: Iterable[Links], possible: Iterable[Links]) -> dict[str, float]:
    """Score word links against gold links, summed over all sentences (Och and Ney 2003).

    AER = 1 − (|A∩S| + |A∩P|) / (|A| + |S|), precision = |A∩P| / |A|, recall = |A∩S| / |S|,
    F1 = 2 · precision · recall / (precision + recall).

    Args:
        predicted: per sentence the links A, as (English index, other index).
        sure: per sentence the sure links S.
        possible: per sentence the possible links P; S is added to it.

    Returns:
        `aer`, `precision`, `recall`, `f1`, all in 0…1; precision without any link is 0, and so is recall without any
        sure link.

    Example:
        >>> alignment_scores([{(0, 0), (1, 2)}], [{(0, 0)}], [{(1, 1)}])["aer"]
        0.33333333333333337
    """
    n_predicted = n_sure = hits_sure = hits_possible = 0
    for links, s, p in zip(predicted, sure, possible, strict=True):
        n_predicted += len(links)
        n_sure += len(s)
        hits_sure += len(links & s)
        hits_possible += len(links & (p | s))
    precision = hits_possible / n_predicted if n_predicted else 0.0
    recall = hits_sure / n_sure if n_sure else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    total = n_predicted + n_sure
    aer = 1 - (hits_sure + hits_possible) / total if total else 1.0
    return {"aer": aer, "precision": precision, "recall": recall, "f1": f1}


def unit(vectors: Tensor) -> Tensor:
    """Scale the last dimension to length 1; a zero vector stays zero."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def retrieval_accuracy(english: Tensor, other: Tensor, csls_neighbours: int = 0) -> dict[str, float]:
    """Top-1 accuracy of finding each row's counterpart by cosine, both ways.

    Args:
        english: (N, D) vectors.
        other: (N, D) vectors; row i belongs to row i of `english`.
        csls_neighbours: 0: plain cosine; k > 0: cross-domain similarity local scaling with k neighbours
            (Conneau et al. 2018), 2·cos − r(english) − r(other).

    Returns:
        `accuracy_forward` (English to other), `accuracy_backward`, and `accuracy`, their mean; 0…1.

    Raises:
        ValueError: the two have different shapes or no rows.
    """
    if english.shape != other.shape or english.ndim != 2 or not len(english):
        raise ValueError(f"english and other must be (N, D) alike, but were {english.shape} and {other.shape}")
    scores = unit(english) @ unit(other).T
    if csls_neighbours:
        k = min(csls_neighbours, len(english))
        scores = 2 * scores - scores.topk(k, 1).values.mean(1, keepdim=True) - scores.topk(k, 0).values.mean(0)
    truth = torch.arange(len(english), device=scores.device)
    forward = (scores.argmax(1) == truth).double().mean().item()
    backward = (scores.argmax(0) == truth).double().mean().item()
    return {
        "accuracy": (forward + backward) / 2,
        "accuracy_forward": forward,
        "accuracy_backward": backward,
    }


def anisotropy(vectors: Tensor) -> float:
    """Mean cosine of all pairs of different rows: near 0 when directions spread, 1 when the space has collapsed.

    It is computed exactly from the sum of the unit vectors, (‖Σ x̂‖² − Σ ‖x̂‖²) / (n (n − 1)).

    Args:
        vectors: (n, D), n ≥ 2, as the encoder gives them (not centred).

    Returns:
        The mean cosine, −1…1.

    Raises:
        ValueError: fewer than two rows.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"vectors must be (n, D) with n >= 2, but was {tuple(vectors.shape)}")
    directions = unit(vectors).double()
    n = len(directions)
    return ((directions.sum(0).square().sum() - directions.square().sum()) / (n * (n - 1))).item()
