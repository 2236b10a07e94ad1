"""A full disk, a read-only one, signals and kills in a save, NaN or no memory on one rank: all go on, or end, as one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_platform import checkpoint, optim, tensor_files
from ssl_platform.log import Metrics, append_line, read_lines, unwritten
from ssl_platform.step import OutOfMemory, train_step
from ssl_platform.student_teacher import StudentTeacher
from ssl_platform.train import main
from ssl_platform.views import Batch
from tests import engine
from tests.test_launch_local import LIMIT, QUIET, ROOT, SMOKE, launched, lines, processes_of, run, trouble
from tests.test_resume import assert_equal, command, wait_for_step
from tests.trouble import Trouble

PATHOLOGY = ROOT / "configs" / "smoke" / "pathology.yaml"
IN_A_MOUNT = (
    'mount -t tmpfs -o size=16m tmpfs "$1" && cd "$2" && shift 2 && "$@"; code=$?; cp -r "$RUN" "$OUT"; exit $code'
)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.checkpoints(folder / "checkpoints")]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step_")]


# -- a failed save ---------------------------------------------------------------------------------------------------


def fail_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves of these steps fail half-way."""
    original = tensor_files.save_file

    def write(tensors: Any, path: Path) -> None:
        if int(path.parent.name[6:14]) in steps and path.name.startswith("optimizer"):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device", str(path))
        original(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", write)


def train(folder: Path, *changes: str) -> int:
    quiet = ["log_every=1", "tensorboard=false", "monitor_every=0", "save_every=2"]
    return main([str(PATHOLOGY), f"run_dir={folder}", *quiet, *changes])


def test_a_failed_save_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "whole", "steps=8") == 0
    fail_at({4, 6}, monkeypatch)
    assert train(tmp_path / "run", "steps=8", "keep_last=1") == 0
    assert_equal(tmp_path / "whole", tmp_path / "run", 8)
    assert steps(tmp_path / "run") == [8] and not leftovers(tmp_path / "run")
    said = capsys.readouterr().err
    file = tmp_path / "run/checkpoints/.step_00000004.part/optimizer.safetensors"
    assert f"the checkpoint of step 4 could not be written: rank 0: {file}: No space left on device" in said
    assert (
        "step_00000002 is the newest that is there. The run goes on and tries again at step 6 (failed 1 in a row"
        in said
    )
    assert "tries again at step 8 (failed 2 in a row, max_failed_saves=3)" in said and "Traceback" not in said
    found = events(tmp_path / "run", "save_failed")
    assert [event["saved_step"] for event in found] == [4, 6] and all(e["step"] in (4, 5, 6, 7, 8) for e in found)


def test_the_last_save_must_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        fail_at({4}, patch)
        assert train(tmp_path, "steps=4") == 1
    assert steps(tmp_path) == [2] and not leftovers(tmp_path)
    assert (
        "step 4: the checkpoint of step 4 could not be written: rank 0: " in (said := capsys.readouterr().err)
        and "step_00000002 is the newest that is there. Once that is mended, the same command goes on from there"
        in said
    )
    assert train(tmp_path, "steps=4") == 0 and steps(tmp_path) == [2, 4]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("limit", [0, 1])
def test_too_many_in_a_row_end_the_run(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at({2, 6, 8, 10}, monkeypatch)
    assert train(tmp_path, "steps=20", f"max_failed_saves={limit}") == 1
    failed = [event["saved_step"] for event in events(tmp_path, "save_failed")]
    assert failed == ([2] if limit == 0 else [2, 6, 8]) and steps(tmp_path) == ([] if limit == 0 else [4])
    said = capsys.readouterr().err
    assert f"({limit + 1} in a row, max_failed_saves={limit})" in said
    assert ("there is none yet" if limit == 0 else "step_00000004 is the newest that is there") in said


def test_lines_that_cannot_be_written_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "there" / "metrics.jsonl"
    metrics = Metrics(tmp_path, 0, tensorboard=False)
    metrics.path = path
    for step in (1, 2):
        metrics.write(step, {"loss": 1.0})
    assert caplog.text.count("metrics.jsonl cannot be written (No such file or directory): its lines are kept") == 1
    assert unwritten() == f"2 lines of {path}"
    path.parent.mkdir()
    metrics.write(3, {"loss": 1.0})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3] and not unwritten()
    metrics.path = tmp_path / "gone" / "metrics.jsonl"
    metrics.write(4, {"loss": 1.0})
    metrics.close()
    assert f"could not be written, and are lost: 1 lines of {metrics.path}" in caplog.text
    metrics.path.parent.mkdir()
    append_line(metrics.path, {})
    assert not unwritten()


def half_a_line_at_most(folder: str) -> list[bytes]:
    import resource

    path, found = Path(folder) / "a.jsonl", []
    append_line(path, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
    try:
        append_line(path, {"step": 2, "loss": 1.0})
        found.append(path.read_bytes())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    append_line(path, {"step": 3})
    return [*found, path.read_bytes()]


def test_no_half_line_stays_where_the_disk_ends(tmp_path: Path) -> None:
    first, second = half_a_line_at_most(str(tmp_path))
    assert first == b'{"step": 1}\n' and second == b'{"step": 1}\n{"step": 2, "loss": 1.0}\n{"step": 3}\n'


# -- real disks ------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    found = shutil.which("unshare")
    return found is not None and subprocess.run([found, "-rm", "true"], capture_output=True).returncode == 0


mounts = pytest.mark.skipif(not can_mount(), reason="needs `unshare -rm`: Linux with user namespaces")


def run_on_a_small_disk(folder: Path, kind: str, *more: str) -> tuple[int, str, Path]:
    """Two ranks whose run_dir is on a file system of 16 MB of its own; where what was left on it has been copied to."""
    disk, out = folder / "disk", folder / "out"
    disk.mkdir()
    spec = f"{{name: tests.trouble, kind: {kind}, rank: 0, step: 5, until: 9, folder: {disk}}}"
    arguments = [str(SMOKE), "processes=2", f"run_dir={disk}/run", f"objectives.trouble={spec}", *QUIET, *more]
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", IN_A_MOUNT, "sh", disk, ROOT, sys.executable, "-m", "launch.local", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RUN": f"{disk}/run", "OUT": str(out)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=250,
    )
    return ended.returncode, ended.stderr, out


@pytest.mark.slow
@mounts
def test_a_full_disk(tmp_path: Path) -> None:
    """From step 5 to 9: the saves of 6 and 8 fail, and so do the lines of metrics in between."""
    code, said, out = run_on_a_small_disk(tmp_path, "full disk", "steps=10", "save_every=2", "keep_last=2")
    assert code == 0, said
    for step in (6, 8):
        file = f"{tmp_path}/disk/run/checkpoints/.step_{step:08d}.part"
        assert f"the checkpoint of step {step} could not be written: rank 0: {file}" in said
    assert "No space left on device" in said and "Logging error" not in said and "Traceback" not in said
    assert steps(out) == [4, 10] and not leftovers(out), "nothing older went before a new one was there"
    for path in checkpoint.checkpoints(out / "checkpoints"):
        checkpoint.verify(path)
    assert [line["step"] for line in lines(out)] == list(range(1, 11)), "lines waited for room"
    assert [event["saved_step"] for event in events(out, "save_failed")] == [6, 8]


@mounts
@pytest.mark.slow
def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "disk/run/checkpoints"
    more = ["steps=10", "save_every=2", f"objectives.trouble.folder={folder}"]
    code, said, out = run_on_a_small_disk(tmp_path, "read only", *more)
    assert code == 0, said
    for step in (6, 8):
        reason = f"rank 0: {folder}/.step_{step:08d}.part: Read-only file system"
        assert f"the checkpoint of step {step} could not be written: {reason}; step_00000004 is the newest" in said
    assert "Traceback" not in said and steps(out) == [2, 4, 10] and not leftovers(out)
    assert [line["step"] for line in lines(out)] == list(range(1, 11))


@mounts
@pytest.mark.slow
def test_a_disk_that_stays_full_ends_every_rank_with_exit_code_1(tmp_path: Path) -> None:
    more = ["steps=20", "save_every=2", "max_failed_saves=1", "objectives.trouble.until=100", "tensorboard=true"]
    code, said, out = run_on_a_small_disk(tmp_path, "full disk", *more)
    assert code == 1 and "(2 in a row, max_failed_saves=1); step_00000004 is the newest that is there" in said, said
    assert steps(out) == [2, 4] and not leftovers(out)
    assert said.count("the checkpoint of step 8 could not be written") == 2, (
        "by rank 0, and in the launcher's last line"
    )
    assert "lines of" in said and "are lost" in said


@pytest.mark.slow
def test_files_that_may_not_be_large(tmp_path: Path) -> None:
    more = ["steps=8", "save_every=2", "objectives.trouble.rank=0", "objectives.trouble.until=7"]
    code, said = trouble(tmp_path, "small files", *more)
    assert code == 0 and ": File too large" in said, said
    assert steps(tmp_path) == [2, 8] and [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


# -- signals and kills during a save ---------------------------------------------------------------------------------


def wait_for_part(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not any((folder / "checkpoints").glob(".step_*.part/*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)


def test_a_signal_while_it_is_written_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.write

    def write(path: Path, tensors: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write", write)
    assert train(tmp_path, "steps=1000") == 0
    stopped = lines(tmp_path)[-1]["step"]
    assert stopped < 1000 and steps(tmp_path) == sorted({2, stopped}) and not leftovers(tmp_path)


@pytest.mark.slow
def test_a_signal_while_it_is_written_by_two(tmp_path: Path) -> None:
    spec = "objectives.trouble={name: tests.trouble, kind: slow save, rank: 0, step: 1}"
    arguments = [str(SMOKE), "processes=2", f"run_dir={tmp_path}", "save_every=3", spec, *QUIET]
    with launched(*arguments, "steps=100000") as process:
        wait_for_part(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    stopped = lines(tmp_path)[-1]["step"]
    assert steps(tmp_path)[-1] == stopped and not leftovers(tmp_path) and not processes_of(tmp_path)
    for path in checkpoint.checkpoints(tmp_path / "checkpoints"):
        checkpoint.verify(path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_it_writes(rank: int, tmp_path: Path) -> None:
    """Rank 1 writes nothing under DDP: it is killed by the next step instead."""
    kind = "kill while saving" if rank == 0 else "kill"
    more = ["steps=9", "save_every=3", f"objectives.trouble.rank={rank}", "objectives.trouble.step=6"]
    code, said = trouble(tmp_path, kind, *more)
    assert code == 128 + signal.SIGKILL and not processes_of(tmp_path), said
    assert steps(tmp_path) == [3], "the older one is there, the new one is not"
    code, said = run(str(SMOKE), "processes=2", f"run_dir={tmp_path}", "steps=9", "save_every=3", *QUIET)
    assert (code == 1 and "was written by another configuration" in said) or code == 0, said


@pytest.mark.slow
def test_a_rank_that_is_killed_while_rank_0_writes_loses_nothing(tmp_path: Path) -> None:
    """The save of step 6 takes more than a second; rank 1 is gone in step 7."""
    slow = "objectives.slow={name: tests.trouble, kind: slow save, rank: 0, step: 6}"
    code, said = trouble(tmp_path, "kill", "steps=9", "save_every=3", "objectives.trouble.step=7", slow)
    assert code == 128 + signal.SIGKILL and not processes_of(tmp_path), said
    assert steps(tmp_path) == [3, 6] and not leftovers(tmp_path)
    checkpoint.verify(tmp_path / "checkpoints/step_00000006")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_between_any_two_moments_of_a_save(tmp_path: Path) -> None:
    """One process that is killed while a slow save is in flight, again and again, equals an undisturbed one."""
    spec = "objectives.trouble={name: tests.trouble, kind: slow save, rank: 0, step: 1}"
    overrides = ["steps=30", "save_every=5", "log_every=1", "keep_last=9", "tensorboard=false", spec]
    assert command(f"run_dir={tmp_path / 'whole'}", *overrides, log=subprocess.DEVNULL).wait(120) == 0
    folder, kills = tmp_path / "killed", 0
    for pause in (0.0, 0.3, 0.8, 1.2, 1.5):
        process = command(f"run_dir={folder}", *overrides, log=subprocess.DEVNULL)
        try:
            wait_for_part(folder, process) if not steps(folder) else wait_for_step(
                folder, steps(folder)[-1] + 6, process
            )
            time.sleep(pause)
        except AssertionError:
            assert process.wait(60) == 0
            break
        process.kill()
        process.wait(60)
        kills += 1
    assert kills >= 3
    assert command(f"run_dir={folder}", *overrides, log=subprocess.DEVNULL).wait(120) == 0
    assert_equal(tmp_path / "whole", folder, 30)
    assert not leftovers(folder)


# -- one rank --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nan_on_one_rank_is_skipped_by_all_and_named(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "nan", "steps=4", "save_every=2")
    assert code == 0, said
    (event,) = events(tmp_path, "not_finite")
    assert event["step"] == 3 and list(event["keys_by_rank"]) == ["1"] and len(event["keys_by_rank"]["1"]) == 4
    assert f"step 3 skipped: loss or gradients not finite; keys by rank: {{1: {event['keys_by_rank']['1']}}}" in said
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [0, 0, 1, 1]
    weights = checkpoint.read_tensors(tmp_path / "checkpoints/step_00000004", "model")
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


@pytest.mark.slow
def test_out_of_memory_on_one_rank(tmp_path: Path) -> None:
    code, said = trouble(tmp_path, "out of memory", "save_every=2", "steps=9")
    assert code == 1 and "Traceback" not in said, said
    (event,) = events(tmp_path, "out_of_memory")
    keys = event["keys_by_rank"]["1"]
    assert event["step"] == 3 and len(keys) == 4
    last = said.splitlines()[-1]
    assert "rank 1 failed: exit code 1; last error: step 3: rank 1 is out of memory: " in last
    assert "Try accumulate=2 (the same batch_size in smaller pieces), precision=bf16" in last
    assert keys[0] not in (tmp_path / "logs/rank-1.log").read_text()
    assert steps(tmp_path) == [2] and not processes_of(tmp_path), "the save in flight was finished"


def test_out_of_memory_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trouble, "begin", no_memory_on_cuda)
    spec = "objectives.trouble={name: tests.trouble, kind: out of memory, rank: 0}"
    assert train(tmp_path, "steps=9", spec) == 1
    said = capsys.readouterr().err
    assert (
        "step 3: rank 0 is out of memory: CUDA out of memory. Tried to allocate 20 GiB. The keys of its 8 samples"
        in said
    )
    (event,) = events(tmp_path, "out_of_memory")
    assert f"keys of rank 0: {event['keys_by_rank']['0']}" in said and "Traceback" not in said
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("place", ["the batch", "clipping", "the average"])
def test_out_of_memory_anywhere_in_a_step_names_the_samples(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = engine.parts()
    owner, name = {
        "the batch": (Batch, "to"),
        "clipping": (optim, "clip_gradients"),
        "the average": (StudentTeacher, "update"),
    }[place]
    monkeypatch.setattr(owner, name, lambda *_: no_memory_on_cuda(None))
    with pytest.raises(OutOfMemory, match="CUDA out of memory. Tried to allocate 20 GiB") as caught:
        train_step(parts, iter([engine.batch()]), 0, ["dino"])
    assert caught.value.keys == engine.batch().keys


def no_memory_on_cuda(_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nOf the allocated memory ...")
