"""Tars and images made by hand that no library would write: what tests/test_bad_input.py feeds to the readers."""

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np

END = bytes(1024)
"""The end-of-archive mark."""


def base256(number: int) -> bytes:
    """A size as GNU tar writes those that octal digits do not hold; negative ones too."""
    return (b"\x80" if number >= 0 else b"\xff") + (number % 2**88).to_bytes(11, "big")


def member(
    name: bytes,
    data: bytes = b"x" * 100,
    *,
    size: bytes | None = None,
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
) -> bytes:
    """A header, whose size field may lie, and the padded data."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = b"%011o\0" % len(data) if size is None else size
    header[156:157], header[257:265] = kind, magic
    return with_checksum(bytes(header)) + data + bytes(-len(data) % 512)


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % (sum(blank) % 2**18) + header[156:]


def pax(**records: str) -> bytes:
    """A PAX header for the member that follows; a double underscore in a key stands for a dot."""
    body = b""
    for key, value in records.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(rest) + len(str(len(rest)))
        length += len(str(length)) - len(str(len(rest)))
        body += str(length).encode() + rest
    return member(b"pax", body, kind=b"x")


def long_name(size: bytes | None = None, data: bytes = b"n.bin\0") -> bytes:
    return member(b"././@LongLink", data, size=size, kind=b"L")


# -- images ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, bits: int = 8, between: bytes = b"", data: bytes = b"") -> bytes:
    """RGB; `data` is compressed already."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deflated_zeros(mebibytes: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(mebibytes)) + packer.flush()


def tiff(width: int, height: int, bits: int = 8) -> bytes:
    """Grey, with a strip of 100 bytes, whatever the size."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 100}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 108) + bytes(100) + struct.pack("<H", len(tags)) + body + bytes(4)


def tiff_of_empty_pages(number: int) -> bytes:
    pages = b"".join(struct.pack("<HI", 0, 8 + 6 * (page + 1)) for page in range(number))
    return b"II*\0" + struct.pack("<I", 8) + pages + struct.pack("<HI", 0, 0)


def webp(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return (
        b"RIFF" + struct.pack("<I", 58) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
        + b"VP8L" + struct.pack("<I", 20) + b"\x2f" + bytes(19)
    )  # fmt: skip


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02\x4c\x01\0;"
    return b"GIF89a" + struct.pack("<HH", 16, 16) + b"\x80\0\0" + bytes(6) + frame


def bmp(width: int, height: int) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + sizes + bytes(40)


def npy(header: str, body: bytes = b"", version: bytes = b"\1\0", size: int | None = None) -> bytes:
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(header) if size is None else size)
    return b"\x93NUMPY" + version + length + header.encode() + body


def npy_of(shape: str, dtype: str = "|u1", body: bytes = b"") -> bytes:
    return npy(f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n", body)


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros((2, 2), np.uint8))
    return file.getvalue()


# -- memory ------------------------------------------------------------------------------------------------------------


def limit_memory(mebibytes: int) -> None:
    """From now on this process gets no more than so much on top of what it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))  # KiB
    resource.setrlimit(resource.RLIMIT_AS, ((used + 1024 * mebibytes) * 1024,) * 2)
