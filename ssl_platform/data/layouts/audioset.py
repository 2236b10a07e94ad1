"""AudioSet: clips of 10 s from videos, each with several of 527 classes.

    DIR/balanced_train_segments.csv      DIR/unbalanced_train_segments.csv      DIR/eval_segments.csv
    DIR/balanced_train_segments/YTID.wav

The tables decide: a split for each that is there, and of its clips those whose file is found, anywhere below DIR. A file is
named YTID, YYTID, YTID_START (seconds) or YTID_STARTms_ENDms, with the extension of any sound. One that is longer than
10.5 s and has no start in its name is the whole video: its segment is cut out and stored as FLAC. Videos vanish, so every
copy of AudioSet is another one: how many segments are missing is said.

There is no label; the kept column labels has the classes joined by ";" (names where class_labels_indices.csv is in DIR, else
mids such as /m/09x0r). The group is the video.

    ssl-pack audioset AudioSet shards --workers 32      # shards/balanced_train, shards/unbalanced_train, shards/eval
"""

import argparse
import logging
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import missing
from ssl_platform.data.media import extensions_of
from ssl_platform.data.sources import walk
from ssl_platform.data.tables import read_rows, read_table
from ssl_platform.data.tar_headers import shown
from ssl_platform.modalities._audio import read_info

logger = logging.getLogger(__name__)

COLUMNS = ("labels",)
_SPLITS = ("balanced_train", "unbalanced_train", "eval")
_EXTENSIONS = extensions_of("audio", asked=True)
_WHOLE_CLIP_SECONDS = 10.5
_NAME = re.compile(r"([A-Za-z0-9_-]{11})(?:_(\d+(?:\.\d+)?))?(?:_\d+(?:\.\d+)?)?")


class _Segment(NamedTuple):
    video: str
    start: float
    stop: float
    labels: tuple[str, ...]
    split: str


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The segments of the tables whose files are there; raises ValueError if there is no table, or no file of it."""
    tables = [folder / f"{split}_segments.csv" for split in _SPLITS]
    if not any(table.is_file() for table in tables):
        raise missing(folder, [table.name for table in tables], "audioset")
    segments = [
        segment
        for split, table in zip(_SPLITS, tables, strict=True)
        if table.is_file()
        for segment in _read_segments(table, split)
    ]
    files = _files(folder, {segment.video for segment in segments})
    names = _class_names(folder / "class_labels_indices.csv")
    found = [(segment, path, cut) for segment in segments for path, cut in _file_of(segment, files)]
    if not found:
        raise ValueError(
            f"{folder}: none of the {len(segments)} segments of its tables has a file named YTID.wav or alike"
        )
    if num_missing := len(segments) - len(found):
        logger.warning(
            "%s: %d of %d segments have no file (%.1f %%)",
            folder, num_missing, len(segments), 100 * num_missing / len(segments),
        )  # fmt: skip
    return _items(folder, found, names)


def _items(folder: Path, found: list[tuple[_Segment, Path, bool]], names: dict[str, str]) -> list[Item]:
    with ThreadPoolExecutor(16) as pool:  # a header is a short read, which a network file system answers slowly
        is_cut = list(pool.map(lambda one: not one[2] and _is_whole_video(one[1]), found))
    result = []
    for (segment, path, _), cut in zip(found, is_cut, strict=True):
        inside = path.relative_to(folder).as_posix()
        labels = ";".join(names.get(label, label) for label in segment.labels)
        result.append(
            Item(
                path,
                f"{inside}#{segment.start:g}-{segment.stop:g}" if cut else inside,
                group=segment.video,
                columns=(("labels", labels),),
                split=segment.split,
                medium="audio",
                part=(segment.start, segment.stop) if cut else (),
            )
        )
    return sorted(result, key=lambda item: item.name)


def _is_whole_video(path: Path) -> bool:
    try:
        info = read_info(path)
    except (OSError, ValueError):  # it will be left out, with the reason
        return False
    return info.num_samples > _WHOLE_CLIP_SECONDS * info.sample_rate


def _read_segments(table: Path, split: str) -> list[_Segment]:
    segments = []
    for line, row in read_rows(table, skip_initial_space=True):
        if row[0].startswith("#"):
            continue
        try:
            video, start, stop, labels = row
            segment = _Segment(video, float(start), float(stop), tuple(labels.split(",")), split)
        except ValueError:
            raise ValueError(
                f'{table}: line {line}: expected YTID, start, stop in seconds, "/m/..,/m/..", not {shown(str(row))}'
            ) from None
        if not 0 <= segment.start < segment.stop < math.inf:
            raise ValueError(f"{table}: line {line}: a segment from {start} to {stop} seconds")
        segments.append(segment)
    return segments


def _class_names(table: Path) -> dict[str, str]:
    """{mid: name}; a name may hold commas, but not the separator."""
    if not table.is_file():
        return {}
    return {row["mid"]: row["display_name"].replace(";", ",") for _, row in read_table(table, ("mid", "display_name"))}


def _files(folder: Path, videos: set[str]) -> dict[str, list[tuple[Path, float | None]]]:
    """{video: its files with the start in their name}."""
    files: dict[str, list[tuple[Path, float | None]]] = {}
    for place, names in walk(folder):
        for name in sorted(names):
            path = Path(place, name)
            if path.suffix[1:].lower() not in _EXTENSIONS or name.startswith("."):
                continue
            for stem in (path.stem, path.stem[1:]) if path.stem.startswith("Y") else (path.stem,):
                match = _NAME.fullmatch(stem)
                if match is not None and match[1] in videos:
                    files.setdefault(match[1], []).append((path, float(match[2]) if match[2] else None))
                    break
    return files


def _file_of(segment: _Segment, files: dict[str, list[tuple[Path, float | None]]]) -> list[tuple[Path, bool]]:
    """The segment's file, and whether its name says that it is cut already; empty if there is none.

    Of several, one in the folder of its split is taken, then one that names its start in seconds or milliseconds.
    """
    starts = (segment.start, segment.start * 1000)
    fitting = [
        (f"{segment.split}_segments" not in path.parts, start is None, path)
        for path, start in files.get(segment.video, ())
        if start is None or any(abs(start - wanted) < 1 for wanted in starts)
    ]
    return [(path, not is_whole) for _, is_whole, path in sorted(fitting)[:1]]
