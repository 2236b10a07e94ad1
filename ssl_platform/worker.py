"""A thread that lives as long as its owner and does one thing after another."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Given = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Worker:
    """One thread, made before memory is short: where a new one lacks the memory to begin, CPython's `Thread.start` waits
    for ever. `name` is the thread's; it ends with the worker.
    """

    def __init__(self, name: str) -> None:
        self._given: _Given = SimpleQueue()
        threading.Thread(target=_work, args=(self._given,), name=name, daemon=True).start()
        weakref.finalize(self, self._given.put, None)

    def give(self, action: Callable[[], Any]) -> Future[Any]:
        """Begins an action after those given before; the future has its result or error, and can be cancelled till then."""
        future: Future[Any] = Future()
        self._given.put((future, action))
        return future


def _work(given: _Given) -> None:
    while (item := given.get()) is not None:
        future, action = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(action())
            except BaseException as error:  # is that of whoever waits
                future.set_exception(error)
        del item, future, action  # which may hold the worker, with which this thread ends
