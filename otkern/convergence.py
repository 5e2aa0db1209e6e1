"""The warning that a tolerance was not reached, once for each line of the caller's."""

from __future__ import annotations

import os
import sys
import warnings

import torch


class ConvergenceWarning(UserWarning):
    """A problem did not reach its tolerance, or a gradient's linear solve its own."""


# A module's call reaches this package through torch; the line a user wants to see is the one behind both.
_INTERNAL = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__))
WARNED_AT: set[tuple[str, int]] = set()


def warn_once_per_call_site(message: str) -> None:
    """Warn at the first line outside this package and torch, once; `warnings` would see each number as new."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame, level = frame.f_back, level + 1
    site = (frame.f_code.co_filename, frame.f_lineno)
    if site not in WARNED_AT:
        WARNED_AT.add(site)
        warnings.warn(message, ConvergenceWarning, stacklevel=level)
