"""The one global order of samples: a pure function of (seed, position), the same for any number of ranks and workers.

A position is a turn of one source; a turn of a source is a turn of one of its pools (its only one, or one for each
class that it balances); and a pool shows its samples pass after pass.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_POOLS_IN_MEMORY = 256
"""Of thousands of classes the windows would be all of the data; to make one again takes less than to decode an image."""


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
    """The samples that a run sees, end to end: `order[position]` -> (pass, sample id).

    The pass is that of the sample's pool, and within it each of the pool's samples comes once. Only the windows in use
    are in memory, and in a mixture the sources' lists of samples.
    """

    def __init__(self, sources: Sequence["Source"], seed: int) -> None:
        self.sources = list(sources)
        self._recent: OrderedDict[tuple[int, int], Pool] = OrderedDict()
        self._turns = Turns([source.weight for source in sources], "sources", seed)
        self._pool_turns = [
            Turns([Fraction(1)] * len(source.pools), "pools", seed, source.name) for source in self.sources
        ]

    @classmethod
    def of_shards(cls, shard_counts: Sequence[int], seed: int, window_shards: int) -> "Order":
        """The order without a mixture: all samples of shards of these sizes, pass after pass."""
        counts = np.array(shard_counts, dtype=np.int64)
        return cls([Source("", Fraction(1), [Pool(np.cumsum(counts) - counts, counts, seed, window_shards)])], seed)

    def __getitem__(self, position: int) -> tuple[int, int]:
        pool, place = self._pool(position)
        return pool[place]

    def window(self, position: int) -> NDArray[np.int64]:
        """The samples that `position` is shuffled among, in their order: of one window of one pool."""
        pool, place = self._pool(position)
        return pool.window(place)

    def windows(self, positions: Iterable[int], end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of all windows that `positions` are in, and those of the window that follows each in its pool.

        For whoever fetches ahead: in a mixture, positions in a row are in windows of several sources and classes.
        Windows that begin at or after the position `end` are left out.
        """
        current: dict[tuple[int, int], NDArray[np.int64]] = {}
        following: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for position in positions:
            pool, place = self._pool(position)
            first, window = pool.window_at(place)
            if (id(pool), first) not in current:
                current[id(pool), first] = window
                if first + len(window) < self._places(position, end):
                    following.append(pool.window(first + len(window)))
        return np.concatenate([*current.values()]), np.concatenate(following)

    def _places(self, position: int, end: int) -> int:
        """How many places of the pool of `position` come before the position `end`."""
        source, turn = self._turns[position]
        number, _ = self._pool_turns[source][turn]
        return self._pool_turns[source].counts(self._turns.counts(end)[source])[number]

    def drawn(self, position: int) -> dict[str, int]:
        """How many samples of each source come before `position`."""
        counts = self._turns.counts(position)
        return {source.name: count for source, count in zip(self.sources, counts, strict=True)}

    def _pool(self, position: int) -> tuple["Pool", int]:
        source, turn = self._turns[position]
        number, place = self._pool_turns[source][turn]
        pool = self._recent[source, number] = self.sources[source].pools[number]
        self._recent.move_to_end((source, number))
        if len(self._recent) > MAX_POOLS_IN_MEMORY:
            self._recent.popitem(last=False)[1].forget()
        return pool, place


class Source(NamedTuple):
    """A part of a mixture."""

    name: str
    weight: Fraction
    pools: Sequence["Pool"]
    """They take equally many turns."""


class Turns:
    """Whose turn it is: `turns[position]` -> (number of the one, how many turns it had before).

    Each of several gets its share of every block of positions, evenly spread over the block with a seeded jitter. The
    counts are whole numbers whose sum over all blocks so far differs from the share by less than one, however long the
    run; in the middle of a block, the count of one of n with the share s differs by less than 2 + (n - 2) s.
    """

    def __init__(self, weights: Sequence[Fraction], *seeds: str | int) -> None:
        self._edges: list[Fraction] = list(accumulate(weights, initial=Fraction(0)))
        """Exact, lest rounding adds up over a long run."""
        self.block_size = ceil(self._edges[-1] / min(weights))  # so each has a turn in it, which keeps counts >= 0
        self._seeds = seeds
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        if self.block_size == 1:
            return 0, position
        block, offset = divmod(position, self.block_size)
        which, before = self._block(block)
        return int(which[offset]), int(before[offset])

    def counts(self, position: int) -> list[int]:
        """How many turns each has before `position`."""
        block, offset = divmod(position, self.block_size)
        counts = self._counts_at(block)
        if offset:
            counts = counts + np.bincount(self._block(block)[0][:offset], minlength=len(counts))
        return [int(count) for count in counts]

    def _counts_at(self, block: int) -> NDArray[np.int64]:
        """The turns of each before a block."""
        position, total = block * self.block_size, self._edges[-1]
        rounded = np.array([int(edge * position / total) for edge in self._edges], dtype=np.int64)
        return rounded[1:] - rounded[:-1]

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Whose turns the positions of a block are, and how many that one had before, both (block_size,)."""
        if block not in self._blocks:
            first = self._counts_at(block)
            amounts = self._counts_at(block + 1) - first
            which = np.repeat(np.arange(len(amounts)), amounts)
            nth = np.arange(self.block_size) - np.repeat(np.cumsum(amounts) - amounts, amounts)
            jitter = generator("turns", *self._seeds, block).random(self.block_size)
            order = np.argsort((nth + jitter) / amounts[which], kind="stable")
            _forget_oldest(self._blocks)
            self._blocks[block] = which[order], (first[which] + nth)[order]
        return self._blocks[block]


class Pool:
    """Samples that are shuffled among each other, pass after pass: `pool[place]` -> (pass, sample id).

    Each pass permutes the shards, and then the samples inside each window of `window_shards` consecutive shards, so
    whoever reads in order needs the shards of one window at a time and each shard once a pass. With a `cap`, a pass has
    only some of the samples, the same number each time.
    """

    def __init__(
        self,
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        seed: int,
        window_shards: int,
        *,
        name: Sequence[str] = (),
        members: NDArray[np.integer[Any]] | None = None,
        cap: "Cap | None" = None,
    ) -> None:
        """Shard i holds the ids starts[i] ... starts[i] + counts[i] - 1, or those places of the ascending `members`."""
        self._starts, self._counts = starts[counts > 0], counts[counts > 0]
        self._seeds: tuple[str | int, ...] = (seed, *name)
        self.name, self.members, self.cap = tuple(name), members, cap
        self.num_samples, self.num_shards = int(counts.sum()), len(self._counts)
        self.pass_size = cap.pass_size if cap else self.num_samples
        self._window_shards = window_shards
        self._passes: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}
        assert self.num_samples > 0 and window_shards > 0

    def __getitem__(self, place: int) -> tuple[int, int]:
        number, window, offset = self._place(place)
        return number, int(self._window(number, window)[offset])

    def window(self, place: int) -> NDArray[np.int64]:
        """The samples of the window that `place` is in, in their order."""
        return self.window_at(place)[1]

    def window_at(self, place: int) -> tuple[int, NDArray[np.int64]]:
        """The first place of that window, and its samples."""
        number, window, offset = self._place(place)
        return place - offset, self._window(number, window)

    @property
    def first_samples(self) -> NDArray[np.int64]:
        """(num_shards,): a sample of each of its shards."""
        return self._starts if self.members is None else self.members[self._starts].astype(np.int64)

    def forget(self) -> None:
        """Gives up what can be computed again."""
        self._passes.clear()
        self._windows.clear()

    def _place(self, place: int) -> tuple[int, int, int]:
        """The pass, the window in it and the offset in that."""
        assert place >= 0
        number, offset = divmod(place, self.pass_size)
        _, starts = self._pass(number)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return number, window, offset - int(starts[window])

    def _pass(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards of a pass, and the offset at which each window starts."""
        if number not in self._passes:
            counts = self._counts
            if self.cap is not None:
                pieces = [self.cap.chosen(number, slice(i, i + (1 << 20))) for i in range(0, self.num_samples, 1 << 20)]
                counts = np.add.reduceat(np.concatenate(pieces), self._starts, dtype=np.int64)
            shards = np.flatnonzero(counts)
            shards = shards[generator("shards", *self._seeds, number).permutation(len(shards))]
            _forget_oldest(self._passes)
            self._passes[number] = shards, (np.cumsum(counts[shards]) - counts[shards])[:: self._window_shards]
        return self._passes[number]

    def _window(self, number: int, window: int) -> NDArray[np.int64]:
        if (number, window) not in self._windows:
            first = window * self._window_shards
            shards = self._pass(number)[0][first : first + self._window_shards]
            samples = np.concatenate([self._of_shard(int(shard), number) for shard in shards])
            _forget_oldest(self._windows)
            self._windows[number, window] = generator("window", *self._seeds, number, window).permutation(samples)
        return self._windows[number, window]

    def _of_shard(self, shard: int, number: int) -> NDArray[np.int64]:
        """The ids of a shard's samples that a pass has."""
        places = slice(int(self._starts[shard]), int(self._starts[shard] + self._counts[shard]))
        if self.members is None:
            return np.arange(places.start, places.stop)
        samples = self.members[places].astype(np.int64)
        return samples if self.cap is None else samples[self.cap.chosen(number, places)]


class Cap:
    """At most `most` samples of each group a pass; the next ones of the group, in a seeded order, at the next pass.

    So a group of n > `most` shows each of its samples in `most` of any n passes. Samples without a group (-1) are all in
    every pass.
    """

    def __init__(self, groups: NDArray[np.int64], most: int, *seeds: str | int) -> None:
        shuffled = generator("cap", *seeds).permutation(len(groups))
        order = shuffled[np.argsort(groups[shuffled], kind="stable")]
        ordered = groups[order]
        begins = np.flatnonzero(np.diff(ordered, prepend=np.iinfo(np.int64).min))
        sizes = np.diff(begins, append=len(groups))
        self.most = most
        self._rank, self._size = (np.empty(len(groups), dtype=np.int32) for _ in range(2))
        self._rank[order] = np.arange(len(groups)) - np.repeat(begins, sizes)
        self._size[order] = np.repeat(sizes, sizes)
        self._rank[groups < 0], self._size[groups < 0] = 0, 1
        grouped = sizes[ordered[begins] >= 0]
        self.pass_size = int(np.minimum(grouped, most).sum() + (groups < 0).sum())

    def chosen(self, number: int, places: slice) -> NDArray[np.bool_]:
        """(n,): whether a pass has the sample at each place."""
        rank, size = self._rank[places].astype(np.int64), self._size[places]
        return (rank - number * self.most) % size < self.most


def _forget_oldest(cache: dict[Any, Any]) -> None:
    """Makes room for one more of three: a batch may straddle two windows, the next is fetched ahead, nobody goes back."""
    if len(cache) > 2:
        del cache[next(iter(cache))]
