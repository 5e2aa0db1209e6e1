"""Which of the CUDA and the Triton backend was faster where both were timed: measured.json, beside this file.

``python -m benchmarks choose FILE`` writes the table from a run of the GPU suite. A device of another compute
capability has no entry, and there the CUDA backend is not chosen unless it is asked for.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import NamedTuple

# Points of the longest side, null points not counted. An entry speaks for all sizes up to it that the one before does
# not cover. The last is what clusters of sixteen blocks hold whatever the metric.
BRACKETS = (16, 32, 64, 128, 256, 512, 880)

TABLE: dict[str, dict] = json.loads(resources.files(__package__).joinpath("measured.json").read_text("utf-8"))


class Size(NamedTuple):
    """What of a call decides, in constants: a compiled graph keeps the decision."""

    dtype: str
    bracket: int  # of BRACKETS


def size_of(dtype: str, longest: int) -> Size | None:
    """None beyond the last bracket."""
    for bracket in BRACKETS:
        if longest <= bracket:
            return Size(dtype, bracket)
    return None


def ratio(capability: tuple[int, int], size: Size | None) -> float | None:
    """Time of the CUDA backend over that of Triton; None where they were not timed."""
    if size is None:
        return None
    timed = TABLE.get(name_of(capability), {}).get("cuda_over_triton", {})
    return timed.get(size.dtype, {}).get(str(size.bracket))


def reason(capability: tuple[int, int], size: Size | None) -> str:
    """Why the CUDA backend is not chosen, in words."""
    found = ratio(capability, size)
    if found is None or size is None:
        return "it has not been timed beside Triton for this size on such a device; backend='cuda' asks for it"
    entry = TABLE[name_of(capability)]
    return (
        f"it took {found:.2f} times as long as Triton in {size.dtype} at up to {size.bracket} points a side on an "
        f"{entry['gpu']} ({entry['date']}, commit {entry['commit']})"
    )


def name_of(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
