"""ModelNet40 or ModelNet10 (Princeton): meshes of 40 or 10 classes, or the points that PointNet++ drew from them.

    DIR/airplane/train/airplane_0001.off      DIR/airplane/test/airplane_0627.off
or, as modelnet40_normal_resampled is unpacked,
    DIR/airplane/airplane_0001.txt            x, y, z and a normal, 10,000 rows
    DIR/modelnet40_train.txt, modelnet40_test.txt, modelnet40_shape_names.txt

The label is the class. Of a mesh --points are drawn from its surface, by area, the same for the same file; the resampled
points are stored as they are, with their normals. The first line of some meshes, "OFF490 518 0", is read as it is meant.

    pip install 'ssl-platform[points]'
    ssl-pack modelnet40 ModelNet40 shards --workers 16
    ssl-pack modelnet40 modelnet40_normal_resampled shards
"""

import argparse
from pathlib import Path
from typing import Any

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import add_num_points, missing
from ssl_platform.data.media import points

_SPLITS = ("train", "test")


def add_arguments(parser: Any) -> None:
    add_num_points(parser)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"points": arguments.points}


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The shapes of both splits; raises ValueError if neither layout is there."""
    for classes in (40, 10):
        if any((folder / f"modelnet{classes}_{split}.txt").is_file() for split in _SPLITS):
            return _resampled(folder, f"modelnet{classes}")
    meshes = [path for split in _SPLITS for path in folder.glob(f"*/{split}/*.off")]
    if not meshes:
        raise missing(folder, ["CLASS/train/*.off", "CLASS/test/*.off", "modelnet40_train.txt"], "modelnet40")
    points.import_trimesh()
    return [
        Item(
            path,
            path.relative_to(folder).as_posix(),
            label=path.parts[-3],
            split=path.parts[-2],
            medium="points",
            part=(arguments.points,),
        )
        for path in sorted(meshes)
    ]


def _resampled(folder: Path, prefix: str) -> list[Item]:
    """The clouds that the lists name; a class is what precedes the number: night_stand_0001 is a night_stand."""
    classes = _lines(folder / f"{prefix}_shape_names.txt")
    found = []
    for split in _SPLITS:
        path = folder / f"{prefix}_{split}.txt"
        for name in _lines(path):
            label, _, number = name.rpartition("_")
            if label not in classes or not number.isdecimal():
                raise ValueError(f"{path}: '{name}' is no class of {prefix}_shape_names.txt with a number")
            file = f"{label}/{name}.txt"
            found.append(Item(folder / file, file, label=label, split=split, medium="points"))
    return found


def _lines(path: Path) -> dict[str, None]:
    """The lines that say something, each once, in their order."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; it is part of the layout of modelnet40") from error
    return dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
