"""Views that show what others show, and sizes that are drawn anew for each step."""

import math
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from ssl_platform.config import ConfigError, validate
from ssl_platform.data.index import Index
from ssl_platform.data.shards import modality_of_step, train_batches
from ssl_platform.modalities import Modality, image, pathology
from ssl_platform.recipe import NetworkConfig, load_recipe, open_index, open_order
from ssl_platform.train import main, train
from ssl_platform.views import Batch
from tests.ranks import run_ranks
from tests.test_resume import assert_equal, lines

SMOKE = Path(__file__).parents[1] / "configs" / "smoke" / "dinov3.yaml"
CROPS = {"global": {"size": 32}, "local": {"num": 2, "size": 16}}
MIXED = [
    {"sizes": {"global": 32, "local": 16}, "probability": 0.5},
    {"sizes": {"global": 48}, "probability": 0.3},
    {"sizes": {"global": 64, "local": 32, "gram": 96}, "probability": 0.2},
]
PLAIN = {"color_jitter": {"probability": 0.0}, "grey": 0.0, "blur": {"global": [0.0], "local": [0.0]}}
PLAIN |= {"solarize": {"global": [0.0]}}


def config(**changes: Any) -> image.Config:
    return validate(image.Config, {"patch_size": 8, "crops": CROPS, **changes})


def views_of(modality: Any, example: Tensor, seed: int = 0) -> dict[str, Any]:
    return dict(modality.augment((example,), np.random.default_rng(seed)))


def smooth(size: int = 400) -> Tensor:
    """An image without detail, so that a view is nearly the same however it is resized."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)[0] * 255).to(torch.uint8)


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "pathology", "context"])
def test_a_copy_shows_the_same_part_held_the_same_way(kind: str) -> None:
    settings: dict[str, Any] = {
        "patch_size": 8,
        "crops": CROPS,
        "copies": {"gram": {"of": "global", "size": 96}},
        **PLAIN,
    }
    turns = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "right_angle_rotation": 0.75}
    if kind == "image":
        modality: Any = validate(image.Config, settings | turns).build(None)
    else:
        context = {"size": 200} if kind == "context" else None
        modality = validate(pathology.Config, settings | {"stain": None, "context": context}).build(None)
    assert modality.groups["gram"].shape == (3, 96, 96) and modality.groups["gram"].grid == (12, 12)
    for seed in range(6):
        made = views_of(modality, smooth(), seed)
        assert list(made) == ["global", "local", "gram"]
        assert torch.equal(made["gram"].source, made["global"].source)
        small = F.interpolate(made["gram"].views, (32, 32), mode="bicubic", antialias=True)
        difference = (small - made["global"].views).abs().mean()
        apart = (small.flip(0) - made["global"].views).abs().mean()
        assert difference < 0.03 < apart, (seed, difference, apart)


def test_a_copy_has_no_colour_augmentations_and_changes_nothing_else() -> None:
    with_copy = config(copies={"gram": {"size": 32}}, color_jitter={"probability": 1.0})
    without = config(color_jitter={"probability": 1.0})
    made, alone = views_of(with_copy.build(None), smooth()), views_of(without.build(None), smooth())
    for group in ("global", "local"):
        assert torch.equal(made[group].views, alone[group].views)
    plain = views_of(config(color_jitter={"probability": 1.0}, copies={"gram": {"size": 32}}).build(None), smooth())
    assert torch.equal(plain["gram"].views, made["gram"].views)
    assert (made["gram"].views - made["global"].views).abs().mean() > 0.05


# -- resolutions ------------------------------------------------------------------------------------------------------


def test_every_variant_keeps_its_promises_and_evaluation_stays() -> None:
    modality: Any = config(copies={"gram": {"size": 64}}, resolutions=MIXED).build(None)
    assert [variant.probability for variant in modality.variants] == [0.5, 0.3, 0.2]
    shapes = [{name: spec.shape[1] for name, spec in one.modality.groups.items()} for one in modality.variants]
    assert shapes == [
        {"global": 32, "local": 16, "gram": 64},
        {"global": 48, "local": 16, "gram": 64},
        {"global": 64, "local": 32, "gram": 96},
    ]
    assert modality.groups["global"].shape == (3, 32, 32) and modality.patch_embed(16).native_grid == (4, 4)
    for variant in modality.variants:
        made = views_of(variant.modality, smooth())
        for name, spec in variant.modality.groups.items():
            assert made[name].views.shape == (spec.num_views, *spec.shape)
            assert spec.grid == (spec.shape[1] // 8, spec.shape[2] // 8)
        assert torch.equal(variant.modality.preprocess(smooth()), modality.preprocess(smooth()))
        assert variant.modality.description() == modality.description()


def test_pathology_has_its_own_settings_in_every_variant() -> None:
    settings = {"patch_size": 8, "crops": CROPS, "context": {"size": 100}, "resolutions": MIXED[:2]}
    with pytest.raises(ConfigError, match="probabilities add up to 0.8, not to 1"):
        validate(pathology.Config, settings)
    settings["resolutions"] = [MIXED[0], {"sizes": {"global": 64}, "probability": 0.5}]
    modality: Any = validate(pathology.Config, settings).build(None)
    assert all(variant.modality.context_size == 100 for variant in modality.variants)
    with pytest.raises(ValueError, match="context.size needs 100 x 100"):
        views_of(modality.variants[1].modality, smooth(64))


def test_a_step_draws_by_seed_and_step_alone_with_the_probabilities() -> None:
    modality: Any = config(copies={"gram": {"size": 64}}, resolutions=MIXED).build(None)
    again: Any = config(copies={"gram": {"size": 64}}, resolutions=MIXED).build(None)

    def drawn(of: Any, seed: int, steps: int) -> list[int]:
        sizes = {"32": 0, "48": 1, "64": 2}
        return [sizes[str(modality_of_step(of, seed, step).groups["global"].shape[1])] for step in range(steps)]

    first = drawn(modality, 3, 4000)
    assert first == drawn(again, 3, 4000) and first != drawn(modality, 4, 4000)
    for number, probability in enumerate((0.5, 0.3, 0.2)):
        share = first.count(number) / 4000
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000), "four deviations"
    plain: Modality = config().build(None)
    assert modality_of_step(plain, 3, 0) is plain


@pytest.fixture(scope="module")
def index() -> Index:
    return open_index(load_recipe(SMOKE))


def batches(index: Index, *changes: str, steps: int = 6, workers: int = 0, **of_rank: int) -> list[Batch]:
    recipe = load_recipe(SMOKE, ["steps=20", *changes])
    modality = recipe.modality.build(index.statistics)
    arguments: dict[str, Any] = {
        "order": open_order(recipe, index),
        "seed": recipe.seed,
        "batch_size": recipe.batch_size,
        "first_step": 0,
        "last_step": steps,
        "cache_shards": 4,
        **of_rank,
    }
    masks = {name: rule.build() for name, rule in recipe.masks.items()}
    return list(train_batches(index, modality, masks, workers=workers, prefetch=2, **arguments))


def test_ranks_workers_and_micro_batches_see_the_same_batches(index: Index) -> None:
    whole = batches(index)
    sizes = [batch.groups["global"].views.shape[-1] for batch in whole]
    assert set(sizes) == {32, 48}, "both sizes come within six steps of this seed"
    split = {
        "workers": [[batch] for batch in batches(index, workers=2)],
        "ranks": list(zip(*(batches(index, rank=rank, world_size=2) for rank in range(2)), strict=True)),
        "restarted": [[batch] for batch in batches(index, first_step=3)],
    }
    micro = batches(index, accumulate=2)
    split["micro-batches"] = [(micro[i], micro[i + 1]) for i in range(0, len(micro), 2)]
    for name, steps in split.items():
        for batch, parts in zip(whole[len(whole) - len(steps) :], steps, strict=True):
            assert [key for part in parts for key in part.keys] == batch.keys, name
            for group, expected in batch.groups.items():
                found = torch.cat([part.groups[group].views for part in parts], dim=1)
                assert torch.equal(found, expected.views), (name, group)
                for rule, mask in expected.masks.items():
                    assert torch.equal(torch.cat([part.groups[group].masks[rule] for part in parts], dim=2), mask)


def test_masks_fit_each_grid_and_the_order_of_the_data_is_what_it_was(index: Index) -> None:
    mixed, plain = batches(index), batches(index, "modality.resolutions=[]")
    assert [batch.keys for batch in mixed] == [batch.keys for batch in plain]
    for batch in mixed:
        group = batch.groups["global"]
        tokens = (group.views.shape[-1] // 8) ** 2
        assert group.masks["block"].shape == (2, 1, 8, tokens) and group.masks["block"].any()


# -- runs -------------------------------------------------------------------------------------------------------------


SHORT = (
    "steps=4", "save_every=3", "log_every=1", "tensorboard=false", "stages.pretrain.steps=2", "stages.gram.steps=2",
    "networks.gram.first_step=2", "data.window_shards=1",
)  # fmt: skip


def test_a_run_of_all_parts_goes_on_bit_for_bit_and_shows_the_gram_stage(tmp_path: Path) -> None:
    """Four steps against three and one, by another number of workers: the Gram stage is the last two."""
    whole, halves = (load_recipe(SMOKE, [f"run_dir={tmp_path / name}", *SHORT]) for name in ("a", "b"))
    train(whole, torch.device("cpu"))
    train(halves, torch.device("cpu"))
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_00000004")
    train(load_recipe(SMOKE, [f"run_dir={tmp_path / 'b'}", "data.workers=1", *SHORT]), torch.device("cpu"))
    assert_equal(tmp_path / "a", tmp_path / "b", 4)
    found = lines(tmp_path / "a")
    assert ["gram" in line for line in found] == [False, False, True, True]
    assert all(np.isfinite(list(line.values())).all() for line in found)


def test_two_ranks_equal_one_at_mixed_resolutions(tmp_path: Path) -> None:
    """Without drop path and RoPE's draws, which are of each rank, and KoLeo, which looks for neighbours on each."""
    config_file = tmp_path / "still.yaml"
    text = (
        SMOKE.read_text()
        .replace("../../", f"{SMOKE.parents[2]}/")
        .replace("  koleo: {name: koleo, masks: block}\n", "")
    )
    text = text.replace("drop_path: 0.1", "drop_path: 0.0").replace("rescale: 2.0", "rescale: 1.0")
    text = text[: text.index("stages:")]
    config_file.write_text(text)
    overrides = ["steps=2", "log_every=1", "tensorboard=false"]
    train(load_recipe(config_file, [f"run_dir={tmp_path / 'one'}", *overrides]), torch.device("cpu"))
    run_ranks(2, train_file, str(config_file), [f"run_dir={tmp_path / 'two'}", *overrides])
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 2 and "gram" in one[0]
    for ours, theirs in zip(one, two, strict=True):
        for key in ours.keys() - {"ibot_teacher_entropy", "ibot_kl"}:  # ranks' means of unequally many masked tokens
            assert theirs[key] == pytest.approx(ours[key], rel=2e-3 if "grad" in key else 1e-4, abs=1e-6), key


def train_file(path: str, overrides: list[str]) -> None:
    train(load_recipe(Path(path), overrides, world_size=2), torch.device("cpu"))


def test_the_picture_and_the_estimate_are_of_views_that_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = "modality.resolutions=[{sizes: {global: 48, local: 24, gram: 96}, probability: 1.0}]"
    arguments = [str(SMOKE), f"run_dir={tmp_path / 'run'}", larger]
    assert main([*arguments, "--show-views", str(tmp_path / "views.png")]) == 0
    assert (tmp_path / "views.png").stat().st_size > 1000 and not (tmp_path / "run").exists()
    assert main([*arguments, "--estimate"]) == 0
    text = capsys.readouterr().out
    assert "memory and time are of the largest of 1" in text
    assert "memory and time are of stage pretrain (dino, ibot, koleo): later ones may need more" in text
    assert main([*arguments, "--estimate", "gpus=2"]) == 0, (
        "objectives that compare groups meet views of the same crops"
    )
    text = capsys.readouterr().out
    assert "FLOPs, memory and time are of the largest of 1 resolutions: the mean is less" in text
    assert "of all objectives together: stages with some of them need less" in text


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"copies": {"local": {"size": 16}}}, "copies.local: there is a group of crops of this name"),
        (
            {"copies": {"gram": {"of": "globl", "size": 64}}},
            "copies.gram.of: no group of crops 'globl'; there are global",
        ),
        ({"copies": {"gram": {"size": 60}}}, "copies.gram.size: 60 is not a multiple of patch_size 8; use 56 or 64"),
        ({"copies": {"gram": {"size": [64, 32]}}}, "copies.gram.size: 64 x 32 has another height / width"),
        (
            {"resolutions": [{"sizes": {"global": 60}, "probability": 1.0}]},
            "resolutions.0: crops.global.size: 60 is not a",
        ),
        (
            {"resolutions": [{"sizes": {"gram": 64}, "probability": 1.0}]},
            "resolutions.0.sizes: no group 'gram'; there are",
        ),
        ({"resolutions": [{"sizes": {}, "probability": 0.5}]}, "the probabilities add up to 0.5, not to 1"),
        ({"resolutions": [{"sizes": {}, "probability": 0.0}]}, "greater than 0"),
        ({"resolutions": [{"sizes": {}}]}, "resolutions.0.probability"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize("page", ["continue", "distill", "dinov3"])
def test_the_configurations_of_the_pages_are_valid(page: str) -> None:
    text = (SMOKE.parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE) if "..." not in block]
    sections: list[tuple[str, Any]] = []
    for block in blocks:
        if block.startswith(("    modality:", "    networks:", "    objectives:")):
            sections += yaml.safe_load(textwrap.dedent(block)).items()
    assert sections
    for name, section in sections:
        if name == "modality":
            assert validate(image.Config, section).build(None).groups
        for network in section.values() if name == "networks" else ():
            assert validate(NetworkConfig, network)


def test_masks_are_checked_on_every_grid() -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(SMOKE, ["masks.block.min_tokens=17", "masks.block.max_fraction=1.0"])
    assert "masks.block.min_tokens: 17 is more than the 16 tokens" in str(error.value)


def test_a_context_that_holds_no_large_crop_is_refused() -> None:
    settings = {"patch_size": 8, "crops": CROPS, "context": {"size": 60}}
    validate(pathology.Config, settings)
    with pytest.raises(ConfigError) as error:
        validate(pathology.Config, settings | {"resolutions": [{"sizes": {"global": 64}, "probability": 1.0}]})
    assert "resolutions.0: context.size: 60 is too small for crops.global.size 64" in str(error.value)
