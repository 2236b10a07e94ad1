"""What a user reads when a configuration is wrong, word for word, and what a right one becomes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_platform.config import ConfigError, load_config, plugin_class, plugin_names, to_yaml, validate
from ssl_platform.objectives import Forward, Objective
from ssl_platform.recipe import Recipe, load_recipe
from ssl_platform.recipe_checks import doubtful, unseen
from tests import engine


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def lines_of(path: Path, *overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides, world_size)
    assert str(path) in str(caught.value) or not overrides or "override" in str(caught.value)
    return caught.value.lines


def test_every_error_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    data = engine.settings(
        stepz=5,
        optim={"lrr": 1.0, "betas": [0.9], "clip_grad": -1.0},
        modality={"name": "image", "chanels": 3},
        data={"shards": "x", "workers": "two"},
    )
    del data["steps"]
    data["objectives"]["dino"] = {"name": "dino", "student_tmp": 0.1}
    data["masks"] = {"block": {"name": "blok"}}
    lines = lines_of(write(tmp_path, data))
    for expected in (
        "steps: missing, and it has no default",
        "stepz: unknown key; did you mean 'steps'?",
        "optim.lrr: unknown key; did you mean 'lr'?",
        "optim.clip_grad: input should be greater than 0, got -1.0",
        "modality.chanels: unknown key; did you mean 'channels'?",
        'data.workers: input should be a valid integer, got "two"',
        "objectives.dino.student_tmp: unknown key; did you mean 'student_temp'?",
        "masks.block: unknown name 'blok'; did you mean 'block'?",
    ):
        assert expected in lines, lines
    assert any(line.startswith("optim.betas") for line in lines)
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"modality": {"name": "image", "crops": {"global": {"num": 2, "size": 100, "scale": [0.3, 1.0]}}}},
            "modality.crops.global.size: 100 is not a multiple of patch_size 16; use 96 or 112",
        ),
        ({"masks": {"block": {"name": "block", "min_tokens": 9}}}, "masks.block.min_tokens"),
        ({"masks": {"block": {"name": "block", "min_tokens": 1, "ratio": [0.1, 1.2]}}}, "masks.block.ratio"),
        (
            {"data": {"shards": "x", "window_shards": 8, "cache_shards": 4}},
            "data.cache_shards: 4 is smaller than the shuffle window, window_shards 8",
        ),
        (
            {"batch_size": 10, "accumulate": 4},
            "batch_size: 10 cannot be split over 1 ranks x accumulate 4; use a multiple",
        ),
        ({"stages": {"a": {"steps": 3}}}, "steps: 10, but the stages add up to 3 (steps x repeat)"),
        (
            {"networks": {"student": {"backbone": engine.VIT}, "teacher": {"update": "ema"}}},
            "networks.teacher.of: missing; update: ema needs the network it follows",
        ),
        (
            {"objectives": {"dino": engine.DINO | {"head": "dyno"}}},
            "objectives.dino.head: 'dyno' does not exist; there are: dino",
        ),
        (
            {"objectives": {"dino": engine.DINO | {"masks": {"global": "tube"}}}},
            "objectives.dino.masks: 'tube' does not exist; there are: block",
        ),
        (
            {
                "networks": {"student": {"backbone": engine.VIT, "inputs": "globl"}},
                "objectives": {"koleo": engine.KOLEO},
            },
            "networks.student.inputs: 'globl' is no group of views; there are global, local",
        ),
        (
            {"networks": {"student": {"backbone": engine.VIT}, "teacher": {"of": "student", "update": "frozen"}}}
            | {"objectives": {"dino": engine.DINO}},
            "objectives.dino.teacher: 'teacher' has no copy of the head 'dino', which only 'student' and",
        ),
        (
            {"objectives": {"dino": engine.DINO | {"masks": {"local": "block"}}}},
            "objectives.dino.masks: 'block' hides tokens of 'global', not of 'local'",
        ),
        (
            {"objectives": {"dino": engine.DINO | {"mode": "drop"}}},
            "objectives.dino.mode: drop needs masks that hide the same number of tokens in every view, which 'block'",
        ),
        ({"optim": {"lr": -1.0}}, "optim.lr: -1: must be at least 0"),
        (
            {"objectives": {"dino": engine.DINO | {"teacher_temp": 0.0}}},
            "objectives.dino.teacher_temp: 0: must be above 0",
        ),
        (
            {"optim": {"lr": {"schedule": "linear", "start": 1.0, "end": -0.5, "over_steps": 5}}},
            "optim.lr: end -0.5: must be at least 0",
        ),
        (
            {"stages": {"a": {"steps": 10, "objectives": []}}},
            "stages.a.objectives: empty, so nothing would be trained; leave the key out for all",
        ),
    ],
)
def test_impossible_combinations_are_one_readable_line(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    lines = lines_of(write(tmp_path, engine.settings(**changes)))
    assert len(lines) == 1 and "\n" not in lines[0], lines
    assert lines[0].startswith(expected)


def test_released_weights_that_see_other_views_are_doubtful() -> None:
    networks = {"student": {"backbone": {"name": "timm_models", "model": "test_convnext", "pretrained": True}}}
    changes: dict[str, Any] = {"networks": networks, "heads": {}, "masks": {}}
    changes["objectives"] = {"koleo": {"name": "koleo"}}
    [line] = doubtful(engine.recipe(modality={"name": "image"}, **changes))
    assert line.startswith("networks.student.backbone.pretrained:") and "networks.student.init.timm instead" in line
    fixed = {"name": "image", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert not doubtful(engine.recipe(modality=fixed, **changes))


def test_a_warm_up_as_long_as_the_run_is_doubtful() -> None:
    lr = {"schedule": "cosine", "start": 1.0, "end": 0.0, "warmup_steps": 10}
    assert doubtful(engine.recipe(optim={"lr": lr})) == [
        "optim.lr.warmup_steps: 10, so the run of 10 steps ends inside its warm-up"
    ]
    assert not doubtful(engine.recipe(optim={"lr": lr | {"warmup_steps": 9}}))


def unseen_of(**changes: Any) -> list[str]:
    made = engine.recipe(**changes)
    model = engine.model(**changes)
    return unseen(made, made.modality.build(None).groups, {name: model.objective(name) for name in made.objectives})


IMAGE = {"name": "image", "patch_size": 8, "crops": {"global": {"size": 16}, "local": {"num": 3, "size": 8}}}
COPIES = {"copies": {"gram": {"of": "global", "size": 32}}}
KOLEO = {"objectives": {"koleo": {"name": "koleo"}}, "heads": {}, "masks": {}}


def test_views_that_no_objective_sees_are_named_with_the_key_that_makes_them() -> None:
    assert unseen_of(modality=IMAGE) == [], "dino sees both groups"
    assert unseen_of(modality=IMAGE | COPIES, **KOLEO) == [
        "modality.crops.local: no objective sees the group 'local', 3 views of every sample that are made in vain; "
        "set modality.crops.local.num: 0, or name the group in an objective",
        "modality.copies.gram: no objective sees the group 'gram', 2 views of every sample that are made in vain; "
        "leave it out, or name the group in an objective",
    ]
    off = {"crops": {"global": {"size": 16}, "local": {"num": 0}}}
    assert unseen_of(modality=IMAGE | off, **KOLEO) == []
    assert unseen_of(**KOLEO) == [
        "modality: no objective sees the group 'local', 2 views of every sample that are made in vain; leave it out, or "
        "name the group in an objective"
    ]


def test_views_that_are_seen_in_one_stage_alone_are_not_in_vain() -> None:
    both = {"dino": engine.DINO, "koleo": {"name": "koleo"}}
    stages: dict[str, Any] = {"first": {"steps": 9, "objectives": ["koleo"]}, "last": {"steps": 1}}
    assert unseen_of(objectives=both, stages=stages) == []
    [line] = unseen_of(objectives=both, stages=stages | {"last": {"steps": 1, "objectives": ["koleo"]}})
    assert "'local'" in line


def test_views_of_an_objective_that_begins_late_are_not_in_vain() -> None:
    made = engine.recipe(steps=100_000)
    groups = made.modality.build(None).groups

    class Late(Objective):
        def __init__(self, begin: int) -> None:
            super().__init__()
            self.begin = begin

        def requests(self, step: int) -> list[Forward]:
            return [Forward("student", "local" if step >= self.begin else "global")]

    for begin, count in ((0, 0), (99_000, 0), (99_999, 0), (100_000, 1)):
        assert len(unseen(made, groups, dict.fromkeys(made.objectives, Late(begin)))) == count, begin


def test_copies_that_are_seen_need_the_views_that_they_show() -> None:
    copies = {"copies": {"large": {"of": "local", "size": 32}}}
    koleo = {"objectives": {"koleo": {"name": "koleo", "group": "large"}}, "heads": {}, "masks": {}}
    assert unseen_of(modality=IMAGE | copies, **koleo) == []


def test_batch_smaller_than_ranks(tmp_path: Path) -> None:
    path = write(tmp_path, engine.settings(batch_size=4))
    assert lines_of(path, world_size=8) == ["batch_size: 4 is smaller than the number of ranks, 8"]


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, engine.settings())
    changed = load_recipe(path, ["optim.lr=1e-3", "steps=7", "objectives.koleo=null"][:2])
    assert (changed.optim.lr, changed.steps) == (1e-3, 7), "1e-3 is a number, which YAML 1.1 denies"
    cosine = load_recipe(path, ["optim.lr={schedule: cosine, start: 1e-3, end: 0}"])
    assert cosine.optim.lr.start == 1e-3  # type: ignore[union-attr]
    assert load_recipe(path, ["networks.teacher.momentum=0.5"]).networks["teacher"].momentum == 0.5
    assert lines_of(path, "optim.lrr=1") == ["optim.lrr: unknown key; did you mean 'lr'?"]
    assert lines_of(path, "optim") == ["override 'optim': expected key=value, for example optim.lr=1e-3"]
    assert lines_of(path, "foo", "bar", "optim.lrr=1", "batch_size=6", "accumulate=4") == [
        "override 'foo': expected key=value, for example optim.lr=1e-3",
        "override 'bar': expected key=value, for example optim.lr=1e-3",
        "optim.lrr: unknown key; did you mean 'lr'?",
        "batch_size: 6 cannot be split over 1 ranks x accumulate 4; use a multiple of 4",
    ]
    assert lines_of(path, "steps.more=1") == ["override 'steps.more=1': 'steps' holds a value, not a section"]


def test_values_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 reads 010 as 8, 1:30 as 90, 2024-01-01 as a date and off as false."""
    path = write(tmp_path, engine.settings())
    assert lines_of(path, "steps=010") == ['steps: input should be a valid integer, got "010"']
    assert lines_of(path, "steps=1:30") == ['steps: input should be a valid integer, got "1:30"']
    assert lines_of(path, "tensorboard=off") == ['tensorboard: input should be a valid boolean, got "off"']
    assert load_recipe(path, ["run_dir=2024-01-01"]).run_dir.name == "2024-01-01"
    assert load_recipe(path, ["run_dir=~/runs"]).run_dir == Path.home() / "runs"
    changed = load_recipe(path, ["steps=1_000", "optim.lr=.5", "optim.eps=1.0e-6", "seed=0", "tensorboard=false"])
    assert (changed.steps, changed.optim.lr, changed.optim.eps, changed.tensorboard) == (1000, 0.5, 1e-6, False)


def test_paths_are_relative_to_the_file_and_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "configs", tmp_path / "here"
    folder.mkdir(), elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write(folder, engine.settings(data={"shards": "../tiles"}, run_dir="runs/a"))
    recipe = load_recipe(path)
    assert recipe.data.shards == folder.parent / "tiles" and recipe.run_dir == folder / "runs/a"
    assert load_recipe(path, ["run_dir=b"]).run_dir == elsewhere / "b"
    assert load_recipe(path, ["data.shards=[x, y]"]).data.shards == [elsewhere / "x", elsewhere / "y"]


def test_resolved_configuration_is_valid_input_and_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, engine.settings(modality={"name": "pathology"})))
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(recipe))
    assert load_recipe(saved) == recipe
    assert yaml.safe_load(saved.read_text())["modality"]["stain"]["sigma"] == 0.05, "defaults are written out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "key 'steps' is given twice"),
        ("- a\n- b\n", "expected a map of keys, found list"),
        ("a: [1,\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Recipe, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Recipe, tmp_path / "missing.yaml")


def test_anchors_and_merge_keys_are_yaml(tmp_path: Path) -> None:
    """Values are as if they were written out, own keys win, and an override of one place leaves the other alone."""
    path = tmp_path / "anchors.yaml"
    plain = engine.settings()
    path.write_text(yaml.safe_dump(plain))
    expected = load_recipe(path).networks["student"]
    backbone = plain["networks"]["student"]["backbone"]
    del plain["networks"]
    lines = ["networks:", "  student:", "    backbone: &vit"]
    lines += [f"      {key}: {json.dumps(value)}" for key, value in backbone.items()]
    lines += ["  twin:", "    update: frozen", "    backbone:", "      <<: *vit", "      depth: 3"]
    lines += ["  other: {update: frozen, backbone: *vit}", "  teacher: {update: ema, of: student, momentum: 0.9}"]
    path.write_text(yaml.safe_dump(plain) + "\n".join(lines))
    recipe = load_recipe(path, ["networks.other.backbone.depth=5"])
    depths = {name: network.backbone.depth for name, network in recipe.networks.items() if network.backbone}
    assert recipe.networks["student"].backbone == expected.backbone
    assert depths == {"student": expected.backbone.depth, "twin": 3, "other": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("a: &x {p: 1}\nb: {<<: *x, <<: *x}", "key '<<' is given twice"),
        ("a: &x {b: {c: *x}}", "a value is of a kind that a configuration cannot hold: Circular"),
        ("a: *x", "undefined alias 'x'"),
    ],
)
def test_bad_anchors(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Recipe, path)


def test_plugins_by_folder_and_by_dotted_path() -> None:
    assert plugin_names("ssl_platform.objectives") == ["anchor", "dino", "distill", "gram", "ibot", "koleo"]
    assert plugin_class("ssl_platform.modalities", "tests.probes.toy").__module__ == "tests.probes.toy"
    for name, message in (("tests.nothing", "no module"), ("tests.engine", "has no class 'Config'")):
        with pytest.raises(ValueError, match=message):
            plugin_class("ssl_platform.modalities", name)


def test_nothing_is_converted_and_nothing_changes_later() -> None:
    with pytest.raises(ConfigError, match='steps: input should be a valid integer, got "10"'):
        validate(Recipe, engine.settings(steps="10"))
    recipe = engine.recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.steps = 3  # type: ignore[misc]
