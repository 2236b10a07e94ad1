"""Where every sample lies: the byte ranges, labels and groups of the samples of tar shards, memory-mapped."""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.index_files import open_folder


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

    def __init__(self, parts: Sequence["_Part"]) -> None:
        self.shards = [shard for part in parts for shard in part.shards]
        counts = np.array([count for part in parts for count in part.counts], dtype=np.int64)
        self.shard_ranges: NDArray[np.int64] = np.stack([np.cumsum(counts) - counts, np.cumsum(counts)], axis=1)
        """(num_shards, 2): the first sample of each shard, and the one after its last."""
        self.label_names, label_maps = _merged_names(parts, "label")
        self.group_names, group_maps = _merged_names(parts, "group")
        """The names of labels and of groups; empty where they are only numbers."""
        self.statistics = _merged_statistics([part.statistics for part in parts])
        """{"mean": [...], "std": [...]} of each channel, pixel values in [0, 1]; None if unknown."""
        self._parts = list(zip(parts, label_maps, group_maps, strict=True))
        self._first_samples: list[int] = np.cumsum([0] + [len(part.rows) for part in parts]).tolist()
        self._shard_stops: list[int] = self.shard_ranges[:, 1].tolist()
        self._first_shards: list[int] = np.cumsum([0] + [len(part.shards) for part in parts]).tolist()

    @classmethod
    def open(cls, shards: Path | Sequence[Path]) -> "Index":
        """Opens a packed folder, a folder of tars made elsewhere, a tar, a glob pattern of tars, or several of these.

        Tars without an index are scanned once; the scan is kept beside them where the folder is writable.
        Raises ValueError that names the file and the fix, if one is missing, damaged or has changed.
        """
        given = [shards] if isinstance(shards, Path) else list(shards)
        parts = [part for path in given for folder, names in _expand(path) for part in _folder_parts(folder, names)]
        times = Counter(shard.resolve() for part in parts for shard in part.shards)
        if twice := [str(shard) for shard, count in times.items() if count > 1]:
            raise ValueError(f"{twice[0]}: this shard is given twice in {', '.join(map(str, given))}")
        if not any(len(part.rows) for part in parts):
            raise ValueError(f"{', '.join(map(str, given)) or 'the list of shards'}: there is no sample in it")
        return cls(parts)

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

    def check(self, sample: int) -> None:
        """Raises ValueError unless a sample's row is of its shard, behind the row before it and in front of the next.

        Whoever checks each sample that he reads never gets the bytes of another one from a damaged or foreign index.
        """
        number = bisect_right(self._first_samples, sample) - 1
        part, offset, shard = self._parts[number][0], self._first_samples[number], self.shard_number(sample)
        first = max(sample - 1, self._shard_stops[shard - 1] if shard else 0)
        rows = part.rows[first - offset : min(sample + 2, self._shard_stops[shard]) - offset].tolist()
        own, last = shard - self._first_shards[number] + part.first_shard, 0
        for start, stop, _, _, number_of_shard, *_ in rows:
            if not last <= start < stop or number_of_shard != own:
                raise ValueError(_damaged(part, f"the place of sample {sample} is not between those beside it"))
            last = stop
        for name, value in zip(("label", "group"), rows[sample - first][2:4], strict=True):
            if not -1 <= value < (len(part.names[name]) or 1 << 62):
                raise ValueError(_damaged(part, f"a {name} is out of range"))

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

    def _column(self, name: str, maps: Sequence[NDArray[np.int64] | None] | None = None) -> NDArray[np.int64]:
        columns: list[NDArray[np.int64]] = [part.rows[name] for part, _, _ in self._parts]
        for column, (part, _, _) in zip(columns, self._parts, strict=True):
            limit = len(part.names.get(name, ())) or np.iinfo(np.int64).max
            if len(column) and not -1 <= column.min() <= column.max() < limit:
                raise ValueError(_damaged(part, f"a {name} is out of range"))
        for number, renumber in enumerate(maps or []):
            columns[number] = columns[number] if renumber is None else renumber[columns[number]]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)


class _Part(NamedTuple):
    """Consecutive shards of one folder."""

    shards: list[Path]
    counts: list[int]
    rows: NDArray[Any]
    first_shard: int
    """The number that `rows` give the first of `shards`."""
    names: dict[str, list[str]]
    """Of "label" and "group"."""
    statistics: dict[str, Any] | None


def _damaged(part: _Part, what: str) -> str:
    return f"{part.shards[0].parent / 'index.npy'}: damaged, {what}; delete it and index.json, or pack again"


def _expand(path: Path) -> list[tuple[Path, list[str] | None]]:
    """The (folder, names of tars) that a path or pattern stands for; None = all of the folder."""
    if path.is_dir():
        return [(path, None)]
    if path.is_file():
        return [(path.parent, [path.name])]
    if any(character in path.name for character in "*?["):
        found = sorted(path.parent.glob(path.name))
        tars = [tar.name for tar in found if tar.is_file() and tar.suffix == ".tar"]
        folders = [(folder, None) for folder in found if folder.is_dir()]
        if not tars and not folders:
            raise ValueError(f"{path}: no tar and no folder matches this pattern")
        return [*folders, *([(path.parent, tars)] if tars else [])]
    raise ValueError(f"{path}: no such file or folder; expected a folder of tars, a tar, or a pattern such as x/*.tar")


def _folder_parts(folder: Path, names: list[str] | None) -> list[_Part]:
    about, rows, wanted = open_folder(folder, names)
    counts = [shard["samples"] for shard in about["shards"]]
    firsts = np.cumsum([0, *counts]).tolist()
    return [
        _Part(
            shards=[folder.absolute() / about["shards"][shard]["name"] for shard in run],
            counts=counts[run.start : run.stop],
            rows=rows[firsts[run.start] : firsts[run.stop]],
            first_shard=run.start,
            names={"label": about["label_names"], "group": about["group_names"]},
            statistics=about["statistics"],
        )
        for run in _runs(wanted)
    ]


def _runs(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges of consecutive ones."""
    runs: list[range] = []
    for number in numbers:
        follows = bool(runs) and runs[-1].stop == number
        first = runs.pop().start if follows else number
        runs.append(range(first, number + 1))
    return runs


def _merged_names(parts: Sequence[_Part], what: str) -> tuple[list[str], list[NDArray[np.int64] | None]]:
    """The names of all parts together, and for each part how to renumber its own (None = it need not)."""
    every = [part.names[what] for part in parts]
    names = sorted({name for given in every for name in given})
    for part, given in zip(parts, every, strict=True):
        if names and not given and (part.rows[what] >= 0).any():
            raise ValueError(
                f"{part.shards[0].parent}: its {what}s are numbers, other shards name theirs: pack both in the same way"
            )
    return names, [_renumbering(given, names) if given and given != names else None for given in every]


def _renumbering(given: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """(len(given) + 1,): the place of each given name in `wanted`, or -1; the last entry keeps -1 what it is."""
    places = {name: place for place, name in enumerate(wanted)}
    return np.array([places.get(name, -1) for name in given] + [-1], dtype=np.int64)


def _merged_statistics(every: Sequence[dict[str, Any] | None]) -> dict[str, list[float]] | None:
    """The mean and std over the pixels of all parts, of which each says its number of pixels."""
    known = [statistics for statistics in every if statistics is not None]
    if len(known) < len(every) or len({len(statistics["mean"]) for statistics in known}) > 1:
        return None
    if all(statistics == known[0] for statistics in known):
        return {"mean": known[0]["mean"], "std": known[0]["std"]}
    weights = np.array([statistics["pixels"] for statistics in known], dtype=np.float64)
    weights /= weights.sum()
    means, stds = (np.array([statistics[key] for statistics in known]) for key in ("mean", "std"))  # (parts, C)
    mean = weights @ means
    variance = weights @ (stds**2 + means**2) - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}
