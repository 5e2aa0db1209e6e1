"""The host executor, which runs the CUDA kernels on machines without a GPU: what it runs right, and what it refuses."""

import pytest
import torch

from otkern.backends import cuda

needs_executor = pytest.mark.skipif(cuda.missing("cpu") is not None, reason=str(cuda.missing("cpu")))
pytestmark = needs_executor

THREADS, BLOCKS, CLUSTER = 64, 4, 2
ORDERS = ({}, {"backward": True}, {"ahead": True}, {"backward": True, "ahead": True})


@pytest.fixture
def executor():
    """The module, which leaves the order of threads as it was."""
    from otkern import _cuda_host

    yield _cuda_host
    _cuda_host.set_order()


@pytest.fixture(params=ORDERS, ids=str)
def ordered(request, executor):
    """The same, for each order of threads."""
    executor.set_order(**request.param)
    return executor


def probe(executor, name: str) -> torch.Tensor:
    return torch.tensor(executor.probe(name)).reshape(BLOCKS, THREADS)


def test_a_barrier_shows_what_other_threads_wrote(ordered):
    thread = torch.arange(THREADS)
    assert (probe(ordered, "neighbour") == (thread + 1) % THREADS).all()


def test_a_missing_barrier_shows_in_another_order(executor):
    forward = probe(executor, "race")
    executor.set_order(backward=True)
    assert not torch.equal(forward, probe(executor, "race"))


def test_a_warp_exchanges_the_numbers_of_its_lanes(ordered):
    thread = torch.arange(THREADS)
    sums = torch.tensor([sum(range(32)), sum(range(32, 64))])[thread // 32]
    assert (probe(ordered, "shuffle") == sums + 1000 * (thread ^ 3)).all()


def test_a_block_writes_into_another_one_of_its_cluster(ordered):
    block = torch.arange(BLOCKS).unsqueeze(1) % CLUSTER
    assert (probe(ordered, "cluster") == 100 * (1 - block) + torch.arange(THREADS)).all()


def test_unset_shared_memory_is_nan(ordered):
    assert probe(ordered, "unset").isnan().all()


def test_copies_arrive_when_they_are_waited_for(ordered):
    assert (probe(ordered, "copy") == 1 + torch.arange(THREADS)).all()
    thread = torch.arange(THREADS) % (THREADS // 2)
    assert (probe(ordered, "bulk") == (1 + thread) + (1 + THREADS // 2 + thread)).all()


def test_who_does_not_wait_for_a_copy_reads_nan(ordered):
    assert probe(ordered, "hasty").isnan().all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unawaited", "ends before its copies have arrived"),
        ("misaligned", "no multiples of 16"),
        ("left_barrier", "leaves a barrier of copies"),
        ("short_copy", "hangs"),
        ("divergent", "hangs"),
        ("early_end", "never reaches|hangs"),
        ("overrun", "wrote beyond its 512 bytes of shared memory"),
        ("ended_block", "shared memory of a block that has ended"),
    ],
)
def test_what_would_hang_or_stray_is_an_error_that_names_the_kernel(executor, name, words):
    with pytest.raises(RuntimeError, match=f"{name}_probe_kernel.*({words})"):
        executor.probe(name)
    # The next grid runs.
    assert not probe(executor, "neighbour").isnan().any()
