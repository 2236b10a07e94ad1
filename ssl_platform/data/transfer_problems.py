"""What went wrong in a transfer: whether trying again may help, and words for it without credentials."""

import errno
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from ssl_platform.data.file_systems import CONNECT_SECONDS, CommandError, IncompleteError
from ssl_platform.location import Url

_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3")
"""Whose errors are of the network or the server."""


def of_configuration(option: str) -> str:
    """What a message calls an option of RemoteSettings where these are keys of a configuration."""
    return f"data.{option}"


class Problem(NamedTuple):
    """What is to be said of an error, and to be done about it."""

    reason: str
    advice: str
    permanent: bool
    wait: float = 0
    """Seconds for which the server asked."""
    missing: bool = False
    out_of_reach: bool = False
    """Whether other files of this server cannot be had either, as far as one can tell."""


def judge(
    error: BaseException, url: Url, timeout_seconds: float, option: Callable[[str], str] = of_configuration
) -> Problem:
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
            f"Free some, or set {option('cache_dir')} or a lower {option('cache_gigabytes')}.",
            True,
        )
    if isinstance(error, TimeoutError):  # asyncio's and aiohttp's too
        patience = f"{option('timeout_seconds')} and {option('retries')} make it more patient"
        said = f"stalled: not a byte for {timeout_seconds:g} s"
        if "Connect" in type(error).__name__:
            said = f"no connection within {min(timeout_seconds, CONNECT_SECONDS):g} s"
        return Problem(said, f"Check the network and the server; {patience}.", False, out_of_reach=True)
    if type(error).__name__ == "TooManyRedirects":
        return Problem("it is redirected without end", "Check the address and the server.", True)
    if type(error).__name__ == "ClientPayloadError":  # aiohttp's; its cause looks like a status of 400
        return Problem("the connection ended inside the file", "Check the network and the server.", False)
    text = url.hide(" ".join(str(error).split()))[:300]
    if status is not None:
        permanent = 400 <= status < 500 and status not in (408, 425, 429)
        reason = f"the server answered {status} {getattr(error, 'message', '')}".strip()
        advice = f"Check the server; {option('retries')} sets how often it is asked."
        return Problem(url.hide(reason), advice, permanent, _wait(headers), out_of_reach=not permanent)
    passing = isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in _LIBRARIES
    permanent = not passing or "Certificate" in type(error).__name__
    reason = f"{type(error).__name__}: {text}".rstrip(": ")
    return Problem(reason, "Check the network, the server and the address.", permanent, out_of_reach=not permanent)


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
