"""Blocks one by one: recomputed bit by bit, compiled once, in bf16 with float32 around; names stay as they are."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_platform import distributed
from ssl_platform import step as step_module
from ssl_platform.backbones import Input, _blocks
from ssl_platform.backbones._attention import Backend, Heads
from ssl_platform.backbones._rope import Rotation
from ssl_platform.blocks import blocks_of, compile_blocks, recompute_blocks
from ssl_platform.config import ConfigError
from ssl_platform.step import train_step
from ssl_platform.student_teacher import StudentTeacher
from tests import engine
from tests.courses import ACTIVE, NETWORKS, VIT, assert_equal, batch, course, settings
from tests.ranks import run_ranks

DROPPED: dict[str, Any] = {
    "networks": {
        "student": {"backbone": VIT | {"depth": 4, "drop_path": 0.4, "drop_path_schedule": "linear"}},
        "teacher": {"update": "ema", "of": "student", "momentum": 0.9},
        "fixed": {"update": "frozen", "of": "student"},
    }
}
FSDP: dict[str, Any] = {"parallel": {"method": "fsdp"}}
BF16: dict[str, Any] = {"precision": "bf16"}


def same_bits(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    tensors = [
        torch.equal(found[kind][name], value)
        for kind in ("gradients", "state")
        for name, value in expected[kind].items()
    ]
    return found["losses"] == expected["losses"] and found["norms"] == expected["norms"] and all(tensors)


@pytest.mark.parametrize("changes", [{}, BF16, {"accumulate": 2}], ids=["fp32", "bf16", "accumulate"])
def test_recomputed_blocks_give_the_same_bits(changes: dict[str, Any]) -> None:
    changes = DROPPED | changes
    assert same_bits(course(changes | {"recompute": True}), course(changes))


def recomputed_in_shards() -> bool:
    return same_bits(course(DROPPED | FSDP | {"recompute": True}), course(DROPPED | FSDP)) and same_bits(
        course(DROPPED | {"recompute": True}), course(DROPPED)
    )


@pytest.mark.slow
def test_recomputed_blocks_give_the_same_bits_on_two_ranks() -> None:
    assert run_ranks(2, recomputed_in_shards, timeout=250) == [True, True]


def test_only_trained_blocks_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    attention = _blocks.attention

    def counted(groups: Sequence[Heads], backend: Backend) -> list[Tensor]:
        calls.append(groups[0].q.requires_grad)
        return attention(groups, backend)

    monkeypatch.setattr(_blocks, "attention", counted)
    for recompute in (False, True):
        calls.clear()
        parts = engine.parts(**settings(**DROPPED, recompute=recompute))
        train_step(parts, iter([batch(0)]), 0, ACTIVE[0])
        assert sum(calls) == 4 * (1 + recompute), "four blocks of the student"
        assert calls.count(False) == 4 * 2, "four blocks of teacher and frozen network"


def test_rotations_stay_float32_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 rounds what a block is given to bf16: views and features, but not the angles of RoPE."""
    found: list[torch.dtype] = []
    rotate = _blocks.rotate

    def seen(x: Tensor, by: Rotation) -> Tensor:
        found.extend((x.dtype, by.cos.dtype, by.sin.dtype))
        return rotate(x, by)

    monkeypatch.setattr(_blocks, "rotate", seen)
    student = {"backbone": VIT | {"position": {"kind": "rope"}}}
    networks = NETWORKS | {"student": student}
    try:
        parts = engine.parts(**settings(networks=networks, **FSDP, **BF16))
        train_step(parts, iter([batch(0)]), 0, ["dino"])
    finally:
        distributed.stop()
    assert set(found[::3]) == {torch.bfloat16} and set(found[1::3] + found[2::3]) == {torch.float32}


def test_names_stay() -> None:
    plain = engine.parts(**settings())
    try:
        for changes in ({"recompute": True}, {"compile": True}, {"compile": True, "recompute": True, **FSDP}):
            parts = engine.parts(**settings(**changes))
            assert list(parts.student_teacher.state_dict()) == list(plain.student_teacher.state_dict())
            assert parts.trained.keys() == plain.trained.keys()
            groups = [[g["names"] for g in each.optimizer.param_groups] for each in (parts, plain)]
            assert groups[0] == groups[1]
    finally:
        distributed.stop()


def test_blocks_are_found_in_any_network() -> None:
    from ssl_platform.backbones.timm_models import Config
    from tests.probes.toy import Toy

    toy: Any = Toy(("global",))
    shape = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    timm_vit = Config(name="timm_models", model="vit_tiny_patch16_224", kwargs=shape).build(toy)
    assert len(blocks_of(timm_vit)) == 3
    nested = nn.Module()
    nested.blocks = nn.Sequential(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)] * 3)}), nn.Linear(1, 1))
    assert blocks_of(nested) == list(nested.blocks)
    assert blocks_of(nn.Linear(1, 1)) == []


def test_a_timm_network_can_be_recomputed_with_its_own_drop_path() -> None:
    shape = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5}
    student = {"backbone": {"name": "timm_models", "model": "vit_tiny_patch16_224", "kwargs": shape}}
    networks = {"student": student, "teacher": {"update": "ema", "of": "student"}}
    changes = {"networks": networks, "objectives": {"dino": engine.DINO | {"masks": {}}}, "masks": {}}
    active = [["dino"]] * 2
    assert same_bits(course(changes | {"recompute": True}, active), course(changes, active))


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ConfigError, match="recompute: networks.student has no `blocks`"):
        recompute_blocks({"student": nn.Linear(1, 1)})
    normed = nn.Module()
    normed.blocks = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    with pytest.raises(ConfigError, match="recompute: networks.a has batch norm in its blocks"):
        recompute_blocks({"a": normed})
    with pytest.raises(ConfigError, match="compile: no network has `blocks`"):
        compile_blocks([nn.Linear(1, 1)])


# -- precision ---------------------------------------------------------------------------------------------------------


def seen_in_bf16(changes: dict[str, Any]) -> dict[str, set[torch.dtype]]:
    """The types that pass through a step in bf16: weights inside a block, what networks return, gradients, state."""
    parts = engine.parts(**settings(**BF16, **changes, optim={"lr": 0.01}))
    seen: dict[str, set[torch.dtype]] = {
        name: set() for name in ("weights", "tokens", "features", "gradients", "state")
    }
    student, teacher = (parts.student_teacher.networks[name] for name in ("student", "teacher"))
    for network in (student, teacher):
        network.blocks[0].attn.register_forward_pre_hook(  # type: ignore[index, union-attr]
            lambda module, arguments: seen["weights"].add(module.qkv.weight.dtype)
        )
        network.blocks[1].register_forward_hook(lambda *found: seen["tokens"].add(found[2][0].dtype))  # type: ignore[index, union-attr]
        network.register_forward_hook(lambda *found: seen["features"].add(found[2][0].patches.dtype))
    step = parts.optimizer.step

    def keep() -> None:
        seen["gradients"] |= {p.grad.dtype for p in parts.student_teacher.parameters() if p.grad is not None}
        step()

    parts.optimizer.step = keep  # type: ignore[method-assign, assignment]
    result = train_step(parts, iter([batch(0)]), 0, ACTIVE[0])
    assert not result.skipped and {term.dtype for term in result.terms.values()} == {torch.float32}
    seen["state"] = {value.dtype for value in parts.student_teacher.state_dict().values()}
    seen["state"] |= {value.dtype for state in parts.optimizer.state.values() for value in state.values()}
    return seen


def test_bf16_weights_are_gathered_in_bf16_and_kept_in_float32() -> None:
    try:
        sharded = seen_in_bf16(FSDP)
    finally:
        distributed.stop()
    whole_weights = seen_in_bf16({})
    assert sharded["weights"] == sharded["tokens"] == {torch.bfloat16}
    assert whole_weights["weights"] == whole_weights["tokens"] == {torch.float32}, "autocast casts for each product"
    for name in ("features", "gradients", "state"):
        assert sharded[name] == whole_weights[name] == {torch.float32}, name


ROUNDINGS = 2 * 15 + 10
"""On the way from pixels to a logit: of 2 blocks, each with results and weights of 4 products, 2 norms, attention,
activation and sums; of the embedding and the head."""


def tolerance() -> float:
    """Three standard deviations of the error of DINO's loss, to first order.

    bf16 rounds by a relative u = 2^-8 at most; n independent ones turn a feature by sqrt(n) u, and so move each logit, the
    product of two unit vectors of 8 dimensions, by sqrt(n / 8) u. The loss moves by that times its gradient's length, over
    the logits of student and teacher.
    """
    model, whole_batch = engine.model(**settings()), batch(0)
    views = whole_batch.groups["global"]
    with torch.no_grad():
        masked, local = model.networks["student"](
            [Input(views.views, views.masks["block"]), Input(whole_batch.groups["local"].views)]
        )
        heads: Any = model.heads["dino"]
        student = heads["student"](torch.cat([masked.cls[:, 0], local.cls]))  # (4, B, K)
        teacher = heads["teacher"](model.networks["teacher"]([Input(views.views)])[0].cls)  # (2, B, K)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    pairs = [(t, s) for t in range(2) for s in range(4) if s != t]
    loss = sum(-((teacher[t] / 0.04).softmax(-1) * (student[s] / 0.1).log_softmax(-1)).sum(-1).mean() for t, s in pairs)
    gradients = torch.autograd.grad(loss / len(pairs), [student, teacher])
    length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    return 3 * math.sqrt(ROUNDINGS / 8) * 2**-8 * length


def test_the_loss_in_bf16_is_that_of_float32_within_what_rounding_explains() -> None:
    try:
        full, autocast, sharded = (
            course(changes, (("dino",),))["losses"][0]["loss"] for changes in ({}, BF16, BF16 | FSDP)
        )
    finally:
        distributed.stop()
    allowed = tolerance()
    assert allowed < 0.1 * full, "a tolerance that cannot fail says nothing"
    assert 0 < abs(autocast - full) < allowed, (autocast, full, allowed)
    assert 0 < abs(sharded - full) < allowed, (sharded, full, allowed)


# -- compile -----------------------------------------------------------------------------------------------------------


def compiled_and_not(
    changes: dict[str, Any], backend: str, steps: int
) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """A course of either, and the number of graphs that torch had compiled before each step of the optimiser."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []
    update = StudentTeacher.update

    def counted(model: StudentTeacher, step: int) -> None:
        graphs.append(counters["stats"]["unique_graphs"])
        update(model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentTeacher, "update", counted)
        patch.setattr(step_module, "compile_blocks", partial(compile_blocks, backend=backend))
        compiled = course(changes | {"compile": True}, ACTIVE[:1] * steps)
    return compiled, course(changes, ACTIVE[:1] * steps), graphs


def assert_compiled_once(found: tuple[dict[str, Any], dict[str, Any], list[int]]) -> None:
    compiled, eager, graphs = found
    assert_equal(compiled, eager, state=1e-4)
    # The teacher's blocks; the student's first, without drop path; with it; with another number of rows, for any number.
    assert 0 < graphs[0] <= 5, graphs
    assert graphs == graphs[:1] * len(graphs), f"nothing is compiled after the first step: {graphs}"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="", marks=pytest.mark.slow),
        pytest.param({"recompute": True}, id="recompute"),
        pytest.param({"recompute": True} | BF16, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_give_the_same_and_are_compiled_once(changes: dict[str, Any]) -> None:
    """Four blocks with masks, each with another share of dropped rows; traced, with kernels as they are."""
    found = compiled_and_not(DROPPED | changes, "aot_eager", 3)
    if "precision" not in changes:
        return assert_compiled_once(found)
    compiled, eager, graphs = found  # fused casts round otherwise
    assert graphs == graphs[:1] * 3
    for ours, theirs in zip(compiled["losses"], eager["losses"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, FSDP], ids=["ddp", "fsdp"])
def test_compiled_blocks_on_two_ranks(changes: dict[str, Any]) -> None:
    for found in run_ranks(2, compiled_and_not, DROPPED | changes | {"recompute": True}, "aot_eager", 3, timeout=250):
        assert_compiled_once(found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_kernels_give_the_same(recompute: bool) -> None:
    assert_compiled_once(compiled_and_not(DROPPED | {"recompute": recompute}, "inductor", 3))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_kernels_in_shards_give_the_same() -> None:
    changes = DROPPED | FSDP | {"recompute": True}
    for found in run_ranks(2, compiled_and_not, changes, "inductor", 3, timeout=1100):
        assert_compiled_once(found)
