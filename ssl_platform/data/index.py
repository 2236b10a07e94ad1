"""Where every sample lies: the byte ranges, labels and groups of the samples of tar shards, memory-mapped."""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.channel_statistics import joined, used
from ssl_platform.data.index_parts import Part, damaged, expand, folder_parts, merged_names, part_column, renumbering
from ssl_platform.data.remote import Remote, RemoteSettings
from ssl_platform.data.tar_headers import shown
from ssl_platform.location import Url, location


class Sample(NamedTuple):
    """One sample's place."""

    shard: int
    """The number of its shard in `Index.shards`."""
    start: int
    stop: int
    """Its bytes are start ... stop - 1 of that file."""
    label: int
    group: int
    """Both -1 where there is none."""


class Index:
    """The samples of one or more tar shards. Sample ids count through the shards in their order, from 0."""

    def __init__(self, parts: Sequence[Part], remote: Remote | None = None) -> None:
        self.remote = remote
        """How the shards that are URLs are read; None if all are files."""
        self.shards = [shard for part in parts for shard in part.shards]
        counts = np.array([count for part in parts for count in part.counts], dtype=np.int64)
        self.shard_ranges: NDArray[np.int64] = np.stack([np.cumsum(counts) - counts, np.cumsum(counts)], axis=1)
        """(num_shards, 2): the first sample of each shard, and the one after its last."""
        self.label_names, label_maps = merged_names(parts, "label")
        self.group_names, group_maps = merged_names(parts, "group")
        """The names of labels and of groups; empty where they are only numbers."""
        self.statistics = _merged_statistics([part.statistics for part in parts])
        """{"mean": [...], "std": [...], "percentiles": {"1": [...], ...}} of each channel, pixel values in [0, 1]; None if
        unknown, and without percentiles if only these are."""
        self.sources: dict[str, range] = {}
        """The shards of each source of a mixture; empty without one."""
        self._digests: dict[str, str] = {}
        self._parts = list(zip(parts, label_maps, group_maps, strict=True))
        self._first_samples: list[int] = np.cumsum([0] + [len(part.rows) for part in parts]).tolist()
        self._shard_stops: list[int] = self.shard_ranges[:, 1].tolist()
        self._first_shards: list[int] = np.cumsum([0] + [len(part.shards) for part in parts]).tolist()

    @classmethod
    def open(
        cls, shards: str | Path | Url | Sequence[str | Path | Url], settings: RemoteSettings | None = None
    ) -> "Index":
        """Opens a packed folder, a folder of tars made elsewhere, a tar, a glob pattern of tars, or several of these.

        Tars without an index are scanned once; the scan is kept beside them where the folder is writable. URLs stand for
        the same, with their index beside them; `settings` say how they are fetched.
        Raises ValueError that names the file and the fix, if one is missing, damaged or has changed.
        """
        given = [location(each) for each in ([shards] if isinstance(shards, str | Path | Url) else shards)]
        remote = Remote(settings or RemoteSettings()) if any(isinstance(each, Url) for each in given) else None
        parts = [
            part
            for each in given
            for folder, names in expand(each, remote)
            for part in folder_parts(folder, names, remote)
        ]
        times = Counter(shard.resolve() for part in parts for shard in part.shards)
        if twice := [str(shard) for shard, count in times.items() if count > 1]:
            raise ValueError(f"{twice[0]}: this shard is given twice in {', '.join(map(str, given))}")
        if not any(len(part.rows) for part in parts):
            raise ValueError(f"{', '.join(map(str, given)) or 'the list of shards'}: there is no sample in it")
        return cls(parts, remote)

    @classmethod
    def joined(cls, sources: Mapping[str, "Index"]) -> "Index":
        """The samples of all sources, one after the other; raises ValueError if a shard is in two of them."""
        remotes = [source.remote for source in sources.values() if source.remote is not None]
        for other_remote in remotes[1:]:
            remotes[0].sizes |= other_remote.sizes
        parts = [part for source in sources.values() for part, _, _ in source._parts]
        index = cls(parts, remotes[0] if remotes else None)
        firsts = np.cumsum([0] + [source.num_shards for source in sources.values()]).tolist()
        index.sources = {name: range(firsts[i], firsts[i + 1]) for i, name in enumerate(sources)}
        owner: dict[Path | Url, str] = {}
        for name, source in sources.items():
            for shard in source.shards:
                if (other := owner.setdefault(shard.resolve(), name)) != name:
                    raise ValueError(f"{shard}: this shard is in two sources, '{other}' and '{name}'")
        return index

    def __len__(self) -> int:
        return self._first_samples[-1]

    def __getitem__(self, sample: int) -> Sample:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of an index of {len(self)}")
        number = bisect_right(self._first_samples, sample) - 1
        part, labels, groups = self._parts[number]
        row = part.rows[sample - self._first_samples[number]]
        return Sample(
            shard=self.shard_number(sample),
            start=int(row["start"]),
            stop=int(row["stop"]),
            label=int(row["label"] if labels is None else labels[row["label"]]),
            group=int(row["group"] if groups is None else groups[row["group"]]),
        )

    def shard_number(self, sample: int) -> int:
        """The number of a sample's shard in `shards`."""
        return bisect_right(self._shard_stops, sample)

    def check(self, sample: int) -> tuple[int, int]:
        """Raises ValueError unless a sample's row is of its shard, behind the row before it and in front of the next.

        Whoever checks each sample that he reads never gets the bytes of another one from a damaged or foreign index.
        Returns where the sample before it ends and where it ends itself: usually, what lies behind both is not its own.
        """
        number = bisect_right(self._first_samples, sample) - 1
        part, offset, shard = self._parts[number][0], self._first_samples[number], self.shard_number(sample)
        first = max(sample - 1, self._shard_stops[shard - 1] if shard else 0)
        rows = part.rows[first - offset : min(sample + 2, self._shard_stops[shard]) - offset].tolist()
        own, last = shard - self._first_shards[number] + part.first_shard, 0
        ends = [0, *(stop for _, stop, *_ in rows)]
        for start, stop, _, _, number_of_shard, *_ in rows:
            if not last <= start < stop or number_of_shard != own:
                raise ValueError(damaged(part, f"the place of sample {sample} is not between those beside it"))
            last = stop
        for name, value in zip(("label", "group"), rows[sample - first][2:4], strict=True):
            if not -1 <= value < (len(part.names[name]) or 1 << 62):
                raise ValueError(damaged(part, f"a {name} is out of range"))
        return ends[sample - first], ends[sample - first + 1]

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @property
    def shard_counts(self) -> list[int]:
        """The number of samples of each shard."""
        return [int(stop - first) for first, stop in self.shard_ranges]

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same shards, by name and number of samples, wherever they lie."""
        named = [(shard.name, count) for shard, count in zip(self.shards, self.shard_counts, strict=True)]
        return hashlib.blake2b(repr(named).encode(), digest_size=8).hexdigest()

    @cached_property
    def shard_of(self) -> NDArray[np.int64]:
        """(N,): the number of each sample's shard."""
        return np.repeat(np.arange(self.num_shards), self.shard_counts)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(N,): the first byte of each sample."""
        return self._column("start")

    @cached_property
    def stops(self) -> NDArray[np.int64]:
        """(N,): the byte after the last of each sample."""
        return self._column("stop")

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(N,): a place in `label_names` if there are names, else the number given; -1 where a sample has none."""
        return self._column("label", [labels for _, labels, _ in self._parts])

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """(N,): the same for groups (patients, blocks of a slide, ...), which an evaluation must not split."""
        return self._column("group", [groups for _, _, groups in self._parts])

    @cached_property
    def columns(self) -> list[str]:
        """The names that `column` takes."""
        return ["label", "group", *sorted({name for part, _, _ in self._parts for name in part.columns})]

    def column(self, name: str) -> tuple[NDArray[np.int64], list[str]]:
        """Codes (N,) and names of "label", "group" or a scalar key of the samples' `json` (magnification, site, ...).

        A code is a place in the names if there are any, else the number given; -1 where a sample has no value. Raises
        ValueError that lists the columns there are.
        """
        if name not in self.columns:
            raise ValueError(self._no_column(name))
        if name in ("label", "group"):  # not `labels`, which would stay in memory
            maps = [labels if name == "label" else groups for _, labels, groups in self._parts]
            return self._column(name, maps), self.label_names if name == "label" else self.group_names
        named = any(part.columns.get(name) for part, _, _ in self._parts)
        pieces = [part_column(part, name, named) for part, _, _ in self._parts]
        names = sorted({value for _, own in pieces for value in own})
        codes = [renumbering(own, names)[codes] if own != names else codes for codes, own in pieces]
        return np.concatenate(codes), names

    def column_digest(self, name: str) -> str:
        """The same only for the same values of a column in the same order."""
        if name not in self._digests:
            codes, names = self.column(name)
            digest = hashlib.blake2b(repr(names).encode(), digest_size=4)
            for first in range(0, len(codes), 1 << 20):  # a column may be a view of the mapped file
                digest.update(np.ascontiguousarray(codes[first : first + (1 << 20)], dtype="<i8").tobytes())
            self._digests[name] = digest.hexdigest()
        return self._digests[name]

    def _no_column(self, name: str) -> str:
        folders = [part.shards[0].parent for part, _, _ in self._parts if part.columns_left_out is None]
        left_out = {column for part, _, _ in self._parts for column in part.columns_left_out or ()}
        why = f"; there are {shown(', '.join(self.columns))}"
        if name in left_out:
            why = " in the index: it has too many different values to be a category" + why
        elif folders:
            why += (
                f". The index of {folders[0]} is older than further columns: give its ssl-pack command again, or "
                f"`ssl-pack --index {folders[0]}` for tars made elsewhere; the tars stay as they are"
            )
        return f"no column '{name}'{why}"

    def _column(self, name: str, maps: Sequence[NDArray[np.int64] | None] | None = None) -> NDArray[np.int64]:
        columns: list[NDArray[np.int64]] = [part.rows[name] for part, _, _ in self._parts]
        for column, (part, _, _) in zip(columns, self._parts, strict=True):
            limit = len(part.names.get(name, ())) or np.iinfo(np.int64).max
            if len(column) and not -1 <= column.min() <= column.max() < limit:
                raise ValueError(damaged(part, f"a {name} is out of range"))
        for number, renumber in enumerate(maps or []):
            columns[number] = columns[number] if renumber is None else renumber[columns[number]]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _merged_statistics(every: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Those over the pixels of all parts, of which each says its number of pixels."""
    known = [statistics for statistics in every if statistics is not None]
    if not known or len(known) < len(every):
        return None
    together = known[0] if all(statistics == known[0] for statistics in known) else joined(known)
    return None if together is None else used(together)
