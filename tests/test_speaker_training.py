"""DINO with batch norm in network and head, by SGD, as wespeaker trains speakers: ranks, accumulation, resuming."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssl_platform import distributed
from ssl_platform.config import ConfigError, to_yaml, validate
from ssl_platform.heads.projection import Config as HeadConfig
from ssl_platform.monitors import OF_THE_MACHINE, POOLED
from ssl_platform.optim import build_optimizer, build_schedule, parameter_rule, set_step
from ssl_platform.recipe import Recipe, load_recipe
from ssl_platform.step import train_step
from ssl_platform.train import main, train
from tests import engine, speech
from tests.courses import assert_equal, course
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
ECAPA = {"name": "ecapa", "channels": 8, "scale": 2, "dilations": [1, 2], "squeeze_dim": 4, "pooled_channels": 12}
ECAPA |= {"attention_dim": 4, "embed_dim": 10}
RESNET = {"name": "resnet34", "channels": 4, "depths": [1, 1], "pooling": "attentive_statistics", "embed_dim": 10}
HEAD = engine.HEAD | {"batch_norm": True, "num_layers": 3, "last_layer": "weight_norm_frozen"}
TEACHER = {"update": "ema", "of": "student", "momentum": 0.9, "mode": "train"}
SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 5e-5, "clip_grad": 3.0}
FSDP: dict[str, Any] = {"parallel": {"method": "fsdp"}}
ACTIVE = (("dino", "koleo"),) * 3


def settings(backbone: dict[str, Any] = ECAPA, **changes: Any) -> dict[str, Any]:
    return {
        "modality": {"name": "tests.speech"},
        "networks": {"student": {"backbone": backbone}, "teacher": TEACHER},
        "heads": {"dino": HEAD},
        "masks": {},
        "objectives": {"dino": engine.DINO | {"masks": {}}, "koleo": {"name": "koleo", "scope": "global"}},
        "optim": SGD,
    } | changes


@pytest.mark.parametrize("backbone", [ECAPA, RESNET], ids=["ecapa", "resnet34"])
def test_two_ranks_equal_one_process(backbone: dict[str, Any]) -> None:
    """Losses, gradients, and at the end weights, centers and the running statistics of student, teacher and heads."""
    alone = course(settings(backbone), ACTIVE, speech.batch)
    norms = [name for name in alone["state"] if name.endswith("running_var")]
    assert {name.split(".")[1] for name in norms} == {"student", "teacher", "dino"}
    for changes in ({}, FSDP):
        for found in run_ranks(2, course, settings(backbone, **changes), ACTIVE, speech.batch, timeout=250):
            assert_equal(found, alone, of_largest=1e-4)


@pytest.mark.slow
def test_four_ranks_equal_one_process() -> None:
    alone = course(settings(), ACTIVE, speech.batch)
    for changes in ({}, {"parallel": {"method": "fsdp", "replicas": 2}}):
        for found in run_ranks(4, course, settings(**changes), ACTIVE, speech.batch, timeout=400):
            assert_equal(found, alone, of_largest=1e-4)


def test_each_micro_batch_is_normalised_by_itself() -> None:
    """So they are other losses than the batch's; running statistics move for each micro-batch, once for each group."""
    whole, halves = (course(settings(accumulate=k), ACTIVE[:1], speech.batch) for k in (1, 2))
    assert whole["losses"] != halves["losses"]
    for found, calls in ((whole, 2), (halves, 4)):
        count = "networks.student.stem.norm.num_batches_tracked"
        assert found["state"][count] == calls and found["state"][count.replace("student", "teacher")] == calls // 2
        assert (
            found["state"]["heads.dino.student.mlp.norm_0.num_batches_tracked"] == calls // 2
        )  # all views in one call
    for found in run_ranks(2, course, settings(accumulate=2), ACTIVE[:1], speech.batch):
        assert found["losses"][0]["loss"] == pytest.approx(two_ranks_micro_batches(), rel=1e-5)


def two_ranks_micro_batches() -> float:
    """By one process, of the batches that two ranks with two micro-batches each normalise: quarters 0 and 2, 1 and 3."""
    parts = engine.parts(**{"batch_size": 8} | settings())
    quarters = engine.split(speech.batch(0), 4)
    losses = []
    for first, second in ((0, 2), (1, 3)):
        joined = speech.batch(0, size=4)
        for name, group in joined.groups.items():
            pair = [quarters[i].groups[name].views for i in (first, second)]
            joined.groups[name] = replace(group, views=torch.cat(pair, 1))
        losses.append(parts.student_teacher(joined, 0, ACTIVE[0]).loss.item())
    return sum(losses) / 2


def bad_on_one_rank() -> dict[str, Tensor]:
    parts = engine.parts(**{"batch_size": 8} | settings())
    before = {name: value.clone() for name, value in parts.student_teacher.state_dict().items()}
    mine = engine.split(speech.batch(0), distributed.world_size())[distributed.rank()]
    mine.groups["global"].views[-1, -1] = torch.nan  # of every rank
    assert train_step(parts, iter([mine]), 0, ACTIVE[0]).skipped
    after = parts.student_teacher.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    # Local views are fine, and have been seen: the rest of the step is undone.
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return {name: after[name] for name in changed if "running_" not in name and "tracked" not in name}


def test_a_skipped_step_leaves_running_statistics_usable() -> None:
    assert bad_on_one_rank() == {}
    assert run_ranks(2, bad_on_one_rank) == [{}, {}]


# -- the head ----------------------------------------------------------------------------------------------------------


def test_a_head_with_batch_norm_equals_the_loops() -> None:
    torch.manual_seed(0)
    head = validate(HeadConfig, HEAD).build(10).double()
    assert [name for name, _ in head.mlp.named_children()] == ["0", "norm_0", "1", "2", "norm_2", "3", "4"]
    for name, parameter in head.named_parameters():
        if "norm_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    embeddings = torch.randn(3, 4, 10, dtype=torch.float64)
    x = embeddings.flatten(0, 1)
    for number in (0, 2):
        layer, norm = head.mlp.get_submodule(str(number)), head.mlp.get_submodule(f"norm_{number}")
        x = x @ layer.weight.T + layer.bias  # type: ignore[operator, union-attr]
        centered = x - x.sum(0) / 12
        x = centered / ((centered**2).sum(0) / 12 + 1e-5).sqrt() * norm.weight + norm.bias  # type: ignore[operator]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    last = head.mlp.get_submodule("4")
    x = x @ last.weight.T + last.bias  # type: ignore[operator, union-attr]
    prototypes: Any = head.last_layer
    directions = prototypes.weight_v / prototypes.weight_v.norm(dim=1, keepdim=True)
    expected = (x / x.norm(dim=1, keepdim=True)) @ directions.T
    torch.testing.assert_close(head(embeddings), expected.view(3, 4, -1))


def test_heads_without_batch_norm_keep_their_names_and_numbers() -> None:
    torch.manual_seed(0)
    plain = validate(HeadConfig, HEAD | {"batch_norm": False}).build(10)
    assert [name for name in plain.state_dict() if name.startswith("mlp")] == [
        f"mlp.{number}.{kind}" for number in (0, 2, 4) for kind in ("weight", "bias")
    ]
    torch.manual_seed(0)
    normed = validate(HeadConfig, HEAD).build(10)
    assert all(torch.equal(value, normed.state_dict()[name]) for name, value in plain.state_dict().items())
    assert validate(HeadConfig, HEAD | {"num_layers": 1}).build(10)(torch.randn(2, 10)).shape == (2, 12)


def test_a_teacher_must_say_where_its_heads_statistics_come_from() -> None:
    networks = {"student": {"backbone": engine.VIT}, "teacher": {"update": "ema", "of": "student"}}
    changes = {"networks": networks, "heads": {"dino": HEAD}}
    expected = (
        "networks.teacher: its head has batch norm, whose running statistics it would never learn; set mode: train .*, or "
        "buffers: copy"
    )
    with pytest.raises(ConfigError, match=expected):
        engine.model(**changes)
    for said in ({"mode": "train"}, {"buffers": "copy"}):
        engine.model(**changes | {"networks": networks | {"teacher": networks["teacher"] | said}})


def test_copied_statistics_are_the_students() -> None:
    changes = settings(
        networks={"student": {"backbone": ECAPA}, "teacher": TEACHER | {"mode": "eval", "buffers": "copy"}}
    )
    state = course(changes, ACTIVE, speech.batch)["state"]
    for name, value in state.items():
        if "running_" in name:
            assert torch.equal(value, state[name.replace("teacher", "student")]) and value.isfinite().all(), name


# -- the optimiser -----------------------------------------------------------------------------------------------------


def test_sgd_is_wespeakers() -> None:
    """Momentum .9 without dampening, weight decay as a part of the gradient, but not of norms and biases."""
    steps, decay = 5, 5e-5
    lr = build_schedule(validate(Recipe, engine.settings(optim={"lr": COSINE})).optim.lr, steps)
    names = ["embed.weight", "embed.bias", "stem.norm.weight", "mlp.norm_0.weight"]
    parameters = [torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in names]
    optimizer = build_optimizer(
        [(name, p, parameter_rule(name)) for name, p in zip(names, parameters, strict=True)],
        name="sgd", betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    expected, velocity = [2.0] * len(names), [0.0] * len(names)
    for step in range(steps):
        set_step(optimizer, step=step, lr=lr(step), weight_decay=decay, freeze_last_layer=False)
        for i, parameter in enumerate(parameters):
            gradient = math.sin(step + i)
            parameter.grad = torch.full((3,), gradient, dtype=torch.float64)
            velocity[i] = 0.9 * velocity[i] + gradient + (decay * expected[i] if i == 0 else 0.0)
            expected[i] -= lr(step) * velocity[i]
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.full((3,), value, dtype=torch.float64), rtol=1e-12, atol=0)


def test_norms_and_biases_do_not_decay() -> None:
    parts = engine.parts(**settings())
    decaying = {
        name for group in parts.optimizer.param_groups for name in group["names"]
        if group["rule"].weight_decay_multiplier > 0
    }  # fmt: skip
    shapes = {name: p.ndim for name, p in parts.student_teacher.named_parameters() if p.requires_grad}
    assert decaying == {name for name, ndim in shapes.items() if ndim > 1}, "batch norm and biases have one axis"


# -- runs --------------------------------------------------------------------------------------------------------------

COSINE = {"schedule": "cosine", "start": 0.2, "end": 1e-5, "warmup_steps": 2}


def write_config(folder: Path) -> Path:
    data = {"shards": str(ROOT / "tests/data/skin_tiles"), "window_shards": 2, "workers": 0}
    changes = settings(data=data, steps=6, batch_size=8, run_dir="run", optim=SGD | {"lr": COSINE})
    changes |= {"save_every": 2, "log_every": 1, "tensorboard": False, "keep_last": 4}
    path = folder / "config.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(to_yaml(validate(Recipe, engine.settings(**changes))), encoding="utf-8")
    return path


def trained(config: str, run_dir: str, *overrides: str) -> int:
    return main([config, f"run_dir={run_dir}", *overrides])


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    left_out = (*OF_THE_MACHINE, *POOLED)
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(left_out)} for line in text.splitlines()]


def test_a_run_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert trained(config, str(whole)) == 0
    shutil.copytree(whole, resumed)
    for step in (4, 6):
        shutil.rmtree(resumed / f"checkpoints/step_{step:08d}")
    assert trained(config, str(resumed)) == 0
    assert lines(resumed) == lines(whole) and len(lines(whole)) == 6
    for name in ("model", "optimizer"):
        one, two = (load_file(run / f"checkpoints/step_00000006/{name}.safetensors") for run in (whole, resumed))
        assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())
    assert {key.rpartition("/")[2] for key in one} == {"momentum_buffer"}
    model = load_file(whole / "checkpoints/step_00000006/model.safetensors")
    count = model["networks.teacher.stem.norm.num_batches_tracked"]
    assert count == 6 and model["networks.student.stem.norm.num_batches_tracked"] == 12


SLOWLY = "optim.lr=0.002"
"""At .2 these few channels turn a change of the views by 1e-6 into one of the loss by 5 % within five steps, on one process
as well: nothing to compare numbers of ranks with."""


def test_a_run_on_two_ranks_equals_one_and_goes_on_alone(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    one, two = tmp_path / "one", tmp_path / "two"
    assert trained(config, str(one), SLOWLY) == 0
    run_ranks(2, trained_on_ranks, config, str(two), SLOWLY, timeout=250)
    shutil.rmtree(two / "checkpoints/step_00000006")
    assert trained(config, str(two), SLOWLY) == 0
    ours, theirs = (lines(run) for run in (two, one))
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)


def trained_on_ranks(config: str, run_dir: str, *overrides: str) -> None:
    recipe = load_recipe(Path(config), [f"run_dir={run_dir}", *overrides], distributed.world_size())
    train(recipe, torch.device("cpu"))
