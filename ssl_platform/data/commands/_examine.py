"""What one sample holds: its key, the hash of its contents, its size, a thumbnail, or the reason why it is bad."""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssl_platform.data import media
from ssl_platform.data.commands._jobs import results, sample_jobs
from ssl_platform.data.commands._near_duplicates import THUMBNAIL_SIZE, thumbnail
from ssl_platform.data.commands._options import printable
from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader, reason
from ssl_platform.data.transfer import RemoteError
from ssl_platform.modalities._images import resize, to_float

_ABOUT = ("json", "cls")
"""Members that say something of a sample and are not its data."""
_NOT_MEASURED = ("path", "label", "group", "split")
"""Of the JSON: what is no numeric column."""
_PICTURE_SIDE = 112


def decode_members(members: Mapping[str, bytes]) -> tuple[str, media.Look] | None:
    """Decodes every member that can be: medium and look of the first one, None if there is none; raises ValueError."""
    first = None
    for extension, data in members.items():
        found = decode_member(extension, data)
        first = first or found
    return first


def decode_member(extension: str, data: bytes) -> tuple[str, media.Look] | None:
    """The medium and look of a member; None if it is of no medium, and only counted; raises ValueError if damaged."""
    name = media.medium_of(extension, lambda: data, stored=True)
    return None if name is None else (name, media.look(name, data, extension))


def content_hash(members: Mapping[str, bytes]) -> bytes:
    """16 bytes, the same for the same data, whatever its key, label or kind of file is called."""
    digest = hashlib.blake2b(digest_size=16)
    for extension, data in sorted(members.items()):
        if extension not in _ABOUT:
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.digest()


@dataclass
class Examined:
    """What was found in some samples; arrays and lists are in the order of `samples`."""

    samples: NDArray[np.int64]
    keys: list[str] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Empty for a sample that cannot be read."""
    thumbnails: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, THUMBNAIL_SIZE), np.uint8))
    has_thumbnail: list[bool] = field(default_factory=list)
    numbers: list[dict[str, float]] = field(default_factory=list)
    """Sizes and columns of each; nan where the text of a column is no number."""
    splits: list[str | None] = field(default_factory=list)
    members: dict[str, list[int]] = field(default_factory=dict)
    """{extension: [number of members, bytes, bytes of the smallest, of the largest]}"""
    bad: dict[int, str] = field(default_factory=dict)
    """{sample: reason}"""
    pictures: dict[int, bytes] = field(default_factory=dict)
    """{sample: a small JPEG}"""


def examine(index: Index, samples: NDArray[np.int64], *, pictures: Iterable[int] = (), workers: int) -> Examined:
    """Reads and decodes samples (ascending ids), with pictures of those in `pictures`."""
    wanted = set(pictures)

    def some(job: NDArray[np.int64]) -> Examined:
        return _examine_some(index, job, wanted)

    parts = [
        part
        for _, part in results(
            some, sample_jobs(index, samples), workers=workers, description="reading samples", size=len
        )
    ]
    whole = Examined(samples, thumbnails=np.concatenate([part.thumbnails for part in parts]))
    for part in parts:
        for name in ("keys", "hashes", "has_thumbnail", "numbers", "splits"):
            getattr(whole, name).extend(getattr(part, name))
        whole.bad |= part.bad
        whole.pictures |= part.pictures
        for extension, (count, size, smallest, largest) in part.members.items():
            known = whole.members.setdefault(extension, [0, 0, smallest, largest])
            known[:] = known[0] + count, known[1] + size, min(known[2], smallest), max(known[3], largest)
    return whole


def _examine_some(index: Index, samples: NDArray[np.int64], pictures: set[int]) -> Examined:
    found = Examined(samples, thumbnails=np.zeros((len(samples), THUMBNAIL_SIZE), np.uint8))
    reader = ShardReader(index, cache_shards=1)
    for place, sample in enumerate(samples.tolist()):
        key, data_hash, numbers, split, decoded = f"sample {sample}", b"", dict[str, float](), None, None
        try:
            key, members = reader.read(sample)
            split = _describe_members(members, found.members, numbers)
            data_hash = content_hash(members)
            decoded = decode_members(members)
            if decoded is not None:
                _, look = decoded
                numbers |= look.sizes
                found.thumbnails[place] = thumbnail(look.pixels if look.likeness is None else look.likeness)
                if sample in pictures:
                    found.pictures[sample] = small_jpeg(look.pixels)
        except RemoteError:  # thousands of samples are not bad because their shard is out of reach
            raise
        except Exception as error:  # whatever is wrong with one sample is a line of the report
            found.bad[sample] = printable(reason(error))
            decoded = None
        found.keys.append(printable(key))
        found.hashes.append(data_hash)
        found.has_thumbnail.append(decoded is not None)
        found.numbers.append(numbers)
        found.splits.append(split)
    return found


def _describe_members(
    members: Mapping[str, bytes], totals: dict[str, list[int]], numbers: dict[str, float]
) -> str | None:
    """Adds to the totals of each extension and to the numbers of the sample; the split that its JSON names."""
    numbers["bytes"] = sum(len(data) for extension, data in members.items() if extension not in _ABOUT)
    for extension, data in members.items():
        known = totals.setdefault(extension, [0, 0, len(data), len(data)])
        known[:] = known[0] + 1, known[1] + len(data), min(known[2], len(data)), max(known[3], len(data))
    about = parse_json(members.get("json", b""))
    for name, value in about.items():
        if name not in _NOT_MEASURED and value not in (None, ""):
            numbers[f"column {name}"] = _number(value)
    return str(about["split"]) if about.get("split") else None


def parse_json(data: bytes) -> dict[str, Any]:
    """A `json` member if it is a map; else nothing."""
    try:
        about = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _number(value: Any) -> float:
    """nan for what is none; tables are packed as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def small_jpeg(pixels: Tensor) -> bytes:
    """A picture of an image (C, H, W) for a page: grey, or the first three channels; 16 bits are stretched."""
    image = pixels[:1] if pixels.shape[0] < 3 else pixels[:3]
    if image.dtype != torch.uint8:
        image = to_float(image)
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    height, width = image.shape[1:]
    scale = _PICTURE_SIDE / max(height, width)
    image = resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    if image.dtype != torch.uint8:
        image = (image * 255).round().to(torch.uint8)
    array = image.permute(1, 2, 0).numpy()  # (H, W, C)
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, format="JPEG", quality=85)
    return file.getvalue()
