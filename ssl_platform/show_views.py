"""`ssl-train CONFIG --show-views FILE`: a contact sheet of what the networks will be shown.

A row for each sample, a column for each view and for each of its masked versions, with what is hidden darkened.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_platform.config import ConfigError
from ssl_platform.modalities import Modality
from ssl_platform.views import Batch

NUM_SAMPLES = 6
FILE_TYPES = (".png", ".jpg", ".jpeg")
LARGEST = 224
"""Pixels on the sheet of the longest side of the largest view; the others keep their size relative to it."""
SMALLEST_COLUMN = 96
"""Pixels that a column's title needs."""
GAP, MARGIN, TITLE, CAPTION, GROUP_GAP, ROW_NUMBER = 8, 16, 46, 16, 20, 18
PAPER, INK, FAINT, EDGE, HIDDEN = (255, 255, 255), (25, 25, 25), (120, 120, 120), (205, 205, 205), (40, 44, 52)

Picture = NDArray[np.uint8]
"""(H, W, 3)"""


class Cell(NamedTuple):
    """One picture of the sheet."""

    picture: Picture
    caption: str


class Column(NamedTuple):
    """The same view of every sample."""

    group: str
    title: str
    subtitle: str
    cells: list[Cell]


def check_path(path: Path) -> None:
    """Raises ConfigError for a file that cannot be written."""
    if path.suffix.lower() not in FILE_TYPES:
        raise ConfigError([f"--show-views {path}: unknown kind of file; use {', '.join(FILE_TYPES)}"])
    if not path.parent.is_dir():
        raise ConfigError([f"--show-views {path}: the folder {path.parent} does not exist"])


def write_picture(sheet: Image.Image, path: Path) -> None:
    """All or nothing."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        sheet.save(temporary, "png" if path.suffix.lower() == ".png" else "jpeg", quality=92)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def contact_sheet(modality: Modality, samples: Sequence[Batch]) -> Image.Image:
    """The sheet of batches of one sample each; raises ConfigError if the modality has no pictures."""
    if not hasattr(modality, "picture"):
        kind = f"{type(modality).__module__}.{type(modality).__qualname__}"
        raise ConfigError(
            [f"--show-views: the modality {kind} has no method `picture(view)`, which makes a view visible"]
        )
    columns = [column for name in modality.groups for column in group_columns(name, modality, samples)]
    return drawn(scaled(columns))


def group_columns(name: str, modality: Modality, samples: Sequence[Batch]) -> list[Column]:
    """A column for each view of a group, followed by those of its masked versions."""
    spec, first = modality.groups[name], samples[0].groups[name]
    size = " x ".join(map(str, spec.shape[1:] or spec.shape))
    columns = []
    for view in range(spec.num_views):
        pictures = [modality.picture(batch.groups[name].views[view, 0]) for batch in samples]
        subtitle = f"{size}, crop {int(first.source[view])}"
        columns.append(Column(name, f"{name} {view + 1}", subtitle, [Cell(picture, "") for picture in pictures]))
        for masks, drawn_masks in first.masks.items():
            for version in range(drawn_masks.shape[1]):
                hidden = [batch.groups[name].masks[masks][view, version, 0] for batch in samples]  # (N,) each
                cells = [
                    Cell(with_mask(picture, mask, spec.grid), share_hidden(mask))
                    for picture, mask in zip(pictures, hidden, strict=True)
                ]
                number = f" {version + 1}" if drawn_masks.shape[1] > 1 else ""
                columns.append(Column(name, f"{name} {view + 1}", f"masks: {masks}{number}", cells))
    return columns


def share_hidden(mask: Tensor) -> str:
    """What a mask hides, in words."""
    count = int(mask.sum())
    return f"{count} of {len(mask)} hidden" if count else "not masked"


def with_mask(picture: Picture, mask: Tensor, grid: tuple[int, ...]) -> Picture:
    """The picture with hidden tokens dark; unchanged where tokens lie on a grid that is no part of a picture."""
    if len(grid) > 2:
        return picture
    cells = mask.reshape(1, *grid) if len(grid) == 1 else mask.reshape(grid)
    height, width = picture.shape[:2]
    rows = torch.arange(height) * cells.shape[0] // height
    columns = torch.arange(width) * cells.shape[1] // width
    hidden = cells[rows][:, columns].numpy()  # (H, W)
    dark = (0.12 * picture + 0.88 * np.array(HIDDEN)).round().astype(np.uint8)
    shown: Picture = np.where(hidden[..., None], dark, picture)
    return shown


# -- layout ------------------------------------------------------------------------------------------------------------


def scaled(columns: Sequence[Column]) -> list[Column]:
    """All pictures enlarged by one whole factor, or made smaller by one, so that the largest has a good size."""
    longest = max(max(cell.picture.shape[:2]) for column in columns for cell in column.cells)
    factor = max(LARGEST // longest, 1) if longest <= 2 * LARGEST else LARGEST / longest

    def resized(picture: Picture) -> Picture:
        size = (max(round(picture.shape[1] * factor), 1), max(round(picture.shape[0] * factor), 1))
        kind = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
        return np.asarray(Image.fromarray(picture).resize(size, kind))

    return [
        column._replace(cells=[cell._replace(picture=resized(cell.picture)) for cell in column.cells])
        for column in columns
    ]


def drawn(columns: Sequence[Column]) -> Image.Image:
    """The sheet."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    widths = [max(column.cells[0].picture.shape[1], SMALLEST_COLUMN) for column in columns]
    height = max(cell.picture.shape[0] for column in columns for cell in column.cells) + CAPTION
    num_rows = len(columns[0].cells)
    lefts, left = [], MARGIN + ROW_NUMBER
    for column, width, before in zip(columns, widths, [columns[0], *columns], strict=False):
        left += GROUP_GAP if column.group != before.group else 0
        lefts.append(left)
        left += width + GAP
    sheet = Image.new("RGB", (left - GAP + MARGIN, TITLE + num_rows * (height + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row in range(num_rows):
        draw.text((MARGIN, TITLE + row * (height + GAP)), str(row + 1), FAINT, small)
    for column, x in zip(columns, lefts, strict=True):
        draw.text((x, 8), column.title, INK, font)
        draw.text((x, 27), column.subtitle, FAINT, small)
        for row, cell in enumerate(column.cells):
            y = TITLE + row * (height + GAP)
            sheet.paste(Image.fromarray(cell.picture), (x, y))
            high, wide = cell.picture.shape[:2]
            draw.rectangle((x - 1, y - 1, x + wide, y + high), outline=EDGE)  # white views end somewhere, too
            draw.text((x, y + cell.picture.shape[0] + 2), cell.caption, FAINT, small)
    return sheet
