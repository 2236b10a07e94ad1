"""A picture of a slide with its tissue and its tiles drawn in."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from ssl_platform.data.tars import atomic_file

if TYPE_CHECKING:
    from ssl_platform.data.slides.tiling import Mask, SlidePlan

LARGEST = 1200
"""Pixels of the longer side."""
_DIGEST = "plan"
TISSUE, INK, TILE = (0, 120, 60), (230, 60, 0), (20, 60, 230)


def shows(path: Path, digest: str) -> bool:
    """Whether the picture at `path` was written with this digest."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(_DIGEST) == digest
    except OSError:
        return False


def write_preview(path: Path, plan: "SlidePlan", mask: "Mask", digest: str) -> None:
    """Tissue outlined in green, ink in orange, kept tiles in blue. Only the scanned area itself is shown.

    `digest` stands for the options that the plan was made with.
    """
    height, width = mask.tissue.shape
    factor = min(LARGEST / max(height, width), 4.0)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    picture = Image.fromarray(mask.image).resize(size, Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    for area, colour in ((mask.tissue, TISSUE), (mask.ink, INK)):
        large = np.asarray(Image.fromarray(area).resize(size, Image.Resampling.NEAREST))
        pixels[large & ~ndimage.binary_erosion(large, iterations=2)] = colour
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    corners = np.array(plan.corners, dtype=np.float64).reshape(-1, 2)
    boxes = mask.boxes(np.concatenate([corners, corners + np.array(plan.size)], axis=1))
    for box in (boxes * np.tile([size[0] / width, size[1] / height], 2)).tolist():
        draw.rectangle(box, outline=TILE)
    about = PngInfo()
    about.add_text(_DIGEST, digest)
    with atomic_file(path) as file:
        picture.save(file, format="PNG", pnginfo=about)
