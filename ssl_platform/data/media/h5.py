"""Images in HDF5 files, a row of a data set each: stored without loss as PNG."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ssl_platform.data.items import Item
from ssl_platform.data.media import Content, Options
from ssl_platform.data.media.image import encode
from ssl_platform.optional import optional_package

_open: dict[tuple[int, Path], Any] = {}
"""The file that this process read last; its handle is not to be used by processes forked later."""


def load(item: Item, options: Options) -> Content:
    """The row `item.part` = (name of the data set, number) as (C, H, W), of an array (N, H, W, C) or (N, H, W)."""
    name, row = item.part
    place = (os.getpid(), item.path)
    if place not in _open:
        for file in _open.values():
            file.close()
        _open.clear()
        _open[place] = open_file(item.path)
    pixels = np.asarray(dataset(_open[place], str(name), item.path)[int(row)])
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"row {row} of '{name}' has {pixels.dtype} values of shape {pixels.shape}; expected uint8 (H, W, 1 or 3)"
        )
    pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return Content(*encode(pixels), pixels)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An HDF5 file, closed afterwards; raises ValueError that names it."""
    file = open_file(path)
    try:
        yield file
    finally:
        file.close()


def open_file(path: Path) -> Any:
    """An h5py.File to be read; raises ValueError that names the file and the fix."""
    h5py = optional_package("h5py", f"{path}: HDF5 files need h5py", "h5")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read as HDF5 ({error}); if it is truncated, download and unpack it again"
        ) from error


def dataset(file: Any, name: str, path: Path) -> Any:
    """A data set of a file; raises ValueError that names the ones that there are."""
    found = file.get(name)
    if found is None or not hasattr(found, "shape"):
        raise ValueError(f"{path}: no data set '{name}' in it; there is {', '.join(file) or 'nothing'}")
    return found
