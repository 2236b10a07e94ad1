"""Image files of every kind: right pixels, or a ValueError that says why not."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_platform.modalities._images import decode_image

COLORS = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
PHOTO = np.asarray(Image.fromarray(COLORS).resize((45, 30), Image.Resampling.BICUBIC))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encode_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encode_tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def encode_png16(array: np.ndarray, size: tuple[int, int] | None = None) -> bytes:
    """16 bits per channel, which Pillow does not write; `size` (height, width) is what the header claims."""
    height, width = size or array.shape[:2]
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def rows_last(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp"])
def test_lossless_files_give_their_pixels(kind: str) -> None:
    pixels = decode_image(encode(Image.fromarray(PHOTO), kind, **({"lossless": True} if kind == "webp" else {})), kind)
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(rows_last(pixels), PHOTO)


def test_jpeg_is_what_pillow_makes_of_it() -> None:
    data = encode(Image.fromarray(PHOTO), "jpeg", quality=90)
    difference = rows_last(decode_image(data, "jpg")).astype(int) - np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(difference).max() <= 2


def test_content_counts_more_than_the_extension() -> None:
    data = encode(Image.fromarray(PHOTO), "jpeg")
    assert torch.equal(decode_image(data, "png"), decode_image(data, "jpg"))


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 2), ("P", 3), ("RGBA", 4)])
def test_modes(kind: str, mode: str, channels: int) -> None:
    image = Image.fromarray(PHOTO).convert(mode)
    pixels = decode_image(encode(image, kind), kind)
    expected = {"1": "L", "P": "RGB"}.get(mode, mode)
    np.testing.assert_array_equal(rows_last(pixels), np.atleast_3d(np.asarray(image.convert(expected))))
    assert pixels.shape[0] == channels


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    image = Image.fromarray(PHOTO).convert("CMYK")
    difference = rows_last(decode_image(encode(image, kind), kind)).astype(int) - PHOTO
    assert np.abs(difference).mean() < (6 if kind == "jpeg" else 0.5)


def test_palette_with_transparency_has_alpha_that_is_dropped() -> None:
    image = Image.fromarray(PHOTO).quantize(8)
    data = encode(image, "png", transparency=0)
    assert decode_image(data, "png").shape[0] == 4
    np.testing.assert_array_equal(rows_last(decode_image(data, "png", 3)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1), ("LA", 3), ("L", 3), ("1", 3)])
def test_alpha_is_dropped_and_grey_repeated(mode: str, channels: int) -> None:
    image = Image.fromarray(PHOTO).convert("L").convert(mode)
    pixels = decode_image(encode(image, "png"), "png", channels)
    expected = np.asarray(image.convert("L"))
    assert pixels.shape == (channels, 30, 45)
    assert all(np.array_equal(channel.numpy(), expected) for channel in pixels)


def test_four_channels_without_alpha_are_not_cut() -> None:
    array = np.zeros((4, 8, 8), np.uint8)
    with pytest.raises(ValueError, match="the image has 4 channels where 3 are configured; set channels: 4$"):
        decode_image(encode_npy(array), "npy", 3)


def test_color_where_one_channel_is_configured() -> None:
    with pytest.raises(ValueError, match="has 3 channels where 1 are configured; set channels: 3, or to_grey: true"):
        decode_image(encode(Image.fromarray(PHOTO), "png"), "png", 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png(channels: int) -> None:
    array = np.random.default_rng(1).integers(0, 65536, (7, 5, channels)).astype(np.uint16)
    pixels = decode_image(encode_png16(array), "png")
    assert pixels.dtype == torch.uint16
    np.testing.assert_array_equal(rows_last(pixels), array)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_tiff(channels: int, byteorder: str) -> None:
    array = np.random.default_rng(1).integers(0, 65536, (17, 16, channels)).astype(np.uint16)
    data = encode_tiff(array.squeeze(-1) if channels == 1 else array, byteorder=byteorder)
    pixels = decode_image(data, "tif")
    assert pixels.dtype == torch.uint16
    np.testing.assert_array_equal(rows_last(pixels), array)


def test_tiff_of_five_channels_as_planes_samples_or_pages() -> None:
    array = np.random.default_rng(1).integers(0, 256, (5, 16, 17)).astype(np.uint8)
    planes = encode_tiff(array, photometric="minisblack", metadata={"axes": "CYX"})
    samples = encode_tiff(array.transpose(1, 2, 0).copy(), photometric="minisblack", planarconfig="contig")
    pages = [Image.fromarray(page) for page in array]
    for data in (planes, samples, encode(pages[0], "tiff", save_all=True, append_images=pages[1:])):
        np.testing.assert_array_equal(decode_image(data, "tiff", 5).numpy(), array)


def test_stack_of_color_planes_is_refused() -> None:
    data = encode_tiff(np.zeros((4, 16, 16, 3), np.uint8), photometric="rgb", metadata={"axes": "ZYXS"})
    with pytest.raises(ValueError, match="axes ZYXS .* one plane is expected"):
        decode_image(data, "tiff")


def test_float_pixels_are_refused() -> None:
    for data, extension in ((encode_tiff(np.zeros((8, 8), np.float32)), "tif"), (encode_npy(np.zeros((8, 8))), "npy")):
        with pytest.raises(ValueError, match="pixels of dtype float(32|64) are not supported, uint8 and uint16 are"):
            decode_image(data, extension)


def test_npy_layouts() -> None:
    array = np.random.default_rng(2).integers(0, 65536, (5, 11, 13)).astype(np.uint16)
    for stored in (array, array.transpose(1, 2, 0), np.asfortranarray(array), array.astype(">u2")):
        np.testing.assert_array_equal(decode_image(encode_npy(stored), "npy").numpy(), array)
    np.testing.assert_array_equal(decode_image(encode_npy(array[0]), "npy").numpy(), array[:1])


def test_npy_layout_is_told_by_the_configured_channels() -> None:
    tall = np.zeros((16, 20, 12), np.uint8)  # the smaller of both ends would be the last axis
    assert decode_image(encode_npy(tall), "npy").shape == (12, 16, 20)
    assert decode_image(encode_npy(tall), "npy", 16).shape == (16, 20, 12)


def test_jpeg_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = decode_image(encode(Image.fromarray(PHOTO), "jpeg", exif=exif, quality=95), "jpg")
    assert pixels.shape == (3, 45, 30)
    upright = np.rot90(PHOTO, -1).astype(int)
    assert np.abs(rows_last(pixels).astype(int) - upright).mean() < 6


def test_tiff_whose_pages_form_a_circle() -> None:
    for is_big in (False, True):
        data = bytearray(encode_tiff(np.zeros((8, 8, 3), np.uint16), bigtiff=is_big))
        first, entries, count = (16, 20, "<Q") if is_big else (8, 12, "<H")
        number = struct.unpack_from(count, data, first)[0]
        struct.pack_into("<Q" if is_big else "<I", data, first + struct.calcsize(count) + number * entries, first)
        with pytest.raises(ValueError, match="the pages form a circle"):
            decode_image(bytes(data), "tif")


def test_zero_bytes() -> None:
    with pytest.raises(ValueError, match="zero bytes"):
        decode_image(b"", "png")


def test_not_an_image() -> None:
    with pytest.raises(ValueError, match="not an image: Pillow knows no format that begins with b'<html>"):
        decode_image(b"<html><body>404</body></html>", "jpg")


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "tiff", "webp"])
def test_truncated_files(kind: str) -> None:
    data = encode(Image.fromarray(PHOTO), kind)
    for end in (20, len(data) // 2, len(data) - 30):
        with pytest.raises(ValueError, match="cannot be decoded|not an image"):
            decode_image(data[:end], kind)


def test_truncated_npy_says_what_is_missing() -> None:
    data = encode_npy(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"truncated: 191 bytes for an array of shape \(3, 8, 8\) and dtype uint8"):
        decode_image(data[:-1], "npy")


def test_bombs_are_refused_before_they_are_decoded() -> None:
    small = np.zeros((4, 4, 3), np.uint16)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(encode_png16(small, size=(60_000, 60_000)), "png")
    shape, claimed = b"(4, 4, 3), }", b"(4000000000, 4000000000, 3), }"
    huge = encode_npy(small).replace(shape.ljust(len(claimed)), claimed)
    with pytest.raises(ValueError, match="truncated"):
        decode_image(huge, "npy")


def test_pickles_in_npy_are_not_read() -> None:
    file = io.BytesIO()
    np.save(file, np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="dtype object is no image"):
        decode_image(file.getvalue(), "npy")


VALID = {
    "png": encode(Image.fromarray(PHOTO), "png"),
    "PNG of 16 bits": encode_png16(PHOTO.astype(np.uint16) * 257),
    "jpg": encode(Image.fromarray(PHOTO), "jpeg"),
    "tif": encode(Image.fromarray(PHOTO), "tiff", compression="tiff_lzw"),
    "tiff": encode_tiff(PHOTO.astype(np.uint16)),
    "bmp": encode(Image.fromarray(PHOTO), "bmp"),
    "webp": encode(Image.fromarray(PHOTO), "webp"),
    "npy": encode_npy(PHOTO),
}


@given(st.sampled_from(sorted(VALID)), st.data())
def test_damaged_bytes_give_pixels_or_a_value_error(extension: str, data: st.DataObject) -> None:
    damaged = bytearray(VALID[extension])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 400)))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_image(bytes(damaged), extension)
    except ValueError:
        return
    assert pixels.ndim == 3 and pixels.dtype in (torch.uint8, torch.uint16)
