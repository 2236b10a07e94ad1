"""What opens sound: soundfile (libsndfile), and FFmpeg by PyAV for what that does not open.

A decoder has `info`, from the header, and `blocks(first, last)`: (channels, samples) float32 of the samples `first` to
`last` of each channel, piece by piece, so that memory is taken for what is there and not for what a header says.
"""

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ssl_platform.modalities._quiet import without_decoder_notes
from ssl_platform.modalities._wav import FLOAT, Wav
from ssl_platform.optional import optional_package

Samples = NDArray[np.float32]
"""(channels, samples)"""

FFMPEG_FORMATS = {
    "m4a": "mov",
    "aac": "aac",
    "webm": "matroska",
    "wma": "asf",
    "caf": "caf",
    "ogg": "ogg",
    "opus": "ogg",
}
"""What FFmpeg may take a file for. Left to guess it would follow play lists to other files and hosts."""
_BLOCK = 1 << 18
_FOR_FFMPEG_ALONE = ("m4a", "aac", "webm", "wma")
_LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
_BITS = {"PCM_24": 24, "PCM_32": 32, "FLOAT": 32, "DOUBLE": 64, "ALAC_24": 24, "ALAC_32": 32}
_PRE_ROLL = 1 << 14
"""Samples of AAC that are decoded and dropped before a segment. A frame (1,024) needs the one before it."""


class AudioInfo(NamedTuple):
    """What the header of a file says."""

    kind: str
    """The extension that a file of such contents should have: "wav", "flac", ..."""
    sample_rate: int
    num_channels: int
    num_samples: int
    """Of each channel. Of compressed streams without a length it may be off by a frame, or 0: unknown."""
    bits: int
    """Of a sample as it was stored; 16 where a lossy codec has no such number."""
    is_lossy: bool


def package(name: str) -> Any:
    return optional_package(name, f"sound needs the package {name}", "audio")


class Decoder(Protocol):
    info: AudioInfo

    def blocks(self, first: int, last: float) -> Iterator[Samples]: ...


def open_decoder(file: IO[bytes], kind: str, wav: Wav | None) -> Decoder:
    """The decoder of a file of a kind; `wav` are its parts where it is one that can be cut by bytes.

    Raises ValueError with the reason if it cannot be opened.
    """
    if wav is not None:
        return WavDecoder(wav)
    if kind not in _FOR_FFMPEG_ALONE:
        try:
            return SoundfileDecoder(file, kind)
        except (RuntimeError, TypeError) as error:  # soundfile's error is a RuntimeError
            if kind not in FFMPEG_FORMATS:
                raise ValueError(f"cannot be decoded as {kind}: damaged, or cut off within its header") from error
    return FFmpegDecoder(file, kind)


class WavDecoder:
    """WAV by the bytes of the samples that are wanted, whatever the length and the place of its other chunks."""

    def __init__(self, wav: Wav) -> None:
        self.wav = wav
        bits = wav.bits if wav.code == FLOAT or wav.bits in (24, 32) else 16
        self.info = AudioInfo("wav", wav.sample_rate, wav.num_channels, len(wav.samples) // wav.frame, bits, False)
        for _ in self._decoded(0, 0):  # what libsndfile does not know is refused here
            pass

    def blocks(self, first: int, last: float) -> Iterator[Samples]:
        end = int(min(last, self.info.num_samples))
        for start in range(first, end, _BLOCK):
            yield from self._decoded(start, min(start + _BLOCK, end))

    def _decoded(self, first: int, last: int) -> Iterator[Samples]:
        part = self.wav._replace(samples=self.wav.samples[first * self.wav.frame : last * self.wav.frame])
        try:
            with package("soundfile").SoundFile(io.BytesIO(part.encode())) as sound:
                yield sound.read(dtype="float32", always_2d=True).T  # (samples, C) -> (C, samples)
        except (RuntimeError, TypeError) as error:
            raise ValueError("cannot be decoded as wav: its samples are written in a way that is not known") from error


class SoundfileDecoder:
    """What libsndfile opens; it goes to exact places of every format that it knows.

    But not of Vorbis and MP3 if it has read before: of a few hundred samples what it then gives depends on what that was
    (https://github.com/libsndfile/libsndfile/issues/885), so each reading of a lossy file begins anew.
    """

    def __init__(self, file: IO[bytes], kind: str) -> None:
        self.file, self.kind = file, kind
        sound = self.sound = self._opened()
        self.info = AudioInfo(
            kind, sound.samplerate, sound.channels, max(sound.frames, 0),
            _BITS.get(sound.subtype, 16), sound.subtype in _LOSSY,
        )  # fmt: skip

    def _opened(self) -> Any:
        self.file.seek(0)
        with self._quietly():
            return package("soundfile").SoundFile(self.file)

    def _quietly(self) -> AbstractContextManager[None]:
        return without_decoder_notes() if self.kind == "mp3" else nullcontext()

    def blocks(self, first: int, last: float) -> Iterator[Samples]:
        end = min(last, self.sound.frames)
        if first >= end:
            return
        if self.info.is_lossy and self.sound.tell():
            self.sound = self._opened()
        with self._quietly():
            if self.sound.tell() != first:
                self.sound.seek(first)
            place = first
            while place < end:
                block = self.sound.read(int(min(_BLOCK, end - place)), dtype="float32", always_2d=True)  # (samples, C)
                if not len(block):
                    raise ValueError(f"truncated: the header says {self.sound.frames} samples, there are {place}")
                place += len(block)
                yield block.T


class FFmpegDecoder:
    """What only FFmpeg opens: decoded from the beginning, but AAC in MP4 from shortly before the segment."""

    def __init__(self, file: IO[bytes], kind: str) -> None:
        self.file, self.kind = file, kind
        with self._opened() as container:
            stream = self._stream(container)
            length = 0 if stream.duration is None else round(stream.duration * stream.time_base * stream.sample_rate)
            bits = {"s32": 32, "flt": 32, "dbl": 64}.get(stream.format.name.rstrip("p"), 16)
            is_lossy = not stream.codec.lossless
            bits = 16 if is_lossy else bits
            self.info = AudioInfo(kind, stream.sample_rate, stream.channels, max(length, 0), bits, is_lossy)

    def _opened(self) -> Any:
        self.file.seek(0)
        try:
            return package("av").open(self.file, format=FFMPEG_FORMATS[self.kind], metadata_errors="ignore")
        except package("av").FFmpegError as error:
            raise ValueError(f"cannot be decoded as {self.kind}: {error.strerror}") from error

    def _stream(self, container: Any) -> Any:
        if not container.streams.audio:
            raise ValueError(f"no sound in this {self.kind} file")
        stream = container.streams.audio[0]
        if stream.codec_context is None or stream.format is None:
            raise ValueError(f"cannot be decoded as {self.kind}: its codec is not known")
        return stream

    def blocks(self, first: int, last: float) -> Iterator[Samples]:
        with self._opened() as container:
            stream = self._stream(container)
            to_float = package("av").AudioResampler(format="fltp", layout=stream.layout, rate=stream.sample_rate)
            place = self._go_near(container, stream, first)
            for frame in _frames(container, stream, counted=place == 0):
                place = frame.pts if place is None else place
                for part in to_float.resample(frame):
                    block = part.to_ndarray()  # (C, samples)
                    begin, end = max(first - place, 0), min(last - place, block.shape[1])
                    place += block.shape[1]
                    if begin < end:
                        yield block[:, begin : int(end)]
                if place >= last:
                    return
            if first == 0 and 2 * (place or 0) < self.info.num_samples:  # it may be a guess, but no such one
                raise ValueError(f"truncated: the header says {self.info.num_samples} samples, there are {place}")

    def _go_near(self, container: Any, stream: Any, first: int) -> int | None:
        """0, or None if it went to a frame before `first`, whose time stamp says where it is.

        Only AAC in MP4 whose time stamps count samples: of other streams places are not exact, or decoders remember more.
        """
        is_exact = stream.time_base * stream.sample_rate == 1 and not stream.start_time
        if self.kind != "m4a" or stream.codec_context.name != "aac" or not is_exact or first < 2 * _PRE_ROLL:
            return 0
        container.seek(first - _PRE_ROLL, stream=stream)
        return None


def _frames(container: Any, stream: Any, counted: bool) -> Iterator[Any]:
    """The decoded frames; `counted`: all packets that the header of an MP4 file lists have to be there."""
    listed = getattr(stream, "index_entries", ()) if container.format.name.startswith("mov") else ()  # older PyAV: none
    num_listed, num_found = len(listed) if counted else 0, 0
    for packet in container.demux(stream):
        num_found += packet.size > 0
        if packet.size == 0 and num_found < num_listed:  # the end
            raise ValueError(f"truncated: the header says {num_listed} packets, there are {num_found}")
        yield from packet.decode()
