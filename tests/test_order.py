"""The order: each sample once an epoch, the same for any number of ranks, each shard in one window."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_platform.data.order import Order, generator, micro_batch_positions

counts = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)
seeds = st.integers(0, 2**40)


@given(counts, seeds, st.integers(1, 12), st.integers(0, 5))
def test_each_sample_once_an_epoch(shard_counts: list[int], seed: int, window: int, epoch: int) -> None:
    order, size = Order.of_shards(shard_counts, seed, window), sum(shard_counts)
    seen = [order[position] for position in range(epoch * size, (epoch + 1) * size)]
    assert {number for number, _ in seen} == {epoch}
    assert sorted(sample for _, sample in seen) == list(range(size))


@given(counts, seeds, st.integers(1, 4))
def test_each_shard_is_visited_in_one_window_only(shard_counts: list[int], seed: int, window: int) -> None:
    order, size = Order.of_shards(shard_counts, seed, window), sum(shard_counts)
    shard_of = np.repeat(np.arange(len(shard_counts)), shard_counts)
    visits = [int(shard_of[order[position][1]]) for position in range(size)]
    windows = [tuple(sorted(set(shard_of[order.window(position)].tolist()))) for position in range(size)]
    assert all(len(shards) <= window for shards in windows)
    assert all(visit in shards for visit, shards in zip(visits, windows, strict=True))
    changes = [shards for shards, following in pairwise([*windows, ()]) if shards != following]
    assert sorted(shard for shards in changes for shard in shards) == [
        s for s, count in enumerate(shard_counts) if count
    ]


@given(counts, seeds, st.integers(1, 4), st.data())
def test_positions_can_be_asked_for_in_any_order(
    shard_counts: list[int], seed: int, window: int, data: st.DataObject
) -> None:
    size = sum(shard_counts)
    positions = data.draw(st.lists(st.integers(0, 4 * size - 1), max_size=20))
    order = Order.of_shards(shard_counts, seed, window)
    assert [order[position] for position in positions] == [
        Order.of_shards(shard_counts, seed, window)[p] for p in positions
    ]


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6]))
def test_any_number_of_ranks_gives_the_same_micro_batches(step: int, share: int, accumulate: int, ranks: int) -> None:
    batch_size = 12 * share * accumulate
    micro_batches = [
        [
            list(
                micro_batch_positions(
                    step, micro_step, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=ranks
                )
            )
            for rank in range(ranks)
        ]
        for micro_step in range(accumulate)
    ]
    assert len({len(part) for micro_batch in micro_batches for part in micro_batch}) == 1
    joined = [[position for part in micro_batch for position in part] for micro_batch in micro_batches]
    size = batch_size // accumulate
    for micro_step, positions in enumerate(joined):
        first = step * batch_size + micro_step * size
        assert positions == list(range(first, first + size))


def test_a_batch_that_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="batch_size 10 is not a multiple of accumulate 2 times 3 ranks; try 6"):
        micro_batch_positions(0, 0, batch_size=10, accumulate=2, rank=0, world_size=3)


def test_epochs_and_seeds_differ_and_the_order_is_pinned() -> None:
    """A change of these numbers changes the order of every run that is resumed."""
    order = Order.of_shards([3, 2, 4], seed=5, window_shards=2)
    epochs = [[order[9 * epoch + offset][1] for offset in range(9)] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [Order.of_shards([3, 2, 4], seed=6, window_shards=2)[offset][1] for offset in range(9)]
    assert epochs[0] == [5, 3, 7, 4, 8, 6, 1, 0, 2]


@settings(max_examples=20)
@given(seeds)
def test_generators_are_functions_of_all_their_names(seed: int) -> None:
    draws = {
        int(generator(*names).integers(2**62))
        for names in [("a", seed), ("b", seed), ("a", seed, 0), ("a", seed + 1), ("a", str(seed)), ("a", seed, "0")]
    }
    assert len(draws) == 6
    assert generator("a", seed).integers(2**62) == generator("a", seed).integers(2**62)


def test_only_the_windows_in_use_are_in_memory() -> None:
    order = Order.of_shards([10] * 1000, seed=0, window_shards=4)
    for position in range(0, 30_000, 7):
        order[position]
    (pool,) = order.sources[0].pools
    assert len(pool._windows) <= 2 and len(pool._passes) <= 2
    assert all(len(samples) == 40 for samples in pool._windows.values())


def test_samples_of_a_window_are_well_mixed() -> None:
    order = Order.of_shards([1000] * 8, seed=1, window_shards=4)
    shards = np.array([order[position][1] for position in range(4000)]) // 1000
    assert np.abs(np.bincount(shards[:1000], minlength=8)[np.unique(shards)] - 250).max() < 60
