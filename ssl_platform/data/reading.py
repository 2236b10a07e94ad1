"""Reads single samples by their ids, and says which one it was if that fails."""

import os
from collections import OrderedDict
from typing import Any

from ssl_platform.data.index import Index
from ssl_platform.data.tars import Record, parse_record, shown
from ssl_platform.modalities import Modality


class ShardReader:
    """Reads samples by their ids, with at most `cache_shards` files open."""

    def __init__(self, index: Index, cache_shards: int) -> None:
        self.index = index
        self._cache_shards = cache_shards
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> Record:
        """The record of a sample; raises OSError or ValueError with the reason if it cannot be read."""
        self.index.check(sample)
        place = self.index[sample]
        file = self._file(place.shard)
        if place.stop > (size := os.fstat(file).st_size):
            raise ValueError(f"the shard ends at byte {size}, inside this sample")
        data = os.pread(file, place.stop - place.start, place.start)
        if len(data) != place.stop - place.start:
            raise ValueError(f"the shard ends at byte {place.start + len(data)}, inside this sample")
        return parse_record(data)

    def shard_name(self, sample: int) -> str:
        return self.index.shards[self.index.shard_number(sample)].name

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= self._cache_shards:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class BadSampleError(ValueError):
    """A sample that cannot be read, decoded or augmented: "shard.tar: key: reason"."""


def decoded(reader: ShardReader, modality: Modality, sample: int) -> tuple[str, Any]:
    """Read -> decode: a sample's key and example; raises BadSampleError."""
    try:
        record = reader.read(sample)
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
