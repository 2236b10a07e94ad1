"""A run of two ranks on this machine, started as a user starts it: its result, its signals, and its ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import local
from ssl_platform import distributed, peers
from ssl_platform.train import main
from tests.test_resume import wait_for_step

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke" / "image.yaml"
QUIET = ["log_every=1", "tensorboard=false", "monitor_every=0", "data.window_shards=3"]
LIMIT = 200


@contextmanager
def launched(*arguments: str, program: str = "launch.local", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is over when the test is; its stderr is a pipe."""
    process = subprocess.Popen(
        [sys.executable, "-m", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT)


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    with launched(*arguments, **environment) as process:
        _, said = process.communicate(timeout=LIMIT)
        return process.returncode, said


def trouble(folder: Path, kind: str, *more: str, processes: int = 2) -> tuple[int, str]:
    spec = f"objectives.trouble={{name: tests.trouble, kind: {kind}}}"
    return run(str(SMOKE), f"processes={processes}", f"run_dir={folder}", spec, *QUIET, *more)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def processes_of(folder: Path) -> list[int]:
    """Everything that runs for `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and f"run_dir={folder}".encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has just ended
            pass
    return found


def wait_until_gone(folder: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while left := processes_of(folder):
        assert time.monotonic() < deadline, f"{left} still run"
        time.sleep(0.05)


ALIKE = ["objectives.koleo.scope=global", "networks.student.backbone.drop_path=0.0"]


@pytest.mark.parametrize(
    ("processes", "number"),
    [
        pytest.param(2, signal.SIGTERM, id="2, TERM"),
        pytest.param(4, signal.SIGUSR1, id="4, USR1", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, id="2, Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_losses_equal_those_of_one_process_and_a_signal_saves(processes: int, number: int, tmp_path: Path) -> None:
    assert main([str(SMOKE), f"run_dir={tmp_path / 'alone'}", *QUIET, *ALIKE, "steps=1"]) == 0
    alone, folder = lines(tmp_path / "alone")[0], tmp_path / "a"
    arguments = [str(SMOKE), f"processes={processes}", f"run_dir={folder}", *QUIET, *ALIKE, "save_every=1000"]
    with launched(*arguments, "steps=100000") as process:
        wait_for_step(folder, 3, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and f"stopped by {signal.Signals(number).name} after step" in said, said
    assert f"{processes} ranks on cpu" in said and said.count("step 3/") == 1, "rank 0 alone is on the terminal"
    first, stopped = lines(folder)[0], lines(folder)[-1]["step"]
    names = ["loss", "dino_global", "dino_local", "ibot", "koleo"]
    assert [first[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-5)
    assert "slowest_rank" not in alone and 0 <= first["slowest_rank"] < processes
    logs = sorted(path.name for path in (folder / "logs").iterdir())
    assert logs == [f"rank-{rank}.log" for rank in range(processes)]
    assert f"step {stopped}/" in (folder / "logs" / f"rank-{processes - 1}.log").read_text()
    assert (folder / f"checkpoints/step_{stopped:08d}").is_dir() and not processes_of(folder)
    if number == signal.SIGINT:
        code, said = run(*arguments, f"steps={stopped + 1}")
        assert code == 0 and f"after step {stopped}" in said
        assert [line["step"] for line in lines(folder)] == list(range(1, stopped + 2))
        assert (folder / "logs/rank-1.log").read_text().count("rank 1 of 2, process") == 2, "appended"


@pytest.mark.slow
def test_a_second_interrupt_ends_ranks_that_hang(tmp_path: Path) -> None:
    spec = "objectives.trouble={name: tests.trouble, kind: hang}"
    with launched(str(SMOKE), "processes=2", f"run_dir={tmp_path}", *QUIET, spec) as process:
        wait_for_step(tmp_path, 2, process)
        time.sleep(1)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "ended by a second Ctrl-C" in said.splitlines()[-1], said
    assert "Traceback" not in said and not processes_of(tmp_path)


def test_a_rank_that_raises_is_named_with_its_error_and_log(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "raise")
    assert code == 1
    log = tmp_path / "logs/rank-1.log"
    expected = f"rank 1 failed: exit code 1; last error: ValueError: told to raise; log: {log}"
    assert said.splitlines()[-1] == f"launch.local: {expected}"
    assert re.search(
        r"step 3, the .*: rank 0 (lost its connection|was left behind); rank 1 ended at step 3.*: told to", said
    )
    assert "Traceback" not in said and "gloo" not in said
    assert "Traceback" in log.read_text() and not processes_of(tmp_path)


def test_an_error_of_an_earlier_part_of_the_run_is_not_told_again(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    log.write_text("x INFO rank 1 of 2, process 12\n2026 ERROR old\nx INFO rank 1 of 2, process 345\nx INFO new\n")
    assert local.own_lines(log, 345) == ["x INFO rank 1 of 2, process 345", "x INFO new"]
    assert local.own_lines(log, 45) == [] == local.own_lines(tmp_path / "none", 345)


@pytest.mark.slow
def test_ranks_end_with_rank_zero_before_the_network_tells_them(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "raise", "objectives.trouble.rank=0")
    assert code == 1 and "rank 0 failed: exit code 1; last error: ValueError: told to raise" in said.splitlines()[-1]
    last = (tmp_path / "logs/rank-1.log").read_text()
    assert re.search(r"step 3, .*: rank 1 was left behind; rank 0 ended at step 3, .*: told to raise", last)


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "kill")
    assert code == 128 + signal.SIGKILL
    assert "rank 1 failed: killed by SIGKILL: out of memory?" in said.splitlines()[-1]
    assert re.search(
        r"step 3, the .*: rank 0 lost its connection; no sign of life from rank 1, last seen at step", said
    )
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_the_rank_that_holds_the_rendezvous_is_killed(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "kill", "objectives.trouble.rank=0")
    assert code == 128 + signal.SIGKILL and "rank 0 failed: killed by SIGKILL" in said.splitlines()[-1]
    last = (tmp_path / "logs/rank-1.log").read_text()
    assert re.search(
        r"step 3, .*rank 0, which holds the rendezvous, is gone, last seen at step \d, .*: killed, or", last
    )


@pytest.mark.slow
def test_a_rank_that_hangs(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "hang", "collective_timeout_minutes=0.1")
    assert code == 1 and re.search(r"rank 1 (did not arrive: it is|ended) at step 3, the forward pass", said), said
    assert "rank 1 failed: exit code 1; last error: step 3, the forward pass: rank 1 is here" in said.splitlines()[-1]
    assert "in begin" in (tmp_path / "logs/rank-1.log").read_text(), "the stack says where it hangs"
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_a_rank_that_is_paused(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "pause", "collective_timeout_minutes=0.1")
    assert code == local.LEFT_BEHIND
    assert "no sign of life from rank 1, last seen at step" in said.splitlines()[-1]
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_one_of_four_ranks_runs_out_of_memory(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "out of memory", "objectives.trouble.rank=2", processes=4)
    assert (
        code == 1
        and "rank 2 failed: exit code 1; last error: step 3: rank 2 is out of memory: " in said.splitlines()[-1]
    )


@pytest.mark.slow
def test_a_slow_rank_is_told_in_words(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "slow", "steps=6", "log_every=1")
    assert code == 0
    assert {line["slowest_rank"] for line in lines(tmp_path)[1:]} == {1}
    assert min(line["slowest_rank_ratio"] for line in lines(tmp_path)[1:]) > 1.3
    assert "one rank is slower than the others (rank 1): it takes" in said


@pytest.mark.slow
def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    arguments = [str(SMOKE), "processes=2", f"run_dir={tmp_path}", "steps=100000", "data.workers=1", *QUIET]
    with launched(*arguments) as process:
        wait_for_step(tmp_path, 1, process)
        assert len(processes_of(tmp_path)) >= 3
        process.kill()
    wait_until_gone(tmp_path)


@pytest.mark.slow
def test_errors_of_a_configuration_are_told_once(tmp_path: Path) -> None:
    code, said = run(str(SMOKE), "processes=2", f"run_dir={tmp_path / 'a'}", "optim.lrr=1")
    assert code == 1 and said.count("optim.lrr: unknown key; did you mean 'lr'?") == 1
    assert "Traceback" not in said and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_two_runs_at_a_time(tmp_path: Path) -> None:
    arguments = [str(SMOKE), "processes=2", "steps=2", *QUIET]
    with (
        launched(*arguments, f"run_dir={tmp_path / 'a'}") as one,
        launched(*arguments, f"run_dir={tmp_path / 'b'}") as two,
    ):
        for process in (one, two):
            said = process.communicate(timeout=LIMIT)[1]
            assert process.returncode == 0 and "2 ranks" in said, said


@pytest.mark.slow
def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with launched(
            str(SMOKE), f"run_dir={tmp_path / 'a'}", program="ssl_platform.train", MASTER_PORT=port, **ranks
        ) as process:
            _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and f"127.0.0.1:{port}: the port is in use; set MASTER_PORT" in said
    assert "Traceback" not in said


RANKS = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "rank 0 of 2 does not meet the others at 127.0.0.1:0"),
        ({"RANK": None, "MASTER_PORT": None}, "WORLD_SIZE=2 is set, but RANK, MASTER_PORT not: start with torchrun or"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2: ranks count from 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number from 1"),
    ],
    ids=["alone", "not all set", "too many", "no number"],
)
def test_ranks_that_cannot_meet_are_told(
    changes: dict[str, str | None], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "START_MINUTES", 0.0)
    for name, value in (RANKS | changes).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert main([str(SMOKE), "--estimate", "collective_timeout_minutes=0.02"]) == 1
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["c.yaml", "gpus=2", "processes=2"], "choose one"),
        (["c.yaml", "gpus=x"], "gpus=x: expected a whole number from 1"),
        (["c.yaml", "processes=0"], "processes=0: expected a whole number from 1"),
        (["c.yaml", "gpus=1000"], "gpus=1000: torch finds"),
        (["c.yaml", "--estimate", "gpus=1000"], "`ssl-train CONFIG --estimate gpus=N`, without a launcher"),
        (["processes=2"], "usage: python -m launch.local CONFIG"),
        ([], "usage: python -m launch.local CONFIG"),
    ],
)
def test_bad_arguments(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "num_gpus", lambda: 0)
    assert local.main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "received", "expected"),
    [
        (-signal.SIGKILL, [], "rank 1 failed: killed by SIGKILL: out of memory?"),
        (-signal.SIGTERM, [signal.SIGTERM], "stopped by SIGTERM before training began"),
        (130, [signal.SIGINT], "stopped by SIGINT before training began"),
        (130, [], "rank 1 failed: exit code 130; it had no log yet"),
        (local.LEFT_BEHIND, [], "rank 1 failed: ended because of another rank"),
    ],
)
def test_the_last_line(code: int, received: list[int], expected: str, tmp_path: Path) -> None:
    rank = local.Rank(1, [sys.executable, "-c", ""], dict(os.environ))
    rank.process.wait()
    rank.process.returncode = code
    assert local.epitaph(rank, tmp_path, received).startswith(expected)


def test_an_interrupt_outside_of_a_step_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssl_platform.train.open_index", interrupted)
    assert main([str(SMOKE), f"run_dir={tmp_path}"]) == 130
    assert "interrupted: the steps since the last checkpoint are lost" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_told_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    assert main([str(SMOKE), f"run_dir={tmp_path}", "steps=1", "tensorboard=false"]) == 0
    assert f"rank 0 goes on without a log of its own: {tmp_path / 'logs/rank-0.log'}" in capsys.readouterr().err


def three_ranks(store: Any, seconds: float = 60) -> list[peers._Watch]:
    """Of one process, at the forward pass of step 3; their threads have ended."""
    watches = []
    for rank in range(3):
        here = peers._Process()
        here.place = peers.Place(5, 3, "the forward pass", time.monotonic(), True)
        watches.append(peers._Watch(here, store, rank, 3, seconds, lambda text: None))
        watches[-1].over.set()
    return watches


def test_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(peers, "SILENT_SECONDS", 0.01)
    zero, one, two = three_ranks(dist.HashStore())
    assert "no sign of life from rank 1, last seen at step 3, the forward pass, for 0 s, rank 2, last" in zero.missing()
    monkeypatch.setattr(zero, "beat", lambda: [watch.__class__.beat(watch) for watch in (zero, one, two)])
    assert "every rank is alive and at the same place" in zero.missing()
    zero.here.place = zero.here.place._replace(number=6, doing="the backward pass")
    two.here.place = two.here.place._replace(number=6, doing="the backward pass")
    text = (
        "step 3, the backward pass: rank 0 waited in vain for 0 s (collective_timeout_minutes=1); rank 1 did not arrive"
    )
    assert zero.account("timed out").startswith(text) and not zero.late
    monkeypatch.setattr(one, "beat", zero.beat)
    assert "rank 1 is here for 0 s" in one.account("timed out") and one.late
    one.tell_others("it hung there")
    assert two.account("left behind").endswith(
        "was left behind; rank 1 ended at step 3, the forward pass: it hung there"
    )


def test_an_error_is_told_even_when_the_rendezvous_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def set(self, *_: object) -> None:
            raise RuntimeError("the store is gone")

        check = get = set

    watch = three_ranks(dist.HashStore())[1]
    watch.store, watch.holder = Gone(), [9, 5, 3, "the forward pass", 0.2]
    monkeypatch.setattr(peers._here, "watch", watch)
    assert peers.ends_with(ValueError("mine")) == ""
    gone = "rank 0, which holds the rendezvous, is gone, last seen at step 3, the forward pass, for 0 s: killed, or"
    assert gone in peers.ends_with(RuntimeError("gloo: Connection closed by peer"))


def test_nccl_ends_no_process_before_it_is_told_why() -> None:
    """The watch looks twice a second, asks the others for two seconds, and rank 0 stays for four more."""
    minutes = timedelta(minutes=10)
    margin = distributed._of_collectives(torch.device("cuda", 0), minutes) - minutes
    assert margin.total_seconds() > 2 * (2 * peers.BEAT_SECONDS + 3 * peers.SILENT_SECONDS)
    assert distributed._of_collectives(torch.device("cpu"), minutes) == minutes


def test_threads_and_ranks_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    found = local.environments(5, True, 1234)
    assert [one["RANK"] for one in found] == [one["LOCAL_RANK"] for one in found] == list("01234")
    assert found[0]["OMP_NUM_THREADS"] == "2" and found[0]["CUDA_VISIBLE_DEVICES"] == ""
    assert "TORCHELASTIC_USE_AGENT_STORE" not in found[0] and found[0]["MASTER_PORT"] == "1234"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.environments(5, False, 1)[0]["OMP_NUM_THREADS"] == "3"
