"""Packets of video without the texts that encoders and cameras write among the pictures.

The compressed pictures stay byte for byte. What holds them is an allow-list: units, segments and messages that are not on
it go, known or not. A codec that is not named here is refused, because its packets may hold anything.
"""

import re
import struct
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from ssl_platform.data.metadata import jpeg_image, jpeg_segment, without_metadata

Cleaner = Callable[[bytes], bytes]
"""A packet, or the codec's own header -> the same without texts; raises ValueError if it cannot be taken apart."""

_PLAIN = {
    "vp8", "vp9", "ffv1", "huffyuv", "ffvhuff", "utvideo", "magicyuv", "lagarith", "rawvideo", "prores", "flv1", "h263",
    "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "cinepak", "msvideo1", "msrle", "qtrle",
}  # fmt: skip
"""Codecs without a place for texts."""
_H264_UNITS = {*range(1, 6), *range(7, 12), 13, 19}
"""Slices, parameter sets, ends of sequences and delimiters (ITU-T H.264, table 7-1)."""
_HEVC_UNITS = {*range(10), *range(16, 22), *range(32, 38)}
"""The same in HEVC (ITU-T H.265, table 7-1)."""
_H264_SEI, _RECOVERY_POINT, _UNREGISTERED, _X264 = 6, 6, 5, bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")
_AV1_UNITS = {1, 2, 3, 4, 6, 7}
"""Headers of sequences and frames, tiles, delimiters."""
_USER_DATA = re.compile(rb"\x00\x00\x01\xb2(.*?)(?=\x00\x00\x01|\Z)", re.DOTALL)
_ENCODER = re.compile(rb"(DivX\d{1,4}(b|Build)\d{1,5}p?|XviD\d{1,4}C?|Lavc\d{1,3}\.\d{1,3}\.\d{1,3}|ffmpeg)\x00*")
"""User data of MPEG-4 by which decoders know an encoder's faults and its inverse transform."""
_JPEG_COMMENTS = (b"CS=ITU601", b"Intel(R) JPEG Library, version 1", b"Metasoft MJPEG Codec")
"""Comments that change how FFmpeg decodes a frame."""
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of the segments that say height and width."""


def cleaners(codec: str, header: bytes) -> tuple[Cleaner, Cleaner] | None:
    """What cleans the packets of a codec (FFmpeg's name), and its header (`extradata`); None if there is nothing to.

    Raises ValueError if it is not known where the codec may hold texts.
    """
    if codec in _PLAIN:
        return None
    if codec in ("h264", "hevc"):
        return _of_units(codec, header)
    if codec == "av1":
        return _av1, lambda data: data[:4] + _av1(data[4:]) if data[:1] == b"\x81" else _av1(data)
    if codec == "mpeg4":
        return (partial(_USER_DATA.sub, _known_encoder),) * 2
    if codec in ("mpeg1video", "mpeg2video"):
        return (partial(_USER_DATA.sub, b""),) * 2
    if codec in ("mjpeg", "png"):
        return _mjpeg if codec == "mjpeg" else _png, lambda _: b""
    raise ValueError(
        f"its codec {codec} may hold texts among the pictures, and where is not known here; convert it "
        "(ffmpeg -i IN -c:v ffv1 OUT.mkv), or pack with --plain-names if everybody may read them"
    )


# -- H.264 and HEVC ----------------------------------------------------------------------------------------------------


def _of_units(codec: str, header: bytes) -> tuple[Cleaner, Cleaner]:
    """Units stand behind start codes, or behind their lengths where the header says of how many bytes these are."""
    unit = _h264_unit if codec == "h264" else _hevc_unit

    def by_codes(data: bytes) -> bytes:
        return b"".join(b"\0\0\0\1" + kept for one in _split(data) if (kept := unit(one)))

    if header[:1] != b"\1":
        return by_codes, by_codes
    if len(header) < 23 and codec == "hevc":
        raise ValueError("its header is cut off")
    size = (header[4 if codec == "h264" else 21] & 3) + 1

    def by_lengths(data: bytes) -> bytes:
        kept = [unit(one) for one in _lengths(data, size)]
        return b"".join(len(one).to_bytes(size, "big") + one for one in kept if one)

    return by_lengths, (lambda data: data) if codec == "h264" else _hevc_header


def _split(data: bytes) -> list[bytes]:
    """The units between start codes, without the zero bytes that may follow each."""
    starts = [found.start() for found in re.finditer(rb"\x00\x00\x01", data)]
    return [data[start + 3 : end].rstrip(b"\0") for start, end in pairwise([*starts, len(data)])]


def _lengths(data: bytes, size: int) -> list[bytes]:
    units, place = [], 0
    while place < len(data):
        start = place + size
        place = start + int.from_bytes(data[place:start], "big")
        units.append(data[start:place])
    if place != len(data):
        raise ValueError("a packet is not made of whole units")
    return units


def _h264_unit(unit: bytes) -> bytes:
    kind = unit[0] & 31 if unit else 0
    return unit if kind in _H264_UNITS else _h264_messages(unit) if kind == _H264_SEI else b""


def _h264_messages(unit: bytes) -> bytes:
    """Of supplemental information what FFmpeg decodes by: places to begin at, and x264's number, for its old faults."""
    data, place, kept = unit[1:].replace(b"\0\0\3", b"\0\0"), 0, b""
    while place + 2 < len(data):
        numbers = []
        for _ in ("type", "size"):
            number = 0
            while place < len(data) and data[place] == 0xFF:
                number, place = number + 255, place + 1
            numbers.append(number + (data[place] if place < len(data) else 0))
            place += 1
        (kind, size), start = numbers, place
        place += size
        body = data[start:place]
        if kind == _RECOVERY_POINT and size <= 4:
            kept += bytes([kind, size]) + body
        elif kind == _UNREGISTERED and (found := re.match(re.escape(_X264) + rb"x264 - core \d{1,4}", body)):
            kept += bytes([kind, len(found[0]) + 1]) + found[0] + b"\0"
    return unit[:1] + re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\0\0\3", kept) + b"\x80" if kept else b""


def _hevc_unit(unit: bytes) -> bytes:
    return unit if unit and unit[0] >> 1 & 63 in _HEVC_UNITS else b""


def _hevc_header(header: bytes) -> bytes:
    """Its arrays of parameter sets, without those of messages (ISO 14496-15, 8.3.3)."""
    kept, place = [], 23
    for _ in range(header[22]):
        start, place = place, place + 3
        for _ in range(int.from_bytes(header[start + 1 : start + 3], "big")):
            place += 2 + int.from_bytes(header[place : place + 2], "big")
        if place > len(header):
            raise ValueError("its header is cut off")
        if header[start] & 63 in _HEVC_UNITS:
            kept.append(header[start:place])
    return header[:22] + bytes([len(kept)]) + b"".join(kept)


# -- others ------------------------------------------------------------------------------------------------------------


def _known_encoder(user_data: re.Match[bytes]) -> bytes:
    return user_data[0] if _ENCODER.fullmatch(user_data[1]) else b""


def _av1(data: bytes) -> bytes:
    kept, place = [], 0
    while place < len(data):
        start, size = place, 0
        place += 1 + (data[start] >> 2 & 1)
        if data[start] & 2:
            for shift in range(0, 56, 7):
                if place >= len(data):
                    break
                size |= (data[place] & 0x7F) << shift
                place += 1
                if not data[place - 1] & 0x80:
                    break
        else:
            size = len(data) - place
        place += size
        if data[start] >> 3 & 15 in _AV1_UNITS:
            kept.append(data[start:place])
    if place != len(data):
        raise ValueError("a packet is not made of whole units")
    return b"".join(kept)


def _mjpeg(data: bytes) -> bytes:
    """One picture, or the two fields of an interlaced one, which are of one size; a camera's thumbnail is not."""
    kept, place, size = list[bytes](), data.find(b"\xff\xd8"), b""
    if place < 0:
        raise ValueError("a packet of MJPEG without a picture")
    try:
        while place >= 0:
            pieces, place = jpeg_image(data, place, _mjpeg_segment, needs_end=False)
            own = next((piece[5:9] for piece in pieces if piece[1] in _JPEG_FRAMES), b"")
            if kept and own != size:
                break
            kept, size = [*kept, *pieces], own
            place = data.find(b"\xff\xd8\xff", place)
    except (IndexError, struct.error) as error:
        raise ValueError("a packet of MJPEG that ends within a header") from error
    return b"".join(kept)


def _mjpeg_segment(marker: int, segment: bytes) -> bytes | None:
    if marker == 0xE0 and segment.startswith(b"AVI1"):  # which field of an interlaced picture this is
        return segment[:14]
    if marker == 0xFE:
        return next((comment for comment in _JPEG_COMMENTS if segment.startswith(comment)), None)
    return jpeg_segment(marker, segment)


def _png(data: bytes) -> bytes:
    clean = without_metadata(data)
    if clean is None or clean[1] != "png":
        raise ValueError("a packet of PNG that is none")
    return clean[0]
