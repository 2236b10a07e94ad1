"""Whether a sound file holds all the bytes of samples that its header says; libsndfile reads on as far as they go."""

import mmap
import struct

_UNKNOWN = 0xFFFFFFFF


def check_length(data: bytes | mmap.mmap) -> None:
    """Raises ValueError if an AIFF, AU, CAF, RF64 or RIFX file is cut off; other kinds are not looked at."""
    if data[:4] == b".snd":
        start, size = struct.unpack(">II", data[4:12].ljust(8, b"\0"))
        found = None if size == _UNKNOWN else (start, size)
    elif data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        found = _chunk(data, b"SSND", 12, ">4sI")
    elif data[:4] == b"caff":
        found = _chunk(data, b"data", 8, ">4sq", padding=1)
        found = None if found and found[1] == -1 else found
    elif data[:4] in (b"RF64", b"RIFX"):
        found = _chunk(data, b"data", 12, "<4sI" if data[:4] == b"RF64" else ">4sI")
        if found and found[1] == _UNKNOWN:
            found = _long_size(data, found[0])
    else:
        return
    if found is not None and (there := max(len(data) - found[0], 0)) < found[1]:
        raise ValueError(f"truncated: the header says {found[1]} bytes of samples, there are {there}")


def _chunk(data: bytes | mmap.mmap, wanted: bytes, place: int, header: str, padding: int = 2) -> tuple[int, int]:
    """Where a chunk's body begins, and the size that is said; each begins at an even place where `padding` is 2."""
    width = struct.calcsize(header)
    while place + width <= len(data):
        name, size = struct.unpack_from(header, data, place)
        if name == wanted or size < 0:
            return place + width, size
        place += width + size + size % padding
    raise ValueError("truncated: a file without samples")


def _long_size(data: bytes | mmap.mmap, start: int) -> tuple[int, int] | None:
    """The size in 64 bits that RF64 has in a chunk of its own (EBU Tech 3306); None if a program left it open."""
    place, length = _chunk(data, b"ds64", 12, "<4sI")
    if length < 16 or place + 16 > len(data):
        raise ValueError("truncated: an RF64 file without its length")
    (size,) = struct.unpack_from("<Q", data, place + 8)
    return (start, size) if size else None
