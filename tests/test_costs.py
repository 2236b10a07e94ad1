"""What a run is said to cost, against torch's own counters, real checkpoints and real collectives."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_platform import costs, distributed
from ssl_platform.config import ConfigError
from ssl_platform.estimate import calculate, check_start, costs_report, random_batch
from ssl_platform.recipe import Recipe, load_recipe
from ssl_platform.step import build, train_step
from ssl_platform.train import main
from tests import engine
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs/smoke/image.yaml"
sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling  # noqa: E402


def counted_by_torch(recipe: Recipe) -> int:
    """Operations of a real forward and backward pass, under the attention kernel that the counter can see into."""
    modality = recipe.modality.build(None)
    model = build(recipe, modality, 1, torch.device("cpu")).student_teacher
    masks = {name: config.build() for name, config in recipe.masks.items()}
    batch = random_batch(modality, masks, recipe.batch_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, 0, list(recipe.objectives)).loss.backward()
    return int(counter.get_total_flops())


IMAGE = {"name": "image", "patch_size": 8, "crops": {"global": {"size": 32}, "local": {"num": 3, "size": 16}}}


def networks(**backbone: Any) -> dict[str, Any]:
    return {"student": {"backbone": backbone}, "teacher": {"update": "ema", "of": "student", "mode": "train"}}


def by_timm(model: str) -> dict[str, Any]:
    modality = IMAGE | {"crops": {"global": {"size": 64}, "local": {"num": 1, "size": 32}}}
    objectives = {"dino": engine.DINO | {"masks": {}}}
    return {
        "modality": modality,
        "masks": {},
        "networks": networks(name="timm_models", model=model),
        "objectives": objectives,
    }


SHARED = {"dino": engine.DINO, "ibot": engine.IBOT}
VERSIONS = {"block": {"name": "random", "ratio": [0.5, 0.5], "probability": 1.0, "num_masks": 2}}


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {
            "modality": IMAGE,
            "masks": VERSIONS,
            "networks": networks(**engine.VIT, num_registers=2, drop_path=0.3, ffn="swiglu"),
        },
        {"objectives": {"dino": engine.DINO | {"mode": "drop", "targets": "sinkhorn"}}, "masks": VERSIONS},
        by_timm("test_vit"),
        pytest.param(by_timm("test_convnext"), marks=pytest.mark.slow),
        pytest.param(by_timm("test_efficientnet"), marks=pytest.mark.slow),
        pytest.param({"networks": networks(**(engine.VIT | {"layer_scale": 1e-5}))}, marks=pytest.mark.slow),
    ],
    ids=["bf16", "registers to local", "left out", "timm", "convnext", "efficientnet", "layer scale"],
)
def test_flops_equal_torchs_counter(changes: dict[str, Any]) -> None:
    recipe = engine.recipe(**changes)
    facts = calculate(recipe, recipe.modality.build(None), 1)
    assert facts.flops == counted_by_torch(recipe) > 0
    assert sum(facts.flops_by_part.values()) in (facts.flops, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"modality": IMAGE, "masks": {}, "objectives": {"dino": engine.DINO | {"masks": {}}}}]
)
def test_recomputed_flops_equal_torchs_counter(changes: dict[str, Any]) -> None:
    plain, recipe = engine.recipe(**changes), engine.recipe(recompute=True, **changes)
    once, facts = (calculate(one, one.modality.build(None), 1) for one in (plain, recipe))
    assert once.recomputed_flops == 0 and once.flops == facts.flops == counted_by_torch(plain)
    assert facts.recomputed_flops == counted_by_torch(recipe) - counted_by_torch(plain) > 0.1 * facts.flops
    assert once._replace(recomputed_flops=facts.recomputed_flops) == facts, "nothing else depends on it"


@pytest.mark.slow
def test_the_time_counts_what_is_recomputed() -> None:
    def said(*changes: str) -> tuple[str, float]:
        recipe = load_recipe(SMOKE, ["networks.student.backbone.depth=4", *changes])
        text = costs_report(recipe, assumed, calculate(recipe, recipe.modality.build(None), 1), 1.0)
        (seconds,) = re.findall(r" steps x (\S+) s,", text)
        return text, float(seconds)

    assumed = costs.Assumptions(gpus=1)
    (plain, seconds), (text, longer) = said(), said("recompute=true")
    (more,) = re.findall(r"recomputed +(\d+)% more", text)
    assert longer / seconds == pytest.approx(1 + int(more) / 100, rel=0.02) and int(more) > 5
    assert "% more" not in plain


def test_parameters_are_counted_and_recomputing_blocks_keeps_less() -> None:
    recipe = engine.recipe(modality=IMAGE, networks={"student": {"backbone": engine.VIT | {"depth": 4}}} | {
        "teacher": {"update": "ema", "of": "student"}
    })  # fmt: skip
    state = torch.get_rng_state()
    plain = calculate(recipe, recipe.modality.build(None), 1)
    assert plain.recomputed_activations_bytes < 0.8 * plain.activations_bytes
    assert torch.equal(torch.get_rng_state(), state)
    parameters = build(recipe, recipe.modality.build(None), 1, torch.device("cpu")).trained.values()
    assert plain.trained == sum(p.numel() for ps in parameters for p in ps)
    assert plain.trained_bytes == 4 * plain.trained == plain.followers_bytes
    assert plain.moments_bytes == 8 * plain.trained + 4 * sum(map(len, parameters))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_size_of_a_real_checkpoint(tmp_path: Path, optimizer: str) -> None:
    overrides = [f"run_dir={tmp_path}", "steps=1", f"optim.name={optimizer}", "tensorboard=false"]
    overrides += ["optim.lr=1e-4"] if optimizer == "sgd" else []
    assert main([str(SMOKE), *overrides]) == 0
    files = (tmp_path / "checkpoints/step_00000001").glob("*.safetensors")
    recipe = load_recipe(SMOKE, overrides)
    expected = calculate(recipe, recipe.modality.build(None), 1).checkpoint_bytes
    assert expected == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)


@pytest.mark.parametrize("targets", ["centering", pytest.param("sinkhorn", marks=pytest.mark.slow)])
def test_objectives_collectives_are_those_that_run(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = {
        "dino": engine.DINO | {"targets": targets},
        "ibot": engine.IBOT | {"targets": targets},
        "koleo": engine.KOLEO | {"scope": "global"},
    }
    recipe = engine.recipe(objectives=objectives)
    facts = calculate(recipe, recipe.modality.build(None), 1)
    model = engine.model(objectives=objectives)
    sizes: dict[str, list[int]] = {"total": [], "maximum": [], "gather_with_gradient": []}
    for name, seen in sizes.items():

        def watched(tensor: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(tensor.nbytes)
            return tensor

        monkeypatch.setattr(distributed, name, watched)
    model.commit(0, [model(engine.batch(), 0, list(objectives)).pending])
    assert facts.reduced_bytes == sum(sizes["total"]) + sum(sizes["maximum"]) > 0
    assert facts.gathered_bytes == sum(sizes["gather_with_gradient"]) > 0


def bytes_gathered(objectives: list[str]) -> int:
    """Of whole tensors, by FSDP2 in one step of two ranks."""
    total = 0
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(torch.distributed, name)

    def watched(output_tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal total
        total += output_tensor.nbytes
        return gather(output_tensor, *arguments, **options)

    recipe = engine.recipe(parallel={"method": "fsdp"})
    parts = build(recipe, recipe.modality.build(None), 8, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, name, watched)
        train_step(parts, iter([engine.batch()]), 0, objectives)
    return total


@pytest.mark.slow
def test_a_head_of_two_objectives_is_gathered_for_each_of_its_calls() -> None:
    alone, both = (engine.recipe(objectives=chosen) for chosen in ({"dino": engine.DINO}, SHARED))
    once, twice = (calculate(recipe, recipe.modality.build(None), 1) for recipe in (alone, both))
    head = sum(p.numel() for p in engine.model().heads["dino"]["student"].parameters()) * 4  # type: ignore[index, union-attr]
    assert once.regathered_bytes == 0 and twice.regathered_bytes == 3 * head
    real = [run_ranks(2, bytes_gathered, names)[0] for names in (["dino"], ["dino", "ibot"])]
    assert real[1] - real[0] == pytest.approx(3 * head, rel=0.1), real  # shards are padded


def test_arithmetic() -> None:
    assert costs.all_reduce(100, 1) == 0 and costs.all_reduce(100, 4) == 150 and costs.all_gather(100, 4) == 75
    whole = costs.memory(trained=8, moments=16, followers=4, state=1, batch=2, activations=32, largest_unit=2)
    assert whole.total == 8 + 8 + 16 + 4 + 1 + 2 + 32
    parts = costs.memory(trained=8, moments=16, followers=4, state=1, batch=2, activations=32, largest_unit=2, shards=4)
    assert parts.total == 9 + 1 + 2 + 32 + 3 * 2
    numbers = {"trained": 8, "moments": 16, "followers": 4, "state": 1, "batch": 2, "activations": 32}
    several = costs.memory(**numbers, largest_unit=2, shards=4, accumulate=3)
    assert several == parts._replace(gradients=8), "FSDP2 sums over GPUs after the last micro-batch"
    ddp = costs.ddp_traffic(trained=100, reduced=10, gathered=0, accumulate=3, gpus=2)
    assert ddp == (100, 0, 30)
    fsdp = costs.fsdp_traffic(trained=100, followers=100, reduced=0, gathered=0, accumulate=2, gpus=2, gather_share=0.5)
    assert fsdp == (50, 150, 0)
    numbers = {"trained": 100, "followers": 100, "reduced": 0, "gathered": 0, "accumulate": 1, "gather_share": 1.0}
    again = costs.fsdp_traffic(**numbers, gpus=4, regathered=40)
    assert again.weights == 0.75 * 340
    two_by_four = costs.fsdp_traffic(**numbers, gpus=8, replicas=2)
    assert two_by_four == (75 + 25, 225, 0), "scattered among 4, then a quarter is summed over 2"
    time = costs.step_time(flops=100, peak=100, mfu=0.5, sent=20, link=10)
    assert time == (2, 2) and time.share == 0.5
    assert costs.Assumptions(gpus=8).link == 450e9 and costs.Assumptions(gpus=16).link == 50e9


@pytest.mark.slow
def test_gradients_of_several_micro_batches_are_whole_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Of fewer samples at a time, so activations are less, and gradients in shards would be, too."""
    said = {}
    for accumulate in (1, 2):
        assert main([str(SMOKE), "--estimate", "gpus=4", f"accumulate={accumulate}"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory, ")]
        said[accumulate] = {line.split("  ")[0]: re.findall(r"gradients ([\d.]+ \w+)", line)[0] for line in lines}
    alone = said[1]["memory, one copy a GPU (this recipe)"]
    assert said[1]["memory, FSDP2"] != alone and set(said[2].values()) == {alone}


def test_the_command_calculates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SMOKE), f"run_dir={tmp_path / 'none'}", "--estimate", "gpus=4", "gpu=a100_sxm"]) == 0
    report = capsys.readouterr().out
    for words in (
        "4 x a100_sxm, 2 samples each",
        "teacher's dino head",
        "memory, one copy a GPU (this recipe)",
        "memory, FSDP2",
        "peak learning rate of network student: 1.00e-03",
        "fits",
        "sent, DDP",
        "(assumed)",
    ):
        assert words in report, report
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (["gpus=0"], "gpus: input should be greater than or equal to 1, got 0"),
        (["gpus=3"], "batch_size: 8 cannot be split over 3 ranks x accumulate 1; use a multiple of 3"),
        (["gpus=16"], "batch_size: 8 is smaller than the number of ranks, 16"),
        (["gpus=2", "gpu=h1000"], "gpu: 'h1000' is not known; there are h100_sxm, h100_pcie"),
        (["gpu=h200"], "gpus: missing"),
        (["gpus=2", "mfu=1.5"], "mfu: input should be less than or equal to 1, got 1.5"),
        (["gpus=2", "mfu="], "mfu"),
        (["gpus=2", "gpus=x"], "gpus: input should be a valid integer"),
        (["gpus=2", "disc=3"], "disc: unknown key"),
        (["gpus=12"], "gpus: 12 is not a multiple of gpus_per_node 8; use 8 or 16"),
        (["gpus=2", "networks.student.init={path: none.pth}"], "networks.student.init: "),
    ],
)
def test_bad_input_is_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SMOKE), "--estimate", *given]) == 1
    assert message in capsys.readouterr().err


def test_an_objective_that_asks_for_values_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssl_platform.objectives.koleo.koleo", lambda rows, everywhere: rows.sum() * rows.sum().item())
    assert main([str(SMOKE), "--estimate", "gpus=2"]) == 1
    assert "needs values, so a step cannot be calculated by shapes alone" in capsys.readouterr().err


def test_assumptions_are_no_keys_of_a_run() -> None:
    assert not Recipe.model_fields.keys() & costs.Assumptions.model_fields.keys()
    assert costs.split_assumptions(["steps=3"]) == (None, ["steps=3"])
    with pytest.raises(ConfigError, match="gpus"):
        costs.split_assumptions(["gpus=-1"])


def test_an_init_that_does_not_fit_is_told_without_the_memory_of_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(SMOKE), f"run_dir={tmp_path / 'a'}", "steps=1", "tensorboard=false"]) == 0
    init = f"networks.student.init={{path: {tmp_path / 'a'}, freeze_steps: 2}}"
    deeper = ["networks.student.backbone.depth=3"]
    assert main([str(SMOKE), "--estimate", "gpus=2", init, *deeper]) == 1
    assert "missing in the file (" in (said := capsys.readouterr().err) and "depth" in said
    recipe = load_recipe(SMOKE, [init])
    lines = check_start(recipe, recipe.modality.build({"mean": [0.5] * 3, "std": [0.5] * 3}))
    assert lines[0] == "peak learning rate of network student: 1.00e-03; 0 in the first 2 steps"


@pytest.mark.slow
def test_page_is_what_the_command_writes_for_the_smallest_model() -> None:
    page, step = scaling.PAGE.read_text(encoding="utf-8"), scaling.facts("ViT-S/16")
    rows = [scaling.flops_row("ViT-S/16", step), scaling.checkpoint_row("ViT-S/16", step)]
    for row in [*rows, *scaling.traffic_rows("ViT-S/16", step), *scaling.run_rows("ViT-S/16", step)]:
        assert f"| {' | '.join(row)} |" in page, "docs/scaling.md: run python benchmarks/scaling.py --write"


@pytest.mark.slow
def test_page_is_what_the_command_writes() -> None:
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.page(scaling.kept_memory_table())


@pytest.mark.slow
def test_memory_is_near_the_measured_peak() -> None:
    (row,) = [line for line in scaling.memory_table([("ViT-Ti/16", 8)]).splitlines() if "ViT-Ti" in line]
    assert abs(float(row.split("|")[-2].rstrip("% "))) < 20
