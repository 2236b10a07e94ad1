"""DINO, iBOT and KoLeo against slow loops in float64, and each trap of a new implementation (docs/numerics.md)."""

import math

import pytest
import torch
from torch import Tensor

from ssl_platform.backbones import Features, Input
from ssl_platform.objectives import Forward, Outputs
from ssl_platform.objectives.dino import Dino, pair_losses, pair_matrix
from ssl_platform.objectives.ibot import Ibot
from ssl_platform.objectives.koleo import Koleo, koleo
from ssl_platform.step import train_step
from ssl_platform.views import SampleViews, collate
from tests import engine


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- DINO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["other", "same", "all"])
@pytest.mark.parametrize(
    ("teacher_sources", "student_sources"), [([0, 1], [0, 1, 2, 3, 4]), ([0], [0, 1, 2]), ([0, 1, 2], [1, 1, 0, 2])]
)
def test_pair_losses_equal_the_nested_loop(pairs: str, teacher_sources: list[int], student_sources: list[int]) -> None:
    logits, targets = rows(len(student_sources), 3, 7), rows(len(teacher_sources), 3, 7, seed=1).softmax(-1)
    total, count = 0.0, 0
    for t, teacher_source in enumerate(teacher_sources):
        for s, student_source in enumerate(student_sources):
            same = teacher_source == student_source
            if pairs == "all" or same == (pairs == "same"):
                log_probabilities = (logits[s].double() / 0.1).log_softmax(-1)
                total += -(targets[t].double() * log_probabilities).sum(-1).mean().item()
                count += 1
    allowed = pair_matrix(torch.tensor(teacher_sources), torch.tensor(student_sources), pairs)  # type: ignore[arg-type]
    assert pair_losses(logits, targets, allowed, 0.1).sum().item() == pytest.approx(total / count, rel=1e-5)


def test_starting_value_is_ln_k_split_by_pairs() -> None:
    """Uniform outputs, 8 local crops: DINOv2's log shows local 16/18 ln K and global 2/18 ln K (dinov2#273)."""
    num_prototypes = 512
    uniform = torch.full((2, 4, num_prototypes), 1 / num_prototypes)
    allowed = pair_matrix(torch.arange(2), torch.arange(10), "other")
    losses = pair_losses(torch.zeros(10, 4, num_prototypes), uniform, allowed, 0.1)
    assert losses[:2].sum().item() == pytest.approx(2 / 18 * math.log(num_prototypes), rel=1e-5)
    assert losses[2:].sum().item() == pytest.approx(16 / 18 * math.log(num_prototypes), rel=1e-5)


# -- iBOT --------------------------------------------------------------------------------------------------------------


def ibot_outputs(masks: Tensor, dim: int = 6, num_prototypes: int = 5) -> tuple[Outputs, Ibot, Tensor, Tensor]:
    """An iBOT objective over given masks, with linear heads, and the logits it will see."""
    from ssl_platform.objectives._targets import Centering

    num_views, num_masks, batch_size, num_tokens = masks.shape
    student, teacher = Forward("student", "global", "block"), Forward("teacher", "global")
    student_patches = rows(num_views, num_masks, batch_size, num_tokens, dim)
    teacher_patches = rows(num_views, batch_size, num_tokens, dim, seed=1)
    heads = {"student": torch.nn.Linear(dim, num_prototypes), "teacher": torch.nn.Linear(dim, num_prototypes)}
    features = {
        student: Features(student_patches[..., 0, :], student_patches),
        teacher: Features(teacher_patches[..., 0, :], teacher_patches),
    }
    objective = Ibot(
        head="dino",
        teacher=teacher,
        student=student,
        targets=Centering(num_prototypes),
        student_temp=0.1,
        teacher_temp=lambda step: 0.05,
    )
    outputs = Outputs(features, {"dino": heads})
    return outputs, objective, heads["student"](student_patches), heads["teacher"](teacher_patches)


def ibot_loss(objective: Ibot, outputs: Outputs, masks: Tensor) -> Tensor:
    from ssl_platform.views import Batch, ViewGroup

    group = ViewGroup(torch.zeros(masks.shape[0], masks.shape[2], 1), torch.arange(masks.shape[0]), {"block": masks})
    batch_size = masks.shape[2]
    ids = torch.arange(batch_size)
    return objective.loss(outputs, Batch({"global": group}, ["key"] * batch_size, ids, ids, 0), 0).terms["loss"]


def test_ibot_equals_the_loop_and_unmasked_views_count() -> None:
    masks = torch.rand(2, 1, 4, 9, generator=torch.Generator().manual_seed(2)) < 0.4
    masks[0, 0, 1], masks[1, 0, 3] = False, False  # trap 6: these count in the denominator
    outputs, objective, student, teacher = ibot_outputs(masks)
    total = 0.0
    for view in range(2):
        for sample in range(4):
            hidden = masks[view, 0, sample].nonzero().flatten().tolist()
            for token in hidden:  # trap 5: the teacher's token of the same crop and place
                target = (teacher[view, sample, token].double() / 0.05).softmax(-1)
                log_probability = (student[view, 0, sample, token].double() / 0.1).log_softmax(-1)
                total += -(target * log_probability).sum().item() / len(hidden)
    assert ibot_loss(objective, outputs, masks).item() == pytest.approx(total / 8, rel=1e-5)


def test_ibot_without_masked_tokens_is_zero_and_trains() -> None:
    masks = torch.zeros(2, 1, 3, 9, dtype=torch.bool)
    outputs, objective, _, _ = ibot_outputs(masks)
    loss = ibot_loss(objective, outputs, masks)
    loss.backward()
    assert loss.item() == 0.0


# -- KoLeo -------------------------------------------------------------------------------------------------------------


def test_koleo_equals_the_loop() -> None:
    embeddings = rows(6, 5)
    unit = (embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)).tolist()
    logs = []
    for i, one in enumerate(unit):
        distances = [math.dist(one, other) for j, other in enumerate(unit) if j != i]
        logs.append(math.log(min(distances)))
    assert koleo(embeddings).item() == pytest.approx(-sum(logs) / 6, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_koleo_of_duplicates_is_finite_in_every_precision(dtype: torch.dtype) -> None:
    embeddings = rows(4, 384).to(dtype)
    embeddings[1] = embeddings[0]
    assert 0 < koleo(embeddings).item() < 20
    assert koleo(embeddings[:1]).item() == 0.0  # a batch of 1 has no neighbour


def test_koleo_spreads() -> None:
    """Sign: minimising it from a random start lowers the mean cosine."""
    embeddings = (rows(16, 8) + 3).requires_grad_()

    def mean_cosine() -> float:
        unit = torch.nn.functional.normalize(embeddings.detach(), dim=-1)
        return ((unit @ unit.T).sum() - 16).item() / 240

    before = mean_cosine()
    optimizer = torch.optim.SGD([embeddings], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        koleo(embeddings).backward()
        optimizer.step()
    assert mean_cosine() < before - 0.1


# -- the traps ---------------------------------------------------------------------------------------------------------


def test_trap_1_views_and_samples_are_axes() -> None:
    samples = [
        {"global": SampleViews(torch.full((2, 1), float(10 * i)) + torch.arange(2)[:, None], torch.arange(2))}
        for i in range(3)
    ]
    views = (
        collate(samples, keys=list("abc"), ids=torch.arange(3), labels=torch.arange(3), step=0).groups["global"].views
    )
    assert views[:, :, 0].tolist() == [[0.0, 10.0, 20.0], [1.0, 11.0, 21.0]]


def test_trap_2_teacher_never_drops_paths_student_does() -> None:
    model = engine.model(networks=with_drop_path())
    views = engine.batch().groups["global"].views
    student, teacher = model.networks["student"], model.networks["teacher"]

    def twice(network: torch.nn.Module) -> bool:
        return torch.equal(*(network([Input(views)])[0].cls for _ in range(2)))

    assert model.training and twice(teacher) and not twice(student)
    model.train()
    assert twice(teacher), "train() of the whole must leave the teacher in eval mode"
    assert all(not parameter.requires_grad for parameter in teacher.parameters())


def with_drop_path() -> dict[str, dict[str, object]]:
    return {"student": {"backbone": engine.VIT | {"drop_path": 0.5}}, "teacher": {"update": "ema", "of": "student"}}


def test_trap_3_teacher_starts_as_an_exact_copy_heads_too() -> None:
    model = engine.model()
    pairs = [(model.networks["student"], model.networks["teacher"])]
    pairs += [(copies["student"], copies["teacher"]) for copies in model.heads.values()]  # type: ignore[index]
    assert len(pairs) == 2
    for student, teacher in pairs:
        for name, value in student.state_dict().items():
            assert torch.equal(value, teacher.state_dict()[name]), name
            assert value.data_ptr() != teacher.state_dict()[name].data_ptr()


def test_trap_4_only_the_students_global_views_are_masked() -> None:
    model = engine.model()
    requests = [request for objective in model.objectives.values() for request in objective.requests(0)]  # type: ignore[operator]
    masked = {(request.network, request.group) for request in requests if request.masks}
    assert masked == {("student", "global")}
    assert {request for request in requests if request.network == "teacher"} == {Forward("teacher", "global")}
    assert len(set(requests)) == 3, "DINO, iBOT and KoLeo share their forward passes"


def test_trap_5_dino_compares_other_crops() -> None:
    objective = engine.model().objective("dino")
    assert isinstance(objective, Dino)
    assert pair_matrix(torch.arange(2), torch.arange(4), objective.pairs).tolist() == [
        [False, True, True, True],
        [True, False, True, True],
    ]


def test_trap_7_koleo_is_pre_head_and_over_both_crops() -> None:
    cls = rows(2, 1, 4, 6)  # (V, M, B, D)
    request = Forward("student", "global", "block")
    loss = Koleo(request, everywhere=False).loss(Outputs({request: Features(cls, cls)}, {}), engine.batch(), 0)
    assert loss.terms["loss"].item() == pytest.approx((koleo(cls[0, 0]) + koleo(cls[1, 0])).item())


def test_trap_8_a_shared_head_is_one_module_with_two_centers() -> None:
    model = engine.model()
    dino, ibot = model.objective("dino"), model.objective("ibot")
    assert isinstance(dino, Dino) and isinstance(ibot, Ibot) and dino.head == ibot.head
    assert dino.targets.center.data_ptr() != ibot.targets.center.data_ptr()  # type: ignore[union-attr, operator]
    parts = engine.parts()
    train_step(parts, iter([engine.batch()]), 0, ["dino", "ibot", "koleo"])
    centers = [parts.student_teacher.objective(name).targets.center for name in ("dino", "ibot")]  # type: ignore[union-attr]
    assert not torch.equal(*centers)  # type: ignore[call-overload]


def test_trap_9_each_objective_has_its_own_teacher_temperature() -> None:
    linear = {"schedule": "linear", "start": 0.04, "end": 0.07, "over_steps": 4}
    model = engine.model(objectives={"dino": engine.DINO, "ibot": engine.IBOT | {"teacher_temp": linear}})
    assert [model.objective("dino").teacher_temp(step) for step in (0, 3)] == [0.04, 0.04]  # type: ignore[operator]
    assert [model.objective("ibot").teacher_temp(step) for step in (0, 3, 9)] == pytest.approx([0.04, 0.07, 0.07])  # type: ignore[operator]


def test_trap_11_the_last_layer_is_frozen_for_steps_by_lr_0() -> None:
    parts = engine.parts(optim={"lr": 0.01, "freeze_last_layer_steps": 2})
    last = dict(parts.student_teacher.named_parameters())["heads.dino.student.last_layer.weight_v"]
    values = [last.detach().clone()]
    for step in range(3):
        train_step(parts, iter([engine.batch(step)]), step, ["dino", "ibot"])
        values.append(last.detach().clone())
    assert torch.equal(values[0], values[2]) and not torch.equal(values[2], values[3])
    assert parts.optimizer.state[last]["step"].item() == 3, "Adam's moments build up meanwhile"


def test_trap_14_features_are_normalised_and_patches_exclude_registers() -> None:
    backbone = engine.VIT | {"num_registers": 3}
    model = engine.model(networks={"student": {"backbone": backbone}, "teacher": {"update": "ema", "of": "student"}})
    features = model.networks["teacher"]([Input(engine.batch().groups["global"].views)])[0]
    assert features.patches.shape == (2, 4, 4, 16)
    assert features.registers is not None and features.registers.shape == (2, 4, 3, 16)
    for tokens in (features.cls, features.patches):  # the final layer norm starts with weight 1 and bias 0
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(tokens.shape[:-1]), atol=1e-5, rtol=0)
