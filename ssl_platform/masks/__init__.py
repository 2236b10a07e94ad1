"""Which tokens of a view are hidden; one file a rule, and the folder is the registry.

Masks are drawn for the global batch: which sample gets which ratio is a function of (seed, step) alone, and each
sample's mask of (seed, step, its place in the global batch), so every rank draws its own part and any world size the same.
"""

from typing import Protocol

import numpy as np
from torch import Tensor

from ssl_platform.config import PluginConfig


class Masks(Protocol):
    """A rule for hiding tokens."""

    group: str
    """The group of views that it is drawn for."""

    def draw(
        self, num_views: int, grid: tuple[int, ...], *, seed: int, step: int, batch_size: int, first: int, count: int
    ) -> Tensor:
        """Masks (V, M, count, N), True = hidden, of the samples first ... first + count - 1 of the global batch."""
        ...


class MasksConfig(PluginConfig):
    """The keys that every rule has; `build()` makes the `Masks`."""

    group: str = "global"

    def same_count(self) -> bool:
        """Whether every view of every sample has the same number of hidden tokens, as mode: drop needs it."""
        return False

    def problems(self, grid: tuple[int, ...]) -> list[str]:
        """What cannot work on a grid of this many tokens, one line each."""
        return []


def generator(*seeds: int) -> np.random.Generator:
    """A generator that is a function of the seeds alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))
