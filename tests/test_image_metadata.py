"""Files lose all that they say besides their pixels, and not one pixel changes; DICOM keeps numbers and codes alone."""

import io
import struct
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from ssl_platform.data.dicom import read_dicom
from ssl_platform.data.items import Item
from ssl_platform.data.media import Options
from ssl_platform.data.media.image import load
from ssl_platform.data.metadata import without_metadata
from ssl_platform.data.sources import folder_items, manifest_items
from ssl_platform.modalities._images import decode_image

NAME = "Mustermann"
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {NAME}="1"/></rdf:RDF></x:xmpmeta>'
).encode()
Array = np.ndarray[Any, Any]


def photo(channels: int = 3, dtype: type = np.uint8) -> Array:
    pixels = np.random.default_rng(channels).integers(0, 2**16, (11, 14, channels))
    return (pixels >> (8 if dtype == np.uint8 else 0)).astype(dtype).squeeze()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x013B], tags[0x9286] = orientation, NAME, NAME
    return tags


def profile() -> bytes:
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return made + NAME.encode()


def jpeg(orientation: int = 1, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo()).convert(mode).save(
        file, "JPEG", exif=exif(orientation), comment=NAME, icc_profile=profile(), xmp=XMP, **options
    )
    return file.getvalue() + NAME.encode()  # as phones append videos and second images


def png(orientation: int, mode: str = "RGB", **options: Any) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", NAME)
    text.add_text("Comment", NAME, zip=True)
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    file = io.BytesIO()
    image = Image.fromarray(photo()).convert(mode)
    image.save(file, "PNG", exif=exif(orientation), pnginfo=text, icc_profile=profile(), **options)
    return file.getvalue() + NAME.encode()


def webp(orientation: int, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo()).save(file, "WEBP", exif=exif(orientation), xmp=XMP, icc_profile=profile(), **options)
    return file.getvalue()


def tiff(pixels: Array, **options: Any) -> bytes:
    file = io.BytesIO()
    more = {"description": NAME, "software": NAME, **options}
    tifffile.imwrite(file, pixels, extratags=[(65000, "s", None, NAME, True)], **more)
    return file.getvalue()


def loaded(tmp_path: Path, data: bytes, extension: str) -> tuple[bytes, str, torch.Tensor]:
    path = tmp_path / f"file.{extension}"
    path.write_bytes(data)
    stored, kind, values, *_ = load(Item(path, path.name), Options())
    assert values is not None
    return stored, kind, torch.from_numpy(values)


def holds_name(data: bytes) -> bool:
    """Also in what a PNG has compressed."""
    return NAME.encode() in data or any(
        NAME.encode() in zlib.decompressobj().decompress(data[place:])
        for place in range(len(data) - 1)
        if data[place] == 0x78 and (data[place] * 256 + data[place + 1]) % 31 == 0 and _inflates(data[place:])
    )


def _inflates(data: bytes) -> bool:
    try:
        zlib.decompressobj().decompress(data)
    except zlib.error:
        return False
    return True


FILES = {
    **{f"jpeg turned {turn}": (jpeg(turn), "jpg") for turn in range(1, 9)},
    "jpeg progressive": (jpeg(6, progressive=True, quality=90), "jpg"),
    "jpeg with restarts": (jpeg(3, restart_marker_rows=1), "jpg"),
    "jpeg grey": (jpeg(mode="L"), "jpeg"),
    "jpeg CMYK": (jpeg(mode="CMYK"), "jpg"),
    "jpeg by another name": (jpeg(5), "png"),
    **{f"png turned {turn}": (png(turn), "png") for turn in (1, 6, 8)},
    "png palette": (png(1, "P", transparency=3), "png"),
    "png alpha": (png(2, "RGBA"), "png"),
    "png 1 bit": (png(1, "1"), "png"),
    "webp": (webp(7, quality=80), "webp"),
    "webp lossless": (webp(1, lossless=True), "webp"),
    "tiff": (tiff(photo()), "tif"),
    "tiff 16 bits": (tiff(photo(1, np.uint16)), "tiff"),
    "tiff colours of 16 bits": (tiff(photo(3, np.uint16)), "tiff"),
    "tiff 7 channels": (tiff(np.moveaxis(photo(7), -1, 0), photometric="minisblack"), "tif"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_name_goes_and_the_pixels_stay(name: str, tmp_path: Path) -> None:
    data, extension = FILES[name]
    assert holds_name(data), "or the test shows nothing"
    stored, kind, values = loaded(tmp_path, data, extension)
    assert not holds_name(stored)
    before, after = decode_image(data, extension), decode_image(stored, kind)
    assert before.dtype == after.dtype and torch.equal(before, after) and torch.equal(after, values)
    if "jpeg" in name or ("png" in name and kind == "png"):
        assert without_metadata(data) == (stored, kind), "the compressed pixels are the same bytes"
        assert len(stored) < len(data)
    again = loaded(tmp_path, stored, kind)
    assert again[:2] == (stored, kind), "what is clean stays as it is"


def test_the_orientation_is_all_that_is_left() -> None:
    for data in (jpeg(6), png(6), webp(6)):
        clean, _ = without_metadata(data) or (b"", "")
        tags = Image.open(io.BytesIO(clean)).getexif()
        assert dict(tags) == {0x0112: 6}


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("is_alpha", [True, False])
def test_alpha_is_alpha_and_a_channel_is_a_channel(channels: int, dtype: type, is_alpha: bool, tmp_path: Path) -> None:
    """Training drops the first and counts the second."""
    pixels = photo(channels, dtype)
    kind = {"extrasamples": ["unassalpha"], "photometric": "minisblack" if channels == 2 else "rgb"}
    data = tiff(pixels, **kind) if is_alpha else tiff(np.moveaxis(pixels, -1, 0), photometric="minisblack")
    stored, extension, _ = loaded(tmp_path, data, "tif")
    for wanted in (None, channels - 1):
        try:
            expected = decode_image(data, "tif", wanted)
        except ValueError:
            with pytest.raises(ValueError):
                decode_image(stored, extension, wanted)
        else:
            assert torch.equal(decode_image(stored, extension, wanted), expected)
    assert not holds_name(stored)


def test_other_pages_are_not_stored(tmp_path: Path) -> None:
    """As a slide's label and overview are."""
    label = np.random.default_rng(1).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(photo())
        writer.write(label)
    assert label.tobytes() in file.getvalue()
    stored, kind, values = loaded(tmp_path, file.getvalue(), "tif")
    assert np.array_equal(values.numpy(), np.moveaxis(photo(), -1, 0))
    assert kind == "png" and len(stored) < label.nbytes


def test_an_animation_keeps_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(photo()), Image.fromarray(photo()[::-1])]
    for kind in ("png", "webp"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
        stored, _, values = loaded(tmp_path, file.getvalue(), kind)
        assert getattr(Image.open(io.BytesIO(stored)), "n_frames", 1) == 1
        assert torch.equal(values, decode_image(file.getvalue(), kind))


def test_an_array_keeps_its_numbers_alone(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, photo())
    data = file.getvalue()
    spoken = data.replace(b"}" + b" " * (len(NAME) + 1), b"}#" + NAME.encode(), 1)
    assert spoken != data and torch.equal(decode_image(spoken, "npy"), decode_image(data, "npy"))
    assert loaded(tmp_path, spoken, "npy")[0] == data


def test_public_files_are_stored_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jpeg"
    path.write_bytes(jpeg(6))
    assert load(Item(path, path.name), Options(keep_metadata=True))[:2] == (path.read_bytes(), "jpeg")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing(data: st.DataObject) -> None:
    """A file is cleaned or it is not; what is decoded from it is then compared."""
    whole, _ = FILES[data.draw(st.sampled_from(["jpeg turned 6", "png turned 6", "webp", "tiff"]))]
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=4)):
        if damaged:
            damaged[place] = data.draw(st.integers(0, 255))
    clean = without_metadata(bytes(damaged))
    assert clean is None or clean[1] in ("jpg", "png", "webp")


# -- DICOM -------------------------------------------------------------------------------------------------------------


def dicom(pixels: Array, tags: Mapping[str, Any] | None = None, **more: Any) -> bytes:
    """A file with these pixels (H, W) or (H, W, 3), full of names."""
    file = Dataset()
    file.PatientName = file.PatientID = file.StudyDescription = file.Manufacturer = file.StationName = NAME
    file.add(pydicom.DataElement(0x00110010, "LO", NAME))
    file.add(pydicom.DataElement(0x00111001, "LO", NAME))
    file.PatientBirthDate = "19500102"
    file.SOPInstanceUID, file.SOPClassUID = generate_uid(), "1.2.840.10008.5.1.4.1.1.2"
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    file.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        file.PlanarConfiguration = 0
    bits = pixels.dtype.itemsize * 8
    file.BitsAllocated, file.BitsStored, file.HighBit = bits, bits, bits - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes()
    for name, value in {**(tags or {}), **more}.items():
        setattr(file, name, value)
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.ImplementationVersionName = NAME
    written = io.BytesIO()
    pydicom.dcmwrite(written, file, enforce_file_format=True)
    return written.getvalue()


STORED = np.arange(12, dtype=np.uint16).reshape(3, 4) * 372  # up to 4092 of 4095


@pytest.mark.parametrize(
    ("pixels", "tags", "expected"),
    [
        (STORED.astype(np.uint8), {}, STORED.astype(np.uint8)),
        (STORED, {"BitsStored": 12, "HighBit": 11}, np.round(STORED / 4095 * 65535)),
        (STORED, {"BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": "MONOCHROME1"},
         65535 - np.round(STORED / 4095 * 65535)),
        (STORED | 0xF000, {"BitsStored": 12, "HighBit": 11}, np.round(STORED / 4095 * 65535)),  # an old overlay
        (STORED.astype(np.int16) - 2048, {"BitsStored": 12, "HighBit": 11}, np.round(STORED / 4095 * 65535)),
        (STORED, {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}, np.round(STORED / 4095 * 65535)),
        (STORED.astype(np.int16) - 1024, {"Modality": "CT"}, np.round(STORED / 4095 * 65535)),
        (np.full((2, 2), 30000, np.int16), {"Modality": "CT"}, np.full((2, 2), 65535)),
    ],
)  # fmt: skip
def test_dicom_pixels(pixels: Array, tags: dict[str, Any], expected: Array) -> None:
    found, about = read_dicom(dicom(pixels, tags), refuse_burnt_in=True)
    assert found.dtype == (np.uint8 if pixels.dtype == np.uint8 else np.uint16)
    assert np.array_equal(found, expected[None].astype(found.dtype))
    assert about["Rows"] == pixels.shape[0] and NAME not in repr(about)


def test_dicom_colours_and_tags(tmp_path: Path) -> None:
    told = {"Modality": "US", "PixelSpacing": [0.5, 0.25], "BodyPartExamined": "HEART", "FrameTime": "33.3"}
    data = dicom(photo(), told)
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    stored, kind, values, about, _ = load(Item(path, path.name), Options())
    assert kind == "png" and values is not None and np.array_equal(values, np.moveaxis(photo(), -1, 0))
    assert about == {
        "Rows": 11, "Columns": 14, "BitsStored": 8, "PixelSpacing": [0.5, 0.25], "FrameTime": 33.3, "Modality": "US",
        "BodyPartExamined": "HEART", "PhotometricInterpretation": "RGB",
    }  # fmt: skip
    assert torch.equal(decode_image(stored, kind), torch.from_numpy(values))


def test_dicom_codes_are_kept_only_if_they_are_codes() -> None:
    """Anybody may have typed a name into them."""
    tags = {"Modality": "CT", "BodyPartExamined": NAME.upper(), "ViewPosition": NAME.upper(), "PixelSpacing": None}
    _, about = read_dicom(dicom(STORED, tags), refuse_burnt_in=True)
    assert "BodyPartExamined" not in about and "ViewPosition" not in about and "PixelSpacing" not in about


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dicom(STORED, NumberOfFrames=30), "30 frames are a video; single images can be packed so far"),
        (dicom(STORED, BurnedInAnnotation="YES"), "its pixels show names (BurnedInAnnotation is YES)"),
        (dicom(STORED, BitsStored=12, HighBit=15), "HighBit 15 with 12 bits stored is not supported, 11 is"),
        (dicom(STORED)[:-5], "cannot be decoded as DICOM: "),
        (dicom(STORED)[:300], "cannot be decoded as DICOM: "),
    ],
)
def test_dicom_that_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        read_dicom(data, refuse_burnt_in=True)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_only_calls_itself_dicom(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom(STORED)[132:])
    with pytest.raises(ValueError, match="no DICOM file: the mark DICM is not at byte 128"):
        load(Item(path, path.name), Options())


def test_without_pydicom_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom(STORED))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"a DICOM file needs pydicom: pip install 'ssl-platform\[dicom\]'"):
        folder_items(tmp_path, labels=False)


def test_the_group_of_a_dicom_file_is_its_patient(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom(STORED, PatientID=" 17 "))
    (tmp_path / "b.DCM").write_bytes(dicom(STORED, PatientID=""))
    (tmp_path / "c.dcm").write_bytes(b"no DICOM")
    (tmp_path / "IM0001").write_bytes(dicom(STORED, PatientID="18"))
    assert [item.group for item in folder_items(tmp_path, labels=False)] == ["18", "17", None, None]
    table = tmp_path / "table.csv"
    table.write_text("path,group\na.dcm,\nIM0001,\na.dcm,given\n")
    assert [item.group for item in manifest_items(table, tiles=False)] == ["17", "18", "given"]


def test_a_real_dicom_file() -> None:
    path = pydicom.data.get_testdata_file("CT_small.dcm", download=False)
    if path is None:
        pytest.skip("pydicom came without its test files")
    pixels, about = read_dicom(Path(str(path)).read_bytes(), refuse_burnt_in=True)
    assert pixels.shape == (1, 128, 128) and about["Modality"] == "CT" and struct.calcsize("H") == pixels.itemsize
