"""How far a command is: a bar on a terminal, else a line in the log every half minute."""

import logging
import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ssl_platform.progress import duration

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


class WorkProgress:
    """Counts samples, and bytes that were written, as they are done; use it in a `with` block."""

    def __init__(self, total: int, description: str) -> None:
        """`total` samples are to come; `description` is a word for the work."""
        self.total, self.done, self._description = total, 0, description
        self._new_samples, self._new_bytes, self._begun = 0, 0, time.monotonic()
        self._ended = threading.Event()
        self._is_terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
            disable=not self._is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, rate="")
        self._thread = threading.Thread(target=self._log, daemon=True)

    def advance(self, num_samples: int, num_bytes: int = 0, *, is_new: bool = True) -> None:
        """So many more samples are done; what was there before does not count for the rate."""
        self.done += num_samples
        if is_new:
            self._new_samples += num_samples
            self._new_bytes += num_bytes
        self._bar.update(self._task, completed=self.done, rate=self.rate())

    def rate(self) -> str:
        """Such as "120 samples/s, 3.4 MB/s, 5 min left"; empty before the first new samples."""
        seconds = time.monotonic() - self._begun
        if not self._new_samples or seconds <= 0:
            return ""
        speed = self._new_samples / seconds
        left = (self.total - self.done) / speed
        written = f" {self._new_bytes / 1e6 / seconds:.1f} MB/s," if self._new_bytes else ""
        return f"{speed:.0f} samples/s,{written} {duration(left)} left"

    def __enter__(self) -> "WorkProgress":
        self._bar.start()
        if not self._is_terminal:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._bar.stop()

    def _log(self) -> None:
        while not self._ended.wait(LOG_SECONDS):
            rate = self.rate()
            logger.info("%s: %d of %d samples%s", self._description, self.done, self.total, f", {rate}" * bool(rate))
