"""Stain normalisation: the colours of one slide, measured on a sample of its tiles, moved to those of a reference."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

METHODS = ("none", "macenko", "reinhard")
Values = NDArray[np.float64]

_WHITE = 240.0
"""The intensity of glass, as in Macenko et al. 2009."""
_MIN_DENSITY = 0.15
_ANGLE_PERCENTILE = 1.0
_REFERENCE_STAINS = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])  # (3, 2): H, E
_REFERENCE_AMOUNTS = np.array([1.9705, 1.0308])
"""Optical densities and largest amounts of haematoxylin and eosin in the reference of Macenko's own code."""

_LMS_FROM_RGB = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_LAB_FROM_LOG = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
"""Ruderman's l, alpha, beta from the logarithms of L, M, S, as in Reinhard et al. 2001."""
_REFERENCE_MEAN = np.array([8.74108109, -0.12440419, 0.0444982])
_REFERENCE_STD = np.array([0.6135447, 0.10989545, 0.0286032])
"""Of the tissue of a TCGA breast slide, the standard of HistomicsTK (Amgad et al. 2019)."""

_MIN_PIXELS = 500
_MIN_ANGLE = 0.02
"""Radians between the two stains; closer ones are one stain."""


class Transform(NamedTuple):
    """An affine map of the logarithms of R, G, B (macenko) or of L, M, S (reinhard)."""

    method: str
    matrix: tuple[float, ...]
    """3 x 3, row by row."""
    offset: tuple[float, ...]


def measure(pixels: NDArray[np.uint8], method: str) -> Transform:
    """The transform of a slide from a sample (N, 3) of its pixels; raises ValueError if the sample cannot tell."""
    values = np.maximum(pixels.astype(np.float64), 1)
    stained: NDArray[np.bool_] = np.all(-np.log(values / _WHITE) > _MIN_DENSITY, axis=1)
    if stained.sum() < _MIN_PIXELS:
        raise ValueError(f"{int(stained.sum())} stained pixels in the sample, at least {_MIN_PIXELS} are needed")
    return _macenko(values, stained) if method == "macenko" else _reinhard(values[stained])


def _macenko(values: Values, stained: NDArray[np.bool_]) -> Transform:
    density = -np.log(values / _WHITE)  # (N, 3)
    stains = stain_vectors(density[stained])
    amounts = np.percentile(density @ np.linalg.pinv(stains).T, 99, axis=0)  # (2,)
    if not (amounts > 0.01).all():
        raise ValueError("one of the two stains is missing")
    matrix = _REFERENCE_STAINS @ np.diag(_REFERENCE_AMOUNTS / amounts) @ np.linalg.pinv(stains)
    return _checked("macenko", matrix, np.zeros(3))


def stain_vectors(density: Values) -> Values:
    """(3, 2): the optical densities of haematoxylin and eosin, of length 1, from those of stained pixels (N, 3).

    Macenko et al. 2009: in the plane of the two main directions, the outermost angles but for a percentile.
    """
    _, vectors = np.linalg.eigh(np.cov(density, rowvar=False))
    plane = vectors[:, [2, 1]]
    plane = plane * np.where(plane.sum(0) < 0, -1, 1)  # towards more of every colour
    along = density @ plane
    angles = np.arctan2(along[:, 1], along[:, 0])
    low, high = np.percentile(angles, [_ANGLE_PERCENTILE, 100 - _ANGLE_PERCENTILE])
    if high - low < _MIN_ANGLE:
        raise ValueError("the pixels show one colour only, not two stains")
    found: Values = plane @ np.array([[np.cos(low), np.cos(high)], [np.sin(low), np.sin(high)]])  # (3, 2)
    if not (found.sum(0) > 0).all():
        raise ValueError("the colours are not those of two stains on a light ground")
    return found if found[0, 0] > found[0, 1] else found[:, ::-1]  # haematoxylin takes more of the red


def _reinhard(values: Values) -> Transform:
    lab = np.log(np.maximum(values @ _LMS_FROM_RGB.T, 1)) @ _LAB_FROM_LOG.T  # (N, 3)
    mean, std = lab.mean(0), lab.std(0)
    if not (std > 1e-3).all():
        raise ValueError("the pixels show one colour only")
    scale = _REFERENCE_STD / std
    back = np.linalg.inv(_LAB_FROM_LOG)
    matrix = back @ np.diag(scale) @ _LAB_FROM_LOG
    return _checked("reinhard", matrix, back @ (_REFERENCE_MEAN - scale * mean))


def _checked(method: str, matrix: Values, offset: Values) -> Transform:
    if not (np.isfinite(matrix).all() and np.isfinite(offset).all()):
        raise ValueError("the estimate is not finite")
    return Transform(method, tuple(matrix.ravel().tolist()), tuple(offset.tolist()))


def normalized(pixels: NDArray[np.uint8], transform: Transform) -> NDArray[np.uint8]:
    """The (H, W, 3) pixels in the colours of the reference."""
    matrix = np.array(transform.matrix).reshape(3, 3)
    values = np.maximum(pixels.reshape(-1, 3).astype(np.float64), 1)
    if transform.method == "macenko":
        found = _WHITE * np.exp(np.log(values / _WHITE) @ matrix.T)
    else:
        logs = np.log(np.maximum(values @ _LMS_FROM_RGB.T, 1))
        found = np.exp(logs @ matrix.T + np.array(transform.offset)) @ np.linalg.inv(_LMS_FROM_RGB).T
    rounded: NDArray[np.uint8] = np.clip(np.rint(found), 0, 255).astype(np.uint8)
    return rounded.reshape(pixels.shape)
