"""What of a pack is finished, and who is at work on it: the files beside the shards of one folder.

`pack.json` holds the plan and the finished shards. A part of a SLURM array writes its own to `part-00003-of-00064.json`;
who finishes last puts them together. `.lock` has a byte for each shard, so that parts may be at work at the same time.
"""

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from ssl_platform.data.tar_headers import shown
from ssl_platform.data.tar_writing import Shard
from ssl_platform.data.tars import write_json

logger = logging.getLogger(__name__)

_ALL = 1 << 40
"""More bytes of the lock file than there are shards; the byte there is the lock of the index."""
_PATTERNS = ("index.json", "index.npy", "shard-*.tar", "part-*-of-*.json", "left_out.tsv", "slides.json", "pack.json")
"""What ssl-pack writes into a folder."""
_MOST_SHARDS = 1 << 24
"""A file that speaks of more is damaged."""
_UNREADABLE = (ValueError, TypeError, KeyError, RecursionError)
_SHARDS = TypeAdapter(dict[str, Shard])
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class Part(NamedTuple):
    """A share of the shards: number 0 to `of` - 1."""

    number: int = 0
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def shards(self, num_shards: int) -> range:
        """Consecutive shards; the parts together have each once, and numbers that differ by one at most."""
        return range(self.number * num_shards // self.of, (self.number + 1) * num_shards // self.of)

    @property
    def is_whole(self) -> bool:
        return self.of == 1

    @property
    def file_name(self) -> str:
        return "pack.json" if self.is_whole else f"part-{self.number:05d}-of-{self.of:05d}.json"


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def check_folder(out: Path, splits: Collection[str] = ()) -> set[str]:
    """The visible files in `out`; raises ValueError if ssl-pack did not write them, or they are none of `splits`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; expected a folder for the shards")
    found = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set[str]()
    ours = {path.name for pattern in _PATTERNS for path in out.glob(pattern)}
    if splits and (foreign := sorted(found - {*splits})):
        raise ValueError(
            f"{out}: holds {foreign[0]}, which is none of the splits {', '.join(sorted(splits))}: name an empty folder"
        )
    if not splits and (foreign := sorted(found - ours)):
        raise ValueError(f"{out}: holds files that ssl-pack did not write ({foreign[0]}, ...): name an empty folder")
    return found


def read_state(out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> dict[str, Shard]:
    """The shards that earlier runs of the same plan finished, by name; raises ValueError if something else is in `out`."""
    found = check_folder(out)
    if overwrite or not found:
        return {}
    if "pack.json" not in found:
        raise ValueError(f"{out}: not empty, and without the pack.json of an earlier run: name an empty folder")
    shards: dict[str, Shard] = {}
    for name in ["pack.json", *sorted(path.name for path in out.glob("part-*-of-*.json"))]:
        shards |= _read_file(out / name, settings)
    return shards


def _read_file(path: Path, settings: Mapping[str, Any]) -> dict[str, Shard]:
    try:
        before, shards = _parsed(path)
    except FileNotFoundError:  # another process has put it together with the rest just now
        return {}
    except (OSError, *_UNREADABLE) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({shown(why)}); start afresh with --overwrite") from error
    differ = [f"{shown(key)} ({_short(before, key)}, now {_short(settings, key)})" for key in sorted({*before, *settings})
              if before.get(key) != settings.get(key)]  # fmt: skip
    if differ:
        raise ValueError(
            f"{path.parent}: holds shards of another plan, which differs in {', '.join(differ)}; "
            "name an empty folder, or start afresh with --overwrite"
        )
    return {name: shard for name, shard in shards.items() if shard.adds_up}  # others are made anew


def _parsed(path: Path) -> tuple[dict[str, Any], dict[str, Shard]]:
    """Settings and finished shards; raises OSError or one of `_UNREADABLE` if they are not what `write_state` wrote."""
    about = json.loads(path.read_text(encoding="utf-8"))
    return {**about["settings"]}, _SHARDS.validate_json(json.dumps(about["shards"]), strict=True)


def _short(settings: Mapping[str, Any], key: str) -> str:
    return "other files, labels or groups" if key == "items" else shown(json.dumps(settings.get(key)))


def write_state(out: Path, part: Part, settings: Mapping[str, Any], shards: Mapping[str, Shard]) -> None:
    """Keeps what a part, or the whole, has finished."""
    finished = {name: asdict(shard) for name, shard in sorted(shards.items())}
    write_json(out / part.file_name, {"settings": settings, "shards": finished})


def clear(out: Path) -> None:
    """Deletes what earlier runs wrote; index.json first: without it nobody takes the rest for a data set."""
    for pattern in _PATTERNS:
        for path in sorted(out.glob(pattern)):
            path.unlink()


def clear_parts(out: Path) -> None:
    """Deletes the files of parts, which pack.json holds all of."""
    for path in out.glob("part-*-of-*.json"):
        path.unlink(missing_ok=True)


def missing_parts(out: Path) -> str:
    """What an unfinished folder lacks, in words: "5 of 12 shards; parts 1 and 3 of 4"."""
    states = []
    for path in [out / "pack.json", *out.glob("part-*-of-*.json")]:
        try:
            states.append(_parsed(path))
        except (OSError, *_UNREADABLE):
            continue
    numbers = [settings.get("num_shards") for settings, _ in states]
    num_shards = max((number for number in numbers if isinstance(number, int) and number <= _MOST_SHARDS), default=0)
    finished = {name for _, shards in states for name in shards if (out / name).exists()}
    missing = [number for number in range(num_shards) if shard_name(number) not in finished]
    text = f"{len(missing)} of {num_shards} shards" if missing else "the index"
    ends = (path.stem.rpartition("-")[2] for path in out.glob("part-*-of-*.json"))
    of = max((int(end) for end in ends if re.fullmatch(r"\d{1,6}", end)), default=1)
    if of > 1 and missing:
        absent = [str(number) for number in range(of) if {*Part(number, of).shards(num_shards)} & {*missing}]
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        text += f", of part{'s' * (len(absent) > 1)} {', '.join(absent[:10])}{more} of {of} (they count from 0)"
    return text


class Lock:
    """The lock file of a folder. It is released when it is closed, and when the process ends, however it ends."""

    def __init__(self, out: Path) -> None:
        """Makes the folder if need be."""
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self._path = out / ".lock"
        self._file: IO[bytes] = self._path.open("ab")

    def take(self, shards: range | None = None) -> None:
        """Raises ValueError if another process is at work on one of these shards; None = any of the folder."""
        shards = range(_ALL) if shards is None else shards
        if not len(shards):
            return
        while True:
            if not self._locked(shards.start, len(shards), wait=False):
                raise ValueError(f"{self.out}: another ssl-pack is at work on the same shards")
            if self._is_in_place():
                return
            self._file.close()  # who left last has deleted it meanwhile
            self._file = self._path.open("ab")

    def take_all(self) -> bool:
        """True if nobody else was at work on any shard, and nobody will be until this lock is closed."""
        return self._locked(0, _ALL, wait=False)

    def wait_for_index(self) -> None:
        """Waits until nobody else is about to write the index."""
        self._locked(_ALL, 1, wait=True)

    def release_shards(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, _ALL, 0)

    def close(self) -> None:
        """Deletes the file unless others are at work."""
        if self.take_all():
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def _locked(self, first: int, length: int, wait: bool) -> bool:
        """POSIX locks, which workers do not inherit and network file systems know."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), length, first)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: no locks on this file system: nothing stops two runs of the same part", self.out)
        return True
