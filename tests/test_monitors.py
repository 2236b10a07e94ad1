"""Figures of health against written-out references; watching leaves training as it is; collapses provoked for real."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_platform import distributed
from ssl_platform.config import ConfigError
from ssl_platform.monitors import OF_THE_MACHINE, POOL, POOLED, Monitor, prototype_figures, token_figures
from ssl_platform.step import train_step
from ssl_platform.train import main
from tests import engine
from tests.ranks import run_ranks

SMOKE = Path(__file__).parents[1] / "configs" / "smoke"
ALL = ["dino", "ibot", "koleo"]

# -- figures -----------------------------------------------------------------------------------------------------------


def reference(tokens: np.ndarray) -> dict[str, float]:
    """Float64, by the definitions: all pairs, and the singular values themselves."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    num, dim = unit.shape
    pairs = [float(unit[i] @ unit[j]) for i in range(num) for j in range(num) if i != j]
    values = np.linalg.svd(tokens, compute_uv=False)
    shares = [value / values.sum() for value in values if value > 1e-7 * values.max()]
    rank = math.exp(-sum(share * math.log(share) for share in shares))
    spread = np.mean([np.sqrt(np.mean((unit[:, d] - unit[:, d].mean()) ** 2)) for d in range(dim)])
    return {
        "feature_std": spread * math.sqrt(dim),
        "cosine": float(np.mean(pairs)),
        "rankme": rank,
        "rank_share": rank / min(num, dim),
    }


@given(st.integers(2, 40), st.integers(1, 40), st.floats(0, 20), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_token_figures_equal_the_reference(num: int, dim: int, offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = (rng.normal(size=(num, dim)) * rng.exponential(size=dim) + offset).astype(np.float32)
    found, expected = token_figures(torch.from_numpy(tokens)), reference(tokens.astype(np.float64))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_token_figures_of_known_cases() -> None:
    spread = token_figures(torch.eye(24) * 3)
    assert spread["rankme"] == pytest.approx(24) and spread["cosine"] == pytest.approx(0)
    alike = token_figures(torch.ones(100, 16))
    assert alike["rankme"] == pytest.approx(1) and alike["cosine"] == pytest.approx(1) and alike["feature_std"] < 1e-6
    torch.manual_seed(0)
    sphere = token_figures(torch.randn(512, 64))
    assert sphere["feature_std"] == pytest.approx(1, abs=0.02) and sphere["rank_share"] > 0.9
    plane = token_figures(torch.randn(512, 2) @ torch.randn(2, 64))
    assert plane["rankme"] < 2.001
    assert token_figures(torch.zeros(4, 3))["feature_std"] == 0, "no nan where nothing is"


@given(st.integers(2, 60), st.integers(1, 80), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_prototype_figures_equal_the_reference(num_prototypes: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assignments = rng.dirichlet(np.full(num_prototypes, 0.05) + 1e-3, rows)
    mean = assignments.mean(0)
    used = sum(share > 0.1 / num_prototypes for share in mean)
    entropy = -sum(share * math.log(share) for share in mean if share > 0)
    found = prototype_figures(torch.from_numpy(assignments).float().sum(0), rows)
    assert found["prototype_usage"] == pytest.approx(min(used / min(rows, num_prototypes), 1))
    assert found["prototype_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-4)


def test_prototype_figures_of_known_cases() -> None:
    assert prototype_figures(torch.ones(64), 128)["prototype_perplexity"] == pytest.approx(64)
    one = prototype_figures(torch.tensor([0.0, 50.0, 0.0, 0.0]), 50)
    assert one == {"prototype_usage": 0.25, "prototype_perplexity": pytest.approx(1)}


# -- watching ----------------------------------------------------------------------------------------------------------


def watched(monitor: Monitor, parts: Any, steps: int, size: int = 4, active: list[str] = ALL) -> None:
    for step in range(steps):
        with monitor.watching(step, active):
            result = train_step(parts, iter([engine.batch(step, size=size)]), step, active)
        monitor.keep(result.skipped)


def hooks_of(module: nn.Module) -> int:
    return sum(len(inner._forward_hooks) for inner in module.modules())


def test_tokens_and_assignments_are_those_that_training_saw() -> None:
    """One view of every sample of both networks, and the mean of the teacher's targets, over two steps."""
    parts, recipe = engine.parts(), engine.recipe(log_every=2, monitor_every=2)
    monitor = Monitor(recipe, parts)
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": [], "targets": []}
    model = parts.student_teacher
    for name in ("teacher", "student"):
        model.networks[name].register_forward_hook(lambda m, a, out, name=name: seen[name].append(out[0].cls))
    model.objective("dino").targets.register_forward_hook(lambda m, a, out: seen["targets"].append(out))
    watched(monitor, parts, 2)
    figures = monitor.signals()
    assert figures["pooled_samples"] == 8
    for name, view in (("teacher", lambda cls: cls[0]), ("student", lambda cls: cls[0, 0])):
        tokens = torch.cat([view(cls.detach()) for cls in seen[name]]).numpy()
        for key, value in reference(tokens.astype(np.float64)).items():
            assert figures[f"{name}_{key}"] == pytest.approx(value, rel=1e-4), (name, key)
    mean = torch.cat(seen["targets"]).double().mean(0)
    perplexity = torch.special.entr(mean).sum().exp().item()
    assert figures["dino_prototype_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert figures["ibot_prototype_perplexity"] > 1


def test_the_pool_is_bounded_and_holds_the_latest() -> None:
    parts, recipe = engine.parts(batch_size=200), engine.recipe(batch_size=200, log_every=1, monitor_every=1)
    monitor = Monitor(recipe, parts)
    monitor._new_tokens = [("student", torch.full((200, 3), float(step))) for step in range(10)]
    monitor.keep(skipped=False)
    assert [float(tokens[0, 0]) for tokens in monitor._tokens["student"]] == [7, 8, 9]
    assert POOL <= monitor.signals()["pooled_samples"] < POOL + 200


def test_only_the_steps_before_a_signal_are_watched() -> None:
    parts, recipe = engine.parts(), engine.recipe(steps=1000, batch_size=64, log_every=20, monitor_every=20)
    monitor = Monitor(recipe, parts)
    monitor.flops[tuple(ALL)] = 1
    during = []
    for step in range(40):
        with monitor.watching(step, ALL):
            during.append(hooks_of(parts.student_teacher) > 0)
        assert hooks_of(parts.student_teacher) == 0
    assert during == ([False] * 12 + [True] * 8) * 2, "512 samples are 8 batches of 64"
    off = Monitor(engine.recipe(log_every=1, monitor_every=0), parts)
    assert not any(off.due(step) for step in range(1, 100))


def test_a_skipped_step_leaves_no_trace() -> None:
    parts, recipe = engine.parts(), engine.recipe(log_every=1, monitor_every=1)
    monitor = Monitor(recipe, parts)
    watched(monitor, parts, 1)
    bad = engine.batch(1)
    bad.groups["global"].views[0, 1] = torch.nan
    with monitor.watching(1, ALL):
        result = train_step(parts, iter([bad]), 1, ALL)
    monitor.keep(result.skipped)
    figures = monitor.signals()
    assert result.skipped and figures["pooled_samples"] == 4
    assert all(math.isfinite(value) for value in figures.values())


def counting(method: Any, reads: list[int]) -> Any:
    def counted(self: Tensor, *arguments: Any, **keywords: Any) -> Any:
        reads.append(1)
        return method(self, *arguments, **keywords)

    return counted


def test_watching_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between lines no value is read back: as many reads with hooks on as without."""
    counts = []
    for every in (0, 1):
        parts, recipe = engine.parts(), engine.recipe(log_every=1, monitor_every=every)
        monitor = Monitor(recipe, parts)
        reads: list[int] = []
        with monkeypatch.context() as patched:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
                patched.setattr(Tensor, name, counting(getattr(Tensor, name), reads))
            watched(monitor, parts, 3)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


def signals_of_ranks(masked_everywhere: bool) -> dict[str, float]:
    parts, recipe = engine.parts(batch_size=8), engine.recipe(batch_size=8, log_every=1, monitor_every=1)
    parts.module = distributed.wrap(parts.student_teacher, torch.device("cpu"))
    whole = engine.batch(3, size=8, masked=0.5)
    mine = engine.split(whole, 2)[distributed.rank()]
    if distributed.rank() and not masked_everywhere:
        mine.groups["global"].masks["block"][:] = False
    monitor = Monitor(recipe, parts)
    with monitor.watching(0, ALL):
        monitor.keep(train_step(parts, iter([mine]), 0, ALL).skipped)
    return monitor.signals()


def test_two_ranks_agree_and_equal_one_process() -> None:
    zero, one = run_ranks(2, signals_of_ranks, True)
    assert zero == one and zero["pooled_samples"] == 8
    parts, recipe = engine.parts(batch_size=8), engine.recipe(batch_size=8, log_every=1, monitor_every=1)
    monitor = Monitor(recipe, parts)
    with monitor.watching(0, ALL):
        monitor.keep(train_step(parts, iter([engine.batch(3, size=8, masked=0.5)]), 0, ALL).skipped)
    alone = monitor.signals()
    assert alone.keys() == zero.keys()
    for name, value in alone.items():
        assert zero[name] == pytest.approx(value, rel=1e-4), name


def test_a_rank_without_masked_tokens_does_not_hang_the_others() -> None:
    zero, one = run_ranks(2, signals_of_ranks, False)
    assert zero == one and math.isfinite(zero["ibot_prototype_perplexity"])


def test_mfu_is_flops_over_time_and_peak() -> None:
    parts, recipe = engine.parts(), engine.recipe(log_every=1, monitor_every=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_platform.flops.matmul_rate", lambda dtype, device: 1e9)
        monitor = Monitor(recipe, parts)
    assert "mfu" not in monitor.speed(ALL, 8.0), "nothing counted yet"
    watched(monitor, parts, 2)
    assert monitor.speed(ALL, 8.0)["mfu"] == pytest.approx(monitor.flops[tuple(ALL)] * 2 / 1e9)  # 8 samples/s, batch 4
    assert 0.05 < monitor.speed(ALL, 8.0)["memory_gb"] < 100
    timm = {"student": {"backbone": {"name": "timm_models", "model": "vit_tiny_patch16_224"}}}
    modality = {"name": "image", "crops": {"global": {"size": 32}, "local": {"num": 0}}}
    changes: dict[str, Any] = {
        "networks": timm,
        "heads": {},
        "modality": modality,
        "objectives": {"koleo": {"name": "koleo"}},
    }
    uncounted = Monitor(engine.recipe(**changes), engine.parts(**changes))
    assert uncounted.peak is None and "mfu" not in uncounted.speed(["koleo"], 8.0)


# -- whole runs --------------------------------------------------------------------------------------------------------


def run(folder: Path, config: str, *overrides: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines and the warnings of a run through the command."""
    arguments = [f"run_dir={folder}", "tensorboard=false", "save_every=1000", *overrides]
    assert main([str(SMOKE / config), *arguments]) == 0
    read = [
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in (folder / "metrics.jsonl", folder / "events.jsonl")
    ]
    return read[0], [event for event in read[1] if event["event"] in ("warning", "cleared")]


QUICK = ["modality.crops.local.num=0", "objectives.dino.student_groups=[global]", "modality.stain=null"]
QUICK += ["modality.color_jitter.probability=0.0", "log_every=10", "monitor_every=10", "steps=120"]
PROVOKED = [*QUICK, "objectives.koleo.weight=0.0"]


def test_collapse_to_uniform_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No sharpening: the teacher is softer than the student, and centering takes what is left."""
    soft = ["objectives.dino.teacher_temp=0.3", "objectives.ibot.teacher_temp=0.3"]
    lines, warnings = run(tmp_path, "pathology.yaml", *PROVOKED, *soft)
    assert lines[-1]["dino_teacher_entropy"] > 0.99 * math.log(64)
    first = warnings[0]
    assert first["warning"] == "uniform" and first["subject"] == "dino" and first["step"] < 80
    for word in (
        "collapse to uniform (dino)",
        "ln K",
        "4.1589 for 64 prototypes",
        "teacher_temp (now 0.3",
        "mean cosine",
    ):
        assert word in first["message"], first["message"]
    assert {event["warning"] for event in warnings} == {"uniform"}, "one warning for one cause"
    assert len({event["subject"] for event in warnings}) == len(warnings), "each once"
    assert f"WARNING step {first['step']}: {first['message']}" in capsys.readouterr().err
    _, resumed = run(tmp_path, "pathology.yaml", *PROVOKED, *soft, "steps=150")
    assert resumed[: len(warnings)] == warnings, "a resumed run does not repeat what it has said"
    assert [event["subject"] for event in resumed].count("dino") == 1


def test_collapse_to_one_prototype_is_told(tmp_path: Path) -> None:
    """A sharp teacher, and a center that never moves."""
    still = [
        f"objectives.{name}.{key}"
        for name in ("dino", "ibot")
        for key in ("teacher_temp=0.01", "center_momentum=0.9999999")
    ]
    lines, warnings = run(tmp_path, "pathology.yaml", *PROVOKED, *still)
    assert lines[-1]["dino_prototype_perplexity"] < 2 and lines[-1]["dino_teacher_entropy"] < 0.5
    assert {event["warning"] for event in warnings} == {"one-prototype"}
    message = next(event["message"] for event in warnings if event["subject"] == "dino")
    for word in (
        "collapse to one prototype (dino)",
        "of 64 prototypes",
        "targets: sinkhorn",
        "docs/health.md#one-prototype",
    ):
        assert word in message, message


@pytest.mark.parametrize("config", ["pathology.yaml", "image.yaml"])
def test_healthy_runs_raise_nothing(config: str, tmp_path: Path) -> None:
    _, warnings = run(tmp_path, config, "log_every=4", "monitor_every=4", "steps=100")
    assert warnings == []


def test_watching_changes_no_bit_of_training_and_a_resume_no_figure_that_is_not_pooled(tmp_path: Path) -> None:
    common = ["steps=12", "log_every=2", "accumulate=2"]
    seen, _ = run(tmp_path / "seen", "image.yaml", *common, "monitor_every=2")
    unseen, _ = run(tmp_path / "unseen", "image.yaml", *common, "monitor_every=0")
    models = [load_file(tmp_path / name / "checkpoints/step_00000012/model.safetensors") for name in ("seen", "unseen")]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    for ours, theirs in zip(seen, unseen, strict=True):
        left = {key for key in ours.keys() - theirs.keys() if not key.endswith(POOLED)}
        assert not left and theirs.keys() <= ours.keys()
        assert all(ours[key] == value for key, value in theirs.items() if key not in OF_THE_MACHINE)
    assert seen[-1]["pooled_samples"] == 12 * 8 and "pooled_samples" not in unseen[-1]


def test_every_line_has_what_the_docs_promise(tmp_path: Path) -> None:
    lines, _ = run(tmp_path, "pathology.yaml", "steps=4", "log_every=2", "monitor_every=4")
    for line in lines:
        for key in ("loss", "dino_global", "ibot", "koleo", "dino_teacher_entropy", "ibot_kl", "grad_norm_student"):
            assert key in line
        for key in (
            "lr",
            "weight_decay",
            "teacher_momentum",
            "dino_teacher_temp",
            "samples_per_second",
            *OF_THE_MACHINE[:4],
        ):
            assert line[key] >= 0
    assert ["teacher_rankme" in line for line in lines] == [False, True]


def test_intervals_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="monitor_every: 25 is not a multiple of log_every 10; use 20 or 30"):
        engine.recipe(monitor_every=25)
    assert engine.recipe(monitor_every=0).signal_interval == 0
    assert engine.recipe(log_every=7).signal_interval == 70
