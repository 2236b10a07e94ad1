"""Gram anchoring against loops in float64, at another resolution, as a late stage, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_platform.backbones import Features
from ssl_platform.backbones._positions import resize_tokens
from ssl_platform.checkpoint import read_state, read_tensors
from ssl_platform.config import ConfigError, validate
from ssl_platform.objectives import Forward, Outputs
from ssl_platform.objectives.gram import Config, Gram, gram_loss
from ssl_platform.step import train_step
from ssl_platform.student_teacher import Role, _is_taken
from ssl_platform.train import train
from ssl_platform.views import Batch, ViewGroup
from tests import engine
from tests.test_probes import losses, recipe, shards  # noqa: F401  (a fixture)

CONTEXT: Any = None
NEGATIVES = ["keep", "remove", "remove_teachers"]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_loops(views: list[tuple[Tensor, Tensor]], normalize: bool = True, negatives: str = "keep") -> Tensor:
    """The mean over views and pairs of patches, one pair at a time, in float64; (N, D) of student and teacher."""
    squares: list[Tensor] = []
    for student, teacher in views:
        for i in range(len(student)):
            for j in range(len(student)):
                ours, theirs = ((x[i].double() * x[j].double()).sum() for x in (student, teacher))
                if normalize:
                    ours, theirs = (
                        value / (x[i].double().norm() * x[j].double().norm())
                        for value, x in ((ours, student), (theirs, teacher))
                    )
                if negatives == "remove":
                    ours = ours if ours > 0 else ours * 0
                if negatives == "remove_teachers" and theirs < 0 and ours < 0:
                    ours = ours * 0
                if negatives != "keep" and theirs < 0:
                    theirs = theirs * 0
                squares.append((ours - theirs.detach()) ** 2)
    return torch.stack(squares).mean()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 5),
    normalize=st.booleans(),
    negatives=st.sampled_from(NEGATIVES),
)
def test_value_and_gradient_equal_the_loops(seed: int, count: int, normalize: bool, negatives: Any) -> None:
    student, teacher = rows(3, count, 4, seed=seed).requires_grad_(), rows(3, count, 6, seed=seed + 1)
    loss = gram_loss(student, teacher, normalize, negatives)
    expected = by_loops(list(zip(student, teacher, strict=True)), normalize, negatives)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = rows(2, 8, 16).bfloat16(), rows(2, 8, 16, seed=1).bfloat16()
    assert gram_loss(student, teacher).dtype == torch.float32
    assert torch.equal(gram_loss(student, teacher), gram_loss(student.float(), teacher.float()))


# -- the objective ----------------------------------------------------------------------------------------------------


def outputs_of(objective: Gram, student: Tensor, teacher: Tensor, grids: Any = ((2, 2), (2, 2))) -> Outputs:
    features = {
        objective.student: Features(student[..., 0, :], student, grid=grids[0]),
        objective.teacher: Features(teacher[..., 0, :], teacher, grid=grids[1]),
    }
    return Outputs(features, {})


def batch_of(masks: Tensor | None = None, sources: tuple[int, int] = (0, 1)) -> Batch:
    whole = engine.batch(size=3)
    groups = {
        "global": ViewGroup(whole.groups["global"].views, torch.arange(2), {} if masks is None else {"block": masks}),
        "gram": ViewGroup(whole.groups["global"].views, torch.tensor(sources)),
    }
    return Batch(groups, whole.keys, whole.ids, whole.labels, 0)


def make(**changes: Any) -> Gram:
    return validate(Config, {"teacher_group": "gram", **changes}).build(CONTEXT)


@pytest.mark.parametrize("masks", [None, "block"])
def test_the_teachers_features_are_resized_to_the_students_grid(masks: str | None) -> None:
    """Bicubic from 4 x 6 to 2 x 3 patches, then the Gram matrices of each view, as DINOv3 does."""
    objective, num_masks = make(masks=masks), () if masks is None else (2,)
    student, teacher = rows(2, *num_masks, 3, 6, 5), rows(2, 3, 24, 5, seed=1)
    hidden = None if masks is None else torch.zeros(2, 2, 3, 6, dtype=torch.bool)
    loss = objective.loss(outputs_of(objective, student, teacher, ((2, 3), (4, 6))), batch_of(hidden), 0).terms["loss"]
    views = []
    for v in range(2):
        for b in range(3):
            image = teacher[v, b].T.reshape(1, 5, 4, 6)
            small = F.interpolate(image, size=(2, 3), mode="bicubic", align_corners=False)[0].flatten(1).T
            views += [(student[v, m, b] if masks else student[v, b], small) for m in range(2 if masks else 1)]
    torch.testing.assert_close(loss.double(), by_loops(views), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", ["all", "masked", "visible"])
def test_similarities_within_the_batch(tokens: str) -> None:
    objective = make(level="batch", masks="block", tokens=tokens)
    masks = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    student, teacher = rows(2, 1, 3, 4, 5), rows(2, 3, 4, 5, seed=1)
    loss = objective.loss(outputs_of(objective, student, teacher), batch_of(masks), 0).terms["loss"]
    chosen = {"all": torch.ones_like(masks), "masked": masks, "visible": ~masks}[tokens]
    expected = by_loops([(student[chosen], teacher[:, None][chosen])])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_no_masked_token_is_no_loss() -> None:
    objective, student = make(level="batch", masks="block", tokens="masked"), rows(2, 1, 3, 4, 5).requires_grad_()
    none = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    loss = objective.loss(outputs_of(objective, student, rows(2, 3, 4, 5)), batch_of(none), 0).terms["loss"]
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()


@pytest.mark.parametrize(("old", "new"), [((4,), (2,)), ((2, 3, 4), (1, 3, 8)), ((6, 4), (3, 2))])
def test_resizing_keeps_planes_and_their_axes(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Linear functions of the place stay linear away from the border; constants everywhere."""
    assert torch.allclose(resize_tokens(torch.full((2, math.prod(old), 3), 1.5), old, new), torch.tensor(1.5))
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        ramp = torch.arange(before).float().reshape([-1 if i == axis else 1 for i in range(len(old))]).expand(old)
        found = resize_tokens(ramp.reshape(1, -1, 1), old, new).reshape(new)
        other_axes = tuple(i for i in range(len(new)) if i != axis)
        if other_axes:
            assert found.std(dim=other_axes, correction=0).max() < 1e-5, "other axes have no part in it"
        line = found.mean(dim=other_axes) if other_axes else found
        assert bool((line.diff() > 0).all()) and len(line) == after


# -- the earlier network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, [2, 5, 8, 11]), (3, [2, 5, 8]), (1, [2])], ids=["no limit", "three", "one"]
)
def test_snapshots_are_taken_at_the_steps_that_were_named(limit: int | None, expected: list[int]) -> None:
    role = Role("snapshot", "teacher", first_step=2, every=3, max_updates=limit)
    assert [step for step in range(12) if _is_taken(role, step)] == expected


def test_the_gram_teacher_is_the_average_as_it_was_and_gets_no_gradient() -> None:
    networks = {
        "student": {"backbone": engine.VIT},
        "teacher": {"update": "ema", "of": "student", "momentum": 0.5},
        "gram": {"update": "snapshot", "of": "teacher", "first_step": 1, "every": 1, "max_updates": 1},
    }
    objectives = {"dino": engine.DINO, "gram": {"name": "gram", "masks": "block"}}
    parts = engine.parts(networks=networks, objectives=objectives)
    model, history = parts.student_teacher, []
    for step in range(4):
        train_step(parts, iter([engine.batch(step)]), step, ["dino", "gram"])
        history.append({name: net.cls_token.detach().clone() for name, net in model.networks.items()})
    assert torch.equal(history[1]["gram"], history[1]["teacher"]), "after the average moved"
    assert torch.equal(history[3]["gram"], history[1]["gram"]) and not torch.equal(
        history[3]["gram"], history[3]["teacher"]
    )
    assert not torch.equal(history[0]["gram"], history[1]["gram"])
    assert all(p.grad is None and not p.requires_grad for p in model.networks["gram"].parameters())


def test_a_late_stage_turns_it_on_from_a_copy_of_the_teacher(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    changes = {
        "networks": {
            "student": {"backbone": engine.VIT},
            "teacher": {"update": "ema", "of": "student", "momentum": 0.9},
            "gram": {"update": "snapshot", "of": "teacher", "first_step": 10},
        },
        "stages": {
            "pretrain": {"steps": 2, "objectives": ["dino"]},
            "gram": {"steps": 2, "init": {"gram": "teacher"}},
        },
    }
    run = recipe("gram", shards, tmp_path / "run", **changes)
    train(run, torch.device("cpu"))
    found = losses(tmp_path / "run")
    assert ["gram" in line for line in found] == [False, False, True, True]
    # The student is ahead of the copied average, and sees half the resolution.
    assert 0 < found[2]["gram"] < 1


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": "masked"}, "tokens: masked needs masks, and level: batch"),
        ({"tokens": "visible", "masks": "block"}, "tokens: visible needs masks, and level: batch"),
        ({"negatives": "drop"}, "negatives"),
        ({"level": "patch"}, "level"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Config, changes)
    assert words in str(error.value)


def test_names_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        engine.recipe(objectives={"gram": {"name": "gram", "teacher_group": "gram"}})
    assert "objectives.gram.teacher: 'gram' does not exist; there are: student, teacher" in str(error.value)
    assert "objectives.gram.teacher_group: 'gram' does not exist; there are: global, local" in str(error.value)


def test_a_teacher_that_is_trained_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        engine.recipe(objectives={"gram": {"name": "gram", "teacher": "student"}})
    assert "objectives.gram.teacher: 'student' is trained; name a network with update: snapshot" in str(error.value)


def test_other_crops_and_unknown_grids_are_refused() -> None:
    objective, student, teacher = make(), rows(2, 3, 4, 5), rows(2, 3, 16, 5)
    with pytest.raises(ConfigError) as error:
        objective.loss(outputs_of(objective, student, student), batch_of(sources=(2, 3)), 0)
    assert "the views of 'gram' show other crops than those of 'global'" in str(error.value)
    with pytest.raises(ConfigError) as error:
        objective.loss(outputs_of(objective, student, teacher, (None, None)), batch_of(), 0)
    assert "'gram' has 16 patches and 'student' 4, of no known grid" in str(error.value)
    assert objective.requests(0) == [Forward("student", "global"), Forward("gram", "gram")]


# -- a teacher that is never filled -----------------------------------------------------------------------------------

FROZEN = {"student": {"backbone": engine.VIT}, "gram": {"backbone": engine.VIT, "update": "frozen"}}
ONLY_GRAM = {"objectives": {"gram": {"name": "gram"}}, "heads": {}}
LATE = {"first": {"steps": 4, "objectives": ["other"]}, "second": {"steps": 6}}


@pytest.mark.parametrize(
    "gram",
    [{}, {"of": "student", "backbone": None}, {"backbone": {"name": "timm_models", "model": "test_vit"}}],
    ids=["own backbone", "a copy of the random student", "timm"],
)
def test_a_frozen_teacher_that_stays_random_is_refused(gram: dict[str, Any]) -> None:
    networks = FROZEN | {"gram": FROZEN["gram"] | gram}
    with pytest.raises(ConfigError) as error:
        engine.recipe(networks=networks, **ONLY_GRAM)
    expected = "objectives.gram.teacher: is frozen and random, and teaches nothing; say where its weights are"
    assert f"{expected}: networks.gram.init" in str(error.value)


def test_a_stage_that_fills_the_teacher_too_late_is_refused() -> None:
    stages = {"first": {"steps": 4}, "second": {"steps": 6, "init": {"gram": "student"}}}
    with pytest.raises(ConfigError, match="frozen and random"):
        engine.recipe(networks=FROZEN, stages=stages, **ONLY_GRAM)


@pytest.mark.parametrize(
    "changes",
    [
        {"networks": FROZEN | {"gram": FROZEN["gram"] | {"init": {"path": "weights.pth"}}}},
        {"networks": FROZEN | {"gram": {"update": "snapshot", "of": "student"}}},
        {"networks": FROZEN | {"gram": {"update": "ema", "of": "student"}}},
        {"stages": {"only": {"steps": 10, "init": {"gram": "student"}}}},
        {
            "objectives": {"gram": {"name": "gram"}, "other": {"name": "gram", "teacher": "snapshot"}},
            "networks": FROZEN | {"snapshot": {"update": "snapshot", "of": "student"}},
            "stages": LATE | {"second": {"steps": 6, "init": {"gram": "student"}}},
        },
        {"networks": FROZEN | {"gram": {"update": "frozen", "of": "student"}, "student": {
            "backbone": engine.VIT, "init": {"path": "weights.pth"}}}},
    ],
    ids=["init", "snapshot", "ema", "a stage's init", "a late stage's init", "a copy of a network with init"],
)  # fmt: skip
def test_a_teacher_that_something_fills_is_taken(changes: dict[str, Any]) -> None:
    engine.recipe(**({"networks": FROZEN} | ONLY_GRAM | changes))


# -- a snapshot that falls on a skipped step ---------------------------------------------------------------------------


def test_a_snapshot_due_in_a_skipped_step_is_taken_after_the_next_good_one() -> None:
    role = {"update": "snapshot", "of": "student", "first_step": 1, "every": 10}
    parts = engine.parts(networks={"student": {"backbone": engine.VIT}, "gram": role}, **ONLY_GRAM)
    model = parts.student_teacher
    student, gram = (model.networks[name].cls_token for name in ("student", "gram"))
    first = gram.detach().clone()
    for step in range(4):
        batch = engine.batch(step)
        if step == 1:
            batch.groups["global"].views.fill_(torch.nan)
        assert train_step(parts, iter([batch]), step, ["gram"]).skipped == (step == 1)
        with torch.no_grad():
            assert torch.equal(gram, first) == (step < 2), step
            if step == 2:
                assert torch.equal(gram, student) and not torch.equal(gram, first)
        assert model.overdue == ({"gram"} if step == 1 else set())
    assert not torch.equal(gram, student), "once"


def test_an_overdue_snapshot_survives_a_resume(shards: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    networks = {
        "student": {"backbone": engine.VIT},
        "teacher": {"update": "ema", "of": "student", "momentum": 0.9},
        "gram": {"update": "snapshot", "of": "student", "first_step": 1, "every": 10},
    }
    original = Gram.loss

    def loss(self: Gram, outputs: Outputs, batch: Batch, step: int) -> Any:
        found = original(self, outputs, batch, step)
        return found._replace(terms={"loss": found.terms["loss"] * torch.nan}) if step == 1 else found

    monkeypatch.setattr(Gram, "loss", loss)
    found = []
    for name, ends in (("whole", [4]), ("resumed", [2, 4])):
        run = recipe("gram", shards, tmp_path / name, networks=networks, steps=4)
        for end in ends:
            train(run.model_copy(update={"steps": end}), torch.device("cpu"))
        found.append(read_tensors(tmp_path / name / "checkpoints/step_00000004", "model"))
    assert read_state(tmp_path / "resumed/checkpoints/step_00000002").overdue == ["gram"]
    assert read_state(tmp_path / "resumed/checkpoints/step_00000004").overdue == []
    whole, resumed = found
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not torch.equal(whole["networks.gram.cls_token"], whole["networks.student.cls_token"])
