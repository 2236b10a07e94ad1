"""How fast a run is, how long it will take, what memory it took, and the signal that asks it to stop."""

import resource
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Clock:
    """Samples per second and the share of time spent waiting for data, since the last `lap`."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps, self.waited, self.begun = 0, 0.0, time.perf_counter()

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, with the time that each took to arrive added up."""
        while True:
            asked = time.perf_counter()
            item = next(items)
            self.waited += time.perf_counter() - asked
            yield item

    def lap(self) -> dict[str, float]:
        """The figures since the last call."""
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        figures = {
            "samples_per_second": self.steps * self.batch_size / seconds,
            "data_wait_share": self.waited / seconds,
        }
        self.steps, self.waited, self.begun = 0, 0.0, time.perf_counter()
        return figures


class StopFlag:
    """True once SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C came: the loop then saves at the end of its step and leaves.

    Saving inside the handler would hang, because a collective needs every rank at the same place.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.set(signal.Signals(number).name)

    def set(self, name: str) -> None:
        """Asks to stop, and says who did."""
        self.name = self.name or name

    def __bool__(self) -> bool:
        return bool(self.name)

    def restore(self) -> None:
        """Puts back the handlers from before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def duration(seconds: float) -> str:
    """Readable: "42 s", "13 min", "5.2 h", "3.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch allocated on a GPU, or the most this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
