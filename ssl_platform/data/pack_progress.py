"""How far a pack is: a bar on a terminal, else a line in the log every half minute."""

import logging
import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ssl_platform.data.tar_writing import Made
from ssl_platform.progress import duration

logger = logging.getLogger(__name__)

LOG_SECONDS = 30.0


class PackProgress:
    """Counts samples and bytes of shards as they are done; use it in a `with` block."""

    def __init__(self, total: int) -> None:
        """`total` samples are to come."""
        self.total, self.done = total, 0
        self._new_samples, self._new_bytes, self._begun = 0, 0, time.monotonic()
        self._ended = threading.Event()
        self._is_terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("packing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
            disable=not self._is_terminal,
        )
        self._task = self._bar.add_task("packing", total=total, rate="")
        self._thread = threading.Thread(target=self._log, daemon=True)

    def finished(self, num_samples: int, made: Made) -> None:
        """One shard is there. Those that were there before count as done, but not for the rate."""
        self.done += num_samples
        if made.is_new:
            self._new_samples += num_samples
            self._new_bytes += made.shard.bytes
        self._bar.update(self._task, completed=self.done, rate=self.rate())

    def rate(self) -> str:
        """Such as "120 samples/s, 3.4 MB/s, 5 min left"; empty before the first new shard."""
        seconds = time.monotonic() - self._begun
        if not self._new_samples or seconds <= 0:
            return ""
        speed = self._new_samples / seconds
        left = (self.total - self.done) / speed
        return f"{speed:.0f} samples/s, {self._new_bytes / 1e6 / seconds:.1f} MB/s, {duration(left)} left"

    def __enter__(self) -> "PackProgress":
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
            logger.info("%d of %d samples%s", self.done, self.total, f", {rate}" * bool(rate))
