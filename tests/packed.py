"""Shards for the tests of ssl-pack's commands, small and made by tarfile alone."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_platform.data.index import Index
from ssl_platform.data.pack import main
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.tars import Record
from ssl_platform.modalities._images import decode_image

Members = Mapping[str, bytes]


def ssl_pack(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def pattern(seed: int, side: int = 32) -> np.ndarray[Any, Any]:
    """(side, side, 3): a smooth picture unlike those of other seeds."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC))


def image_bytes(pixels: np.ndarray[Any, Any], kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format={"jpg": "jpeg"}.get(kind, kind), **options)
    return file.getvalue()


def sample(seed: int, label: int | str | None = None, group: int | str | None = None, **columns: Any) -> Members:
    return {
        "png": image_bytes(pattern(seed)),
        "json": json.dumps({"label": label, "group": group, **columns}).encode(),
    }


def write_tar(path: Path, samples: Sequence[tuple[str, Members]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def records(*paths: Path) -> list[Record]:
    reader = ShardReader(Index.open(list(paths)), cache_shards=4)
    return [reader.read(number) for number in range(len(reader.index))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def packed_images(folder: Path) -> list[tuple[dict[str, Any], np.ndarray[Any, Any]]]:
    """(json, pixels (C, H, W)) of each sample, in the order of the shards."""
    found = []
    for record in records(folder):
        (extension,) = set(record.members) - {"json", "cls"}
        found.append((json.loads(record.members["json"]), decode_image(record.members[extension], extension).numpy()))
    return found
