"""A rendezvous store whose calls end in time, even where its machine has gone without a word.

torch's time-out of a store is for keys that are not there yet. An answer that never comes is waited for as long as TCP
retransmits what was asked, a quarter of an hour on Linux (`net.ipv4.tcp_retries2`), and for ever if the other end is only
stopped.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ssl_platform.worker import Worker


class BoundedStore:
    """The calls of a torch store that ranks need, made by one thread; for any number of threads.

    They raise DistNetworkError after `seconds` without an answer, as do those behind them until it comes after all.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._worker = Worker("store")

    def set(self, key: str, value: str) -> None:
        """As torch's `Store.set`."""
        self._in_time(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """As torch's `Store.get`."""
        found: bytes = self._in_time(lambda: self._store.get(key))
        return found

    def check(self, keys: list[str]) -> bool:
        """As torch's `Store.check`."""
        return bool(self._in_time(lambda: self._store.check(keys)))

    def delete_key(self, key: str) -> bool:
        """As torch's `Store.delete_key`."""
        return bool(self._in_time(lambda: self._store.delete_key(key)))

    def _in_time(self, call: Callable[[], Any]) -> Any:
        future = self._worker.give(call)
        try:
            return future.result(self._seconds)
        except TimeoutError:
            future.cancel()  # if it waits for another one
            raise dist.DistNetworkError(f"no answer from the rendezvous store within {self._seconds:g} s") from None
