"""Kaldi data folders, as ESPnet, WeNet, WeSpeaker and others write them too: utterances listed by wav.scp.

    DIR/wav.scp       utterance or recording, and its file: rec1 wavs/rec1.flac     rec2 /data/wavs.ark:1234
    DIR/segments      utterance recording start stop (seconds; a stop of -1 is the end); without it a recording is one
    DIR/utt2spk       utterance speaker; or spk2utt; without both there are no labels
    DIR/utt2ses       utterance session; or utt2session, utt2video, or by recording reco2ses, reco2session, reco2video

Relative files are looked for below DIR, or below --root. Of the commands that wav.scp may hold, `cat FILE |` and
`flac -dc FILE |` are read without them; no command is run. Segments are cut out and stored as FLAC. Other tables (text,
utt2gender, utt2dur, feats.scp, ...) are not read. Lines that cannot be used are named and left out: an utterance that is
there twice, a segment of an unknown recording or with impossible times, a file that is not there.

A speaker is a person, so the label, which is the speaker, and the column session are stored as salted hashes, as the group
is; --plain-names stores them as they are. The group is the session: utt2ses and the like, else the recording that segments
are cut from, else the speaker. With --group speaker no split divides a speaker.

    ssl-pack kaldi data/train shards --workers 16
    ssl-pack kaldi data/train shards --root /corpora --group speaker --split train=0.9 val=0.1
"""

import argparse
import logging
import math
import re
import shlex
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ssl_platform.data.items import Item, unusable
from ssl_platform.data.layouts import missing
from ssl_platform.data.tar_headers import shown

logger = logging.getLogger(__name__)

COLUMNS = ("session",)
_SESSIONS = ("utt2ses", "utt2session", "utt2video")
_SESSIONS_OF_RECORDINGS = ("reco2ses", "reco2session", "reco2video")
_SHELL = re.compile(r"[|<>;&$`*?(){}\n]")
_FLAC_OPTIONS = {"--decode": "d", "--stdout": "c", "--silent": "s", "--totally-silent": "s"}
_MOST_LOOKED_FOR = 1000
"""So many files have to be missing until the folder for relative ones is said to be another."""


class _Recording(NamedTuple):
    path: Path
    place: int | None
    """The byte at which its WAV begins in an archive."""


class _Utterance(NamedTuple):
    name: str
    recording: str
    start: float = 0.0
    stop: float = math.inf
    problem: str = ""


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--root", metavar="DIR", type=Path, help="where relative files of wav.scp begin; default DIR")
    parser.add_argument(
        "--group",
        choices=["session", "speaker"],
        default="session",
        help="what no split divides: session (default), video or recording; or speaker",
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"group": arguments.group}


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The utterances, with those that cannot be used; raises ValueError if a table is none, or wav.scp holds commands."""
    table = folder / "wav.scp"
    if not table.is_file():
        raise missing(folder, ["wav.scp"], "kaldi")
    lines = _read(table)
    recordings = _recordings(table, lines, arguments.root or folder)
    utterances = _utterances(folder / "segments", lines, recordings)
    speakers = _speakers(folder)
    if speakers and (lacking := [one.name for one in utterances if one.name not in speakers]):
        logger.warning(
            "%s: %d of %d utterances have no speaker, so no label, such as %s",
            folder, len(lacking), len(utterances), shown(lacking[0]),
        )  # fmt: skip
    sessions = _sessions(folder, utterances) if arguments.group == "session" else {}
    return [_item(table, one, recordings, speakers, sessions) for one in utterances]


def _item(
    table: Path,
    one: _Utterance,
    recordings: dict[str, _Recording],
    speakers: dict[str, str],
    sessions: dict[str, str],
) -> Item:
    speaker, session = speakers.get(one.name), sessions.get(one.name)
    item = Item(
        table,
        one.name,
        label=speaker,
        group=session or speaker,
        columns=(("session", session),) if session else (),
        medium="audio",
        hidden=("label", "session"),
    )
    if one.problem:
        return unusable(item, one.problem)
    recording = recordings[one.recording]
    is_whole = one.start == 0 and one.stop == math.inf
    place = () if recording.place is None else (recording.place,)
    return item._replace(path=recording.path, part=() if is_whole and not place else (one.start, one.stop, *place))


# -- tables ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[tuple[int, str, str]]:
    """(line, first word, the rest) of the lines that are not empty; raises ValueError if one has no rest."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}); save it as UTF-8") from error
    found = [(number, line.split(maxsplit=1)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, words in found:
        if len(words) < 2:
            raise ValueError(f"{path}: line {number}: '{shown(words[0])}' stands alone, expected a name and its value")
    if not found:
        raise ValueError(f"{path}: no line in it")
    return [(number, words[0], words[1].strip()) for number, words in found]


def _read_map(path: Path) -> dict[str, str]:
    """{first word: second}; raises ValueError if a first word has two."""
    found: dict[str, str] = {}
    for number, name, value in _read(path):
        if found.setdefault(name, value) != value:
            raise ValueError(
                f"{path}: line {number}: {shown(name)} is {shown(value)}, but {shown(found[name])} further above"
            )
    return found


def _recordings(table: Path, lines: list[tuple[int, str, str]], root: Path) -> dict[str, _Recording]:
    """{recording: its file}, of one that is there twice the first; raises ValueError if commands would have to be run."""
    found: dict[str, _Recording] = {}
    commands: list[tuple[int, str]] = []
    for number, name, text in lines:
        is_command = text.endswith("|")
        file = _file_of_command(text[:-1]) if is_command else text
        if file is None:
            commands.append((number, text))
            continue
        archive = None if is_command else re.fullmatch(r"(.+):(\d{1,18})", file)
        path = root / (archive[1] if archive else file)
        found.setdefault(name, _Recording(path, int(archive[2]) if archive else None))
    if commands:
        number, text = commands[0]
        raise ValueError(
            f"{table}: line {number}: '{shown(text)}' is a command, as {len(commands)} of {len(lines)} lines hold, and "
            "none is run; write the sounds to files, for instance by "
            f"`wav-copy scp:{table} ark,scp:wav.ark,wav_files.scp`, and put wav_files.scp in its place. Read as they are: "
            "files, ARCHIVE:BYTE, `cat FILE |`, `flac -dc FILE |`"
        )
    some = [one.path for one in islice(found.values(), _MOST_LOOKED_FOR)]
    if not any(path.is_file() for path in some):
        where = f"; relative ones begin at {root}, give another --root" if str(root) in str(some[0]) else ""
        raise ValueError(f"{table}: none of its first {len(some)} files is there, such as {shown(str(some[0]))}{where}")
    return found


def _file_of_command(command: str) -> str | None:
    """The file that a command does nothing but print or decode; None if it does more."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if len(words) < 2 or _SHELL.search(command) or words[-1].startswith("-"):
        return None
    program, options = Path(words[0]).name, words[1:-1]
    if program == "cat" and not options:
        return words[-1]
    letters = [_FLAC_OPTIONS.get(option, option[1:] if option.startswith("-") else "?") for option in options]
    only_decodes = {"d", "c"} <= {*"".join(letters)} <= {"d", "c", "s"}
    return words[-1] if program == "flac" and only_decodes else None


def _utterances(
    segments: Path, lines: list[tuple[int, str, str]], recordings: dict[str, _Recording]
) -> list[_Utterance]:
    if segments.is_file():
        found = [_segment(segments, number, name, text, recordings) for number, name, text in _read(segments)]
    else:
        found = [_Utterance(name, name) for _, name, _ in lines]
    table = segments.name if segments.is_file() else "wav.scp"
    seen: set[str] = set()
    for place, one in enumerate(found):
        if one.name in seen:
            found[place] = one._replace(problem=f"{table} has this utterance twice; the first counts")
        seen.add(one.name)
    return found


def _segment(table: Path, number: int, name: str, text: str, recordings: dict[str, _Recording]) -> _Utterance:
    words = text.split()
    if len(words) not in (3, 4):
        raise ValueError(f"{table}: line {number}: {len(words) + 1} words, expected UTTERANCE RECORDING START STOP")
    recording = words[0]
    where = f"segments, line {number}"
    try:
        start, stop = float(words[1]), float(words[2])
    except ValueError:
        start = stop = math.nan
    stop = math.inf if stop == -1 else stop
    if not 0 <= start < stop:
        problem = f"{where}: from {words[1]} to {words[2]} seconds: expected 0 <= start < stop, or a stop of -1"
    elif recording not in recordings:
        problem = f"{where}: its recording {recording} is not in wav.scp"
    elif words[3:] not in ([], ["-1"]):
        problem = f"{where}: channel {words[3]} of a recording, which is not picked out; write it to a file of its own"
    else:
        return _Utterance(name, recording, start, stop)
    return _Utterance(name, recording, problem=problem)


def _speakers(folder: Path) -> dict[str, str]:
    """{utterance: speaker}"""
    if (folder / "utt2spk").is_file():
        return _read_map(folder / "utt2spk")
    if not (folder / "spk2utt").is_file():
        logger.warning("%s: neither utt2spk nor spk2utt: no labels", folder)
        return {}
    pairs = _read(folder / "spk2utt")
    return {utterance: speaker for _, speaker, utterances in pairs for utterance in utterances.split()}


def _sessions(folder: Path, utterances: list[_Utterance]) -> dict[str, str]:
    """{utterance: session} of the first table that is there, or the recordings where these are cut into segments."""
    for names, is_of_recordings in ((_SESSIONS, False), (_SESSIONS_OF_RECORDINGS, True)):
        for name in names:
            if (folder / name).is_file():
                given = _read_map(folder / name)
                keys = {one.name: one.recording if is_of_recordings else one.name for one in utterances}
                found = {utterance: given[key] for utterance, key in keys.items() if key in given}
                if lacking := len(keys) - len(found):
                    logger.warning(
                        "%s: %d of %d utterances have no session, so their group is the speaker",
                        folder / name, lacking, len(keys),
                    )  # fmt: skip
                return found
    if (folder / "segments").is_file():
        return {one.name: one.recording for one in utterances}
    logger.info("%s: no %s or alike, so no split divides a speaker", folder, _SESSIONS[0])
    return {}
