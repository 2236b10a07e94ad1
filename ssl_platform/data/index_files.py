"""The index of a folder of tar shards on disk: `index.json`, what the shards are, and `index.npy`, a row a sample."""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssl_platform.data.distribution import Distribution
from ssl_platform.data.tars import Scalar, ShardScan, atomic_file, scan_shard, shown, write_json

logger = logging.getLogger(__name__)

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


def open_folder(folder: Path, names: Sequence[str] | None) -> tuple[dict[str, Any], NDArray[Any], list[int]]:
    """The description, the rows and the numbers of the shards `names` (None = all) of a folder, scanned if need be.

    Raises ValueError if a shard is missing, is not the one that was indexed, or was never finished.
    """
    about = read_description(folder)
    if about is None or about["scanned"]:
        names = names or sorted(tar.name for tar in folder.glob("*.tar"))
        if not names and not (folder / "pack.json").exists():
            splits = sorted(path.parent.name for path in folder.glob("*/index.json"))
            hint = f"it holds {', '.join(splits)}: name one of them" if splits else "ssl-pack makes them"
            raise ValueError(f"{folder}: no tar shards in this folder ({hint})")
    if about is None:
        about, rows = index_folder(folder, names or [])
    else:
        rows = _read_rows(folder, about)
        unknown = {*(names or [])} - _shard_names(about)
        if unknown and not about["scanned"]:
            raise ValueError(f"{folder / min(unknown)}: not in the index.json beside it; move it to its own folder")
        changed = _changed(folder, about, names or []) if about["scanned"] else set()
        if unknown or changed:
            known = {name: scan for name, scan in _as_scans(about, rows).items() if name not in changed}
            if about["format"] < FORMAT:  # these have no columns, which the others will
                unknown, known = unknown | _present(folder, known), {}
            left_out = about.get("columns_left_out", [])
            about, rows = index_folder(folder, sorted(unknown | changed), known=known, left_out=left_out)
        if not about["scanned"] and (more := {tar.name for tar in folder.glob("*.tar")} - _shard_names(about)):
            logger.warning("%s: %s not in its index.json and not read", folder, ", ".join(sorted(more)[:5]))
    places = {shard["name"]: place for place, shard in enumerate(about["shards"])}
    wanted = sorted(places[name] for name in (places if names is None else names))
    for place in wanted:
        _check_size(folder, about["shards"][place], about["scanned"])
    return about, rows, wanted


def open_fetched(
    folder: Path, about: dict[str, Any], names: Sequence[str] | None
) -> tuple[dict[str, Any], NDArray[Any], list[int]]:
    """The same of a folder that holds only the index, whose shards lie elsewhere."""
    rows = _read_rows(folder, about)
    if bad := sorted(name for name in _shard_names(about) if not is_plain(name)):
        raise ValueError(f"{folder / 'index.json'}: {bad[0]!r} is no name of a shard in this folder")
    if unknown := {*(names or [])} - _shard_names(about):
        raise ValueError(f"{folder / min(unknown)}: not in the index.json beside it; upload the index that lists it")
    places = {shard["name"]: place for place, shard in enumerate(about["shards"])}
    return about, rows, sorted(places[name] for name in (places if names is None else names))


def is_plain(name: str) -> bool:
    """Whether it is a file's name, and not the way to one in another folder."""
    return bool(name) and not name.startswith(".") and not {"/", "\\", "\0"} & {*name}


def index_folder(
    folder: Path, names: Sequence[str], known: Mapping[str, ShardScan] | None = None, left_out: Sequence[str] = ()
) -> tuple[dict[str, Any], NDArray[Any]]:
    """Scans the tars `names` of a folder that ssl-pack did not make; returns its description and rows.

    Both are written beside the tars where the folder is writable.
    """
    if (folder / "pack.json").exists():
        from ssl_platform.data.pack_state import missing_parts  # which loads what packs

        raise ValueError(
            f"{folder}: packing was not finished; still missing: {missing_parts(folder)}. Run the ssl-pack command again "
            "to complete it"
        )
    logger.info("%s: scanning %d shards for their samples, once", folder, len(names))
    scans, said = dict(known or {}), time.monotonic()
    for done, name in enumerate(names):
        scans[name] = scan_shard(folder / name)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            logger.info("%s: scanned %d of %d shards", folder, done + 1, len(names))
    about, rows = describe(scans, scanned=True, left_out=left_out)
    try:
        write_index(folder, about, rows)
    except OSError as error:
        logger.warning("%s: the index cannot be kept (%s): the next run scans again", folder, error.strerror)
    return about, rows


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
    rows = np.empty(len(labels), dtype=_row_type(columns))
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


def write_index(folder: Path, about: Mapping[str, Any], rows: NDArray[Any]) -> None:
    """Writes both files, each atomically."""
    with atomic_file(folder / "index.npy") as file:
        np.save(file, rows)
    write_json(folder / "index.json", about)


def read_description(folder: Path) -> dict[str, Any] | None:
    """The contents of a folder's `index.json`, None if there is none; raises ValueError if it is of no use."""
    path = folder / "index.json"
    fix = "delete it and index.npy, or pack again"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError(f"{path}: cannot be read (brackets inside brackets without end); {fix}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {fix}") from error
    found = about.get("format") if isinstance(about, dict) else None
    if found not in READABLE:
        raise ValueError(f"{path}: expected format {FORMAT}, found {shown(str(found))}; {fix}")
    try:
        _Description.model_validate(about)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = shown(".".join(map(str, first["loc"])))
        why = shown(re.sub(r"^Value error, | or instance of _\w+$", "", first["msg"]))
        raise ValueError(f"{path}: {place + ': ' if place else ''}{why}; {fix}") from error
    return dict(about)


class _Described(BaseModel):
    """A shard in `index.json`."""

    model_config = ConfigDict(strict=True)
    name: str
    """Of a file in the same folder: an index from elsewhere must not open files outside it."""
    bytes: int = Field(ge=0, lt=1 << 63)
    samples: int = Field(ge=0, lt=1 << 48)
    modified: int = 0

    @field_validator("name")
    @classmethod
    def _is_in_the_folder(cls, name: str) -> str:
        if not name or {"/", "\0"} & {*name}:
            raise ValueError(f"{name!r} is no name of a shard in this folder")
        return name


class _Column(BaseModel):
    """A column in `index.json`."""

    model_config = ConfigDict(strict=True)
    type: Literal["|i1", "<i2", "<i4", "<i8"]
    names: list[str]


class _Statistics(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    mean: list[float] = Field(min_length=1)
    std: list[float]
    pixels: float = Field(gt=0)
    percentiles: dict[str, list[float]] | None = None
    distribution: dict[str, str] | None = None
    """Both None in an index of before they were kept."""

    @model_validator(mode="after")
    def _of_the_same_channels(self) -> "_Statistics":
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        for share, values in (self.percentiles or {}).items():
            if len(values) != len(self.mean):
                raise ValueError(f"{len(self.mean)} means and {len(values)} values of percentile {share!r}")
        if self.distribution is not None:
            Distribution.from_json(self.distribution, len(self.mean))
        return self


class _Description(BaseModel):
    """What a reader takes from `index.json`; further keys are for people."""

    model_config = ConfigDict(strict=True)
    scanned: bool
    samples: int
    shards: list[_Described]
    label_names: list[str]
    group_names: list[str]
    statistics: _Statistics | None
    columns: dict[str, _Column] = {}
    columns_left_out: list[str] = []

    @model_validator(mode="after")
    def _adds_up(self) -> "_Description":
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")
        if (total := sum(shard.samples for shard in self.shards)) != self.samples:
            raise ValueError(f"{self.samples} samples, but its shards have {total}")
        return self


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


def _row_type(columns: Mapping[str, Any]) -> np.dtype[Any]:
    further = [(f"column{place}", column["type"]) for place, column in enumerate(columns.values())]
    return np.dtype([*[(name, "<i8") for name in ROW.names or ()], *further])


def _as_scans(about: Mapping[str, Any], rows: NDArray[Any]) -> dict[str, ShardScan]:
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


def _shard_names(about: Mapping[str, Any]) -> set[str]:
    return {shard["name"] for shard in about["shards"]}


def _present(folder: Path, names: Iterable[str]) -> set[str]:
    return {name for name in names if (folder / name).exists()}


def _changed(folder: Path, about: Mapping[str, Any], names: Sequence[str]) -> set[str]:
    """Those of the tars `names` that are not what was indexed. Their size alone does not tell: tars are padded."""
    wanted, changed = set(names), set()
    for shard in about["shards"]:
        path = folder / shard["name"]
        if shard["name"] in wanted and path.exists():
            found = path.stat()
            if (found.st_size, found.st_mtime_ns) != (shard["bytes"], shard.get("modified")):
                changed.add(shard["name"])
    return changed


def _read_rows(folder: Path, about: Mapping[str, Any]) -> NDArray[Any]:
    """The rows, mapped; raises ValueError if the file is not of the type and length that `about` says.

    What the rows say is checked where it is cheap, at both ends of each shard; `Index` checks each that it hands out.
    """
    path, expected = folder / "index.npy", _row_type(about.get("columns", {}))
    mismatch = f"{path}: does not belong to the index.json beside it; delete both, or pack again"
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not as ssl-pack writes it")
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            first, size = file.tell(), path.stat().st_size
    except Exception as error:  # NumPy evaluates the header as Python, which can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: cannot be read ({shown(reason)}); delete it and index.json, or pack again"
        ) from error
    if found != expected or shape != (about["samples"],):
        raise ValueError(mismatch)
    if size != first + about["samples"] * expected.itemsize:
        raise ValueError(f"{path}: cannot be read (cut off or damaged); delete it and index.json, or pack again")
    if not about["samples"]:
        return np.empty(0, expected)
    rows = np.memmap(path, expected, "r", first, shape).view(np.ndarray)  # still mapped, but a row costs a third
    counts = np.array([shard["samples"] for shard in about["shards"]], dtype=np.int64)
    sizes = np.array([shard["bytes"] for shard in about["shards"]], dtype=np.int64)
    filled = np.flatnonzero(counts)
    stops = np.cumsum(counts)[filled]
    starts = rows[stops - counts[filled]], rows[stops - 1]
    right = [(ends["shard"] == filled) & (ends["start"] >= 0) & (ends["stop"] > ends["start"]) for ends in starts]
    if not (right[0] & right[1] & (starts[1]["stop"] <= sizes[filled])).all():
        raise ValueError(mismatch)
    return rows


def _check_size(folder: Path, shard: Mapping[str, Any], scanned: bool) -> None:
    path = folder / shard["name"]
    fix = f"run `ssl-pack --index {folder}`" if scanned else "run the ssl-pack command that made the folder again"
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: listed in index.json, but {error.strerror}; {fix}") from error
    if found != shard["bytes"]:
        raise ValueError(f"{path}: has {found} bytes now, and {shard['bytes']} when it was indexed; {fix}")
