"""The parts that an index is put together of: consecutive shards of one folder, with names and columns of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.index_files import open_folder
from ssl_platform.data.remote import Remote
from ssl_platform.data.tar_headers import shown
from ssl_platform.location import Url


class Part(NamedTuple):
    """Consecutive shards of one folder."""

    shards: list[Path | Url]
    counts: list[int]
    rows: NDArray[Any]
    first_shard: int
    """The number that `rows` give the first of `shards`."""
    names: dict[str, list[str]]
    """Of "label" and "group"."""
    statistics: dict[str, Any] | None
    columns: dict[str, list[str]] = {}
    """The names of the values of each further column ([] = numbers), which `rows` has as "column0", "column1", ..."""
    columns_left_out: list[str] | None = None
    """Columns with too many different values; None = the index was made before columns were kept."""


def damaged(part: Part, what: str) -> str:
    """The message for an index whose rows are wrong."""
    return f"{part.shards[0].parent / 'index.npy'}: damaged, {what}; delete it and index.json, or pack again"


def part_column(part: Part, name: str, named: bool) -> tuple[NDArray[np.int64], list[str]]:
    """The codes of one part and their names; with `named`, numbers get names too, as other parts have them."""
    if name not in part.columns:
        return np.full(len(part.rows), -1, dtype=np.int64), []
    names = part.columns[name]
    codes = part.rows[f"column{list(part.columns).index(name)}"].astype(np.int64)
    if len(codes) and not -1 <= codes.min() <= codes.max() < (len(names) or np.iinfo(np.int64).max):
        raise ValueError(damaged(part, f"a value of column '{shown(name)}' is out of range"))
    if named and not names:
        values, codes = np.unique(codes, return_inverse=True)
        names = [str(value) for value in values[values >= 0].tolist()]
        codes -= int((values < 0).any())  # -1 is the first of the values
    return codes, names


def expand(path: Path | Url, remote: Remote | None) -> Sequence[tuple[Path | Url, list[str] | None]]:
    """The (folder, names of tars) that a path or pattern stands for; None = all of the folder."""
    if isinstance(path, Url):
        assert remote is not None
        return list(remote.expand(path))
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


def folder_parts(folder: Path | Url, names: list[str] | None, remote: Remote | None) -> list[Part]:
    """The shards `names` (None = all) of a folder; raises ValueError that names what is missing, damaged or changed."""
    if isinstance(folder, Url):
        assert remote is not None
        about, rows, wanted = remote.open_folder(folder, names)
    else:
        folder = folder.absolute()
        about, rows, wanted = open_folder(folder, names)
    counts = [shard["samples"] for shard in about["shards"]]
    firsts = np.cumsum([0, *counts]).tolist()
    return [
        Part(
            shards=[folder / about["shards"][shard]["name"] for shard in run],
            counts=counts[run.start : run.stop],
            rows=rows[firsts[run.start] : firsts[run.stop]],
            first_shard=run.start,
            names={"label": about["label_names"], "group": about["group_names"]},
            statistics=about["statistics"],
            columns={name: column["names"] for name, column in about.get("columns", {}).items()},
            columns_left_out=about.get("columns_left_out"),
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


def merged_names(parts: Sequence[Part], what: str) -> tuple[list[str], list[NDArray[np.int64] | None]]:
    """The names of all parts together, and for each part how to renumber its own (None = it need not)."""
    every = [part.names[what] for part in parts]
    names = sorted({name for given in every for name in given})
    for part, given in zip(parts, every, strict=True):
        if names and not given and (part.rows[what] >= 0).any():
            raise ValueError(
                f"{part.shards[0].parent}: its {what}s are numbers, other shards name theirs: pack both in the same way"
            )
    return names, [renumbering(given, names) if given and given != names else None for given in every]


def renumbering(given: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """(len(given) + 1,): the place of each given name in `wanted`, or -1; the last entry keeps -1 what it is."""
    places = {name: place for place, name in enumerate(wanted)}
    return np.array([places.get(name, -1) for name in given] + [-1], dtype=np.int64)
