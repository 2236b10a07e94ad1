"""WebDataset tar shards on disk: scanning one, parsing one sample, and writing files whole or not at all."""

import io
import json
import logging
import math
import os
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

logger = logging.getLogger(__name__)

_SMALL = 1 << 16
"""Bytes: a `cls` or `json` member larger than this is data, not a label."""
_MAX_TEXT = 256
"""Characters: a longer text of a `json` member is a description, not a category."""
_NO_COLUMNS = {"label", "group", "path"}
"""Keys of a `json` member that are no columns: what the index keeps anyway, and the file that a sample was made from."""

Scalar = int | str | None


class Record(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    members: dict[str, bytes]
    """{extension: contents}; the extension is all that follows the first dot of the file name, in lower case."""


@dataclass
class ShardScan:
    """The samples of one shard, in their order."""

    size: int
    """Bytes of the tar file."""
    modified: int = 0
    """When it was last written, in nanoseconds."""
    starts: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    labels: list[int | str | None] = field(default_factory=list)
    groups: list[int | str | None] = field(default_factory=list)
    columns: dict[str, list[Scalar]] = field(default_factory=dict)
    """The other scalar keys of the `json` members, one value a sample; numbers with a fraction and booleans as text."""


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: "a/b.seg.png" is the member "seg.png" of the sample "a/b"; None for what is no sample's."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    top = name.partition("/")[0]
    is_metadata = len(top) > 4 and top.startswith("__") and top.endswith("__")
    return None if is_metadata or not stem or not dot else (folder + slash + stem, extension.lower())


def parse_record(data: bytes) -> Record:
    """The sample whose tar members are `data`; raises ValueError if it is not exactly one sample."""
    key, members = None, {}
    for member, archive in _members(io.BytesIO(data)):
        name = split_name(member.name) if member.isreg() else None
        if name is None:
            continue
        if key not in (None, name[0]):
            raise ValueError(f"expected the members of one sample, found '{key}' and '{name[0]}'")
        key, extension = name
        members[extension] = _contents(archive, member)
    if key is None:
        raise ValueError("no tar members here: the shard has changed since it was indexed")
    return Record(key, members)


def scan_shard(path: Path) -> ShardScan:
    """Finds the samples of a tar by its headers, and their labels and groups in their `json` and `cls` members.

    Raises ValueError that names the file if it is compressed, damaged, truncated or not a tar.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
                raise ValueError("a compressed tar has no byte ranges to read samples from; decompress it")
            file.seek(0)
            return _scan(file, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _scan(file: IO[bytes], path: Path) -> ShardScan:
    found = path.stat()
    scan = ShardScan(size=found.st_size, modified=found.st_mtime_ns)
    key, extensions, texts = None, set[str](), dict[str, str]()
    for member, archive in _members(file):
        name = split_name(member.name) if member.isreg() else None
        if name is None:
            continue
        if name[0] != key:
            key, extensions = name[0], set()
            scan.starts.append(member.offset)
            scan.stops.append(0)
            scan.labels.append(None)
            scan.groups.append(None)
        if name[1] in extensions:
            raise ValueError(f"two members '{member.name}' in a row: the key of a sample must be unique")
        extensions.add(name[1])
        scan.stops[-1] = archive.offset
        if name[1] == "cls" and member.size < _SMALL and scan.labels[-1] is None:
            scan.labels[-1] = _class(_contents(archive, member))
        elif name[1] == "json" and member.size < _SMALL:
            about = _about(_contents(archive, member))
            label, group = _category(about.get("label")), _category(about.get("group"))
            scan.labels[-1] = scan.labels[-1] if label is None else label
            scan.groups[-1] = group
            for column_name in about.keys() - _NO_COLUMNS:
                value = _scalar(about[column_name])
                if value is not None:
                    column = scan.columns.setdefault(column_name, [])
                    column += [None] * (len(scan.starts) - 1 - len(column))
                    column.append(texts.setdefault(value, value) if isinstance(value, str) else value)
    for column in scan.columns.values():
        column += [None] * (len(scan.starts) - len(column))
    return scan


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members of a tar; unlike `tarfile` alone, raises ValueError where it is damaged in the middle."""
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (there is nothing to close but `file`)
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or millions of them stay in memory
            yield member, archive
        file.seek(archive.offset)
    except tarfile.TarError as error:
        raise ValueError(str(error)) from error
    rest = file.read(tarfile.BLOCKSIZE)
    if rest.strip(b"\0"):
        raise ValueError(f"damaged at byte {archive.offset}: expected the header of a member")
    if not rest and not isinstance(file, io.BytesIO):
        logger.warning("%s: the end-of-archive mark is missing; is the file complete?", file.name)


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "regular members have contents"
    contents = file.read()
    if len(contents) != member.size:
        raise ValueError(f"'{member.name}' is cut off: {len(contents)} of {member.size} bytes")
    return contents


def _class(contents: bytes) -> int | str | None:
    text = contents.decode("utf-8", errors="replace").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def _about(contents: bytes) -> dict[str, Any]:
    """A JSON member if it is a map; whatever else it holds is not ours to judge."""
    try:
        about = json.loads(contents)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _category(value: Any) -> int | str | None:
    """A label or group."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) and value != "" else None


def _scalar(value: Any) -> Scalar:
    """What a column holds of a value; None if it is no scalar, or none that tells samples apart."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, int):
        return value if abs(value) < 2**62 else str(value)
    return value if isinstance(value, str) and 0 < len(value) <= _MAX_TEXT else None


# -- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears under `path`, complete and on the disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # ranks on other hosts may write the same file
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, contents: Any) -> None:
    """Writes a JSON file atomically, one key a line."""
    with atomic_file(path) as file:
        file.write((json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
