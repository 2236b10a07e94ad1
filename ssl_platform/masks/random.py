"""Tokens hidden one by one, independently of where they lie."""

import math

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_platform.masks import MasksConfig, generator
from ssl_platform.masks._assignment import hidden_shares, ratio_problems


class Config(MasksConfig):
    """Random masks with an exact number of hidden tokens."""

    name: str = "random"
    probability: float = Field(1.0, ge=0, le=1)
    """Share of the global batch's views that are masked."""
    ratio: float | tuple[float, float] = 0.5
    """Share of the tokens that is hidden in a masked view; [min, max]: a share of its own for each view."""
    num_masks: int = Field(1, ge=1)
    """Masked versions of each view, which hide equally many tokens."""

    def problems(self, grid: tuple[int, ...]) -> list[str]:
        return ratio_problems(self._ratio(), math.prod(grid), round)

    def same_count(self) -> bool:
        return self.probability == 1 and self._ratio()[0] == self._ratio()[1]

    def build(self) -> "RandomMasks":
        return RandomMasks(self.group, self.probability, self._ratio(), self.num_masks)

    def _ratio(self) -> tuple[float, float]:
        return (self.ratio, self.ratio) if isinstance(self.ratio, float) else self.ratio


class RandomMasks:
    """round(share * N) hidden tokens of each masked view, at random."""

    def __init__(self, group: str, probability: float, ratio: tuple[float, float], num_masks: int) -> None:
        self.group = group
        self.probability = probability
        self.ratio = ratio
        self.num_masks = num_masks

    def draw(
        self, num_views: int, grid: tuple[int, ...], *, seed: int, step: int, batch_size: int, first: int, count: int
    ) -> Tensor:
        """Masks (V, M, count, N) of the samples first ... first + count - 1 of the global batch."""
        num_tokens = math.prod(grid)
        shares = hidden_shares(
            num_views, batch_size, probability=self.probability, ratio=self.ratio, seed=seed, step=step
        )
        masks = np.zeros((num_views, self.num_masks, count, num_tokens), dtype=bool)
        for view in range(num_views):
            for sample in range(count):
                num_hidden = round(shares[view, first + sample] * num_tokens)
                rng = generator(seed, step, view, first + sample)
                for mask in masks[view, :, sample] if num_hidden else ():
                    mask[rng.permutation(num_tokens)[:num_hidden]] = True
        return torch.from_numpy(masks)
