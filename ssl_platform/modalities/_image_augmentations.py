"""Augmentations of images whose random numbers all come from one numpy generator, so that seeds and tests can fix them.

The plain functions are exact; those named `random_...` draw their arguments and whether they act.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from ssl_platform.modalities._images import Size, resize, to_grey

# -- geometry ----------------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


BoxSampler = Callable[[np.random.Generator, Size, Size], Box]
"""(rng, size of the image, size of the view) -> which part of the image the view shows."""
Step = Callable[[Tensor, np.random.Generator], Tensor]
"""One augmentation with its settings bound."""


def random_box(
    rng: np.random.Generator, image_size: Size, view_size: Size, scale: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """A box of U(scale) of the image's area and log-uniform aspect (width / height).

    Ten attempts, then the largest centred box whose aspect is allowed: torchvision's RandomResizedCrop.
    """
    height, width = image_size
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            return place(rng, image_size, (box_height, box_width))
    ratio = min(max(width / height, aspect[0]), aspect[1])
    box_height, box_width = min(height, round(width / ratio)), min(width, round(height * ratio))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def place(rng: np.random.Generator, image_size: Size, box_size: Size) -> Box:
    """A box of this size anywhere in the image."""
    top = int(rng.integers(image_size[0] - box_size[0] + 1))
    return Box(top, int(rng.integers(image_size[1] - box_size[1] + 1)), *box_size)


def resized_crop(image: Tensor, box: Box, size: Size) -> Tensor:
    """The box, resized to `size` by antialiased bicubic interpolation: uint8 stays uint8, uint16 becomes float32."""
    crop = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return resize(crop, size)


class Cut(NamedTuple):
    """Which part of an image a view shows, and how it is held."""

    box: Box
    quarter_turns: int
    horizontal_flip: bool
    vertical_flip: bool

    def __call__(self, image: Tensor, size: Size) -> Tensor:
        """The view (C, *size); at several sizes the same view."""
        view = resized_crop(image, self.box, size[::-1] if self.quarter_turns % 2 else size)
        view = view.flip(-1) if self.horizontal_flip else view
        view = view.flip(-2) if self.vertical_flip else view
        return torch.rot90(view, self.quarter_turns, (-2, -1)) if self.quarter_turns else view


def random_cut(
    image: Tensor,
    rng: np.random.Generator,
    *,
    box: BoxSampler,
    size: Size,
    horizontal_flip: float,
    vertical_flip: float,
    right_angle_rotation: float,
) -> Cut:
    """A part of the image for views of `size`, flipped and turned by 90, 180 or 270 degrees with these probabilities."""
    quarter_turns = int(rng.integers(1, 4)) if rng.random() < right_angle_rotation else 0
    size = size[::-1] if quarter_turns % 2 else size
    part = box(rng, (image.shape[-2], image.shape[-1]), size)
    return Cut(part, quarter_turns, bool(rng.random() < horizontal_flip), bool(rng.random() < vertical_flip))


# -- colour ------------------------------------------------------------------------------------------------------------


def adjust_brightness(image: Tensor, factor: float) -> Tensor:
    """Any number of channels; for 1 and 3, torchvision's."""
    return (image * factor).clamp_(0, 1)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Around the mean of the image's luma, or of all its channels if it is not RGB; for 1 and 3, torchvision's."""
    mean = (to_grey(image) if image.shape[-3] == 3 else image).mean(dim=(-3, -2, -1), keepdim=True)
    return torch.lerp(mean, image, factor).clamp_(0, 1)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """RGB only."""
    adjusted: Tensor = TF.adjust_saturation(image, factor)
    return adjusted


def adjust_hue(image: Tensor, shift: float) -> Tensor:
    """Turns the hue of RGB by `shift` of a full circle, in [-0.5, 0.5]: torchvision's values in a fifth of its time.

    Around the circle each channel stays high for a third, falls for a sixth, stays low for a third and rises again: its
    value follows from the distance between the pixel's hue and the channel's own.
    """
    red, green, blue = image.unbind(-3)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    scale = 1 / chroma.clamp(min=1e-12)
    near_red = (green - blue).mul_(scale)
    near_green = (blue - red).mul_(scale).add_(2)
    near_blue = (red - green).mul_(scale).sub_(2)
    sextant = torch.lerp(near_blue, near_green, (high == green).float())  # torch.where is several times slower
    sextant = torch.lerp(sextant, near_red, (high == red).float())  # in [-3, 3], 0 = red
    turned = torch.empty_like(image)
    for channel, center in enumerate((0, 2, 4)):
        offset = (6 * shift - center + 3) % 6 - 3
        weight = (sextant + offset).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)  # distance from the center - 1
        torch.addcmul(high, weight, chroma, value=-1, out=turned.select(-3, channel))
    return turned


def gaussian_blur(image: Tensor, sigma: float, kernel_size: int = 9) -> Tensor:
    """Separable, edges reflected, the kernel smaller for tiny images: torchvision's values in half its time."""
    height, width = image.shape[-2:]
    radius = min(kernel_size // 2, height - 1, width - 1)
    weights = [math.exp(-((offset / sigma) ** 2) / 2) for offset in range(radius + 1)]
    weights = [weight / (2 * sum(weights) - weights[0]) for weight in weights]
    blurred = F.pad(image[None], (radius,) * 4, mode="reflect")[0]
    for axis, length in ((-2, height), (-1, width)):
        source, blurred = blurred, blurred.narrow(axis, radius, length) * weights[0]
        for offset in range(1, radius + 1):
            for start in (radius - offset, radius + offset):
                blurred.add_(source.narrow(axis, start, length), alpha=weights[offset])
    return blurred


def solarize(image: Tensor, threshold: float = 128 / 255) -> Tensor:
    """Inverts what is at or above the threshold."""
    solarized: Tensor = TF.solarize(image, threshold)
    return solarized


# -- colour, at random -------------------------------------------------------------------------------------------------


def random_color_jitter(
    image: Tensor,
    rng: np.random.Generator,
    *,
    probability: float,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> Tensor:
    """In random order, factors U(max(0, 1 - strength), 1 + strength) and a hue shift U(-hue, hue): torchvision's
    ColorJitter. Saturation and hue need RGB."""
    if rng.random() >= probability:
        return image
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for number in rng.permutation(4):
        strength = (brightness, contrast, saturation, hue)[number]
        low, high = (-hue, hue) if number == 3 else (max(0.0, 1 - strength), 1 + strength)
        amount = rng.uniform(low, high)
        if strength > 0:
            image = adjustments[number](image, amount)
    return image


def random_grey(image: Tensor, rng: np.random.Generator, *, probability: float) -> Tensor:
    """RGB becomes its luma, three times."""
    return to_grey(image).expand_as(image) if rng.random() < probability else image


def random_gaussian_blur(
    image: Tensor, rng: np.random.Generator, *, probability: float, sigma: Sequence[float] = (0.1, 2.0)
) -> Tensor:
    """Blurs with `probability`, by U(sigma) pixels."""
    return gaussian_blur(image, rng.uniform(sigma[0], sigma[1])) if rng.random() < probability else image


def random_solarize(image: Tensor, rng: np.random.Generator, *, probability: float) -> Tensor:
    """Solarises with `probability`, at DINO's threshold."""
    return solarize(image) if rng.random() < probability else image
