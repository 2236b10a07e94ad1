"""Shards behind URLs: their index is read first, and their bytes come through the node's cache, fetched ahead of use."""

import argparse
import heapq
import logging
import multiprocessing
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
from ssl_platform.data.transfer import Cancelled, RemoteError, Stop, Transfers
from ssl_platform.location import HIDDEN, Url, expand_braces

logger = logging.getLogger(__name__)

NUM_FETCHERS = 2
"""Threads of each worker that fetch ahead."""
TRY_AGAIN, LOOK_AGAIN = 2.0, 30.0
"""Seconds until they try again to fetch a file for which there was no room, or look again after one that was here."""


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

    @classmethod
    def of_arguments(cls, arguments: argparse.Namespace) -> "RemoteSettings":
        """What the options of `add_cache_arguments` say."""
        return cls(cache_dir=arguments.cache_dir, cache_gigabytes=arguments.cache_gigabytes)


def add_cache_arguments(parser: "argparse._ActionsContainer") -> None:
    """`--cache-dir` and `--cache-gigabytes`, of every command that reads shards behind URLs."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=default_cache_dir(),
        metavar="DIR",
        help="where copies of shards behind URLs are kept (%(default)s)",
    )
    parser.add_argument(
        "--cache-gigabytes", type=float, default=50.0, metavar="N", help="so much of it at most (%(default)s)"
    )


class Remote:
    """The remote shards of one Index."""

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings
        self.sizes: dict[Url, int] = {}
        """Bytes of each shard."""
        self._opened = time.time()
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
                f"data.cache_dir {folder}: cannot be written ({error.strerror}); set another one"
            ) from error
        transfers = Transfers(self.settings.timeout_seconds, self.settings.retries, stop)
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
                f"{url}: credentials are left out of saved configurations; give the URL again (data.shards=...)"
            )
        if url.protocol == "pipe":
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

        pools: the shards of each source of a mixture and each class that it balances; shards may be in several.
        """
        every = [[self.sizes.get(shard, 0) for shard in pool if isinstance(shard, Url)] for pool in pools]
        needed = sum(sum(heapq.nlargest(2 * window_shards, sizes)) for sizes in every)
        needed = min(needed, sum(self.sizes.values()))
        if needed > self.settings.cache_gigabytes * 1e9:
            enough = needed * 1.05 / 1e9
            each = f" for each of {len(pools)} sources and classes" if len(pools) > 1 else ""
            raise ValueError(
                f"cache_gigabytes {self.settings.cache_gigabytes:g} is too small: a shuffle window of window_shards "
                f"{window_shards} and the next one, fetched meanwhile,{each} need up to {needed / 1e9:.3g} GB; set it to at "
                f"least {enough:.3g}, or lower window_shards"
            )


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


# -- reading -----------------------------------------------------------------------------------------------------------


class RemoteReader:
    """What one ShardReader, in whichever process, has of the remote shards. `close` ends its transfers everywhere."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._stop = multiprocessing.get_context("fork").Event()  # set in the training process, seen in its workers
        self._process = 0
        self._cache: ShardCache
        self._fetchers: Fetchers

    def open(self, url: Url) -> int:
        """A descriptor of the complete shard; raises RemoteError."""
        return self._begun().open(url, self._remote.sizes.get(url))

    def expect(self, current: Sequence[Url], following: Sequence[Url]) -> None:
        """Keeps the shards `current`, which are being read, and fetches them and then `following` in the background."""
        self._begun().pin(current)
        self._fetchers.want([(url, self._remote.sizes.get(url)) for url in (*current, *following)])

    def _begun(self) -> ShardCache:
        """The cache of this process: threads, locks and event loops do not survive a fork."""
        if self._process != os.getpid():
            self._cache = self._remote.cache(self._stop)
            self._fetchers = Fetchers(self._cache)
            self._process = os.getpid()
        return self._cache

    def close(self) -> None:
        """Ends transfers, here and in forked processes; nothing can be read any more."""
        self._stop.set()
        if self._process == os.getpid():
            self._fetchers.close()
            self._cache.close()


class Fetchers:
    """Threads that fetch files ahead of their use."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._changed = threading.Condition()
        self._wanted: list[tuple[Url, int | None]] = []
        self._not_before: dict[Url, float] = {}
        self._closed = False
        self._threads: list[threading.Thread] = []

    def want(self, files: Sequence[tuple[Url, int | None]]) -> None:
        """Replaces what is to be fetched, in this order; to be called again and again."""
        with self._changed:
            now = time.monotonic()
            self._not_before = {url: until for url, until in self._not_before.items() if until > now}
            self._wanted = [(url, size) for url, size in files if url not in self._not_before]
            while self._wanted and len(self._threads) < NUM_FETCHERS:
                self._threads.append(threading.Thread(target=self._work, daemon=True, name="fetch ahead"))
                self._threads[-1].start()
            self._changed.notify_all()

    def _work(self) -> None:
        while (next_file := self._next()) is not None:
            here = False
            try:
                here = self._cache.prefetch(*next_file)
            except Cancelled:
                return
            except Exception:  # whoever needs the file gets this error itself
                logger.debug("fetching ahead failed", exc_info=True)
            with self._changed:
                self._not_before[next_file[0]] = time.monotonic() + (LOOK_AGAIN if here else TRY_AGAIN)

    def _next(self) -> tuple[Url, int | None] | None:
        with self._changed:
            while not self._wanted and not self._closed:
                self._changed.wait()
            return None if self._closed else self._wanted.pop(0)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)
