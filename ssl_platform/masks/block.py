"""Blocks of neighbouring tokens (BEiT, iBOT, DINOv2), on grids of one, two or three axes."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ssl_platform.masks import MasksConfig, generator
from ssl_platform.masks._assignment import hidden_shares, ratio_problems


class Config(MasksConfig):
    """Block masks; the defaults are DINOv2's."""

    name: str = "block"
    probability: float = Field(0.5, ge=0, le=1)
    """Share of the global batch's views that are masked."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Share of the tokens to hide in a masked view: spread evenly over [min, max] within a batch."""
    min_tokens: int = Field(4, ge=1)
    """Size of the smallest block, unless fewer tokens are left to hide."""
    max_fraction: float = Field(0.5, gt=0, le=1)
    """Size of the largest block, as a share of all tokens."""
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Length of a block along one axis / that along the others: log-uniform in [min, max]."""
    num_masks: int = Field(1, ge=1)
    """Masked versions of each view, all with the same number of tokens to hide."""
    fill: bool = False
    """Hide single tokens at random where the blocks hid fewer than wanted (DINOv3), so that the number is exact."""

    def problems(self, grid: tuple[int, ...]) -> list[str]:
        num_tokens = math.prod(grid)
        lines = ratio_problems(self.ratio, num_tokens, int)
        if self.min_tokens > num_tokens:
            lines.append(f"min_tokens: {self.min_tokens} is more than the {num_tokens} tokens of group '{self.group}'")
        elif self.min_tokens > self.max_fraction * num_tokens:
            lines.append(
                f"max_fraction: {self.max_fraction:g} of {num_tokens} tokens is less than min_tokens {self.min_tokens}"
            )
        if not 0 < self.aspect[0] <= self.aspect[1]:
            lines.append(f"aspect: [{self.aspect[0]:g}, {self.aspect[1]:g}] must be [min, max] with 0 < min <= max")
        return lines

    def build(self) -> "BlockMasks":
        return BlockMasks(
            group=self.group,
            probability=self.probability,
            ratio=self.ratio,
            min_tokens=self.min_tokens,
            max_fraction=self.max_fraction,
            aspect=self.aspect,
            num_masks=self.num_masks,
            fill=self.fill,
        )


class BlockMasks:
    """int(share * N) tokens to hide in each masked view, in blocks that may overlap."""

    num_attempts = 10
    """For one block, before its mask is left as it is."""

    def __init__(
        self,
        *,
        group: str,
        probability: float,
        ratio: tuple[float, float],
        min_tokens: int,
        max_fraction: float,
        aspect: tuple[float, float],
        num_masks: int,
        fill: bool,
    ) -> None:
        self.group = group
        self.probability = probability
        self.ratio = ratio
        self.min_tokens = min_tokens
        self.max_fraction = max_fraction
        self.log_aspect = (math.log(aspect[0]), math.log(aspect[1]))
        self.num_masks = num_masks
        self.fill = fill

    def draw(
        self, num_views: int, grid: tuple[int, ...], *, seed: int, step: int, batch_size: int, first: int, count: int
    ) -> Tensor:
        """Masks (V, M, count, N) of the samples first ... first + count - 1 of the global batch."""
        shares = hidden_shares(
            num_views, batch_size, probability=self.probability, ratio=self.ratio, seed=seed, step=step
        )
        masks = np.zeros((num_views, self.num_masks, count, *grid), dtype=bool)
        for view in range(num_views):
            for sample in range(count):
                num_wanted = int(shares[view, first + sample] * math.prod(grid))
                rng = generator(seed, step, view, first + sample)
                for mask in masks[view, :, sample] if num_wanted else ():
                    self._hide(mask, num_wanted, rng)
        return torch.from_numpy(masks.reshape(num_views, self.num_masks, count, math.prod(grid)))

    def _hide(self, mask: NDArray[np.bool_], num_wanted: int, rng: np.random.Generator) -> None:
        num_missing = num_wanted
        while num_missing > 0:
            added = self._add_block(mask, num_missing, rng)
            if added == 0:
                break
            num_missing -= added
        if self.fill and num_missing > 0:
            visible = np.flatnonzero(~mask)
            mask.flat[rng.permutation(visible)[:num_missing]] = True

    def _add_block(self, mask: NDArray[np.bool_], num_missing: int, rng: np.random.Generator) -> int:
        """Hides one block and returns how many of its tokens were visible: at least 1, or 0 if no attempt fitted."""
        grid = tuple(length for length in mask.shape if length > 1)  # an axis of length 1 has no blocks
        mask = mask.reshape(grid)  # a view
        largest = min(num_missing, int(self.max_fraction * mask.size))
        for draws in rng.random((self.num_attempts, 2 * len(grid))).tolist():
            volume = self.min_tokens + (largest - self.min_tokens) * draws[0]
            sides = self._sides(volume, draws[1 : len(grid)])
            if any(side >= length for side, length in zip(sides, grid, strict=True)):
                continue
            starts = [
                int(draw * (length - side + 1))
                for draw, side, length in zip(draws[len(grid) :], sides, grid, strict=True)
            ]
            block = mask[tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))]
            added = block.size - int(np.count_nonzero(block))
            if 0 < added <= num_missing:
                block[...] = True
                return added
        return 0

    def _sides(self, volume: float, draws: list[float]) -> list[int]:
        """Lengths of a block along each axis: each axis in turn gets an aspect to the geometric mean of those after it.

        With two axes sqrt(volume * aspect) and sqrt(volume / aspect), as in DINOv2.
        """
        low, high = self.log_aspect
        sides = []
        for number, draw in enumerate(draws):
            num_axes = len(draws) + 1 - number
            aspect = math.exp(low + (high - low) * draw)
            side = volume ** (1 / num_axes) * aspect ** ((num_axes - 1) / num_axes)
            sides.append(round(side))
            volume /= side
        return [*sides, round(volume)]
