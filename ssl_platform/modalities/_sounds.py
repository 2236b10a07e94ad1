"""What the modalities of sound share: recordings that are read piece by piece, filter banks, their normalisation, pictures.

A view is (1, frames, bins): time is its first axis, as in AST and what came after it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_platform.modalities._audio import EXTENSIONS, Sound, SoundFile, resample
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._fbank_normalization import FbankConfig, FbankNormalization, NormalizationConfig

__all__ = ["FbankConfig", "FbankNormalization", "NormalizationConfig", "Recording", "decode_recording", "picture"]

WHOLE_SECONDS = 20.0
"""Recordings up to this length are decoded at once, for all their chunks."""
_MARGIN = 256
"""Samples of the lower rate that are resampled besides a chunk's own at either side; soxr's filter is shorter."""

Short = Literal["repeat", "zeros"]

# -- recordings --------------------------------------------------------------------------------------------------------


class Readable(Protocol):
    """What chunks are cut from: a recording, or a part of one."""

    def num_samples(self, sample_rate: int) -> int:
        """How many there are at this rate, at least 1."""
        ...

    def read(self, start: float, num_samples: int, sample_rate: int) -> Tensor:
        """(num_samples,) float32 from `start` (seconds), zeros after the end."""
        ...


@dataclass
class Recording:
    """A sound in memory, decoded where it is asked for: a chunk of 3 s of an hour costs 3 s.

    `decode_recording` makes it.
    """

    file: SoundFile
    sample_rate: int
    length: int
    """In samples at that rate."""
    _whole: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """{sample rate: (samples,)}, the mean of the channels; empty if it is long."""

    @property
    def duration(self) -> float:
        """In seconds."""
        return self.length / self.sample_rate

    def num_samples(self, sample_rate: int) -> int:
        """How many there are at this rate, at least 1."""
        return max(self.length * sample_rate // self.sample_rate, 1)

    def read(self, start: float, num_samples: int, sample_rate: int) -> Tensor:
        """(num_samples,) float32 from `start` (seconds): the mean of the channels at `sample_rate`, zeros after the end.

        Raises ValueError with the reason if that part cannot be decoded, or holds NaN or infinite samples.
        """
        first = round(start * sample_rate)
        if self._whole:
            if sample_rate not in self._whole:
                native = Sound(self._whole[self.sample_rate][None].numpy(), self.sample_rate)
                self._whole[sample_rate] = _mono(native, sample_rate)
            return _fitted(self._whole[sample_rate][first : first + num_samples], num_samples)
        # Resampling begins at a sample that both rates have, and a filter's length before what is wanted.
        common = math.gcd(self.sample_rate, sample_rate)
        theirs, ours = self.sample_rate // common, sample_rate // common
        margin = _MARGIN * max(1, -(-sample_rate // self.sample_rate)) if theirs != ours else 0
        blocks = max((first - margin) // ours, 0)
        last = -(-(first + num_samples + margin) * theirs // ours)
        sound = self.file.read(blocks * theirs / self.sample_rate, last / self.sample_rate)
        skipped = first - blocks * ours
        return _fitted(_mono(sound, sample_rate)[skipped : skipped + num_samples], num_samples)


def decode_recording(record: Mapping[str, bytes]) -> Recording:
    """The sound of a record, the first of EXTENSIONS it has; raises ValueError with the reason if it is bad.

    Of long ones the header is checked here, and the samples when they are read.
    """
    found = next((extension for extension in EXTENSIONS if extension in record), None)
    if found is None:
        raise ValueError(f"no sound in the record: it has {', '.join(record) or 'nothing'}, not {'/'.join(EXTENSIONS)}")
    file = SoundFile(record[found])
    rate, length = file.info.sample_rate, file.info.num_samples
    if length <= WHOLE_SECONDS * rate:
        sound = file.read()
        length = sound.samples.shape[1]  # headers may be off, or say nothing
        if length <= WHOLE_SECONDS * rate:
            return Recording(file, rate, length, {rate: _mono(sound, rate)})
    return Recording(file, rate, length)


def _mono(sound: Sound, sample_rate: int) -> Tensor:
    """(samples,)"""
    weights = np.full(len(sound.samples), 1 / len(sound.samples), np.float32)
    mono = (weights @ sound.samples)[None]  # ten times as fast as mean(axis=0), as channels lie beside each other
    return torch.from_numpy(np.ascontiguousarray(resample(Sound(mono, sound.sample_rate), sample_rate).samples[0]))


def _fitted(samples: Tensor, num_samples: int) -> Tensor:
    """A copy with zeros behind, as headers may be off by a few samples."""
    fitted = torch.zeros(num_samples)
    fitted[: len(samples)] = samples
    return fitted


# -- chunks ------------------------------------------------------------------------------------------------------------


def random_chunk(
    recording: Readable, num_samples: int, sample_rate: int, rng: np.random.Generator, short: Short
) -> Tensor:
    """(num_samples,) from anywhere; of a shorter recording all of it, repeated from anywhere or anywhere among zeros."""
    total = recording.num_samples(sample_rate)
    if total >= num_samples:
        first = int(rng.integers(total - num_samples + 1))
        return recording.read(first / sample_rate, num_samples, sample_rate)
    whole = recording.read(0.0, total, sample_rate)
    if short == "repeat":
        return _repeated(whole.roll(-int(rng.integers(total))), num_samples)
    chunk, first = torch.zeros(num_samples), int(rng.integers(num_samples - total + 1))
    chunk[first : first + total] = whole
    return chunk


def center_chunk(recording: Readable, num_samples: int, sample_rate: int, short: Short) -> Tensor:
    """(num_samples,) from the middle; of a shorter recording what `first_chunk` gives."""
    first = max(recording.num_samples(sample_rate) - num_samples, 0) // 2
    return first_chunk(recording, num_samples, sample_rate, short, first)


def first_chunk(recording: Readable, num_samples: int, sample_rate: int, short: Short, first: int = 0) -> Tensor:
    """(num_samples,) from the beginning; a shorter recording is repeated, or followed by zeros."""
    total = recording.num_samples(sample_rate)
    chunk = recording.read(first / sample_rate, min(num_samples, total), sample_rate)
    return _repeated(chunk, num_samples) if short == "repeat" else _fitted(chunk, num_samples)


def _repeated(samples: Tensor, num_samples: int) -> Tensor:
    return samples.repeat(-(-num_samples // len(samples)))[:num_samples]


def samples_of(num_frames: int, fbank: Fbank) -> int:
    """How many samples make so many frames, wherever frames lie (`snip_edges`)."""
    if fbank.snip_edges:
        return (num_frames - 1) * fbank.shift_length + fbank.frame_length
    return num_frames * fbank.shift_length


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure_normalization(recordings: Iterable[Recording], fbank: Fbank) -> tuple[float, float]:
    """(mean, std) of all frames and bands of these recordings, for `normalization.mean` and `.std`."""
    count, total, squares = 0, 0.0, 0.0
    for recording in recordings:
        samples = recording.read(0.0, recording.num_samples(fbank.sample_rate), fbank.sample_rate)
        bins = fbank(samples).double()  # (frames, bins)
        count, total, squares = count + bins.numel(), total + float(bins.sum()), squares + float(bins.square().sum())
    if not count:
        raise ValueError("no recording is as long as a frame")
    return total / count, math.sqrt(max(squares / count - (total / count) ** 2, 0.0))


# -- pictures ----------------------------------------------------------------------------------------------------------

_COLORS: Sequence[tuple[int, int, int]] = ((8, 8, 32), (70, 25, 110), (180, 50, 95), (245, 135, 50), (252, 245, 180))
"""From faint to loud, brighter step by step."""
_FAINTEST, _LOUDEST = -2.0, 2.5
"""In standard deviations."""


def picture(view: Tensor, std_factor: float = 1.0) -> NDArray[np.uint8]:
    """A normalised view (1, frames, bins) as (frames, bins, 3): time runs downwards, low tones are on the left.

    So the picture's axes are those of the tokens, and a mask can be drawn over it. All views have one scale of colours.
    """
    loudness = (view[0].float().numpy() * std_factor - _FAINTEST) / (_LOUDEST - _FAINTEST)  # (frames, bins)
    places = np.linspace(0, 1, len(_COLORS))
    channels = [np.interp(loudness, places, [color[channel] for color in _COLORS]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
