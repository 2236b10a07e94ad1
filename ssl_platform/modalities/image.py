"""Images of any number of channels, 8 or 16 bit: DINO's multi-crop augmentation."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from ssl_platform.config import Config as Section
from ssl_platform.config import PluginConfig
from ssl_platform.modalities import GroupSpec, Variant
from ssl_platform.modalities import _image_augmentations as augmentations
from ssl_platform.modalities._image_augmentations import BoxSampler, Step
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
    EXTENSIONS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalization,
    Size,
    channel_values,
    decode_image,
    resize_and_center_crop,
    to_float,
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
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.views import SampleViews

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


# -- modality ----------------------------------------------------------------------------------------------------------


class Image:
    """Images as Modality; examples are uint8 or uint16 tensors (C, H, W)."""

    def __init__(
        self,
        *,
        channels: int,
        patch_size: Size,
        views: Views,
        mixed: Sequence[tuple[float, Views]],
        intensity: IntensityRange | None,
        normalization: Normalization,
        evaluation_size: Size,
        evaluation_resize: Size,
        keep_exact_size: bool,
    ) -> None:
        self.channels = channels
        self.patch_size = patch_size
        self.intensity = intensity
        self.normalization = normalization
        self.evaluation_size = evaluation_size
        self.evaluation_resize = evaluation_resize
        self.keep_exact_size = keep_exact_size
        self._mixed = mixed
        self._show(views)

    def _show(self, views: Views) -> None:
        """Sets what `augment` makes."""
        self.recipes, self.copies = views
        self.groups: dict[str, GroupSpec] = {}
        self.sources: dict[str, Tensor] = {}
        first = 0
        for name, recipe in self.recipes.items():
            self.groups[name] = self._spec(len(recipe.colors), recipe.size)
            self.sources[name] = torch.arange(first, first + len(recipe.colors))
            first += len(recipe.colors)
        for name, copied in self.copies.items():
            spec = self._spec(self.groups[copied.of].num_views, copied.size)
            self.groups[name] = spec._replace(shows=copied.of)
            self.sources[name] = self.sources[copied.of]

    def _spec(self, num_views: int, size: Size) -> GroupSpec:
        grid = (size[0] // self.patch_size[0], size[1] // self.patch_size[1])
        return GroupSpec(num_views, (self.channels, *size), grid)

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """One for each of the configuration's `resolutions`."""
        made = []
        for probability, views in self._mixed:
            other = copy.copy(self)
            other._mixed = ()
            other._show(views)
            made.append(Variant(probability, other))
        return tuple(made)

    def decode(self, record: dict[str, bytes]) -> Tensor:
        """The record's image, the first of EXTENSIONS it has, as uint8 or uint16 (C, H, W)."""
        found = [extension for extension in EXTENSIONS if extension in record]
        if not found:
            raise ValueError(
                f"no image in the record: it has {', '.join(record) or 'nothing'}, not {'/'.join(EXTENSIONS)}"
            )
        channels = 3 if self.normalization.to_grey else self.channels
        return decode_image(record[found[0]], found[0], channels)

    def augment(self, examples: tuple[Tensor, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        """Each group's crops of examples[0]: views (V, C, H, W) float32, every crop a source of its own."""
        made: dict[str, list[Tensor]] = {name: [] for name in self.groups}
        for name, recipe in self.recipes.items():
            for steps in recipe.colors:
                cut = recipe.cut(examples[0], rng)
                view = self._pixels(cut(examples[0], recipe.size))
                for step in steps:
                    view = step(view, rng)
                made[name].append(view)
                for copied, (of, size) in self.copies.items():
                    if of == name:
                        made[copied].append(self._pixels(cut(examples[0], size)))
        return {
            name: SampleViews(self.normalization(torch.stack(views)), self.sources[name])
            for name, views in made.items()
        }

    def preprocess(self, example: Tensor) -> Tensor:
        """The image scaled (antialiased bicubic) and cut to `evaluation_size`, normalised: (C, H, W) float32."""
        if not (self.keep_exact_size and tuple(example.shape[-2:]) == self.evaluation_size):
            example = resize_and_center_crop(example, self.evaluation_resize, self.evaluation_size)
        return self.normalized(example)

    def normalized(self, example: Tensor) -> Tensor:
        """An example, or a part of one, of any size as evaluation shows it: (C, H, W) float32."""
        return self.normalization(self._pixels(example))

    def _pixels(self, image: Tensor) -> Tensor:
        """float32 in [0, 1], of which the augmentations of colour and the normalisation are."""
        pixels = to_float(image)
        return pixels if self.intensity is None else self.intensity(pixels)

    def picture(self, view: Tensor) -> NDArray[np.uint8]:
        """A view (C, H, W) with its normalisation undone; of other than three channels the first, as grey."""
        pixels = self.normalization.visible(view)
        pixels = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
        shown: NDArray[np.uint8] = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        return shown

    def patch_embed(self, embed_dim: int, group: str = "global") -> GridPatchEmbed:
        """Patches of `patch_size`, with the position grid of the group."""
        return GridPatchEmbed(self.channels, embed_dim, self.patch_size, self.groups[group].grid)

    def description(self) -> dict[str, Any]:
        """The facts of `preprocess`; `mean` 0 and `std` 1 where each sample is normalised by its own."""
        return {
            "input_size": [self.channels, *self.evaluation_size],
            "mean": self.normalization.mean.flatten().tolist(),
            "std": self.normalization.std.flatten().tolist(),
            "interpolation": "bicubic",
            "antialias": True,
            "resize": list(self.evaluation_resize),
            "crop_pct": self.evaluation_size[0] / self.evaluation_resize[0],
            "crop_mode": "center",
            "keep_exact_size": self.keep_exact_size,
            "intensity_range": self.intensity.description() if self.intensity else None,
            "normalize_per_sample": self.normalization.per_sample,
            "to_grey": self.normalization.to_grey,
        }
