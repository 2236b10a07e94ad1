"""Near-duplicates: which samples look so much like one before them that they add nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ssl_platform.modalities._images import to_float, to_grey

Floats = NDArray[np.floating]

_SIDE = 16
THUMBNAIL_SIZE = _SIDE**2 + 3
"""Numbers in a thumbnail."""
_NOISE = 4 / 255
"""Standard deviation of what may be noise: the contrast of flatter images counts less than their mean colour."""
_BLOCK = 1024
_ROUNDING = 1e-6
"""Of a float32 cosine: two copies of one sample reach a threshold of 1."""


class Twins(NamedTuple):
    """For each sample the one that it is a near-duplicate of."""

    of: NDArray[np.int64]
    """(N,) a sample that is kept, -1 for those that are kept themselves."""
    similarity: NDArray[np.float32]
    """(N,) their cosine; 0 for those that are kept."""


def near_duplicates(
    features: Floats,
    threshold: float,
    *,
    order: NDArray[np.int64] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Twins:
    """Keeps each sample whose cosine with all that are kept before it is below `threshold`; finds the others a twin.

    features: (N, D); order: the rows to go through, each once (None: all as they come). No two kept samples are
    near-duplicates, each other one has a kept twin, and nothing depends on chance. Memory is that of the kept features:
    a list of all close pairs, as a range search gives, would be quadratic where thousands of samples are alike.
    """
    order = np.arange(len(features)) if order is None else order
    twins = Twins(np.full(len(features), -1), np.zeros(len(features), np.float32))
    kept, kept_rows = faiss.IndexFlatIP(features.shape[1]), np.empty(0, np.int64)
    limit = threshold - _ROUNDING
    for first in range(0, len(order), _BLOCK):
        rows = order[first : first + _BLOCK]
        block = unit_rows(features[rows])  # (b, D)
        is_new = np.ones(len(rows), bool)
        if kept.ntotal:
            similarity, place = (found[:, 0] for found in kept.search(block, 1))
            is_new = similarity < limit
            twins.of[rows[~is_new]] = kept_rows[place[~is_new]]
            twins.similarity[rows[~is_new]] = similarity[~is_new]
        rows, block = rows[is_new], block[is_new]
        is_kept = _within(block, rows, limit, twins)
        kept.add(block[is_kept])
        kept_rows = np.concatenate([kept_rows, rows[is_kept]])
        advance(min(_BLOCK, len(order) - first))
    return twins


def _within(block: NDArray[np.float32], rows: NDArray[np.int64], limit: float, twins: Twins) -> NDArray[np.bool_]:
    """The same among the features (b, D) of `rows` alone; which of them are kept (b,)."""
    is_kept = np.ones(len(rows), bool)
    similarity = np.triu(block @ block.T, 1)  # (b, b)
    close = similarity >= limit
    for row in np.flatnonzero(close.any(1)):
        if is_kept[row]:
            followers = np.flatnonzero(close[row] & is_kept)
            is_kept[followers] = False
            twins.of[rows[followers]] = rows[row]
            twins.similarity[rows[followers]] = similarity[row, followers]
    return is_kept


def unit_rows(features: Floats) -> NDArray[np.float32]:
    """Rows (N, D) of length 1; zeros stay zeros, like nothing."""
    rows = np.asarray(features, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.where(lengths > 0, lengths, 1))


# -- features ----------------------------------------------------------------------------------------------------------


def thumbnail(pixels: Tensor) -> NDArray[np.uint8]:
    """(THUMBNAIL_SIZE,): 16 x 16 grey areas of an image (C, H, W), then its mean colour."""
    image = to_float(pixels)
    channels = image.shape[0]
    colour = image[:3] if channels in (3, 4) else image[:1] if channels == 2 else image.mean(0, keepdim=True)
    grey = to_grey(colour) if len(colour) == 3 else colour  # (1, H, W)
    areas = adaptive_avg_pool2d(grey[None], _SIDE).flatten()
    means = colour.mean((1, 2)).expand(3)
    found: NDArray[np.uint8] = (torch.cat([areas, means]) * 255).round().to(torch.uint8).numpy()
    return found


def thumbnail_features(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnails (N, THUMBNAIL_SIZE) -> features (N, D) whose cosine is nearly the correlation of the grey areas.

    Brightness, contrast, size and compression hardly matter; shifts, turns and crops do. Six small numbers for the mean
    colour settle it for flat images, whose areas hold nothing but noise.
    """
    values = thumbnails.astype(np.float32) / 255
    areas, colour = values[:, : _SIDE**2], values[:, _SIDE**2 :]
    angle = colour * np.float32(np.pi / 2)  # so that black and white are as different as can be
    weight = np.float32(_NOISE * _SIDE / np.sqrt(3))
    return np.concatenate(
        [areas - areas.mean(1, keepdims=True), weight * np.sin(angle), weight * np.cos(angle)], axis=1
    )


def read_features(path: Path, num_samples: int) -> Floats:
    """Features (N, D) from a .npy file, a row a sample in the order of the index; raises ValueError if they are not."""
    try:
        features: Floats = np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header makes `np.load` raise almost anything
        raise ValueError(f"{path}: cannot be read as a NumPy array ({error})") from error
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind != "f":
        found = f"{features.dtype} {features.shape}" if isinstance(features, np.ndarray) else "an archive"
        raise ValueError(f"{path}: expected a row of floats for each sample, (N, D), found {found}")
    if len(features) != num_samples:
        raise ValueError(f"{path}: has {len(features)} rows, and there are {num_samples} samples: not of these shards")
    for first in range(0, len(features), 1 << 16):
        bad = np.flatnonzero(~np.isfinite(features[first : first + (1 << 16)]).all(1))
        if len(bad):
            raise ValueError(f"{path}: row {first + bad[0]} holds nan or infinity")
    return features
