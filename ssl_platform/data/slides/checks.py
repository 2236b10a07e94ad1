"""What on a slide is tissue, what ink, and which tile is blurred: NumPy rules with every threshold an argument."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ssl_platform.modalities._images import GREY_WEIGHTS
from ssl_platform.modalities.pathology import rgb_to_hsv

Mask = NDArray[np.bool_]

BLUE_GREEN = (80.0, 235.0)
"""Degrees of hue. H&E lies in 240 ... 360, from nuclei over purple to eosin's pink."""
INK_SATURATION = 0.4
"""Of blue and green ink. The sky blue of a weak haematoxylin and of glass is paler."""
BLACK_VALUE, BLACK_CHROMA = 0.25, 0.1
"""Black ink is darker than the first and greyer (maximum less minimum of R, G, B) than the second."""
ONE_CLASS = 5.0
"""Of 255: means of Otsu's two classes that are closer are of one class, glass with its noise and shading."""
INK_RIM = 2
"""Pixels of the mask round a stroke that are neither ink nor tissue."""


def hsv(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W, 3) -> (3, H, W): hue, saturation and value in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0))).float() / 255
    values: NDArray[np.float32] = rgb_to_hsv(pixels).numpy()
    return values


def _strips(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Of some million values: the whole of a large slide as floats would take gigabytes."""
    return np.array_split(image, -(-image.size // 4_000_000))


def ink_mask(image: NDArray[np.uint8], saturation: float = INK_SATURATION, black: float = BLACK_VALUE) -> Mask:
    """(H, W): what is blue, green or black ink (or a black border) on an image of some microns a pixel.

    Colour rules in hue, saturation and value for each pen, as in Schüffler et al. 2021 (J Pathol Inform 12:9); the
    thresholds are ours, set where H&E has no colours. Red ink has the hue of eosin and is not told apart. Specks of
    less than 3 x 3 pixels are no strokes; strokes grow by their pale rim.
    """

    def is_ink(strip: NDArray[np.uint8]) -> Mask:
        hue, strength, value = hsv(strip)
        is_coloured = (hue >= BLUE_GREEN[0] / 360) & (hue <= BLUE_GREEN[1] / 360) & (strength >= saturation)
        found: Mask = is_coloured | ((value < black) & (strength * value < BLACK_CHROMA))
        return found

    padded = np.pad(np.concatenate([is_ink(strip) for strip in _strips(image)]), 3, mode="edge")
    strokes = ndimage.binary_opening(padded, np.ones((3, 3)))
    mask: Mask = ndimage.binary_dilation(strokes, np.ones((3, 3)), iterations=INK_RIM)[3:-3, 3:-3]
    return mask


def tissue_mask(
    image: NDArray[np.uint8], ink: Mask, saturation: tuple[float, float], closing: int
) -> tuple[Mask, float]:
    """(H, W): where tissue is, and the threshold that tells it from glass.

    Otsu's threshold on the saturation of all that is not ink, held inside `saturation` (0 ... 255): an empty slide
    has no tissue, however its noise splits, and a slide without glass is not split in two. Where there is one class only,
    the threshold is the upper bound: glass may be tinted. Then a closing by a disk of `closing` pixels fills what is pale
    inside the tissue.
    """
    strength = np.concatenate([(hsv(strip)[1] * 255).round().astype(np.uint8) for strip in _strips(image)])
    found = otsu(values := strength[~ink])
    threshold = float(np.clip(found, *saturation)) if class_gap(values, found) > ONE_CLASS else saturation[1]
    mask: Mask = (strength > threshold) & ~ink
    if closing > 0:
        y, x = np.ogrid[-closing : closing + 1, -closing : closing + 1]
        padded = np.pad(mask, closing, mode="edge")  # or the border of the image would be eaten away
        mask = ndimage.binary_closing(padded, x * x + y * y <= closing * closing)[closing:-closing, closing:-closing]
        mask &= ~ink
    return mask, threshold


def otsu(values: NDArray[np.uint8]) -> float:
    """The threshold t for which the classes <= t and > t have the largest variance between them (Otsu 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above, rest = below[-1] - below, sums[-1] - sums
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * np.square(sums / below - rest / above)
    best = np.nan_to_num(between)
    return float(np.flatnonzero(best == best.max()).mean()) if best.max() > 0 else float(values.max(initial=0))


def class_gap(values: NDArray[np.uint8], threshold: float) -> float:
    """How far the means of the values above and below a threshold are apart; 0 if one side is empty."""
    is_above = values > threshold
    return float(values[is_above].mean() - values[~is_above].mean()) if 0 < is_above.sum() < values.size else 0.0


def shares(mask: Mask, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,): the share of each box (N, 4) x0, y0, x1, y1, in fractions of pixels of the mask, that is True."""
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(0, dtype=np.float64).cumsum(1)
    x0, y0, x1, y1 = boxes.T
    corners = [
        ndimage.map_coordinates(integral, [y, x], order=1, mode="nearest")
        for y, x in ((y1, x1), (y0, x1), (y1, x0), (y0, x0))
    ]
    inside = corners[0] - corners[1] - corners[2] + corners[3]
    share: NDArray[np.float64] = np.clip(inside / ((x1 - x0) * (y1 - y0)), 0, 1)
    return share


def sharpness(pixels: NDArray[np.uint8]) -> float:
    """The variance of the Laplacian (4 neighbours) of the grey values 0 ... 255 of a (3, H, W) tile.

    Pech-Pacheco et al. 2000. It depends on resolution and tissue: look at a slide's values before setting a limit.
    """
    grey = np.tensordot(np.asarray(GREY_WEIGHTS), pixels[:3].astype(np.float64), 1)  # (H, W)
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var())
