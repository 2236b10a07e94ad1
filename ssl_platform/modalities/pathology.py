"""Tiles of stained tissue (H&E): images without an upright position, whose colours depend on the laboratory.

To what `image` does it adds stain jitter, extended-context translation and a tissue filter.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_platform.config import Config as Section
from ssl_platform.modalities import Filtered, image
from ssl_platform.modalities._image_augmentations import Box, BoxSampler, Step, place
from ssl_platform.modalities._image_views import CropsConfig
from ssl_platform.modalities._images import Size, to_float
from ssl_platform.modalities._options import (
    Interval,
    PerView,
    Pixels,
    Probability,
    Strength,
    check_interval,
    pair,
    raise_if_any,
)
from ssl_platform.views import SampleViews

# -- configuration -----------------------------------------------------------------------------------------------------


class StainConfig(Section):
    """Jitter of the amounts of haematoxylin, eosin and the residual (DAB): each becomes alpha * amount + beta."""

    probability: Probability = 0.5
    sigma: Strength = 0.05
    """alpha is U(1 - sigma, 1 + sigma), beta U(-sigma, sigma): 0.05 is "light", 0.2 "strong" (Tellez et al. 2019)."""


class ContextConfig(Section):
    """Extended-context translation (Virchow2): crops lie far apart and are hardly resized.

    All views of a sample are cut from one region of the tile. A crop for a view of side s has sides of s * U(scale),
    stretched by the aspect; `scale` and `aspect` of the groups of crops are not used.
    """

    size: Pixels = 392
    """Side of the region, in pixels; smaller tiles are refused, of larger ones it is a random part."""
    scale: Interval = (0.9, 1.1)
    aspect: Interval = (0.95, 1.05)
    """Width / height: uniform in [min, max]."""

    @model_validator(mode="after")
    def _check(self) -> "ContextConfig":
        raise_if_any(check_interval("scale", self.scale) + check_interval("aspect", self.aspect))
        return self


class TileColorJitterConfig(image.ColorJitterConfig):
    """Milder than for photographs: the stain is most of what there is to see."""

    brightness: Strength = 0.2
    contrast: Strength = 0.2
    saturation: Strength = 0.1
    hue: float = Field(0.05, ge=0, le=0.5)


class Config(image.Config):
    """Tiles of stained tissue."""

    name: str = "pathology"
    vertical_flip: Probability = 0.5
    right_angle_rotation: Probability = 0.75
    """0.75 makes the four angles, and with both flips all eight symmetries of a square, equally likely."""
    color_jitter: TileColorJitterConfig = TileColorJitterConfig()
    solarize: dict[str, PerView] = {"global": (0.0,), "local": (0.0,)}
    stain: StainConfig | None = StainConfig()
    """Stain jitter (RGB only), before the colour jitter; null: none."""
    context: ContextConfig | None = None
    """Extended-context translation. Off by default: it needs tiles larger than the usual 224 or 256 pixels."""
    min_tissue: Probability = 0.0
    """Tiles whose share of tissue (`tissue_fraction`) is smaller are left out of training; 0: none."""

    def problems(self) -> list[str]:
        lines = super().problems()
        if self.min_tissue > 0 and not self._is_rgb:
            lines.append(f"min_tissue: tells tissue by its colour, which channels: {self.channels} do not have")
        if self.context is not None:
            stretch = self.context.scale[1] * math.sqrt(max(self.context.aspect[1], 1 / self.context.aspect[0]))
            for name, crops in self.crops.items():
                largest = math.ceil(max(pair(crops.size)) * stretch)
                if crops.num and largest > self.context.size:
                    lines.append(
                        f"context.size: {self.context.size} is too small for crops.{name}.size {crops.size}, whose "
                        f"crops have sides of up to {largest} pixels; raise it, or use smaller crops"
                    )
        return lines

    def build(self, statistics: Mapping[str, Any] | None = None) -> "Pathology":
        """`statistics` as in `image.Config.build`."""
        return Pathology(
            context_size=self.context.size if self.context else None,
            min_tissue=self.min_tissue,
            **self._arguments(statistics),
        )

    def _box_sampler(self, crops: CropsConfig) -> BoxSampler:
        if self.context is None:
            return super()._box_sampler(crops)
        return partial(translated_box, scale=self.context.scale, aspect=self.context.aspect)

    def _colors(self, group: str, view: int) -> tuple[Step, ...]:
        steps = super()._colors(group, view)
        if self.stain is None or not self._is_rgb:
            return steps
        return (partial(random_stain_jitter, probability=self.stain.probability, sigma=self.stain.sigma), *steps)


# -- modality ----------------------------------------------------------------------------------------------------------


class Pathology(image.Image):
    """Tiles as Modality. What it refuses, it refuses in `augment`: evaluation sees every tile."""

    def __init__(self, *, context_size: int | None, min_tissue: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.context_size = context_size
        self.min_tissue = min_tissue

    def augment(self, examples: tuple[Tensor, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        """The crops of examples[0]; raises ValueError if it is too small for the context, Filtered if it lacks tissue."""
        tile = examples[0]
        if self.min_tissue > 0 and (share := tissue_fraction(tile)) < self.min_tissue:
            raise Filtered(f"tissue share {share:.3f} is below min_tissue {self.min_tissue:g}")
        if self.context_size is not None:
            tile = self._region(tile, self.context_size, rng)
        return super().augment((tile, *examples[1:]), rng)

    def _region(self, tile: Tensor, side: int, rng: np.random.Generator) -> Tensor:
        height, width = tile.shape[-2:]
        if min(height, width) < side:
            raise ValueError(
                f"the tile has {height} x {width} pixels, context.size needs {side} x {side}; "
                "pack larger tiles, lower context.size (with smaller crops), or set context: null"
            )
        box = place(rng, (height, width), (side, side))
        return tile[:, box.top : box.top + side, box.left : box.left + side]


# -- extended-context translation --------------------------------------------------------------------------------------


def translated_box(
    rng: np.random.Generator, image_size: Size, view_size: Size, scale: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """A box of the view's own size times U(scale), stretched by U(aspect) (width / height), anywhere in the image.

    Virchow2 (Zimmermann et al. 2024, arXiv:2408.00738), section on extended-context translation.
    """
    factor, stretch = rng.uniform(*scale), math.sqrt(rng.uniform(*aspect))
    return place(rng, image_size, (round(view_size[0] * factor / stretch), round(view_size[1] * factor * stretch)))


# -- stains ------------------------------------------------------------------------------------------------------------

# Optical density in R, G, B of one unit of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001, as scikit-image).
_RGB_FROM_HED = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=torch.float64)
_HED_FROM_RGB = torch.linalg.inv(_RGB_FROM_HED)
_DARKEST = 1e-6
"""Pixel values below it count as it; its negative logarithm is the unit of optical density, as in scikit-image."""


def rgb_to_hed(pixels: Tensor) -> Tensor:
    """Amounts of the three stains: (..., 3, H, W) float32 in [0, 1] -> (..., 3, H, W).

    scikit-image's rgb2hed, except that negative amounts (colours that the stains cannot make) are kept, not set to 0:
    then `hed_to_rgb` gives the pixels back.
    """
    density = pixels.clamp(min=_DARKEST).log_().div_(math.log(_DARKEST))
    return _mix(density, _HED_FROM_RGB)


def hed_to_rgb(stains: Tensor) -> Tensor:
    """scikit-image's hed2rgb, clipped to [0, 1]."""
    return _mix(stains, _RGB_FROM_HED).mul_(math.log(_DARKEST)).exp_().clamp_(0, 1)


def _mix(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Every pixel, as a row, times the matrix."""
    return (matrix.T.to(pixels.dtype) @ pixels.flatten(-2)).view_as(pixels)


def stain_jitter(pixels: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """hed_to_rgb(alpha * rgb_to_hed(pixels) + beta) with (3,) factors, in one matrix product between log and exp."""
    matrix = _HED_FROM_RGB @ torch.diag(alpha.double()) @ _RGB_FROM_HED
    offset = beta.double() @ _RGB_FROM_HED * math.log(_DARKEST)
    logarithms = _mix(pixels.clamp(min=_DARKEST).log_(), matrix)
    return logarithms.add_(offset.to(pixels.dtype).view(3, 1, 1)).exp_().clamp_(0, 1)


def random_stain_jitter(pixels: Tensor, rng: np.random.Generator, *, probability: float, sigma: float) -> Tensor:
    """Stain jitter with U(1 - sigma, 1 + sigma) and U(-sigma, sigma) for each stain (Tellez et al. 2019)."""
    if rng.random() >= probability:
        return pixels
    alpha = torch.from_numpy(rng.uniform(1 - sigma, 1 + sigma, 3))
    return stain_jitter(pixels, alpha, torch.from_numpy(rng.uniform(-sigma, sigma, 3)))


# -- tissue ------------------------------------------------------------------------------------------------------------


def rgb_to_hsv(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) float32 in [0, 1] -> hue in [0, 1), saturation and value in [0, 1]; grey has hue 0."""
    red, green, blue = pixels.unbind(-3)
    value = pixels.amax(-3)
    chroma = value - pixels.amin(-3)
    scale = 1 / chroma.clamp(min=1e-12)
    hue = torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4)
    hue = torch.where(value == red, ((green - blue) * scale) % 6, hue) / 6
    return torch.stack([hue, chroma / value.clamp(min=1e-12), value], dim=-3)


def tissue_fraction(tile: Tensor) -> float:
    """The share of pixels of a (3, H, W) tile with the colours of stained tissue.

    Hue in [90, 180], saturation in [8, 255] and value in [103, 255] on OpenCV's 8-bit scale (hue in steps of two
    degrees): the filter of Midnight (Karasikov et al. 2025, arXiv:2504.05186). Raises ValueError if there is no RGB.
    """
    if len(tile) < 3:
        raise ValueError(f"the tissue filter needs RGB, this image has {len(tile)} channels")
    hue, saturation, value = rgb_to_hsv(to_float(tile[:3])).unbind(-3)
    is_tissue = ((hue * 180).round() >= 90) & ((saturation * 255).round() >= 8) & ((value * 255).round() >= 103)
    return is_tissue.float().mean().item()
