"""Spectrograms as Modality; `spectrogram` configures it."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_platform.modalities import GroupSpec
from ssl_platform.modalities import _sound_augmentations as augmentations
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._sound_augmentations import Shares, Size
from ssl_platform.modalities._sounds import (
    FbankNormalization,
    Recording,
    Short,
    center_chunk,
    decode_recording,
    first_chunk,
    picture,
    random_chunk,
    samples_of,
)
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.views import SampleViews


class Bands(NamedTuple):
    """What is hidden along one axis."""

    num: int
    max_share: float


class ViewRecipe(NamedTuple):
    """What may happen to one view, with its probabilities."""

    roll: float
    gain: float
    mixup: float
    resized_crop: float
    bands: float


class GroupRecipe(NamedTuple):
    """How the views of one group are made."""

    num_frames: int
    views: tuple[ViewRecipe, ...]


class Strengths(NamedTuple):
    """How much of it, where it happens."""

    gain_db: Shares
    mixup: float
    time: Shares
    """Shares of the frames that a resized crop shows."""
    mel: Shares
    time_bands: Bands
    mel_bands: Bands


class Corruption(NamedTuple):
    """A group that shows the views of `of`, corrupted."""

    of: str
    covered: Shares
    replace: float
    replaced: float
    max_block: float
    unit: Size


class Spectrogram:
    """Spectrograms as Modality; examples are recordings, views (1, frames, bins) float32, tokens lie in (time, mel)."""

    def __init__(
        self,
        *,
        fbank: Fbank,
        normalization: FbankNormalization,
        patch_size: Size,
        recipes: dict[str, GroupRecipe],
        strengths: Strengths,
        corruptions: dict[str, Corruption],
        short: Short,
        evaluation_frames: int,
        evaluation_chunk: str,
    ) -> None:
        self.fbank, self.exact_fbank = fbank, replace(fbank, dither=0.0)
        self.normalization, self.patch_size = normalization, patch_size
        self.recipes, self.strengths, self.corruptions = recipes, strengths, corruptions
        self.short: Short = short
        self.evaluation_frames, self.evaluation_chunk = evaluation_frames, evaluation_chunk
        self.groups: dict[str, GroupSpec] = {}
        self.sources: dict[str, Tensor] = {}
        first = 0
        for name, recipe in recipes.items():
            num_views, size = len(recipe.views), (recipe.num_frames, fbank.num_bins)
            grid = (size[0] // patch_size[0], size[1] // patch_size[1])
            self.groups[name] = GroupSpec(num_views, (1, *size), grid)
            self.sources[name] = torch.arange(first, first + num_views)
            first += num_views
        for name, corruption in corruptions.items():
            self.groups[name] = self.groups[corruption.of]._replace(shows=corruption.of)
            self.sources[name] = self.sources[corruption.of]

    def decode(self, record: dict[str, bytes]) -> Recording:
        """The record's sound, the first of `_audio.EXTENSIONS` it has."""
        return decode_recording(record)

    # -- training ------------------------------------------------------------------------------------------------------

    def augment(self, examples: tuple[Recording, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        """Each group's crops in time of examples[0]; further examples are mixed in, or give blocks to corrupted views.

        A corrupted group has `extra["corrupted"]`, (V, frames, bins) bool: True where its views are not what they show.
        """
        made = {
            name: SampleViews(self._views(recipe, examples, rng)[:, None], self.sources[name])
            for name, recipe in self.recipes.items()
        }
        for name, corruption in self.corruptions.items():
            clean = made[corruption.of].views[:, 0]  # (V, frames, bins)
            pairs = [self._corrupted(view, corruption, examples, rng) for view in clean]
            views, corrupted = (torch.stack(each) for each in zip(*pairs, strict=True))
            made[name] = SampleViews(views[:, None], self.sources[name], {"corrupted": corrupted})
        return made

    def _views(self, recipe: GroupRecipe, examples: tuple[Recording, ...], rng: np.random.Generator) -> Tensor:
        """(V, frames, bins); the filter banks of all of them, and of what is mixed in, are made at once."""
        waves = [self._wave(view, examples[0], recipe.num_frames, rng) for view in recipe.views]
        mixed = [number for number, view in enumerate(recipe.views) if rng.random() < view.mixup]
        others = [self._other(examples, recipe.num_frames, rng) for _ in mixed]
        bins = self.fbank(torch.stack(waves + others))  # (V + others, frames, bins)
        views = bins[: len(waves)]
        for number, other in zip(mixed, bins[len(waves) :], strict=True):
            share = rng.uniform(0, self.strengths.mixup)
            if self.fbank.log:
                views[number] = augmentations.log_mix_exp(views[number], other, share)
            else:
                views[number] = (1 - share) * views[number] + share * other
        views = self.normalization(views)
        return torch.stack([self._changed(view, bins, rng) for view, bins in zip(recipe.views, views, strict=True)])

    def _wave(self, view: ViewRecipe, recording: Recording, num_frames: int, rng: np.random.Generator) -> Tensor:
        chunk = augmentations.random_rolled_chunk if rng.random() < view.roll else random_chunk
        wave = chunk(recording, samples_of(num_frames, self.fbank), self.fbank.sample_rate, rng, self.short)
        return augmentations.random_gain(wave, self.strengths.gain_db, rng) if rng.random() < view.gain else wave

    def _other(self, examples: tuple[Recording, ...], num_frames: int, rng: np.random.Generator) -> Tensor:
        """A chunk of one of the sample's companions."""
        if len(examples) < 2:
            raise ValueError("mixup and replaced blocks need another sample; set data.companions: {name: random}")
        other = examples[1 + int(rng.integers(len(examples) - 1))]
        return random_chunk(other, samples_of(num_frames, self.fbank), self.fbank.sample_rate, rng, self.short)

    def _changed(self, view: ViewRecipe, bins: Tensor, rng: np.random.Generator) -> Tensor:
        """What happens to normalised filter banks (frames, bins)."""
        strengths = self.strengths
        if rng.random() < view.resized_crop:
            bins = augmentations.random_resized_crop(bins, strengths.time, strengths.mel, rng)
        if rng.random() < view.bands:
            bins = augmentations.random_bands(bins, 0, *strengths.time_bands, rng)
            bins = augmentations.random_bands(bins, 1, *strengths.mel_bands, rng)
        return bins

    def _corrupted(
        self, clean: Tensor, corruption: Corruption, examples: tuple[Recording, ...], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """(frames, bins) with blocks of another sample or of 0, the mean; and where they are."""
        size = (clean.shape[0], clean.shape[1])
        if rng.random() < corruption.replace:
            share = corruption.replaced
            other = self.normalization(self.fbank(self._other(examples, size[0], rng)))
        else:
            share, other = rng.uniform(*corruption.covered), torch.zeros_like(clean)
        blocks = augmentations.random_blocks(size, share, corruption.max_block, corruption.unit, rng)
        where = torch.from_numpy(blocks)
        return torch.where(where, other, clean), where

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def preprocess(self, example: Recording) -> Tensor:
        """The chunk of `evaluation_frames` in the middle, or at the beginning, normalised: (1, frames, bins)."""
        chunk = center_chunk if self.evaluation_chunk == "center" else first_chunk
        num_samples = samples_of(self.evaluation_frames, self.fbank)
        wave = chunk(example, num_samples, self.fbank.sample_rate, self.short)
        return self.normalization(self.exact_fbank(wave))[None]

    def picture(self, view: Tensor) -> NDArray[np.uint8]:
        """(frames, bins, 3): time runs downwards, low tones are on the left, as tokens lie."""
        return picture(view, self.normalization.std_factor)

    def patch_embed(self, embed_dim: int, group: str = "global") -> GridPatchEmbed:
        """Patches of `patch_size`, with the position grid of the group."""
        return GridPatchEmbed(1, embed_dim, self.patch_size, self.groups[group].grid)

    def description(self) -> dict[str, Any]:
        """The facts of `preprocess`; `mean` and `std`, of which views are (value - mean) / std, where all bands share them.

        The mean of the channels is resampled by soxr (HQ) to `fbank.sample_rate`.
        """
        normalization = self.normalization.description()
        shared: dict[str, Any] = {}
        if not isinstance(normalization["mean"], list) and not normalization["subtract_time_mean"]:
            factor = normalization["std_factor"] * normalization["std"]
            shared = {"mean": [normalization["mean"]], "std": [factor]}
        return {
            "values": "fbank",
            "input_size": [1, self.evaluation_frames, self.fbank.num_bins],
            **shared,
            "channels": "mean",
            "sample_rate": self.fbank.sample_rate,
            "num_frames": self.evaluation_frames,
            "num_samples": samples_of(self.evaluation_frames, self.fbank),
            "chunk": self.evaluation_chunk,
            "short": self.short,
            "fbank": self.exact_fbank.describe(),
            "normalization": normalization,
        }
