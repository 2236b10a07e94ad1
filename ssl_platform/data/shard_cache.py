"""The local copies of remote files, shared by all processes of a node: fetched once, never seen half, bounded in size.

For a file NAME of a remote folder, the cache holds in a folder of its own: NAME, complete or not there; `.NAME.part`, what
has come so far; `.NAME.about`, its size and version; `.NAME.lock`, held by whoever fetches it, which says how many bytes
it will need; `.NAME.pin`, held by every reader that needs the file to stay. Locks end with their process (flock), so what
a killed one leaves is recognised by its being free.
"""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ssl_platform.data.transfer import Cancelled, Description, RemoteError, Transfers
from ssl_platform.location import Url

logger = logging.getLogger(__name__)

_POLL = 0.05
_SAY_AFTER = 60.0

_held: set[int] = set()
"""Descriptors of lock files. A forked process must not inherit them: their locks would end only with it."""


def _let_go() -> None:
    for file in _held:
        with suppress(OSError):
            os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class Entry(NamedTuple):
    """Where one remote file's copy lies."""

    folder: Path
    name: str

    @property
    def file(self) -> Path:
        return self.folder / self.name

    def beside(self, kind: str) -> Path:
        """Its part, about, lock or pin file."""
        return self.folder / f".{self.name}.{kind}"


@dataclass
class ShardCache:
    """One process's hold on a cache folder. Threads may share it; after a fork, make another one."""

    folder: Path
    capacity: int
    """Bytes. What readers hold now is never deleted, so more is used for a while if they need more."""
    opened: float
    """Seconds since the epoch: what was checked against its server since then is not checked again."""
    transfers: Transfers

    def __post_init__(self) -> None:
        self._pins: dict[Entry, int] = {}
        self._said_too_small = False

    def entry(self, url: Url) -> Entry:
        """The same for every process and run."""
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", url.parent.name or url.protocol)[-40:].strip(".") or "root"
        name = re.sub(r"[/\0]", "_", url.name).lstrip(".")[-120:] or "file"
        own = "" if name == url.name else f"{url.key}-"  # or a name that was cut would be that of another file too
        return Entry(self.folder / f"{readable}-{url.parent.key}", own + name)

    def open(self, url: Url, size: int | None = None, *, again: bool = False) -> int:
        """A descriptor of the complete file, which is fetched if need be, `again` even if it seems to be here.

        Raises RemoteError if it cannot be had, and Cancelled.
        """
        try:
            return self._opened(url, size, again)
        except RemoteError:
            raise
        except OSError as error:
            text = f"{url}: no copy can be kept in {self.folder} ({error.strerror}). Check that disk, or set "
            raise RemoteError(f"{text}{self.transfers.option('cache_dir')}.") from error

    def _opened(self, url: Url, size: int | None, again: bool) -> int:
        entry = self.entry(url)
        if (file := self._checked(entry, size)) is not None:
            return file
        begun = time.monotonic()
        while True:
            with self._lock(entry) as taken:
                if taken is not None:
                    file = self._fetched(url, entry, size, taken, again=again)
                    assert file is not None, "only a fetch in advance is given up for want of room"
                    return file
            if self.transfers.stop.wait(_POLL):
                raise Cancelled
            if time.monotonic() - begun > _SAY_AFTER:
                begun = time.monotonic()
                logger.warning("%s: another process has been fetching it for a minute", url)

    def prefetch(self, url: Url, size: int | None) -> bool:
        """Fetches the file if nobody does and if there is room; returns whether it is here, checked.

        Tries once: if that fails, whoever needs the file tries again, and reports.
        """
        entry = self.entry(url)
        file = self._checked(entry, size)
        if file is None:
            with self._lock(entry) as taken:
                if taken is not None:
                    try:
                        file = self._fetched(url, entry, size, taken, ahead=True)
                    except RemoteError as error:
                        logger.debug("fetching ahead: %s", error)
        if file is not None:
            os.close(file)
        return file is not None

    def pin(self, urls: Iterable[Url]) -> None:
        """Keeps these files, here already or not, from being deleted by any process, and no others."""
        wanted = {self.entry(url) for url in urls}
        for entry in self._pins.keys() - wanted:
            _close(self._pins.pop(entry))
        for entry in wanted - self._pins.keys():
            entry.folder.mkdir(parents=True, exist_ok=True)
            file = _open(entry.beside("pin"))
            fcntl.flock(file, fcntl.LOCK_SH)  # only ever taken otherwise for the moment of a deletion
            self._pins[entry] = file

    # -- one file ------------------------------------------------------------------------------------------------------

    def _checked(self, entry: Entry, size: int | None) -> int | None:
        """A descriptor of the file if it is here and was checked since `opened`."""
        try:
            file = os.open(entry.file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        found = os.fstat(file)
        if found.st_mtime < self.opened or size not in (None, found.st_size):
            os.close(file)
            return None
        os.utime(file, ns=(time.time_ns(), found.st_mtime_ns))  # used now, for the order of deletion
        return file

    def _fetched(
        self, url: Url, entry: Entry, size: int | None, lock: int, *, again: bool = False, ahead: bool = False
    ) -> int | None:
        """The file, under its lock: checked against the server, or fetched; None if `ahead` and there is no room."""
        if (file := self._checked(entry, size)) is not None:  # another process has fetched it meanwhile
            return file
        transfers = replace(self.transfers, retries=0, reach=None) if ahead else self.transfers
        found = transfers.describe(url)
        if not again and url.protocol != "pipe" and self._is_current(entry, found, size):
            os.utime(entry.file, ns=(time.time_ns(),) * 2)
            return os.open(entry.file, os.O_RDONLY)
        if None not in (size, found.size) and size != found.size:
            raise RemoteError(
                f"{url}: has {found.size} bytes, and {size} in its index.json: they are not of the same pack. Upload the "
                "folder again, index.json and index.npy with the tars."
            )
        part = entry.beside("part")
        self._remove(entry)
        # The few bytes of an index push no shards out: the configuration that asks for it may yet be refused.
        if entry.name.endswith(".tar") and not self._reserve(url, lock, size or found.size or 0, ahead):
            return None
        try:
            got = transfers.download(url, part, size or found.size)
            about = {"url": str(url), "bytes": got, "version": found.version}
            entry.beside("about").write_text(json.dumps(about), encoding="utf-8")
            file = os.open(part, os.O_RDONLY)
            os.utime(file, ns=(time.time_ns(),) * 2)
            part.rename(entry.file)
            return file
        finally:
            part.unlink(missing_ok=True)
            os.ftruncate(lock, 0)

    def _is_current(self, entry: Entry, found: Description, size: int | None) -> bool:
        """Whether the copy here, of an earlier run, is what the server has; without a version its size must do."""
        try:
            about = json.loads(entry.beside("about").read_text(encoding="utf-8"))
            here = entry.file.stat().st_size
        except (OSError, ValueError):
            return False
        wanted = size if size is not None else found.size
        known = {here, about.get("bytes"), *([found.size] if found.size is not None else [])}
        return wanted is not None and known == {wanted} and about.get("version") == found.version

    def _remove(self, entry: Entry) -> None:
        """What is here of the file, and what killed transfers left of it."""
        for path in (entry.file, entry.beside("about"), *entry.folder.glob(f".{_escaped(entry.name)}.part*")):
            path.unlink(missing_ok=True)

    # -- room ----------------------------------------------------------------------------------------------------------

    def _reserve(self, url: Url, lock: int, size: int, ahead: bool) -> bool:
        """Makes room for `size` bytes by deleting the files that were not used for longest; False if that is not enough."""
        with self._alone():
            files, reserved = self._survey()
            excess = sum(found.st_size for _, found in files) + reserved + size - self.capacity
            for entry, found in sorted(files, key=lambda item: item[1].st_atime_ns):
                if excess > 0 and self._delete(entry):
                    excess -= found.st_size
            if excess > 0 and ahead:
                return False
            if excess > 0 and not self._said_too_small:
                self._said_too_small = True
                logger.warning(
                    "%s: %s=%g does not hold what is being read; %.3g GB more are used for %s",
                    self.folder, self.transfers.option("cache_gigabytes"), self.capacity / 1e9, excess / 1e9, url,
                )  # fmt: skip
            os.pwrite(lock, b"%d" % size, 0)
        return True

    def _survey(self) -> tuple[list[tuple[Entry, os.stat_result]], int]:
        """The complete files, and the bytes that transfers now running will need. Removes what killed ones left.

        Transfers first, so that one that ends meanwhile is in both places, and it is counted as the file that it is now:
        counted twice it would push out a file that somebody is about to read.
        """
        folders = [folder for folder in self.folder.iterdir() if folder.is_dir()]
        files: list[tuple[Entry, os.stat_result]] = []
        reserved: dict[Entry, int] = {}
        for item in [item for folder in folders for item in os.scandir(folder) if item.name.endswith(".lock")]:
            with suppress(FileNotFoundError):
                if item.stat().st_size:
                    entry = Entry(Path(item.path).parent, item.name[1:-5])
                    reserved[entry] = self._reserved(entry)
        for item in [item for folder in folders for item in os.scandir(folder) if not item.name.startswith(".")]:
            with suppress(FileNotFoundError):
                files.append((Entry(Path(item.path).parent, item.name), item.stat()))
        return files, sum(reserved[entry] for entry in reserved.keys() - {entry for entry, _ in files})

    def _reserved(self, entry: Entry) -> int:
        with self._lock(entry) as taken:
            if taken is None:
                text = entry.beside("lock").read_text()
                return int(text) if text.isdigit() else 0
            for part in entry.folder.glob(f".{_escaped(entry.name)}.part*"):  # its process is gone
                part.unlink(missing_ok=True)
            os.ftruncate(taken, 0)
            return 0

    def _delete(self, entry: Entry) -> bool:
        """Deletes a file unless somebody fetches, checks or pins it; those who have it open keep it."""
        with self._lock(entry) as taken, self._lock(entry, "pin") as unpinned:
            if taken is None or unpinned is None:
                return False
            self._remove(entry)
            return True

    @contextmanager
    def _lock(self, entry: Entry, kind: str = "lock") -> Iterator[int | None]:
        """The descriptor of a lock file that is held now, None if another process or thread holds it."""
        entry.folder.mkdir(parents=True, exist_ok=True)
        file = _open(entry.beside(kind))
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield file
        finally:
            _close(file)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process counts and deletes at a time."""
        file = _open(self.folder / ".room")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            _close(file)

    def close(self) -> None:
        """Lets go of what was pinned."""
        self.pin(())


def _open(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(file)
    return file


def _close(file: int) -> None:
    _held.discard(file)
    os.close(file)


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
