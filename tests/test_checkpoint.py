"""Checkpoints: all or nothing, no pickle, and clear words about broken ones."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

from ssl_platform import checkpoint, tensor_files
from ssl_platform.checkpoint import CheckpointError, TrainState
from ssl_platform.log import cut_back, read_lines
from ssl_platform.run_lock import RunLocked, lock, locked
from ssl_platform.step import train_step
from tests import engine
from tests.ranks import run_ranks


def write(folder: Path, step: int) -> Path:
    state = TrainState(step=step, batch_size=4, accumulate=1, world_size=1, seed=0, counters={"skipped_steps": 2})
    tensors = {"a": torch.arange(1000.0), "b": torch.ones(3)}
    return checkpoint.save(folder, state, "steps: 1\n", tensors, {"a/exp_avg": torch.zeros(1000)})


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path.name == "step_00000007"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000007"], "nothing temporary is left"
    names = sorted(entry.name for entry in path.iterdir())
    assert names == [
        "config.yaml",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state = checkpoint.read_state(path)
    assert (state.step, state.counters) == (7, {"skipped_steps": 2})
    assert torch.equal(checkpoint.read_tensors(path, "model")["a"], torch.arange(1000.0))
    assert checkpoint.latest(tmp_path) == path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.yaml", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_falls_back_to_the_one_before_and_says_so(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write(tmp_path, 5), write(tmp_path, 10)
    file = bad / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-3] if damage == "truncated" else b"\x01" + content[1:])
    assert checkpoint.latest(tmp_path) == good
    assert "checkpoint passed over" in caplog.text and name in caplog.text


def test_only_broken_ones_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (write(tmp_path, 5) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used:\n.*model.safetensors: 0 bytes instead of"):
        checkpoint.latest(tmp_path)


def test_foreign_folders(tmp_path: Path) -> None:
    foreign = tmp_path / "step_00000003"
    foreign.mkdir()
    (foreign / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="not a checkpoint of format 1 or 2"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path / "nothing") is None
    (tmp_path / ".step_00000009.part").mkdir()  # what a killed save leaves
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000003"]


def test_saving_again_over_what_a_kill_left(tmp_path: Path) -> None:
    part = tmp_path / ".step_00000007.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    broken = write(tmp_path, 7)
    (broken / "state.json").unlink()
    checkpoint.verify(write(tmp_path, 7))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000007"]


def test_a_failed_save_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == good


def test_pruning(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2, keep_every=3)
    assert [int(path.name[5:]) for path in checkpoint.checkpoints(tmp_path)] == [3, 6, 7]


def test_another_configuration_is_named(tmp_path: Path) -> None:
    model = engine.model()
    tensors = model.state_dict()
    tensors["surplus"] = torch.zeros(1)
    del tensors["networks.student.cls_token"]
    tensors["networks.student.norm.weight"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(model, tensors, tmp_path)
    for words in ("missing networks.student.cls_token", "unexpected surplus", "norm.weight is (5,) instead of (16,)"):
        assert words in str(caught.value)


def test_optimizer_state_by_name(tmp_path: Path) -> None:
    first, second = engine.parts(), engine.parts()
    train_step(first, iter([engine.batch()]), 0, ["dino"])
    tensors = checkpoint.optimizer_tensors(first.optimizer)
    assert "networks.student.cls_token/exp_avg_sq" in tensors
    state = TrainState(step=1, batch_size=4, accumulate=1, world_size=1, seed=0)
    checkpoint.load_optimizer(second.optimizer, checkpoint.save(tmp_path, state, "", {}, tensors))
    again = checkpoint.optimizer_tensors(second.optimizer)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], value) for key, value in tensors.items())
    with pytest.raises(CheckpointError, match="parameters this configuration has not"):
        checkpoint.load_optimizer(
            second.optimizer, checkpoint.save(tmp_path, state, "", {}, {"other/exp_avg": torch.zeros(1)})
        )


def test_no_pickle_is_ever_written(tmp_path: Path) -> None:
    for path in write(tmp_path, 1).iterdir():
        assert path.suffix in {".yaml", ".json", ".safetensors"}


def test_metrics_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 7)) + '{"step": 7, "lo')
    cut_back(path, 4)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]


def take(folder: str) -> str:
    try:
        lock(Path(folder))
    except RunLocked as error:
        return str(error)
    return "taken"


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "deep" / "a"
    with pytest.raises(ValueError, match="refused"), locked(run_dir):
        assert (run_dir / "lock").exists()
        raise ValueError("refused")
    assert not any(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    with locked(run_dir):
        (run_dir / "config.yaml").touch()
    assert {path.name for path in run_dir.iterdir()} == {"lock", "config.yaml"}
    (run_dir / "config.yaml").unlink()
    with locked(run_dir):
        pass
    assert [path.name for path in run_dir.parent.iterdir()] == ["a"] and not any(run_dir.iterdir())


def test_lock_refuses_a_second_process_and_ends_with_the_first(tmp_path: Path) -> None:
    held = lock(tmp_path)
    [answer] = run_ranks(1, take, str(tmp_path))
    assert "another run is training here" in answer and str(os.getpid()) in answer
    held.close()
    assert run_ranks(1, take, str(tmp_path)) == ["taken"]


def test_pruning_also_takes_what_a_killed_run_left(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    for name in (".step_00000001.removed", ".step_00000005.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    checkpoint.prune(tmp_path, keep_last=1, keep_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004"]


def test_a_file_system_that_does_not_flush_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, fails = os.fsync, [errno.EINVAL]

    def without_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(fails[0], os.strerror(fails[0]))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", without_folders)
    checkpoint.verify(write(tmp_path, 7))
    fails[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path, 8)


def test_a_file_system_without_locks_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path):
        assert f"{tmp_path / 'lock'} cannot be locked (Function not implemented): nothing keeps a second" in caplog.text
