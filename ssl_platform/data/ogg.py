"""Ogg files of Vorbis or Opus without their comments: the pages of sound stay byte for byte (RFC 3533, RFC 7845)."""

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

_HEADER = struct.Struct("<4sBBqIIIB")
"""Mark, version, flags, granule position, serial number, page number, check sum, number of segments."""
_CONTINUED, _FIRST = 1, 2
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
_EMPTY_COMMENTS = {b"\x01vorbis": b"\x03vorbis" + bytes(8) + b"\x01", b"OpusHead": b"OpusTags" + bytes(8)}
_NUM_HEADERS = {b"\x01vorbis": 3, b"OpusHead": 2}
"""Packets before the sound: what it is, comments, and Vorbis' code books."""


class _Page(NamedTuple):
    flags: int
    granule: int
    serial: int
    number: int
    lacing: bytes
    """The lengths of its segments; a packet ends with one below 255."""
    body: bytes

    def encode(self, number: int) -> bytes:
        fields = (b"OggS", 0, self.flags, self.granule, self.serial, number)
        rest = self.lacing + self.body
        without = _HEADER.pack(*fields, 0, len(self.lacing)) + rest
        return _HEADER.pack(*fields, _check_sum(without), len(self.lacing)) + rest


def without_comments(data: bytes) -> bytes | None:
    """The file with an empty comment header; None if it is not one stream of Vorbis or Opus."""
    pages = _pages(data)
    if pages is None or pages[0].flags != _FIRST or len({page.serial for page in pages}) > 1:
        return None
    if any(page.flags & _FIRST for page in pages[1:]):
        return None
    kind = next((mark for mark in _NUM_HEADERS if pages[0].body.startswith(mark)), None)
    if kind is None:
        return None
    num_packets, num_pages, packets, rest = 0, 0, list[bytes](), b""
    while num_packets < _NUM_HEADERS[kind] and num_pages < len(pages):
        page, place = pages[num_pages], 0
        for length in page.lacing:
            rest += page.body[place : place + length]
            place += length
            if length < 255:
                packets.append(rest)
                rest = b""
        num_packets, num_pages = len(packets), num_pages + 1
    if num_packets != _NUM_HEADERS[kind] or rest:  # the sound must begin with a page of its own
        return None
    heads = [pages[0], *_paged([_EMPTY_COMMENTS[kind], *packets[2:]], pages[0].serial)]
    return b"".join(page.encode(number) for number, page in enumerate([*heads, *pages[num_pages:]]))


def _pages(data: bytes) -> list[_Page] | None:
    """None if there is something between the pages; what follows the last one is dropped."""
    pages, place = [], 0
    while place + _HEADER.size <= len(data) and data[place : place + 4] == b"OggS":
        _, _, flags, granule, serial, number, _, num_segments = _HEADER.unpack_from(data, place)
        start = place + _HEADER.size + num_segments
        lacing = data[place + _HEADER.size : start]
        end = start + sum(lacing)
        if end > len(data):
            break
        pages.append(_Page(flags, granule, serial, number, lacing, data[start:end]))
        place = end
    return pages if pages and data.find(b"OggS", place) < 0 else None


def _paged(packets: Sequence[bytes], serial: int) -> list[_Page]:
    lengths = [length for packet in packets for length in [255] * (len(packet) // 255) + [len(packet) % 255]]
    body, pages, place = b"".join(packets), list[_Page](), 0
    for first in range(0, len(lengths), 255):
        lacing = bytes(lengths[first : first + 255])
        is_continued = first > 0 and lengths[first - 1] == 255
        ends = any(length < 255 for length in lacing)
        end = place + sum(lacing)
        pages.append(_Page(_CONTINUED * is_continued, 0 if ends else -1, serial, 0, lacing, body[place:end]))
        place = end
    return pages


def _check_sum(data: bytes) -> int:
    """CRC-32 of polynomial 0x04C11DB7, begun with 0: zlib's, but for the order of the bits and its inversions."""
    mirrored = zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
