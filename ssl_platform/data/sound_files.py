"""Sound files without what they say besides their sound: the same frames, no tag, picture, comment or appended data."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.ogg import without_comments
from ssl_platform.modalities._audio import Sound, package
from ssl_platform.modalities._wav import FLOAT, Wav, read_wav

_MAX_FLAC_CHANNELS, _MAX_FLAC_RATE = 8, 655_350
_STREAMINFO, _SEEKTABLE = 0, 3
_MOST_FRAME_BYTES = 1 << 20
"""So far from the end the last frame of a FLAC file is looked for."""
_BITRATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""kbit/s by (MPEG version, layer) and index - 1; versions 2 and 2.5 share theirs (ISO 11172-3, 13818-3)."""
_REMUXED = {"ogg": ("ogg", "ogg"), "opus": ("ogg", "ogg"), "m4a": ("mov", "ipod"), "aac": ("aac", "adts")}
"""{kind: what FFmpeg reads it as, writes it as}"""


def clean_sound(data: bytes, kind: str) -> bytes | None:
    """The file with nothing but its sound, of the same kind; None where that is not possible.

    The caller checks that it decodes to the same samples. Raises ValueError if the file is damaged.
    """
    match kind:
        case "wav":
            wav = read_wav(data) if data[:4] == b"RIFF" else None
            return None if wav is None else wav.encode()
        case "flac":
            return _clean_flac(data)
        case "mp3":
            return _mpeg_frames(data)
        case "ogg" | "opus":
            return without_comments(data) or _remuxed(data, *_REMUXED[kind])
    return _remuxed(data, *_REMUXED[kind]) if kind in _REMUXED else None


def encode_flac(sound: Sound, bits: int) -> tuple[bytes, str]:
    """Samples as FLAC: of 16 bits if the source had no more, else of 24; as WAV of floats where that is not enough."""
    channels, rate = len(sound.samples), sound.sample_rate
    if bits > 24 or channels > _MAX_FLAC_CHANNELS or rate > _MAX_FLAC_RATE:
        values: NDArray[Any] = np.ascontiguousarray(sound.samples.T, dtype="<f4")
        return Wav(FLOAT, channels, rate, 32, 32, 0, False, memoryview(values.tobytes())).encode(), "wav"
    scale = 1 << (15 if bits <= 16 else 23)
    integers = np.clip(np.rint(sound.samples.T.astype(np.float64) * scale), -scale, scale - 1)  # (samples, C)
    integers = integers.astype(np.int16) if bits <= 16 else integers.astype(np.int32) << 8  # read from the top
    file = io.BytesIO()
    package("soundfile").write(file, integers, rate, format="FLAC", subtype="PCM_16" if bits <= 16 else "PCM_24")
    clean = _flac_frames(file.getvalue())
    assert clean is not None, "libsndfile writes nothing behind the last frame"
    return clean, "flac"


def _clean_flac(data: bytes) -> bytes | None:
    """STREAMINFO, SEEKTABLE and the frames; None if something else follows the last frame.

    A check sum over a frame and its own is 0, and stays 0 over zeros: where a disk or a download has left some behind the
    last frame, it does not tell them from the frame, which itself ends with more than two once in 65,536 times.
    """
    return None if data.endswith(b"\0\0\0") else _flac_frames(data)


def _flac_frames(data: bytes) -> bytes | None:
    if data[:4] != b"fLaC":  # a tag of another kind stands before
        return None
    blocks, place, is_last = [], 4, False
    while not is_last:
        if place + 4 > len(data):
            raise ValueError("truncated: a FLAC file without samples")
        kind, size = data[place] & 0x7F, int.from_bytes(data[place + 1 : place + 4], "big")
        is_last = bool(data[place] & 0x80)
        if kind == _STREAMINFO or (kind == _SEEKTABLE and size % 18 == 0):
            blocks.append((kind, data[place + 4 : place + 4 + size]))
        place += 4 + size
    if not _ends_with_a_frame(data, place):
        return None
    heads = [
        bytes([kind | (0x80 if block is blocks[-1][1] else 0)]) + len(block).to_bytes(3, "big") + block
        for kind, block in blocks
    ]
    return b"".join([b"fLaC", *heads, data[place:]])


def _ends_with_a_frame(data: bytes, first: int) -> bool:
    """Whether some frame begins behind `first` whose check sum, its last two bytes, is right at the end of the file."""
    tail = np.frombuffer(data, np.uint8, offset=max(first, len(data) - _MOST_FRAME_BYTES))
    begins = (tail[:-1] == 0xFF) & ((tail[1:] & 0xFE) == 0xF8)  # 14 bits of ones and zeros that begin each frame
    return bool((suffix_crcs(tail)[:-1][begins] == 0).any())


def suffix_crcs(data: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """(N,): of each place the CRC-16 of what follows, of polynomial 0x8005, begun with 0; 0 where that ends with its own.

    A CRC is a sum in GF(2): bit j of a byte that k others follow adds x^(16 + 8 k + j), so all places are one running sum
    from behind, in linear time. A loop over candidates takes seconds for a file with junk behind it.
    """
    exponents = 16 + 8 * np.arange(len(data))
    terms, backwards = np.zeros(len(data), np.uint16), data[::-1]
    for bit in range(8):
        terms ^= _POWERS[(exponents + bit) % len(_POWERS)] * (backwards >> bit & 1)
    return np.bitwise_xor.accumulate(terms)[::-1]


def _powers_of_x() -> NDArray[np.uint16]:
    """x^0, x^1, ... modulo x^16 + x^15 + x^2 + 1 = (x + 1)(x^15 + x + 1), which come again after 2^15 - 1."""
    powers, power = np.empty((1 << 15) - 1, np.uint16), 1
    for exponent in range(len(powers)):
        powers[exponent] = power
        power = power << 1 ^ (0x18005 if power & 0x8000 else 0)
    assert power == 1
    return powers


_POWERS = _powers_of_x()


def _mpeg_frames(data: bytes) -> bytes:
    """The MPEG audio frames of a file, one after the other; what lies before, between and behind them is dropped."""
    place = 0
    if data[:3] == b"ID3" and len(data) > 10:  # its size has 7 bits in each byte
        place = 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(data[6:10]))
    frames, last = list[bytes](), -1
    while (place := data.find(b"\xff", place)) >= 0:
        length = _mpeg_frame_length(data[place : place + 4])
        end = place + length
        is_next = place == last or end == len(data) or _mpeg_frame_length(data[end : end + 4]) > 0
        is_only = data[end : end + 3] in (b"TAG", b"APE", b"LYR", b"ID3")
        if length and end <= len(data) and (is_next or is_only):
            frames.append(data[place:end])
            place = last = end
        else:
            place += 1
    return b"".join(frames)


def _mpeg_frame_length(header: bytes) -> int:
    """In bytes; 0 if these four bytes begin no frame."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0
    version, layer = {0: 3, 2: 2, 3: 1}.get(header[1] >> 3 & 3, 0), 4 - (header[1] >> 1 & 3)
    bitrate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 0 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return 0
    bits = _BITRATES[min(version, 2), layer][bitrate - 1] * 1000
    hertz = (44_100, 48_000, 32_000)[rate] >> (version - 1)
    padding = header[2] >> 1 & 1
    if layer == 1:
        return (12 * bits // hertz + padding) * 4
    return (72 if layer == 3 and version > 1 else 144) * bits // hertz + padding


def _remuxed(data: bytes, read_as: str, write_as: str) -> bytes | None:
    """The same packets in a new container; None if FFmpeg cannot."""
    av = package("av")
    file = io.BytesIO()
    try:
        with (
            av.open(io.BytesIO(data), format=read_as, metadata_errors="ignore") as source,
            av.open(file, "w", format=write_as, options={"fflags": "+bitexact"}) as target,
        ):
            if not source.streams.audio:
                return None
            stream = source.streams.audio[0]
            copy = target.add_stream_from_template(stream)
            copy.metadata.clear()
            target.metadata.clear()
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
    except (av.FFmpegError, ValueError):
        return None
    return file.getvalue()
