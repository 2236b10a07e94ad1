"""What ssl-pack can pack, as lists of items: the files of a folder, or those that a manifest lists."""

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ssl_platform.data import dicom
from ssl_platform.data.items import Item
from ssl_platform.data.media import extensions_of, file_media, medium_of, plural
from ssl_platform.data.tables import Rows, read_rows, width_problem
from ssl_platform.data.tar_headers import shown

logger = logging.getLogger(__name__)

_MANIFESTS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_MAX_LINES = 10
_HEAD = 1 << 20
"""So many bytes show what a file is."""


def folder_items(folder: Path, labels: bool, group_depth: int = 0, medium: str | None = None) -> list[Item]:
    """Every file of a medium below a folder, sorted; with `labels` the first folder of its relative path is the label, and
    the first `group_depth` folders are the group. Otherwise the group of a DICOM file is its PatientID. Without `medium`
    the extensions tell it.

    Raises ValueError if there is no file of that kind, or if there are several kinds.
    """
    media = file_media() if medium is None else (medium,)
    known = sorted({extension for name in media for extension in extensions_of(name, asked=medium is not None)})
    found: list[Path] = []
    unknown: list[Path] = []
    for place, files in walk(folder):
        for file in files:
            if not file.startswith("."):
                path = Path(place, file)
                (found if _extension(path) in known else unknown).append(path)
    if "image" in media:
        found += _unnamed_dicom(unknown)
    if not found:
        kinds = " or ".join(sorted(plural(name) for name in media))
        raise ValueError(f"{folder}: no {kinds} in this folder or below it (looked for {', '.join(known)})")
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    first, groups = (_typed(["/".join(name.split("/")[:-1][:depth]) for name in names]) for depth in (1, group_depth))
    kinds_of = _media_of(folder, [folder / name for name in names], medium, are_named=False)
    items = [
        Item(folder / name, name, value if labels else None, group, medium=kind)
        for name, value, group, kind in zip(names, first, groups, kinds_of, strict=True)
    ]
    return items if group_depth else _with_patients(items)


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _unnamed_dicom(paths: Sequence[Path]) -> list[Path]:
    """Those of files without a name's ending that are DICOM by their content, as scanners and archives write them."""
    with ThreadPoolExecutor(16) as pool:  # a network file system answers each slowly, but many at a time
        return [path for path, is_it in zip(paths, pool.map(dicom.is_unnamed, paths), strict=True) if is_it]


def _media_of(source: Path, paths: Sequence[Path], asked: str | None, are_named: bool) -> list[str]:
    """The medium of each file, by its extension, and the first file of an extension that several media have.

    Raises ValueError if they differ: shards hold one kind of data. `are_named`: whoever listed them meant these files.
    """
    if asked is not None:
        return [asked] * len(paths)
    kinds: dict[str, str] = {}
    for path in paths:
        if (extension := _extension(path)) not in kinds:
            kinds[extension] = medium_of(extension, partial(_head, path), asked=are_named) or "image"
    firsts = {kinds[_extension(path)]: path for path in reversed(paths)}
    if len(firsts) > 1:
        said = " and ".join(f"{plural(name)} ({shown(firsts[name].name)})" for name in sorted(firsts))
        raise ValueError(
            f"{source}: holds {said}; pack them apart: give --medium {' or --medium '.join(sorted(firsts))}, or each from "
            "a folder or table of its own"
        )
    return [kinds[_extension(path)] for path in paths]


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError:  # it will be left out, with the reason
        return b""


def _with_patients(items: list[Item]) -> list[Item]:
    """The items, with the PatientID of DICOM files as group where none is given."""
    unknown = [
        place
        for place, item in enumerate(items)
        if item.group is None and item.medium == "image" and dicom.may_be(item.path)
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


def manifest_items(manifest: Path, tiles: bool, splits: bool = False, medium: str | None = None) -> list[Item]:
    """The rows of a CSV or TSV file: columns path, label, group, any others; with `tiles`, x and y of a tile's corner.

    With `splits` the column split says which split a row is in. Of sound, start and stop are seconds of a segment, the
    beginning and the end where they are empty. DICOM files without a group have their PatientID's.
    Without `medium` the extensions tell it, and unknown ones are images.
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
    _refuse(manifest, problems)
    table = [dict(zip(header, row, strict=True)) for _, row in rows[1:]]
    labels, groups = (_typed([row.get(name, "").strip() for row in table]) for name in ("label", "group"))
    kinds = _media_of(manifest, [manifest.parent / row["path"] for row in table], medium, are_named=True)
    parts = _segments(manifest, rows[1:], table) if {*kinds} == {"audio"} else [()] * len(table)
    names = [row["path"] + (f"#{part[0]}-{part[1]}" if part else "") for row, part in zip(table, parts, strict=True)]
    _warn_of_repetition(manifest, [(line, name) for (line, _), name in zip(rows[1:], names, strict=True)], tiles)
    special = {"path", "label", "group", *(("x", "y") if tiles else ()), *(("split",) if splits else ())}
    items = [
        Item(
            path=manifest.parent / row["path"],
            name=name,
            label=label,
            group=group,
            columns=tuple((name, text) for name, text in row.items() if name not in special),
            corner=(int(row["x"]), int(row["y"])) if tiles else None,
            split=row["split"].strip() if splits else None,
            medium=kind,
            part=part,
        )
        for row, label, group, kind, name, part in zip(table, labels, groups, kinds, names, parts, strict=True)
    ]
    return _with_patients(items)


def _refuse(manifest: Path, problems: Sequence[tuple[int, str]]) -> None:
    if problems:
        lines = [f"  line {line}: {problem}" for line, problem in problems[:_MAX_LINES]]
        more = [f"  and {len(problems) - _MAX_LINES} more"] * (len(problems) > _MAX_LINES)
        raise ValueError("\n".join([f"{manifest}: {len(problems)} lines cannot be used", *lines, *more]))


def _segments(manifest: Path, rows: Rows, table: Sequence[dict[str, str]]) -> list[tuple[float, ...]]:
    """What the columns start and stop say of each sound, in seconds: () for the whole."""
    parts, problems = list[tuple[float, ...]](), []
    for (line, _), row in zip(rows, table, strict=True):
        texts = [row.get("start", "").strip(), row.get("stop", "").strip()]
        try:
            start, stop = float(texts[0] or 0), float(texts[1] or math.inf)
        except ValueError:
            start = stop = math.nan
        if not 0 <= start < stop:
            problems.append(
                (
                    line,
                    f"from '{shown(texts[0])}' to '{shown(texts[1])}': start and stop are seconds, 0 <= start < stop",
                )
            )
        parts.append((start, stop) if any(texts) else ())
    _refuse(manifest, problems)
    return parts


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


def _typed(texts: Sequence[str]) -> list[int | str | None]:
    """Labels or groups as integers if all of them are whole numbers as one writes them, else names; "" is None."""
    given = [text for text in texts if text]
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) for text in given):
        return [int(text) if text and int(text) >= 0 else None for text in texts]
    return [text or None for text in texts]
