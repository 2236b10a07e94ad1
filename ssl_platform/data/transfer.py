"""One remote file into one local file: stalls, resets and short bodies are noticed, tried again, and named in the end."""

import asyncio
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from fsspec.callbacks import Callback

from ssl_platform.data.file_systems import CommandError, IncompleteError, call, run_command
from ssl_platform.data.order import generator
from ssl_platform.location import Url

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try, which double with each, and the most of them."""
_POLL = 0.05
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Digest", "Last-Modified", "LastModified", "mtime")
"""What file systems call that which changes with the contents of a file, the surest first."""


class RemoteError(OSError):
    """A remote file that cannot be had: names it, the number of tries, the last reason and what to check."""

    missing = False
    """Whether the server says that there is none, or will not say."""


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


@dataclass(frozen=True)
class Transfers:
    """How files are fetched, and until when."""

    timeout_seconds: float
    """Without a byte for so long, a transfer has stalled."""
    retries: int
    stop: Stop

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
            progress = _Progress()
            try:
                found = _in_thread(lambda: self._watched(begin(progress), progress))  # noqa: B023 (called at once)
                return finish(progress) if finish else found
            except Cancelled:
                raise
            except Exception as error:
                problem = judge(error, url, self.timeout_seconds)
                if problem.permanent or number > self.retries:
                    tries = "1 try" if number == 1 else f"{number} tries"
                    failure = RemoteError(f"{url}: {problem.reason} ({tries}). {problem.advice}")
                    failure.missing = problem.missing
                    raise failure from None
            wait = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * float(rng.uniform(0.5, 1))
            wait = max(wait, min(problem.wait, LONGEST_WAIT))
            logger.warning("%s: %s; trying again in %.1f s (%d of %d)", url, problem.reason, wait, number, self.retries)
            if self.stop.wait(wait):
                raise Cancelled
        raise AssertionError("the loop returns or raises")

    async def _watched(self, transfer: Coroutine[Any, Any, Result], progress: "_Progress") -> Result:
        """The result of a transfer that moves on; raises TimeoutError when it stalls, and Cancelled."""
        task = asyncio.ensure_future(transfer)
        while not (await asyncio.wait({task}, timeout=_POLL))[0]:
            stalled = time.monotonic() - progress.moved > self.timeout_seconds
            if stalled or self.stop.is_set():
                task.cancel()
                await asyncio.wait({task}, timeout=1)
                raise TimeoutError if stalled else Cancelled
        return task.result()


class Problem(NamedTuple):
    """What is to be said of an error, and to be done about it."""

    reason: str
    advice: str
    permanent: bool
    wait: float = 0
    """Seconds for which the server asked."""
    missing: bool = False


def judge(error: BaseException, url: Url, timeout_seconds: float) -> Problem:
    """Whether trying again may help, and words for it without credentials."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's, for whatever went wrong
        error = error.__cause__
    status, headers = _status(error)
    if isinstance(error, IncompleteError):
        return Problem(
            str(error), "Check that the upload is complete and that index.json belongs to these tars.", False
        )
    if isinstance(error, CommandError):
        return Problem(str(error), "Run it in a shell to see what it needs.", False)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Problem(
            "there is no such file (404)", "Check the address, and that it was uploaded.", True, missing=True
        )
    refused = isinstance(error, PermissionError) or status in (401, 403)
    if refused or "Credentials" in type(error).__name__:
        reason = f"access was refused ({status or 403})" if refused else "no credentials were found"
        advice = "Check the credentials (environment, ~/.aws, gcloud, ~/.netrc), whether a signed URL has expired, and "
        return Problem(reason, advice + "the permissions.", True, missing=refused)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(
            "no room on the disk of the cache",
            "Free some, or set data.cache_dir or a lower data.cache_gigabytes.",
            True,
        )
    if isinstance(error, TimeoutError):  # asyncio's and aiohttp's too
        advice = "Check the network and the server; data.timeout_seconds and data.retries make it more patient."
        return Problem(f"stalled: not a byte for {timeout_seconds:g} s", advice, False)
    if type(error).__name__ == "ClientPayloadError":  # aiohttp's; its cause looks like a status of 400
        return Problem("the connection ended inside the file", "Check the network and the server.", False)
    text = url.hide(" ".join(str(error).split()))[:300]
    if status is not None:
        permanent = 400 <= status < 500 and status not in (408, 425, 429)
        reason = f"the server answered {status} {getattr(error, 'message', '')}".strip()
        advice = "Check the server; data.retries sets how often it is asked."
        return Problem(url.hide(reason), advice, permanent, _wait(headers))
    passing = isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in (
        "aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3",
    )  # fmt: skip
    permanent = not passing or "Certificate" in type(error).__name__
    reason = f"{type(error).__name__}: {text}".rstrip(": ")
    return Problem(reason, "Check the network, the server and the address.", permanent)


def _status(error: BaseException | None) -> tuple[int | None, Any]:
    """The HTTP status in an error of aiohttp, botocore or gcsfs, and the headers."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            about = response.get("ResponseMetadata", {})
            return about.get("HTTPStatusCode"), about.get("HTTPHeaders", {})
        for name in ("status", "code"):
            value = getattr(error, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value, getattr(error, "headers", None) or {}
        error = error.__cause__
    return None, {}


def _wait(headers: Any) -> float:
    """Seconds of a Retry-After header, given as such or as a date; 0 without one."""
    text = str(headers.get("Retry-After", headers.get("retry-after", ""))).strip()
    try:
        return float(text) if text.replace(".", "").isdigit() else _until(text)
    except (ValueError, TypeError):
        return 0.0


def _until(date: str) -> float:
    return max((parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds(), 0.0) if date else 0.0


class _Progress(Callback):  # type: ignore[misc]  # fsspec has no types
    """Notes when the last bytes came; file systems call it."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = time.monotonic()

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        self.moved = time.monotonic()


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
