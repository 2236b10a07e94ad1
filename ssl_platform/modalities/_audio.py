"""Sound from bytes to samples: what kind of file it is, its header, decoding, resampling.

Samples are (channels, samples) float32, nominally in [-1, 1].
"""

import io
import math
import mmap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ssl_platform.modalities._sound_decoders import AudioInfo as AudioInfo
from ssl_platform.modalities._sound_decoders import Decoder, open_decoder
from ssl_platform.modalities._sound_decoders import Samples as Samples
from ssl_platform.modalities._sound_decoders import package as package
from ssl_platform.modalities._sound_length import check_length
from ssl_platform.modalities._wav import Wav, is_wav, read_wav

EXTENSIONS = ("wav", "flac", "ogg", "oga", "opus", "mp3", "m4a", "aac", "aif", "aiff", "au", "caf", "webm", "wma")
MAX_VALUES = 1 << 28
"""Samples times channels that are decoded at most: 1 GiB of float32, 4.6 hours at 16 kHz or 46 minutes of stereo at
48 kHz. A small file can claim, and if it is silent truly hold, any length."""
MAX_SECONDS = 16_800
"""Of one reading, whatever the rate: 4.6 hours; at a low one, MAX_VALUES would become many more at 16 kHz."""
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE, MAX_CHANNELS = 1000, 768_000, 256
"""Hz: sounds of hearts and of the sea begin at 1 or 2 kHz. Resampling from 1 Hz to 16 kHz takes 16,000 times the memory."""
MAX_LEVEL = 2.0**31
"""Floats that hold integers of 32 bits. Filter banks of what is larger overflow."""


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


class SoundFile:
    """Sound in bytes or in a file, whose header is read once; `read` decodes any segment, and no more than it has to.

    WAV, FLAC, Ogg, Opus, MP3 and what else libsndfile opens are read from the exact place. AAC in MP4 is decoded from 16
    frames before it: samples are those of the whole, but for noise that the codec only describes and every decoding draws
    anew. WebM, WMA and bare AAC have no exact places and are decoded from the beginning.
    Raises ValueError with the reason if it is empty, no sound, or says less or more than it can hold; OSError if a file
    cannot be read.
    """

    def __init__(self, source: bytes | Path, *, checked: bool = True) -> None:
        """`checked`: refuse files without compression that are cut off, as reading would go on beyond their end."""
        self._file: IO[bytes] = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
        try:
            self._decoder = self._opened(source, checked)
        except BaseException:
            self.close()
            raise
        self.info = self._decoder.info
        """What the header says."""

    def _opened(self, source: bytes | Path, checked: bool) -> Decoder:
        file = self._file
        start = file.read(64)
        file.seek(0)
        if not start:
            raise ValueError("the file has zero bytes")
        kind = audio_kind(start)
        if kind is None:
            raise ValueError(f"not a sound file: no known format begins with {start[:8]!r}")
        wav = None
        if checked:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if isinstance(source, Path) else source
            wav = read_wav(data) if is_wav(data) else None
            check_length(data)
        if wav is not None:  # libsndfile refuses some of these without a reason
            _check_header(wav)
        with _in_words(kind):
            decoder = open_decoder(file, kind, wav)
        _check_header(decoder.info)
        return decoder

    def close(self) -> None:
        """Closes the file, if it is one."""
        self._file.close()

    def read(self, start: float = 0.0, stop: float | None = None) -> Sound:
        """The samples from `start` to `stop` in seconds; a segment that begins inside and ends beyond the end ends there.

        Raises ValueError with the reason if there are none, if they are damaged, cut off, NaN, infinite or above
        MAX_LEVEL, or more than MAX_VALUES or MAX_SECONDS.
        """
        if not (0 <= start < math.inf and (stop is None or start < stop)):
            raise ValueError(f"a segment from {start} to {stop} seconds: expected 0 <= start < stop")
        rate, num_channels = self.info.sample_rate, self.info.num_channels
        first = round(start * rate)
        last = math.inf if stop is None or stop == math.inf else max(round(stop * rate), first + 1)
        most = min(MAX_VALUES // num_channels, MAX_SECONDS * rate)
        blocks, num_samples = [], 0
        with _in_words(self.info.kind):
            for block in self._decoder.blocks(first, last):
                num_samples += block.shape[1]
                if num_samples > most:
                    raise ValueError(
                        f"too long: more than {most / rate:.0f} s of {num_channels} channels at {rate} Hz; "
                        "cut it into pieces"
                    )
                blocks.append(block)
        if num_samples == 0:
            raise ValueError("holds no samples" + f" from {start} seconds on" * (start > 0))
        samples = np.concatenate(blocks, axis=1)
        loudest = max(abs(float(samples.max())), abs(float(samples.min())))  # NaN if any is
        if not math.isfinite(loudest):
            raise ValueError("holds NaN or infinite samples")
        if loudest > MAX_LEVEL:
            raise ValueError(f"holds samples of {loudest:.3g}, expected about -1 to 1; damaged, or not sound")
        return Sound(samples, rate)


def read_info(source: bytes | Path) -> AudioInfo:
    """The header of a file or of its bytes, without decoding it; raises ValueError or OSError with the reason."""
    with closing(SoundFile(source, checked=False)) as sound:
        return sound.info


def decode_audio(data: bytes, start: float = 0.0, stop: float | None = None) -> Sound:
    """The sound in `data`, or its segment from `start` to `stop` in seconds; what the file is, its content says.

    Raises ValueError with the reason, as `SoundFile` does, which reads several segments faster.
    """
    return SoundFile(data).read(start, stop)


def resample(sound: Sound, sample_rate: int) -> Sound:
    """The sound at another rate, by soxr at its high quality."""
    if sound.sample_rate == sample_rate:
        return sound
    soxr = package("soxr")
    samples = soxr.resample(np.ascontiguousarray(sound.samples.T), sound.sample_rate, sample_rate)  # (samples, C)
    return Sound(np.ascontiguousarray(samples.T), sample_rate)


def _check_header(info: AudioInfo | Wav) -> None:
    if not MIN_SAMPLE_RATE <= info.sample_rate <= MAX_SAMPLE_RATE:
        raise ValueError(f"the header says {info.sample_rate} Hz, expected {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}")
    if not 0 < info.num_channels <= MAX_CHANNELS:
        raise ValueError(f"the header says {info.num_channels} channels, expected 1 to {MAX_CHANNELS}")


@contextmanager
def _in_words(kind: str) -> Iterator[None]:
    """Errors of decoders as ValueErrors; damaged bytes make them raise almost anything."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:
            raise
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot be decoded as {kind}: {reason}") from error
