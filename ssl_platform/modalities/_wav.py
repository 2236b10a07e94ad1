"""WAV files as bytes: where the samples lie, and a file that holds them and nothing else."""

import mmap
import struct
from typing import NamedTuple

PCM, FLOAT, A_LAW, MU_LAW, EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")
"""Of every sub-format that is a format code of its own, which stands in the two bytes before it."""
_UINT32 = 0xFFFFFFFF
_STREAMED = (0, _UINT32)
"""Sizes of a data chunk that a program wrote which did not know the length: the samples go on to the end."""
_STREAMED_BY_SOX = 0x7FFFF000


class Wav(NamedTuple):
    """The parts of a WAV file that sound needs."""

    code: int
    """Of the samples: PCM, FLOAT, ... An extensible header says it in its sub-format."""
    num_channels: int
    sample_rate: int
    bits: int
    """That a sample takes in the file."""
    valid_bits: int
    """That a sample has; fewer in a wider container."""
    speakers: int
    """The bit mask of an extensible header that says where each channel is heard; None known: 0."""
    is_extensible: bool
    samples: memoryview

    @property
    def frame(self) -> int:
        """Bytes of one sample of all channels."""
        return self.num_channels * self.bits // 8

    def encode(self) -> bytes:
        """A file of the chunks `fmt ` and `data` alone, with the same samples."""
        frame = self.frame
        code = EXTENSIBLE if self.is_extensible else self.code
        form = struct.pack(
            "<HHIIHH", code, self.num_channels, self.sample_rate, self.sample_rate * frame & _UINT32, frame, self.bits
        )
        if self.is_extensible:
            form += struct.pack("<HHIH", 22, self.valid_bits, self.speakers, self.code) + _GUID_TAIL
        size = len(self.samples)
        body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
        whole = b"RIFF" + struct.pack("<I", len(body) + size + size % 2) + body
        return b"".join([whole, self.samples, b"\0" * (size % 2)])


def is_wav(data: bytes | mmap.mmap) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


def read_wav(data: bytes | mmap.mmap) -> Wav | None:
    """The parts of a WAV file of PCM, floats, A-law or mu-law; None if its samples are written in another way.

    Raises ValueError if the file is cut off or says impossible things.
    """
    form, place = b"", 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        start = place + 8
        if name == b"fmt ":
            form = data[start : start + size]
        elif name == b"data":
            return _parts(form, _samples(data, start, size))
        place = start + size + size % 2
    raise ValueError("truncated: a WAV file without samples")


def _samples(data: bytes | mmap.mmap, start: int, size: int) -> memoryview:
    there = len(data) - start
    is_open = size == 0 and int.from_bytes(data[4:8], "little") in _STREAMED
    if is_open or size == _UINT32 or size == _STREAMED_BY_SOX > there:
        size = there
    if size > there:
        raise ValueError(f"truncated: the header says {size} bytes of samples, there are {there}")
    return memoryview(data)[start : start + size]


def _parts(form: bytes, samples: memoryview) -> Wav | None:
    if len(form) < 16:
        raise ValueError("a WAV file without a format")
    code, num_channels, sample_rate, _, frame, bits = struct.unpack("<HHIIHH", form[:16])
    valid_bits, speakers, is_extensible = bits, 0, code == EXTENSIBLE
    if is_extensible:
        if len(form) < 40 or form[26:40] != _GUID_TAIL:
            return None
        _, valid_bits, speakers, code = struct.unpack("<HHIH", form[16:26])
    if code not in (PCM, FLOAT, A_LAW, MU_LAW):
        return None
    if num_channels == 0 or sample_rate == 0 or bits not in (8, 16, 24, 32, 64) or frame != num_channels * bits // 8:
        raise ValueError(
            f"a WAV file of {num_channels} channels, {sample_rate} Hz, {bits} bits and {frame} bytes a frame"
        )
    whole = samples[: len(samples) // frame * frame]
    return Wav(code, num_channels, sample_rate, bits, valid_bits, speakers, is_extensible, whole)
