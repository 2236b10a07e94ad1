"""Camelyon17-WILDS: 455,954 tiles of 96 x 96 pixels from five medical centres.

    DIR/metadata.csv      (patient, node, x_coord, y_coord, tumor, slide, center, split)
    DIR/patches/patient_004_node_4/patch_patient_004_node_4_x_3328_y_21792.png

The splits are those of WILDS by centre: val is centre 1, test is centre 2, train the others. The tiles that WILDS holds
back of train (its id_val) are of the same slides: they stay in train, and the stored column wilds_split is 1. The label is
tumor or normal, the group the patient, and the column center is stored.

    ssl-pack camelyon17-wilds camelyon17_v1.0 shards --workers 16          # shards/train, shards/val and shards/test
"""

import argparse
from pathlib import Path

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import missing
from ssl_platform.data.tables import read_rows

COLUMNS = ("center", "wilds_split")
_NEEDED = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
_SPLIT_OF_CENTER = {0: "train", 1: "val", 2: "test", 3: "train", 4: "train"}
_LABELS = ("normal", "tumor")


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """A tile for each row of metadata.csv; raises ValueError that names the line. Missing tiles are left out later."""
    table = folder / "metadata.csv"
    if lacking := [
        name
        for name, there in (("metadata.csv", table.is_file()), ("patches/", (folder / "patches").is_dir()))
        if not there
    ]:
        raise missing(folder, lacking, "camelyon17-wilds")
    (_, header), *rows = read_rows(table) or [(0, [])]
    if absent := [name for name in _NEEDED if name not in header]:
        raise ValueError(f"{table}: no column {absent[0]}; the columns are {', '.join(header) or 'none'}")
    if not rows:
        raise ValueError(f"{table}: no row below the header; download it again")
    places = [header.index(name) for name in _NEEDED]
    found = []
    for line, row in rows:
        try:
            found.append(_item(folder, *(int(row[place]) for place in places)))
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"{table}: line {line} cannot be used ({error}): expected whole numbers in {', '.join(_NEEDED)}, tumor 0 "
                "or 1 and center 0 to 4"
            ) from error
    return found


def _item(folder: Path, patient: int, node: int, x: int, y: int, tumor: int, center: int, split: int) -> Item:
    slide = f"patient_{patient:03d}_node_{node}"
    name = f"patches/{slide}/patch_{slide}_x_{x}_y_{y}.png"
    if tumor not in (0, 1):
        raise ValueError(f"tumor is {tumor}")
    return Item(
        folder / name,
        name,
        _LABELS[tumor],
        f"patient_{patient:03d}",
        (("center", str(center)), ("wilds_split", str(split)), ("slide", slide)),
        split=_SPLIT_OF_CENTER[center],
    )
