"""The one global order of samples: a pure function of (seed, epoch), the same for any number of ranks and workers."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def generator(*names: str | int) -> np.random.Generator:
    """A random generator that is a function of `names` alone, whatever the platform, process or call before."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=32).digest()
    return np.random.Generator(np.random.PCG64(np.frombuffer(digest, dtype="<u4").tolist()))


def micro_batch_positions(
    step: int, micro_step: int, *, batch_size: int, accumulate: int, rank: int, world_size: int
) -> range:
    """The positions in the order that one rank's micro-batch takes.

    Step t takes the positions [t G, (t+1) G) of the global batch G, in `accumulate` consecutive micro-batches whose
    samples do not depend on the number of ranks; each rank takes its consecutive share of each.
    """
    share, rest = divmod(batch_size, accumulate * world_size)
    if rest or not share:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of accumulate {accumulate} times {world_size} ranks; "
            f"try {max(share, 1) * accumulate * world_size}"
        )
    first = step * batch_size + (micro_step * world_size + rank) * share
    return range(first, first + share)


class Order:
    """The samples of all epochs, end to end: `order[position]` -> (epoch, sample id).

    Each epoch permutes the shards, and then the samples inside each window of `window_shards` consecutive shards, so
    whoever reads in order needs the shards of one window at a time and each shard once an epoch. Only the windows in
    use are in memory.
    """

    def __init__(self, shard_counts: Sequence[int], seed: int, window_shards: int) -> None:
        self._counts = np.array(shard_counts, dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._num_samples = int(self._counts.sum())
        self._seed = seed
        self._window_shards = window_shards
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}
        assert self._num_samples > 0 and window_shards > 0

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, window, offset = self._place(position)
        return epoch, int(self._window(epoch, window)[offset])

    def window(self, position: int) -> NDArray[np.int64]:
        """The samples of the window that `position` is in, in their order."""
        epoch, window, _ = self._place(position)
        return self._window(epoch, window)

    def _place(self, position: int) -> tuple[int, int, int]:
        """The epoch, the window in it and the offset in that."""
        assert position >= 0
        epoch, offset = divmod(position, self._num_samples)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, window, offset - int(starts[window])

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards of an epoch, and the offset at which each window starts."""
        if epoch not in self._epochs:
            shards = generator("shards", self._seed, epoch).permutation(len(self._counts))
            counts = self._counts[shards]
            _forget_oldest(self._epochs)
            self._epochs[epoch] = shards, (np.cumsum(counts) - counts)[:: self._window_shards]
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> NDArray[np.int64]:
        if (epoch, window) not in self._windows:
            first = window * self._window_shards
            shards = self._epoch(epoch)[0][first : first + self._window_shards]
            ranges = [np.arange(self._counts[shard]) + self._firsts[shard] for shard in shards]
            _forget_oldest(self._windows)
            self._windows[epoch, window] = generator("window", self._seed, epoch, window).permutation(
                np.concatenate(ranges)
            )
        return self._windows[epoch, window]


def _forget_oldest(cache: dict[Any, Any]) -> None:
    """Makes room for one more of two: a batch may straddle two windows, and nobody goes back."""
    if len(cache) > 1:
        del cache[next(iter(cache))]
