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

from ssl_platform.data.tar_headers import shown, tar_members

logger = logging.getLogger(__name__)

_SMALL = 1 << 16
"""Bytes: a `cls` or `json` member larger than this is data, not a label."""
_MAX_TEXT = 256
"""Characters: a longer text of a `json` member is a description, not a category."""
_NO_COLUMNS = {"label", "group", "path"}
"""Keys of a `json` member that are no columns: what the index keeps anyway, and the file that a sample was made from."""

Scalar = int | str | None
_COMPRESSED = (b"\x1f\x8b", b"\x1f\x9d", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\3\4")
"""How files of gzip, compress, bzip2, xz, zstd, lz4 and zip begin."""


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


def key_of_header(block: bytes) -> str | None:
    """The key of the member that this header begins; None for what is no plain header of a sample's member."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    name = split_name(member.name) if member.isreg() else None
    return None if name is None else name[0]


def parse_record(data: bytes) -> Record:
    """The sample whose tar members are `data`; raises ValueError if it is not exactly one sample."""
    key, members = None, {}
    for member, archive in tar_members(io.BytesIO(data)):
        name = split_name(member.name) if member.isreg() else None
        if name is None:
            continue
        if key not in (None, name[0]):
            raise ValueError(f"expected the members of one sample, found '{shown(str(key))}' and '{shown(name[0])}'")
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
            if file.read(4).startswith(_COMPRESSED):
                raise ValueError("a compressed tar has no byte ranges to read samples from; decompress it")
            file.seek(0)
            return _scan(file, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _scan(file: IO[bytes], path: Path) -> ShardScan:
    found = path.stat()
    scan = ShardScan(size=found.st_size, modified=found.st_mtime_ns)
    key, extensions, texts = None, set[str](), dict[str, str]()
    left_out = _LeftOut(path)
    for member, archive in tar_members(file):
        name = split_name(member.name) if member.isreg() else None
        if name is None:
            left_out.note(member)
            continue
        if name[0] != key:
            key, extensions = name[0], set()
            left_out.note_key(key)
            scan.starts.append(member.offset)
            scan.stops.append(0)
            scan.labels.append(None)
            scan.groups.append(None)
        if name[1] in extensions:
            raise ValueError(f"two members '{shown(member.name)}' in a row: the key of a sample must be unique")
        extensions.add(name[1])
        scan.stops[-1] = archive.offset
        if name[1] == "cls" and member.size < _SMALL and scan.labels[-1] is None:
            scan.labels[-1] = _class(_contents(archive, member))
        elif name[1] == "json" and member.size < _SMALL:
            about = _about(_contents(archive, member))
            label, group = _category(about.get("label")), _category(about.get("group"))
            scan.labels[-1] = scan.labels[-1] if label is None else label
            scan.groups[-1] = group
            _add_columns(scan, about, texts)
    for column in scan.columns.values():
        column += [None] * (len(scan.starts) - len(column))
    left_out.report()
    return scan


def _add_columns(scan: ShardScan, about: dict[str, Any], texts: dict[str, str]) -> None:
    """Adds the last sample's values; `texts` keeps one copy of each text."""
    for name in about.keys() - _NO_COLUMNS:
        value = _scalar(about[name])
        if value is not None:
            column = scan.columns.setdefault(name, [])
            column += [None] * (len(scan.starts) - 1 - len(column))
            column.append(texts.setdefault(value, value) if isinstance(value, str) else value)


class _LeftOut:
    """What a scan passes over or may have torn apart, said once for a shard and not once for a member."""

    def __init__(self, path: Path) -> None:
        self.path, self.keys = path, set[int]()
        self.found: dict[str, list[str | int]] = {}  # {what: [first name, number of them]}

    def note(self, member: tarfile.TarInfo) -> None:
        if not (member.isreg() or member.isdir()):
            self._count(
                "links, devices and pipes are not read, pack the files themselves by tar --dereference", member.name
            )
        elif member.isreg() and "." not in member.name.rpartition("/")[2]:
            self._count("files without an extension are of no sample and not read", member.name)

    def note_key(self, key: str) -> None:
        if hash(key) in self.keys:
            self._count(
                "keys occur again, apart: each is a sample of its own; members of one sample must lie in a row", key
            )
        self.keys.add(hash(key))

    def _count(self, what: str, name: str) -> None:
        self.found.setdefault(what, [shown(name), 0])[1] += 1  # type: ignore[operator]

    def report(self) -> None:
        for what, (first, number) in self.found.items():
            logger.warning("%s: %s (%d, the first '%s')", self.path, what, number, first)


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "regular members have contents"
    contents = file.read()
    if len(contents) != member.size:
        raise ValueError(f"'{shown(member.name)}' is cut off: {len(contents)} of {member.size} bytes")
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
        text = json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        file.write(
            text.encode("utf-8", "backslashreplace")
        )  # names that are no text: half of a pair becomes its escape
