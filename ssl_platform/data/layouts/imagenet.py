"""ImageNet (ILSVRC2012), and any set of images in folders of classes with folders of splits above them.

    DIR/train/n01440764/n01440764_10026.JPEG      DIR/val/n01440764/ILSVRC2012_val_00000293.JPEG

DIR may also be the folder that Kaggle's archive makes (DIR/ILSVRC/Data/CLS-LOC/train/..., val/ without folders and
DIR/LOC_val_solution.csv), or hold the classes' folders themselves, without splits. The label is the class's folder. A test
folder without classes is packed without labels.

    ssl-pack imagenet ILSVRC2012 shards --workers 16          # shards/train and shards/val
"""

import argparse
from pathlib import Path

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import missing
from ssl_platform.data.sources import folder_items
from ssl_platform.data.tables import read_table

_SPLITS = ("train", "val", "valid", "validation", "test")


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The images of each split, labelled by their folder; raises ValueError if there are no folders of classes."""
    data = folder / "ILSVRC" / "Data" / "CLS-LOC"
    root = data if data.is_dir() else folder
    splits = [name for name in _SPLITS if (root / name).is_dir()]
    if not splits and not any(path.is_dir() for path in root.iterdir()):
        raise missing(folder, ["train/", "val/"], "imagenet")
    found = [
        item._replace(split=split or None, name=f"{split}/{item.name}" if split else item.name)
        for split in splits or [""]
        for item in folder_items(root / split, labels=True, medium="image")
    ]
    solution = folder / "LOC_val_solution.csv"
    return _labelled(found, solution) if solution.is_file() else found


def _labelled(found: list[Item], solution: Path) -> list[Item]:
    """The images of val without folders get their class from Kaggle's table: "n01751748 111 108 ..." by ImageId."""
    classes = {}
    for line, row in read_table(solution, ("ImageId", "PredictionString")):
        if not row["PredictionString"]:
            raise ValueError(f"{solution}: line {line}: PredictionString is empty, expected a class first")
        classes[row["ImageId"]] = row["PredictionString"].split()[0]
    if unknown := [
        item.name for item in found if item.label is None and item.split == "val" and item.path.stem not in classes
    ]:
        raise ValueError(f"{solution}: says no class of {unknown[0]} and {len(unknown) - 1} more")
    return [
        item._replace(label=classes[item.path.stem]) if item.label is None and item.split == "val" else item
        for item in found
    ]
