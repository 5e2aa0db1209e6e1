"""pytest-benchmark cases for work on a kernel: ``pytest benchmarks/test_speed.py --benchmark-autosave``.

``--benchmark-compare`` sets a run beside the last saved one. Each shape is checked against fp64 before it is timed, as
everywhere here; timings fail nothing. The tests of the package do not collect this folder.
"""

import dataclasses

import pytest

from benchmarks.cases import OTKERN, case
from benchmarks.methods.ours import Otkern
from benchmarks.problems import checked_items, make_clouds
from benchmarks.timing import caller
from benchmarks.verify import Verifier

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: see benchmarks/requirements.txt")

CASES = [
    case("64x(64x64)", 64, 64, 768, OTKERN),
    case("16x(128x128)", 16, 128, 768, OTKERN),
    case("64x(8..64)", 64, 64, 768, OTKERN, low=8),
    case("64x(8..64) bfloat16", 64, 64, 768, OTKERN, low=8, dtype="bfloat16"),
    case("1x(700x700)", 1, 700, 768, OTKERN),
    case("2x2", 1, 2, 4, OTKERN, iterations=1),
]


@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("shape", CASES, ids=lambda shape: shape.name)
def test_speed(benchmark, shape, part):
    shape = dataclasses.replace(shape, part=part)
    clouds = make_clouds(shape)
    method = Otkern(shape, clouds)
    call = caller(method, shape)
    Verifier(shape, clouds, checked_items(shape)).check(method, call())
    benchmark(call)
