"""What ssl-pack can pack, as lists of items: a folder of images, a manifest of images or tiles, a large image."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_platform.data import dicom
from ssl_platform.data.slides.reading import SlideTiles
from ssl_platform.data.tables import read_rows, width_problem
from ssl_platform.data.tars import shown
from ssl_platform.modalities import _audio
from ssl_platform.modalities._images import EXTENSIONS, decode_image

logger = logging.getLogger(__name__)

_MANIFESTS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_MAX_LINES = 10


class Item(NamedTuple):
    """One sample to be packed."""

    path: Path
    name: str
    """The path as the user wrote it, or relative to the folder: what the sample remembers of its origin."""
    label: int | str | None = None
    group: int | str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    """Further (name, text) pairs of a manifest."""
    corner: tuple[int, int] | None = None
    """x, y of the upper left pixel of a tile; None = the whole file, as it is."""
    split: str | None = None
    """The split that the user put it into."""
    medium: str = "image"
    """The file of `ssl_platform.data.media` that reads it."""
    slide: SlideTiles | None = None
    """How a tile is read where `path` is a whole slide; `corner` is then in pixels of its level 0."""
    part: tuple[int | float | str, ...] = ()
    """What of the file is meant, in words of the medium: a row of an array, a time; `name` must tell parts apart."""
    hidden: tuple[str, ...] = ()
    """What names somebody besides the group, and is stored as a salted hash too: "label", columns by their names."""

    @property
    def is_whole(self) -> bool:
        """Whether the size of the file says how large the sample is."""
        return self.corner is None and not self.part


def folder_items(folder: Path, labels: bool, groups: bool = False) -> list[Item]:
    """Every image, or every sound, below a folder, sorted; with `labels` or `groups`, the first folder of its relative
    path is that. Otherwise the group of a DICOM file is its PatientID. Raises ValueError if there are both.
    """
    known = (*EXTENSIONS, *dicom.EXTENSIONS, *_audio.EXTENSIONS)
    paths = [
        Path(place, file)
        for place, files in walk(folder)
        for file in files
        if not file.startswith(".") and Path(file).suffix[1:].lower() in known
    ]
    if not paths:
        raise ValueError(f"{folder}: no image or sound in this folder or below it (looked for {', '.join(known)})")
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    first = _typed([name.split("/")[0] if "/" in name else "" for name in names])
    items = [
        Item(folder / name, name, value if labels else None, value if groups else None, medium=_medium(name))
        for name, value in zip(names, first, strict=True)
    ]
    _check_media(folder, items)
    return items if groups else _with_patients(items)


def _medium(name: str) -> str:
    return "audio" if Path(name).suffix[1:].lower() in _audio.EXTENSIONS else "image"


def _check_media(source: Path, items: Sequence[Item]) -> None:
    """Shards hold one kind of data."""
    firsts = {item.medium: item.name for item in reversed(items)}
    if len(firsts) > 1:
        raise ValueError(
            f"{source}: holds images and sound ({shown(firsts['image'])}, {shown(firsts['audio'])}); pack them apart, "
            "each from a folder or table of its own"
        )


def _with_patients(items: list[Item]) -> list[Item]:
    """The items, with the PatientID of DICOM files as group where none is given."""
    unknown = [
        place
        for place, item in enumerate(items)
        if item.group is None and item.path.suffix[1:].lower() in (*dicom.EXTENSIONS, "")
    ]
    if unknown:
        with ThreadPoolExecutor(16) as pool:  # a header is a short read, which a network file system answers slowly
            for place, group in zip(unknown, pool.map(dicom.patient, [items[i].path for i in unknown]), strict=True):
                items[place] = items[place]._replace(group=group)
    return items


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder and its files, links followed, but none to a folder that holds it: that would have no end.

    Raises ValueError that names a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"{shown(str(error.filename))}: this folder cannot be read ({error.strerror})")

    root = os.path.realpath(folder)
    above: dict[str, tuple[str, frozenset[str]]] = {str(folder): (root, frozenset([root]))}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        own, around = above.pop(place)
        for name in folders[:]:
            inside = os.path.join(place, name)  # noqa: PTH118 (as os.walk does, whose names are the keys)
            real = os.path.realpath(inside) if os.path.islink(inside) else f"{own}/{name}"  # noqa: PTH114
            if real in around:
                logger.warning("%s: not followed: a link to a folder that holds it", shown(inside))
                folders.remove(name)
            above[inside] = real, around | {real}
        yield place, files


def is_manifest(path: Path) -> bool:
    return path.suffix.lower() in _MANIFESTS


def manifest_items(manifest: Path, tiles: bool, splits: bool = False) -> list[Item]:
    """The rows of a CSV or TSV file: columns path, label, group, any others; with `tiles`, x and y of a tile's corner.

    With `splits` the column split says which split a row is in. DICOM files without a group have their PatientID's.
    Raises ValueError with the numbers of the lines that are wrong.
    """
    rows = read_rows(manifest, _MANIFESTS[manifest.suffix.lower()])
    header = [name.strip() for name in rows[0][1]] if rows else []
    for name in ("path", "x", "y") if tiles else ("path",):
        if name not in header:
            why = " (with --tile each row is one tile, and x, y its upper left pixel)" if name != "path" else ""
            raise ValueError(
                f"{manifest}: line 1: no column '{name}'{why}; the columns are {shown(', '.join(header)) or 'none'}; "
                f"known are path, label, group and any others{_separator(manifest, rows)}"
            )
    if splits and "split" not in header:
        raise ValueError(
            f"{manifest}: line 1: no column 'split', which --split column reads; there are {', '.join(header)}"
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{manifest}: line 1: column '{twice[0]}' is there twice")
    if len(rows) < 2:
        raise ValueError(f"{manifest}: no row below the header")
    problems = [
        (line, problem) for line, row in rows[1:] if (problem := _row_problem(manifest, header, row, tiles, splits))
    ]
    if problems:
        lines = [f"  line {line}: {problem}" for line, problem in problems[:_MAX_LINES]]
        more = [f"  and {len(problems) - _MAX_LINES} more"] * (len(problems) > _MAX_LINES)
        raise ValueError("\n".join([f"{manifest}: {len(problems)} lines cannot be used", *lines, *more]))
    table = [dict(zip(header, row, strict=True)) for _, row in rows[1:]]
    _warn_of_repetition(manifest, [(line, row[header.index("path")]) for line, row in rows[1:]], tiles)
    labels, groups = (_typed([row.get(name, "").strip() for row in table]) for name in ("label", "group"))
    special = {"path", "label", "group", *(("x", "y") if tiles else ()), *(("split",) if splits else ())}
    items = [
        Item(
            path=manifest.parent / row["path"],
            name=row["path"],
            label=label,
            group=group,
            columns=tuple((name, text) for name, text in row.items() if name not in special),
            corner=(int(row["x"]), int(row["y"])) if tiles else None,
            split=row["split"].strip() if splits else None,
            medium=_medium(row["path"]),
        )
        for row, label, group in zip(table, labels, groups, strict=True)
    ]
    _check_media(manifest, items)
    return _with_patients(items)


def _warn_of_repetition(manifest: Path, paths: Sequence[tuple[int, str]], tiles: bool) -> None:
    seen: set[str] = set()
    again = [(line, path) for line, path in paths if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
    if again and not tiles:
        line, path = again[0]
        logger.warning(
            "%s: %d rows repeat a path and are packed again; the first is line %d: %s",
            manifest, len(again), line, shown(path),
        )  # fmt: skip


def _separator(manifest: Path, rows: Sequence[tuple[int, Sequence[str]]]) -> str:
    """What to do if the header is one cell because the cells are separated by something else."""
    expected = _MANIFESTS[manifest.suffix.lower()]
    if not rows or len(rows[0][1]) != 1:
        return ""
    (header,) = rows[0][1]
    found = [character for character in ",;\t|" if character != expected and character in header]
    return f"; its cells are separated by {found[0]!r}, {expected!r} is expected in {manifest.suffix}" if found else ""


def _row_problem(manifest: Path, header: Sequence[str], row: Sequence[str], tiles: bool, splits: bool) -> str | None:
    if len(row) != len(header):
        return width_problem(row, header)
    values = dict(zip(header, row, strict=True))
    if not values["path"]:
        return "the path is empty"
    try:
        found = (manifest.parent / values["path"]).is_file()
    except OSError as error:  # a name that is too long
        return f"{shown(values['path'])}: {error.strerror}"
    if not found:
        return f"no such file: {shown(values['path'])} (paths are relative to {manifest.parent})"
    for name in ("x", "y") if tiles else ():
        if not re.fullmatch(r"\d+", values[name].strip()):
            return f"{name} is '{shown(values[name])}', expected a whole number of pixels"
    if splits and not re.fullmatch(r"[A-Za-z0-9_-]+", values["split"].strip()):
        return f"split is '{shown(values['split'])}', expected a name such as train, of letters, digits, _ and -"
    return None


class Grid(NamedTuple):
    """How a large image is cut into tiles; lengths in pixels."""

    tile: int
    stride: int
    group_block: int
    """Tiles whose centre is in the same square block of this size form a group."""
    region: tuple[int, int, int, int] | None = None
    """x0, y0, x1, y1: only tiles wholly inside."""


def grid_items(
    image: Path, grid: Grid, *, labels_image: Path | None, purity: float, label_names: Sequence[str]
) -> list[Item]:
    """The tiles of an image, row by row; groups are spatial blocks.

    A tile's label is the class that at least the share `purity` of its pixels in the labels image have.
    """
    height, width = read_image(image).shape[1:]
    x0, y0, x1, y1 = grid.region or (0, 0, width, height)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"region {x0},{y0},{x1},{y1}: expected x0 < x1 <= {width} and y0 < y1 <= {height}, the image")
    corners = [
        (x, y) for y in range(y0, y1 - grid.tile + 1, grid.stride) for x in range(x0, x1 - grid.tile + 1, grid.stride)
    ]
    if not corners:
        raise ValueError(f"{image}: tiles of {grid.tile} pixels do not fit into {x1 - x0} x {y1 - y0} pixels")
    label_at = _label_reader(labels_image, (height, width), purity, label_names, grid.tile)

    def group_at(x: int, y: int) -> str:
        row, column = ((corner + grid.tile // 2) // grid.group_block for corner in (y, x))
        return f"{image.stem}_row{row}_column{column}"

    return [Item(image, image.name, label_at(x, y), group_at(x, y), corner=(x, y)) for x, y in corners]


def _label_reader(
    path: Path | None, size: tuple[int, int], purity: float, names: Sequence[str], tile: int
) -> Callable[[int, int], int | str | None]:
    if path is None:
        return lambda x, y: None
    classes = _read_classes(path)
    if classes.shape != size:
        raise ValueError(
            f"{path}: has {classes.shape[1]} x {classes.shape[0]} pixels, but the image that it labels has "
            f"{size[1]} x {size[0]}"
        )

    def label_at(x: int, y: int) -> int | str | None:
        counts = np.bincount(classes[y : y + tile, x : x + tile].ravel())
        found = int(counts.argmax())
        if counts[found] < purity * tile * tile or (found >= len(names) if names else found in (255, 65535)):
            return None
        return names[found] if names else found

    return label_at


def _read_classes(path: Path) -> NDArray[np.int64]:
    """(H, W): the class of each pixel; a palette image's numbers, not its colours."""
    try:
        image = Image.open(path)
        classes = np.asarray(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    if classes.ndim != 2 or classes.dtype.kind not in "bui":
        raise ValueError(
            f"{path}: pixels of mode {image.mode}; expected one channel that holds the number of the class"
        )
    return classes.astype(np.int64)


def _typed(texts: Sequence[str]) -> list[int | str | None]:
    """Labels or groups as integers if all of them are whole numbers as one writes them, else names; "" is None."""
    given = [text for text in texts if text]
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) for text in given):
        return [int(text) if text and int(text) >= 0 else None for text in texts]
    return [text or None for text in texts]


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
