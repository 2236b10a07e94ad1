"""One optimiser step: accumulation, averages, bad numbers, seeds."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_platform import distributed
from ssl_platform.data.order import Order
from ssl_platform.log import Metrics
from ssl_platform.mishaps import keep_count
from ssl_platform.monitors import Monitor
from ssl_platform.objectives._targets import Centering, Sinkhorn
from ssl_platform.objectives.koleo import koleo
from ssl_platform.progress import Clock
from ssl_platform.run_folder import Run, TrainingStopped, report
from ssl_platform.step import StepResult, model_seed, train_step
from tests import engine
from tests.ranks import run_ranks

ALL = ["dino", "ibot", "koleo"]


def state(parts: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in parts.student_teacher.state_dict().items()}


def gradients_of(parts: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Keeps the gradients that the optimiser sees."""
    seen: dict[str, torch.Tensor] = {}
    step = parts.optimizer.step

    def spy() -> None:
        for name, parameter in parts.student_teacher.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()
        step()

    monkeypatch.setattr(parts.optimizer, "step", spy)
    return seen


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_with_centering_equals_the_large_batch(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, so that the second uses centers and averages that the first left behind. KoLeo off."""
    objectives = {"objectives": {"dino": engine.DINO, "ibot": engine.IBOT}}
    whole, accumulated = (
        engine.parts(batch_size=8, **objectives),
        engine.parts(batch_size=8, accumulate=pieces, **objectives),
    )
    seen = [gradients_of(parts, monkeypatch) for parts in (whole, accumulated)]
    for step in range(2):
        batch = engine.batch(step, size=8)
        one = train_step(whole, iter([batch]), step, ["dino", "ibot"])
        many = train_step(accumulated, iter(engine.split(batch, pieces)), step, ["dino", "ibot"])
        assert many.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
        for name, term in one.terms.items():
            assert many.terms[name].item() == pytest.approx(term.item(), rel=1e-5), name
        for name, norm in one.grad_norms.items():
            assert many.grad_norms[name].item() == pytest.approx(norm.item(), rel=1e-5), name
        if step == 0:  # after it Adam has divided tiny gradients by themselves
            for name, gradient in seen[0].items():
                torch.testing.assert_close(seen[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        whole.student_teacher.load_state_dict(copy.deepcopy(accumulated.student_teacher.state_dict()))
    for name in ("dino", "ibot"):
        centers = [parts.student_teacher.objective(name).targets.center for parts in (whole, accumulated)]
        torch.testing.assert_close(*centers, rtol=1e-5, atol=1e-7)


def test_sinkhorn_and_koleo_see_micro_batches() -> None:
    """Documented: their value under accumulation is the mean of what each micro-batch gives by itself."""
    objectives = {"dino": engine.DINO | {"targets": "sinkhorn"}, "koleo": engine.KOLEO}
    parts = engine.parts(batch_size=8, accumulate=2, objectives=objectives)
    micro_batches = engine.split(engine.batch(size=8), 2)
    expected = [reference(parts.student_teacher, batch) for batch in micro_batches]
    result = train_step(parts, iter(micro_batches), 0, ["dino", "koleo"])
    assert result.terms["dino_global"].item() + result.terms["dino_local"].item() == pytest.approx(
        sum(dino for dino, _ in expected) / 2, rel=1e-5
    )
    assert result.terms["koleo"].item() == pytest.approx(sum(spread for _, spread in expected) / 2, rel=1e-5)


def reference(model: Any, batch: Any) -> tuple[float, float]:
    """DINO by its nested loop, and KoLeo, of one micro-batch."""
    from ssl_platform.backbones import Input

    group = batch.groups["global"]
    with torch.no_grad():
        [masked, local] = model.networks["student"](
            [Input(group.views, group.masks["block"]), Input(batch.groups["local"].views)]
        )
        teacher = model.networks["teacher"]([Input(group.views)])[0].cls
        students = [*masked.cls[:, 0], *local.cls]
        targets = Sinkhorn(3)(model.heads["dino"]["teacher"](teacher).flatten(0, 1), 0.04).unflatten(0, (2, -1))
        total = 0.0
        for t in range(2):
            for s in range(4):
                if s != t:
                    log_probabilities = (model.heads["dino"]["student"](students[s]) / 0.1).log_softmax(-1)
                    total += -(targets[t] * log_probabilities).sum(-1).mean().item()
        return total / 6, sum(koleo(view).item() for view in masked.cls[:, 0])


def test_one_average_and_one_commit_per_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = engine.parts(batch_size=8, accumulate=4)
    commits: list[int] = []
    monkeypatch.setattr(Centering, "commit", lambda self, pending: commits.append(len(pending)))
    before = state(parts)
    train_step(parts, iter(engine.split(engine.batch(size=8), 4)), 0, ALL)
    assert commits == [4, 4], "DINO's and iBOT's centers, each once, with all four micro-batches"
    after = state(parts)
    for name, old in before.items():
        if name.startswith("networks.teacher."):
            student = after[name.replace("teacher", "student")]
            torch.testing.assert_close(after[name], 0.9 * old + 0.1 * student, msg=name)
    assert any(not torch.equal(old, after[name]) for name, old in before.items() if "teacher" in name)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = engine.parts()
    train_step(parts, iter([engine.batch(0)]), 0, ALL)
    before, moments = state(parts), copy.deepcopy(parts.optimizer.state_dict()["state"])
    batch = engine.batch(1)
    if bad == "loss":
        batch.groups["local"].views[0, 1, 0, 0, 0] = torch.nan
    else:
        weight = parts.student_teacher.networks["student"].blocks[0].mlp.fc1.weight
        hook = weight.register_hook(lambda gradient: gradient * torch.inf)
    result = train_step(parts, iter([batch]), 1, ALL)
    assert result.skipped and result.keys == batch.keys
    assert torch.isfinite(result.loss) == (bad == "gradient")
    for name, value in state(parts).items():
        assert torch.equal(value, before[name]), name
    for index, entry in parts.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[index][key]) for key, value in entry.items())
    if bad == "gradient":
        hook.remove()
    assert not train_step(parts, iter([engine.batch(2)]), 2, ALL).skipped, "the next step goes on"


def metrics_with_masks_on_one_rank_only(folder: str) -> dict[str, float | None]:
    parts, recipe = engine.parts(), engine.recipe(run_dir=folder, tensorboard=False)
    parts.module = distributed.wrap(parts.student_teacher, torch.device("cpu"))
    batch = engine.batch(masked=0.5 * distributed.rank())
    result = train_step(parts, iter([batch]), 0, ALL)
    metrics, monitor = Metrics(Path(folder), 0, tensorboard=False), Monitor(recipe, parts)
    order = Order.of_shards([8], 0, 1)
    unused: Any = None
    report(Run(recipe, unused, order, unused, parts, metrics, unused, monitor, unused), result, Clock(4), 1, ALL)
    distributed.barrier()
    line: dict[str, float | None] = json.loads((Path(folder) / "metrics.jsonl").read_text())
    return line | {"mine": result.metrics["ibot_kl"].item()}


def test_a_rank_without_masked_tokens_reports_with_the_others(tmp_path: Path) -> None:
    zero, one = run_ranks(2, metrics_with_masks_on_one_rank_only, str(tmp_path))
    assert math.isnan(zero["mine"]) and zero["ibot_kl"] == pytest.approx(one["mine"]) and zero["dino_kl"] is not None


def test_metrics_are_json_even_where_a_loss_is_not_finite(tmp_path: Path) -> None:
    Metrics(tmp_path, 0, tensorboard=False).write(1, {"loss": math.nan, "lr": math.inf, "dino": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "lr": None, "dino": 2.0}


def bad_on_rank_one() -> tuple[bool, bool, list[str]]:
    parts = engine.parts()
    parts.module = distributed.wrap(parts.student_teacher, torch.device("cpu"))
    before = state(parts)
    batch = engine.batch(distributed.rank())
    if distributed.rank() == 1:
        batch.groups["global"].views[0, 0] = torch.inf
    result = train_step(parts, iter([batch]), 0, ALL)
    same = all(torch.equal(value, before[name]) for name, value in state(parts).items())
    return result.skipped, same, result.keys


def test_ranks_skip_together() -> None:
    results = run_ranks(2, bad_on_rank_one)
    assert [(skipped, same) for skipped, same, _ in results] == [(True, True), (True, True)]
    assert results[1][2] == ["sample1-0", "sample1-1", "sample1-2", "sample1-3"]
    assert results[0][2] == [], "its gradients are not finite either, but its loss is"


def test_skipped_steps_are_counted_recorded_and_limited(tmp_path: Path) -> None:
    parts, recipe = engine.parts(), engine.recipe(run_dir=str(tmp_path), max_skipped_steps=1)
    zero = torch.zeros(())
    result = StepResult(zero, {}, {}, {}, keys=["a", "b"], replaced=[], num_replaced=0, filtered=0, skipped=True)
    keep_count(recipe, parts, result, 5)
    assert parts.counters["skipped_steps"] == 1
    assert json.loads((tmp_path / "events.jsonl").read_text()) == {
        "step": 5,
        "event": "not_finite",
        "keys_by_rank": {"0": ["a", "b"]},
    }
    with pytest.raises(TrainingStopped, match=r"step 6: 2 steps were not finite.*events.jsonl.*optim.lr") as stopped:
        keep_count(recipe, parts, result, 6)
    assert "precision" not in str(stopped.value), "it is fp32"
    with pytest.raises(TrainingStopped, match=r"longer warm-up or precision=fp32, and look"):
        keep_count(recipe.model_copy(update={"precision": "bf16"}), parts, result, 7)


def test_replaced_samples_are_counted_recorded_and_limited(tmp_path: Path) -> None:
    parts = engine.parts()
    recipe = engine.recipe(run_dir=str(tmp_path), data={"shards": "unused", "max_bad_samples": 2})

    def result(*replaced: str) -> StepResult:
        zero = torch.zeros(())
        number = len(replaced)
        return StepResult(zero, {}, {}, {}, [], list(replaced), num_replaced=number, filtered=3, skipped=False)

    keep_count(recipe, parts, result("0.tar: x: broken", "0.tar: y: broken"), 1)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2
    keep_count(recipe, parts, result("0.tar: x: broken"), 2)  # the same one, an epoch later
    assert parts.counters == {"skipped_steps": 0, "replaced_samples": 3, "filtered_samples": 6}
    with pytest.raises(TrainingStopped, match="3 samples could not be used, more than data.max_bad_samples=2"):
        keep_count(recipe, parts, result("0.tar: z: broken"), 3)


def test_seeds_of_forward_passes_differ_and_repeat() -> None:
    seeds = {
        (s, t, m, r): model_seed(s, t, m, r) for s in range(3) for t in range(5) for m in range(3) for r in range(4)
    }
    assert len(set(seeds.values())) == len(seeds)
    assert model_seed(1, 2, 0, 1) == seeds[1, 2, 0, 1]


def test_bf16_keeps_weights_averages_and_losses_in_float32() -> None:
    parts = engine.parts(precision="bf16")
    result = train_step(parts, iter([engine.batch()]), 0, ALL)
    assert not result.skipped and result.loss.dtype == torch.float32
    assert {value.dtype for value in state(parts).values()} == {torch.float32}
    full = train_step(engine.parts(), iter([engine.batch()]), 0, ALL)
    for name, term in full.terms.items():
        assert result.terms[name].item() == pytest.approx(term.item(), rel=0.05), name
    assert any(result.terms[name].item() != term.item() for name, term in full.terms.items()), "autocast must be on"
