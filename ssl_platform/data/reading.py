"""Reads single samples by their ids, and says which one it was if that fails."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.index import Index
from ssl_platform.data.remote_reading import RemoteReader
from ssl_platform.data.slides import tiles
from ssl_platform.data.tar_headers import BLOCK, shown
from ssl_platform.data.tars import Record, key_of_header, parse_record
from ssl_platform.data.transfer import Cancelled, RemoteError
from ssl_platform.location import Url
from ssl_platform.modalities import Modality


class ShardReader:
    """Reads samples by their ids, with at most `cache_shards` files open."""

    def __init__(self, index: Index, cache_shards: int) -> None:
        self.index = index
        self._cache_shards = cache_shards
        self._files: OrderedDict[int, int] = OrderedDict()
        self.remote = None if index.remote is None else RemoteReader(index.remote)

    def read(self, sample: int) -> Record:
        """The record of a sample; raises OSError or ValueError with the reason if it cannot be read.

        Raises RemoteError if it is the whole shard that cannot be had.
        """
        around = self.index.check(sample)
        place = self.index[sample]
        file = self._file(place.shard)
        if place.stop > (size := os.fstat(file).st_size):
            raise ValueError(f"the shard ends at byte {size}, inside this sample")
        data = os.pread(file, place.stop - place.start, place.start)
        if len(data) != place.stop - place.start:
            raise ValueError(f"the shard ends at byte {place.start + len(data)}, inside this sample")
        record = parse_record(data)
        if any(key_of_header(os.pread(file, BLOCK, end)) == record.key for end in around if end != place.start):
            raise ValueError("the index leaves out some of its members; delete index.json and index.npy, or pack again")
        return tiles.resolved(record, self.index.shards[place.shard])

    def shard_name(self, sample: int) -> str:
        return self.index.shards[self.index.shard_number(sample)].name

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= self._cache_shards:
                os.close(self._files.popitem(last=False)[1])
            place = self.index.shards[shard]
            self._files[shard] = os.open(place, os.O_RDONLY) if isinstance(place, Path) else self._fetched(place)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _fetched(self, url: Url) -> int:
        assert self.remote is not None, "an index with URLs has one"
        return self.remote.open(url)

    def expect(self, current: Sequence[int], following: Sequence[int]) -> None:
        """Says which shards are being read and which come next, so that remote ones are fetched ahead."""
        if self.remote is not None:
            named = [[self.index.shards[shard] for shard in shards] for shards in (current, following)]
            self.remote.expect(*([place for place in places if isinstance(place, Url)] for places in named))

    def shards_of(self, samples: NDArray[np.int64]) -> list[int]:
        """The shards of some samples, in the order in which they come first."""
        shards = np.searchsorted(self.index.shard_ranges[:, 1], samples, side="right")
        _, first = np.unique(shards, return_index=True)
        return [int(shard) for shard in shards[np.sort(first)]]

    def close(self) -> None:
        """Ends the transfers of remote shards, those of forked workers too."""
        if self.remote is not None:
            self.remote.close()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class BadSampleError(ValueError):
    """A sample that cannot be read, decoded or augmented: "shard.tar: key: reason"."""


def decoded(reader: ShardReader, modality: Modality, sample: int) -> tuple[str, Any]:
    """Read -> decode: a sample's key and example; raises BadSampleError."""
    try:
        record = reader.read(sample)
    except (RemoteError, Cancelled):  # thousands of samples are not bad because their shard is out of reach
        raise
    except Exception as error:
        raise BadSampleError(f"{reader.shard_name(sample)}: sample {sample}: {reason(error)}") from error
    try:
        return record.key, modality.decode(record.members)
    except Exception as error:
        raise BadSampleError(f"{reader.shard_name(sample)}: {shown(record.key)}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """One line; the type too, unless it is the error that modalities raise on purpose."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
