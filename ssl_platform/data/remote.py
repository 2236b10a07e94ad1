"""Shards behind URLs: which ones a URL stands for, their index, which is read first, and how they are fetched and kept."""

import argparse
import heapq
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ssl_platform.data.file_systems import check_protocol
from ssl_platform.data.index_files import is_plain, open_fetched, read_description
from ssl_platform.data.index_rows import describe
from ssl_platform.data.shard_cache import ShardCache
from ssl_platform.data.tars import scan_shard
from ssl_platform.data.transfer import Reach, RemoteError, Stop, Transfers
from ssl_platform.data.transfer_problems import of_configuration
from ssl_platform.location import HIDDEN, Url, expand_braces

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """`ssl_platform/shards` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "ssl_platform" / "shards"


@dataclass(frozen=True)
class RemoteSettings:
    """How remote shards are fetched and kept; the fields are described in DataConfig."""

    cache_dir: Path = field(default_factory=default_cache_dir)
    cache_gigabytes: float = 50.0
    timeout_seconds: float = 30.0
    retries: int = 7
    allow_pipe: bool = False
    of_command: bool = False
    """Whether these are options of a command, which ends when a server is out of reach, and not keys of a configuration."""

    @classmethod
    def of_arguments(cls, arguments: argparse.Namespace) -> "RemoteSettings":
        """What the options of `add_cache_arguments` say."""
        names = ("cache_dir", "cache_gigabytes", "timeout_seconds", "retries")
        return cls(**{name: getattr(arguments, name) for name in names}, of_command=True)

    def option(self, name: str) -> str:
        """What a message calls the field `name`."""
        return f"--{name.replace('_', '-')}" if self.of_command else of_configuration(name)


def add_cache_arguments(parser: "argparse._ActionsContainer") -> None:
    """`--cache-dir` and others, of every command that reads shards behind URLs."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        metavar="DIR",
        help="where copies of shards behind URLs are kept (%(default)s)",
    )
    parser.add_argument(
        "--cache-gigabytes", type=_positive, default=50.0, metavar="N", help="so much of it at most (%(default)s)"
    )
    parser.add_argument(
        "--timeout-seconds",
        type=_positive,
        default=30.0,
        metavar="N",
        help="a transfer without a byte for so long has stalled (%(default)s)",
    )
    parser.add_argument(
        "--retries",
        type=_whole,
        default=5,
        metavar="N",
        help="tries after the first, with growing pauses; at most 3 of a server that never answered (%(default)s)",
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number above 0")
    return value


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number, 0 or more")
    return int(text)


class Remote:
    """The remote shards of one Index."""

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self.sizes: dict[Url, int] = {}
        """Bytes of each shard."""
        self._opened = time.time()
        self._reach = Reach() if settings.of_command else None
        self._cache = self.cache(threading.Event())

    def cache(self, stop: Stop) -> ShardCache:
        """The cache for one process; transfers in it end soon after `stop` is set. Raises RemoteError if it is of no use."""
        folder = self.settings.cache_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".room").open("a"):
                pass
        except OSError as error:
            raise RemoteError(
                f"{self.settings.option('cache_dir')} {folder}: cannot be written ({error.strerror}); set another one"
            ) from error
        settings = self.settings
        transfers = Transfers(settings.timeout_seconds, settings.retries, stop, self._reach, settings.option)
        return ShardCache(folder, int(self.settings.cache_gigabytes * 1e9), self._opened, transfers)

    @contextmanager
    def copy(self, url: Url) -> Iterator[Path]:
        """A complete copy of a shard as a file, which stays while the block runs; raises RemoteError."""
        cache = self.cache(threading.Event())  # of its own: this may be a forked process
        cache.pin([url])
        try:
            os.close(cache.open(url, self.sizes.get(url)))
            yield cache.entry(url).file
        finally:
            cache.close()

    # -- index ---------------------------------------------------------------------------------------------------------

    def expand(self, url: Url) -> Iterator[tuple[Url, list[str] | None]]:
        """The (folder, names of tars) that a URL or pattern stands for; None = all of the folder."""
        if HIDDEN in url.full:
            raise ValueError(
                f"{url}: credentials are left out of messages and saved configurations; give the whole URL again"
                + ("" if self.settings.of_command else " (data.shards=...)")
            )
        if url.protocol == "pipe":
            if self.settings.of_command:
                raise ValueError(
                    f"{url}: pipe: runs a command in a shell, which only a configuration can allow; write what it gives "
                    "into a tar (COMMAND > x.tar) and give that"
                )
            if not self.settings.allow_pipe:
                raise ValueError(
                    f"{url}: pipe: runs a command of this configuration in a shell, which is off; if you trust the "
                    "configuration, set data.allow_pipe=true"
                )
            yield url, [url.name]
            return
        check_protocol(url)
        tars: dict[Url, list[str]] = {}
        for text in expand_braces(url.full):
            for found in self._matches(Url(text)):
                if found.name.endswith(".tar"):
                    tars.setdefault(found.parent, []).append(found.name)
                else:
                    yield found, None
        yield from tars.items()

    def _matches(self, url: Url) -> list[Url]:
        """The files of a pattern, where the protocol lists files; a URL without one is itself."""
        if not any(letter in url.full for letter in ("*[" if url.protocol in ("http", "https") else "*[?")):
            return [url]
        found = [Url(path if "://" in path else f"{url.protocol}://{path}") for path in self._cache.transfers.glob(url)]
        found = [each for each in found if each.name.endswith(".tar")]
        if not found:
            raise ValueError(
                f"{url}: no tar matches, or this server does not list its files; "
                "give the folder, or a range such as shard-{000000..000099}.tar"
            )
        return found

    def open_folder(self, folder: Url, names: Sequence[str] | None) -> tuple[dict[str, Any], NDArray[Any], list[int]]:
        """As `index_files.open_folder`: description, rows and numbers of the shards `names` of a remote folder."""
        if folder.protocol == "pipe":
            return self._scanned(folder)
        index = folder / "index.json"
        try:
            os.close(self._cache.open(index, again=True))
        except RemoteError as error:
            if not error.missing:
                raise
            raise ValueError(
                f"{error} Remote shards are read by the index beside them: upload index.json and index.npy of the packed "
                "folder too. For tars made elsewhere, run `ssl-pack --index FOLDER` where they lie and upload both files."
            ) from None
        entry = self._cache.entry(index)
        try:
            about = read_description(entry.folder)
            assert about is not None, "it was fetched"
            files = [folder / name for name in index_files(about)]
            self._cache.pin([index, *files])
            for file in files:
                os.close(self._cache.open(file))
            about, rows, wanted = open_fetched(entry.folder, about, names)
        except ValueError as error:
            raise ValueError(str(error).replace(str(entry.folder), str(folder))) from error
        finally:
            self._cache.pin(())
        listed = [about["shards"][number] for number in wanted]
        self.sizes |= {folder / shard["name"]: shard["bytes"] for shard in listed}
        return about, rows, wanted

    def _scanned(self, url: Url) -> tuple[dict[str, Any], NDArray[Any], list[int]]:
        """The output of a command, which has no index beside it."""
        os.close(self._cache.open(url))
        path = self._cache.entry(url).file
        try:
            about, rows = describe({url.name: scan_shard(path)}, scanned=True)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), str(url))) from error
        self.sizes[url] = about["shards"][0]["bytes"]
        return about, rows, [0]

    def check_room(self, pools: Sequence[Sequence[Path | Url]], window_shards: int) -> None:
        """Raises ValueError if the cache cannot hold a shuffle window and the next one, fetched meanwhile, of every pool.

        A third window is for the slowest process of the node, which may be one behind: a warning says if there is no room.
        pools: the shards of each source of a mixture and each class that it balances; shards may be in several.
        """
        every = [[self.sizes.get(shard, 0) for shard in pool if isinstance(shard, Url)] for pool in pools]
        needed, ample = (
            min(sum(sum(heapq.nlargest(num * window_shards, sizes)) for sizes in every), sum(self.sizes.values()))
            for num in (2, 3)
        )
        if needed > self.settings.cache_gigabytes * 1e9:
            enough = needed * 1.05 / 1e9
            each = f" for each of {len(pools)} sources and classes" if len(pools) > 1 else ""
            raise ValueError(
                f"cache_gigabytes {self.settings.cache_gigabytes:g} is too small: a shuffle window of window_shards "
                f"{window_shards} and the next one, fetched meanwhile,{each} need up to {needed / 1e9:.3g} GB; set it to at "
                f"least {enough:.3g}, or lower window_shards"
            )
        if ample > self.settings.cache_gigabytes * 1e9:
            logger.warning(
                "%s=%g holds two shuffle windows and not a third: if processes of a node are a window apart, shards "
                "are fetched again; %.3g is enough for each to come once an epoch",
                self.settings.option("cache_gigabytes"), self.settings.cache_gigabytes, ample * 1.05 / 1e9,
            )  # fmt: skip


def index_files(about: dict[str, Any]) -> list[str]:
    """The names of the files that belong to an index.json: index.npy, and further arrays that it names."""
    told = [
        value
        for key, value in about.items()
        if key not in ("shards", "packed", "label_names", "group_names", "columns", "columns_left_out")
    ]
    more = {name for name in _texts(told) if name.endswith(".npy") and is_plain(name)}
    return sorted({"index.npy", *more})


def _texts(value: Any) -> Iterator[str]:
    """Every text in lists and maps."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
