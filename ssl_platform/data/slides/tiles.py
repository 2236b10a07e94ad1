"""The pixels of one tile of a slide, when shards are packed and when they are read from the slide while training."""

import io
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_platform.data.identity import lookup_folder
from ssl_platform.data.index_files import read_description
from ssl_platform.data.slides import stain
from ssl_platform.data.slides.checks import sharpness
from ssl_platform.data.slides.reading import SlideTiles, read_area
from ssl_platform.data.tars import Record, write_json
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


def resolved(record: Record, shard: object) -> Record:
    """A record as a reader wants it: of a tile that still lies in its slide, with its pixels as the member "npy".

    `shard` is where the record lies. Raises ValueError, without the name of the slide, if they cannot be read.
    """
    if REFERENCE not in record.members:
        return record
    if not isinstance(shard, Path):
        raise ValueError("made with --index-only, which only finds its slides where it lies in a folder, not at a URL")
    folder, members = shard.parent, dict(record.members)
    place = json.loads(members.pop(REFERENCE))
    path, tiles = _slides(folder, _modified(folder))[place["slide"]]
    file = io.BytesIO()
    np.save(file, read_tile(path, (place["x"], place["y"]), tiles))
    return Record(record.key, {**members, "npy": file.getvalue()})


def join_tables(folders: Iterable[Path], out: Path) -> None:
    """Lets tiles of index-only shards that were copied from `folders` to `out` find their slides from there.

    Raises ValueError if two folders read the same slide in different ways, or one cannot find its own.
    """
    reads: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for folder in folders:
        packed = (read_description(folder) or {}).get("packed", {})
        if not (folder / REPORT).exists() or not packed.get("slides.index_only", True):  # its shards hold pixels
            continue
        _modified(folder)  # says what is missing
        found = json.loads((folder / REPORT).read_text(encoding="utf-8"))["slides"]
        for key, path in json.loads(_lookup(folder).read_text(encoding="utf-8")).items():
            if key not in found:  # a slide of other parts or splits
                continue
            read = {"read": found[key]["read"]}
            if reads.setdefault(key, read) != read or paths.setdefault(key, path) != path:
                raise ValueError(
                    f"{folder}: reads slide {key} in another way or place than another input, and shards made with "
                    "--index-only have one for each slide; leave them apart and give data.shards the list"
                )
    if paths:
        write_json(out / REPORT, {"format": 1, "slides": reads})
        lookup_folder(out).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(lookup_folder(out) / PATHS, paths)


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
    own, above = (lookup_folder(place) / PATHS for place in (folder, folder.parent))
    return above if above.exists() and not own.exists() else own


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
