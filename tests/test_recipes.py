"""The recipes in configs/: their commands are as written, their figures are DINOv2's or say why not, and they train."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ssl_platform.estimate import calculate, memories, way_of
from ssl_platform.recipe import Recipe, build_networks, load_recipe
from ssl_platform.train import main

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(CONFIGS.glob("image_*.yaml")) + sorted(CONFIGS.glob("pathology_*.yaml"))
DATA = "tests/data/skin_tiles"
DINOV2 = {
    # ssl_default_config.yaml with vitl16_short.yaml of facebookresearch/dinov2; its epoch is 1,250 steps.
    "steps": 125_000,
    "batch_size": 2048,
    "accumulate": 1,
    "optim.lr": {"schedule": "cosine", "start": 4e-3, "end": 1e-6, "warmup_steps": 12_500},
    "optim.scale_lr": "sqrt1024",
    "optim.weight_decay": {"schedule": "cosine", "start": 0.04, "end": 0.4, "warmup_steps": 0},
    "optim.betas": (0.9, 0.999),
    "optim.clip_grad": 3.0,
    "optim.layer_decay": 0.9,
    "optim.patch_embed_lr": 0.2,
    "optim.freeze_last_layer_steps": 1250,
    "networks.teacher.momentum": {"schedule": "cosine", "start": 0.992, "end": 1.0, "warmup_steps": 0},
    "networks.student.backbone.embed_dim": 1024,
    "networks.student.backbone.depth": 24,
    "networks.student.backbone.num_heads": 16,
    "networks.student.backbone.drop_path": 0.3,
    "networks.student.backbone.drop_path_schedule": "uniform",
    "networks.student.backbone.layer_scale": 1e-5,
    "networks.student.backbone.num_registers": 0,
    "networks.student.backbone.ffn": "mlp",
    "heads.dino.num_prototypes": 65_536,
    "heads.dino.hidden_dim": 2048,
    "heads.dino.bottleneck_dim": 256,
    "heads.dino.num_layers": 3,
    "heads.dino.last_layer": "weight_norm",
    "masks.block.probability": 0.5,
    "masks.block.ratio": (0.1, 0.5),
    "objectives.dino.weight": 1.0,
    "objectives.ibot.weight": 1.0,
    "objectives.ibot.head": "dino",
    "objectives.koleo.weight": 0.1,
    "objectives.dino.targets": "centering",
    "objectives.ibot.targets": "centering",
    "objectives.dino.student_temp": 0.1,
    "objectives.dino.teacher_temp": {"schedule": "linear", "start": 0.04, "end": 0.07, "over_steps": 37_500},
    "objectives.ibot.teacher_temp": {"schedule": "linear", "start": 0.04, "end": 0.07, "over_steps": 37_500},
    "modality.patch_size": 16,
    "modality.crops.global.num": 2,
    "modality.crops.global.size": 224,
    "modality.crops.global.scale": (0.32, 1.0),
    "modality.crops.local.num": 8,
    "modality.crops.local.size": 96,
    "modality.crops.local.scale": (0.05, 0.32),
    "modality.horizontal_flip": 0.5,
}


def command(path: Path) -> list[str]:
    """The words of the command in a recipe's first line, with data that is there."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return shlex.split(first.removeprefix("# ").replace("data.shards=SHARDS", f"data.shards={ROOT / DATA}"))


def world_size(words: list[str]) -> int:
    """How many processes the command starts."""
    text = " ".join(words)
    if words[0] == "torchrun":
        nodes, each = (int(re.search(rf"--{name}=(\d+)", text)[1]) for name in ("nnodes", "nproc-per-node"))  # type: ignore[index]
        return nodes * each
    found = re.search(r" gpus=(\d+)", text)
    return int(found[1]) if found else 1


def loaded(path: Path) -> Recipe:
    words = command(path)
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word) and not word.startswith("gpus=")]
    return load_recipe(path, overrides, world_size(words))


def setting(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    if not hasattr(value, "model_dump"):
        return value
    kept: dict[str, Any] = value.model_dump(exclude={"warmup_start", "period_steps"})
    return kept


# -- what a reader meets first ------------------------------------------------------------------------------------------


def test_there_are_five_for_each_modality() -> None:
    kinds = ("1gpu", "continue", "highres", "vitl16", "vits16")
    assert [path.stem for path in RECIPES] == [f"{name}_{kind}" for name in ("image", "pathology") for kind in kinds]


def check_head(path: Path) -> tuple[str, str, str]:
    """What the first lines say of hardware, time and what to expect; they must say what holds for every recipe."""
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert head is not None
    text = head[0].replace("\n# ", " ")
    assert command(path)[0] in ("ssl-train", "python", "torchrun") and f"configs/{path.name}" in command(path)
    [hardware] = re.findall(r" Hardware: (.*?) Time: ", text)
    assert "GPU" in hardware
    [time] = re.findall(r" Time: (.*?) Expected: ", text)
    assert "calculated" in time and "MFU assumed" in time
    [expected] = re.findall(r" Expected: (.*?) Reference: ", text)
    assert "e have not run it" in expected, "a figure of somebody else's must not look like ours"
    return hardware, time, expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_lines_say_command_hardware_time_and_what_to_expect(path: Path) -> None:
    _, _, expected = check_head(path)
    assert re.search(r"README of|leaderboards.md of|arXiv|docs/health.md", expected)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_is_accepted_for_its_number_of_gpus(path: Path) -> None:
    recipe = loaded(path)
    per_gpu = recipe.batch_size // world_size(command(path)) // recipe.accumulate
    assert 32 <= per_gpu <= 128
    if per_gpu == 64 and "1gpu" in path.stem:
        assert load_recipe(path, [f"data.shards={ROOT / DATA}", "accumulate=8"]).accumulate == 8


@pytest.mark.parametrize("path", [RECIPES[0], RECIPES[-1]], ids=lambda path: path.stem)
def test_without_data_the_error_says_what_to_give(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "batch_size=64", "accumulate=1"]) == 1
    error = capsys.readouterr().err
    assert "data.shards: missing; give it as data.shards=FOLDER behind the configuration" in error


@pytest.mark.parametrize("path", [path for path in RECIPES if "highres" in path.stem], ids=lambda path: path.stem)
def test_without_the_first_run_the_error_says_which(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "no_run"
    overrides = [f"data.shards={ROOT / DATA}", f"run_dir={tmp_path / 'run'}", *SHRUNK, "accumulate=1"]
    assert main([str(path), *overrides, f"networks.student.init.path={gone}"]) == 1
    assert f"networks.student.init: {gone}: no such file or folder" in capsys.readouterr().err


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_large_recipe_is_dinov2s() -> None:
    recipe = loaded(CONFIGS / "image_vitl16.yaml")
    assert {key: setting(recipe, key) for key in DINOV2} == DINOV2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_deviation_from_dinov2_has_its_reason(path: Path) -> None:
    recipe, lines = loaded(path), path.read_text(encoding="utf-8").splitlines()
    for key in (key for key, value in DINOV2.items() if setting(recipe, key) != value):
        found = line_of(key, lines)
        above = found
        while lines[above - 1].lstrip().startswith("#"):
            above -= 1
        reason = " ".join(lines[above : found + 1])
        assert "DINOv2:" in reason or "DINOv2 has none" in reason, (
            f"{key} differs, and line {found + 1} does not say why"
        )


@pytest.mark.slow  # a minute for each; the larger recipes take several
@pytest.mark.parametrize("path", [path for path in RECIPES if "vits16" in path.stem], ids=lambda path: path.stem)
def test_memory_in_the_first_lines_is_what_is_calculated(path: Path) -> None:
    recipe, gpus = loaded(path), world_size(command(path))
    [said] = re.findall(r"([\d.]+)\s(?:# )?GB (?:calculated|a GPU)", path.read_text(encoding="utf-8"))
    facts = calculate(recipe, recipe.modality.build(None), gpus)
    memory = memories(facts, gpus, recipe.parallel.replicas, recipe.accumulate)[way_of(recipe, gpus)]
    assert float(said) == pytest.approx(memory.total / 1e9, rel=0.03)


def line_of(key: str, lines: list[str]) -> int:
    """The line that begins with the last part of `key` which begins one, in the section of its first part."""
    first, *rest = key.split(".")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{first}:"))
    end = next((i for i, line in enumerate(lines[start + 1 :], start + 1) if re.match("[a-z]", line)), len(lines))
    for part in reversed(rest):
        for i in range(start, end):
            if re.match(rf"\s*{part}:", lines[i]):
                return i
    return start


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_averages_span_as_many_samples_as_dinov2s(path: Path) -> None:
    recipe = loaded(path)
    momentum = setting(recipe, "networks.teacher.momentum")
    start = momentum["start"] if isinstance(momentum, dict) else momentum
    if "highres" in path.stem:
        assert start == 0.999
    else:
        assert start == pytest.approx(0.992 ** (recipe.batch_size / 2048), abs=1e-4)


def test_keys_that_are_switched_off_stand_where_they_can_be_switched_on() -> None:
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        switched = re.sub(r"(?m)^( *)# (anchor|recompute|compile|parallel):", r"\1\2:", text)
        assert isinstance(yaml.safe_load(switched), dict)
        assert ("# parallel: {method: fsdp}" in text) == ("vitl16" in path.stem)


# -- training ----------------------------------------------------------------------------------------------------------


SHRUNK = [
    "batch_size=4", "steps=1", "save_every=1", "log_every=1", "tensorboard=false", "data.workers=0", "data.window_shards=2",
    "networks.student.backbone.embed_dim=32", "networks.student.backbone.depth=2", "networks.student.backbone.num_heads=2",
    "heads.dino.num_prototypes=64", "heads.dino.hidden_dim=32", "heads.dino.bottleneck_dim=16", "modality.patch_size=8",
    "modality.crops.global.size=32", "modality.crops.local.size=16", "modality.crops.local.num=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stage at a higher resolution goes on from."""
    folder = tmp_path_factory.mktemp("first") / "run"
    overrides = [f"data.shards={ROOT / DATA}", f"run_dir={folder}", *SHRUNK]
    assert main([str(CONFIGS / "image_vits16.yaml"), *overrides]) == 0
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_step_in_small(path: Path, first_run: Path, tmp_path: Path) -> None:
    overrides = [f"data.shards={ROOT / DATA}", f"run_dir={tmp_path / 'run'}", *SHRUNK]
    if "highres" in path.stem:
        overrides += [f"networks.student.init.path={first_run}", "modality.crops.global.size=48"]
    if "continue" in path.stem:
        trunk = load_file(first_run / "checkpoints/step_00000001/model.safetensors")
        prefix = "networks.teacher."
        file = tmp_path / "public.safetensors"
        save_file({key.removeprefix(prefix): v for key, v in trunk.items() if key.startswith(prefix)}, file)
        overrides += ["networks.student.init.timm=null", f"networks.student.init.path={file}"]
    assert main([str(path), *overrides]) == 0
    tensors = load_file(tmp_path / "run/checkpoints/step_00000001/model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_real_size_is_built(path: Path) -> None:
    recipe = loaded(path)
    with torch.device("meta"):
        networks = build_networks(recipe.networks, 0, recipe.modality.build(None))
    millions = sum(p.numel() for p in networks["student"].parameters()) / 1e6
    assert (302 < millions < 305) if "vitl16" in path.stem else (21 < millions < 23)
