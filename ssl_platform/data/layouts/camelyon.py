"""Camelyon16 and Camelyon17: whole slides of lymph nodes, cut into tiles as by ssl-pack slides.

    DIR/training/normal/normal_001.tif      DIR/training/lesion_annotations/tumor_001.xml
    DIR/training/tumor/tumor_001.tif        DIR/testing/lesion_annotations/test_001.xml
    DIR/testing/images/test_001.tif         DIR/testing/reference.csv

    DIR/training/center_0/patient_000_node_0.tif (or in center_0/patient_000/)
    DIR/training/stage_labels.csv (or stages.csv)      DIR/training/lesion_annotations/patient_004_node_4.xml

Slides and annotations are known by their names, so they may lie anywhere below DIR, both data sets together too; archives
must be unpacked. The splits are train (Camelyon17: patients 000 to 099) and test. The label of a tile is tumor if half of it
(--label-share) lies in an annotated metastasis, and normal if its slide has none. Other tiles have no label, because not
all slides are annotated exhaustively: --normal-outside takes those of annotated slides for normal, --labels slide gives
every tile its slide's label (normal, tumor; negative, itc, micro, macro), which is the stored column slide_label.
The group is the patient (Camelyon16: the slide), the stored column center Camelyon17's centre 0 to 4.

    ssl-pack camelyon CAMELYON16 shards --mpp 0.5 --tile 256 --workers 16          # shards/train and shards/test
"""

import argparse
import logging
import re
from pathlib import Path
from typing import NamedTuple

from ssl_platform.data.commands.slides import add_slide_options, pack_slides
from ssl_platform.data.layouts import keep_columns, missing, splits_as_asked
from ssl_platform.data.slides.listing import SlideRow
from ssl_platform.data.sources import walk
from ssl_platform.data.tables import read_rows

logger = logging.getLogger(__name__)

COLUMNS = ("center", "slide_label")
_SLIDE = re.compile(r"(normal|tumor|test)_\d{3}|patient_(\d{3})_node_\d")
_HEALTHY = ("normal", "negative")
_LABELS = ("normal", "tumor", "negative", "itc", "micro", "macro")
"""Of slides: of Camelyon16 the first two."""
_PATIENTS_PER_CENTER = 20
_TRAINING_PATIENTS = 100


class _Found(NamedTuple):
    """The files below a folder that matter, by the slide that they are of."""

    slides: dict[str, Path]
    annotations: dict[str, Path]
    tables: list[Path]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ssl-pack slides, and which labels tiles get."""
    labels = parser.add_argument_group("camelyon")
    labels.add_argument(
        "--labels",
        choices=["lesions", "slide"],
        default="lesions",
        help="what says the label of a tile; default lesions",
    )
    labels.add_argument(
        "--normal-outside", action="store_true", help="tiles of annotated slides outside the metastases are normal"
    )
    add_slide_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0, or 1 if slides or tiles were left out because they cannot be read."""
    rows = splits_as_asked(slides(arguments), arguments, "camelyon")
    keep_columns(rows, arguments, COLUMNS)
    own = {"layout": "camelyon", "camelyon.labels": arguments.labels}
    return pack_slides(rows, arguments, own | {"camelyon.normal_outside": arguments.normal_outside})


def slides(arguments: argparse.Namespace) -> list[SlideRow]:
    """The slides below `arguments.folder`; raises ValueError if there are none, or one is there twice."""
    folder: Path = arguments.folder
    if arguments.normal_outside and arguments.labels == "slide":
        raise ValueError("--normal-outside: says nothing with --labels slide; leave out one or the other")
    found = _find(folder)
    labels = _slide_labels(found)
    rows = [_row(folder, name, found, labels.get(name), arguments) for name in sorted(found.slides)]
    if unknown := [name for name in sorted(found.slides) if name not in labels]:
        logger.warning(
            "%d slides have no label, the first is %s: reference.csv (Camelyon16) and stage_labels.csv or stages.csv "
            "(Camelyon17) have them",
            len(unknown), unknown[0],
        )  # fmt: skip
    ill = [name for name, label in sorted(labels.items()) if label not in _HEALTHY and name in found.slides]
    bare = [name for name in ill if name not in found.annotations]
    if bare and arguments.labels == "lesions":
        logger.warning(
            "%d of %d slides with metastases have no annotation (lesion_annotations/%s.xml, ...), so their tiles have no "
            "label of a lesion",
            len(bare), len(ill), bare[0],
        )  # fmt: skip
    return rows


def _find(folder: Path) -> _Found:
    found, archives = _Found({}, {}, []), []
    for place, files in walk(folder):
        for file in files:
            path = Path(place, file)
            name, ending = path.stem.lower(), path.suffix.lower()
            if ending == ".zip":
                archives.append(path)
            elif path.name.lower() in ("reference.csv", "stage_labels.csv", "stages.csv"):
                found.tables.append(path)
            elif ending in (".tif", ".xml") and _SLIDE.fullmatch(name):
                known = found.slides if ending == ".tif" else found.annotations
                if name in known:
                    raise ValueError(f"{path}: {known[name]} has the same name; a slide has one file: move one away")
                known[name] = path
    if archives:
        logger.warning("%s: an archive (of %d) that is not looked into; unpack it", archives[0], len(archives))
    if not found.slides:
        raise missing(
            folder, ["training/normal/normal_001.tif, ... or training/center_0/patient_000_node_0.tif, ..."], "camelyon"
        )
    return found


def _row(folder: Path, name: str, found: _Found, slide_label: str | None, arguments: argparse.Namespace) -> SlideRow:
    path = found.slides[name]
    patient = _patient(name)
    center = None if patient is None else _center(path, patient)
    columns = [("center", center), ("slide_label", slide_label)]
    row = SlideRow(
        path,
        path.relative_to(folder).as_posix(),
        group=None if patient is None else f"patient_{patient:03d}",
        columns=tuple((column, text) for column, text in columns if text is not None),
        split="test" if name.startswith("test") or (patient or 0) >= _TRAINING_PATIENTS else "train",
    )
    if arguments.labels == "slide":
        return row._replace(label=slide_label)
    if name in found.annotations:
        outside = "normal" if arguments.normal_outside else None
        return row._replace(regions=(("labels", found.annotations[name]),), outside=outside)
    return row._replace(label="normal" if slide_label in _HEALTHY else None)


def _patient(name: str) -> int | None:
    """Of Camelyon17: the slides of Camelyon16 do not say theirs."""
    found = re.match(r"patient_(\d{3})_", name)
    return int(found[1]) if found else None


def _center(path: Path, patient: int) -> str | None:
    """As the folder says; of patients for training 20 in a row are of one centre."""
    if named := [part for part in path.parts if re.fullmatch(r"center_\d", part)]:
        return named[-1][-1]
    return str(patient // _PATIENTS_PER_CENTER) if patient < _TRAINING_PATIENTS else None


def _slide_labels(found: _Found) -> dict[str, str]:
    """What the names and the tables say of slides: normal or tumor (Camelyon16), or a stage (Camelyon17)."""
    labels = {name: name.split("_")[0] for name in found.slides if name.startswith(("normal", "tumor"))}
    for table in found.tables:
        for cell, text in ((cells[0], "".join(cells[1:2])) for _, cells in read_rows(table)):
            name, label = Path(cell.strip().lower()).stem, text.strip().lower()
            if not _SLIDE.fullmatch(name):  # the header, and the stages of patients
                continue
            if label not in _LABELS:
                raise ValueError(f"{table}: {cell}: the label is '{text}'; expected one of {', '.join(_LABELS)}")
            labels[name] = label
    return labels
