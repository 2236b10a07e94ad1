"""The command as a user runs it: from an empty folder, stopped, killed, resumed, started twice, misconfigured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file

from ssl_platform.monitors import OF_THE_MACHINE, POOLED
from ssl_platform.recipe import load_recipe
from ssl_platform.train import main, train

SMOKE = Path(__file__).parents[1] / "configs" / "smoke" / "pathology.yaml"


def run(run_dir: Path, steps: int, *overrides: str) -> None:
    """Trains to `steps` of a run that is planned to take ten, as one that is cut off after them does."""
    recipe = load_recipe(SMOKE, [f"run_dir={run_dir}", "steps=10", "save_every=5", "log_every=1", *overrides])
    train(recipe, torch.device("cpu"))
    if steps < 10:
        for path in (run_dir / "checkpoints").glob("step_*"):
            if int(path.name[5:]) > steps:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()


def lines(run_dir: Path) -> list[dict[str, float]]:
    """Without what depends on the machine, and what pools steps: after a resume these are fewer."""
    text = (run_dir / "metrics.jsonl").read_text()
    left_out = (*OF_THE_MACHINE, *POOLED)
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(left_out)} for line in text.splitlines()]


def assert_equal(one: Path, two: Path, step: int) -> None:
    assert lines(one) == lines(two)
    assert [line["step"] for line in lines(one)] == list(range(1, step + 1))
    for name in ("model", "optimizer"):
        first, second = (load_file(path / f"checkpoints/step_{step:08d}/{name}.safetensors") for path in (one, two))
        assert first.keys() == second.keys()
        different = [key for key, value in first.items() if not torch.equal(value, second[key])]
        assert not different, different


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in one go, with drop path, masks, bf16 off, one epoch boundary inside (batch 8 x 10, see `batch_size`)."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, 10, "batch_size=16")
    return folder


@pytest.mark.parametrize("changes", [[], ["data.workers=2"]], ids=["same", "other worker count"])
def test_ten_steps_equal_five_resume_five(whole: Path, changes: list[str], tmp_path: Path) -> None:
    run(tmp_path, 5, "batch_size=16")
    run(tmp_path, 10, "batch_size=16", *changes)
    assert_equal(whole, tmp_path, 10)


def test_resume_with_accumulation(tmp_path: Path) -> None:
    run(tmp_path / "whole", 10, "accumulate=2")
    run(tmp_path / "halves", 5, "accumulate=2")
    run(tmp_path / "halves", 10, "accumulate=2", "data.workers=1")
    assert_equal(tmp_path / "whole", tmp_path / "halves", 10)


def test_a_broken_newest_checkpoint_costs_only_its_steps(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, 10, "batch_size=16")
    (tmp_path / "checkpoints/step_00000010/model.safetensors").write_bytes(b"cut off")
    run(tmp_path, 10, "batch_size=16")
    assert_equal(whole, tmp_path, 10)


def command(*arguments: str, cwd: Path | None = None, log: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts ssl-train; a run that says more than a pipe holds, 64 KiB, needs a file as its `log`."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SMOKE.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ssl_platform.train", str(SMOKE), *arguments],
        cwd=cwd,
        env=environment,
        stderr=log,
        text=True,
    )


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_killed_and_started_again_equals_undisturbed(number: int, tmp_path: Path) -> None:
    overrides = ["steps=60", "save_every=7", "log_every=1", "keep_last=20", "data.workers=1", "tensorboard=false"]
    undisturbed = command(f"run_dir={tmp_path / 'whole'}", *overrides)
    assert undisturbed.wait(120) == 0
    process = command(f"run_dir={tmp_path / 'killed'}", *overrides)
    wait_for_step(tmp_path / "killed", 10, process)
    process.send_signal(number)
    code = process.wait(60)
    stopped_at = len(lines(tmp_path / "killed"))
    assert stopped_at < 60, "the run was over before the signal came"
    if number == signal.SIGTERM:
        assert code == 0
        assert (tmp_path / f"killed/checkpoints/step_{stopped_at:08d}").is_dir(), "saved at the step it stopped at"
    again = command(f"run_dir={tmp_path / 'killed'}", *overrides)
    assert again.wait(120) == 0
    assert again.stderr is not None and "resuming" in again.stderr.read()
    assert_equal(tmp_path / "whole", tmp_path / "killed", 60)


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = command(f"run_dir={tmp_path}", "steps=100000", "log_every=1", "tensorboard=false")
    try:
        wait_for_step(tmp_path, 1, first)
        second = command(f"run_dir={tmp_path}")
        assert second.wait(60) == 1
        assert second.stderr is not None
        assert f"{tmp_path}: another run is training here" in second.stderr.read()
    finally:
        first.kill()
        first.wait(60)


def test_smoke_configuration_from_an_empty_folder(tmp_path: Path) -> None:
    process = command("run_dir=made/here", cwd=tmp_path)
    assert process.wait(120) == 0
    assert sorted(path.name for path in (tmp_path / "made/here/checkpoints").iterdir()) == [
        "step_00000010",
        "step_00000020",
    ]
    assert [line["step"] for line in lines(tmp_path / "made/here")] == [5, 10, 15, 20]
    saved = load_recipe(tmp_path / "made/here/config.yaml")
    assert saved.steps == 20 and saved.modality.name == "pathology"


def test_finished_run_started_again_changes_nothing(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}
    run(whole, 10, "batch_size=16")
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")} == before
    assert len(lines(whole)) == 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=8", "batch_size was 16 and is now 8"),
        ("seed=3", "seed was 0 and is now 3"),
        ("optim.name=sgd", "optim.name was adamw and is now sgd"),
        (
            "data.window_shards=1",
            "Set data.shards, data.sources and data.window_shards as they were, or start another run_dir",
        ),
        ("steps=9", "10 steps are done, more than steps=9"),
        ("heads.dino.num_prototypes=65", "was written by another configuration: heads.dino"),
    ],
)
def test_resuming_with_another_configuration_is_refused(
    whole: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"run_dir={whole}", "steps=20", "save_every=5", "batch_size=16", override]
    assert main([str(SMOKE), *overrides]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modality.channels=5"], "modality: the shards' statistics have 3 channels"),
        (["modality.context={size: 64}"], "the tile has 32 x 32 pixels, context.size needs 64 x 64"),
        (["data.shards=/none", "--estimate"], "data.shards: /none: no such file or folder"),
        (["modality.crops.global.num=1", "objectives.dino.student_groups=[global]"], "no pair of views is left"),
        (
            ["networks.teacher.backbone={name: vit, embed_dim: 32, depth: 3, num_heads: 2}"],
            "networks.teacher.backbone: update: ema needs the architecture of 'student', but",
        ),
        (
            ["networks.student.backbone={name: timm_models, model: resnet10t}"],
            "networks.teacher: 'student' has batch norm, whose running statistics this network would never learn",
        ),
        (
            ["networks.student.backbone={name: timm_models, model: vit_tiny_patch16_224}"],
            "timm models have no mask token: ibot, and masks of dino and koleo, need the backbone 'vit'",
        ),
    ],
)
def test_what_only_shows_while_it_is_built_or_run_is_an_error_in_words(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(SMOKE), f"run_dir={tmp_path}", "tensorboard=false", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error, error


def test_a_teacher_with_its_own_equal_backbone_starts_as_a_copy(tmp_path: Path) -> None:
    backbone = "{name: vit, embed_dim: 32, depth: 2, num_heads: 2, drop_path: 0.1, layer_scale: null}"
    changes = [f"networks.teacher.backbone={backbone}", "steps=1", "save_every=1", "tensorboard=false", "optim.lr=0.0"]
    assert main([str(SMOKE), f"run_dir={tmp_path}", *changes]) == 0
    saved = load_file(tmp_path / "checkpoints/step_00000001/model.safetensors")
    student = {key: value for key, value in saved.items() if key.startswith("networks.student.")}
    assert student
    for key, value in student.items():
        assert torch.equal(value, saved[key.replace("student", "teacher")]), key


def test_checkpoints_after_the_one_that_was_gone_back_to_do_not_count(whole: Path, tmp_path: Path) -> None:
    """They would be the last ones kept, and pruning would take every usable one."""
    run(tmp_path, 10, "batch_size=16", "keep_last=1", "keep_every=5")
    (tmp_path / "checkpoints/step_00000010/model.safetensors").write_bytes(b"cut off")
    run(tmp_path, 10, "batch_size=16", "keep_last=1", "save_every=1")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "damaged_step_00000010",
        "step_00000010",
    ]
    assert_equal(whole, tmp_path, 10)


def test_tiles_without_tissue_are_passed_over_and_are_no_bad_samples(tmp_path: Path) -> None:
    overrides = ["modality.min_tissue=0.9", "steps=20", "log_every=20", "data.max_bad_samples=0", "tensorboard=false"]
    assert main([str(SMOKE), f"run_dir={tmp_path}", *overrides]) == 0
    (line,) = lines(tmp_path)
    assert line["filtered_samples"] > 20 and line["replaced_samples"] == 0


def test_errors_of_users_are_one_line_each_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SMOKE), f"run_dir={tmp_path / 'a'}", f"data.shards={tmp_path / 'none'}"]) == 1
    error = capsys.readouterr().err
    assert "data.shards" in error and str(tmp_path / "none") in error and "Traceback" not in error
    assert main([str(SMOKE), "stepz=3"]) == 1
    assert "stepz: unknown key; did you mean 'steps'?" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_estimate_measures_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SMOKE), f"run_dir={tmp_path / 'none'}", "--estimate"]) == 0
    report = capsys.readouterr().out
    for word in ("trained parameters", "peak memory", "checkpoint", "samples seen", "160 = 20 steps x 8", "time"):
        assert word in report
    assert not (tmp_path / "none").exists()


def test_bad_samples_are_replaced_reported_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = tmp_path / "shards/0.tar"
    shard.parent.mkdir()
    source = SMOKE.parents[2] / "tests/data/skin_tiles/shard-000000.tar"
    content = bytearray(source.read_bytes())
    first = content.index(b"\x89PNG")
    content[first : first + 4] = b"none"
    shard.write_bytes(content)
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.shards={shard.parent}", "steps=10", "tensorboard=false"]
    assert main([str(SMOKE), *overrides]) == 0
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert all("0.tar" in event["sample"] and "not an image" in event["sample"] for event in events)
    assert {event["step"] for event in events} == {2, 5, 10}, "80 draws of 34 samples: once in each of three epochs"
    assert main([str(SMOKE), *overrides, f"run_dir={tmp_path / 'strict'}", "data.max_bad_samples=0"]) == 1
    assert "more than data.max_bad_samples=0" in capsys.readouterr().err
