"""A thread that lives as long as the run and does one thing after another."""

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue


class Work:
    """An action in a worker's thread."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end, at most `timeout` seconds."""
        self.ended.wait(timeout)


class Worker:
    """One thread, made before memory is short: where a new one lacks the memory to begin, CPython's `Thread.start` waits
    for ever. `name` is the thread's; it ends with the worker.
    """

    def __init__(self, name: str) -> None:
        self.queue: SimpleQueue[tuple[Callable[[], None], Work] | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self.queue,), name=name, daemon=True).start()
        weakref.finalize(self, self.queue.put, None)

    def give(self, action: Callable[[], None]) -> Work:
        """Begins an action, which raises nothing."""
        self.queue.put((action, work := Work()))
        return work


def _work(queue: SimpleQueue[tuple[Callable[[], None], Work] | None]) -> None:
    while (given := queue.get()) is not None:
        action, work = given
        try:
            action()
        finally:
            work.ended.set()
        del given, action  # it may hold the worker, with which this thread ends
