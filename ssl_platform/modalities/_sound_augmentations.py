"""Augmentations of waveforms and of filter banks whose random numbers all come from one numpy generator.

Waveforms are (samples,), filter banks (frames, bins). The plain functions are exact; `random_...` draw their arguments.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssl_platform.modalities._sounds import Recording, Short, random_chunk

Size = tuple[int, int]
"""(frames, bins)"""
Shares = tuple[float, float]
"""[min, max]"""

# -- waveforms ---------------------------------------------------------------------------------------------------------


def random_rolled_chunk(
    recording: Recording, num_samples: int, sample_rate: int, rng: np.random.Generator, short: Short
) -> Tensor:
    """A chunk of the recording rolled by a random shift: after the end it goes on at the beginning.

    What is shorter than a chunk is as `random_chunk` has it, which begins anywhere as it is.
    """
    total = recording.num_samples(sample_rate)
    if total < num_samples:
        return random_chunk(recording, num_samples, sample_rate, rng, short)
    first = int(rng.integers(total))
    until_end = recording.read(first / sample_rate, min(num_samples, total - first), sample_rate)
    rest = num_samples - len(until_end)
    return torch.cat([until_end, recording.read(0.0, rest, sample_rate)]) if rest else until_end


def random_gain(wave: Tensor, decibels: Shares, rng: np.random.Generator) -> Tensor:
    """Louder or softer by U(decibels)."""
    return wave * 10 ** (rng.uniform(*decibels) / 20)


# -- filter banks ------------------------------------------------------------------------------------------------------


def log_mix_exp(bins: Tensor, other: Tensor, share: float) -> Tensor:
    """log((1 - share) exp(bins) + share exp(other)): the mixture of two sounds whose energies are logarithms (ATST)."""
    if share == 0:
        return bins
    return torch.logaddexp(bins + math.log1p(-share), other + math.log(share))


def random_resized_crop(bins: Tensor, time: Shares, mel: Shares, rng: np.random.Generator) -> Tensor:
    """A part of U(time) of the frames and U(mel) of the bands, resized (bicubic) to the whole, as in BYOL-A and ATST.

    Shares above 1 reach beyond the view, where it is 0: the mean, if it is normalised.
    """
    size = (bins.shape[0], bins.shape[1])
    canvas, first = _on_canvas(bins, (time[1], mel[1]))
    box = []
    for axis, shares in enumerate((time, mel)):
        length = max(round(size[axis] * rng.uniform(*shares)), 1)
        # Within the view where it is large enough, and around it where it is not.
        low, high = sorted((first[axis], first[axis] + size[axis] - length))
        start = int(rng.integers(low, high + 1))
        box.append(slice(start, start + length))
    crop = canvas[box[0], box[1]]
    if crop.shape == size:
        return crop.clone()
    return F.interpolate(crop[None, None], size=size, mode="bicubic")[0, 0]


def _on_canvas(bins: Tensor, largest: Shares) -> tuple[Tensor, Size]:
    """The view among zeros, with room for parts of the `largest` shares of it, and where it begins."""
    rooms = [max(math.ceil(length * (share - 1)), 0) for length, share in zip(bins.shape, largest, strict=True)]
    return F.pad(bins, (rooms[1], rooms[1], rooms[0], rooms[0])), (rooms[0], rooms[1])


def random_bands(bins: Tensor, axis: int, num: int, max_share: float, rng: np.random.Generator) -> Tensor:
    """`num` bands of U(0, max_share) of the axis (0 time, 1 mel) set to 0, as in SpecAugment."""
    bins, length = bins.clone(), bins.shape[axis]
    for _ in range(num):
        width = int(rng.integers(int(length * max_share) + 1))
        bins.narrow(axis, int(rng.integers(length - width + 1)), width).zero_()
    return bins


def random_blocks(
    size: Size, share: float, max_block: float, unit: Size, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """(frames, bins), True in blocks of up to `max_block` of each side until `share` of all is covered (ASiT's GMML).

    Blocks begin anywhere and are cut off at the border; edges lie at multiples of `unit`.
    """
    frames, bins = size[0] // unit[0], size[1] // unit[1]
    largest = (max(int(frames * max_block), 1), max(int(bins * max_block), 1))
    covered, missing = np.zeros((frames, bins), np.bool_), math.ceil(share * frames * bins)
    while missing > 0:
        height, width = rng.integers(1, largest[0] + 1), rng.integers(1, largest[1] + 1)
        top, left = rng.integers(frames), rng.integers(bins)
        block = covered[top : top + height, left : left + width]
        missing -= block.size - int(block.sum())
        block[:] = True
    return covered.repeat(unit[0], axis=0).repeat(unit[1], axis=1)
