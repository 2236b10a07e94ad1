"""Reading a learned position embedding, or features, at another resolution."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def interpolate_positions(
    positions: Tensor,
    native: tuple[int, ...],
    grid: tuple[int, ...],
    convention: Literal["dinov2", "timm"] = "dinov2",
    offset: float = 0.1,
    antialias: bool = False,
) -> Tensor:
    """(1, prod(native), D) -> (1, prod(grid), D): bicubic along every axis, in float32; unchanged at the native grid.

    `dinov2` samples by the scale factor (size + offset) / native of each axis (its `interpolate_pos_encoding`), `timm`
    by the sizes and with antialiasing (its `resample_abs_pos_embed`). Neither knows 1 or 3 axes: those grids are done
    axis by axis, which for bicubic sampling is the same thing. They leave an axis of the native length alone, and so do
    grids of two unequal axes, of which DINOv2 has none either: a longer spectrogram changes nothing along its bands.
    """
    if grid == native:
        return positions
    if convention == "timm":
        offset, antialias = 0.0, True
    is_square = len(native) == 2 and native[0] == native[1]

    def resize(images: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        scale = [(n + offset) / o if n != o or is_square else 1.0 for n, o in zip(new, old, strict=True)]
        if offset:
            return F.interpolate(images, scale_factor=scale, mode="bicubic", antialias=antialias)
        return F.interpolate(images, size=new, mode="bicubic", antialias=antialias)

    x = positions.float().mT.reshape(1, -1, *native)  # (1, D, *native)
    if len(native) == 2:
        x = resize(x, (native[0], native[1]), (grid[0], grid[1]))
    else:
        for axis, (old, new) in enumerate(zip(native, grid, strict=True), start=2):
            moved = x.movedim(axis, -1)
            flat = resize(moved.reshape(1, -1, 1, old), (1, old), (1, new))  # (1, D * other axes, 1, new)
            x = flat.reshape(*moved.shape[:-1], new).movedim(-1, axis)
    assert x.shape[2:] == grid, f"interpolated to {tuple(x.shape[2:])} where {grid} was wanted"
    return x.flatten(2).mT


def resize_tokens(tokens: Tensor, old: tuple[int, ...], new: tuple[int, ...], antialias: bool = False) -> Tensor:
    """(rows, prod(old), D) -> (rows, prod(new), D): bicubic to the size of `new`, along every axis, in float32."""
    x = tokens.float().mT.reshape(len(tokens), -1, *old)  # (rows, D, *old)
    if len(old) == 2:
        x = F.interpolate(x, size=new, mode="bicubic", antialias=antialias)
    else:
        for axis, length in enumerate(new, start=2):
            moved = x.movedim(axis, -1)
            flat = moved.reshape(len(tokens), -1, 1, moved.shape[-1])  # (rows, D * other axes, 1, length)
            flat = F.interpolate(flat, size=(1, length), mode="bicubic", antialias=antialias)
            x = flat.reshape(*moved.shape[:-1], length).movedim(-1, axis)
    return x.flatten(2).mT
