"""A modality of 16x16 noise images that makes every group of views the probes ask for, as a user's own file would."""

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_platform.config import PluginConfig
from ssl_platform.modalities import GroupSpec
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.views import SampleViews

SPECS = {
    "global": GroupSpec(2, (1, 8, 8), (2, 2)),
    "local": GroupSpec(2, (1, 4, 4), (1, 1)),
    "clean": GroupSpec(2, (1, 8, 8), (2, 2)),
    "corrupted": GroupSpec(2, (1, 8, 8), (2, 2)),
    "double": GroupSpec(2, (1, 16, 16), (4, 4)),
    "clip": GroupSpec(1, (1, 4, 8, 8), (2, 2, 2)),
    "frames": GroupSpec(4, (1, 8, 8), (2, 2)),
    "single": GroupSpec(1, (1, 8, 8), (2, 2)),
    "signal": GroupSpec(1, (1, 16), (4,)),
}


class Config(PluginConfig):
    name: str = "tests.probes.toy"
    groups: tuple[str, ...] = ("global", "local")

    def build(self, statistics: dict[str, list[float]] | None) -> "Toy":
        return Toy(self.groups)


class Toy:
    in_chans = 1

    def __init__(self, groups: tuple[str, ...]) -> None:
        self.groups = {name: SPECS[name] for name in groups}

    def decode(self, record: dict[str, bytes]) -> Tensor:
        return torch.from_numpy(np.load(io.BytesIO(record["npy"]))).float()  # (1, 16, 16)

    def augment(self, examples: tuple[Tensor, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        image, donor = examples[0], examples[-1]
        crops = torch.stack([self._crop(image, rng, 8) for _ in range(2)])  # (2, 1, 8, 8)
        corrupted, pixel_mask = crops.clone(), torch.zeros_like(crops)
        corrupted[:, :, :3, 2:7] = donor[:, :3, 2:7]
        pixel_mask[:, :, :3, 2:7] = 1
        frames = torch.stack([torch.roll(image, t, 2)[:, :8, :8] for t in range(4)])  # (4, 1, 8, 8)
        made: dict[str, Any] = {
            "global": (crops + 0.1 * torch.randn(crops.shape), [0, 1], {}),
            "local": (torch.stack([self._crop(image, rng, 4) for _ in range(2)]), [2, 3], {}),
            "clean": (crops, [0, 1], {}),
            "corrupted": (corrupted, [0, 1], {"pixel_mask": pixel_mask}),
            "double": (F.interpolate(crops, scale_factor=2), [0, 1], {}),
            "clip": (frames.transpose(0, 1)[None], [0], {}),
            "frames": (frames, [0, 1, 2, 3], {}),
            "single": (image[None, :, 4:12, 4:12], [9], {}),
            "signal": (image[:, 0][None], [0], {}),
        }
        return {name: SampleViews(made[name][0], torch.tensor(made[name][1]), made[name][2]) for name in self.groups}

    def _crop(self, image: Tensor, rng: np.random.Generator, size: int) -> Tensor:
        y, x = rng.integers(0, 17 - size, 2)
        return image[:, y : y + size, x : x + size]

    def preprocess(self, example: Tensor) -> Tensor:
        return example[:, :8, :8]

    def patch_embed(self, embed_dim: int, group: str = "global") -> GridPatchEmbed:
        spec = SPECS[group]
        patch = tuple(size // cells for size, cells in zip(spec.shape[1:], spec.grid, strict=True))
        return GridPatchEmbed(1, embed_dim, patch, spec.grid)

    def description(self) -> dict[str, Any]:
        return {"input_size": [1, 8, 8], "mean": [0.0], "std": [1.0]}
