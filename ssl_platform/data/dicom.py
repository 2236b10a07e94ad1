"""DICOM files: the pixels of one image, and the few tags that say how it was made and nothing of whose it is."""

import io
import warnings
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTENSIONS = ("dcm", "dicom")
HOUNSFIELD = (-1024.0, 3071.0)
"""The range of CT values that is stored, as 0 to 65535; values outside are clipped."""

_NUMBERS = (
    "Rows", "Columns", "BitsStored", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "FrameTime", "KVP", "EchoTime", "RepetitionTime", "FlipAngle", "MagneticFieldStrength",
)  # fmt: skip
"""Tags that hold numbers, which say how large things are and how the image was taken."""
_CODES = {
    "Modality": "CR CT DX ES GM IO IVOCT MG MR NM OCT OP OPT PT PX RF RG SM US XA XC",
    "PhotometricInterpretation": "MONOCHROME1 MONOCHROME2 PALETTE_COLOR RGB YBR_FULL YBR_FULL_422 YBR_ICT YBR_RCT",
    "BodyPartExamined": (
        "ABDOMEN ABDOMENPELVIS ANKLE ARM BLADDER BRAIN BREAST CERVIX CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE COLON "
        "CSPINE ELBOW ESOPHAGUS EXTREMITY EYE FACE FINGER FOOT FOREARM HAND HEAD HEADNECK HEART HIP HUMERUS JAW KIDNEY "
        "KNEE LEG LIVER LSPINE LUNG NECK OVARY PANCREAS PELVIS PROSTATE RETINA RIBS SHOULDER SKULL SPINE SPLEEN STOMACH "
        "THIGH THYROID TOE TSPINE UTERUS WHOLEBODY WRIST"
    ),
    "ViewPosition": "AP PA LL RL RLD LLD RLO LLO CC MLO ML LM LMO LAT XCCL XCCM FB ISO CV AT",
    "ImageLaterality": "L R U B",
    "Laterality": "L R",
}
"""Tags that hold codes, with the codes that are kept. Free text is kept nowhere: anybody may have typed a name there."""


class Missing(ValueError):
    """The library that reads DICOM is not installed."""


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def may_be(path: Path) -> bool:
    """Whether a file may be DICOM by its name."""
    return path.suffix[1:].lower() in EXTENSIONS or _is_number_or_none(path)


def _is_number_or_none(path: Path) -> bool:
    """Scanners and archives write such names: "IM000001", "1.2.840.113619.2.5"."""
    return not path.suffix[1:] or path.suffix[1:].isdecimal()


def is_unnamed(path: Path) -> bool:
    """Whether a file has no ending, or a number for it, and is DICOM by its content; False if it cannot be read.

    The DICOMDIR of a folder is none: it lists the files.
    """
    if not _is_number_or_none(path) or path.name.upper() == "DICOMDIR":
        return False
    try:
        if not path.is_file():  # a pipe would never answer
            return False
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def patient(path: Path) -> str | None:
    """The PatientID of a DICOM file; None if it has none, or is no such file."""
    try:
        with path.open("rb") as file:
            if not is_dicom(file.read(132)):
                return None
            file.seek(0)
            header = _pydicom().dcmread(file, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID") or "").strip() or None
    except Missing:
        raise
    except Exception:  # it will be left out, with the reason, when its pixels are read
        return None


def read_dicom(data: bytes, refuse_burnt_in: bool) -> tuple[NDArray[Any], dict[str, Any]]:
    """The pixels (C, H, W) as uint8 or uint16 and the tags that may be kept; raises ValueError with the reason if bad.

    Bright is high whatever the file says. CT is in Hounsfield units over HOUNSFIELD; other images keep their stored
    values, spread over 8 bits if no more are stored, else over 16. Windows and overlays are not applied.
    """
    pydicom = _pydicom()
    try:
        file = pydicom.dcmread(io.BytesIO(data))
        frames = int(file.get("NumberOfFrames") or 1)
        if frames > 1:
            raise ValueError(f"{frames} frames are a video; single images can be packed so far")
        if refuse_burnt_in and str(file.get("BurnedInAnnotation", "")).upper() == "YES":
            raise ValueError("its pixels show names (BurnedInAnnotation is YES)")
        return _pixels(file, pydicom), _tags(file)
    except Exception as error:  # damaged bytes make the decoders raise almost anything
        reason = " ".join(str(error).split())[:250] or type(error).__name__
        raise ValueError(f"cannot be decoded as DICOM: {reason}") from error


def _pixels(file: Any, pydicom: Any) -> NDArray[Any]:
    stored = pydicom.pixels.pixel_array(file)  # YBR is RGB already
    kind = str(file.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        stored = pydicom.pixels.apply_color_lut(stored, file)
    if stored.ndim == 3:
        return np.ascontiguousarray(np.moveaxis(_eight_or_sixteen(stored), -1, 0))
    bits = int(file.BitsStored)
    if int(file.get("HighBit", bits - 1)) != bits - 1:
        raise ValueError(f"HighBit {file.HighBit} with {bits} bits stored is not supported, {bits - 1} is")
    values: NDArray[Any] = stored.astype(np.int64) & (1 << bits) - 1  # the other bits may hold an overlay
    is_signed = bool(file.PixelRepresentation)
    if file.get("Modality") == "CT":
        values -= (values >> (bits - 1) << bits) if is_signed else 0
        low, high = HOUNSFIELD
        units = values * float(file.get("RescaleSlope", 1)) + float(file.get("RescaleIntercept", 0))
        scaled = (np.clip(units, low, high) - low) / (high - low)
    else:
        scaled = (values ^ (1 << (bits - 1) if is_signed else 0)) / ((1 << bits) - 1)  # the least value is 0
    if kind == "MONOCHROME1":
        scaled = 1 - scaled
    is_deep = bits > 8 or file.get("Modality") == "CT"
    return np.round(scaled * (65535 if is_deep else 255)).astype(np.uint16 if is_deep else np.uint8)[None]


def _eight_or_sixteen(stored: NDArray[Any]) -> NDArray[Any]:
    if stored.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"colours of dtype {stored.dtype} are not supported, uint8 and uint16 are")
    return stored


def _tags(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _NUMBERS:
        try:
            value = file.get(name)
            numbers = [float(part) for part in (value if isinstance(value, MutableSequence) else [value])]
        except (TypeError, ValueError):
            continue
        if all(np.isfinite(numbers)):
            plain = [int(one) if one.is_integer() else one for one in numbers]
            found[name] = plain[0] if len(plain) == 1 else plain
    for name, codes in _CODES.items():
        value = str(file.get(name, "")).strip().replace(" ", "_")
        if value in codes.split():
            found[name] = value
    return found


def _pydicom() -> Any:
    """The library, imported where there is a file for it."""
    try:
        import pydicom
        import pydicom.pixels
    except ModuleNotFoundError:
        raise Missing("a DICOM file needs pydicom: pip install 'ssl-platform[dicom]'") from None
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module="pydicom")  # of odd tags, with their values
    return pydicom
