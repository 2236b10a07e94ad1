"""Matroska and WebM (RFC 9559): whether a file is whole. FFmpeg does not ask: it goes on behind what is damaged."""

import zlib
from typing import NamedTuple

_SEGMENT, _TRACKS, _CLUSTER, _CHECK_SUM = 0x18538067, 0x1654AE6B, 0x1F43B675, 0xBF
_GROUP, _SIMPLE_BLOCK, _BLOCK, _VOID = 0xA0, 0xA3, 0xA1, 0xEC
_IN_SEGMENT = {
    _TRACKS, _CLUSTER, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, _VOID, _CHECK_SUM,
}  # fmt: skip
_IN_GROUP = {_BLOCK, 0x75A1, 0x9B, 0xFA, 0xFB, 0xA4, 0x75A2, 0x8E, 0xA2, 0xFD, 0xC8, 0xAF, _VOID, _CHECK_SUM}
_SHORT = {0xE7, 0xA7, 0xAB, _CHECK_SUM}
"""Time, position and the like: what is longer was a frame before its mark was damaged."""
_IN_CLUSTER = {_GROUP, _SIMPLE_BLOCK, 0x5854, *_SHORT, _VOID}
_TRACK, _TRACK_NUMBER, _TRACK_TYPE, _PICTURES = 0xAE, 0xD7, 0x83, 1


class _Element(NamedTuple):
    id: int
    start: int
    """Of its body."""
    end: int | None
    """None: unknown, as in live recordings; it ends where something begins that it cannot hold."""


def count_frames(data: bytes) -> int:
    """How many frames of the first track of pictures a file holds, by walking through all of its elements.

    Raises ValueError if one is cut off, is not known, does not end where what holds it ends, or if tracks or frames have
    another check sum than they say, so that no damage of the structure is passed over.
    """
    place = 0
    while (element := _element(data, place, len(data))).id != _SEGMENT:
        place = _end(element)
    end = len(data) if element.end is None else element.end
    tracks, num_frames, place, cluster = dict[int, int](), dict[int, int](), element.start, None
    while place < end:
        if cluster is not None and place == cluster.end:
            cluster = None
        element = _element(data, place, end if cluster is None or cluster.end is None else cluster.end)
        if cluster is not None and cluster.end is None and element.id in _IN_SEGMENT - _IN_CLUSTER:
            cluster = None
        if element.id not in (_IN_SEGMENT if cluster is None else _IN_CLUSTER):
            raise _damaged(place, f"element {element.id:X} does not belong there")
        if element.id == _CLUSTER:
            cluster, place = element, element.start
            _check_sum(data, element)
            continue
        if element.id == _TRACKS:
            _check_sum(data, element)  # tags are rewritten by programs that leave theirs
            tracks = _tracks(data, element)
        elif element.id in _SHORT and _end(element) - element.start > 8:
            raise _damaged(place, f"element {element.id:X} is too long")
        elif cluster is not None and element.id == _VOID and any(data[element.start : _end(element)]):
            raise _damaged(place, "a gap among the frames that is not empty")
        elif element.id in (_GROUP, _SIMPLE_BLOCK):
            block = _block_of(data, element)
            number, start = _number(data, block.start)
            body = start + 3  # behind time and flags
            if number not in tracks or body > _end(block):
                raise _damaged(place, f"a frame of track {number}, and there are {sorted(tracks)}")
            is_laced = data[start + 2] & 6  # several frames, whose number the next byte says
            held = 0 if body == _end(block) else data[body] + 1 if is_laced else 1
            num_frames[number] = num_frames.get(number, 0) + held
        place = _end(element)
    return next((num_frames.get(number, 0) for number, kind in tracks.items() if kind == _PICTURES), 0)


def _element(data: bytes, place: int, limit: int) -> _Element:
    if place >= limit:
        raise ValueError("is truncated in its header")
    width = 9 - data[place].bit_length()
    if width > 4:
        raise _damaged(place, "no element begins there")
    name = int.from_bytes(data[place : place + width], "big")
    length_at = place + width
    if length_at >= limit:
        raise ValueError("is truncated in its header")
    size, start = _number(data, length_at)
    unknown = size == (1 << 7 * (start - length_at)) - 1
    if unknown and name not in (_SEGMENT, _CLUSTER):
        raise _damaged(place, f"element {name:X} has no length")
    if not unknown and start + size > limit:
        if start + size > len(data) and limit == len(data):
            raise ValueError(f"is truncated: {len(data):,} of {start + size:,} bytes")
        raise _damaged(place, f"element {name:X} is longer than what holds it")
    return _Element(name, start, None if unknown else start + size)


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    width = 9 - data[place].bit_length() if place < len(data) else 9
    if width > 8 or place + width > len(data):
        raise _damaged(place, "expected a number")
    return int.from_bytes(data[place : place + width], "big") & ((1 << 7 * width) - 1), place + width


def _children(data: bytes, parent: _Element) -> list[_Element]:
    found, place = list[_Element](), parent.start
    while place < _end(parent):
        found.append(_element(data, place, _end(parent)))
        place = _end(found[-1])
    return found


def _end(element: _Element) -> int:
    if element.end is None:
        raise _damaged(element.start, "an element has no length")
    return element.end


def _tracks(data: bytes, tracks: _Element) -> dict[int, int]:
    """{number: kind}"""
    found = {}
    for track in _children(data, tracks):
        if track.id == _TRACK:
            facts = {one.id: int.from_bytes(data[one.start : _end(one)], "big") for one in _children(data, track)}
            found[facts.get(_TRACK_NUMBER, 0)] = facts.get(_TRACK_TYPE, 0)
    return found


def _block_of(data: bytes, element: _Element) -> _Element:
    if element.id != _GROUP:
        return element
    children = _children(data, element)
    if strangers := [one for one in children if one.id not in _IN_GROUP]:
        raise _damaged(strangers[0].start, f"element {strangers[0].id:X} does not belong there")
    blocks = [one for one in children if one.id == _BLOCK]
    if len(blocks) != 1:
        raise _damaged(element.start, "a group without its frame")
    return blocks[0]


def _check_sum(data: bytes, element: _Element) -> None:
    """Of whatever follows in an element that begins with one; muxers write them, or do not."""
    if element.end is None or data[element.start : element.start + 2] != b"\xbf\x84":
        return
    start = element.start + 6
    if zlib.crc32(memoryview(data)[start : element.end]) != int.from_bytes(data[start - 4 : start], "little"):
        raise _damaged(element.start, f"element {element.id:X} has another check sum than it says")


def _damaged(place: int, what: str) -> ValueError:
    return ValueError(f"is damaged at byte {place:,}: {what}")
