"""Which slides there are: a folder of them or a table, with what is known of each."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ssl_platform.data import dicom
from ssl_platform.data.identity import Names
from ssl_platform.data.slides.reading import EXTENSIONS, open_slide
from ssl_platform.data.sources import is_manifest, manifest_items, walk
from ssl_platform.data.tables import read_table

Given = TypeVar("Given", Path, str)

logger = logging.getLogger(__name__)

GEOJSON_COLUMNS = ("include", "exclude", "labels")
_WITHOUT = {
    "include": "all of their tissue is kept",
    "exclude": "nothing of them is excluded",
    "labels": "their tiles have no label",
}
OURS = ("x", "y", "level", "mpp", "slide")
"""Columns that every tile has; of these a table may have `mpp`, which is the slide's."""


class SlideRow(NamedTuple):
    """One slide to be cut into tiles."""

    path: Path
    name: str
    """As the user wrote it, or relative to the folder."""
    mpp: float | None = None
    label: int | str | None = None
    group: int | str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    regions: tuple[tuple[str, Path], ...] = ()
    """GeoJSON or ASAP's XML files: of `include`, `exclude` and `labels` those that there are."""
    key: str = ""
    """What stands for the slide where its name must not; see `keyed`."""
    split: str | None = None
    """The split that its data set puts it into."""
    outside: str | None = None
    """The label of tiles outside all regions of `labels`, where these are known to be complete."""


def folder_slides(folder: Path) -> list[SlideRow]:
    """Every slide below a folder, sorted by name; of the files of one DICOM slide only the first."""
    found = [path for place, files in walk(folder) for file in files if _is_slide(path := Path(place, file))]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    kept, series = [], set[tuple[Path, str]]()
    for name in names:
        path = folder / name
        if _is_dicom(path):
            number = (path.parent, _series(path))
            if number in series:
                continue
            series |= {number} if number[1] else set()
        kept.append(SlideRow(path, name))
    if not kept:
        raise ValueError(f"{folder}: no slide in this folder or below it (looked for {', '.join(EXTENSIONS)})")
    return kept


def _is_slide(path: Path) -> bool:
    return not path.name.startswith(".") and (path.suffix[1:].lower() in EXTENSIONS or _is_dicom(path))


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() == ".dcm" or dicom.is_unnamed(path)


def _series(path: Path) -> str:
    """The series of a DICOM file, "" if it is none: openslide finds the other files of a series by itself."""
    try:
        return str(open_slide(path).properties.get("dicom.SeriesInstanceUID", ""))
    except ValueError:
        return ""


def table_slides(table: Path, splits: bool = False) -> list[SlideRow]:
    """The rows of a CSV or TSV file: path, and if given mpp, label, group or patient, include, exclude, labels.

    With `splits` the column split says which split a slide is in. Raises ValueError that names the row.
    """
    rows = []
    for item in manifest_items(table, tiles=False, splits=splits, medium="image"):
        columns = dict(item.columns)
        if taken := [name for name in columns if name in OURS and name != "mpp"]:
            raise ValueError(f"{table}: column '{taken[0]}': every tile gets a column of this name; rename yours")
        patient = columns.pop("patient", "").strip() or None
        files = {name: columns.pop(name, "").strip() for name in GEOJSON_COLUMNS}
        regions = tuple((name, table.parent / file) for name, file in files.items() if file)
        if missing := [path for _, path in regions if not path.is_file()]:
            raise ValueError(f"{table}: {item.name}: no such file: {missing[0]}")
        rows.append(
            SlideRow(
                path=item.path,
                name=item.name,
                mpp=_mpp(table, item.name, columns.pop("mpp", "").strip()),
                label=item.label,
                group=patient if item.group is None else item.group,
                columns=tuple(columns.items()),
                regions=regions,
                split=item.split,
            )
        )
    if twice := [name for name, times in Counter(row.name for row in rows).items() if times > 1]:
        raise ValueError(f"{table}: {twice[0]} is there twice; a slide has one row")
    return rows


def _mpp(table: Path, name: str, text: str) -> float | None:
    try:
        mpp = float(text) if text else None
    except ValueError:
        mpp = -1.0
    if mpp is not None and not 0 < mpp < 1000:
        raise ValueError(f"{table}: {name}: mpp is '{text}', expected microns per pixel such as 0.25, or nothing")
    return mpp


def list_slides(source: Path, splits: bool = False) -> list[SlideRow]:
    """The slides of a folder, a table, or a single slide; raises ValueError if that is neither."""
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if splits and (source.is_dir() or not is_manifest(source)):
        raise ValueError("--split column: only with a table, which has a column split")
    if source.is_dir():
        return folder_slides(source)
    return table_slides(source, splits) if is_manifest(source) else [SlideRow(source, source.name)]


def keyed(rows: Sequence[SlideRow], names: Names) -> list[SlideRow]:
    """The slides with their keys, which do not tell their names."""
    return [row._replace(key=names.digest("slide", row.name)) for row in rows]


def with_patients(rows: Sequence[SlideRow], patients: Path) -> list[SlideRow]:
    """The slides with the groups of a CSV with the columns slide (name, or name without its ending) and patient."""
    given: dict[str, str] = {}
    separator = "\t" if patients.suffix.lower() in (".tsv", ".tab") else ","
    for line, row in read_table(patients, ("slide", "patient"), separator):
        slide, patient = row["slide"], row["patient"]
        if not slide or not patient:
            raise ValueError(f"{patients}: line {line}: slide or patient is empty")
        if given.setdefault(slide, patient) != patient:
            raise ValueError(f"{patients}: line {line}: {slide} has two patients")
    found, unused = _given_to(rows, given, patients)
    if unused:
        logger.info("%s: %d of its slides are not among those given, the first is %s", patients, len(unused), unused[0])
    if missing := [row.name for row, patient in zip(rows, found, strict=True) if patient is None]:
        raise ValueError(
            f"{patients}: {len(missing)} of {len(rows)} slides have no patient in it, the first is {missing[0]}; "
            "add them: a slide whose patient is unknown could fall on both sides of a split"
        )
    return [row._replace(group=patient) for row, patient in zip(rows, found, strict=True)]


def with_regions(rows: Sequence[SlideRow], given: Mapping[str, Path | None]) -> list[SlideRow]:
    """The slides with GeoJSON files: {"include": a file for the only slide, or a folder of NAME.geojson}."""
    for kind, place in given.items():
        if place is None:
            continue
        if not place.exists():
            raise ValueError(f"{place}: no such file or folder")
        if not place.is_dir() and len(rows) > 1:
            raise ValueError(
                f"{place}: one GeoJSON file for {len(rows)} slides; name a folder with a NAME.geojson for each slide, "
                f"or give the table of slides a column {kind}"
            )
        if own := [row.name for row in rows if kind in dict(row.regions)]:
            raise ValueError(f"{place}: {own[0]} has its own file of regions ({kind}); leave out one or the other")
        found = _files_of(rows, kind, place) if place.is_dir() else [place]
        rows = [
            row._replace(regions=(*row.regions, (kind, path))) if path else row
            for row, path in zip(rows, found, strict=True)
        ]
    return list(rows)


def _files_of(rows: Sequence[SlideRow], kind: str, folder: Path) -> list[Path | None]:
    """The GeoJSON file of each slide; slides without one, and files of no slide, are told: names may be misspelt."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.*json")):
        if (other := files.setdefault(path.stem, path)) != path:
            raise ValueError(f"{folder}: {other.name} and {path.name} are of the same slide; move one away")
    found, unused = _given_to(rows, files, folder)
    bare = [row.name for row, path in zip(rows, found, strict=True) if path is None]
    if len(bare) == len(rows):
        raise ValueError(
            f"{folder}: no GeoJSON file in it has the name of a slide, such as {rows[0].path.stem}.geojson"
        )
    if bare:
        logger.warning(
            "%s: %d of %d slides have no file in it, the first is %s: %s",
            folder, len(bare), len(rows), bare[0], _WITHOUT[kind],
        )  # fmt: skip
    if unused:
        logger.warning("%s: %d files are of no slide, the first is %s", folder, len(unused), files[unused[0]].name)
    return found


def _given_to(
    rows: Sequence[SlideRow], given: Mapping[str, Given], source: Path
) -> tuple[list[Given | None], list[str]]:
    """What is given for each slide by its name, its file name, or that without the ending; and what is given for none.

    Raises ValueError if one entry fits several slides.
    """
    found: list[Given | None] = []
    used: dict[str, str] = {}
    for row in rows:
        key = next((name for name in (row.name, row.path.name, row.path.stem) if name in given), None)
        if key is not None and (other := used.setdefault(key, row.name)) != row.name:
            raise ValueError(
                f"{source}: '{key}' fits {other} and {row.name}; use longer names there, or a table of slides with "
                "columns for this, so that each slide gets what is its own"
            )
        found.append(None if key is None else given[key])
    return found, [key for key in given if key not in used]
