"""Which of the CUDA and the Triton backend was faster where both were timed: measured.json, beside this file.

``python -m benchmarks choose FILE`` writes the table from a run of the GPU suite. A device of another compute
capability has no entry, and there the CUDA backend is not chosen unless it is asked for.
"""

from __future__ import annotations

import json
from importlib import resources

# Points of the longest side, null points not counted. An entry speaks for all sizes up to it that the one before does
# not cover. The last is what clusters of sixteen blocks hold whatever the metric.
BRACKETS = (16, 32, 64, 128, 256, 512, 880)

TABLE: dict[str, dict] = json.loads(resources.files(__package__).joinpath("measured.json").read_text("utf-8"))


# What of a call decides: index of the device, dtype, one of BRACKETS. Of constants in a plain tuple, which is what a
# compiled graph can keep.
Size = tuple[int, str, int]


UNKNOWN = "it has not been timed beside Triton for this size on such a device; backend='cuda' asks for it"


def bracket_of(longest: int) -> int | None:
    """None beyond the last bracket."""
    for bracket in BRACKETS:
        if longest <= bracket:
            return bracket
    return None


def slower(capability: tuple[int, int], dtype: str, bracket: int) -> str | None:
    """Why the CUDA backend is not the faster one, as far as is known, in words; None: it is."""
    key = name_of(capability)
    found = TABLE.get(key, {}).get("cuda_over_triton", {}).get(dtype, {}).get(str(bracket))
    if found is None:
        return UNKNOWN
    if found < 1:
        return None
    entry = TABLE[key]
    return (
        f"it took {found:.2f} times as long as Triton in {dtype} at up to {bracket} points a side on an "
        f"{entry['gpu']} ({entry['date']}, commit {entry['commit']})"
    )


def name_of(capability: tuple[int, int]) -> str:
    """The key of a device in the table."""
    return "{}.{}".format(*capability)
