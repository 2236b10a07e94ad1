"""The tiles of one large image, as a list of items."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_platform.data.items import Item
from ssl_platform.data.media.image import read_image


class Grid(NamedTuple):
    """How a large image is cut into tiles; lengths in pixels."""

    tile: int
    stride: int
    group_block: int
    """Tiles whose centre is in the same square block of this size form a group."""
    region: tuple[int, int, int, int] | None = None
    """x0, y0, x1, y1: only tiles wholly inside."""


def grid_items(
    image: Path, grid: Grid, *, labels_image: Path | None, purity: float, label_names: Sequence[str]
) -> list[Item]:
    """The tiles of an image, row by row; groups are spatial blocks.

    A tile's label is the class that at least the share `purity` of its pixels in the labels image have.
    """
    height, width = read_image(image).shape[1:]
    x0, y0, x1, y1 = grid.region or (0, 0, width, height)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"region {x0},{y0},{x1},{y1}: expected x0 < x1 <= {width} and y0 < y1 <= {height}, the image")
    corners = [
        (x, y) for y in range(y0, y1 - grid.tile + 1, grid.stride) for x in range(x0, x1 - grid.tile + 1, grid.stride)
    ]
    if not corners:
        raise ValueError(f"{image}: tiles of {grid.tile} pixels do not fit into {x1 - x0} x {y1 - y0} pixels")
    label_at = _label_reader(labels_image, (height, width), purity, label_names, grid.tile)

    def group_at(x: int, y: int) -> str:
        row, column = ((corner + grid.tile // 2) // grid.group_block for corner in (y, x))
        return f"{image.stem}_row{row}_column{column}"

    return [Item(image, image.name, label_at(x, y), group_at(x, y), corner=(x, y)) for x, y in corners]


def _label_reader(
    path: Path | None, size: tuple[int, int], purity: float, names: Sequence[str], tile: int
) -> Callable[[int, int], int | str | None]:
    if path is None:
        return lambda x, y: None
    classes = _read_classes(path)
    if classes.shape != size:
        raise ValueError(
            f"{path}: has {classes.shape[1]} x {classes.shape[0]} pixels, but the image that it labels has "
            f"{size[1]} x {size[0]}"
        )

    def label_at(x: int, y: int) -> int | str | None:
        counts = np.bincount(classes[y : y + tile, x : x + tile].ravel())
        found = int(counts.argmax())
        if counts[found] < purity * tile * tile or (found >= len(names) if names else found in (255, 65535)):
            return None
        return names[found] if names else found

    return label_at


def _read_classes(path: Path) -> NDArray[np.int64]:
    """(H, W): the class of each pixel; a palette image's numbers, not its colours."""
    try:
        image = Image.open(path)
        classes = np.asarray(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    if classes.ndim != 2 or classes.dtype.kind not in "bui":
        raise ValueError(
            f"{path}: pixels of mode {image.mode}; expected one channel that holds the number of the class"
        )
    return classes.astype(np.int64)
