"""Kather-100K (NCT-CRC-HE-100K, CRC-VAL-HE-7K): tiles of colorectal tissue in nine classes.

    DIR/NCT-CRC-HE-100K/ADI/ADI-AAAMHQMK.tif      DIR/CRC-VAL-HE-7K/ADI/ADI-TCGA-AAICEQFN.tif

NCT-CRC-HE-100K, or NCT-CRC-HE-100K-NONORM (colours not normalised), is the split train and CRC-VAL-HE-7K, of other
patients, the split val. DIR may also be one of these folders itself, without splits. The label is the class's folder:
ADI, BACK, DEB, LYM, MUC, MUS, NORM, STR or TUM. Patients are not known, so there are no groups.

    ssl-pack kather100k kather shards --workers 16          # shards/train and shards/val
"""

import argparse
import logging
from pathlib import Path

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import missing
from ssl_platform.data.sources import folder_items

logger = logging.getLogger(__name__)

CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
_TRAIN, _VAL = ("NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"), "CRC-VAL-HE-7K"


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The tiles, labelled by their folder; raises ValueError if one of the nine classes is missing or empty."""
    train = [name for name in _TRAIN if (folder / name).is_dir()]
    if len(train) > 1:
        raise ValueError(f"{folder}: holds {train[0]} and {train[1]}, the same tiles twice; give one of them as DIR")
    parts = train + [_VAL] * (folder / _VAL).is_dir()
    if not parts:
        if not any((folder / name).is_dir() for name in CLASSES):
            raise missing(folder, [f"{_TRAIN[0]}/", f"{_VAL}/"], "kather100k")
        return _tiles(folder, "", None)
    if len(parts) == 1:
        logger.warning("%s: holds only %s, so there are no splits", folder, parts[0])
        return _tiles(folder / parts[0], f"{parts[0]}/", None)
    return [
        item
        for part, split in zip(parts, ("train", "val"), strict=True)
        for item in _tiles(folder / part, f"{part}/", split)
    ]


def _tiles(folder: Path, prefix: str, split: str | None) -> list[Item]:
    if lacking := [f"{name}/" for name in CLASSES if not (folder / name).is_dir()]:
        raise missing(folder, lacking, "kather100k")
    found = folder_items(folder, labels=True, medium="image")
    if others := [item.name for item in found if item.label not in CLASSES]:
        logger.warning("%s: %d images in no class's folder are passed over, as %s", folder, len(others), others[0])
    if empty := [name for name in CLASSES if name not in {item.label for item in found}]:
        raise ValueError(f"{folder / empty[0]}: no image in it; unpack the archive again")
    return [item._replace(name=prefix + item.name, split=split) for item in found if item.label in CLASSES]
