"""Filter banks as a configuration has them, and their normalisation: (x - mean) / (std_factor std)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_platform.config import Config as Section
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._options import raise_if_any

AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974
"""Of log filter banks of AudioSet (AST). They stand in where groups of views are asked for and nothing was measured."""


class FbankConfig(Section):
    """Kaldi's filter banks; every setting of `modalities/_fbank.py` but the sample rate."""

    num_bins: int = Field(128, ge=1)
    """Bands of the mel scale."""
    low_hz: float = 20.0
    """Where the first band begins."""
    high_hz: float = 0.0
    """Where the last one ends; 0 or below: so much from half the sample rate."""
    frame_ms: float = 25.0
    """Length of a frame."""
    shift_ms: float = 10.0
    """From frame to frame."""
    window: Literal["povey", "hanning", "hamming", "blackman", "rectangular"] = "povey"
    """povey is a Hann window to the power of .85; AST and its descendants use hanning."""
    preemphasis: float = Field(0.97, ge=0, le=1)
    """x[t] - preemphasis x[t - 1], within each frame."""
    remove_mean: bool = True
    """Of each frame."""
    dither: float = Field(0.0, ge=0)
    """Standard deviation of noise that is added to the samples, in training only."""
    snip_edges: bool = True
    """Only frames that are wholly inside; else one frame for every shift."""
    power: bool = True
    """Squared magnitudes; else magnitudes."""
    log: bool = True
    """Natural logarithm."""
    energy_floor: float = Field(Fbank.energy_floor, gt=0)
    """A band's smallest energy, before the logarithm."""
    scale: float = Field(1.0, gt=0)
    """Samples in [-1, 1] are multiplied by it; Kaldi's own recipes read 16 bit integers, which is 32768."""

    def build(self, sample_rate: int) -> Fbank:
        """Raises ValueError for settings that have no meaning at this rate."""
        return Fbank(sample_rate=sample_rate, **self.model_dump())

    def problems(self, sample_rate: int) -> list[str]:
        """What is wrong with the settings at this rate, one line each, which begins with a key."""
        try:
            self.build(sample_rate)
        except ValueError as error:
            return [str(error)]
        return []


class NormalizationConfig(Section):
    """(x - mean) / (std_factor std) of the filter banks."""

    mean: float | None = None
    """Of all frames and bands. null: of the training shards, which ssl-pack measures with the default `fbank` at 16 kHz."""
    std: float | None = None
    std_factor: float = Field(1.0, gt=0)
    """What the standard deviation is multiplied by; AST and its descendants divide by twice the standard deviation."""
    per_bin: bool = False
    """Each band by its own mean and std of the shards."""
    subtract_time_mean: bool = False
    """Cepstral mean normalisation: each band's mean over the frames of the view is taken away first, and `mean` not used."""

    @model_validator(mode="after")
    def _check(self) -> "NormalizationConfig":
        lines = []
        if (self.mean is None) != (self.std is None):
            lines.append("mean, std: give both or neither")
        if self.std is not None and self.std <= 0:
            lines.append(f"std: {self.std:g} must be above 0")
        if self.per_bin and self.mean is not None:
            lines.append("per_bin: takes the mean and std of each band from the shards; leave mean and std out")
        raise_if_any(lines)
        return self

    @property
    def needs_statistics(self) -> str:
        """The key that data without statistics must not have null."""
        return "normalization.mean" if self.mean is None else ""

    def build(self, statistics: Mapping[str, Any] | None, fbank: Fbank) -> "FbankNormalization":
        """`statistics` are {"mean": [...], "std": [...], "of": settings} of each band, of which AudioSet's stand in if None.

        Raises ValueError if they are of something else than `fbank`.
        """
        mean: Tensor | float | None = self.mean
        std: Tensor | float | None = self.std
        if mean is None or std is None:
            if statistics is None:
                mean, std = AUDIOSET_MEAN, AUDIOSET_STD
            else:
                mean, std = self._measured(statistics, fbank)
        return FbankNormalization(torch.as_tensor(mean), torch.as_tensor(std), self.std_factor, self.subtract_time_mean)

    def _measured(self, statistics: Mapping[str, Any], fbank: Fbank) -> tuple[Tensor, Tensor]:
        check_statistics(statistics, fbank)
        mean, std = (torch.tensor(statistics[key], dtype=torch.float64) for key in ("mean", "std"))  # (bins,)
        if self.per_bin:
            return mean.float(), std.float()
        variance = std.square().mean() + mean.var(correction=0)
        return mean.mean().float(), variance.sqrt().float()


def check_statistics(statistics: Mapping[str, Any], fbank: Fbank) -> None:
    """Raises ValueError, with each setting that differs, if the shards' statistics are not of these filter banks."""
    of = dict(statistics.get("of") or {})
    if of.pop("values", "pixels") != "fbank":
        raise ValueError(
            "the shards' statistics are not of sound: pack sound files, or set normalization.mean and .std"
        )
    ours = {key: value for key, value in fbank.describe().items() if key != "dither"}
    different = [
        f"{'' if key == 'sample_rate' else 'fbank.'}{key} {of.get(key)!r} there, {value!r} here"
        for key, value in ours.items()
        if of.get(key) != value
    ]
    if different:
        raise ValueError(
            f"normalization.mean: the shards' statistics are of other filter banks ({'; '.join(different)}); take their "
            "settings, or set normalization.mean and normalization.std to what measure_normalization of "
            "ssl_platform.modalities._sounds finds in some of the recordings"
        )


class FbankNormalization:
    """The last step of preprocessing: (..., frames, bins) -> the same, in units of `std_factor` standard deviations."""

    smallest_std = 1e-3
    """A band that never changes is centred and nothing more than that is made of it."""

    def __init__(self, mean: Tensor, std: Tensor, std_factor: float = 1.0, subtract_time_mean: bool = False) -> None:
        """`mean` and `std` are of all bands, (), or of each, (bins,)."""
        self.mean, self.std = mean.float(), std.float().clamp(min=self.smallest_std)
        self.std_factor, self.subtract_time_mean = std_factor, subtract_time_mean

    def __call__(self, bins: Tensor) -> Tensor:
        centered = bins - (bins.mean(dim=-2, keepdim=True) if self.subtract_time_mean else self.mean)
        return centered.div_(self.std_factor * self.std)

    def description(self) -> dict[str, Any]:
        """Its settings as JSON; `mean` and `std` are numbers, or lists with a number for each band."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "std_factor": self.std_factor,
            "subtract_time_mean": self.subtract_time_mean,
        }
