"""The recipes of voices: their commands are as written, their figures are wespeaker's or say why not."""

import re
from pathlib import Path

import pytest

from ssl_platform.recipe import Recipe, load_recipe
from tests.test_recipes import check_head, command, line_of, setting, world_size

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("speaker_*.yaml"))
DATA = Path(__file__).parent / "data"
WESPEAKER = {
    # examples/voxceleb/v3/dino of wenet-e2e/wespeaker; its epoch is 2,133 steps of 512 utterances.
    "steps": 320_000,
    "batch_size": 512,
    "accumulate": 1,
    "modality.sample_rate": 16_000,
    "modality.fbank.num_bins": 80,
    "modality.fbank.window": "hamming",
    "modality.fbank.dither": 1.0,
    "modality.fbank.scale": 32_768.0,
    "modality.normalization.subtract_time_mean": True,
    "modality.chunks.global.num": 2,
    "modality.chunks.global.num_frames": 300,
    "modality.chunks.global.augment": 1.0,
    "modality.chunks.local.num": 4,
    "modality.chunks.local.num_frames": 200,
    "modality.chunks.local.augment": 1.0,
    "modality.speed": (),
    "modality.vad": None,
    "modality.noise.kinds.noise.snr": (0.0, 15.0),
    "modality.noise.kinds.speech.snr": (10.0, 30.0),
    "modality.noise.kinds.music.snr": (5.0, 15.0),
    "modality.evaluation.num_frames": None,
    "networks.teacher.mode": "train",
    "networks.teacher.momentum": {"schedule": "cosine", "start": 0.996, "end": 1.0, "warmup_steps": 0},
    "heads.dino.num_prototypes": 65_536,
    "heads.dino.hidden_dim": 2048,
    "heads.dino.bottleneck_dim": 256,
    "heads.dino.num_layers": 3,
    "heads.dino.batch_norm": True,
    "heads.dino.last_layer": "weight_norm_frozen",
    "objectives.dino.targets": "centering",
    "objectives.dino.center_momentum": 0.9,
    "objectives.dino.student_temp": 0.1,
    "objectives.dino.teacher_temp": {"schedule": "linear", "start": 0.04, "end": 0.07, "over_steps": 64_000},
    "optim.name": "sgd",
    "optim.betas": (0.9, 0.999),
    "optim.lr": {"schedule": "cosine", "start": 0.2, "end": 5e-5, "warmup_steps": 42_660},
    "optim.scale_lr": "linear256",
    "optim.weight_decay": 5e-5,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_steps": 2133,
}


def loaded(path: Path) -> Recipe:
    words = command(path)
    roots = {"MUSAN": str(DATA / "noise"), "ROOMS": str(DATA / "noise/rooms")}
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word) and not word.startswith("gpus=")]
    overrides = [re.sub("MUSAN|ROOMS", lambda found: roots[found[0]], word) for word in overrides]
    return load_recipe(path, overrides, world_size(words))


def test_there_are_three() -> None:
    assert [path.stem for path in RECIPES] == ["speaker_1gpu", "speaker_ecapa", "speaker_resnet34"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_lines_say_command_hardware_time_and_what_to_expect(path: Path) -> None:
    hardware, _, expected = check_head(path)
    assert "calculated" in hardware and "README of wenet-e2e/wespeaker" in expected
    per_gpu = loaded(path).batch_size // world_size(command(path))
    assert 32 <= per_gpu <= 128


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_deviation_from_wespeaker_has_its_reason(path: Path) -> None:
    recipe, lines = loaded(path), path.read_text(encoding="utf-8").splitlines()
    different = [key for key, value in WESPEAKER.items() if setting(recipe, key) != value]
    for key in different:
        found = line_of(key, lines)
        above = found
        while lines[above - 1].lstrip().startswith("#"):
            above -= 1
        assert "wespeaker:" in " ".join(lines[above : found + 1]), (
            f"{key} differs, and line {found + 1} does not say why"
        )
    if "1gpu" not in path.stem:
        assert different == ["modality.evaluation.num_frames"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_noise_must_be_named_or_left_out(path: Path) -> None:
    from ssl_platform.config import ConfigError

    with pytest.raises(ConfigError) as error:
        load_recipe(path, [f"data.shards={DATA / 'voices'}", "data.cache_shards=64"], world_size(command(path)))
    assert "modality.noise.root: missing" in str(error.value) and "modality.reverb.root: missing" in str(error.value)
    overrides = [f"data.shards={DATA / 'voices'}", "modality.noise=null", "modality.reverb=null"]
    assert load_recipe(path, overrides, world_size(command(path))).modality.noise is None  # type: ignore[attr-defined]


SHRUNK = [
    "batch_size=4", "steps=1", "save_every=1", "log_every=1", "tensorboard=false", "data.workers=0", "data.window_shards=2",
    "heads.dino.num_prototypes=64", "heads.dino.hidden_dim=32", "heads.dino.bottleneck_dim=16",
    "modality.chunks.global.num_frames=80", "modality.chunks.local.num_frames=40", "modality.evaluation.num_frames=80",
    f"data.shards={DATA / 'voices'}", f"modality.noise.root={DATA / 'noise'}", "modality.noise.kinds.speech=null",
    "modality.noise.kinds.music=null", f"modality.reverb.root={DATA / 'noise/rooms'}",
]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_step_in_small(path: Path, tmp_path: Path) -> None:
    from ssl_platform.train import main

    channels = 8 if "resnet34" in path.stem else 32
    overrides = [*SHRUNK, f"run_dir={tmp_path / 'run'}", f"networks.student.backbone.channels={channels}"]
    assert main([str(path), *overrides]) == 0
    assert (tmp_path / "run/checkpoints/step_00000001/state.json").is_file()
