"""Rotary positions (RoPE) on grids of one, two or three axes: queries and keys are turned by where their token lies.

Axial, as DINOv3 (arXiv 2508.10104, section 3.2): each axis has an equal share of the channel pairs of a head and turns
them by 2 pi x / period, x in [-1, 1] across the view. So positions have no size of their own and any grid can be read.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rope(NamedTuple):
    """Settings; the meaning of each is in `vit.PositionConfig`."""

    base: float = 100.0
    min_max_period: tuple[float, float] | None = None
    normalize: Literal["separate", "min", "max"] = "separate"
    shift: float = 0.0
    jitter: float = 1.0
    rescale: float = 1.0


class Rotation:
    """By what the tokens of a group are turned; no tuple or dataclass, whose tensors FSDP2 would round to bf16."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        """`cos` and `sin` are (1 or rows, tokens, 1, 1, head_dim / 2), of float32 at least."""
        self.cos, self.sin = cos, sin


def check_rope(grid: tuple[int, ...] | None, head_dim: int) -> None:
    """Raises ValueError where there is nothing to turn, or nothing to turn by."""
    if grid is None:
        raise ValueError("position.kind: rope needs tokens on a grid, which these views do not have; use learned")
    if head_dim % 2 or head_dim < 2 * len(grid):
        raise ValueError(
            f"position.kind: rope turns pairs of channels, {len(grid)} at least, but heads have {head_dim} channels "
            "(embed_dim / num_heads)"
        )


def periods(rope: Rope, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count,): base ** (i / count), or from the smallest to the largest in equal ratios."""
    if rope.min_max_period is None:
        return rope.base ** (torch.arange(count, dtype=dtype, device=device) / count)
    low, high = rope.min_max_period
    return low * (high / low) ** torch.linspace(0, 1, count, dtype=dtype, device=device)


def coordinates(rope: Rope, grid: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, axes) in raster order: the centres of the tokens, in [-1, 1] where an axis is its own measure."""
    lengths = {"separate": grid, "min": (min(grid),) * len(grid), "max": (max(grid),) * len(grid)}[rope.normalize]
    axes = [
        (torch.arange(count, dtype=dtype, device=device) + 0.5) / length
        for count, length in zip(grid, lengths, strict=True)
    ]
    return 2 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2) - 1


def augmented(rope: Rope, places: Tensor) -> Tensor:
    """`places` (N, axes) shifted, then scaled along each axis and all together, by draws from the global generator."""
    if not (rope.shift or rope.jitter > 1 or rope.rescale > 1):
        return places
    num_axes = places.shape[1]
    draws = 2 * torch.rand(2 * num_axes + 1, dtype=torch.float32, device=places.device).to(places.dtype) - 1
    factors = (math.log(rope.jitter) * draws[num_axes:-1] + math.log(rope.rescale) * draws[-1]).exp()  # (axes,)
    return (places + rope.shift * draws[:num_axes]) * factors


def rotation(
    rope: Rope,
    grid: tuple[int, ...],
    *,
    head_dim: int,
    num_front: int,
    augment: bool,
    dtype: torch.dtype,
    device: torch.device,
    visible: Tensor | None = None,
) -> Rotation:
    """The rotation of `num_front` tokens that lie nowhere, which are not turned, and of the patches of `grid` behind them.

    `visible` (rows, N_visible) names the patches that are there, row by row. `head_dim` must be even; channel pairs that
    do not divide among the axes are not turned.
    """
    places = coordinates(rope, grid, dtype, device)
    places = augmented(rope, places) if augment else places
    waves = periods(rope, head_dim // (2 * len(grid)), dtype, device)
    angles = (2 * math.pi * places[:, :, None] / waves).flatten(1)  # (N, axes * periods)
    angles = F.pad(angles, (0, head_dim // 2 - angles.shape[1]))  # (N, head_dim / 2)
    angles = angles[None] if visible is None else angles[visible]  # (1 or rows, N, head_dim / 2)
    angles = F.pad(angles, (0, 0, num_front, 0))[:, :, None, None]
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """(rows, tokens, 2, heads, head_dim), queries and keys -> the same: channel i is turned with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * by.cos - second * by.sin, second * by.cos + first * by.sin], dim=-1)
    return turned.to(x.dtype)


def of_rows(by: Rotation | None, rows: Tensor) -> Rotation | None:
    """The rotation of some rows; what all rows share is kept."""
    if by is None or len(by.cos) == 1:
        return by
    return Rotation(by.cos.index_select(0, rows), by.sin.index_select(0, rows))
