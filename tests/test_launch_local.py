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
from pathlib import Path
from typing import Any

import pytest

from launch import local
from tests.test_resume import wait_for_step

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke" / "image.yaml"
QUIET = ["log_every=1", "tensorboard=false", "monitor_every=0", "data.window_shards=3"]
LIMIT = 100


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


ALIKE = ["steps=3", "save_every=3", "objectives.koleo.scope=global", "networks.student.backbone.drop_path=0.0"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    code, said = run(str(SMOKE), "processes=1", f"run_dir={folder}", *QUIET, *ALIKE)
    assert code == 0, said
    return lines(folder)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_equal_those_of_one_process(processes: int, alone: list[dict[str, Any]], tmp_path: Path) -> None:
    code, said = run(str(SMOKE), f"processes={processes}", f"run_dir={tmp_path}", *QUIET, *ALIKE)
    assert code == 0 and f"{processes} ranks on cpu" in said
    first = lines(tmp_path)[0]
    names = ["loss", "dino_global", "dino_local", "ibot", "koleo"]
    assert [first[name] for name in names] == pytest.approx([alone[0][name] for name in names], rel=1e-5)
    assert "slowest_rank" not in alone[0] and 0 <= first["slowest_rank"] < processes
    logs = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert logs == [f"rank-{rank}.log" for rank in range(processes)]
    assert "step 3/3" in (tmp_path / "logs" / f"rank-{processes - 1}.log").read_text()
    assert said.count("step 3/3") == 1, "rank 0 alone is on the terminal"


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="TERM"),
        pytest.param(signal.SIGUSR1, id="USR1", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(number: int, tmp_path: Path) -> None:
    arguments = [str(SMOKE), "processes=2", f"run_dir={tmp_path}", *QUIET, "save_every=1000"]
    with launched(*arguments, "steps=100000") as process:
        wait_for_step(tmp_path, 3, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and f"stopped by {signal.Signals(number).name} after step" in said
    stopped = lines(tmp_path)[-1]["step"]
    assert (tmp_path / f"checkpoints/step_{stopped:08d}").is_dir() and not processes_of(tmp_path)
    if number == signal.SIGTERM:
        code, said = run(*arguments, f"steps={stopped + 1}")
        assert code == 0 and f"after step {stopped}" in said
        assert [line["step"] for line in lines(tmp_path)] == list(range(1, stopped + 2))
        assert (tmp_path / "logs/rank-1.log").read_text().count("rank 1 of 2, process") == 2, "appended"


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
    assert "step 3" in (text := (tmp_path / "logs/rank-1.log").read_text()) and "rank 0, which holds" in text


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "hang", "collective_timeout_minutes=0.05")
    assert code == local.LEFT_BEHIND
    assert "rank 1 did not arrive: it is at step 3, the forward pass" in said, said
    assert "in begin" in (tmp_path / "logs/rank-1.log").read_text(), "the stack says where it hangs"
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_a_rank_that_is_paused(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "pause", "collective_timeout_minutes=0.05")
    assert code == local.LEFT_BEHIND
    assert "no sign of life from rank 1, last seen at step" in said.splitlines()[-1]
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_one_of_four_ranks_runs_out_of_memory(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "out of memory", "objectives.trouble.rank=2", processes=4)
    assert code == 1 and "rank 2 failed: exit code 1; last error: RuntimeError" in said.splitlines()[-1]


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


def test_ranks_that_do_not_come_are_told(tmp_path: Path) -> None:
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    arguments = [str(SMOKE), f"run_dir={tmp_path / 'a'}", "collective_timeout_minutes=0.02"]
    with launched(*arguments, program="ssl_platform.train", MASTER_PORT="0", **ranks) as process:
        _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and "rank 0 of 2 does not meet the others at 127.0.0.1:0" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["c.yaml", "gpus=2", "processes=2"], "choose one"),
        (["c.yaml", "gpus=x"], "gpus=x: expected a whole number from 1"),
        (["c.yaml", "processes=0"], "processes=0: expected a whole number from 1"),
        (["c.yaml", "gpus=1000"], "gpus=1000: torch finds"),
    ],
)
def test_bad_arguments(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(arguments) == 2
    assert expected in capsys.readouterr().err


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
