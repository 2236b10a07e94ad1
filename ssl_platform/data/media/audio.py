"""Sound: stored as the file is, without its tags, or as FLAC; a segment of a file is always FLAC."""

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_platform.data.items import Item
from ssl_platform.data.media import Content, Look, Options
from ssl_platform.data.sound_files import clean_sound, encode_flac
from ssl_platform.modalities import _audio
from ssl_platform.modalities._audio import AudioInfo, Samples, Sound, SoundFile, decode_audio, package, resample
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._wav import is_wav

PLURAL = "sound files"
EXTENSIONS = _audio.EXTENSIONS
ONLY_IF_ASKED = ("mp4",)
KEPT = ("wav", "flac", "ogg", "opus", "mp3", "m4a")

FBANK = Fbank()
"""Of which the index keeps mean and std, bin by bin."""
STATISTICS_OF = {"values": "fbank", **FBANK.describe()}
PACKAGES = ("soundfile", "av", "soxr")
_PICTURE_COLUMNS = 256
_DECIBELS = 80
"""Below the loudest, that a picture shows."""
_STEADY = 0.005
"""Share of the loudest band's loudness: what changes less is rounding."""
_BLOCK_FRAMES = 1 << 12
"""So many are made at a time: 41 s, whose windows and spectra take 40 MB."""
_SILENT, _FULL, _CLIPPED = 1e-4, 0.99, 1e-3
"""Distance from the mean (-80 dB) that silence has at most; level from which a peak can be clipped; share of samples there.
"""
_MOST_BYTES = 0x7FFFF000
"""Of a WAV in an archive; a program that did not know the length wrote this or more."""


def check_packages() -> None:
    for name in PACKAGES:
        package(name)


def load(item: Item, options: Options) -> Content:
    """A file, or the segment (start, stop) in seconds that `part` says; the samples are never changed.

    A third number in `part` is the byte of an archive at which a WAV begins.
    """
    start, stop, *place = item.part or (0.0, math.inf)
    start, stop = float(start), float(stop)
    data = _from_archive(item.path, int(place[0])) if place else b""
    if start > 0 or stop < math.inf:
        with closing(SoundFile(data or item.path)) as file:
            info, sound = file.info, file.read(start, stop)
        stored, extension = encode_flac(sound, info.bits)
    else:
        data = data or item.path.read_bytes()
        file = SoundFile(data)
        info, sound = file.info, file.read()
        stored, extension = (data, info.kind) if options.keep_metadata else _clean(data, info, sound)
    about = {
        "sample_rate": sound.sample_rate,
        "num_samples": sound.samples.shape[1],
        "num_channels": len(sound.samples),
    }
    return Content(stored, extension, measured(sound), about, notes(sound.samples))


def _from_archive(path: Path, place: int) -> bytes:
    """The WAV that begins at a byte of an archive, as Kaldi's `wav-copy` writes them one after the other."""
    with path.open("rb") as file:
        file.seek(place)
        head = file.read(12)
        size = int.from_bytes(head[4:8], "little")
        if not is_wav(head):
            raise ValueError(f"at byte {place} of {path.name} begins no WAV, but {head[:8]!r}")
        if not 0 < size < _MOST_BYTES:
            raise ValueError(f"the WAV at byte {place} of {path.name} does not say where it ends")
        return head + file.read(size - 4)


def look(data: bytes, extension: str) -> Look:
    """The spectrogram."""
    sound = decode_audio(data)
    seconds = sound.samples.shape[1] / sound.sample_rate
    sizes = {"seconds": seconds, "sample rate": sound.sample_rate, "channels": len(sound.samples)}
    sizes |= {"peak": float(abs(sound.samples).max()), "share at full scale": share_at_full_scale(sound.samples)}
    bins = measured(sound)
    return Look(spectrogram(bins), sizes, lambda: bins, likeness(bins))


def measured(sound: Sound) -> NDArray[np.float32] | None:
    """(num_bins, frames): the filter banks of the mean of the channels; None if it is shorter than a frame."""
    mono = Sound(sound.samples.mean(axis=0, keepdims=True), sound.sample_rate)
    samples = torch.from_numpy(resample(mono, FBANK.sample_rate).samples[0])
    blocks = [
        FBANK(samples[first * FBANK.shift_length :][: (_BLOCK_FRAMES - 1) * FBANK.shift_length + FBANK.frame_length])
        for first in range(0, FBANK.num_frames(len(samples)), _BLOCK_FRAMES)
    ]
    return torch.cat(blocks).numpy().T if blocks else None


def notes(samples: Samples) -> tuple[str, ...]:
    """("silent",), ("clipped",) or neither."""
    if max(float(np.ptp(channel)) for channel in samples) <= 2 * _SILENT:
        return ("silent",)
    return ("clipped",) if share_at_full_scale(samples) >= _CLIPPED else ()


def share_at_full_scale(samples: Samples) -> float:
    """Of all samples, those that cannot be told from the loudest, or go beyond 1; 0 if none is near 1."""
    loudness = np.abs(samples)
    peak = float(loudness.max())
    return float((loudness >= 0.9999 * min(peak, 1.0)).mean()) if peak >= _FULL else 0.0


def likeness(bins: NDArray[np.float32] | None) -> torch.Tensor:
    """(1, 16, 16) uint8: how each band changes over time, in twelve columns, and its mean, in four; whatever the gain.

    Spectra alone would call all noise alike.
    """
    if bins is None:
        return torch.zeros(1, 16, 16, dtype=torch.uint8)
    loudness = torch.from_numpy(np.exp((bins - bins.max()) / 3))  # faint bands, which codecs make up, hardly count
    bands = torch.nn.functional.adaptive_avg_pool2d(loudness[None], (16, 12))[0]  # (16, 12)
    means = bands.mean(dim=1, keepdim=True)
    parts = [bands - means, (means - means.mean()).expand(16, 4)]
    spread = [part / part.std().clamp(min=_STEADY * means.max()) for part in parts]
    return (torch.cat(spread, dim=1) * 48 + 128).round().clamp(0, 255).to(torch.uint8)[None]


def spectrogram(bins: NDArray[np.float32] | None) -> torch.Tensor:
    """A picture of filter banks (1, num_bins, up to 256) uint8: low tones below, 80 dB from black to white."""
    if bins is None:
        return torch.zeros(1, FBANK.num_bins, 1, dtype=torch.uint8)
    num_columns = min(_PICTURE_COLUMNS, bins.shape[1])
    starts = np.linspace(0, bins.shape[1], num_columns, endpoint=False).astype(int)
    bins = np.maximum.reduceat(bins, starts, axis=1)
    picture = (bins[::-1] - bins.max()) * (10 / np.log(10)) / _DECIBELS + 1  # of energies
    return torch.from_numpy((picture.clip(0, 1) * 255).astype(np.uint8))[None]


def _clean(data: bytes, info: AudioInfo, sound: Sound) -> tuple[bytes, str]:
    clean = clean_sound(data, info.kind)
    if clean is not None and _decodes_to(sound, clean):
        return clean, info.kind
    return encode_flac(sound, info.bits)


def _decodes_to(sound: Sound, data: bytes) -> bool:
    try:
        found = decode_audio(data)
    except ValueError:
        return False
    return found.sample_rate == sound.sample_rate and np.array_equal(found.samples, sound.samples)
