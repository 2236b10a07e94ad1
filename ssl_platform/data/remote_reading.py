"""Reading remote shards while the next ones are fetched: what each process has of the node's cache."""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence

from ssl_platform.data.remote import Remote
from ssl_platform.data.shard_cache import ShardCache
from ssl_platform.data.transfer import Cancelled
from ssl_platform.location import Url

logger = logging.getLogger(__name__)

NUM_FETCHERS = 2
"""Threads of each worker that fetch ahead."""
TRY_AGAIN, LOOK_AGAIN = 2.0, 30.0
"""Seconds until they try again to fetch a file for which there was no room, or look again after one that was here."""


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
