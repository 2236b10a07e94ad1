"""Sound as spectrograms: log-mel filter banks of random crops in time, as in AST, ASiT, ATST and EAT."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ssl_platform.config import Config as Section
from ssl_platform.config import PluginConfig
from ssl_platform.modalities._options import (
    Interval,
    PerView,
    Probability,
    SizeOption,
    check_interval,
    over_defaults,
    pair,
    raise_if_any,
)
from ssl_platform.modalities._sounds import FbankConfig, NormalizationConfig, Short
from ssl_platform.modalities._spectrogram_modality import (
    Bands,
    Corruption,
    GroupRecipe,
    Spectrogram,
    Strengths,
    ViewRecipe,
)

__all__ = ["Config", "Spectrogram"]

Share = Annotated[float, Field(gt=0, le=1)]


class CropsConfig(Section):
    """One group of crops in time."""

    num: int = Field(ge=0)
    """Views of this group; 0 leaves it out."""
    num_frames: int = Field(ge=1)
    """Length; a multiple of the patch size. At the default shift of 10 ms, 592 are 5.9 s."""


class BandsConfig(Section):
    """Bands of a spectrogram that are hidden along one axis."""

    num: int = Field(1, ge=0)
    max_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Each is U(0, max_share) of the axis wide."""


class ResizedCropConfig(Section):
    """Which part of a view is resized to the whole; shares above 1 reach beyond it, where the mean is."""

    time: Interval = (0.6, 1.5)
    """Share of its frames: uniform in [min, max]."""
    mel: Interval = (0.6, 1.5)
    """Share of its bands."""


class CorruptionConfig(Section):
    """A group that shows the views of another one, corrupted: a student of it has a teacher that sees them clean."""

    of: str = "global"
    """That group of crops."""
    covered: Interval = (0.5, 0.7)
    """Blocks are set to the mean until U(covered) of a view is covered, ..."""
    replace: Probability = 0.5
    """... or, with this probability, ..."""
    replaced: Share = 0.3
    """... blocks of this share are those of another sample (`data.companions`)."""
    max_block: Share = 0.3
    """Of each side, that a block has at most."""
    align: bool = False
    """Whether blocks are whole patches."""


class Config(PluginConfig):
    """Crops in time of sound, as log-mel spectrograms; a group of probabilities has one for each view.

    References: ASiT (arXiv 2211.13189) for corrupted views, ATST (arXiv 2204.12076) for mixup and resized crops.
    """

    name: str = "spectrogram"
    sample_rate: int = Field(16_000, ge=1000)
    """Hz, to which sound is resampled; the mean of its channels is taken."""
    fbank: FbankConfig = FbankConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    patch_size: SizeOption = 16
    """One number, or [frames, bands], such as [16, 128]: then all bands of a time are one token."""
    crops: dict[str, CropsConfig] = {
        "global": CropsConfig(num=2, num_frames=592),
        "local": CropsConfig(num=4, num_frames=192),
    }
    """Groups of views; keys that are left out keep their defaults, and further groups may be added."""
    corrupted: dict[str, CorruptionConfig] = {}
    """Further groups, such as {corrupted: {of: global}}."""
    short: Short = "repeat"
    """What fills a crop of a recording that is shorter: its repetition, or zeros."""
    roll: dict[str, PerView] = {"global": (0.5,), "local": (0.5,)}
    """That a crop may reach beyond the end of the recording, where it goes on at the beginning."""
    gain: dict[str, PerView] = {"global": (0.0,), "local": (0.0,)}
    """That a view is made louder or softer by U(gain_db)."""
    gain_db: Interval = (-6.0, 6.0)
    mixup: dict[str, PerView] = {"global": (0.0,), "local": (0.0,)}
    """That another sample (`data.companions`) is mixed in, with U(0, mixup_share) of the energy."""
    mixup_share: Share = 0.4
    resized_crop: dict[str, PerView] = {"global": (0.0,), "local": (0.0,)}
    """That a part of the spectrogram is resized to the whole."""
    resized_crop_shares: ResizedCropConfig = ResizedCropConfig()
    bands: dict[str, PerView] = {"global": (0.0,), "local": (0.0,)}
    """That bands of the spectrogram are set to the mean (SpecAugment)."""
    time_bands: BandsConfig = BandsConfig()
    mel_bands: BandsConfig = BandsConfig()
    evaluation_frames: int | None = Field(None, ge=1)
    """Of the view that evaluation shows; None: the length of the global crops. Positions are interpolated in time."""
    evaluation_chunk: Literal["center", "beginning"] = "center"

    @field_validator("crops", "roll", "gain", "mixup", "resized_crop", "bands", mode="before")
    @classmethod
    def _keep_defaults(cls, value: Any, info: ValidationInfo) -> Any:
        return over_defaults(cls.model_fields[info.field_name or ""].default, value)

    @model_validator(mode="after")
    def _check(self) -> "Config":
        raise_if_any(self.problems())
        return self

    @property
    def needs_statistics(self) -> str:
        """The key that data without statistics must not have; without them `build` gives the shapes of views only."""
        return self.normalization.needs_statistics

    @property
    def needs_companions(self) -> str:
        """The key for which samples need others beside them."""
        made = [name for name, crops in self.crops.items() if crops.num]
        if any(max(self.mixup.get(name, (0.0,))) > 0 for name in made):
            return "mixup"
        return next((f"corrupted.{name}.replace" for name, one in self.corrupted.items() if one.replace > 0), "")

    def problems(self) -> list[str]:
        """Settings that cannot work together, one line each."""
        lines = self.fbank.problems(self.sample_rate) + self._patch_problems() + self._group_problems()
        low, high = self.gain_db
        if low > high:
            lines.append(f"gain_db: [{low:g}, {high:g}] must be [min, max]")
        for key in ("time", "mel"):
            lines += check_interval(f"resized_crop_shares.{key}", getattr(self.resized_crop_shares, key), 4)
        return lines

    def _patch_problems(self) -> list[str]:
        patch, lines = pair(self.patch_size), []
        lengths = {f"crops.{name}.num_frames": one.num_frames for name, one in self.crops.items() if one.num}
        if self.evaluation_frames is not None:
            lengths["evaluation_frames"] = self.evaluation_frames
        steps = dict.fromkeys(lengths, patch[0])
        lengths["fbank.num_bins"], steps["fbank.num_bins"] = self.fbank.num_bins, patch[1]
        for key, length in lengths.items():
            if length % (step := steps[key]):
                near = " or ".join(str(n) for n in (length // step * step, (length // step + 1) * step) if n)
                lines.append(f"{key}: {length} is not a multiple of patch_size {step}; use {near}")
        return lines

    def _group_problems(self) -> list[str]:
        lines = []
        if self.crops["global"].num < 1:
            lines.append("crops.global.num: at least 1, the teacher needs a view")
        for key in ("roll", "gain", "mixup", "resized_crop", "bands"):
            for group in sorted(getattr(self, key).keys() - self.crops.keys()):
                near = next(iter(difflib.get_close_matches(group, self.crops, n=1)), "")
                hint = f"did you mean '{near}'?" if near else f"there are {', '.join(self.crops)}"
                lines.append(f"{key}.{group}: no group of crops has this name; {hint}")
        shown = [name for name, one in self.crops.items() if one.num]
        for name, one in self.corrupted.items():
            if name in self.crops:
                lines.append(f"corrupted.{name}: there is a group of crops of this name; choose another")
            if one.of not in shown:
                lines.append(f"corrupted.{name}.of: no group of crops '{one.of}'; there are {', '.join(shown)}")
            lines += check_interval(f"corrupted.{name}.covered", one.covered, 0.95)
        return lines

    def build(self, statistics: Mapping[str, Any] | None = None) -> Spectrogram:
        """`statistics` are those of filter banks: {"mean": [...], "std": [...], "of": settings} (`data/media/audio.py`).

        Raises ValueError if they are needed and of other settings.
        """
        fbank, patch = self.fbank.build(self.sample_rate), pair(self.patch_size)
        shares = self.resized_crop_shares
        return Spectrogram(
            fbank=fbank,
            normalization=self.normalization.build(statistics, fbank),
            patch_size=patch,
            recipes={name: self._recipe(name, crops) for name, crops in self.crops.items() if crops.num},
            strengths=Strengths(
                gain_db=self.gain_db,
                mixup=self.mixup_share,
                time=shares.time,
                mel=shares.mel,
                time_bands=Bands(self.time_bands.num, self.time_bands.max_share),
                mel_bands=Bands(self.mel_bands.num, self.mel_bands.max_share),
            ),
            corruptions={
                name: Corruption(
                    one.of, one.covered, one.replace, one.replaced, one.max_block, patch if one.align else (1, 1)
                )
                for name, one in self.corrupted.items()
            },
            short=self.short,
            evaluation_frames=self.evaluation_frames or self.crops["global"].num_frames,
            evaluation_chunk=self.evaluation_chunk,
        )

    def _recipe(self, group: str, crops: CropsConfig) -> GroupRecipe:
        def probability(key: str, view: int) -> float:
            known: dict[str, tuple[float, ...]] = getattr(self, key)
            return known[group][view % len(known[group])] if group in known else 0.0

        views = (ViewRecipe(*(probability(key, view) for key in ViewRecipe._fields)) for view in range(crops.num))
        return GroupRecipe(crops.num_frames, tuple(views))
