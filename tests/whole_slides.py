"""Whole slides for tests: pyramidal TIFF, Aperio SVS and DICOM-WSI, made from pixels as the scanners write them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, generate_uid

Pixels = NDArray[np.uint8]
BLOCK = 256
LABEL_COLOUR = (3, 250, 7)
"""Of the label images: no other pixel of a slide has it."""
_VL_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def halved(image: Pixels, factor: int) -> Pixels:
    """Every `factor` x `factor` pixels as their mean."""
    height, width = (length // factor * factor for length in image.shape[:2])
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def pyramid(image: Pixels, factors: Sequence[int]) -> list[Pixels]:
    return [halved(image, factor) if factor > 1 else image for factor in factors]


def write_tiff(path: Path, levels: Sequence[Pixels], mpp: tuple[float, float] | None = (0.25, 0.25)) -> Path:
    """A lossless pyramidal tiled TIFF, with microns per pixel in its resolution tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            factor = levels[0].shape[1] / level.shape[1]
            tags: dict[str, Any] = {}
            if mpp is not None:
                tags = {"resolution": tuple(1e4 / (axis * factor) for axis in mpp), "resolutionunit": "CENTIMETER"}
            file.write(
                level,
                tile=(BLOCK, BLOCK),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(number > 0),
                metadata=None,
                **tags,
            )
    return path


def write_svs(path: Path, levels: Sequence[Pixels], description: str = "|AppMag = 40|MPP = 0.2500") -> Path:
    """An Aperio SVS: JPEG blocks, thumbnail, label and macro."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = levels[0].shape[:2]
    label = np.full((100, 120, 3), LABEL_COLOUR, np.uint8)
    name = "Aperio Image Library v11.2.1\n"
    plain: dict[str, Any] = {"photometric": "rgb", "metadata": None, "software": False}
    blocks = plain | {"tile": (BLOCK, BLOCK), "compression": "jpeg", "compressionargs": {"level": 95}}
    with tifffile.TiffWriter(path) as file:
        file.write(levels[0], description=f"{name}{width}x{height} [0,0 {width}x{height}]{description}", **blocks)
        file.write(levels[-1], compression="jpeg", rowsperstrip=16, description=f"{name}thumbnail", **plain)
        for level in levels[1:]:
            size = f"{width}x{height} -> {level.shape[1]}x{level.shape[0]}"
            file.write(level, description=f"{name}{size}{description}", **blocks)
        file.write(label, compression="lzw", description=f"{name}label 120x100", subfiletype=1, **plain)
        file.write(label, compression="jpeg", description=f"{name}macro 120x100", subfiletype=9, **plain)
    return path


def write_dicom(folder: Path, levels: Sequence[Pixels], patient: str = "Doe^Jane") -> Path:
    """A DICOM whole slide at 0.25 microns, a file for each level; the folder is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = (generate_uid() for _ in range(3))
    for number, level in enumerate(levels):
        flavour = (
            ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"] if number == 0 else ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
        )
        dataset = _dicom_level(level, 0.00025 * levels[0].shape[1] / level.shape[1], flavour)
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = series, study, frame
        dataset.PatientName = patient
        dataset.save_as(folder / f"level{number}.dcm", enforce_file_format=True)
    return folder


def _dicom_level(image: Pixels, spacing: float, flavour: list[str]) -> Dataset:
    height, width = image.shape[:2]
    dataset, measures, shared, path = Dataset(), Dataset(), Dataset(), Dataset()
    uid = generate_uid()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = _VL_WHOLE_SLIDE
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
    dataset.Modality, dataset.ImageType = "SM", flavour
    dataset.Rows = dataset.Columns = BLOCK
    dataset.TotalPixelMatrixColumns, dataset.TotalPixelMatrixRows = width, height
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "YBR_FULL_422", 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.DimensionOrganizationType = "TILED_FULL"
    dataset.TotalPixelMatrixFocalPlanes = dataset.NumberOfOpticalPaths = 1
    measures.PixelSpacing, measures.SliceThickness = [spacing, spacing], 0.001
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    path.OpticalPathIdentifier, path.ObjectiveLensPower = "1", 40
    dataset.OpticalPathSequence = [path]
    dataset.ImagedVolumeWidth, dataset.ImagedVolumeHeight = width * spacing, height * spacing
    frames = [
        _jpeg(image[y : y + BLOCK, x : x + BLOCK]) for y in range(0, height, BLOCK) for x in range(0, width, BLOCK)
    ]
    dataset.NumberOfFrames = str(len(frames))
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    return dataset


def _jpeg(part: Pixels) -> bytes:
    block = np.full((BLOCK, BLOCK, 3), 255, np.uint8)
    block[: part.shape[0], : part.shape[1]] = part
    file = io.BytesIO()
    Image.fromarray(block).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


# -- pixels ------------------------------------------------------------------------------------------------------------


def coordinates(height: int, width: int) -> Pixels:
    """Red is x modulo 256, green y modulo 256, blue 200."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, np.full_like(x, 200)], -1).astype(np.uint8)


def section(height: int, width: int, seed: int = 0) -> Pixels:
    """Glass with a disk of pink and purple "tissue" in the middle that fills half of the shorter side."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), 244.0) + rng.normal(0, 1.5, (height, width, 1))
    disk = np.hypot(y - height / 2, x - width / 2) < min(height, width) / 4
    coarse = rng.random((height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)[:height, :width]
    amounts = np.where(coarse[..., None] < 0.25, (1.4, 0.5), (0.15, 0.7)) * rng.uniform(0.8, 1.2, (height, width, 1))
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    image[disk] = 240 * np.exp(-(amounts @ stains)[disk])
    return np.clip(image, 0, 255).round().astype(np.uint8)


def disk_share(height: int, width: int, box: Sequence[float]) -> float:
    """The share of a box x0, y0, x1, y1 that the tissue of `section` fills."""
    y, x = np.mgrid[box[1] : box[3] : 32j, box[0] : box[2] : 32j]
    return float((np.hypot(y - height / 2, x - width / 2) < min(height, width) / 4).mean())
