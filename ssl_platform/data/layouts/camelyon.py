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
import csv
import logging
import re
from pathlib import Path
from typing import NamedTuple

from ssl_platform.data.commands.slides import add_slide_options, pack_slides
from ssl_platform.data.layouts import keep_columns, missing, splits_as_asked

logger = logging.getLogger(__name__)

COLUMNS = ("center", "slide_label")
_SLIDE = re.compile(r"(normal|tumor|test)_\d{3}|patient_(\d{3})_node_\d")
_HEALTHY = ("normal", "negative")
_STAGES = ("negative", "itc", "micro", "macro")
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
        "--labels", choices=["lesions", "slide"], default="lesions", help="what says the label of a tile; default lesions"
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
