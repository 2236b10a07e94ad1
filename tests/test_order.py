"""The order: each sample once an epoch, the same for any number of ranks, each shard in one window and opened once.

What holds of opening shards: a reader that goes through the order by itself (no workers, or each one of them) opens
each shard at most once an epoch if it keeps `window_shards` of them; a batch that straddles two windows needs no more,
as the old window is done with. Processes that share a cache and run ahead of each other, but not by more than a window,
fetch each shard once if the cache holds three windows. A run that is resumed opens the shards of its window again.
"""

import os
import tracemalloc
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_platform.data.index import Index
from ssl_platform.data.order import Order, generator, micro_batch_positions
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.shards import train_batches
from ssl_platform.views import SampleViews
from tests.test_shards import Toy, batches, write_shards

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


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_any_number_of_ranks_gives_the_same_micro_batches(step: int, share: int, accumulate: int, ranks: int) -> None:
    batch_size = share * accumulate * ranks
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
    assert len(pool._windows) <= 3 and len(pool._passes) <= 3
    assert all(len(samples) == 40 for samples in pool._windows.values())


def test_samples_of_a_window_are_well_mixed() -> None:
    order = Order.of_shards([1000] * 8, seed=1, window_shards=4)
    shards = np.array([order[position][1] for position in range(4000)]) // 1000
    assert np.abs(np.bincount(shards[:1000], minlength=8)[np.unique(shards)] - 250).max() < 60


# -- each shard once ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_shards(tmp_path_factory.mktemp("order"), [5, 7, 4, 6, 3, 8, 2, 6, 1, 5])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A file that gets a line "process shard" whenever a shard is opened, in whichever process."""
    log, plain_open = tmp_path / "opened", os.open
    log.touch()

    def logged_open(path: Any, *arguments: Any) -> int:
        if str(path).endswith(".tar"):
            with log.open("a") as file:
                file.write(f"{os.getpid()} {Path(path).name}\n")
        return plain_open(path, *arguments)

    monkeypatch.setattr("ssl_platform.data.reading.os.open", logged_open)
    yield log


@settings(max_examples=30)
@given(seed=seeds, window=st.integers(1, 9), begin=st.integers(0, 46))
def test_a_cache_of_one_window_opens_each_shard_once_an_epoch(index: Index, seed: int, window: int, begin: int) -> None:
    """In order, from any position on: of a run that begins inside an epoch, the rest of it."""
    order, size = Order.of_shards(index.shard_counts, seed, window), len(index)
    opens: Counter[tuple[int, int]] = Counter()

    class Counted(ShardReader):
        def _file(self, shard: int) -> int:
            opens[epoch, shard] += shard not in self._files
            return super()._file(shard)

    reader = Counted(index, cache_shards=window)
    for position in range(begin, 3 * size):
        epoch, sample = order[position]
        assert reader.read(sample).key == f"k{sample:03d}"
    assert max(opens.values()) == 1
    if begin == 0:
        assert {shard for epoch, shard in opens if epoch == 0} == set(range(index.num_shards))
    for epoch in (1, 2):  # what the epoch before has left open need not be opened
        assert sum(opens[epoch, shard] for shard in range(index.num_shards)) >= index.num_shards - window


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_worker_opens_each_shard_at_most_once_an_epoch(index: Index, workers: int, opened: Path) -> None:
    for _ in batches(index, workers, batch_size=len(index), last_step=1, cache_shards=2, accumulate=47):
        pass
    by_process = Counter(opened.read_text().splitlines())
    assert len({line.split()[0] for line in by_process}) == max(workers, 1)
    assert set(by_process.values()) == {1}, by_process
    assert {line.split()[1] for line in by_process} == {shard.name for shard in index.shards}


@given(
    st.lists(st.integers(6, 9), min_size=2, max_size=10), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), seeds,
    st.data(),
)  # fmt: skip
@settings(max_examples=60)
def test_processes_that_share_a_cache_of_three_windows_fetch_each_shard_once(
    shard_counts: list[int], window: int, num_processes: int, share: int, seed: int, data: st.DataObject
) -> None:
    """Each takes every num_processes-th micro-batch of `share` samples and is at most six positions ahead of the last."""
    order, size = Order.of_shards(shard_counts, seed, window), sum(shard_counts)
    shard_of = np.repeat(np.arange(len(shard_counts)), shard_counts)
    waiting = [[p for p in range(size) if p // share % num_processes == process] for process in range(num_processes)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    cache, fetched = OrderedDict[int, None](), Counter[int]()
    while any(waiting):
        slowest = min(positions[0] for positions in waiting if positions)
        able = [positions for positions in waiting if positions and positions[0] < slowest + 6]
        shard = int(shard_of[order[able[rng.integers(len(able))].pop(0)][1]])
        fetched[shard] += shard not in cache
        cache[shard] = None
        cache.move_to_end(shard)
        if len(cache) > 3 * window:
            cache.popitem(last=False)
    assert fetched == dict.fromkeys(range(len(shard_counts)), 1)


# -- memory ------------------------------------------------------------------------------------------------------------


class Cheap(Toy):
    def augment(self, examples: tuple[Any, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        return {
            "global": SampleViews(examples[0].expand(2, 1, -1), torch.tensor([0, 1])),
            "local": SampleViews(examples[0][:2].expand(3, -1), torch.tensor([2, 3, 4])),
        }


def test_memory_does_not_grow_with_the_samples_seen(index: Index) -> None:
    """What Python and NumPy hold after 50 epochs is what they held after 10; benchmarks/memory.py measures processes."""
    order, held = Order.of_shards(index.shard_counts, 0, 3), []
    loaded = train_batches(
        index, Cheap(), {}, order=order, seed=0, batch_size=47, first_step=0, last_step=50, cache_shards=3, workers=0,
        prefetch=2,
    )  # fmt: skip
    tracemalloc.start()
    try:
        for batch in loaded:
            if batch.step % 10 == 9:
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(held) == 5 and max(held[1:]) - held[0] < 20_000, held  # bytes; one int a sample would be 60,000
