"""The launches of the CUDA backend: ordinary arithmetic on sizes, the same with and without a GPU."""

import functools
import random

import pytest

from otkern.backends import cuda

KILO = 1024
# Of compute capability 8.0, of 8.6 and 8.9, of 9.0 and 10.0, of 12.0.
LIMITS = {"sm_80": (163 * KILO, 1), "sm_86": (99 * KILO, 1), "sm_90": (227 * KILO, 16), "sm_120": (99 * KILO, 8)}
DRAWS = 2000

missing = cuda.missing("cuda") and cuda.missing("cpu")
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@functools.cache
def native():
    """Whichever module has the launch computations: they ask no device."""
    if cuda.missing("cuda") is None:
        from otkern import _native

        return _native
    from otkern import _cuda_host

    return _cuda_host


def draws():
    """(limits, kernel, wide, n, m, directions): sizes of all magnitudes, square and oblong."""
    generator = random.Random(0)
    for _ in range(DRAWS):
        n, m = (int(2 ** generator.uniform(0, 10.2)) for _ in range(2))
        if generator.random() < 0.5:
            m = max(1, min(n + generator.randint(-3, 3), 1200))
        limits = generator.choice(list(LIMITS.values()))
        yield (
            limits,
            generator.choice(("forward", "implicit")),
            generator.random() < 0.5,
            n,
            m,
            generator.random() < 0.5,
        )


def fits(limits, kernel, wide, n, m, directions) -> list[bool]:
    """For each class whether the item's memory fits into it."""
    classes = native().cuda_classes(kernel, limits)
    return [
        native().cuda_bytes(kernel, limits, number, wide, n, m, directions) <= found["bytes"]
        for number, found in enumerate(classes)
    ]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("kernel", ["forward", "implicit"])
def test_classes_are_launches_that_the_device_takes(kernel, limits):
    shared, cluster = limits
    for found in native().cuda_classes(kernel, limits):
        assert 1 <= found["cluster"] <= cluster
        assert found["threads"] % 32 == 0 and 32 <= found["threads"] <= 256
        assert 0 < found["bytes"] <= shared


def test_every_size_falls_into_exactly_one_class():
    # A kernel serves what fits into its class and not into the one before: what fits once must fit into all later ones.
    for draw in draws():
        found = fits(*draw)
        assert found == sorted(found), draw


def test_a_larger_item_is_never_of_a_smaller_class():
    # So the class of the longest sides is the last one that has to be launched.
    for limits, kernel, wide, n, m, directions in draws():
        found = fits(limits, kernel, wide, n, m, directions)
        for smaller in ((n - 1, m), (n, m - 1), (n // 2, m // 2)):
            if min(smaller) > 0:
                assert all(a <= b for a, b in zip(found, fits(limits, kernel, wide, *smaller, directions), strict=True))


def test_the_adjoint_serves_what_the_forward_does():
    for limits, _, wide, n, m, directions in draws():
        assert any(fits(limits, "implicit", wide, n, m, directions)) >= any(
            fits(limits, "forward", wide, n, m, directions)
        )


def test_memory_of_a_launch_covers_every_item_that_it_serves():
    # A launch has what its class allows or, if that is less, what the longest sides of the batch need.
    for limits, kernel, wide, n, m, directions in draws():
        for number, found in enumerate(native().cuda_classes(kernel, limits)):
            longest = native().cuda_bytes(kernel, limits, number, wide, n + 7, m + 3, directions)
            mine = native().cuda_bytes(kernel, limits, number, wide, n, m, directions)
            assert mine > found["bytes"] or mine <= min(longest, found["bytes"])


@pytest.mark.parametrize(("side", "directions"), [(880, True), (900, False)])
def test_nine_hundred_points_a_side_fit_into_a_cluster(side, directions):
    assert any(fits(LIMITS["sm_90"], "forward", False, side, side, directions))


def test_rows_of_the_plan_fit_wherever_the_forward_does():
    for limits, _, wide, n, m, directions in draws():
        rows, used = native().cuda_plan_rows(limits, wide, n, m, 300, directions)
        assert rows in (0, 1, 2, 4, 8, 16, 32, 64, 128) and used <= limits[0]
        assert rows > 0 or not any(fits(limits, "forward", wide, n, m, directions))


def test_more_shared_memory_keeps_no_block_off():
    generator = random.Random(1)
    for _ in range(DRAWS):
        limits = generator.choice(list(LIMITS.values()))
        threads, registers = generator.choice((64, 128, 256)), generator.choice((136, 232))
        needed = generator.randint(1, limits[0])
        given = native().cuda_roomy_bytes(limits, needed, threads, registers)
        # A block also takes a KiB of the system; registers are given out in whole warps.
        whole = limits[0] + KILO
        by_registers = 65536 // (registers * threads)
        blocks = max(1, min(by_registers, whole // (needed + KILO)))
        assert needed <= given <= limits[0]
        assert blocks * (given + KILO) <= whole
        assert (blocks + 1) * (given + 16 + KILO) > whole or given + 16 > limits[0]


def test_tiles_fit_into_any_memory_that_holds_the_least_one():
    generator = random.Random(2)
    for _ in range(DRAWS):
        warps, rows = generator.choice((2, 4, 8)), generator.randint(1, 1000)
        columns, wide = generator.randint(1, 1000), generator.choice((16, 32))
        least = 32 + 64 * (32 + 16)
        memory = least + int(2 ** generator.uniform(0, 17.8)) - 1
        down, across, width, used = native().cuda_cost_tiles(warps, rows, columns, wide, 2 * columns, memory)
        assert 1 <= down * across <= warps and down * 32 < rows + 32 * 2
        assert width in (32, 64, 128, 256)
        assert used == 32 + (32 * down + wide * across) * (width + 16) <= memory
        # No warp without a column, as far as halving goes.
        assert across == 1 or across // 2 * wide < columns


def test_tiles_of_products_fit_into_any_memory_that_holds_the_least_one():
    generator = random.Random(3)
    for _ in range(DRAWS):
        rows, m = generator.randint(1, 128), generator.randint(1, 1000)
        features, element = generator.randint(1, 1000), generator.choice((2, 4))
        least = 32 + 16 * (32 * element + 16)
        memory = least + int(2 ** generator.uniform(0, 17.8)) - 1
        down, across, points, used = native().cuda_product_tiles(8, rows, m, features, element, memory)
        assert 32 * (down - 1) < rows <= 32 * down and 1 <= down * across <= 8
        assert points in (16, 32, 64)
        assert used == 32 + points * (32 * across * element + 16) <= memory
        assert across == 1 or across // 2 * 32 < features
