"""Shards behind URLs: the node's cache with several processes, what is refused, and training from HTTP end to end."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_protocols.__main__ import main as evaluate
from ssl_platform.data import transfer
from ssl_platform.data.index import Index
from ssl_platform.data.pack import main as pack
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.remote import RemoteSettings
from ssl_platform.data.shard_cache import Entry, ShardCache
from ssl_platform.data.transfer import RemoteError, Transfers
from ssl_platform.location import Url
from ssl_platform.train import main as train
from tests.misbehaving import Server, served
from tests.test_index import labelled_tar
from tests.test_shards import assert_equal, batches, write_shards

ROOT = Path(__file__).parents[1]
SKIN = ROOT / "tests/data/skin_tiles"
SMOKE = ROOT / "configs/smoke/pathology.yaml"
SHARD = 163840
"""Bytes of each of the three shards of SKIN."""
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(SKIN, tmp_path / "served/skin")
    with served(tmp_path / "served") as server:
        yield server


def settings(tmp_path: Path, **changes: Any) -> RemoteSettings:
    return replace(RemoteSettings(cache_dir=tmp_path / "cache", timeout_seconds=20, retries=2), **changes)


def skin(server: Server, tmp_path: Path, **changes: Any) -> Index:
    return Index.open(f"{server.url}/skin", settings(tmp_path, **changes))


def cached(tmp_path: Path) -> list[str]:
    """The names under which complete files are visible."""
    return sorted(path.name for path in (tmp_path / "cache").glob("*/[!.]*"))


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob("*/.*.part*"))


def processes(number: int, work: Callable[[int], None]) -> list[int | None]:
    """Runs `work(i)` in forked processes; returns their exit codes."""
    started = [fork.Process(target=work, args=(i,), daemon=True) for i in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "folder/", "pattern", "range", "list", "one by one"])
def test_the_same_samples_as_from_the_folder(server: Server, tmp_path: Path, form: str) -> None:
    root = f"{server.url}/skin"
    given: Any = {
        "folder": root,
        "folder/": root + "/",
        "pattern": root + "/shard-*.tar",
        "range": root + "/shard-{000000..000002}.tar",
        "list": root + "/shard-{000000,000001,000002}.tar",
        "one by one": [Url(f"{root}/shard-00000{i}.tar") for i in range(3)],
    }[form]
    index, local = Index.open(given, settings(tmp_path)), Index.open(SKIN)
    assert index.fingerprint == local.fingerprint and index.statistics == local.statistics
    assert index.label_names == local.label_names and np.array_equal(index.labels, local.labels)
    reader, expected = ShardReader(index, 4), ShardReader(local, 4)
    assert all(reader.read(sample) == expected.read(sample) for sample in range(len(local)))
    assert server.tars() == {f"shard-00000{i}.tar": 1 for i in range(3)}
    assert [str(shard) for shard in index.shards] == [f"{root}/shard-00000{i}.tar" for i in range(3)]


def test_once_per_node(server: Server, tmp_path: Path) -> None:
    """Six processes start together, as ranks do, each with its own Index, and want every shard."""

    def work(number: int) -> None:
        index = skin(server, tmp_path)
        start.wait(30)
        reader, expected = ShardReader(index, 4), ShardReader(Index.open(SKIN), 4)
        assert all(reader.read(sample) == expected.read(sample) for sample in range(0, 100, 7))

    start = fork.Barrier(6)
    assert processes(6, work) == [0] * 6
    assert server.tars() == {f"shard-00000{i}.tar": 1 for i in range(3)}


def test_reused_by_the_next_run_while_it_is_the_same(server: Server, tmp_path: Path) -> None:
    for _ in range(3):
        reader = ShardReader(skin(server, tmp_path), 4)
        for sample in range(0, 100, 7):
            reader.read(sample)
    assert server.tars() == {f"shard-00000{i}.tar": 1 for i in range(3)}
    assert server.gets["index.npy"] == 1
    os.utime(tmp_path / "served/skin/shard-000001.tar", (1, 1))  # this server knows versions by Last-Modified
    reader = ShardReader(skin(server, tmp_path), 4)
    for sample in range(0, 100, 7):
        reader.read(sample)
    assert server.tars() == {"shard-000000.tar": 1, "shard-000001.tar": 2, "shard-000002.tar": 1}
    copy = next((tmp_path / "cache").glob("*/shard-000000.tar"))
    copy.write_bytes(copy.read_bytes()[:-1])
    ShardReader(skin(server, tmp_path), 4).read(0)
    assert server.gets["shard-000000.tar"] == 2, "a damaged copy is not used"


def test_one_check_per_run_and_node(server: Server, tmp_path: Path) -> None:
    ShardReader(skin(server, tmp_path), 4).read(0)
    server.heads.clear()
    index = skin(server, tmp_path)
    assert processes(3, lambda _: bool(ShardReader(index, 4).read(0)) or None) == [0] * 3
    assert server.heads["shard-000000.tar"] == 1 and server.gets["shard-000000.tar"] == 1


def test_killed_in_the_middle(server: Server, tmp_path: Path) -> None:
    index = skin(server, tmp_path)
    server.faults["shard-000000.tar"] = ["stall"]
    process = fork.Process(target=lambda: ShardReader(index, 4).read(0), daemon=True)
    process.start()
    assert server.half_sent.wait(30)
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in (tmp_path / "cache").glob("*/.*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert cached(tmp_path) == ["index.json", "index.npy"]
    assert leftovers(tmp_path) == [".shard-000000.tar.part"]
    ShardReader(index, 4).read(70)  # another shard: whoever makes room sees that the first one's process is gone
    assert leftovers(tmp_path) == []
    assert ShardReader(index, 4).read(0) == ShardReader(Index.open(SKIN), 4).read(0)
    assert server.gets["shard-000000.tar"] == 2


def test_least_recently_used_goes_first_but_nothing_pinned(server: Server, tmp_path: Path) -> None:
    index = skin(server, tmp_path, cache_gigabytes=(2 * SHARD + 20_000) / 1e9)
    urls = [shard for shard in index.shards if isinstance(shard, Url)]
    assert index.remote is not None
    ours, theirs = (index.remote.cache(threading.Event()) for _ in range(2))
    first = ours.open(urls[0], SHARD)
    os.close(ours.open(urls[1], SHARD))
    os.close(ours.open(urls[0], SHARD))  # used again
    os.close(ours.open(urls[2], SHARD))
    assert [name for name in cached(tmp_path) if "shard" in name] == ["shard-000000.tar", "shard-000002.tar"]
    theirs.pin(urls[:1])
    os.close(ours.open(urls[1], SHARD))
    assert [name for name in cached(tmp_path) if "shard" in name] == ["shard-000000.tar", "shard-000001.tar"]
    theirs.pin([urls[0], urls[1]])
    assert not ours.prefetch(urls[2], SHARD), "not ahead of what is being read"
    os.close(ours.open(urls[2], SHARD))  # but whoever needs it now gets it
    assert [name for name in cached(tmp_path) if "shard" in name] == [f"shard-00000{i}.tar" for i in range(3)]
    theirs.close()
    (tmp_path / "served/skin/new.tar").write_bytes(bytes(2 * SHARD))
    os.close(ours.open(Url(f"{server.url}/skin/new.tar")))
    assert [name for name in cached(tmp_path) if "tar" in name] == ["new.tar"]
    assert os.pread(first, SHARD, 0) == (SKIN / "shard-000000.tar").read_bytes(), "who has it open keeps it"
    os.close(first)


def test_one_fetch_for_many_threads(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**9, time.time(), Transfers(5, 0, threading.Event()))
    found: list[bytes] = []

    def work() -> None:
        file = cache.open(Url(f"{server.url}/skin/shard-000000.tar"))
        found.append(os.pread(file, SHARD, 0))
        os.close(file)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [(SKIN / "shard-000000.tar").read_bytes()] * 8
    assert server.tars() == {"shard-000000.tar": 1}


@pytest.mark.parametrize("reserved_before", [0, 700], ids=["ended when its lock is read", "ended after that"])
def test_a_transfer_that_ends_while_room_is_counted_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserved_before: int
) -> None:
    cache = ShardCache(tmp_path / "cache", 1000, time.time(), Transfers(5, 0, threading.Event()))
    entry = cache.entry(Url("http://host/data/a.tar"))
    entry.folder.mkdir(parents=True)
    entry.beside("lock").write_text("700")
    entry.beside("part").write_bytes(bytes(700))

    def ends_meanwhile(found: Entry) -> int:
        assert found == entry
        entry.beside("part").rename(entry.file)
        return reserved_before

    monkeypatch.setattr(cache, "_reserved", ends_meanwhile)
    files, reserved = cache._survey()
    assert sum(found.st_size for _, found in files) + reserved == 700


def test_names_that_are_too_long_or_hidden_stay_apart(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10**9, 0, Transfers(5, 0, threading.Event()))
    urls = [f"https://host/a/{name}.tar" for name in ("b" * 200, "c" + "b" * 199, "x", ".x", "..x", "a%2Fx", "a_x")]
    entries = [cache.entry(Url(url)) for url in urls]
    assert len({str(entry.file) for entry in entries}) == len(urls)
    assert all(len(entry.beside("about").name) < 200 and entry.name[0] != "." for entry in entries)


def test_an_index_pushes_no_shards_out(server: Server, tmp_path: Path) -> None:
    ShardReader(skin(server, tmp_path), 4).read(0)
    skin(server, tmp_path, cache_gigabytes=1e-6)  # as in a configuration with a slip of the pen
    assert cached(tmp_path) == ["index.json", "index.npy", "shard-000000.tar"]


def test_readers_that_come_and_go_and_die(tmp_path: Path) -> None:
    """Four processes open files at random from a cache with room for three of eight, and one is killed on the way."""
    bodies = [bytes([number]) * (4000 + number) for number in range(8)]
    (tmp_path / "served").mkdir()
    for number, body in enumerate(bodies):
        (tmp_path / f"served/{number}.tar").write_bytes(body)
    with served(tmp_path / "served") as server:
        begun = fork.Barrier(4)

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            cache = ShardCache(tmp_path / "cache", 12_500, time.time(), Transfers(20, 3, threading.Event()))
            begun.wait(30)
            for _ in range(10_000 if seed == 0 else 25):
                number = int(rng.integers(8))
                if rng.random() < 0.3:
                    cache.pin([Url(f"{server.url}/{rng.integers(8)}.tar")])
                if rng.random() < 0.3:
                    cache.prefetch(Url(f"{server.url}/{rng.integers(8)}.tar"), None)
                file = cache.open(Url(f"{server.url}/{number}.tar"), len(bodies[number]))
                assert os.pread(file, 10_000, 0) == bodies[number]
                os.close(file)

        started = [fork.Process(target=work, args=(seed,), daemon=True) for seed in range(4)]
        for process in started:
            process.start()
        started[1].join(60)
        os.kill(started[0].pid or 0, signal.SIGKILL)
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [-signal.SIGKILL, 0, 0, 0]
        cache = ShardCache(tmp_path / "cache", 12_500, time.time(), Transfers(20, 3, threading.Event()))
        for number in range(8):
            os.close(cache.open(Url(f"{server.url}/{number}.tar")))
    assert leftovers(tmp_path) == []
    held = list((tmp_path / "cache").glob("*/*.tar"))
    assert len(held) == 3 and all(path.read_bytes() == bodies[int(path.stem)] for path in held)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_inspect_verify_and_extract_read_urls(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, cache = f"{server.url}/skin", ("--cache-dir", str(tmp_path / "cache"))
    local, reports = str(tmp_path / "served/skin"), []
    for place in (root, local):
        assert pack(["inspect", place, "--out", str(tmp_path / "report"), *cache, "--workers", "2"]) == 0
        reports.append(json.loads((tmp_path / "report/inspect.json").read_text()))
    assert reports[0] == reports[1]
    assert server.tars() == {f"shard-00000{i}.tar": 1 for i in range(3)}, "each shard once, in two processes"
    found = []
    for place in (root, local):
        assert pack(["verify", place, "--json", str(tmp_path / "found.json"), *cache, "--workers", "2"]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text()))
    assert found[0] == found[1] and found[0]["decoded"] > 0
    assert pack(["verify", f"{root}/shard-{{000000..000001}}.tar", *cache]) == 0
    assert " in 2 shards, " in capsys.readouterr().out
    assert train([str(SMOKE), "steps=1", "optim.lr.warmup_steps=0", f"run_dir={tmp_path / 'run'}"]) == 0
    rows = []
    for place in (root, local):
        run = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "rows.npy"), "--workers", "0"]
        assert evaluate(["extract", *run, "--shards", place, *cache]) == 0
        rows.append(np.load(tmp_path / "rows.npy"))
    assert np.array_equal(*rows)


def test_verify_names_what_is_wrong_behind_a_url(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "served/skin"
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek(1024)
        file.write(bytes(range(256)))
    (folder / "shard-000001.tar").unlink()
    command = ["verify", f"{server.url}/skin", "--cache-dir", str(tmp_path / "cache")]
    assert pack(command) == 1
    said = capsys.readouterr().out
    assert "shard-000000.tar: " in said and "shard-000001.tar: " in said and "404" in said
    assert "shard-000002.tar" not in said and str(tmp_path) not in said
    (folder / "index.json").unlink()
    assert pack(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Remote shards are read by the index beside them" in said


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_commands_give_up_on_a_server_that_dies(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty shards, three processes: a dead server costs the tries of one shard, and one line."""
    (tmp_path / "served").mkdir()
    local = write_shards(tmp_path / "served/toy", [2] * 40)
    with served(tmp_path / "served") as server:
        for shard in local.shards:
            server.faults[shard.name] = ["503"] * 99
        given = ["--cache-dir", str(tmp_path / "cache"), "--workers", "3", "--retries", "2"]
        given += ["--out", str(tmp_path / "report")] if command == "inspect" else []
        assert pack([command, f"{server.url}/toy", *given]) == 2
        assert len(server.tars()) <= 3 and max(server.tars().values()) <= 3
        error = [
            line for line in capsys.readouterr().err.splitlines() if " WARNING " not in line and " INFO " not in line
        ]
        assert len(error) == 1 and error[0].startswith(
            f"ssl-pack {command}: {server.url} is out of reach, so no more files are tried. {server.url}/toy/"
        )
        assert error[0].endswith("(3 tries). Check the server; --retries sets how often it is asked.")
        url = server.url
    assert pack([command, f"{url}/toy", *given]) == 2
    assert f"ssl-pack {command}: {url} is out of reach" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_commands_speak_of_their_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, error in (
        (["pipe:cat x.tar"], "ssl-pack verify: pipe:cat x.tar: pipe: runs a command in a shell, which only a configuration "
         "can allow; write what it gives into a tar (COMMAND > x.tar) and give that\n"),
        (["https://***@host/x"], "ssl-pack verify: https://***@host/x: credentials are left out of messages and saved "
         "configurations; give the whole URL again\n"),
        (["https://host/x", "--cache-dir", str(tmp_path / "file/x")], f"ssl-pack verify: --cache-dir {tmp_path / 'file/x'}: "
         "cannot be written (Not a directory); set another one\n"),
    ):  # fmt: skip
        (tmp_path / "file").touch()
        assert pack(["verify", *arguments]) == 2
        assert capsys.readouterr().err == error
    for option, value in (
        ("cache-gigabytes", "-3"),
        ("cache-gigabytes", "nan"),
        ("timeout-seconds", "0"),
        ("retries", "x"),
    ):
        with pytest.raises(SystemExit):
            pack(["verify", "https://host/x", f"--{option}", value])
        assert f"argument --{option}: '{value}': expected a " in capsys.readouterr().err


def test_commands_that_copy_refuse_urls(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = f"{server.url}/skin", str(tmp_path / "out")
    for command in (
        ["merge", root, str(SKIN), out],
        ["merge", str(SKIN), str(SKIN), root],
        ["prune", root, out, "--keep", "0.5"],
        ["prune", str(SKIN), root, "--keep", "0.5"],
    ):
        assert pack(command) == 2
        assert capsys.readouterr().err == (
            f"ssl-pack {command[0]}: {root}: this command copies from and to folders on this machine; download the whole "
            "folder, with its index.json and index.npy, and upload what comes out\n"
        )
    assert not server.gets and not (tmp_path / "out").exists()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "num_kept"), [(0, 4), (2, 6)])
def test_each_shard_once_an_epoch_with_a_small_cache(tmp_path: Path, workers: int, num_kept: int) -> None:
    """Twelve shards in windows of two, room for two windows, or for three where two workers may be a window apart; the
    batches are those from the folder."""
    (tmp_path / "served").mkdir()
    local = write_shards(tmp_path / "served/toy", [20] * 12)
    size = local.shards[0].stat().st_size  # type: ignore[union-attr]
    with served(tmp_path / "served") as server:
        room = settings(tmp_path, cache_gigabytes=((num_kept + 0.5) * size + 20_000) / 1e9)
        index = Index.open(f"{server.url}/toy", room)
        for epoch in range(2):
            server.gets.clear()
            run: dict[str, Any] = {"first_step": 30 * epoch, "last_step": 30 * epoch + 30, "window_shards": 2}
            run |= {"workers": workers, "prefetch": 1}
            with closing(batches(index, **run)) as remote, closing(batches(local, **run)) as expected:
                assert_equal(list(remote), list(expected))
            assert set(server.tars().values()) == {1}
            kept = 12 - len(server.tars())  # the second epoch begins with what the first has left
            assert kept == 0 if epoch == 0 else kept <= num_kept
        held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar"))
        assert held <= (num_kept + 0.5) * size + 20_000
    assert workers or leftovers(tmp_path) == []


def test_the_next_shards_come_while_this_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    write_shards(tmp_path / "served/toy", [16] * 6)
    with served(tmp_path / "served") as server:
        index = Index.open(f"{server.url}/toy", settings(tmp_path))
        with closing(batches(index, window_shards=2, last_step=100)) as found:
            next(found)
            deadline = time.monotonic() + 30
            while len(server.tars()) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(server.tars()) == 4, "the window of two and the next one"
            assert set(server.tars().values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_ends_transfers(tmp_path: Path, workers: int) -> None:
    """Every shard but the first stalls, with hours of patience: workers wait for them, threads fetch them ahead."""
    (tmp_path / "served").mkdir()
    local = write_shards(tmp_path / "served/toy", [16] * 6)
    with closing(batches(local, window_shards=1)) as found:
        (first,) = ShardReader(local, 1).shards_of(next(found).ids.numpy())
    with served(tmp_path / "served") as server:
        for number, shard in enumerate(local.shards):
            server.faults[shard.name] = ["stall"] * 99 * (number != first)
        index = Index.open(f"{server.url}/toy", settings(tmp_path, timeout_seconds=10_000))
        before = multiprocessing.active_children()
        found = batches(index, workers=workers, window_shards=1)
        assert len(next(found).keys) == 8
        assert server.half_sent.wait(30)
        found.close()
        assert not [process for process in multiprocessing.active_children() if process not in before]
        assert not [thread for thread in threading.enumerate() if thread.name in ("fetch ahead", "transfer")]
        assert not server.released.is_set()
        assert not workers or len(leftovers(tmp_path)) <= 4  # threads of workers end with them, in whatever they do
        server.faults.clear()
        reader = ShardReader(index, 9)
        assert [reader.read(sample).key for sample in range(0, 96, 16)] == [f"k{i:03d}" for i in range(0, 96, 16)]
    assert leftovers(tmp_path) == []


def test_closing_ends_a_read(server: Server, tmp_path: Path) -> None:
    server.faults["shard-000000.tar"] = ["stall"] * 9
    reader = ShardReader(skin(server, tmp_path, timeout_seconds=10_000), 4)
    threading.Thread(target=lambda: (server.half_sent.wait(30), reader.close()), daemon=True).start()
    with pytest.raises(transfer.Cancelled):
        reader.read(0)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_out_of_reach_ends_the_run_in_words(
    server: Server, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in range(3):
        server.faults[f"shard-00000{shard}.tar"] = ["503"] * 99
    overrides = [f"data.shards={server.url}/skin", f"data.cache_dir={tmp_path / 'cache'}", f"data.workers={workers}"]
    overrides += ["data.retries=2", f"run_dir={tmp_path / 'run'}", "tensorboard=false"]
    assert train([str(SMOKE), *overrides]) == 1
    said = capsys.readouterr().err
    error = said.rstrip("\n").rpartition("\n")[2].partition(" ERROR ")[2]
    assert error.startswith(f"{server.url}/skin/shard-00000")
    assert error.endswith("the server answered 503 Service Unavailable (3 tries). Check the server; data.retries sets how "
                          "often it is asked.")  # fmt: skip
    assert "Traceback" not in said
    assert not (tmp_path / "run/events.jsonl").exists(), "a shard out of reach is no bad sample"


def test_training_and_scores_equal_those_from_the_folder(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shards, more in (
        ("local", str(SKIN), []),
        ("remote", f"{server.url}/skin", [f"data.cache_dir={tmp_path / 'cache'}", "data.workers=2"]),
    ):
        given = [f"data.shards={shards}", f"run_dir={tmp_path / name}", "steps=10", "tensorboard=false", *more]
        assert train([str(SMOKE), *given]) == 0
    kept = ("loss", "dino_global", "ibot", "koleo", "lr")
    lines = [
        [{key: line[key] for key in kept} for line in map(json.loads, (tmp_path / name / "metrics.jsonl").open())]
        for name in ("local", "remote")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    weights = [
        (tmp_path / name / "checkpoints/step_00000010/model.safetensors").read_bytes() for name in ("local", "remote")
    ]
    assert weights[0] == weights[1]
    assert server.tars() == {f"shard-00000{i}.tar": 1 for i in range(3)}
    saved = (tmp_path / "remote/config.yaml").read_text()
    assert f"shards: {server.url}/skin" in saved
    scores = []
    for name, shards in (("local", str(SKIN)), ("remote", f"{server.url}/skin")):
        out = tmp_path / f"eval_{name}"
        options = ["--checkpoint", str(tmp_path / "remote"), "--cache-dir", str(tmp_path / "cache"), "--out", str(out)]
        assert evaluate(["knn", *options, "--train", shards, "--test", shards, "--n-boot", "10"]) == 0, (
            capsys.readouterr()
        )
        result = json.loads((out / "knn.json").read_text())
        scores.append(result["results"])
    assert scores[0] == scores[1]
    assert result["data"]["train"][0] == f"{server.url}/skin/shard-000000.tar"
    assert server.tars() == {f"shard-00000{i}.tar": 1 for i in range(3)}, "evaluation used the copies of training"


# -- refused -----------------------------------------------------------------------------------------------------------


def refusal(server: Server, tmp_path: Path, url: str, **changes: Any) -> str:
    with pytest.raises((ValueError, RemoteError)) as caught:
        Index.open(url.replace("HOST", server.url), settings(tmp_path, **changes))
    return str(caught.value).replace(server.url, "HOST")


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("HOST/none", "HOST/none/index.json: there is no such file (404) (1 try). Check the address, and that it was "
         "uploaded. Remote shards are read by the index beside them: upload index.json and index.npy of the packed folder "
         "too. For tars made elsewhere, run `ssl-pack --index FOLDER` where they lie and upload both files."),
        ("HOST/skin/shard-000009.tar", "HOST/skin/shard-000009.tar: not in the index.json beside it; upload the index that "
         "lists it"),
        ("HOST/skin/*.tgz", "HOST/skin/*.tgz: no tar matches, or this server does not list its files; give the folder, or a "
         "range such as shard-{000000..000099}.tar"),
        ("HOST/skin/shard-{3..1}.tar", "{3..1}: the range ends before it begins"),
        ("https://***@host/x", "https://***@host/x: credentials are left out of messages and saved configurations; give "
         "the whole URL again (data.shards=...)"),
        ("pipe:cat x.tar", "pipe:cat x.tar: pipe: runs a command of this configuration in a shell, which is off; if you "
         "trust the configuration, set data.allow_pipe=true"),
        ("pip:cat x.tar", "pip:cat x.tar: no such file or folder; expected a folder of tars, a tar, or a pattern such as "
         "x/*.tar"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Server, tmp_path: Path, url: str, error: str) -> None:
    assert refusal(server, tmp_path, url) == error


def test_an_index_that_is_none(server: Server, tmp_path: Path) -> None:
    index = tmp_path / "served/skin/index.json"
    about = json.loads(index.read_text())
    index.write_text("<html>not here</html>")
    assert refusal(server, tmp_path, "HOST/skin").startswith("HOST/skin/index.json: cannot be read (Expecting value")
    for name, place in (("../../evil.tar", "shards.0.name: "), ("/evil.tar", "shards.0.name: "), (".room", "")):
        about["shards"][0]["name"] = name
        index.write_text(json.dumps(about))
        message = f"HOST/skin/index.json: {place}{name!r} is no name of a shard in this folder"
        assert refusal(server, tmp_path, "HOST/skin").startswith(message)
    assert not list(tmp_path.glob("**/evil.tar"))


def test_a_tar_that_is_not_the_indexed_one(server: Server, tmp_path: Path) -> None:
    with (tmp_path / "served/skin/shard-000000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        RemoteError, match=r"has 163844 bytes, and 163840 in its index.json: they are not of the same pack"
    ):
        ShardReader(skin(server, tmp_path), 4).read(0)
    assert server.gets["shard-000000.tar"] == 0


def test_given_twice(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this shard is given twice"):
        Index.open([f"{server.url}/skin", f"{server.url}/skin/shard-000000.tar"], settings(tmp_path))


def test_a_cache_that_is_too_small(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        f"data.shards={server.url}/skin",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert train([str(SMOKE), *overrides, "data.cache_gigabytes=0.0002"]) == 1
    assert capsys.readouterr().err.partition(" ERROR ")[2].strip() == (
        "data.cache_gigabytes 0.0002 is too small: a shuffle window of window_shards 2 and the next one, fetched meanwhile, "
        "need up to 0.000492 GB; set it to at least 0.000516, or lower window_shards"
    )


@pytest.mark.parametrize("windows", [2, 3])
def test_a_third_window_is_advised(
    server: Server, tmp_path: Path, windows: int, caplog: pytest.LogCaptureFixture
) -> None:
    remote = skin(server, tmp_path, cache_gigabytes=(windows * SHARD + 1) / 1e9).remote
    assert remote is not None
    remote.check_room([list(remote.sizes)], window_shards=1)
    said = "data.cache_gigabytes=0.000327681 holds two shuffle windows and not a third"
    assert (said in caplog.text) == (windows == 2) and (windows == 2 or not caplog.messages)


def test_a_cache_that_is_too_small_for_a_mixture(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two windows for each source and class, but nothing twice; shards on this disk need no room."""
    for name, labels in (("a", "xy"), ("b", "z")):
        (tmp_path / "served" / name).mkdir()
        for number in range(4):
            labelled_tar(tmp_path / "served" / name / f"{number}.tar", list(labels) * 2)
        Index.open(tmp_path / "served" / name)  # writes the index beside them
    (size,) = {path.stat().st_size for path in (tmp_path / "served/b").glob("*.tar")}
    (larger,) = {path.stat().st_size for path in (tmp_path / "served/a").glob("*.tar")}

    def said(gigabytes: float, *sources: str) -> str:
        overrides = [f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}", "data.window_shards=1"]
        text = SMOKE.read_text().replace("shards: ../../tests/data/skin_tiles, ", "")
        (tmp_path / "mixture.yaml").write_text(text)
        assert (
            train([str(tmp_path / "mixture.yaml"), *overrides, *sources, f"data.cache_gigabytes={gigabytes:.9f}"]) == 1
        )
        return capsys.readouterr().err.partition(" ERROR ")[2].strip()

    a, b = f"data.sources.a.shards={server.url}/a", f"data.sources.b.shards={server.url}/b"
    for needed, number, sources in (
        (2 * larger + 2 * size, 2, (a, b)),
        (4 * larger + 2 * size, 3, (a, b, "data.sources.a.balance=label")),
        (2 * larger, 2, (a, f"data.sources.b.shards={tmp_path / 'served/b'}")),
    ):
        refusal = said((needed - 1) / 1e9, *sources)
        assert f"and the next one, fetched meanwhile, for each of {number} sources and classes" in refusal
        assert f"need up to {needed / 1e9:.3g} GB; set it to at least {needed * 1.05 / 1e9:.3g}" in refusal
        assert "too small" not in said((needed + 1) / 1e9, *sources)


def test_a_cache_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refusal(server, tmp_path, "HOST/skin", cache_dir=tmp_path / "file/cache")
    assert said == f"data.cache_dir {tmp_path / 'file/cache'}: cannot be written (Not a directory); set another one"


def test_a_cache_that_fails_later_is_no_bad_sample(server: Server, tmp_path: Path) -> None:
    index = skin(server, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    reader = ShardReader(index, 4)
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"data.cache_dir .*cache: cannot be written \(File exists\)"):
            reader.read(0)
    (tmp_path / "cache").unlink()
    reader.read(0)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    with pytest.raises(
        RemoteError, match=r"shard-000002.tar: no copy can be kept in .*cache \(Not a directory\). Check"
    ):
        reader.read(99)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_a_command_that_is_allowed(tmp_path: Path) -> None:
    shard, runs = SKIN / "shard-000001.tar", tmp_path / "runs"
    index = Index.open(f"pipe:echo x >> {runs}; cat {shard}", settings(tmp_path, allow_pipe=True))
    reader, expected = ShardReader(index, 2), ShardReader(Index.open(shard), 2)
    assert len(index) == len(expected.index)
    assert all(reader.read(sample) == expected.read(sample) for sample in range(len(index)))
    assert np.array_equal(index.labels >= 0, expected.index.labels >= 0)
    assert runs.read_text() == "x\n", "once a run"
    Index.open(f"pipe:echo x >> {runs}; cat {shard}", settings(tmp_path, allow_pipe=True))
    assert runs.read_text() == "x\nx\n", "and again in the next, for nothing tells whether its output has changed"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("echo no luck >&2; exit 3", "the command ended with 3: no luck (2 tries)"),
        ("false | true", "the command ended with 1 (2 tries)"),
        ("echo begun; sleep 1000", "stalled: not a byte for 1 s (2 tries)"),
        ("echo password=hunter2 >&2; exit 3", "the command ended with 3: *** (2 tries)"),
    ],
)
def test_a_command_that_fails(tmp_path: Path, command: str, error: str) -> None:
    if command.startswith("false") and shutil.which("bash") is None:
        pytest.skip("sh cannot see that the first command of a pipe failed; bash is not installed")
    with pytest.raises(RemoteError) as caught:
        Index.open(
            f"pipe:{command}",
            settings(tmp_path, allow_pipe=True, retries=1, timeout_seconds=1 if "sleep" in command else 20),
        )
    assert error in str(caught.value) and "hunter2" not in str(caught.value)
    assert cached(tmp_path) == leftovers(tmp_path) == []
