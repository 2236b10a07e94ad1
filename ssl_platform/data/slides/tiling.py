"""Where the tiles of one slide lie, and why its other places have none."""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.order import generator
from ssl_platform.data.reading import reason
from ssl_platform.data.slides import checks, regions, stain
from ssl_platform.data.slides.listing import SlideRow
from ssl_platform.data.slides.reading import choose_level, content_bounds, microns_per_pixel, open_slide, read_area

logger = logging.getLogger(__name__)

CHECKS = ("too little tissue", "ink", "outside the included regions", "in excluded regions", "above the cap")
MOST_MASK_PIXELS = 200_000_000
"""A whole glass of 26 x 76 mm has 31 million at 8 microns; a small file can claim any size."""
MOST_BEYOND = 0.1
"""Of the area of regions: hands slip across the border of a slide."""
_MASK_BLOCK = 512
"""Pixels of the mask that are read at a time."""


class Options(NamedTuple):
    """Which tiles are wanted; the help of the command has the same words."""

    mpp: float = 0.5
    tile: int = 224
    stride: int = 224
    override_mpp: float | None = None
    mpp_from_objective: bool = False
    max_upsampling: float = 1.1
    mask_mpp: float = 8.0
    saturation: tuple[float, float] = (10.0, 40.0)
    """Of 255: Otsu's threshold is held inside."""
    closing: float = 40.0
    """Microns."""
    min_tissue: float = 0.5
    max_ink: float = 0.05
    ink_saturation: float = checks.INK_SATURATION
    ink_black: float = checks.BLACK_VALUE
    include_share: float = 0.5
    exclude_share: float = 0.1
    label_share: float = 0.5
    uncropped_geojson: bool = False
    max_tiles: int | None = None
    stain: str = "none"
    stain_tiles: int = 16
    seed: int = 0


@dataclass
class SlidePlan:
    """The tiles of one slide; all of it goes into a JSON file."""

    key: str
    mpp: tuple[float, float] = (0, 0)
    """Of level 0."""
    level: int = 0
    size: tuple[float, float] = (0, 0)
    """Width and height of a tile, in pixels of level 0."""
    corners: list[tuple[int, int]] = field(default_factory=list)
    """x, y in pixels of level 0, row by row."""
    labels: list[str | None] = field(default_factory=list)
    """By GeoJSON; empty if none was given."""
    places: int = 0
    """Tiles of the full grid."""
    dropped: dict[str, int] = field(default_factory=dict)
    stain: list[Any] | None = None
    notes: list[str] = field(default_factory=list)
    left_out: str = ""
    """Why there is no tile, although the slide can be read."""
    failed: str = ""
    """Why the slide cannot be used."""


class Mask(NamedTuple):
    """A slide at low resolution."""

    image: NDArray[np.uint8]
    """(H, W, 3)"""
    tissue: checks.Mask
    ink: checks.Mask
    threshold: float
    origin: tuple[int, int]
    scale: tuple[float, float]
    """Pixels of level 0 for one of the mask."""

    def boxes(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Boxes (N, 4) of level 0 in pixels of the mask."""
        placed: NDArray[np.float64] = (boxes - np.tile(self.origin, 2)) / np.tile(self.scale, 2)
        return placed


def plan_slide(row: SlideRow, options: Options) -> tuple[SlidePlan, Mask | None]:
    """The tiles of a slide, and its mask for a picture; what is wrong with it stands in the plan, nothing is raised."""
    plan = SlidePlan(row.key)
    try:
        return plan, _plan(plan, row, options)
    except Exception as error:  # whatever one slide makes a library raise must not end the run
        plan.corners, plan.labels = [], []
        plan.failed = reason(error)
        return plan, None


def _plan(plan: SlidePlan, row: SlideRow, options: Options) -> Mask:
    slide = open_slide(row.path)
    override = row.mpp or options.override_mpp
    plan.mpp = microns_per_pixel(slide.properties, override, options.mpp_from_objective)
    plan.level = choose_level(slide.level_downsamples, plan.mpp, options.mpp, options.max_upsampling)
    if max(plan.mpp) > options.mpp * 1.01:
        plan.notes.append(f"pixels are enlarged {max(plan.mpp) / options.mpp:.3g} times")
    plan.size = (options.tile * options.mpp / plan.mpp[0], options.tile * options.mpp / plan.mpp[1])
    boxes = grid(content_bounds(slide), plan, options)
    plan.places = len(boxes)
    if not len(boxes):
        plan.left_out = f"smaller than one tile of {options.tile} pixels at {options.mpp:g} microns"
        return read_mask(row.path, plan.mpp, options)
    mask = read_mask(row.path, plan.mpp, options)
    kept = _checked(plan, row, options, boxes, mask)
    chosen = np.flatnonzero(kept)
    if options.max_tiles is not None and len(chosen) > options.max_tiles:
        plan.dropped["above the cap"] = len(chosen) - options.max_tiles
        rng = generator("slide tiles", options.seed, row.name)
        chosen = np.sort(rng.choice(chosen, options.max_tiles, replace=False))
    plan.corners = [(int(x), int(y)) for x, y in boxes[chosen, :2].tolist()]
    if not plan.corners:
        why = ", ".join(f"{count} {check}" for check, count in plan.dropped.items() if count)
        plan.left_out = f"no tile of {plan.places} is kept: {why}"
        return mask
    if path := dict(row.regions).get("labels"):
        areas = _areas(plan, row, options, "labels", path)
        if row.outside is not None:
            areas[row.outside] = regions.outside(areas, boxes)
        plan.labels = list(regions.labels(areas, boxes[chosen], options.label_share))
    if options.stain != "none":
        _measure_stain(plan, row, options)
    return mask


def grid(bounds: tuple[int, int, int, int], plan: SlidePlan, options: Options) -> NDArray[np.float64]:
    """(N, 4): x0, y0, x1, y1 at level 0 of all tiles inside the bounds, row by row; corners are whole pixels."""
    starts = []
    for axis in (0, 1):
        step = options.stride * options.mpp / plan.mpp[axis]
        number = np.arange(int((bounds[2 + axis] - plan.size[axis] + 1e-6) / step + 1 + 1e-9) + 1)
        places = np.rint(number * step)
        starts.append(bounds[axis] + places[places + plan.size[axis] <= bounds[2 + axis] + 0.5])
    x, y = (values.ravel() for values in np.meshgrid(*starts))
    return np.stack([x, y, x + plan.size[0], y + plan.size[1]], axis=1)


def _checked(
    plan: SlidePlan, row: SlideRow, options: Options, boxes: NDArray[np.float64], mask: Mask
) -> NDArray[np.bool_]:
    """Which tiles pass; the others are counted by the first check that they fail."""
    placed = mask.boxes(boxes)
    verdicts = {
        "ink": checks.shares(mask.ink, placed) > options.max_ink,
        "too little tissue": checks.shares(mask.tissue, placed) < max(options.min_tissue - 1e-9, 0),
    }
    for kind, path in row.regions:
        if kind == "labels":
            continue
        areas = _areas(plan, row, options, kind, path)
        share = regions.region_shares(regions.union(areas), boxes)
        if kind == "include":
            verdicts["outside the included regions"] = share < options.include_share
        else:
            verdicts["in excluded regions"] = share > options.exclude_share
    kept = np.ones(len(boxes), dtype=bool)
    for check, fails in verdicts.items():
        plan.dropped[check] = int((kept & fails).sum())
        kept &= ~fails
    return kept


def _areas(plan: SlidePlan, row: SlideRow, options: Options, kind: str, path: Path) -> dict[str, Any]:
    """The regions of a file; that it can hardly be this slide's is noted, without its name: notes are shared."""
    areas = regions.read_regions(path, _geojson_origin(row, options))
    width, height = open_slide(row.path).dimensions
    verb = kind.removesuffix("s")
    if not areas:
        plan.notes.append(f"the file of its regions to {verb} has no Polygon or MultiPolygon, so there is none")
    elif (share := regions.share_beyond(areas, (width, height))) > MOST_BEYOND:
        plan.notes.append(
            f"{100 * share:.0f} % of its regions to {verb} lie outside of its {width} x {height} pixels: were they drawn "
            "on another slide, or in other units than pixels of level 0?"
        )
    return areas


def _geojson_origin(row: SlideRow, options: Options) -> tuple[float, float]:
    """QuPath counts from the corner of what was scanned, unless the slide was opened with --no-crop."""
    if options.uncropped_geojson:
        return 0, 0
    x, y, _, _ = content_bounds(open_slide(row.path))
    return x, y


def read_mask(path: Path, mpp: tuple[float, float], options: Options) -> Mask:
    """The slide at about `mask_mpp` microns per pixel, block by block, with its tissue and ink."""
    slide = open_slide(path)
    left, top, width, height = content_bounds(slide)
    wanted = max(options.mask_mpp, *mpp)
    level = choose_level(slide.level_downsamples, mpp, wanted)
    columns, rows = (max(round(extent * own / wanted), 1) for extent, own in zip((width, height), mpp, strict=True))
    if rows * columns > MOST_MASK_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels of {mpp[0]:.3g} microns: its mask would have {rows * columns / 1e6:.0f} million "
            f"pixels; raise --mask-mpp (now {options.mask_mpp:g}), or mend its microns with --override-mpp"
        )
    scale = width / columns, height / rows
    image = np.empty((rows, columns, 3), np.uint8)
    for y in range(0, rows, _MASK_BLOCK):
        for x in range(0, columns, _MASK_BLOCK):
            w, h = min(_MASK_BLOCK, columns - x), min(_MASK_BLOCK, rows - y)
            corner, size = (left + x * scale[0], top + y * scale[1]), (w * scale[0], h * scale[1])
            image[y : y + h, x : x + w] = read_area(path, corner, size, (w, h), level)
    ink = checks.ink_mask(image, options.ink_saturation, options.ink_black)
    tissue, threshold = checks.tissue_mask(image, ink, options.saturation, round(options.closing / wanted))
    return Mask(image, tissue, ink, threshold, (left, top), scale)


def _measure_stain(plan: SlidePlan, row: SlideRow, options: Options) -> None:
    rng = generator("slide stain", options.seed, row.name)
    chosen = rng.choice(len(plan.corners), min(options.stain_tiles, len(plan.corners)), replace=False)
    tiles = [
        read_area(row.path, plan.corners[place], plan.size, (options.tile, options.tile), plan.level)
        for place in sorted(chosen.tolist())
    ]
    try:
        plan.stain = list(stain.measure(np.concatenate([tile.reshape(-1, 3) for tile in tiles]), options.stain))
    except ValueError as error:
        plan.notes.append(f"its stain is not normalised: {error}")


def dumped(plan: SlidePlan) -> str:
    return json.dumps(vars(plan))


def loaded(text: str) -> SlidePlan:
    """The inverse of `dumped`."""
    found = json.loads(text)
    for name in ("mpp", "size"):
        found[name] = tuple(found[name])
    found["corners"] = [tuple(corner) for corner in found["corners"]]
    return SlidePlan(**found)


def total_dropped(plans: list[SlidePlan]) -> dict[str, int]:
    """By check, over all slides."""
    total: Counter[str] = Counter()
    for plan in plans:
        total.update(plan.dropped)
    return {check: total[check] for check in CHECKS if check in total}
