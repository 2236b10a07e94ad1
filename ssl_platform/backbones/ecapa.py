"""ECAPA-TDNN, a convolutional network over time for speakers (Desplanques et al. 2020), as wespeaker trains it with DINO."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_platform.backbones import Features, Input
from ssl_platform.backbones._frames import bins_of, features, frames_of, layer_of
from ssl_platform.backbones._pooling import AttentiveStatisticsPooling
from ssl_platform.batch_norm import BatchNorm
from ssl_platform.config import PluginConfig
from ssl_platform.modalities import Modality


class Config(PluginConfig):
    """Defaults are wespeaker's ECAPA_TDNN_GLOB_c512 (6.2 M parameters with 80 bins); channels: 1024 is its large one."""

    name: str = "ecapa"
    channels: int = Field(512, ge=1)
    """Of each layer over time, a multiple of `scale`."""
    scale: int = Field(8, ge=2)
    """Parts of the channels in a Res2 layer: all but the first are convolved, each with the result of the one before."""
    dilations: tuple[Annotated[int, Field(ge=1)], ...] = Field((2, 3, 4), min_length=1)
    """Of each block's convolutions over three frames; as many blocks."""
    squeeze_dim: int = Field(128, ge=1)
    """Hidden width of squeeze and excitation."""
    pooled_channels: int = Field(1536, ge=1)
    """Of the frames that are pooled, which see the outputs of all blocks."""
    attention_dim: int = Field(128, ge=1)
    """Hidden width of the pooling's attention."""
    global_context: bool = True
    """Whether the attention sees mean and standard deviation of the whole view."""
    embed_dim: int = Field(192, ge=1)
    embed_norm: bool = True
    """Batch norm of the embedding."""

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        if self.channels % self.scale:
            raise ValueError(f"channels: {self.channels} is no multiple of scale: {self.scale}")
        return self

    def build(self, modality: Modality, group: str = "global") -> "EcapaTdnn":
        """The network for views (1, frames, bins) with the bins of `group`, of any number of frames."""
        return EcapaTdnn(self, bins_of(modality, group, self.name))


class EcapaTdnn(nn.Module):
    """Filter banks to a speaker's embedding: `cls` is it, `patches` are the frames that were pooled.

    Batch norm takes its statistics of each input's rows by itself, over all ranks: DINO's global and local views are
    normalised apart.
    """

    def __init__(self, config: Config, num_bins: int) -> None:
        super().__init__()
        self.num_bins, self.embed_dim, self.patch_dim = num_bins, config.embed_dim, config.pooled_channels
        self.num_layers = len(config.dilations)
        self.stem = ConvNorm(num_bins, config.channels, 5)
        self.layers = nn.ModuleList(
            Block(config.channels, config.scale, dilation, config.squeeze_dim) for dilation in config.dilations
        )
        self.aggregate = nn.Conv1d(self.num_layers * config.channels, config.pooled_channels, 1)
        self.pool = AttentiveStatisticsPooling(config.pooled_channels, config.attention_dim, config.global_context)
        self.pool_norm = BatchNorm(2 * config.pooled_channels)
        self.embed = nn.Linear(2 * config.pooled_channels, config.embed_dim)
        self.embed_norm = BatchNorm(config.embed_dim) if config.embed_norm else nn.Identity()

    def forward(self, inputs: Sequence[Input]) -> list[Features]:
        """One entry for each input, in order; raises ConfigError for masks, layers, and views of other bins."""
        return [self._forward(item) for item in inputs]

    def layer_of(self, parameter: str) -> int:
        return layer_of(parameter, self.num_layers)

    def _forward(self, item: Input) -> Features:
        x = self.stem(frames_of(item, self.num_bins, "ecapa").mT)  # (rows, channels, frames)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        frames = F.relu(self.aggregate(torch.cat(outputs, 1)))  # (rows, pooled_channels, frames)
        return features(item, self.embed_norm(self.embed(self.pool_norm(self.pool(frames)))), frames)


class ConvNorm(nn.Module):
    """A convolution that keeps the number of frames, ReLU, batch norm."""

    def __init__(self, fan_in: int, fan_out: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(fan_in, fan_out, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation)
        self.norm = BatchNorm(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, fan_in, T) -> (B, fan_out, T)"""
        return self.norm(F.relu(self.conv(x)))  # type: ignore[no-any-return]


class Res2(nn.Module):
    """Convolutions over parts of the channels, which see more frames from part to part (Res2Net, Gao et al. 2019):

    y[0] = x[0];  y[1] = layer[0](x[1]);  y[i] = layer[i - 1](x[i] + y[i - 1])
    """

    def __init__(self, channels: int, scale: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.layers = nn.ModuleList(ConvNorm(width, width, 3, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T)"""
        first, *parts = x.chunk(len(self.layers) + 1, 1)
        outputs = [first]
        for layer, part in zip(self.layers, parts, strict=True):
            outputs.append(layer(part if len(outputs) == 1 else part + outputs[-1]))
        return torch.cat(outputs, 1)


class SqueezeExcite(nn.Module):
    """Each channel times a factor that the view's mean over time decides."""

    def __init__(self, channels: int, hidden_dim: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, hidden_dim)
        self.excite = nn.Linear(hidden_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T)"""
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(2)))))[..., None]


class Block(nn.Module):
    """An SE-Res2 block with its residual connection."""

    def __init__(self, channels: int, scale: int, dilation: int, squeeze_dim: int) -> None:
        super().__init__()
        self.expand = ConvNorm(channels, channels)
        self.res2 = Res2(channels, scale, dilation)
        self.project = ConvNorm(channels, channels)
        self.squeeze_excite = SqueezeExcite(channels, squeeze_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> (B, channels, T)"""
        return x + self.squeeze_excite(self.project(self.res2(self.expand(x))))  # type: ignore[no-any-return]
