"""Companions drawn uniformly from all other samples, as the donors of group masked model learning (ASiT) are."""

from collections.abc import Mapping

import numpy as np
from pydantic import Field
from torch import Tensor

from ssl_platform.config import PluginConfig
from ssl_platform.data.companions import Companions
from ssl_platform.data.index import Index


class Config(PluginConfig):
    """Other samples at random."""

    name: str = "random"
    num: int = Field(default=1, ge=1)
    """How many, all different, never the sample itself. They come from any shard, so each is one more random read."""

    def build(self, index: Index, prepared: Mapping[str, Tensor]) -> Companions:
        """Raises ValueError if the index has too few samples."""
        num, num_samples = self.num, len(index)
        if num >= num_samples:
            raise ValueError(f"companions.num: {num} other samples cannot be drawn from {num_samples} samples")

        def draw(sample: int, rng: np.random.Generator) -> tuple[int, ...]:
            others = rng.choice(num_samples - 1, size=num, replace=False)
            return tuple(int(other) + (other >= sample) for other in others)

        return draw
