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

from ssl_platform.data.distribution import Distribution, num_rows
from ssl_platform.data.index_rows import FORMAT, READABLE, as_scans, describe, row_type
from ssl_platform.data.tar_headers import shown
from ssl_platform.data.tars import ShardScan, atomic_file, scan_shard, write_json

logger = logging.getLogger(__name__)


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
        rows = read_rows(folder, about)
        unknown = {*(names or [])} - _shard_names(about)
        if unknown and not about["scanned"]:
            raise ValueError(f"{folder / min(unknown)}: not in the index.json beside it; move it to its own folder")
        changed = _changed(folder, about, names or []) if about["scanned"] else set()
        if unknown or changed:
            known = {name: scan for name, scan in as_scans(about, rows).items() if name not in changed}
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
    rows = read_rows(folder, about)
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
    of: dict[str, Any] | None = None
    """What the values are, and with which settings; None: pixels."""

    @model_validator(mode="after")
    def _of_the_same_channels(self) -> "_Statistics":
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        for share, values in (self.percentiles or {}).items():
            if len(values) != num_rows(len(self.mean)):
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


def read_rows(folder: Path, about: Mapping[str, Any]) -> NDArray[Any]:
    """The rows, mapped; raises ValueError if the file is not of the type and length that `about` says.

    What the rows say is checked where it is cheap, at both ends of each shard; `Index` checks each that it hands out.
    """
    path, expected = folder / "index.npy", row_type(about.get("columns", {}))
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
