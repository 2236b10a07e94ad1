"""EchoNet-Dynamic (Stanford): 10,030 clips of the beating heart, apical four-chamber view, with ejection fractions.

    DIR/FileList.csv      FileName, EF, ESV, EDV, FrameHeight, FrameWidth, FPS, NumberOfFrames, Split
    DIR/Videos/0X100009310A3BD7FC.avi
    DIR/VolumeTracings.csv      FileName, X1, Y1, X2, Y2, Frame; may be absent

There are no labels but the columns EF (per cent), ESV, EDV (ml), FPS and traced_frames: the two frames in which the
ventricle was traced, in the order of the table ("46;61"), empty where there is no tracing. Splits are train, val and
test. A clip that FileList.csv names and that is not there is left out and named.

    pip install 'ssl-platform[video]'
    ssl-pack echonet-dynamic EchoNet-Dynamic shards --workers 16
"""

import argparse
import logging
import math
from pathlib import Path

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import MAX_NAMED, missing
from ssl_platform.data.tables import read_table
from ssl_platform.data.tar_headers import shown

logger = logging.getLogger(__name__)

COLUMNS = ("EF", "ESV", "EDV", "FPS", "traced_frames")
_SPLITS = ("train", "val", "test")


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The clips of FileList.csv; raises ValueError that names the table and line that cannot be used."""
    table = folder / "FileList.csv"
    needed = {"FileList.csv": table.is_file(), "Videos/": (folder / "Videos").is_dir()}
    if not all(needed.values()):
        raise missing(folder, [name for name, is_there in needed.items() if not is_there], "echonet-dynamic")
    traced = _traced_frames(folder / "VolumeTracings.csv")
    found = []
    for line, row in _rows(table, ("FileName", "EF", "ESV", "EDV", "FPS", "Split")):
        file, split = _file(row["FileName"]), row["Split"].lower()
        if split not in _SPLITS:
            raise ValueError(f"{table}: line {line}: Split is '{row['Split']}', expected TRAIN, VAL or TEST")
        for name in ("EF", "ESV", "EDV", "FPS"):
            _check_number(table, line, name, row[name])
        values = {**row, "traced_frames": ";".join(traced.get(file, ()))}
        columns = tuple((name, values[name]) for name in COLUMNS)
        path = folder / "Videos" / file
        found.append(Item(path, f"Videos/{file}", columns=columns, split=split, medium="video"))
    _warn("clips of FileList.csv are not in Videos/", [item.path.name for item in found if not item.path.is_file()])
    _warn("names of VolumeTracings.csv are not in FileList.csv", sorted(traced.keys() - {i.path.name for i in found}))
    return found


def _traced_frames(table: Path) -> dict[str, list[str]]:
    """The frames that each clip's tracings are of, each once, in the order of the table."""
    if not table.is_file():
        logger.warning("%s: not there: traced_frames stays empty", table)
        return {}
    frames: dict[str, dict[str, None]] = {}
    for line, row in _rows(table, ("FileName", "Frame")):
        if not row["Frame"].isdecimal():
            raise ValueError(f"{table}: line {line}: Frame is '{row['Frame']}', expected a whole number")
        frames.setdefault(_file(row["FileName"]), {})[row["Frame"]] = None
    return {file: list(numbers) for file, numbers in frames.items()}


def _rows(table: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """(line, cells) of a table that has these columns, each row naming a file."""
    rows = read_table(table, columns)
    for line, row in rows:
        if not row["FileName"] or Path(row["FileName"]).name != row["FileName"]:
            raise ValueError(f"{table}: line {line}: FileName '{shown(row['FileName'])}' is no file name")
    return rows


def _file(name: str) -> str:
    return name if name.lower().endswith(".avi") else f"{name}.avi"


def _check_number(table: Path, line: int, name: str, text: str) -> None:
    try:
        is_number = math.isfinite(float(text))
    except ValueError:
        is_number = False
    if not is_number:
        raise ValueError(f"{table}: line {line}: {name} is '{shown(text)}', expected a number")


def _warn(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - MAX_NAMED} more" * (len(names) > MAX_NAMED)
        logger.warning("%d %s: %s%s", len(names), what, ", ".join(names[:MAX_NAMED]), more)
