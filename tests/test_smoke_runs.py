"""What every modality's smoke configuration promises: every weight learns, runs resume bit by bit, two ranks equal one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssl_platform import distributed
from ssl_platform.config import plugin_names
from ssl_platform.monitors import OF_THE_MACHINE, POOLED
from ssl_platform.recipe import load_recipe
from ssl_platform.train import train
from tests.ranks import run_ranks

SMOKE = Path(__file__).parents[1] / "configs" / "smoke"


@pytest.fixture(params=plugin_names("ssl_platform.modalities"))
def config(request: pytest.FixtureRequest) -> str:
    assert (SMOKE / f"{request.param}.yaml").is_file(), f"the modality '{request.param}' needs configs/smoke/NAME.yaml"
    return str(request.param)


def trained(config: str, run_dir: str, steps: int, *overrides: str) -> None:
    given = [f"run_dir={run_dir}", f"steps={steps}", "save_every=1", "keep_last=9", "log_every=1", "tensorboard=false"]
    recipe = load_recipe(SMOKE / f"{config}.yaml", [*given, *overrides], distributed.world_size())
    train(recipe, torch.device("cpu"))


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/step_{step:08d}/model.safetensors")


def losses(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    left_out = (*OF_THE_MACHINE, *POOLED)
    return [{key: value for key, value in line.items() if not key.endswith(left_out)} for line in lines]


def assert_same_losses(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for key in (key for key in other if "loss" in key):
            assert mine[key] == pytest.approx(other[key], rel=1e-5), (other["step"], key)


def test_a_step_moves_every_weight_that_is_trained(config: str, tmp_path: Path) -> None:
    """The second of a run: in the first, views of what is not masked may leave the mask token where it is."""
    trained(config, str(tmp_path), 2, "optim.freeze_last_layer_steps=0", "optim.lr=0.01", "optim.weight_decay=0")
    before, after = weights(tmp_path, 1), weights(tmp_path, 2)
    student = [key for key in before if key.startswith("networks.student.")]
    still = [key for key in student if torch.equal(before[key], after[key])]
    assert len(student) > 10 and not still


def test_a_run_that_is_resumed_equals_one_in_one_go(config: str, tmp_path: Path) -> None:
    trained(config, str(tmp_path / "whole"), 4)
    trained(config, str(tmp_path / "halves"), 4)
    for step in (3, 4):
        for file in (tmp_path / f"halves/checkpoints/step_{step:08d}").iterdir():
            file.unlink()
        (tmp_path / f"halves/checkpoints/step_{step:08d}").rmdir()
    trained(config, str(tmp_path / "halves"), 4, "data.workers=1")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "halves", 4), weights(tmp_path / "whole", 4)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_two_ranks_equal_one(config: str, tmp_path: Path) -> None:
    # Draws of drop path differ between numbers of ranks, and so do neighbours of a rank's own samples.
    same = ["networks.student.backbone.drop_path=0", "objectives.koleo.scope=global", "optim.name=sgd"]
    trained(config, str(tmp_path / "one"), 3, *same)
    run_ranks(2, trained, config, str(tmp_path / "two"), 3, *same, timeout=200)
    assert_same_losses(losses(tmp_path / "two"), losses(tmp_path / "one"))
