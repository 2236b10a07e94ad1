"""Log-mel filter banks as Kaldi computes them, of every setting that the published audio models differ in."""

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_EPSILON = 1.1920928955078125e-07


@dataclass(frozen=True)
class Fbank:
    """Kaldi's fbank; the defaults are Kaldi's, but for dither, the number of bins, and samples in [-1, 1].

    `Fbank()(samples)`: (..., samples) float at `sample_rate` -> (..., frames, num_bins) float32. Held against
    kaldi-native-fbank in tests/test_audio_reading.py. Raises ValueError for settings that have no meaning.
    """

    sample_rate: int = 16_000
    """Hz."""
    num_bins: int = 128
    """Triangles of the mel scale; overlapping, of equal width in mel. With many, the lowest may lie between two lines of
    the spectrum and hold nothing but the floor (1 of 128 at 16 kHz), which Kaldi itself refuses."""
    low_hz: float = 20.0
    """Where the first triangle begins."""
    high_hz: float = 0.0
    """Where the last one ends; 0 or below: so much from half the sample rate."""
    frame_ms: float = 25.0
    """Length of a frame."""
    shift_ms: float = 10.0
    """From frame to frame."""
    window: str = "povey"
    """povey (a Hann window to the power of .85), hanning, hamming, blackman or rectangular."""
    preemphasis: float = 0.97
    """x[t] - preemphasis x[t - 1], within each frame."""
    remove_mean: bool = True
    """Of each frame, before anything else."""
    dither: float = 0.0
    """Standard deviation of noise that is added to the samples."""
    snip_edges: bool = True
    """Only frames that are wholly inside; else one frame for every shift, the sound reflected at its ends."""
    power: bool = True
    """Squared magnitudes; else magnitudes."""
    log: bool = True
    """Natural logarithm."""
    energy_floor: float = _EPSILON
    """A bin's smallest energy, before the logarithm."""
    scale: float = 1.0
    """Samples are multiplied by it; Kaldi's own recipes read 16 bit integers, which is 32768."""

    def __post_init__(self) -> None:
        half = self.sample_rate / 2
        if self.window not in _WINDOWS:
            raise ValueError(f"fbank: window '{self.window}': expected one of {', '.join(_WINDOWS)}")
        if not 0 <= self.low_hz < self.last_hz <= half:
            raise ValueError(f"fbank: bins from {self.low_hz} to {self.last_hz} Hz: expected 0 <= low < high <= {half}")
        if self.num_bins < 1 or self.frame_length < 2 or self.shift_length < 1 or self.energy_floor <= 0:
            raise ValueError(f"fbank: {asdict(self)}: expected bins, frames of 2 samples or more, and a floor above 0")

    @property
    def last_hz(self) -> float:
        return self.high_hz if self.high_hz > 0 else self.sample_rate / 2 + self.high_hz

    @property
    def frame_length(self) -> int:
        """In samples."""
        return int(self.sample_rate * 0.001 * self.frame_ms)

    @property
    def shift_length(self) -> int:
        """In samples."""
        return int(self.sample_rate * 0.001 * self.shift_ms)

    def num_frames(self, num_samples: int) -> int:
        if not self.snip_edges:
            return (num_samples + self.shift_length // 2) // self.shift_length
        return max(0, 1 + (num_samples - self.frame_length) // self.shift_length)

    def describe(self) -> dict[str, Any]:
        """Every setting by name, to be kept beside statistics."""
        return asdict(self)

    def __call__(self, samples: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(..., samples) -> (..., frames, num_bins); the generator is for dither."""
        if self.num_frames(samples.shape[-1]) == 0:
            return samples.new_zeros((*samples.shape[:-1], 0, self.num_bins), dtype=torch.float32)
        padded = 1 << (self.frame_length - 1).bit_length()
        cut = self._frames(samples.float() * self.scale)  # (..., frames, frame_length)
        whole = cut.new_zeros((*cut.shape[:-1], padded))  # zeros behind each frame, and what follows is done in place
        frames = whole[..., : self.frame_length]
        if self.dither > 0:
            noise = torch.randn(cut.shape, generator=generator, device=generator.device if generator else None)
            torch.add(cut, noise.to(cut.device), alpha=self.dither, out=frames)
        else:
            frames.copy_(cut)
        if self.remove_mean:
            frames -= frames.mean(dim=-1, keepdim=True)
        if self.preemphasis > 0:
            before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
            frames -= before.mul_(self.preemphasis)
        frames *= _window(self.window, self.frame_length).to(frames.device)
        lines = torch.fft.rfft(whole)  # (..., frames, padded / 2 + 1)
        spectrum = lines.real.square() + lines.imag.square()
        if not self.power:
            spectrum = spectrum.sqrt()
        energies: Tensor = spectrum @ _triangles(self.sample_rate, padded, self.num_bins, self.low_hz, self.last_hz).to(
            frames.device
        )
        return energies.clamp(min=self.energy_floor).log() if self.log else energies

    def _frames(self, samples: Tensor) -> Tensor:
        num_samples = samples.shape[-1]
        if self.snip_edges:
            return samples.unfold(-1, self.frame_length, self.shift_length)
        first = self.shift_length // 2 - self.frame_length // 2
        starts = first + self.shift_length * torch.arange(
            self.num_frames(num_samples), device=samples.device
        )  # (frames,)
        places = starts[:, None] + torch.arange(self.frame_length, device=samples.device)
        places = places % (2 * num_samples)  # reflected at both ends, the end samples twice
        places = torch.where(places < num_samples, places, 2 * num_samples - 1 - places)
        return samples[..., places]


_WINDOWS = ("povey", "hanning", "hamming", "blackman", "rectangular")


@cache
def _window(name: str, length: int) -> Tensor:
    """(length,): symmetric windows, as Kaldi's."""
    turn = 2 * math.pi * torch.arange(length, dtype=torch.float64) / (length - 1)
    match name:
        case "povey":
            window = (0.5 - 0.5 * turn.cos()) ** 0.85
        case "hanning":
            window = 0.5 - 0.5 * turn.cos()
        case "hamming":
            window = 0.54 - 0.46 * turn.cos()
        case "blackman":
            window = 0.42 - 0.5 * turn.cos() + 0.08 * (2 * turn).cos()
        case _:
            window = torch.ones(length, dtype=torch.float64)
    return window.float()


@cache
def _triangles(sample_rate: int, padded: int, num_bins: int, low_hz: float, high_hz: float) -> Tensor:
    """(padded / 2 + 1, num_bins): triangles in mel, 1127 ln(1 + Hz / 700); nothing of half the sample rate itself."""

    def mel(hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hz / 700.0)

    low, high = mel(torch.tensor([low_hz, high_hz], dtype=torch.float64))
    width = (high - low) / (num_bins + 1)
    left = low + width * torch.arange(num_bins, dtype=torch.float64)  # (num_bins,)
    places = mel(torch.arange(padded // 2 + 1, dtype=torch.float64) * sample_rate / padded)[:, None]
    weights = torch.minimum((places - left) / width, (left + 2 * width - places) / width).clamp(min=0)
    weights[-1] = 0
    return weights.float()
