"""POT's names for arguments, read where they cost nothing: code that calls POT's solvers needs fewer changes."""

from __future__ import annotations

from typing import Any

METHODS = ("auto", "sinkhorn", "log_sinkhorn")


def read_pot_words(options: dict[str, Any]) -> dict[str, Any]:
    """The options without POT's words: ``method``, ``unbalanced_type`` and ``verbose``.

    Raises:
        ValueError: one of them asks for what is not done here; the message says what is.
    """
    method = options.pop("method", "auto")
    if method == "proximal":
        raise ValueError("method must not be 'proximal': proximal point iterations are not done here; use reg > 0")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but was {method!r}")
    kind = options.pop("unbalanced_type", "kl")
    if not isinstance(kind, str) or kind.lower() != "kl":
        raise ValueError(f"unbalanced_type must be 'kl', in any case of letters, but was {kind!r}")
    verbose = options.pop("verbose", False)
    if not isinstance(verbose, (bool, int)):
        raise ValueError(f"verbose must be a bool, and has no effect, but was {verbose!r}")
    return options
