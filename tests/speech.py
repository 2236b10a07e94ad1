"""A modality of toy filter banks, (1, frames, 16), that any record with an image stands for: what speaker networks see."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_platform.config import PluginConfig
from ssl_platform.modalities import GroupSpec
from ssl_platform.modalities._images import decode_image
from ssl_platform.views import Batch, SampleViews, ViewGroup

NUM_BINS = 16


class Config(PluginConfig):
    name: str = "tests.speech"
    frames: tuple[int, int] = (24, 16)
    """Of global and local views."""

    def build(self, statistics: dict[str, list[float]] | None) -> "Speech":
        return Speech(*self.frames)


class Speech:
    def __init__(self, global_frames: int = 24, local_frames: int = 16) -> None:
        self.groups = {
            "global": GroupSpec(2, (1, global_frames, NUM_BINS), (global_frames,)),
            "local": GroupSpec(2, (1, local_frames, NUM_BINS), (local_frames,)),
        }

    def decode(self, record: dict[str, bytes]) -> Tensor:
        (extension,) = record.keys() & {"png", "jpg"}
        image = decode_image(record[extension], extension).float().mean(0) / 64 - 2  # (H, W)
        return image[:, :NUM_BINS]

    def augment(self, examples: tuple[Tensor, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        return {
            name: SampleViews(
                torch.stack([self._chunk(examples[0], rng, spec.shape[1]) for _ in range(2)]),
                torch.arange(2) + 2 * (name == "local"),
                {},
            )
            for name, spec in self.groups.items()
        }

    def _chunk(self, example: Tensor, rng: np.random.Generator, frames: int) -> Tensor:
        begin = int(rng.integers(0, len(example) + 1 - frames))
        noise = torch.from_numpy(rng.normal(size=(frames, NUM_BINS))).float()
        return (example[begin : begin + frames] + 0.1 * noise)[None]

    def preprocess(self, example: Tensor) -> Tensor:
        return example[None, : self.groups["global"].shape[1]]

    def patch_embed(self, embed_dim: int, group: str = "global") -> torch.nn.Module:
        raise NotImplementedError("networks over frames do not ask for one")

    def description(self) -> dict[str, Any]:
        return {"input_size": list(self.groups["global"].shape)}


def batch(seed: int = 0, size: int = 8) -> Batch:
    """Noise views of `Speech`."""
    generator = torch.Generator().manual_seed(seed)
    groups = {
        name: ViewGroup(torch.randn(2, size, *spec.shape, generator=generator), torch.arange(2) + 2 * (name == "local"))
        for name, spec in Speech().groups.items()
    }
    ids = torch.arange(size)
    return Batch(groups, [f"sample{seed}-{i}" for i in range(size)], ids, ids, seed)
