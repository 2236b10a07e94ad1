"""From slides to the items that ssl-pack packs: every slide is planned once, by several processes, and remembered."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ssl_platform.data.items import Item
from ssl_platform.data.processes import parallel
from ssl_platform.data.slides.listing import SlideRow
from ssl_platform.data.slides.preview import shows, write_preview
from ssl_platform.data.slides.reading import SlideTiles
from ssl_platform.data.slides.tiling import Options, SlidePlan, dumped, loaded, plan_slide
from ssl_platform.data.tars import atomic_file

logger = logging.getLogger(__name__)

FORMAT = 1
RULES = 2
"""Rises when the same options choose other tiles: what an earlier version remembers is then planned again."""
PLANS = ".slides"
"""The folder in OUT that remembers the plans; hidden, and free to be deleted."""


class TileChecks(NamedTuple):
    """What is decided when a tile's pixels are read."""

    min_stained: float = 0.0
    min_sharpness: float = 0.0
    index_only: bool = False
    unread: bool = False


def plan_slides(
    rows: Sequence[SlideRow],
    options: Options,
    out: Path,
    *,
    workers: int = 1,
    previews: Path | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[SlidePlan]:
    """The plan of each slide, in order; those that an earlier run made of the same file and options are kept.

    Parts of an array begin at different slides, and what one has looked at the others find when they come to it.
    """
    (out / PLANS).mkdir(parents=True, exist_ok=True)
    if previews is not None:
        previews.mkdir(parents=True, exist_ok=True)
    work = partial(_remembered, options=options, folder=out / PLANS, previews=previews)
    first = len(rows) * part[0] // part[1]
    rows = [*rows[first:], *rows[:first]]
    plans: list[SlidePlan] = []
    said = begun = time.monotonic()
    for row, plan in parallel(work, rows, workers, in_order=True):
        plans.append(plan)
        for reason in (plan.failed, plan.left_out):
            if reason:
                logger.warning("left out: %s: %s", row.name, reason)
        for note in plan.notes:
            logger.warning("%s: %s", row.name, note)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            rate = len(plans) / (said - begun)
            left = (len(rows) - len(plans)) / rate / 60
            logger.info(
                "%d of %d slides looked at, %.1f a second, %.0f minutes left", len(plans), len(rows), rate, left
            )
    return [*plans[len(rows) - first :], *plans[: len(rows) - first]]


def _remembered(row: SlideRow, options: Options, folder: Path, previews: Path | None) -> SlidePlan:
    digest = _digest(row, options)
    path = folder / f"{digest}.json"
    picture = previews / f"{row.key}.png" if previews is not None else None
    if path.exists() and (picture is None or shows(picture, digest)):
        try:
            return loaded(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("%s: cannot be read (%s), so the slide is looked at again", path, error)
    plan, mask = plan_slide(row, options)
    if picture is not None and mask is not None:
        write_preview(picture, plan, mask, digest)
    if not plan.failed:  # which may be mended by the next time
        with atomic_file(path) as file:
            file.write(dumped(plan).encode())
    return plan


def _digest(row: SlideRow, options: Options) -> str:
    """Changes with the slide's file, its regions' files, and all that was asked for."""
    files = [row.path, *(path for _, path in row.regions)]
    states = [(state.st_size, state.st_mtime_ns) for file in files if (state := _state(file))]
    text = repr(
        (FORMAT, RULES, row.key, row.name, row.mpp, [kind for kind, _ in row.regions], row.outside, states, options)
    )
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def _state(path: Path) -> os.stat_result | None:
    return path.stat() if path.exists() else None


def items(rows: Sequence[SlideRow], plans: Sequence[SlidePlan], options: Options, later: TileChecks) -> list[Item]:
    """One item for each tile; its group is the slide's, which is the slide itself where no patient is known."""
    found = []
    for row, plan in zip(rows, plans, strict=True):
        tiles = _tiles(plan, options, later)
        group = row.name if row.group is None else row.group
        labels: Sequence[int | str | None] = plan.labels or [row.label] * len(plan.corners)
        found += [
            Item(row.path, row.name, label, group, row.columns, corner, row.split, "slide", tiles)
            for corner, label in zip(plan.corners, labels, strict=True)
        ]
    return found


def _tiles(plan: SlidePlan, options: Options, later: TileChecks) -> SlideTiles:
    return SlideTiles(
        key=plan.key,
        size=plan.size,
        pixels=options.tile,
        mpp=options.mpp,
        level=plan.level,
        stain=None if plan.stain is None else (plan.stain[0], tuple(plan.stain[1]), tuple(plan.stain[2])),
        **later._asdict(),
    )


def report(plans: Sequence[SlidePlan], options: Options, later: TileChecks) -> dict[str, Any]:
    """What `slides.json` says: of each slide its resolution, its tiles, what was dropped and how its tiles are read."""
    slides = {}
    for plan in plans:
        about = {
            "mpp": plan.mpp,
            "places": plan.places,
            "tiles": len(plan.corners),
            "dropped": plan.dropped,
            "left_out": plan.left_out or "cannot be used" * bool(plan.failed),  # reasons may hold names of files
            "notes": plan.notes,
        }
        tiles = _tiles(plan, options, later)._asdict()
        about |= {"read": {name: tiles[name] for name in ("size", "pixels", "mpp", "level", "stain")}}
        slides[plan.key] = about
    written: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "slides": slides}))
    return written
