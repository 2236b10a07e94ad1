"""A rendezvous store whose calls end in time, even where its machine has gone without a word.

torch's time-out of a store is for keys that are not there yet. An answer that never comes is waited for as long as TCP
retransmits what was asked, a quarter of an hour on Linux (`net.ipv4.tcp_retries2`), and for ever if the other end is only
stopped.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class BoundedStore:
    """The calls of a torch store that ranks need, made by one thread; for any number of threads.

    They raise DistNetworkError after `seconds` without an answer, as do those behind them until it comes after all.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._calls: _Calls = SimpleQueue()
        threading.Thread(target=_make, args=(self._calls,), name="store", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

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
        future: Future[Any] = Future()
        self._calls.put((future, call))
        try:
            return future.result(self._seconds)
        except TimeoutError:
            future.cancel()  # if it waits for another one
            raise dist.DistNetworkError(f"no answer from the rendezvous store within {self._seconds:g} s") from None


def _make(calls: _Calls) -> None:
    """The thread: one call after another until None comes."""
    while (item := calls.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # is the caller's
                future.set_exception(error)
        del item, future, call  # which hold the store while there is nothing to do
