"""VoxCeleb1 and VoxCeleb2: utterances of celebrities, by speaker and video.

    DIR/wav/id10001/1zcIwhmdeo4/00001.wav         or below DIR/dev and DIR/test, or DIR/vox1_dev_wav and DIR/vox1_test_wav
    DIR/dev/aac/id00012/21Uxsk56VDQ/00001.m4a     VoxCeleb2; below aac, wav, mp4 or nothing

dev (or train) and test become splits. Where one folder holds all, DIR/vox1_meta.csv or vox2_meta.csv says them, if it is
there; it also gives the columns gender and nationality, which are stored only with --keep-columns.

A speaker is a person, so the label, which is the speaker, is stored as the salted hash that the group of the same name has,
and so is the column session (the video). --plain-names stores all of them as they are. The group is the speaker, so that
--split divides none; with --group session it is the video, for an evaluation that must know a speaker again from another
video.

    ssl-pack voxceleb VoxCeleb1 shards --workers 16                     # shards/dev and shards/test
    ssl-pack voxceleb VoxCeleb1/dev shards --group session --split train=0.9 val=0.1
"""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import missing
from ssl_platform.data.media import extensions_of
from ssl_platform.data.sources import walk
from ssl_platform.data.tables import check_width, read_rows
from ssl_platform.data.tar_headers import shown

logger = logging.getLogger(__name__)

COLUMNS = ("session",)
_EXTENSIONS = extensions_of("audio", asked=True)
_SPEAKER = re.compile(r"id\d{5}")


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--group",
        choices=["speaker", "session"],
        default="speaker",
        help="what no split divides: speaker (default) or session, the video",
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"group": arguments.group}


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The utterances; raises ValueError if there are no files id.../video/file."""
    about = _speakers(folder)
    found = [
        item
        for place, files in walk(folder)
        for file in files
        if (item := _utterance(folder, Path(place, file), about, arguments.group)) is not None
    ]
    if not found:
        raise missing(folder, ["wav/id10001/VIDEO/00001.wav", "dev/aac/id00012/VIDEO/00001.m4a"], "voxceleb")
    without = [item.name for item in found if not item.split]
    if without and len(without) < len(found):
        logger.warning(
            "%s: no splits, because %d of %d utterances are in none, such as %s: pack dev and test apart",
            folder, len(without), len(found), shown(without[0]),
        )  # fmt: skip
        found = [item._replace(split=None) for item in found]
    return sorted(found, key=lambda item: item.name)


def _utterance(folder: Path, path: Path, about: dict[str, dict[str, str]], group: str) -> Item | None:
    """None if the file is no sound below a speaker and a video."""
    inside = path.relative_to(folder)
    if path.suffix[1:].lower() not in _EXTENSIONS or path.name.startswith(".") or len(inside.parts) < 3:
        return None
    speaker, video = inside.parts[-3:-1]
    if not _SPEAKER.fullmatch(speaker):
        return None
    known = about.get(speaker, {})
    above = "/".join(inside.parts[:-3])
    named = re.search(r"(?:^|[/_])(dev|train|test)(?=$|[/_])", above)
    session = f"{speaker}/{video}"
    return Item(
        path,
        inside.as_posix(),
        label=speaker,
        group=speaker if group == "speaker" else session,
        columns=(("session", session), *((name, known[name]) for name in ("gender", "nationality") if name in known)),
        split=named[1] if named else known.get("set"),
        medium="audio",
        hidden=("label", "session"),
    )


def _speakers(folder: Path) -> dict[str, dict[str, str]]:
    """{speaker: {"gender": ..., "nationality": ..., "set": ...}} of the tables that are there."""
    about: dict[str, dict[str, str]] = {}
    for path in (folder / "vox1_meta.csv", folder / "vox2_meta.csv"):
        if not path.is_file():
            continue
        rows = [(line, [cell.strip() for cell in row]) for line, row in read_rows(path, _separator(path))]
        header = [name.lower() for name in rows[0][1]] if rows else []
        if "set" not in header or not header[0].endswith("id"):
            raise ValueError(f"{path}: expected the columns VoxCeleb1 ID, ..., Gender, Nationality, Set with a header")
        for line, row in rows[1:]:
            check_width(path, line, row, header)
            about[row[0]] = dict(zip(header[1:], row[1:], strict=True))
    return about


def _separator(path: Path) -> str:
    with path.open("rb") as file:
        return "\t" if b"\t" in file.readline(1 << 16) else ","
