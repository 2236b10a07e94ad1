"""The members of a tar as untrusted data: its headers are checked before `tarfile` goes by them."""

import io
import logging
import tarfile
from collections.abc import Iterator
from typing import IO

logger = logging.getLogger(__name__)

_MAX_NAME = 1 << 20
"""Bytes of the headers that hold one member's long name or attributes; more is damage, or meant to fill the memory."""
_MAX_NAME_HEADERS = 8
"""So many of these headers may precede a member."""

_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_PLAIN = b"\x000"
"""The types of members that have nothing but bytes."""
_SPARSE = "sparse members have no byte range of their own; write the tar without --sparse"


def shown(text: str) -> str:
    """Text out of a file, as one short line of a message: what does not print is escaped, a long middle left out."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= 200 else f"{line[:120]}...{line[-60:]}"


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
