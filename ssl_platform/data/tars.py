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
_MAX_NAME = 1 << 20
"""Bytes of the headers that hold one member's long name or attributes; more is damage, or meant to fill the memory."""
_MAX_NAME_HEADERS = 8
"""So many of these headers may precede a member."""
_COMPRESSED = (b"\x1f\x8b", b"\x1f\x9d", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"PK\3\4")
"""How files of gzip, compress, bzip2, xz, zstd, lz4 and zip begin."""

_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_PLAIN = b"\x000"
"""The types of members that have nothing but bytes."""
_SPARSE = "sparse members have no byte range of their own; write the tar without --sparse"


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


def shown(text: str) -> str:
    """Text out of a file, as one short line of a message: what does not print is escaped, a long middle left out."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= 200 else f"{line[:120]}...{line[-60:]}"


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


def tar_members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members of a tar from where the file is; unlike `tarfile` alone, raises ValueError where it is damaged in the
    middle, and wherever its headers ask for more memory or for bytes elsewhere."""
    try:
        first, length = file.tell(), file.seek(0, io.SEEK_END)
        _check_header(file, first)
        file.seek(first)
        archive = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or millions of them stay in memory
            if member.size < 0 or archive.offset <= member.offset_data - tarfile.BLOCKSIZE:
                raise ValueError(f"damaged at byte {member.offset}: a member of {member.size} bytes")
            if archive.offset > length:
                raise ValueError(f"unexpected end of data: '{shown(member.name)}' is cut off")
            yield member, archive
            _check_header(file, archive.offset)
        file.seek(archive.offset)
    except ValueError:
        raise
    except Exception as error:  # damaged bytes make tarfile raise almost anything
        raise ValueError(str(error) or type(error).__name__) from error
    rest = file.read(tarfile.BLOCKSIZE)
    if rest.strip(b"\0"):
        raise ValueError(f"damaged at byte {archive.offset}: expected the header of a member")
    if isinstance(file, io.BytesIO):
        return
    if not rest:
        logger.warning("%s: the end-of-archive mark is missing; is the file complete?", file.name)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError(
                f"goes on after its end-of-archive mark at byte {archive.offset}: tars that were joined by cat; join "
                "them by tar --concatenate, or keep them apart"
            )


def _check_header(file: IO[bytes], position: int) -> None:
    """Raises ValueError if the member at `position` would make tarfile read without bounds, or go backwards."""
    for _ in range(_MAX_NAME_HEADERS + 1):
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE or header == _ZEROS:
            return
        if header[156] in _PLAIN and header[124:135].isdigit():
            return
        kind, size = header[156:157], _size(header[124:136])
        if kind == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"damaged or sparse at byte {position}: {_SPARSE}")
        names_follow = kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX_TYPES)
        if size is None and not names_follow:
            return  # tarfile says what is wrong with it
        if size is None:
            raise ValueError(f"invalid header at byte {position}: the size of a member is no number")
        if not 0 <= size < 1 << 62:
            raise ValueError(f"damaged at byte {position}: the size of a member is {size}")
        if not names_follow:
            return
        if size > _MAX_NAME:
            raise ValueError(f"a header of {size} bytes at byte {position}, for one name; the limit is {_MAX_NAME}")
        if kind in _PAX_TYPES and b"GNU.sparse." in file.read(size):
            raise ValueError(f"sparse at byte {position}: {_SPARSE}")
        position += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    raise ValueError(f"damaged at byte {position}: more than {_MAX_NAME_HEADERS} headers for one member")


def _size(field: bytes) -> int | None:
    """The number in a tar header: octal text, or base 256 where the first byte is not ASCII."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0o377 else 0)
    text = field.split(b"\0")[0].strip() or b"0"
    return int(text, 8) if text.isdigit() and not set(text) & set(b"89") else None


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
