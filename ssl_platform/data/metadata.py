"""Image files without what they say besides their pixels: EXIF, XMP, IPTC, comments, colour profiles, thumbnails.

The compressed pixels are copied byte for byte. The orientation is the one thing that is kept, because decoding turns the
image by it. Colour profiles go: decoding does not use them, and they hold names of devices and their owners.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable

from PIL import Image

_ORIENTATION = 0x0112
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_KEPT = (b"VP8 ", b"VP8L", b"ALPH")
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def without_metadata(data: bytes) -> tuple[bytes, str] | None:
    """A JPEG, PNG or WebP file that holds its pixels alone, and its extension.

    None where only new encoding would do: other formats, animations, files that do not keep to their format.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data), "jpg"
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data), "png"
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data), "webp"
    except Exception:  # damaged bytes make Pillow raise almost anything
        return None
    return None


def _jpeg(data: bytes) -> bytes:
    kept, _ = jpeg_image(data, 0, jpeg_segment)  # what follows the end of the image are other images, or anything
    if orientation := _orientation(data):
        has_jfif = kept[1].startswith(b"\xff\xe0")  # which comes first
        kept.insert(1 + has_jfif, _jpeg_bytes(0xE1, b"Exif\0\0" + _exif(orientation)))
    return b"".join(kept)


def jpeg_image(
    data: bytes, position: int, wanted: Callable[[int, bytes], bytes | None], *, needs_end: bool = True
) -> tuple[list[bytes], int]:
    """The pieces of the JPEG image at `position`, its segments as `wanted(marker, segment)` leaves them (None: not at
    all), and where it ends. Raises ValueError, IndexError or struct.error if it is damaged.

    Without `needs_end` it may end with its compressed pixels, as frames of videos do; it is given its end mark.
    """
    kept, position = [b"\xff\xd8"], position + 2
    while True:
        if data[position] != 0xFF:
            raise ValueError("expected a marker")
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker = data[position + 1]
        if marker == 0xD9:
            return [*kept, b"\xff\xd9"], position + 2
        (length,) = struct.unpack_from(">H", data, position + 2)
        segment = data[position + 4 : position + 2 + length]
        position += 2 + length
        if (found := wanted(marker, segment)) is not None:
            kept.append(_jpeg_bytes(marker, found))
        if marker == 0xDA:  # compressed pixels follow
            end = _NEXT_MARKER.search(data, position)
            if end is None and needs_end:
                raise ValueError("no end of image")
            kept.append(data[position : end.start() if end else len(data)])
            if end is None:
                return [*kept, b"\xff\xd9"], len(data)
            position = end.start()


def _jpeg_bytes(marker: int, segment: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment


def jpeg_segment(marker: int, segment: bytes) -> bytes | None:
    """What is kept of a segment: tables and headers; of application data, what tells how colours are stored."""
    if marker == 0xE0 and segment.startswith(b"JFIF\0"):
        return segment[:12] + b"\0\0"  # without the thumbnail
    if marker == 0xEE and segment.startswith(b"Adobe"):
        return segment[:12]
    return segment if 0xC0 <= marker <= 0xDF else None


def _png(data: bytes) -> bytes:
    kept, others, position = [data[:8]], False, 8
    while True:
        (length,) = struct.unpack_from(">I", data, position)
        name, end = data[position + 4 : position + 8], position + 12 + length
        if end > len(data):
            raise ValueError("cut off")
        if name in _PNG_KEPT:
            kept.append(data[position:end])
        else:
            others = True
        position = end
        if name == b"IEND":
            break
    if others and (orientation := _orientation(data)):
        exif = b"eXIf" + _exif(orientation)
        kept.insert(2, struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif)))
    return b"".join(kept)


def _webp(data: bytes) -> bytes:
    kept, position, end = [], 12, 8 + struct.unpack_from("<I", data, 4)[0]
    extended: bytes | None = None
    while position < end:
        name, (length,) = data[position : position + 4], struct.unpack_from("<I", data, position + 4)
        body = data[position + 8 : position + 8 + length]
        if len(body) != length or name == b"ANIM":
            raise ValueError("cut off, or an animation")
        if name == b"VP8X":
            extended = body
        elif name in _WEBP_KEPT:
            kept.append(_riff_chunk(name, body))
        position += 8 + length + length % 2
    if extended is not None:
        orientation = _orientation(data)
        flags = extended[0] & ~0x2C | (0x08 if orientation else 0)  # colour profile, EXIF, XMP
        kept.insert(0, _riff_chunk(b"VP8X", bytes([flags]) + extended[1:10]))
        if orientation:
            kept.append(_riff_chunk(b"EXIF", _exif(orientation)))
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _orientation(data: bytes) -> int:
    """2 to 8 as Pillow finds it, in EXIF or XMP, and turns images by it; 0 where nothing is turned."""
    orientation: object = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION)
    return orientation if isinstance(orientation, int) and 2 <= orientation <= 8 else 0


def _exif(orientation: int) -> bytes:
    """An EXIF block (a TIFF file of one tag) that holds the orientation alone."""
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)
