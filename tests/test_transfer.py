"""One file over HTTP from a server that stalls, resets, cuts off and refuses: tried again, or named in the end."""

import errno
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import fsspec
import pytest

from ssl_platform.data import transfer
from ssl_platform.data.file_systems import check_protocol
from ssl_platform.data.transfer import Cancelled, Reach, RemoteError, Transfers
from ssl_platform.data.transfer_problems import judge
from ssl_platform.location import Url
from tests.misbehaving import Server, served

BODY = bytes(range(256)) * 2000


class NoWaiting:
    """Notes the pauses between tries and does not make them."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def is_set(self) -> bool:
        return False

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0)
        return False


class FastStop(threading.Event):
    """Pauses of no length."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "served").mkdir()
    (tmp_path / "served/x.tar").write_bytes(BODY)
    with served(tmp_path / "served") as server:
        yield server


def fetch(
    server: Server,
    folder: Path,
    size: int | None = len(BODY),
    retries: int = 3,
    timeout: float = 20,
    path: str = "x.tar",
) -> tuple[bytes, NoWaiting]:
    stop = NoWaiting()
    url = Url(f"{server.url}/{path}")
    assert Transfers(timeout, retries, stop).download(url, folder / "part", size) == len(BODY)
    return (folder / "part").read_bytes(), stop


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (["stall"], "stalled: not a byte for 3 s"),
        (["reset"], "; trying again in"),
        (["500", "502"], "the server answered 502 Bad Gateway"),
        (["429"], "the server answered 429 Too Many Requests"),
        (["short"], "the connection ended inside the file"),
        (["short, unsaid"], f"{len(BODY) // 2} bytes came of {len(BODY)}"),
        (["short, wrong length"], f"{len(BODY) // 2} bytes came of {len(BODY)}"),
        (["reset", "short", "503"], "the server answered 503 Service Unavailable"),
        (["endless"], f"more came than the {len(BODY)} bytes that there should be"),
    ],
)
def test_what_passes_is_tried_again(
    server: Server, tmp_path: Path, faults: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults["x.tar"] = list(faults)
    body, stop = fetch(server, tmp_path, timeout=3 if "stall" in faults else 20)
    assert body == BODY
    assert server.gets["x.tar"] == len(faults) + 1 == len(stop.waits) + 1
    assert said in caplog.text and "Traceback" not in caplog.text
    for number, wait in enumerate(stop.waits):
        assert 0.5 <= wait / 2**number <= 1, "twice as long each time, with jitter"


def test_a_body_without_an_end_does_not_fill_the_disk(server: Server, tmp_path: Path) -> None:
    server.faults["x.tar"] = ["endless"] * 9
    with pytest.raises(RemoteError, match=rf"x.tar: more came than the {len(BODY)} bytes .* \(2 tries\)"):
        fetch(server, tmp_path, retries=1)
    assert server.gets["x.tar"] == 2
    assert (tmp_path / "part").stat().st_size <= len(BODY) + 2**20


def test_what_follows_the_announced_length_is_no_part_of_the_file(server: Server, tmp_path: Path) -> None:
    server.faults["x.tar"] = ["longer than said"]
    body, stop = fetch(server, tmp_path)
    assert body == BODY and not stop.waits


def test_redirects(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Followed; a circle is an error at once; and the address that they lead to, often a signed one, stays hidden."""
    (tmp_path / "served/y.tar").write_bytes(BODY)
    server.faults["x.tar"] = [f"to {server.url}/y.tar?X-Amz-Signature=abcdef"]
    assert fetch(server, tmp_path)[0] == BODY and server.gets["y.tar"] == 1
    server.faults["x.tar"] = [f"to {server.url}/x.tar?X-Amz-Signature=abcdef"] * 99
    with pytest.raises(
        RemoteError, match=r"x.tar: it is redirected without end \(1 try\)\. Check the address"
    ) as caught:
        fetch(server, tmp_path)
    said = str(caught.value)
    for target in ("sftp://me:hunter2@127.0.0.1/x?sig=abcdef", "http://me:hunter2@127.0.0.1:1/x?sig=abcdef"):
        server.faults["x.tar"] = [f"to {target}"] * 9
        with pytest.raises(RemoteError) as caught:
            fetch(server, tmp_path, retries=1)
        said += str(caught.value)
    assert not any(secret in said + caplog.text for secret in ("hunter2", "abcdef")), said


def test_processes_that_share_a_reach_give_up_together(server: Server, tmp_path: Path) -> None:
    """One runs out of tries; the other, in a transfer or a pause, ends at once and tells the same."""
    fork = multiprocessing.get_context("fork")
    reach, told = Reach(), fork.SimpleQueue()
    (tmp_path / "served/y.tar").write_bytes(BODY)
    server.faults["x.tar"], server.faults["y.tar"] = ["stall"] * 9, ["503 after 60"] * 9

    def work(name: str, retries: int, timeout: float) -> None:
        try:
            Transfers(timeout, retries, threading.Event(), reach).download(
                Url(f"{server.url}/{name}"), tmp_path / f"{name}.part", None
            )
        except RemoteError as error:
            told.put((str(error), error.out_of_reach, pickle.loads(pickle.dumps(error)).out_of_reach))

    reach.note_answer()
    waiting = [fork.Process(target=work, args=(name, 99, 10_000), daemon=True) for name in ("x.tar", "y.tar")]
    for process in waiting:
        process.start()
    deadline = time.monotonic() + 30
    while not (server.half_sent.is_set() and server.gets["y.tar"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RemoteError) as caught:
        Transfers(5, 0, NoWaiting(), reach).download(Url(f"{server.url}/y.tar"), tmp_path / "part", None)
    text = (
        f"{server.url} is out of reach, so no more files are tried. {server.url}/y.tar: the server answered 503 Service "
        "Unavailable (1 try). Check the server; data.retries sets how often it is asked."
    )
    assert str(caught.value) == text
    for process in waiting:
        process.join(30)
    assert [told.get() for _ in waiting] == [(text, True, True)] * 2
    gets = server.gets.total()
    with pytest.raises(RemoteError):
        Transfers(5, 9, NoWaiting(), reach).describe(Url(f"{server.url}/x.tar"))
    assert server.gets.total() == gets and not server.heads["x.tar"], "nothing more is asked"


def test_a_server_that_never_answered_is_asked_less_often(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.01)
    for answered, tries in ((False, 4), (True, 6)):
        server.faults["x.tar"], server.gets["x.tar"] = ["503"] * 9, 0
        reach = Reach()
        if answered:
            Transfers(5, 0, NoWaiting(), reach).describe(Url(f"{server.url}/x.tar"))
        with pytest.raises(RemoteError, match=rf"\({tries} tries\)"):
            Transfers(5, 5, FastStop(), reach).download(Url(f"{server.url}/x.tar"), tmp_path / "part", None)
        assert server.gets["x.tar"] == tries


def test_a_missing_file_is_no_server_out_of_reach(server: Server, tmp_path: Path) -> None:
    reach = Reach()
    for name, fault in (("none.tar", ""), ("x.tar", "403"), ("x.tar", "short"), ("x.tar", "endless")):
        server.faults[name] = [fault] * 2 if fault else []
        with pytest.raises(RemoteError) as caught:
            Transfers(5, 1, FastStop(), reach).download(Url(f"{server.url}/{name}"), tmp_path / "part", len(BODY))
        assert not caught.value.out_of_reach and not reach.failure


def test_a_slow_server_is_not_a_stalled_one(server: Server, tmp_path: Path) -> None:
    """The limit is on the pause, not on the whole: aiohttp's own would end a large shard after five minutes."""
    server.faults["x.tar"] = ["trickle"]
    assert fetch(server, tmp_path, retries=0, timeout=2)[0] == BODY


def test_in_the_end_it_is_reported_by_name(server: Server, tmp_path: Path) -> None:
    server.faults["x.tar"] = ["503"] * 9
    with pytest.raises(RemoteError) as caught:
        fetch(server, tmp_path, retries=2)
    assert str(caught.value) == (
        f"{server.url}/x.tar: the server answered 503 Service Unavailable (3 tries). Check the server; data.retries sets "
        "how often it is asked."
    )
    assert server.gets["x.tar"] == 3


@pytest.mark.parametrize(
    ("fault", "reason", "advice"),
    [
        ("404", "there is no such file (404) (1 try)", "Check the address"),
        ("403", "access was refused (403) (1 try)", "Check the credentials"),
        ("401", "access was refused (401) (1 try)", "signed URL has expired"),
        ("400", "the server answered 400 Bad Request (1 try)", "Check the server"),
    ],
)
def test_what_stays_is_an_error_at_once(server: Server, tmp_path: Path, fault: str, reason: str, advice: str) -> None:
    server.faults["x.tar"] = [fault] * 5
    with pytest.raises(RemoteError) as caught:
        fetch(server, tmp_path)
    assert reason in str(caught.value) and advice in str(caught.value)
    assert server.gets["x.tar"] == 1


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_obeyed_within_reason(server: Server, tmp_path: Path, kind: str) -> None:
    after = "7" if kind == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
    server.faults["x.tar"] = [f"429 after {after}"]
    _, stop = fetch(server, tmp_path)
    assert stop.waits == [7.0 if after == "7" else transfer.LONGEST_WAIT]


def test_a_retry_after_that_means_nothing(server: Server, tmp_path: Path) -> None:
    server.faults["x.tar"] = ["503 after soon"]
    _, stop = fetch(server, tmp_path)
    assert len(stop.waits) == 1 and stop.waits[0] <= 1


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(tmp_path) as server:
        pass
    with pytest.raises(RemoteError, match=r"x.tar: ClientConnectorError: .*\(2 tries\). Check the network"):
        fetch(server, tmp_path, retries=1)


def test_credentials_are_sent_and_not_shown(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = server.url.removeprefix("http://")
    url = Url(f"http://me:hunter2@{host}/x.tar?X-Amz-Signature=abcdef")
    server.faults["x.tar"] = ["503"] * 9
    with pytest.raises(RemoteError) as caught:
        Transfers(1, 1, NoWaiting()).download(url, tmp_path / "part", None)
    assert server.headers[-1]["Authorization"] == "Basic bWU6aHVudGVyMg=="
    said = str(caught.value) + caplog.text
    assert f"http://***@{host}/x.tar?X-Amz-Signature=***: the server answered 503" in said
    assert not any(secret in said for secret in ("hunter2", "abcdef"))
    with pytest.raises(RemoteError) as caught:
        Transfers(1, 0, NoWaiting()).describe(Url(f"http://me:hunter2@{host}/none.tar?sig=abcdef"))
    assert not any(secret in str(caught.value) for secret in ("hunter2", "abcdef"))


def test_a_stopped_transfer_ends(server: Server, tmp_path: Path) -> None:
    server.faults["x.tar"] = ["stall"]
    stop = threading.Event()
    threading.Thread(target=lambda: (server.half_sent.wait(30), stop.set()), daemon=True).start()
    with pytest.raises(Cancelled):
        Transfers(100, 3, stop).download(Url(f"{server.url}/x.tar"), tmp_path / "part", None)
    assert not server.released.is_set()


def test_inside_a_running_event_loop(server: Server, tmp_path: Path) -> None:
    import asyncio

    async def notebook() -> bytes:
        return fetch(server, tmp_path)[0]

    assert asyncio.run(notebook()) == BODY


def test_file_systems_without_coroutines(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/transfer/x.tar", BODY)
    transfers = Transfers(5, 0, NoWaiting())
    assert transfers.describe(Url("memory://transfer/x.tar")).size == len(BODY)
    assert transfers.glob(Url("memory://transfer/*.tar")) == ["/transfer/x.tar"]
    assert transfers.download(Url("memory://transfer/x.tar"), tmp_path / "part", None) == len(BODY)
    assert (tmp_path / "part").read_bytes() == BODY
    with pytest.raises(RemoteError, match=r"memory://transfer/y.tar: there is no such file \(404\)"):
        transfers.download(Url("memory://transfer/y.tar"), tmp_path / "part", None)


def test_a_blocking_file_system_that_stalls_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread goes on, and must not write into the next try's file."""
    from fsspec.implementations.memory import MemoryFileSystem

    released, late, calls = threading.Event(), threading.Event(), []
    original = MemoryFileSystem.get_file

    def stalling(self: MemoryFileSystem, rpath: str, lpath: str, **options: object) -> None:
        calls.append(lpath)
        if len(calls) == 1:
            released.wait(30)
            Path(lpath).write_bytes(b"late")
            late.set()
        else:
            original(self, rpath, lpath, **options)

    fsspec.filesystem("memory").pipe("/transfer/z.tar", BODY)
    monkeypatch.setattr(MemoryFileSystem, "get_file", stalling)
    Transfers(0.3, 1, NoWaiting()).download(Url("memory://transfer/z.tar"), tmp_path / "part", len(BODY))
    released.set()
    assert late.wait(30) and len(calls) == 2
    assert (tmp_path / "part").read_bytes() == BODY


def test_a_full_disk_is_no_reason_to_try_again() -> None:
    problem = judge(OSError(errno.ENOSPC, "No space left on device"), Url("s3://a/b.tar"), 1)
    assert problem.permanent and problem.reason == "no room on the disk of the cache"
    assert problem.advice == "Free some, or set data.cache_dir or a lower data.cache_gigabytes."


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("htps://host/x", "htps://host/x: 'htps://' is no protocol that fsspec knows, such as https, s3 or gs"),
        ("dropbox://x/y", "dropbox://x/y: a package for dropbox:// is missing; "),
    ],
)
def test_unknown_protocols(url: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_protocol(Url(url))
    assert str(caught.value).startswith(error)
