"""PatchCamelyon (PCam): 327,680 tiles of 96 x 96 pixels from Camelyon16, in HDF5 files.

    DIR/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5      (unpacked with gunzip)
    DIR/camelyonpatch_level_2_split_{train,valid,test}_meta.csv      (optional)

The splits are train, valid and test, of which one is enough. The label is tumor (in the middle 32 x 32 pixels) or normal.
With meta.csv the group is the slide, and the column tumor_patch is stored (whether the whole tile has a tumour).
Needs h5py: pip install 'ssl-platform[h5]'.

    ssl-pack pcam PCam shards --workers 16          # shards/train, shards/valid and shards/test
"""

import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import missing
from ssl_platform.data.media import h5
from ssl_platform.data.tables import read_rows

logger = logging.getLogger(__name__)

COLUMNS = ("tumor_patch",)
_SPLITS = ("train", "valid", "test")
_LABELS = ("normal", "tumor")
_NEEDED = ("wsi", "tumor_patch", "center_tumor_patch", "coord_x", "coord_y")


class _Meta(NamedTuple):
    """What meta.csv says of each row."""

    slides: list[str]
    columns: list[tuple[tuple[str, str], ...]]
    is_tumor: NDArray[np.bool_]


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """A tile for each row; raises ValueError if files are missing, damaged, or not of the same number of rows."""
    splits = [name for name in _SPLITS if any(_there(folder, name, kind) for kind in "xy")]
    if not splits:
        raise missing(folder, [_name(split, kind) for split in _SPLITS for kind in "xy"], "pcam")
    found = []
    for split in splits:
        for kind in "xy":
            _check(folder, split, kind)
        found += _split_items(folder, split)
    return found


def _name(split: str, kind: str) -> str:
    return f"camelyonpatch_level_2_split_{split}_{kind}.h5"


def _there(folder: Path, split: str, kind: str) -> bool:
    path = folder / _name(split, kind)
    return path.exists() or path.with_name(path.name + ".gz").exists()


def _check(folder: Path, split: str, kind: str) -> None:
    path = folder / _name(split, kind)
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        raise ValueError(f"{packed}: is compressed; unpack it: gunzip --keep {packed}")
    if not path.exists():
        raise missing(folder, [path.name], "pcam")


def _split_items(folder: Path, split: str) -> list[Item]:
    path, labels = folder / _name(split, "x"), _labels(folder / _name(split, "y"))
    with h5.opened(path) as file:
        shape, kind = (getattr(h5.dataset(file, "x", path), name) for name in ("shape", "dtype"))
    if len(shape) != 4 or shape[3] != 3 or kind != np.uint8:
        raise ValueError(f"{path}: 'x' has {kind} values of shape {shape}; expected uint8 (N, 96, 96, 3)")
    if shape[0] != len(labels):
        raise ValueError(
            f"{path}: {shape[0]} tiles, but {_name(split, 'y')} has {len(labels)} labels; download both files again"
        )
    meta = _meta(folder / _name(split, "meta").replace(".h5", ".csv"), len(labels))
    if meta is not None and (wrong := int((meta.is_tumor != labels).sum())):
        logger.warning("%s: %d of %d rows have another label than y, which counts", split, wrong, len(labels))
    return [
        Item(
            path,
            f"{path.name}/x/{row}",
            _LABELS[label],
            None if meta is None else meta.slides[row],
            () if meta is None else meta.columns[row],
            split=split,
            medium="h5",
            part=("x", row),
        )
        for row, label in enumerate(labels.tolist())
    ]


def _labels(path: Path) -> NDArray[np.int64]:
    """(N,): 0 or 1."""
    with h5.opened(path) as file:
        values = h5.dataset(file, "y", path)
        shape = values.shape
        if not shape or values.size != shape[0] or values.dtype.kind not in "biu":
            raise ValueError(f"{path}: 'y' has {values.dtype} values of shape {shape}; expected uint8 (N, 1, 1, 1)")
        labels = np.asarray(values).reshape(-1).astype(np.int64)
    if wrong := sorted({*labels.tolist()} - {0, 1}):
        raise ValueError(f"{path}: holds the label {wrong[0]}; expected 0 (normal) and 1 (tumor)")
    return labels


def _meta(path: Path, num_rows: int) -> _Meta | None:
    if not path.exists():
        logger.warning("%s: not there, so tiles have no group: those of one slide may be in several splits", path)
        return None
    header, *rows = [row for _, row in read_rows(path)] or [[]]
    if lacking := [name for name in _NEEDED if name not in header]:
        raise ValueError(f"{path}: no column {lacking[0]}; the columns are {', '.join(header)}")
    if len(rows) != num_rows or any(len(row) != len(header) for row in rows):
        raise ValueError(f"{path}: {len(rows)} rows, but there are {num_rows} tiles; download it again or remove it")
    wsi, tumor_patch, center, x, y = (header.index(name) for name in _NEEDED)
    return _Meta(
        [row[wsi] for row in rows],
        [(("tumor_patch", row[tumor_patch]), ("coord_x", row[x]), ("coord_y", row[y])) for row in rows],
        np.array([row[center].strip().lower() in ("true", "1", "1.0") for row in rows], dtype=bool),
    )
