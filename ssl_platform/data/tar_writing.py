"""Makes one shard of a pack: reads its inputs, checks that each decodes, and writes them as WebDataset members."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image

from ssl_platform.data.sources import Item, read_image
from ssl_platform.data.tars import ShardScan, atomic_file, scan_shard, shown
from ssl_platform.modalities._images import decode_image
from ssl_platform.modalities.pathology import tissue_fraction

Pixels = NDArray[Any]


class Numbered(NamedTuple):
    """An item with what the whole plan decides."""

    key: str
    item: Item
    label: int


@dataclass
class Shard:
    """What is known of a finished shard besides the tar itself."""

    bytes: int = 0
    samples: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    """By the number of channels, as text."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Of the pixel values in [0, 1], of each channel."""
    squares: dict[str, list[float]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    """One line for each input that was left out: path, reason."""
    without_tissue: int = 0
    inputs: str = ""
    """Sizes and times of the files that it was made from, as a digest."""


class Job(NamedTuple):
    """One shard to be made."""

    path: Path
    samples: list[Numbered]
    tile: int
    min_tissue: float
    done: Shard | None


def make_shard(job: Job) -> tuple[Shard, ShardScan]:
    """Writes a shard, unless it is there, whole, made from the inputs as they are and nothing was left out of it."""
    if job.done is not None and _is_current(job, job.done):
        scan = scan_shard(job.path)
        if len(scan.starts) == job.done.samples:
            return job.done, scan
    shard = Shard(inputs=_inputs(job))
    with (
        atomic_file(job.path) as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar,
    ):
        for sample in job.samples:
            try:
                _check_name(sample.item.name)
                data, extension, pixels = _load(sample.item, job.tile)
                enough = job.min_tissue <= 0 or tissue_fraction(torch.from_numpy(pixels)) >= job.min_tissue
            except (OSError, ValueError) as error:
                shard.unreadable.append(f"{shown(sample.item.name)}: {getattr(error, 'strerror', None) or error}")
                continue
            if not enough:
                shard.without_tissue += 1
                continue
            tar.write(_members(sample, extension, data))
            _count(shard, pixels)
    scan = scan_shard(job.path)
    assert len(scan.starts) == shard.samples, f"{job.path}: {len(scan.starts)} samples written, not {shard.samples}"
    shard.bytes = scan.size
    return shard, scan


def _is_current(job: Job, done: Shard) -> bool:
    whole = job.path.is_file() and job.path.stat().st_size == done.bytes
    kinds = done.sums, done.squares
    adds_up = all(kind.keys() == done.pixels.keys() for kind in kinds) and all(
        str(len(values)) == channels for kind in kinds for channels, values in kind.items()
    )
    return whole and adds_up and not done.unreadable and _inputs(job) == done.inputs


def _inputs(job: Job) -> str:
    """Changes whenever a file does, an older copy put in its place included; missing files have no size."""
    digest = hashlib.blake2b(digest_size=16)
    for path in dict.fromkeys(sample.item.path for sample in job.samples):
        found = path.stat() if path.exists() else None
        digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode() if found else b"- ")
    return digest.hexdigest()


def _check_name(name: str) -> None:
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError("its name is not valid UTF-8; rename it")


def _load(item: Item, tile: int) -> tuple[bytes, str, Pixels]:
    """The bytes to store, their extension, and the pixels (C, H, W) in them; raises ValueError or OSError if bad."""
    if item.corner is None:
        data, extension = item.path.read_bytes(), item.path.suffix[1:].lower()
        return data, extension, decode_image(data, extension).numpy()
    image = read_image(item.path)
    x, y = item.corner
    pixels = image[:, y : y + tile, x : x + tile]
    if pixels.shape[1:] != (tile, tile):
        size = f"{image.shape[2]} x {image.shape[1]}"
        raise ValueError(f"a tile of {tile} pixels at x {x}, y {y} is not inside the image, which has {size}")
    data, extension = encode(pixels)
    return data, extension, pixels


def encode(pixels: Pixels) -> tuple[bytes, str]:
    """Pixels (C, H, W) as PNG, or as NumPy array where PNG has no such pixels (5 channels, several of 16 bits)."""
    file = io.BytesIO()
    channels_last = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))  # (H, W, C)
    if pixels.shape[0] == 1:
        channels_last = channels_last[..., 0]
    if pixels.shape[0] > 4 or (pixels.dtype != np.uint8 and pixels.shape[0] > 1):
        np.save(file, np.ascontiguousarray(pixels))
        return file.getvalue(), "npy"
    Image.fromarray(channels_last).save(file, format="PNG")
    return file.getvalue(), "png"


def _members(sample: Numbered, extension: str, data: bytes) -> dict[str, Any]:
    """The sample as WebDataset wants it: the bytes, `json` with all that is known, `cls` with the label's number."""
    item = sample.item
    about = {"path": item.name, **dict(item.columns), "label": item.label, "group": item.group}
    if item.corner is not None:
        about |= {"x": item.corner[0], "y": item.corner[1]}
    members: dict[str, Any] = {"__key__": sample.key, extension: data, "json": json.dumps(about).encode()}
    if sample.label >= 0:
        members["cls"] = str(sample.label).encode()
    return members


def _count(shard: Shard, pixels: Pixels) -> None:
    values = pixels.reshape(len(pixels), -1).astype(np.float64)  # (C, H W)
    values /= np.iinfo(pixels.dtype).max
    channels = str(len(pixels))
    nothing = [0.0] * len(pixels)
    shard.samples += 1
    shard.pixels[channels] = shard.pixels.get(channels, 0) + values.shape[1]
    for total, added in ((shard.sums, values.sum(axis=1)), (shard.squares, np.square(values).sum(axis=1))):
        total[channels] = (np.array(total.get(channels, nothing)) + added).tolist()


def statistics(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Mean and std of each channel over all pixels of all shards; None if images differ in their number of channels."""
    kinds = {channels for shard in shards for channels in shard.pixels}
    if len(kinds) != 1:
        return None
    (channels,) = kinds
    filled = [shard for shard in shards if shard.samples]
    pixels = sum(shard.pixels[channels] for shard in filled)
    mean = np.sum([shard.sums[channels] for shard in filled], axis=0) / pixels  # (C,)
    variance = np.sum([shard.squares[channels] for shard in filled], axis=0) / pixels - np.square(mean)
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist(), "pixels": pixels}
