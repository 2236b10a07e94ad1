"""Reads areas of whole slides through openslide: handles, resolution, the level to read from, resampling.

Only the slide itself is read, never the images that a file holds beside it (label, macro): they show names.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_platform.optional import optional_package

if TYPE_CHECKING:
    from openslide import OpenSlide

EXTENSIONS = ("svs", "tif", "tiff", "ndpi", "mrxs", "scn", "bif", "svslide", "vms", "vmu", "zvi", "dcm")
MAX_OPEN = 16
"""So many slides are kept open by a process."""
CACHE_BYTES = 64 << 20
"""Decoded blocks of slides that a process keeps, over all its slides."""
PLAUSIBLE_MPP = (0.02, 20.0)
"""Microns per pixel that a scanner makes. 72 dots an inch, what image editors write by default, are 353."""
_AS_FINE = 1.01
"""A level that is coarser by no more than this counts as having the resolution: 0.2527 is 40x, too."""
_MICRONS = {"centimeter": 10_000.0, "inch": 25_400.0}


class SlideTiles(NamedTuple):
    """How the tiles of one slide are read; the same object for all of them."""

    key: str
    """Stands for the slide in shards and logs."""
    size: tuple[float, float]
    """Width and height of a tile in pixels of level 0."""
    pixels: int
    """Width and height of a tile as it is stored."""
    mpp: float
    """Microns per pixel of the tile."""
    level: int
    """The level that is read."""
    stain: tuple[str, tuple[float, ...], tuple[float, ...]] | None = None
    """A `stain.Transform` as a tuple."""
    min_stained: float = 0.0
    """Tiles of which less has the colours of stained tissue (`tissue_fraction`) are dropped."""
    min_sharpness: float = 0.0
    """Tiles with a smaller variance of the Laplacian are dropped."""
    index_only: bool = False
    """The shard gets the place of the tile instead of its pixels."""
    unread: bool = False
    """With index_only: the pixels are not even looked at."""


# -- handles -----------------------------------------------------------------------------------------------------------

_open: OrderedDict[Path, "OpenSlide"] = OrderedDict()
_block_cache: list[Any] = []


def _forget_all() -> None:
    _open.clear()
    _block_cache.clear()


os.register_at_fork(after_in_child=_forget_all)  # two processes must not share the place in a file


def open_slide(path: Path) -> "OpenSlide":
    """The slide, opened at most once while it is among the last MAX_OPEN; raises ValueError that says why not."""
    if path in _open:
        _open.move_to_end(path)
        return _open[path]
    openslide = _openslide()
    if not path.exists():
        raise ValueError("no such file")
    try:
        slide: OpenSlide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        is_unknown = type(error) is openslide.OpenSlideUnsupportedFormatError
        why = "openslide knows no such format" if is_unknown else _without_path(error, path)
        raise ValueError(f"cannot be opened as a slide: {why}") from error
    if not _block_cache:
        _block_cache.append(openslide.OpenSlideCache(CACHE_BYTES))
    slide.set_cache(_block_cache[0])
    while len(_open) >= MAX_OPEN:
        _open.popitem(last=False)[1].close()
    _open[path] = slide
    return slide


def _without_path(error: Exception, path: Path) -> str:
    """Errors go into the logs of training runs, names of slides do not."""
    return str(error).replace(str(path), "the slide").replace(path.name, "the slide")


def _openslide() -> Any:
    return optional_package("openslide", "whole slides need openslide", "slides")


# -- resolution --------------------------------------------------------------------------------------------------------


def microns_per_pixel(
    properties: Mapping[str, str], override: float | None = None, from_objective: bool = False
) -> tuple[float, float]:
    """(x, y) of level 0: the override, else openslide's, else TIFF resolution tags, else (if asked) 10 / objective.

    What no scanner makes counts as nothing said. Raises ValueError that names the remedies if nothing is left.
    """
    if override is not None:
        return override, override
    found = _pair(properties, "openslide.mpp-x", "openslide.mpp-y")
    unit = _MICRONS.get(properties.get("tiff.ResolutionUnit", ""))
    if found is None and unit is not None:
        dots = _pair(properties, "tiff.XResolution", "tiff.YResolution")
        found = dots and (unit / dots[0], unit / dots[1])
    objective = _pair(properties, "openslide.objective-power", "openslide.objective-power")
    if from_objective and objective is not None and (found is None or not _is_plausible(found)):
        found = 10 / objective[0], 10 / objective[1]
    fix = "give --override-mpp, or a column mpp in the table of slides"
    if objective is not None and not from_objective:
        fix += f", or --mpp-from-objective to trust its objective power {objective[0]:g}"
    if found is None:
        raise ValueError(f"its metadata does not say how many microns a pixel is wide; {fix}")
    if not _is_plausible(found):
        raise ValueError(f"its metadata says {found[0]:.4g} microns per pixel, which no scanner makes; {fix}")
    return found


def _is_plausible(mpp: tuple[float, float]) -> bool:
    return all(PLAUSIBLE_MPP[0] <= axis <= PLAUSIBLE_MPP[1] for axis in mpp)


def _pair(properties: Mapping[str, str], *names: str) -> tuple[float, float] | None:
    try:
        x, y = (float(properties[name]) for name in names)
    except (KeyError, ValueError):
        return None
    return (x, y) if all(math.isfinite(value) and value > 0 for value in (x, y)) else None


def choose_level(
    downsamples: Sequence[float], mpp: tuple[float, float], wanted: float, max_upsampling: float = math.inf
) -> int:
    """The coarsest level that is at least as fine as `wanted` microns per pixel, in both axes.

    Only where not even level 0 is so fine, level 0, whose pixels are enlarged. Raises ValueError if that is by more
    than `max_upsampling`.
    """
    coarser = max(mpp)
    fine = [level for level, factor in enumerate(downsamples) if factor * coarser <= wanted * _AS_FINE]
    if fine:
        return max(fine, key=lambda level: downsamples[level])
    if coarser > wanted * max_upsampling:
        raise ValueError(
            f"scanned at {coarser:.4g} microns per pixel, too coarse for --mpp {wanted:g}: pixels would be enlarged "
            f"{coarser / wanted:.3g} times; raise --mpp, or --max-upsampling (now {max_upsampling:g})"
        )
    return 0


def content_bounds(slide: "OpenSlide") -> tuple[int, int, int, int]:
    """x, y, width, height of what was scanned, in pixels of level 0 (MIRAX has wide empty margins)."""
    names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    width, height = slide.dimensions
    try:
        x, y, w, h = (int(slide.properties[name]) for name in names)
    except (KeyError, ValueError):
        return 0, 0, width, height
    return x, y, min(w, width - x), min(h, height - y)


# -- pixels ------------------------------------------------------------------------------------------------------------


def read_area(
    path: Path, corner: tuple[float, float], size: tuple[float, float], pixels: tuple[int, int], level: int
) -> NDArray[np.uint8]:
    """An area of level 0 (x, y; width, height; fractions of pixels too) as (H, W, 3), antialiased, holes in white.

    Where level and area need no resampling, the pixels are the level's own. Raises ValueError if it cannot be read.
    """
    slide = open_slide(path)
    factor = slide.level_downsamples[level]
    start, length = ([value / factor for value in values] for values in (corner, size))
    box = [start[0], start[1], start[0] + length[0], start[1] + length[1]]  # in pixels of the level
    whole = [round(value) for value in box]
    is_copy = np.allclose(box, whole, rtol=0, atol=1e-6) and (whole[2] - whole[0], whole[3] - whole[1]) == pixels
    # Bicubic interpolation looks two pixels of the coarser grid to each side.
    margins = [0 if is_copy else math.ceil(2 * max(length[axis] / pixels[axis], 1)) + 1 for axis in (0, 1)]
    firsts = [max(math.floor(box[axis] + 1e-6) - margins[axis], 0) for axis in (0, 1)]
    limits = [max(edge, first + 1) for edge, first in zip(slide.level_dimensions[level], firsts, strict=True)]
    stops = [min(math.ceil(box[2 + axis] - 1e-6) + margins[axis], limits[axis]) for axis in (0, 1)]
    location = round(firsts[0] * factor), round(firsts[1] * factor)
    read = _read(path, slide, location, level, (stops[0] - firsts[0], stops[1] - firsts[1]))
    if is_copy and read.size == pixels:
        return np.asarray(read)
    left, top = (max(box[axis] - location[axis] / factor, 0.0) for axis in (0, 1))
    right = min(box[2] - location[0] / factor, read.width)
    bottom = min(box[3] - location[1] / factor, read.height)
    return np.asarray(read.resize(pixels, Image.Resampling.BICUBIC, box=(left, top, right, bottom)))


def _read(path: Path, slide: "OpenSlide", location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
    """RGB, with white where nothing was scanned."""
    openslide = _openslide()
    try:
        region = slide.read_region(location, level, size)
    except openslide.OpenSlideError as error:
        _open.pop(path, None)  # after an error a handle refuses everything
        why = _without_path(error, path)
        raise ValueError(f"level {level} cannot be read at x {location[0]}, y {location[1]}: {why}") from error
    if region.getchannel("A").getextrema()[0] == 255:
        return region.convert("RGB")
    white = Image.new("RGB", region.size, "white")
    white.paste(region, mask=region.getchannel("A"))
    return white
