"""The ResNet34 of speaker recognition: narrow, without max pooling, statistics pooling over time (as in wespeaker)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_platform.backbones import Features, Input
from ssl_platform.backbones._frames import bins_of, features, frames_of, layer_of
from ssl_platform.backbones._pooling import AttentiveStatisticsPooling, StatisticsPooling
from ssl_platform.batch_norm import BatchNorm
from ssl_platform.config import PluginConfig
from ssl_platform.modalities import Modality


class Config(PluginConfig):
    """Defaults are wespeaker's ResNet34 with TSTP (6.6 M parameters with 80 bins)."""

    name: str = "resnet34"
    channels: int = Field(32, ge=1)
    """Of the first stage; each further one has twice as many, half the frames and half the bins."""
    depths: tuple[Annotated[int, Field(ge=1)], ...] = Field((3, 4, 6, 3), min_length=1)
    """Blocks of each stage."""
    pooling: Literal["statistics", "attentive_statistics"] = "statistics"
    """Mean and standard deviation over time, plain (TSTP) or with learned weights (ASTP)."""
    attention_dim: int = Field(128, ge=1)
    """Of attentive_statistics: hidden width."""
    global_context: bool = False
    """Of attentive_statistics: whether the attention sees mean and standard deviation of the whole view."""
    embed_dim: int = Field(256, ge=1)

    def build(self, modality: Modality, group: str = "global") -> "ResNet":
        """The network for views (1, frames, bins) with the bins of `group`, of any number of frames."""
        return ResNet(self, bins_of(modality, group, self.name))


class ResNet(nn.Module):
    """Filter banks to a speaker's embedding: `cls` is it, `patches` are the frames that were pooled, an eighth as many.

    Batch norm takes its statistics of each input's rows by itself, over all ranks: DINO's global and local views are
    normalised apart.
    """

    def __init__(self, config: Config, num_bins: int) -> None:
        super().__init__()
        self.num_bins, self.embed_dim, self.num_layers = num_bins, config.embed_dim, sum(config.depths)
        self.stem = ConvNorm(1, config.channels, 3)
        blocks, width, bins = [], config.channels, num_bins
        for stage, depth in enumerate(config.depths):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(Block(width, config.channels * 2**stage, stride))
                width, bins = config.channels * 2**stage, -(-bins // stride)
        self.layers = nn.ModuleList(blocks)
        self.patch_dim = width * bins
        self.pool = (
            StatisticsPooling()
            if config.pooling == "statistics"
            else AttentiveStatisticsPooling(self.patch_dim, config.attention_dim, config.global_context)
        )
        self.embed = nn.Linear(2 * self.patch_dim, config.embed_dim)

    def forward(self, inputs: Sequence[Input]) -> list[Features]:
        """One entry for each input, in order; raises ConfigError for masks, layers, and views of other bins."""
        return [self._forward(item) for item in inputs]

    def layer_of(self, parameter: str) -> int:
        return layer_of(parameter, self.num_layers)

    def _forward(self, item: Input) -> Features:
        x = F.relu(self.stem(frames_of(item, self.num_bins, "resnet34")[:, None]))  # (rows, channels, frames, bins)
        for layer in self.layers:
            x = layer(x)
        frames = x.mT.flatten(1, 2)  # (rows, channels bins, frames)
        return features(item, self.embed(self.pool(frames)), frames)


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm."""

    def __init__(self, fan_in: int, fan_out: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = BatchNorm(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, fan_in, T, F) -> (B, fan_out, T / stride, F / stride), rounded up"""
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions and a residual connection (He et al. 2016)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(fan_in, fan_out, 3, stride)
        self.second = ConvNorm(fan_out, fan_out, 3)
        self.shortcut = ConvNorm(fan_in, fan_out, 1, stride) if stride > 1 or fan_in != fan_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, fan_in, T, F) -> (B, fan_out, T / stride, F / stride), rounded up"""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))
