"""Video: the same random places hidden at every time, so that no frame shows what another hides."""

import math

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_platform.masks import MasksConfig, generator
from ssl_platform.masks._assignment import ratio_problems


class Config(MasksConfig):
    """Tube masks (VideoMAE, Tong et al. 2022) for grids (T, H, W)."""

    name: str = "tube"
    ratio: float = Field(0.9, gt=0, lt=1)
    """Share of the places (H x W) that is hidden."""
    num_masks: int = Field(1, ge=1)
    """Masked versions of each view."""

    def problems(self, grid: tuple[int, ...]) -> list[str]:
        if len(grid) != 3:
            shape = " x ".join(str(length) for length in grid)
            return [f"name: tube needs a grid of time x height x width; group '{self.group}' has a grid of {shape}"]
        return ratio_problems((self.ratio, self.ratio), math.prod(grid[1:]), round)

    def same_count(self) -> bool:
        return True

    def build(self) -> "TubeMasks":
        return TubeMasks(self.group, self.ratio, self.num_masks)


class TubeMasks:
    """round(ratio * H W) places of every view, hidden at all T times."""

    def __init__(self, group: str, ratio: float, num_masks: int) -> None:
        self.group = group
        self.ratio = ratio
        self.num_masks = num_masks

    def draw(
        self, num_views: int, grid: tuple[int, ...], *, seed: int, step: int, batch_size: int, first: int, count: int
    ) -> Tensor:
        """Masks (V, M, count, T H W) of the samples first ... first + count - 1 of the global batch."""
        time, num_places = grid[0], math.prod(grid[1:])
        masks = np.zeros((num_views, self.num_masks, count, time, num_places), dtype=bool)
        for view in range(num_views):
            for sample in range(count):
                rng = generator(seed, step, view, first + sample)
                for mask in masks[view, :, sample]:  # (T, H W)
                    mask[:, rng.permutation(num_places)[: round(self.ratio * num_places)]] = True
        return torch.from_numpy(masks.reshape(num_views, self.num_masks, count, time * num_places))
