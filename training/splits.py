"""The held-out split: which parallel pairs no training in this project may ever see.

The decision depends on the English side alone, so a sentence is held out in every language and in every corpus at
once. **Every training run, pretraining and the statistical baseline included, must drop the pairs for which
`is_held_out(english)` is true**, whatever corpus they come from; evaluation on held-out text takes only those.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

SPLIT_SEED = "otkern held-out split 1"
HELD_OUT_FRACTION = 0.11


def normalise_english(text: str) -> str:
    """Reduce a sentence to what two copies of it share: NFKC, case-folded, letters, marks and digits only.

    Args:
        text: a sentence, in any script.

    Returns:
        The normalised sentence without spaces or punctuation; empty if nothing else was there.

    Example:
        >>> normalise_english("It's  ９ o'clock!")
        'its9oclock'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(char for char in folded if unicodedata.category(char)[0] in "LMN")


def _hash(text: str) -> int:
    """Return the first 64 bits of the seeded SHA-256 of the normalised text, as an integer."""
    digest = hashlib.sha256(f"{SPLIT_SEED}\0{normalise_english(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def is_held_out(english: str) -> bool:
    """Tell whether a pair with this English side belongs to the held-out part and must not be trained on.

    Args:
        english: the English side of a pair, raw (it is normalised here).

    Returns:
        True for about 11 % of all distinct English sentences: those whose seeded SHA-256 falls in the lowest ninth.
        The same on every machine and in every run.
    """
    return _hash(english) < HELD_OUT_FRACTION * 2**64


def held_out_pairs(pairs: Iterable[tuple[str, str]], limit: int = 1000) -> list[tuple[str, str]]:
    """Choose the held-out pairs of a corpus for evaluation, each sentence of either side at most once.

    The order is that of the hashes, so the choice does not depend on the order of the corpus.

    Args:
        pairs: (English, other) sentences.
        limit: how many pairs to return at most, > 0.

    Returns:
        Up to `limit` pairs with `is_held_out(english)`, distinct on both sides after normalisation.

    Raises:
        ValueError: `limit` is not a positive integer.
    """
    if limit <= 0:
        raise ValueError(f"limit must be a positive number of pairs, but was {limit!r}")
    candidates = sorted(
        (pair for pair in pairs if is_held_out(pair[0])), key=lambda pair: (_hash(pair[0]), _hash(pair[1]), pair)
    )
    chosen, seen_english, seen_other = [], set(), set()
    for english, other in candidates:
        keys = normalise_english(english), normalise_english(other)
        if not all(keys) or keys[0] in seen_english or keys[1] in seen_other:
            continue
        seen_english.add(keys[0])
        seen_other.add(keys[1])
        chosen.append((english, other))
        if len(chosen) == limit:
            break
    return chosen
