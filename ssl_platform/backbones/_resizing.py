"""Patch embeddings for another patch size or another number of channels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_platform.patch_embed import GridPatchEmbed


def with_patches(
    patch_embed: nn.Module, embed_dim: int, shapes: Sequence[tuple[int, ...]], patch_size: int
) -> GridPatchEmbed:
    """A patch embedding for the same views in square patches; raises ValueError if the modality's is of no 2-D grid.

    `shapes` are all that the views may have, first the usual one.
    """
    if not isinstance(patch_embed, GridPatchEmbed) or len(patch_embed.patch_size) != 2:
        raise ValueError("patch_size: views of this modality are not cut into patches of two axes; leave it out")
    for shape in shapes:
        if any(length % patch_size for length in shape[1:]):
            size = " x ".join(map(str, shape[1:]))
            raise ValueError(
                f"patch_size: views of {size} are not a multiple of {patch_size}; choose sizes that are of both"
            )
    if patch_embed.patch_size == (patch_size, patch_size):
        return patch_embed
    grid = (shapes[0][1] // patch_size, shapes[0][2] // patch_size)
    return GridPatchEmbed(patch_embed.in_chans, embed_dim, (patch_size, patch_size), grid)


def resize_patches(weight: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """(D, C, *old) -> (D, C, *patch_size) by the pseudo-inverse resize of FlexiViT (arXiv 2212.08013, eq. 4).

    With B the linear resize of a patch from `old` to `patch_size` the result is pinv(B^T) w. Enlarged patches keep every
    token: <B x, pinv(B^T) w> = <x, w>; for smaller ones this is the least-squares answer, exact for patches that the
    resize loses nothing of. B is a product of one matrix for each axis, and so is its pseudo-inverse. In float64.
    """
    result = weight.double()
    for axis, (old, new) in enumerate(zip(weight.shape[2:], patch_size, strict=True), start=2):
        if old != new:
            matrix = torch.linalg.pinv(resize_matrix(old, new).T)  # (new, old)
            result = torch.tensordot(result, matrix, dims=([axis], [1])).movedim(-1, axis)
    return result.to(weight.dtype).contiguous()


def resize_matrix(old: int, new: int) -> Tensor:
    """(new, old) float64: linear interpolation between pixel centres, antialiased when it shrinks."""
    basis = torch.eye(old, dtype=torch.float64).reshape(1, old, 1, old)
    resized = F.interpolate(basis, size=(1, new), mode="bilinear", antialias=True)
    return resized.reshape(old, new).T


def adapt_channels(weight: Tensor, num_channels: int) -> Tensor:
    """(D, C, *patch) -> (D, num_channels, *patch) with the same sum over channels, so that grey views keep their tokens.

    More channels: channel c takes the kernel of channel c % C, divided by how many take it. Fewer: kernel c is added to
    channel c % num_channels; for one channel that is their sum.
    """
    old = weight.shape[1]
    result = weight.new_zeros(weight.shape[0], num_channels, *weight.shape[2:])
    for channel in range(max(old, num_channels)):
        source, target = channel % old, channel % num_channels
        num_takers = len(range(source, num_channels, old)) if num_channels > old else 1
        result[:, target] += weight[:, source] / num_takers
    return result
