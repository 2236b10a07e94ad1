"""Sound from bytes to samples: what kind of file it is, its header, decoding, resampling.

Samples are (channels, samples) float32, nominally in [-1, 1].
"""

import io
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.modalities._quiet import without_decoder_notes
from ssl_platform.modalities._sound_length import check_length
from ssl_platform.modalities._wav import is_wav, read_wav
from ssl_platform.optional import optional_package

EXTENSIONS = ("wav", "flac", "ogg", "oga", "opus", "mp3", "m4a", "aac", "aif", "aiff", "au", "caf", "webm", "wma")
MAX_VALUES = 1 << 28
"""Samples times channels that are decoded at most: 1 GiB of float32, 4.6 hours at 16 kHz or 46 minutes of stereo at
48 kHz. A small file can claim, and if it is silent truly hold, any length."""
MAX_SAMPLE_RATE, MAX_CHANNELS = 768_000, 256
_BLOCK = 1 << 18
_FFMPEG_FORMATS = {
    "m4a": "mov",
    "aac": "aac",
    "webm": "matroska",
    "wma": "asf",
    "caf": "caf",
    "ogg": "ogg",
    "opus": "ogg",
}
"""What FFmpeg may take a file for. Left to guess it would follow play lists to other files and hosts."""
_LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
_BITS = {"PCM_24": 24, "PCM_32": 32, "FLOAT": 32, "DOUBLE": 64, "ALAC_24": 24, "ALAC_32": 32}

Samples = NDArray[np.float32]
"""(channels, samples)"""


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


class Sound(NamedTuple):
    """Decoded sound."""

    samples: Samples
    sample_rate: int


def audio_kind(data: bytes) -> str | None:
    """The extension that fits the first bytes of a file (64 are enough), None if they are no sound that is known."""
    if data[:3] == b"ID3":
        return "mp3"
    for mark, kind in ((b"fLaC", "flac"), (b".snd", "au"), (b"caff", "caf"), (b"\x1aE\xdf\xa3", "webm")):
        if data.startswith(mark):
            return kind
    if data[:4] == b"OggS":
        return "opus" if b"OpusHead" in data[:64] else "ogg"
    if data[:4] in (b"RIFF", b"RF64", b"RIFX") and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if data[4:8] == b"ftyp":
        return "m4a"
    if data[:4] == b"\x30\x26\xb2\x75":
        return "wma"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0:
        return "aac" if data[1] & 0xF6 == 0xF0 else "mp3"
    return None


def read_info(source: bytes | Path) -> AudioInfo:
    """The header of a file or of its bytes, without decoding it; raises ValueError or OSError with the reason."""
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        kind = _kind_of(file)
        with _quietly(kind):
            return _info(file, kind)


def decode_audio(data: bytes, start: float = 0.0, stop: float | None = None) -> Sound:
    """The sound in `data`, or its segment from `start` to `stop` in seconds; what the file is, its content says.

    A segment that begins inside and ends beyond the end ends there. Raises ValueError with the reason if the file is
    empty, no sound, cut off, longer than MAX_VALUES, or holds NaN or infinite samples.
    """
    file = io.BytesIO(data)
    kind = _kind_of(file)
    if is_wav(data) and (wav := read_wav(data)) is not None:
        file = io.BytesIO(wav.encode())  # with a length that is true
    check_length(data)
    with _quietly(kind):
        return _decode(file, kind, start, stop)


def _decode(file: Any, kind: str, start: float, stop: float | None) -> Sound:
    info = _info(file, kind)
    if not (start >= 0 and (stop is None or start < stop)):
        raise ValueError(f"a segment from {start} to {stop} seconds: expected 0 <= start < stop")
    first, last = (math.inf if time is None else round(time * info.sample_rate) for time in (start, stop))
    most = MAX_VALUES // info.num_channels
    blocks, num_samples = [], 0
    for block in _guarded(_blocks(file, kind, int(first), last, info), kind):
        num_samples += block.shape[1]
        if num_samples > most:
            raise ValueError(
                f"too long: more than {most / info.sample_rate:.0f} s of {info.num_channels} channels at "
                f"{info.sample_rate} Hz; cut it into pieces"
            )
        blocks.append(block)
    if num_samples == 0:
        raise ValueError("holds no samples" + f" from {start} seconds on" * (start > 0))
    samples = np.concatenate(blocks, axis=1)
    if not np.isfinite(samples).all():
        raise ValueError("holds NaN or infinite samples")
    return Sound(samples, info.sample_rate)


def resample(sound: Sound, sample_rate: int) -> Sound:
    """The sound at another rate, by soxr at its high quality."""
    if sound.sample_rate == sample_rate:
        return sound
    soxr = package("soxr")
    samples = soxr.resample(np.ascontiguousarray(sound.samples.T), sound.sample_rate, sample_rate)  # (samples, C)
    return Sound(np.ascontiguousarray(samples.T), sample_rate)


# -- soundfile, and FFmpeg by PyAV for what it does not open -----------------------------------------------------------


def package(name: str) -> Any:
    return optional_package(name, f"sound needs the package {name}", "audio")


def _quietly(kind: str) -> AbstractContextManager[None]:
    return without_decoder_notes() if kind == "mp3" else nullcontext()


def _kind_of(file: Any) -> str:
    start = file.read(64)
    file.seek(0)
    if not start:
        raise ValueError("the file has zero bytes")
    kind = audio_kind(start)
    if kind is None:
        raise ValueError(f"not a sound file: no known format begins with {start[:8]!r}")
    return kind


def _info(file: Any, kind: str) -> AudioInfo:
    found = _soundfile_info(file, kind)
    if found is None and kind not in _FFMPEG_FORMATS:
        raise ValueError(f"cannot be decoded as {kind}: damaged, or cut off within its header")
    info = found or _ffmpeg_info(file, kind)
    if not (0 < info.sample_rate <= MAX_SAMPLE_RATE and 0 < info.num_channels <= MAX_CHANNELS):
        raise ValueError(f"the header says {info.num_channels} channels at {info.sample_rate} Hz")
    return info


def _is_for_soundfile(kind: str) -> bool:
    return kind not in ("m4a", "aac", "webm", "wma")


def _soundfile_info(file: Any, kind: str) -> AudioInfo | None:
    """None if libsndfile does not open it."""
    if not _is_for_soundfile(kind):
        return None
    soundfile = package("soundfile")
    try:
        with soundfile.SoundFile(file) as sound:
            return AudioInfo(
                kind, sound.samplerate, sound.channels, max(sound.frames, 0),
                _BITS.get(sound.subtype, 16), sound.subtype in _LOSSY,
            )  # fmt: skip
    except (RuntimeError, TypeError):  # soundfile's error is a RuntimeError
        return None
    finally:
        file.seek(0)


def _ffmpeg_info(file: Any, kind: str) -> AudioInfo:
    av = package("av")
    try:
        with av.open(file, format=_FFMPEG_FORMATS[kind]) as container:
            stream = _first_stream(container, kind)
            length = 0 if stream.duration is None else round(stream.duration * stream.time_base * stream.sample_rate)
            bits = {"s32": 32, "flt": 32, "dbl": 64}.get(stream.format.name.rstrip("p"), 16)
            is_lossy = not stream.codec.lossless
            return AudioInfo(kind, stream.sample_rate, stream.channels, length, 16 if is_lossy else bits, is_lossy)
    except av.FFmpegError as error:
        raise ValueError(f"cannot be decoded as {kind}: {error.strerror}") from error
    finally:
        file.seek(0)


def _first_stream(container: Any, kind: str) -> Any:
    if not container.streams.audio:
        raise ValueError(f"no sound in this {kind} file")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise ValueError(f"cannot be decoded as {kind}: its codec is not known")
    return stream


def _blocks(file: Any, kind: str, first: int, last: float, info: AudioInfo) -> Iterator[Samples]:
    if _soundfile_info(file, kind) is not None:
        yield from _soundfile_blocks(file, first, last)
    else:
        yield from _ffmpeg_blocks(file, kind, first, last)


def _guarded(blocks: Iterator[Samples], kind: str) -> Iterator[Samples]:
    """The blocks, with the errors of decoders as ValueErrors."""
    try:
        yield from blocks
    except Exception as error:  # damaged bytes make decoders raise almost anything
        if type(error) is ValueError:
            raise
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot be decoded as {kind}: {reason}") from error


def _soundfile_blocks(file: Any, first: int, last: float) -> Iterator[Samples]:
    """Blocks of samples `first` to `last`, so that memory is taken for what is there and not for what a header says."""
    with package("soundfile").SoundFile(file) as sound:
        end = min(last, sound.frames)
        if first >= end:
            return
        if first:
            sound.seek(first)
        place = first
        while place < end:
            block = sound.read(int(min(_BLOCK, end - place)), dtype="float32", always_2d=True)  # (samples, C)
            if not len(block):
                raise ValueError(f"truncated: the header says {sound.frames} samples, there are {place}")
            place += len(block)
            yield block.T


def _ffmpeg_blocks(file: Any, kind: str, first: int, last: float) -> Iterator[Samples]:
    """As above; decoded from the beginning, as compressed streams have no exact places to begin at."""
    av = package("av")
    with av.open(file, format=_FFMPEG_FORMATS[kind]) as container:
        stream = _first_stream(container, kind)
        to_float = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.sample_rate)
        place = 0
        for frame in container.decode(stream):
            for part in to_float.resample(frame):
                block = part.to_ndarray()  # (C, samples)
                begin, end = max(first - place, 0), min(last - place, block.shape[1])
                place += block.shape[1]
                if begin < end:
                    yield block[:, begin : int(end)]
            if place >= last:
                return
