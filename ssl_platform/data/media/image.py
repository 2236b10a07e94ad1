"""Images and tiles: stored as the file is, without its metadata, or without loss as PNG or NumPy array."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ssl_platform.data import dicom
from ssl_platform.data.items import Item
from ssl_platform.data.media import Content, Look, Options
from ssl_platform.data.metadata import without_metadata
from ssl_platform.modalities import _images
from ssl_platform.modalities._images import decode_image

PLURAL = "images"
EXTENSIONS = (*_images.EXTENSIONS, *dicom.EXTENSIONS)
STORED = _images.EXTENSIONS
KEPT = ("jpg", "jpeg", "png", "webp", "npy")

Pixels = NDArray[Any]


def load(item: Item, options: Options) -> Content:
    """A file, or the tile of one; pixels are never changed."""
    if item.corner is not None:
        pixels = _tile(item, options.tile)
        return Content(*encode(pixels), pixels)
    data, extension = item.path.read_bytes(), item.extension
    if dicom.is_dicom(data):
        pixels, about = dicom.read_dicom(data, refuse_burnt_in=not options.keep_metadata)
        return Content(*encode(pixels), pixels, about)
    if extension in dicom.EXTENSIONS:
        raise ValueError("no DICOM file: the mark DICM is not at byte 128")
    pixels = decode_image(data, extension).numpy()
    if options.keep_metadata:
        return Content(data, extension, pixels)
    return Content(*_clean(data, extension, pixels), pixels)


_last_image: dict[Path, NDArray[np.generic]] = {}


def read_image(path: Path) -> NDArray[np.generic]:
    """The (C, H, W) pixels of an image that tiles are cut from; the last one is remembered, for the next tile.

    Processes forked later share it. Raises ValueError with the reason if it cannot be read.
    """
    if path not in _last_image:
        _last_image.clear()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        try:
            if dicom.is_dicom(data):
                _last_image[path] = dicom.read_dicom(data, refuse_burnt_in=True)[0]
            else:
                _last_image[path] = decode_image(data, path.suffix[1:].lower()).numpy()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return _last_image[path]


def look(data: bytes, extension: str) -> Look:
    """The image itself."""
    pixels = decode_image(data, extension)
    sizes = {"width": pixels.shape[2], "height": pixels.shape[1], "channels": pixels.shape[0]}
    return Look(pixels, sizes, pixels.numpy)


def _tile(item: Item, tile: int) -> Pixels:
    assert item.corner is not None
    image = read_image(item.path)
    x, y = item.corner
    pixels = image[:, y : y + tile, x : x + tile]
    if pixels.shape[1:] != (tile, tile):
        size = f"{image.shape[2]} x {image.shape[1]}"
        raise ValueError(f"a tile of {tile} pixels at x {x}, y {y} is not inside the image, which has {size}")
    return pixels


def _clean(data: bytes, extension: str, pixels: Pixels) -> tuple[bytes, str]:
    """The file without what it says besides its pixels; encoded anew where its format allows nothing less."""
    if extension == "npy":
        file = io.BytesIO()
        np.save(file, np.load(io.BytesIO(data), allow_pickle=False))
        return file.getvalue(), "npy"
    clean = without_metadata(data)
    if clean is not None and (clean[0] == data or _decodes_to(pixels, *clean)):
        return clean
    if len(pixels) not in (2, 4):
        return encode(pixels)
    try:
        decode_image(data, extension, channels=len(pixels) - 1)
    except ValueError:  # the last channel is not alpha, as a PNG's would be
        return _encode_array(pixels)
    return encode(pixels) if pixels.dtype == np.uint8 else _encode_deep_png(pixels)


def _decodes_to(pixels: Pixels, data: bytes, extension: str) -> bool:
    try:
        return torch.equal(decode_image(data, extension), torch.from_numpy(pixels))
    except ValueError:
        return False


def encode(pixels: Pixels) -> tuple[bytes, str]:
    """Pixels (C, H, W) as PNG, or as NumPy array where PNG has no such pixels (5 channels, several of 16 bits)."""
    if pixels.shape[0] > 4 or (pixels.dtype != np.uint8 and pixels.shape[0] > 1):
        return _encode_array(pixels)
    channels_last = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))  # (H, W, C)
    if pixels.shape[0] == 1:
        channels_last = channels_last[..., 0]
    file = io.BytesIO()
    Image.fromarray(channels_last).save(file, format="PNG")
    return file.getvalue(), "png"


def _encode_array(pixels: Pixels) -> tuple[bytes, str]:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels))
    return file.getvalue(), "npy"


def _encode_deep_png(pixels: Pixels) -> tuple[bytes, str]:
    """A PNG of 16 bits with alpha, which Pillow does not write."""
    channels, height, width = pixels.shape
    rows = np.moveaxis(pixels, 0, -1).astype(">u2").reshape(height, -1).view(np.uint8)
    unfiltered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body, "png"
