"""The pixels of one tile of a slide, when shards are packed and when they are read from the slide while training."""

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_platform.data.identity import lookup_folder
from ssl_platform.data.slides import stain
from ssl_platform.data.slides.checks import sharpness
from ssl_platform.data.slides.reading import SlideTiles, read_area
from ssl_platform.data.tars import Record
from ssl_platform.modalities.pathology import tissue_fraction

REFERENCE = "tile"
"""The extension of the member that says where a tile lies, in shards without pixels."""
REPORT, PATHS = "slides.json", "slides.json"
"""In the folder of the shards, how tiles are read; in the look-up folder beside it, where the slides are."""


class Unwanted(ValueError):
    """A tile that is good, but not what was asked for; the text is the check that it fails."""


def read_tile(path: Path, corner: tuple[int, int], tiles: SlideTiles) -> NDArray[np.uint8]:
    """(3, tile, tile), normalised if asked for; raises ValueError if the slide cannot be read."""
    pixels = read_area(path, corner, tiles.size, (tiles.pixels, tiles.pixels), tiles.level)
    if tiles.stain is not None:
        pixels = stain.normalized(pixels, stain.Transform(*tiles.stain))
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def wanted_tile(path: Path, corner: tuple[int, int], tiles: SlideTiles) -> NDArray[np.uint8]:
    """The same, checked; raises Unwanted with the check that it fails."""
    pixels = read_tile(path, corner, tiles)
    if tiles.min_stained > 0 and tissue_fraction(torch.from_numpy(pixels)) < tiles.min_stained:
        raise Unwanted("too few stained pixels")
    if tiles.min_sharpness > 0 and sharpness(pixels) < tiles.min_sharpness:
        raise Unwanted("blurred")
    return pixels


def about(tiles: SlideTiles) -> dict[str, Any]:
    """What a sample's `json` says of its tile besides the place."""
    return {"slide": tiles.key, "level": tiles.level, "mpp": tiles.mpp}


def reference(corner: tuple[int, int], tiles: SlideTiles) -> bytes:
    """What a shard without pixels holds of a tile."""
    return json.dumps({"slide": tiles.key, "x": corner[0], "y": corner[1]}).encode()


def with_pixels(record: Record, shard: object) -> Record:
    """The record of a tile that still lies in its slide, with its pixels as the member "npy".

    `shard` is where the record lies. Raises ValueError, without the name of the slide, if they cannot be read.
    """
    if not isinstance(shard, Path):
        raise ValueError("made with --index-only, which only finds its slides where it lies in a folder, not at a URL")
    folder, members = shard.parent, dict(record.members)
    place = json.loads(members.pop(REFERENCE))
    path, tiles = _slides(folder, _modified(folder))[place["slide"]]
    file = io.BytesIO()
    np.save(file, read_tile(path, (place["x"], place["y"]), tiles))
    return Record(record.key, {**members, "npy": file.getvalue()})


def _modified(folder: Path) -> tuple[int, ...]:
    paths = folder / REPORT, _lookup(folder)
    try:
        return tuple(path.stat().st_mtime_ns for path in paths)
    except OSError as error:
        raise ValueError(
            f"{error.filename}: {error.strerror}; shards made with --index-only need it to find their slides: "
            "run the ssl-pack command again, or copy it from where they were made"
        ) from error


def _lookup(folder: Path) -> Path:
    """The table of paths; shards of a split lie in a folder of the one that it belongs to."""
    own = lookup_folder(folder) / PATHS
    return own if own.exists() else lookup_folder(folder.parent) / PATHS


@lru_cache(maxsize=16)
def _slides(folder: Path, _: tuple[int, ...]) -> dict[str, tuple[Path, SlideTiles]]:
    paths = json.loads(_lookup(folder).read_text(encoding="utf-8"))
    found = {}
    for key, about in json.loads((folder / REPORT).read_text(encoding="utf-8"))["slides"].items():
        read: dict[str, Any] = about["read"]
        found_stain = read["stain"]
        chosen = None if found_stain is None else (found_stain[0], tuple(found_stain[1]), tuple(found_stain[2]))
        found[key] = (
            Path(paths[key]),
            SlideTiles(key, tuple(read["size"]), read["pixels"], read["mpp"], read["level"], chosen),
        )
    return found
