"""The file systems of fsspec, made new for each call inside the running event loop, and the commands of `pipe:` URLs.

New, because their sessions survive neither a fork nor the end of a loop, and because credentials are renewed meanwhile.
"""

import asyncio
import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from ssl_platform.location import Url

CONNECT_SECONDS = 10.0
"""Who has not answered a call for so long is not there; what is sent, slowly, has `timeout_seconds` for each pause."""
_POLL = 0.05
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
_GET_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"max_concurrency": 1},
    "gs": {"concurrency": 1},
}
"""One stream a file: several files are fetched at once, and a part file grows from its beginning."""


class IncompleteError(Exception):
    """Fewer or more bytes than there should be."""


class CommandError(Exception):
    """A command that did not end well."""


def check_protocol(url: Url) -> None:
    """Raises ValueError with the fix where fsspec, or the package behind it, does not know the protocol."""
    try:
        fsspec.get_filesystem_class(url.protocol)
        if url.protocol in ("http", "https"):
            import aiohttp  # noqa: F401
    except ImportError as error:
        extra = _EXTRAS.get(url.protocol)
        fix = f"pip install 'ssl-platform[{extra}]'" if extra else str(error)
        raise ValueError(f"{url}: a package for {url.protocol}:// is missing; {fix}") from error
    except ValueError as error:
        raise ValueError(
            f"{url}: '{url.protocol}://' is no protocol that fsspec knows, such as https, s3 or gs"
        ) from error


async def call(url: Url, name: str, timeout: float, *arguments: Any, **options: Any) -> Any:
    """`file_system.name(path, ...)` of fsspec, by the file system's coroutine where it has one."""
    family = _EXTRAS.get(url.protocol, "")
    kind = _kind(url.protocol)
    if name == "get_file":
        options |= _GET_OPTIONS.get(family, {})
    path = kind._strip_protocol(url.full)
    settings = {**kind._get_kwargs_from_urls(url.full), **_settings(family, timeout), "skip_instance_cache": True}
    if not kind.async_impl:
        file_system = kind(**settings)
        if name != "get_file":
            return await _threaded(lambda: getattr(file_system, name)(path, *arguments, **options))
        part = arguments[0]
        own = f"{part}.{uuid.uuid4().hex}.part"  # or a thread that was given up would go on writing into the next try's
        await _threaded(lambda: file_system.get_file(path, own, **options))
        return Path(own).replace(part)
    file_system = kind(**settings, asynchronous=True, loop=asyncio.get_running_loop())
    if family == "s3":
        file_system.retries = 1  # tries are counted, spaced and reported in one place, which is not here
    session = await getattr(file_system, "set_session", getattr(file_system, "_set_session", _nothing))()
    try:
        return await getattr(file_system, f"_{name}")(path, *arguments, **options)
    finally:
        if session is not None:
            await session.close()


def _kind(protocol: str) -> Any:
    if _EXTRAS.get(protocol) == "gs":
        # The class that gcsfs registers asks a second API, by gRPC, for the layout of a bucket; gRPC dies of a fork.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem
    return fsspec.get_filesystem_class(protocol)


async def _nothing() -> None:
    return None


def _settings(family: str, timeout: float) -> dict[str, Any]:
    """What each family of protocols needs beside the user's own settings (fsspec's configuration files, FSSPEC_*)."""
    own: dict[str, Any] = next(
        (fsspec.config.conf[name] for name in _EXTRAS if name in fsspec.config.conf and _EXTRAS[name] == family), {}
    )
    if family == "http":
        import aiohttp

        # aiohttp would end every transfer after 5 minutes in all; a large shard takes longer.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=min(timeout, CONNECT_SECONDS), sock_read=timeout)
        client = {"trust_env": True, **own.get("client_kwargs", {}), "timeout": limits}  # proxies and ~/.netrc
        headers = {"Accept-Encoding": "identity", **own.get("headers", {})}
        return {"client_kwargs": client, "headers": headers}
    if family == "s3":
        times = {"connect_timeout": min(timeout, CONNECT_SECONDS), "read_timeout": timeout}
        once = {**times, "retries": {"max_attempts": 0}}
        return {"config_kwargs": {**own.get("config_kwargs", {}), **once}}
    return {}


async def _threaded(work: Callable[[], Any]) -> Any:
    """A blocking call in a thread that nobody has to wait for: abandoned if it stalls."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True, name="blocking transfer").start()
    return await future


async def run_command(url: Url, part: Path, progress: Callback) -> None:
    """The output of a `pipe:` URL's command into a file; raises CommandError with the end of what it complained."""
    command = url.full.partition(":")[2]
    bash = shutil.which("bash")
    shell = [bash, "-o", "pipefail", "-c"] if bash else ["sh", "-c"]  # or `curl | unpack` would hide that curl failed
    with part.open("wb") as out, tempfile.TemporaryFile() as complaints:
        process = await asyncio.create_subprocess_exec(
            *shell, command, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=complaints, start_new_session=True
        )
        try:
            waiting, size = asyncio.ensure_future(process.wait()), 0
            while not (await asyncio.wait({waiting}, timeout=_POLL))[0]:
                if (now := part.stat().st_size) > size:
                    progress.relative_update(now - size)
                    size = now
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        complaints.seek(max(complaints.seek(0, os.SEEK_END) - 300, 0))
        said = " ".join(complaints.read().decode(errors="replace").split())
    if process.returncode:
        raise CommandError(url.hide(f"the command ended with {process.returncode}{': ' * bool(said)}{said}"))
