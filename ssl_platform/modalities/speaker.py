"""Voices: long and short chunks of one utterance as filter banks, each in noise or a room of its own (DINO of wespeaker).

What stays the same in all views of a sample is who speaks (and the microphone); what is said, noise and room do not.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from ssl_platform.config import Config as Section
from ssl_platform.config import PluginConfig
from ssl_platform.modalities import Filtered, GroupSpec
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._fbank_normalization import FbankConfig, FbankNormalization, NormalizationConfig
from ssl_platform.modalities._noise_and_reverb import (
    Noise,
    NoiseConfig,
    Reverb,
    ReverbConfig,
    peak_normalized,
)
from ssl_platform.modalities._options import Probability, from_list, over_defaults, raise_if_any
from ssl_platform.modalities._sounds import (
    Recording,
    Short,
    center_chunk,
    decode_recording,
    picture,
    random_chunk,
    samples_of,
)
from ssl_platform.modalities._speech import Detector, Trimmed, check_detector, trimmed
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.views import SampleViews

_PICTURE_STD = 3.0
"""About what filter banks in natural logarithms spread after their mean over time is taken away."""

# -- configuration -----------------------------------------------------------------------------------------------------


class ChunksConfig(Section):
    """One group of views: random chunks of the utterance."""

    num: int = Field(ge=0)
    num_frames: int = Field(ge=1)
    """Length of a chunk in frames of `fbank.shift_ms`; 300 are 3 seconds."""
    augment: Probability = 1.0
    """That a chunk gets noise or reverberation."""


class EvaluationConfig(Section):
    """The one view that evaluation shows."""

    num_frames: int | None = Field(None, ge=1)
    """From the middle of the utterance; None: as many as global chunks have."""


class Config(PluginConfig):
    """Chunks of utterances as wespeaker's DINO makes them: 2 of 3 s and 4 of 2 s, each augmented by itself.

    The defaults of `fbank` and `normalization` are Kaldi's for speakers: 80 bins, Hamming window, dither 1 and samples of 16
    bit, of which each bin's mean over the chunk is taken away.
    """

    name: str = "speaker"
    sample_rate: int = Field(16_000, ge=1000)
    """Hz; recordings of other rates are resampled."""
    patch_size: Annotated[tuple[int, int], from_list] = (4, 80)
    """[frames, bins] of a token of `vit`; other backbones see frames."""
    chunks: dict[str, ChunksConfig] = {
        "global": ChunksConfig(num=2, num_frames=300),
        "local": ChunksConfig(num=4, num_frames=200),
    }
    """Groups of views; keys that are left out keep their defaults, and further groups may be added."""
    short: Short = "repeat"
    """What an utterance shorter than a chunk is filled up with: itself, or zeros."""
    noise: NoiseConfig | None = None
    reverb: ReverbConfig | None = None
    """With both, a chunk that is augmented gets one of them, equally likely. With neither, none is augmented."""
    speed: Annotated[tuple[Annotated[float, Field(ge=0.5, le=2)], ...], from_list] = ()
    """Factors such as [0.9, 1.0, 1.1], of which one is drawn for all views of a sample. Off by default: pitch and formants
    move with it, so another voice is made, and what is learned is not that of the recordings alone."""
    vad: Detector | None = None
    """What is not speech before and behind an utterance is left out, as told by `silero` (a small network, the extra
    `vad`) or by `energy` (fainter than 35 dB below the loudest 32 ms). In training a recording without speech is passed
    over; evaluation shows all of it."""
    fbank: FbankConfig = FbankConfig(num_bins=80, window="hamming", dither=1.0, scale=32768.0)
    """Dither is for training only."""
    normalization: NormalizationConfig = NormalizationConfig(mean=0.0, std=1.0, subtract_time_mean=True)
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("chunks", mode="before")
    @classmethod
    def _keep_default_chunks(cls, value: Any) -> Any:
        return over_defaults(cls.model_fields["chunks"].default, value)

    @field_validator("fbank", "normalization", mode="before")
    @classmethod
    def _keep_defaults(cls, value: Any, info: ValidationInfo) -> Any:
        default = cls.model_fields[info.field_name or ""].default
        return {**default.model_dump(), **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> "Config":
        raise_if_any(self.problems())
        return self

    def problems(self) -> list[str]:
        """Settings that cannot work together, one line each."""
        (frames, bins), lines = self.patch_size, [f"fbank: {line}" for line in self.fbank.problems(self.sample_rate)]
        if self.chunks["global"].num < 1:
            lines.append("chunks.global.num: at least 1, the teacher needs a view")
        if min(self.patch_size) < 1:
            return [*lines, f"patch_size: {list(self.patch_size)}: expected [frames, bins] of 1 or more"]
        lengths = {f"chunks.{name}.num_frames": chunks.num_frames for name, chunks in self.chunks.items() if chunks.num}
        if self.evaluation.num_frames is not None:
            lengths["evaluation.num_frames"] = self.evaluation.num_frames
        for key, length in lengths.items():
            lines += _indivisible(key, length, "patch_size[0]", frames)
        lines += _indivisible("fbank.num_bins", self.fbank.num_bins, "patch_size[1]", bins)
        return lines

    @property
    def needs_statistics(self) -> str:
        """The key that data without statistics must not have null."""
        return self.normalization.needs_statistics

    def for_export(self) -> "Config":
        """Without what only training reads: exports hold no paths."""
        return self.model_copy(update={"noise": None, "reverb": None})

    def build(self, statistics: Mapping[str, Any] | None = None) -> "Speaker":
        """`statistics` are of filter banks, which only a `normalization` without mean and std needs."""
        fbank = self.fbank.build(self.sample_rate)
        return Speaker(self, fbank, self.normalization.build(statistics, fbank))


def _indivisible(key: str, length: int, divisor_key: str, divisor: int) -> list[str]:
    if length % divisor == 0:
        return []
    near = " or ".join(str(n) for n in (length // divisor * divisor, (length // divisor + 1) * divisor) if n)
    return [f"{key}: {length} is not a multiple of {divisor_key} {divisor}; use {near}, or another patch_size"]


# -- modality ----------------------------------------------------------------------------------------------------------


class Speaker:
    """Utterances as Modality; examples are recordings, views (1, frames, bins)."""

    def __init__(self, config: Config, fbank: Fbank, normalization: FbankNormalization) -> None:
        self.config, self.sample_rate, self.patch_size = config, config.sample_rate, config.patch_size
        self.chunks = {name: chunks for name, chunks in config.chunks.items() if chunks.num}
        self.fbank, self.exact_fbank = fbank, replace(fbank, dither=0.0)
        self.normalization = normalization
        self.num_frames = config.evaluation.num_frames or self.chunks["global"].num_frames
        self.groups: dict[str, GroupSpec] = {}
        self.sources: dict[str, Tensor] = {}
        first = 0
        for name, chunks in self.chunks.items():
            shape = (1, chunks.num_frames, fbank.num_bins)
            grid = (chunks.num_frames // self.patch_size[0], fbank.num_bins // self.patch_size[1])
            self.groups[name] = GroupSpec(chunks.num, shape, grid)
            self.sources[name] = torch.arange(first, first + chunks.num)
            first += chunks.num
        self._augmentations: list[Noise | Reverb] | None = None

    def prepare(self) -> None:
        """Lists the folders of noise and responses; raises ValueError if one, or a package, cannot be used."""
        opened = [one.open(self.sample_rate) for one in (self.config.noise, self.config.reverb) if one is not None]
        self._augmentations = opened
        if self.config.vad is not None:
            check_detector(self.config.vad)

    def decode(self, record: dict[str, bytes]) -> Recording:
        """The record's sound, whose header is checked and which is decoded where it is needed."""
        return decode_recording(record)

    def augment(self, examples: tuple[Recording, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        """Each group's chunks: views (V, 1, frames, bins) float32, every chunk a source of its own.

        Companions take turns: with two examples every other chunk is of the second (other utterances of a cluster, say).
        Raises Filtered if `vad` finds no speech, ValueError if all chunks are silent.
        """
        speed = float(rng.choice(self.config.speed)) if self.config.speed else 1.0
        rate = round(self.sample_rate / speed)  # samples read at this rate and played at another one
        utterances = [self._speech(example) for example in examples]
        views, number, is_silent = {}, 0, True
        for name, chunks in self.chunks.items():
            length, made = samples_of(chunks.num_frames, self.fbank), []
            for _ in range(chunks.num):
                utterance = utterances[number % len(utterances)]
                chunk = random_chunk(utterance, length, rate, rng, self.config.short)
                is_silent = is_silent and not bool(chunk.any())
                made.append(self._augmented(chunk, rng) if rng.random() < chunks.augment else chunk)
                number += 1
            views[name] = SampleViews(self._bins(torch.stack(made), self.fbank), self.sources[name])
        if is_silent:
            raise ValueError("silent: every sample of its chunks is 0")
        return views

    def preprocess(self, example: Recording) -> Tensor:
        """(1, frames, bins): the middle of the utterance, of a shorter one what `short` says."""
        utterance = example if self.config.vad is None else trimmed(example, self.config.vad) or example
        length = samples_of(self.num_frames, self.fbank)
        chunk = center_chunk(utterance, length, self.sample_rate, self.config.short)
        return self._bins(chunk, self.exact_fbank)

    def picture(self, view: Tensor) -> NDArray[np.uint8]:
        """A view as (frames, bins, 3): time runs downwards, low tones are on the left."""
        return picture(view, 1 / _PICTURE_STD if self.config.normalization.std == 1 else 1.0)

    def patch_embed(self, embed_dim: int, group: str = "global") -> GridPatchEmbed:
        """Patches of `patch_size`, with the position grid of the group."""
        return GridPatchEmbed(1, embed_dim, self.patch_size, self.groups[group].grid)

    def description(self) -> dict[str, Any]:
        """The facts of `preprocess`. The mean of the channels is resampled by soxr (HQ) to `sample_rate`."""
        return {
            "values": "fbank",
            "input_size": [1, self.num_frames, self.fbank.num_bins],
            "channels": "mean",
            "sample_rate": self.sample_rate,
            "num_frames": self.num_frames,
            "num_samples": samples_of(self.num_frames, self.fbank),
            "vad": self.config.vad,
            "chunk": "center",
            "short": self.config.short,
            "fbank": self.exact_fbank.describe(),
            "normalization": self.normalization.description(),
        }

    def _speech(self, recording: Recording) -> Recording | Trimmed:
        if self.config.vad is None:
            return recording
        speech = trimmed(recording, self.config.vad)
        if speech is None:
            raise Filtered(f"no speech found (vad: {self.config.vad})")
        return speech

    def _augmented(self, chunk: Tensor, rng: np.random.Generator) -> Tensor:
        if self._augmentations is None:
            self.prepare()
        assert self._augmentations is not None
        if not self._augmentations:
            return chunk
        return peak_normalized(self._augmentations[int(rng.integers(len(self._augmentations)))](chunk, rng))

    def _bins(self, samples: Tensor, fbank: Fbank) -> Tensor:
        """(..., samples) -> (..., 1, frames, bins)"""
        return self.normalization(fbank(samples)).unsqueeze(-3)
