"""One remote file into one local file: stalls, resets and short bodies are noticed, tried again, and named in the end."""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from fsspec.callbacks import Callback

from ssl_platform.data.file_systems import IncompleteError, call, run_command
from ssl_platform.data.order import generator
from ssl_platform.data.transfer_problems import Problem, judge, of_configuration
from ssl_platform.location import Url

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try, which double with each, and the most of them."""
_POLL = 0.05
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Digest", "Last-Modified", "LastModified", "mtime")
"""What file systems call that which changes with the contents of a file, the surest first."""
_FIRST_RETRIES = 3
"""Tries after the first of a server that a command asks for the first time: its address may be wrong."""


class RemoteError(OSError):
    """A remote file that cannot be had: names it, the number of tries, the last reason and what to check."""

    missing = False
    """Whether the server says that there is none, or will not say."""
    out_of_reach = False
    """Whether other files of the same server cannot be had either, as far as one can tell."""


class Cancelled(Exception):
    """The reader that wanted the file was closed."""


class Stop(Protocol):
    """An event, of threads or of processes."""

    def is_set(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class Description(NamedTuple):
    """What a server says of a file without sending it."""

    size: int | None
    version: str | None
    """Changes with the contents: an etag, a generation or a time."""


class Reach:
    """Whether the servers of a command answer, known to all of its forked processes: one has to find out, not each.

    Reading it takes no lock, which a process that is killed might hold for ever.
    """

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")
        self._text, self._failed = fork.RawArray(ctypes.c_char, 4096), fork.RawValue(ctypes.c_bool)
        self._answered = fork.RawValue(ctypes.c_bool)
        self._first = fork.Lock()

    @property
    def failure(self) -> str:
        """Why nothing more is asked; empty as long as it is."""
        return self._text.value.decode(errors="ignore") if self._failed.value else ""

    @property
    def answered(self) -> bool:
        """Whether anything was ever had."""
        return bool(self._answered.value)

    def note_answer(self) -> None:
        self._answered.value = True

    def give_up(self, failure: str) -> None:
        """Ends the transfers of all processes; the first failure is the one that is told."""
        if self._first.acquire(block=False):  # and never let go
            self._text.value = failure.encode()[:4000]
            self._failed.value = True


@dataclass(frozen=True)
class Transfers:
    """How files are fetched, and until when."""

    timeout_seconds: float
    """Without a byte for so long, a transfer has stalled."""
    retries: int
    stop: Stop
    reach: Reach | None = None
    """What processes that give up together share; None = each file has all its tries."""
    option: Callable[[str], str] = of_configuration
    """What an option of RemoteSettings is called in messages."""

    def describe(self, url: Url) -> Description:
        """Asks for size and version; raises RemoteError."""
        if url.protocol == "pipe":
            return Description(None, None)
        about = self._retried(url, lambda progress: call(url, "info", self.timeout_seconds))
        size = about.get("size")
        found = next((str(about[key]) for key in _VERSIONS if about.get(key)), None)
        return Description(size if isinstance(size, int) else None, found)

    def glob(self, url: Url) -> list[str]:
        """The files that a pattern matches, where the protocol can list; raises RemoteError."""
        patient = replace(self, timeout_seconds=20 * self.timeout_seconds)  # nobody says how a long listing gets on
        found = patient._retried(url, lambda progress: call(url, "glob", self.timeout_seconds))
        return sorted(found)

    def download(self, url: Url, part: Path, size: int | None) -> int:
        """Fetches the whole file into `part` and returns its length, which is `size` where that is known.

        Raises RemoteError after the last try, and Cancelled.
        """

        def attempt(progress: _Progress) -> Coroutine[Any, Any, None]:
            progress.expected = size
            if url.protocol == "pipe":
                return run_command(url, part, progress)
            return call(url, "get_file", self.timeout_seconds, str(part), callback=progress)

        def checked(progress: "_Progress") -> int:
            got = part.stat().st_size
            for expected in (progress.size, size):  # as the server announced, as the index says
                if expected is not None and got != expected:
                    raise IncompleteError(f"{got} bytes came of {expected}")
            return got

        got: int = self._retried(url, attempt, checked)
        return got

    def _retried(
        self,
        url: Url,
        begin: "Callable[[_Progress], Coroutine[Any, Any, Any]]",
        finish: "Callable[[_Progress], Any] | None" = None,
    ) -> Any:
        rng = generator("retry", socket.gethostname(), os.getpid(), url.key)  # processes must not all return at once
        for number in range(1, self.retries + 2):
            self._check_reach()
            progress = _Progress()
            try:
                found = _in_thread(lambda: self._watched(begin(progress), progress))  # noqa: B023 (called at once)
                result = finish(progress) if finish else found
            except (Cancelled, RemoteError):
                raise
            except Exception as error:
                problem = judge(error, url, self.timeout_seconds, self.option)
                unknown = self.reach is not None and not self.reach.answered
                retries = min(self.retries, _FIRST_RETRIES) if unknown else self.retries
                if problem.permanent or number > retries:
                    raise self._failure(url, problem, number) from None
            else:
                if self.reach is not None:
                    self.reach.note_answer()
                return result
            wait = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * float(rng.uniform(0.5, 1))
            wait = max(wait, min(problem.wait, LONGEST_WAIT))
            logger.warning("%s: %s; trying again in %.1f s (%d of %d)", url, problem.reason, wait, number, retries)
            self._pause(wait)
        raise AssertionError("the loop returns or raises")

    def _failure(self, url: Url, problem: Problem, number: int) -> RemoteError:
        """The error after the last try; if it is the server's, nobody who shares `reach` goes on."""
        tries = "1 try" if number == 1 else f"{number} tries"
        text = f"{url}: {problem.reason} ({tries}). {problem.advice}"
        if problem.out_of_reach and self.reach is not None:
            text = f"{url.server} is out of reach, so no more files are tried. {text}"
            self.reach.give_up(text)
        failure = RemoteError(text)
        failure.missing, failure.out_of_reach = problem.missing, problem.out_of_reach
        return failure

    def _check_reach(self) -> None:
        if self.reach is not None and self.reach.failure:
            failure = RemoteError(self.reach.failure)
            failure.out_of_reach = True
            raise failure

    def _pause(self, seconds: float) -> None:
        """Waits; raises Cancelled, or RemoteError if another process has given up meanwhile."""
        end, piece = time.monotonic() + seconds, seconds if self.reach is None else 0.2
        while True:
            if self.stop.wait(min(piece, seconds)):
                raise Cancelled
            self._check_reach()
            if self.reach is None or (seconds := end - time.monotonic()) <= 0:
                return

    async def _watched(self, transfer: Coroutine[Any, Any, Result], progress: "_Progress") -> Result:
        """The result of a transfer that moves on; raises TimeoutError when it stalls, and Cancelled."""
        task = asyncio.ensure_future(transfer)
        while not (await asyncio.wait({task}, timeout=_POLL))[0]:
            stalled = time.monotonic() - progress.moved > self.timeout_seconds
            if stalled or self.stop.is_set():
                await _ended(task)
                raise TimeoutError if stalled else Cancelled
            try:
                self._check_reach()
            except RemoteError:
                await _ended(task)
                raise
        return task.result()


class _Progress(Callback):  # type: ignore[misc]  # fsspec has no types
    """Notes when the last bytes came; file systems call it."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = time.monotonic()
        self.expected: int | None = None
        """Bytes of the file by its index; the server may announce others, or none."""

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Raises IncompleteError when more comes than there is: a body without an end must not fill the disk."""
        self.moved = time.monotonic()
        most = self.size if self.expected is None else self.expected
        if most is not None and self.value > most:
            raise IncompleteError(f"more came than the {most} bytes that there should be")


async def _ended(task: "asyncio.Future[Any]") -> None:
    """Cancels a transfer, and takes the error that it may end with, which asyncio would log with the whole URL."""
    task.cancel()
    await asyncio.wait({task}, timeout=1)
    if task.done() and not task.cancelled():
        task.exception()


def _in_thread(begin: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Runs a coroutine in an event loop and a thread of its own, which are gone afterwards.

    So nothing is left that a fork would break, and callers may have a loop of their own (a notebook).
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((asyncio.run(begin()), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="transfer")
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
