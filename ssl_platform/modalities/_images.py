"""Images from bytes to pixels and from pixels to what a network sees: decoding, bit depths, normalisation.

Pixels are (C, H, W): uint8 or uint16 as decoded, float32 in [0, 1] from `to_float` on.
"""

import io
import logging
import math
import struct
import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ssl_platform.optional import optional_package

EXTENSIONS = ("jpg", "jpeg", "png", "tif", "tiff", "bmp", "webp", "npy")
MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded (Pillow's own limit): a small file can claim any size."""
MAX_PAGES = 10_000
"""Of a TIFF: pages cost seconds and memory although none holds a pixel."""
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF", "MPO")
"""What Pillow may take a file for. Others run programs (EPS: Ghostscript), read other files, or are no images."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Luma of R, G, B, as torchvision's rgb_to_grayscale."""

Size = tuple[int, int]
"""(height, width)"""

_TO_CONVERT = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB"}
_AS_THEY_ARE = ("L", "LA", "RGB", "RGBA", "I;16", "I;16B")

# -- decoding ----------------------------------------------------------------------------------------------------------


def decode_image(data: bytes, extension: str, channels: int | None = None) -> Tensor:
    """The image in `data` as uint8 or uint16 (C, H, W); raises ValueError with the reason if it is bad.

    Only "npy" is told by its extension: (H, W), (C, H, W) or (H, W, C) with any number of channels; other files are
    told by their content. Palettes, CMYK and 1-bit images become RGB or grey; of an animation, the first frame is
    taken. With `channels`, alpha is dropped and
    grey repeated where that gives the wanted number; any other number is an error.
    """
    if not data:
        raise ValueError("the file has zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they name no file; what matters is raised
            pixels, has_alpha = _decode_npy(data, channels) if extension == "npy" else _decode_file(data)
    except UnidentifiedImageError:
        raise ValueError(f"not an image: Pillow knows no format that begins with {data[:8]!r}") from None
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"cannot be decoded as {extension}: {type(error).__name__}, too large or damaged") from None
    except Exception as error:  # damaged bytes make decoders raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot be decoded as {extension}: {reason}") from error
    if channels is None or pixels.shape[0] == channels:
        return pixels
    if has_alpha:
        pixels = pixels[:-1]
    if pixels.shape[0] == 1 and channels == 3:
        pixels = pixels.expand(3, -1, -1)
    if pixels.shape[0] != channels:
        hint = ", or to_grey: true" * (channels == 1 and pixels.shape[0] == 3)
        raise ValueError(
            f"the image has {pixels.shape[0]} channels where {channels} are configured; set channels: "
            f"{pixels.shape[0]}{hint}"
        )
    return pixels


def _decode_npy(data: bytes, channels: int | None) -> tuple[Tensor, bool]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if len(shape) not in (2, 3) or dtype.hasobject:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} is no image: 2 or 3 axes are expected")
    body = data[file.tell() :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"truncated: {len(body)} bytes for an array of shape {shape} and dtype {dtype}")
    array = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran_order else "C")
    if array.ndim == 2:
        return _as_tensor(array[None]), False
    first, last = shape[0], shape[-1]
    is_channels_last = last < first if (first == channels) == (last == channels) else last == channels
    return _as_tensor(np.moveaxis(array, -1, 0) if is_channels_last else array), False


def _decode_file(data: bytes) -> tuple[Tensor, bool]:
    """(C, H, W), and whether the last channel is alpha."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())  # reads the header only
    except UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _decode_tifffile(data)
        raise
    _check_size(image.size)
    if image.format == "PNG" and image.mode in ("LA", "RGB", "RGBA") and data[24] == 16:  # the header's bit depth
        return _decode_deep_png(data)
    if image.format == "TIFF" and _needs_tifffile(image):
        return _decode_tifffile(data)
    if image.mode not in (*_TO_CONVERT, *_AS_THEY_ARE):
        raise ValueError(f"pixels of Pillow's mode {image.mode} are not supported, 8 or 16 bits per channel are")
    upright = ImageOps.exif_transpose(image)
    if image.mode in _TO_CONVERT:
        upright = upright.convert("RGBA" if "transparency" in image.info else _TO_CONVERT[image.mode])
    array = np.atleast_3d(np.asarray(upright))  # (H, W, C)
    return _as_tensor(np.moveaxis(array, -1, 0)), upright.mode in ("LA", "RGBA")


@cache
def _formats() -> list[str]:
    """Those of `_FORMATS` that this Pillow has."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _decode_deep_png(data: bytes) -> tuple[Tensor, bool]:
    """Colours of 16 bits, of which Pillow keeps the upper half (and torchvision crashes if the file is damaged)."""
    imagecodecs = optional_package("imagecodecs", "a PNG of 16-bit colours needs imagecodecs", "image")
    pixels = _as_tensor(np.moveaxis(np.atleast_3d(imagecodecs.png_decode(data)), -1, 0))
    return pixels, pixels.shape[0] in (2, 4)


def _needs_tifffile(image: Image.Image) -> bool:
    """Pillow would read the first of several pages, the upper half of 16-bit colours, and four channels at most."""
    bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]  # BitsPerSample
    is_deep = max(bits) > 8 and not image.mode.startswith("I;16")
    return is_deep or image.mode not in (*_TO_CONVERT, *_AS_THEY_ARE) or getattr(image, "n_frames", 1) > 1


def _decode_tifffile(data: bytes) -> tuple[Tensor, bool]:
    tifffile = optional_package("tifffile", "a TIFF of this kind needs tifffile", "image")
    _check_pages(data)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # a line for each wrong tag, without the file's name
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        sizes = dict(zip(series.axes, series.shape, strict=True))
        height, width = sizes.pop("Y", 0), sizes.pop("X", 0)
        _check_size((height, width))
        if len(sizes) > 1 or not set(sizes) <= set("SCQI"):  # samples, channels, pages of no stated meaning
            raise ValueError(
                f"axes {series.axes} {series.shape}: one plane is expected, with one axis of channels at most"
            )
        if series.size > 4 * MAX_PIXELS:
            raise ValueError(f"{series.size:,} values, the limit is {4 * MAX_PIXELS:,}")
        has_alpha = any(kind in (1, 2) for kind in file.pages[0].extrasamples)
        array = series.asarray()
        if not sizes:
            array = array[None]
        elif series.axes.index("Y") == 0:
            array = np.moveaxis(array, -1, 0)
    return _as_tensor(array), has_alpha


def _check_pages(data: bytes) -> None:
    """Raises if the chain of pages is endless: tifffile would follow it for ever, or for very long."""
    order, is_big = "<" if data[:2] == b"II" else ">", b"+" in data[2:4]
    count_format, entry_size, offset_format, position = ("Q", 20, "Q", 8) if is_big else ("H", 12, "I", 4)
    seen = {0}
    while (page := struct.unpack_from(order + offset_format, data, position)[0]) not in seen:
        seen.add(page)
        if len(seen) > MAX_PAGES:
            raise ValueError(f"more than {MAX_PAGES:,} pages")
        (num_entries,) = struct.unpack_from(order + count_format, data, page)
        position = page + struct.calcsize(count_format) + num_entries * entry_size
    if page != 0:
        raise ValueError("the pages form a circle")


def _check_size(size: tuple[int, int]) -> None:
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        raise ValueError(f"an image of {size[0]} x {size[1]} pixels, the limit is {MAX_PIXELS:,} pixels")


def _as_tensor(array: NDArray[np.generic]) -> Tensor:
    """uint8 or uint16, writable, laid out (H, W, C) where it was: torch resizes that layout faster."""
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ValueError(f"pixels of dtype {array.dtype} are not supported, uint8 and uint16 are")
    if 0 in array.shape:
        raise ValueError(f"an image of shape {array.shape} has no pixels")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True, order="K"))


# -- pixels ------------------------------------------------------------------------------------------------------------


def to_float(image: Tensor) -> Tensor:
    """float32 in [0, 1], contiguous: 8 and 16 bits on the same scale."""
    if image.is_floating_point():
        return image.contiguous()
    limit = 255 if image.dtype == torch.uint8 else 65535
    return image.to(torch.float32, memory_format=torch.contiguous_format).div_(limit)


def resize(image: Tensor, size: Size) -> Tensor:
    """Antialiased bicubic interpolation, without the overshoot: uint8 stays uint8, others become float32 in [0, 1]."""
    image = image if image.dtype == torch.uint8 else to_float(image)
    resized: Tensor = TF.resize(image, list(size), interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    return resized if resized.dtype == torch.uint8 else resized.clamp(0, 1)


def resize_and_center_crop(image: Tensor, cover: Size, size: Size) -> Tensor:
    """Scales the image, its aspect kept, until it just covers `cover`, and cuts `size` from the center."""
    height, width = image.shape[-2:]
    if cover[0] * width >= cover[1] * height:
        covering = (cover[0], max(cover[1], cover[0] * width // height))
    else:
        covering = (max(cover[0], cover[1] * height // width), cover[1])
    _check_size(covering)
    cropped: Tensor = TF.center_crop(resize(image, covering), list(size))
    return cropped


def to_grey(image: Tensor) -> Tensor:
    """The luma of RGB: (..., 3, H, W) -> (..., 1, H, W)."""
    grey: Tensor = TF.rgb_to_grayscale(image, 1)
    return grey


class Normalization:
    """The last step: float32 pixels in [0, 1] (..., C, H, W) -> what the network sees (..., channels, H, W)."""

    smallest_std = 1e-3
    """Of a view normalised by its own, a quarter of a step of 8 bits: a flat view becomes 0, a dark one of 16 bits not."""

    dimmest_std = 0.03
    """Photographs have .2, scans of 12 bits in 16 about .01."""

    def __init__(
        self,
        channels: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        to_grey: bool = False,
    ) -> None:
        """`mean` and `std` of each channel, pixels in [0, 1]; None: every channel of every view by its own."""
        self.channels, self.to_grey, self.per_sample = channels, to_grey, mean is None or std is None
        self.mean = torch.tensor(mean if mean is not None else [0.0] * channels).view(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(std if std is not None else [1.0] * channels).view(-1, 1, 1).clamp(min=1e-6)

    def __call__(self, views: Tensor) -> Tensor:
        if self.to_grey:
            views = to_grey(views).expand(*views.shape[:-3], self.channels, *views.shape[-2:])
        if not self.per_sample:
            return (views - self.mean).div_(self.std)
        std, mean = torch.std_mean(views, dim=(-2, -1), correction=0, keepdim=True)
        return (views - mean).div_(std.clamp(min=self.smallest_std))

    def visible(self, views: Tensor) -> Tensor:
        """The inverse, back to pixels in [0, 1]; where every view had its own mean and std these are lost, and where
        pixels fill little of their range, as those of 16 bits may, nothing would be seen: there two standard deviations to
        either side fill the range."""
        is_stretched = self.per_sample or bool(self.std.max() < self.dimmest_std)
        pixels = views / 4 + 0.5 if is_stretched else views * self.std + self.mean
        return pixels.clamp(0, 1)


def channel_values(values: Sequence[float], channels: int, to_grey: bool) -> list[float]:
    """The mean or std of each stored channel -> of each channel that a network sees; raises ValueError if none fits."""
    decoded = 3 if to_grey else channels
    if len(values) == decoded + 1 and decoded in (1, 3):
        values = values[:-1]  # alpha, which `decode_image` drops
    if len(values) == 1:
        values = list(values) * decoded
    if len(values) != decoded:
        raise ValueError(
            f"the shards' statistics have {len(values)} channels where {channels} are configured; "
            f"set channels: {len(values)}, or mean and std"
        )
    if not to_grey:
        return list(values)
    # Of the standard deviation an upper bound, exact where the channels rise and fall together.
    return [sum(weight * value for weight, value in zip(GREY_WEIGHTS, values, strict=True))] * channels
