"""The recipes for spectrograms: their commands are as written, their figures are ASiT's or say why not, and they train."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssl_platform.estimate import calculate, memories, way_of
from ssl_platform.recipe import Recipe, build_networks
from ssl_platform.train import main
from tests.test_recipes import CONFIGS, ROOT, check_head, command, line_of, loaded, setting, world_size

RECIPES = sorted(CONFIGS.glob("spectrogram_*.yaml"))
DATA = ROOT / "tests/data/sonic_pi"
ASIT = {
    # arXiv 2211.13189 and github.com/Sara-Ahmed/ASiT; an epoch of 2 million clips is 3,906 steps of 512.
    "steps": 390_000,
    "batch_size": 128,
    "accumulate": 1,
    "optim.lr": {"schedule": "cosine", "start": 5e-4, "end": 1e-6, "warmup_steps": 39_000},
    "optim.scale_lr": "linear256",
    "optim.weight_decay": {"schedule": "cosine", "start": 0.04, "end": 0.4, "warmup_steps": 0},
    "optim.clip_grad": 3.0,
    "networks.teacher.momentum": {"schedule": "cosine", "start": 0.996, "end": 1.0, "warmup_steps": 0},
    "networks.student.backbone.embed_dim": 768,
    "networks.student.backbone.depth": 12,
    "networks.student.backbone.drop_path": 0.1,
    "networks.student.backbone.layer_scale": None,
    "heads.dino.num_prototypes": 8192,
    "objectives.dino.student_groups": ("corrupted",),
    "objectives.dino.pairs": "other",
    "objectives.dino.student_temp": 0.1,
    "objectives.dino.center_momentum": 0.9,
    "objectives.dino.masks": {},
    "modality.sample_rate": 32_000,
    "modality.fbank.num_bins": 128,
    "modality.fbank.window": "hanning",
    "modality.patch_size": 16,
    "modality.normalization.mean": -4.2677393,
    "modality.normalization.std_factor": 2.0,
    "modality.crops.global.num": 2,
    "modality.crops.global.num_frames": 592,
    "modality.crops.local.num": 0,
    "modality.roll.global": (0.5,),
    "modality.mixup.global": (0.0,),
}


def test_there_are_four() -> None:
    assert [path.stem for path in RECIPES] == [
        f"spectrogram_{kind}" for kind in ("1gpu", "continue", "vitb16", "vits16")
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_lines_say_command_hardware_time_and_what_to_expect(path: Path) -> None:
    _, time, expected = check_head(path)
    assert "samples/s" in time and re.search(r"arXiv|docs/health.md", expected)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_deviation_from_asit_has_its_reason(path: Path) -> None:
    recipe, lines = loaded(path), path.read_text(encoding="utf-8").splitlines()
    for key, value in ASIT.items():
        found = setting(recipe, key)
        if key == "optim.lr" and isinstance(value, dict) and found["start"] == value["start"]:
            assert found["warmup_steps"] == recipe.steps // 10
        elif found != value:
            line = _line(key, lines)
            above = line
            while lines[above - 1].lstrip().startswith("#"):
                above -= 1
            reason = " ".join(lines[above : line + 1])
            assert "ASiT:" in reason or "ASiT has none" in reason, (
                f"{key} differs, and line {line + 1} does not say why"
            )


def _line(key: str, lines: list[str]) -> int:
    for comment in (line for line in lines if re.match(r" *# fbank.window", line) and key == "modality.fbank.window"):
        return lines.index(comment)
    line = line_of(key, lines)
    return line


@pytest.mark.slow  # a minute for each
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_memory_in_the_first_lines_is_what_is_calculated(path: Path) -> None:
    recipe, gpus = loaded(path), world_size(command(path))
    [said] = re.findall(r"([\d.]+)\s(?:# )?GB calculated", path.read_text(encoding="utf-8"))
    facts = calculate(recipe, recipe.modality.build(None), gpus)
    memory = memories(facts, gpus, recipe.parallel.replicas, recipe.accumulate)[way_of(recipe, gpus)]
    assert float(said) == pytest.approx(memory.total / 1e9, rel=0.03)


SHRUNK = [
    "batch_size=4", "steps=1", "save_every=1", "log_every=1", "tensorboard=false", "data.workers=0", "data.window_shards=2",
    "networks.student.backbone.embed_dim=32", "networks.student.backbone.depth=2", "networks.student.backbone.num_heads=2",
    "heads.dino.num_prototypes=64", "heads.dino.hidden_dim=32", "heads.dino.bottleneck_dim=16",
    "modality.crops.global.num_frames=96", "modality.crops.local.num_frames=32", f"data.shards={DATA}",
]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_step_in_small(path: Path, tmp_path: Path) -> None:
    changes = ["networks.student.init=null"] if "continue" in path.stem else []
    assert main([str(path), f"run_dir={tmp_path / 'run'}", *SHRUNK, *changes]) == 0
    tensors = load_file(tmp_path / "run/checkpoints/step_00000001/model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_real_size_is_built(path: Path) -> None:
    recipe: Recipe = loaded(path)
    with torch.device("meta"):
        networks: dict[str, Any] = build_networks(recipe.networks, 0, recipe.modality.build(None))
    millions = sum(p.numel() for p in networks["student"].parameters()) / 1e6
    assert (85 < millions < 87) if "vitb16" in path.stem else (21 < millions < 23)
    assert networks["student"].native_grid == (37, 8)
