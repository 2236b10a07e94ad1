"""Images of any number of channels, 8 or 16 bit: DINO's multi-crop augmentation."""

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ssl_platform.config import Config as Section
from ssl_platform.config import PluginConfig
from ssl_platform.modalities import _image_augmentations as augmentations
from ssl_platform.modalities._image_augmentations import BoxSampler, Step
from ssl_platform.modalities._image_modality import Image
from ssl_platform.modalities._image_views import (
    CopyConfig,
    CopyRecipe,
    CropsConfig,
    GroupRecipe,
    ResolutionConfig,
    Views,
    copies_problems,
    resolutions_problems,
)
from ssl_platform.modalities._images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalization,
    Size,
    channel_values,
)
from ssl_platform.modalities._intensity import IntensityRange
from ssl_platform.modalities._options import (
    Interval,
    PerView,
    Probability,
    SizeOption,
    Strength,
    from_list,
    over_defaults,
    pair,
    raise_if_any,
)

__all__ = ["ColorJitterConfig", "Config", "Image"]

# -- configuration -----------------------------------------------------------------------------------------------------


class ColorJitterConfig(Section):
    """In random order, factors U(1 - strength, 1 + strength) and a hue shift U(-hue, hue); the last two need RGB."""

    probability: Probability = 0.8
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1


class Config(PluginConfig):
    """Crops of images, with DINOv2's augmentations.

    Probabilities are applied as written. DINOv2's own code is not: its GaussianBlur hands 1 - p to torchvision's
    RandomApply, which applies with the probability it is given, so its recipes' p = 1.0 and 0.1 never blur the first
    global view and blur the second nine times of ten. To repeat what its released models saw, set
    `blur: {global: [0.0, 0.9]}`.
    """

    name: str = "image"
    channels: int = Field(3, ge=1)
    patch_size: SizeOption = 16
    crops: dict[str, CropsConfig] = {
        "global": CropsConfig(num=2, size=224, scale=(0.32, 1.0)),
        "local": CropsConfig(num=8, size=96, scale=(0.05, 0.32)),
    }
    """Groups of views; keys that are left out keep their defaults, and further groups may be added."""
    copies: dict[str, CopyConfig] = {}
    """Further groups, such as {gram: {of: global, size: 512}}: each view of another group once more, the same part of the
    image with its flips and turns, at another size and without colour augmentations: for a network that sees more."""
    resolutions: list[ResolutionConfig] = []
    """Mixed resolutions: for each step one of these is drawn, for all ranks and samples (DINOv3's high-resolution stage).
    The sizes in `crops` and `copies` then only say what position embeddings and evaluation are made for."""
    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    right_angle_rotation: Probability = 0.0
    """That a view is turned: by 90, 180 or 270 degrees, equally likely."""
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    grey: Probability = 0.2
    """That the colour is taken away (RGB only)."""
    blur: dict[str, PerView] = {"global": (1.0, 0.1), "local": (0.5,)}
    """Probability of Gaussian blur, sigma U(0.1, 2) pixels, for each view of a group, repeated if there are more."""
    solarize: dict[str, PerView] = {"global": (0.0, 0.2), "local": (0.0,)}
    """Probability of solarisation, likewise."""
    mean: Annotated[tuple[float, ...], from_list] | None = None
    """Of each channel, pixels in [0, 1]. None: the shards' statistics, else ImageNet's for 3 channels, else 0.5."""
    std: Annotated[tuple[float, ...], from_list] | None = None
    intensity_range: Interval | None = None
    """[low, high] in percent, such as [1, 99]: in each channel, pixels from one percentile of the shards to the other
    become [0, 1], before the colour augmentations and in evaluation, and are clipped there; `mean` and `std`, if they are
    given, are of what comes out. For 16-bit images that fill a part of their range. None: pixels are as they are."""
    normalize_per_sample: bool = False
    """Every channel of every view gets mean 0 and standard deviation 1 of its own; `mean` and `std` are not used."""
    to_grey: bool = False
    """RGB becomes its luma, after the augmentations and in evaluation: in 1 channel, or in all 3 of them."""
    evaluation_size: SizeOption | None = None
    """Of the view that evaluation shows; None: the size of the global crops."""
    evaluation_resize: SizeOption | None = None
    """An image is scaled to cover this before `evaluation_size` is cut from its center. None: 256 / 224 of that size,
    but an image that has exactly `evaluation_size` is shown as it is."""

    @field_validator("crops", "blur", "solarize", mode="before")
    @classmethod
    def _keep_defaults(cls, value: Any, info: ValidationInfo) -> Any:
        return over_defaults(cls.model_fields[info.field_name or ""].default, value)

    @model_validator(mode="after")
    def _check(self) -> "Config":
        raise_if_any(self.problems())
        return self

    def problems(self) -> list[str]:
        """Settings that cannot work together, one line each."""
        patch, lines = pair(self.patch_size), []
        if self.crops["global"].num < 1:
            lines.append("crops.global.num: at least 1, the teacher needs a view")
        sizes = {f"crops.{name}.size": crops.size for name, crops in self.crops.items() if crops.num}
        sizes |= {f"copies.{name}.size": copied.size for name, copied in self.copies.items()}
        if self.evaluation_size is not None:
            sizes["evaluation_size"] = self.evaluation_size
        for key, size in sizes.items():
            for length, step in zip(pair(size), patch, strict=True):
                if length % step:
                    near = " or ".join(str(n) for n in (length // step * step, (length // step + 1) * step) if n)
                    lines.append(f"{key}: {length} is not a multiple of patch_size {step}; use {near}")
        for key, groups in (("blur", self.blur), ("solarize", self.solarize)):
            for group in sorted(groups.keys() - self.crops.keys()):
                near = next(iter(difflib.get_close_matches(group, self.crops, n=1)), "")
                hint = f"did you mean '{near}'?" if near else f"there are {', '.join(self.crops)}"
                lines.append(f"{key}.{group}: no group of crops has this name; {hint}")
        lines += copies_problems(self.crops, self.copies)
        if (self.mean is None) != (self.std is None):
            lines.append("mean, std: give both or neither")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                lines.append(f"{key}: {len(values)} values for {self.channels} channels")
        if self.std is not None and min(self.std, default=1) <= 0:
            lines.append("std: must be above 0")
        if self.intensity_range is not None and not 0 <= self.intensity_range[0] < self.intensity_range[1] <= 100:
            lines.append(f"intensity_range: {list(self.intensity_range)}: expected [low, high], 0 <= low < high <= 100")
        if self.to_grey and self.channels not in (1, 3):
            lines.append(f"to_grey: makes 1 or 3 channels, not channels: {self.channels}")
        if any(cover < size for cover, size in zip(*self._evaluation_sizes(), strict=True)):
            lines.append(f"evaluation_resize: {self.evaluation_resize} does not cover evaluation_size")
        if not lines:
            names = [*(name for name, crops in self.crops.items() if crops.num), *self.copies]
            lines += resolutions_problems(self.resolutions, names, lambda sizes: self.at(sizes).problems())
        return lines

    def at(self, sizes: Mapping[str, SizeOption]) -> "Config":
        """The same with other sizes of views, the same in every step."""
        changed: dict[str, Any] = {"resolutions": []}
        for key, groups in (("crops", self.crops), ("copies", self.copies)):
            changed[key] = {
                name: group.model_copy(update={"size": sizes.get(name, group.size)}) for name, group in groups.items()
            }
        cover, size = self._evaluation_sizes()
        return self.model_copy(update=changed | {"evaluation_size": size, "evaluation_resize": cover})

    @property
    def needs_statistics(self) -> str:
        """The key that data without statistics must not have; without them `build` gives the shapes of views only."""
        return "intensity_range" if self.intensity_range is not None else ""

    def _evaluation_sizes(self) -> tuple[Size, Size]:
        """(size to cover, size to cut)"""
        size = pair(self.evaluation_size or self.crops["global"].size)
        if self.evaluation_resize is None:
            return (round(size[0] * 256 / 224), round(size[1] * 256 / 224)), size
        return pair(self.evaluation_resize), size

    def build(self, statistics: Mapping[str, Any] | None = None) -> "Image":
        """`statistics` are {"mean": [...], "std": [...]} of each channel, pixel values in [0, 1], and where they are
        known {"percentiles": {"1": [...], ...}}, which only `intensity_range` needs.
        """
        return Image(**self._arguments(statistics))

    def _arguments(self, statistics: Mapping[str, Any] | None) -> dict[str, Any]:
        """The arguments of the modality."""
        if of := (statistics or {}).get("of"):
            raise ValueError(f"the shards' statistics are of {of.get('values')}, not of pixels: they hold no images")
        cover, size = self._evaluation_sizes()
        intensity = None
        if self.intensity_range is not None and statistics is not None:
            intensity = IntensityRange(self.intensity_range, statistics, 3 if self.to_grey else self.channels)
            statistics = intensity.statistics(statistics)
        return {
            "channels": self.channels,
            "patch_size": pair(self.patch_size),
            "views": self._views(),
            "mixed": [(one.probability, self.at(one.sizes)._views()) for one in self.resolutions],
            "intensity": intensity,
            "normalization": self._normalization(statistics),
            "evaluation_size": size,
            "evaluation_resize": cover,
            "keep_exact_size": self.evaluation_resize is None,
        }

    def _views(self) -> "Views":
        recipes = {name: self._recipe(name, crops) for name, crops in self.crops.items() if crops.num}
        return Views(recipes, {name: CopyRecipe(copied.of, pair(copied.size)) for name, copied in self.copies.items()})

    def _recipe(self, group: str, crops: CropsConfig) -> "GroupRecipe":
        cut = partial(
            augmentations.random_cut,
            box=self._box_sampler(crops),
            size=pair(crops.size),
            horizontal_flip=self.horizontal_flip,
            vertical_flip=self.vertical_flip,
            right_angle_rotation=self.right_angle_rotation,
        )
        return GroupRecipe(pair(crops.size), cut, tuple(self._colors(group, view) for view in range(crops.num)))

    def _box_sampler(self, crops: CropsConfig) -> BoxSampler:
        return partial(augmentations.random_box, scale=crops.scale, aspect=crops.aspect)

    def _colors(self, group: str, view: int) -> tuple[Step, ...]:
        """The steps after the crop, in DINO's order."""
        blur, solarize = self.blur.get(group, (0.0,)), self.solarize.get(group, (0.0,))
        jitter = self.color_jitter.model_dump() | ({} if self._is_rgb else {"saturation": 0.0, "hue": 0.0})
        grey = (partial(augmentations.random_grey, probability=self.grey),) if self._is_rgb else ()
        return (
            partial(augmentations.random_color_jitter, **jitter),
            *grey,
            partial(augmentations.random_gaussian_blur, probability=blur[view % len(blur)]),
            partial(augmentations.random_solarize, probability=solarize[view % len(solarize)]),
        )

    @property
    def _is_rgb(self) -> bool:
        """Whether images have colours while they are augmented."""
        return self.channels == 3 or self.to_grey

    def _normalization(self, statistics: Mapping[str, Any] | None) -> Normalization:
        if self.normalize_per_sample:
            return Normalization(self.channels, to_grey=self.to_grey)
        if self.mean is not None and self.std is not None:
            return Normalization(self.channels, self.mean, self.std, self.to_grey)
        if statistics is None:
            mean, std = (IMAGENET_MEAN, IMAGENET_STD) if self._is_rgb else ((0.5,), (0.5,))
        else:
            mean, std = statistics["mean"], statistics["std"]
        return Normalization(
            self.channels,
            channel_values(mean, self.channels, self.to_grey),
            channel_values(std, self.channels, self.to_grey),
            self.to_grey,
        )
