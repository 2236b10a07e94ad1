"""Images as Modality, whatever their augmentations; `image` and `pathology` configure it."""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_platform.modalities import GroupSpec, Variant
from ssl_platform.modalities._image_views import Views
from ssl_platform.modalities._images import (
    EXTENSIONS,
    Normalization,
    Size,
    decode_image,
    resize_and_center_crop,
    to_float,
)
from ssl_platform.modalities._intensity import IntensityRange
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.views import SampleViews


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
