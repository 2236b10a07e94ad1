"""What scans of shards say, as the rows and the description that an index holds, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.tars import Scalar, ShardScan

FORMAT = 2
READABLE = (1, 2)
"""1 had no columns besides label and group."""
ROW = np.dtype([(name, "<i8") for name in ("start", "stop", "label", "group", "shard")])
"""A sample in `index.npy`: its first byte, the byte after its last, label and group (-1 none), number of its shard.

The columns of `index.json` follow, as "column0", "column1", ... in their order.
"""
_COLUMN_TYPES: list[np.dtype[Any]] = [np.dtype(kind) for kind in ("<i1", "<i2", "<i4", "<i8")]
MAX_COLUMNS = 100
MAX_NAMES = 1 << 16
"""A text that differs more often is no category (a file name, a caption): such a column is left out."""
_LARGEST = 1 << 62


def describe(
    scans: Mapping[str, ShardScan],
    *,
    scanned: bool,
    statistics: dict[str, Any] | None = None,
    left_out: Sequence[str] = (),
    **more: Any,
) -> tuple[dict[str, Any], NDArray[Any]]:
    """What `index.json` and `index.npy` hold of the shards {name: scan}, which are put in the order of their names.

    `scanned` tells tars made elsewhere from those of ssl-pack; `left_out` are columns known to be no categories; `more`
    are further keys of the description.
    """
    scans = dict(sorted(scans.items()))
    sizes = [len(scan.starts) for scan in scans.values()]
    labels, label_names = number([label for scan in scans.values() for label in scan.labels])
    groups, group_names = number([group for scan in scans.values() for group in scan.groups])
    columns, codes, left_out = _columns(scans, sizes, left_out)
    rows = np.empty(len(labels), dtype=row_type(columns))
    rows["start"] = [start for scan in scans.values() for start in scan.starts]
    rows["stop"] = [stop for scan in scans.values() for stop in scan.stops]
    rows["label"], rows["group"], rows["shard"] = labels, groups, np.repeat(np.arange(len(scans)), sizes)
    for place, column in enumerate(codes):
        rows[f"column{place}"] = column
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    about = {
        "format": FORMAT,
        "scanned": scanned,
        "samples": len(rows),
        "label_counts": {
            label_names[value] if label_names else str(value): int(count)
            for value, count in zip(values.tolist(), counts, strict=True)
        },
        "unlabelled": int((labels < 0).sum()),
        "statistics": statistics,
        **more,
        "label_names": label_names,
        "group_names": group_names,
        "columns": columns,
        "columns_left_out": left_out,
        "shards": [
            {"name": name, "bytes": scan.size, "samples": size} | ({"modified": scan.modified} if scanned else {})
            for (name, scan), size in zip(scans.items(), sizes, strict=True)
        ],
    }
    return about, rows


def number(values: Sequence[int | str | None]) -> tuple[NDArray[np.int64], list[str]]:
    """Numbers labels or groups: -1 for None; integers stand for themselves, names for their place in the sorted list.

    Where integers and names are mixed, or an integer has more than 62 bits, all are names. Returns the numbers, and the
    names ([] for integers).
    """
    if not any(isinstance(value, str) or (value is not None and abs(value) >= _LARGEST) for value in values):
        return np.array([-1 if value is None else max(int(value), -1) for value in values], dtype=np.int64), []
    texts = [None if value is None else _printable(str(value)) for value in values]
    names = sorted({text for text in texts if text is not None})
    places: dict[str | None, int] = {None: -1, **{name: place for place, name in enumerate(names)}}
    return np.array([places[text] for text in texts], dtype=np.int64), names


def _printable(text: str) -> str:
    """Halves of surrogate pairs, which JSON may hold and no file or terminal takes, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode() if not text.isascii() else text


def _columns(
    scans: Mapping[str, ShardScan], sizes: Sequence[int], known_left_out: Sequence[str]
) -> tuple[dict[str, Any], list[NDArray[np.int64]], list[str]]:
    """The columns of `json` keys: {name: its type in a row and its names}, the codes of each, and what is left out."""
    columns: dict[str, Any] = {}
    codes: list[NDArray[np.int64]] = []
    left_out = sorted(known_left_out)
    for name in sorted({name for scan in scans.values() for name in scan.columns} - {*left_out}):
        pairs = zip(scans.values(), sizes, strict=True)
        values = [value for scan, size in pairs for value in scan.columns.get(name) or [None] * size]
        if any(isinstance(value, str) or (value is not None and value < 0) for value in values):
            values = [None if value is None else str(value) for value in values]
        if len({value for value in values if isinstance(value, str)}) > MAX_NAMES or len(columns) == MAX_COLUMNS:
            left_out.append(name)
            continue
        numbers, names = number(values)
        columns[name] = {"type": smallest_type(int(numbers.max(initial=0))).str, "names": names}
        codes.append(numbers)
    return columns, codes, left_out


def smallest_type(largest: int) -> np.dtype[Any]:
    """The smallest integer type that holds -1 ... `largest`."""
    return next(kind for kind in _COLUMN_TYPES if np.iinfo(kind).max >= largest)


def row_type(columns: Mapping[str, Any]) -> np.dtype[Any]:
    """The type of a row with these columns."""
    further = [(f"column{place}", column["type"]) for place, column in enumerate(columns.values())]
    return np.dtype([*[(name, "<i8") for name in ROW.names or ()], *further])


def as_scans(about: Mapping[str, Any], rows: NDArray[Any]) -> dict[str, ShardScan]:
    """The inverse of `describe`."""

    def values(numbers: NDArray[np.int64], names: Sequence[str]) -> list[Scalar]:
        return [None if value < 0 else names[value] if names else value for value in numbers.tolist()]

    scans, first = {}, 0
    for shard in about["shards"]:
        part = rows[first : first + shard["samples"]]
        scans[shard["name"]] = ShardScan(
            size=shard["bytes"],
            modified=shard.get("modified", 0),
            starts=part["start"].tolist(),
            stops=part["stop"].tolist(),
            labels=values(part["label"], about["label_names"]),
            groups=values(part["group"], about["group_names"]),
            columns={
                name: values(part[f"column{place}"], column["names"])
                for place, (name, column) in enumerate(about.get("columns", {}).items())
            },
        )
        first += shard["samples"]
    return scans
