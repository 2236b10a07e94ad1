"""Distillation against written-out references, several students and teachers, grids, ranks, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_platform.backbones import Features, Input
from ssl_platform.backbones.timm_models import Config as TimmConfig
from ssl_platform.backbones.vit import Config as VitConfig
from ssl_platform.config import ConfigError, validate
from ssl_platform.export import main as export_main
from ssl_platform.initialise import Initialiser
from ssl_platform.objectives import Outputs
from ssl_platform.objectives._standardization import Standardization
from ssl_platform.objectives.distill import Distill, distances, to_grid
from ssl_platform.recipe import NetworkConfig, load_recipe
from ssl_platform.step import train_step
from ssl_platform.train import main, train
from ssl_platform.views import Batch, ViewGroup
from tests import engine
from tests.ranks import run_ranks
from tests.test_probes import assert_same_checkpoint, losses, stop_after

SMOKE = Path(__file__).parents[1] / "configs" / "smoke"
WIDE = {"name": "vit", "embed_dim": 24, "depth": 1, "num_heads": 2, "layer_scale": None}
OTHER = WIDE | {"embed_dim": 8}
INIT = {"path": "a/teacher.safetensors"}
NETWORKS: dict[str, Any] = {
    "student": {"backbone": engine.VIT},
    "large": {"backbone": WIDE, "update": "frozen", "init": INIT},
    "other": {"backbone": OTHER, "update": "frozen", "init": INIT},
}
"""Files are read by `train` alone: the tests that build by hand have random teachers."""


def objective(**changes: Any) -> dict[str, Any]:
    return {"name": "distill", "teachers": ["large"]} | changes


def parts(networks: dict[str, Any] | None = None, **objectives: Any) -> Any:
    return engine.parts(networks=networks or NETWORKS, heads={}, objectives=objectives)


# -- numbers ----------------------------------------------------------------------------------------------------------


def reference_distance(ours: Tensor, theirs: Tensor, distance: str) -> float:
    x, y = ours.double().numpy(), theirs.double().numpy()
    cosine = 1 - float(x @ y) / float(np.sqrt(x @ x) * np.sqrt(y @ y))
    d = np.abs(x - y)
    smooth = float(np.mean(np.where(d < 1, d * d / 2, d - 0.5)))
    mse = float(np.mean(d * d))
    return {"cosine": cosine, "smooth_l1": smooth, "mse": mse, "cosine_smooth_l1": 0.9 * cosine + 0.1 * smooth}[
        distance
    ]


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1", "mse", "cosine_smooth_l1"])
@pytest.mark.parametrize(
    ("masks", "places"), [(None, "all"), ("block", "all"), ("block", "visible"), ("block", "hidden")]
)
@pytest.mark.parametrize("standardize", ["none", "channel", "isotropic"])
def test_terms_equal_the_loops_in_float64(distance: str, masks: str | None, places: str, standardize: str) -> None:
    settings = objective(masks=masks, places=places, standardize=standardize)
    settings |= {"teachers": {"large": {"patch_weight": 0.25}}, "cls_distance": distance, "patch_distance": distance}
    built, batch = parts(distill=settings), engine.batch()
    model, group = built.student_teacher, batch.groups["global"]
    found = model(batch, 0, ["distill"])
    loss = model.objective("distill")
    hidden = group.masks["block"]
    with torch.no_grad():
        ours = model.networks["student"]([Input(group.views, hidden if masks else None)])[0]
        theirs = model.networks["large"]([Input(group.views)])[0]
        for kind, weight in (("cls", 1.0), ("patches", 0.25)):
            target = getattr(theirs, kind).double()
            rows = target.flatten(0, -2)
            if standardize != "none":
                variance = rows.var(0, correction=0)
                target = (target - rows.mean(0)) / (variance if standardize == "channel" else variance.mean()).sqrt()
            adapted = loss.adaptors(f"large_{kind}", getattr(ours, kind))
            views = []
            for v in range(2):
                for b in range(4):
                    if kind == "cls":
                        views.append(
                            reference_distance(adapted[(v, 0, b) if masks else (v, b)], target[v, b], distance)
                        )
                        continue
                    used = [
                        n for n in range(4)
                        if places == "all" or bool(hidden[v, 0, b, n]) == (places == "hidden")
                    ]  # fmt: skip
                    each = [
                        reference_distance(adapted[(v, 0, b, n) if masks else (v, b, n)], target[v, b, n], distance)
                        for n in used
                    ]
                    views.append(sum(each) / max(len(each), 1))
            expected = weight * sum(views) / len(views)
            assert found.terms[f"distill_large_{kind}"].item() == pytest.approx(expected, rel=2e-4), kind


def test_statistics_are_those_of_all_rows_so_far_and_change_in_commit_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, n, 3, 5, generator=generator) * torch.arange(1, 6) + 7 for n in (4, 2, 5)]
    standardization, seen = Standardization(5, "channel"), []
    for i, features in enumerate(batches):
        before = {key: value.clone() for key, value in standardization.state_dict().items()}
        sums = standardization.pending(features)
        standardized = standardization(features, sums)
        assert all(torch.equal(value, before[key]) for key, value in standardization.state_dict().items())
        rows = torch.cat([*seen, *([features.flatten(0, 2)] if i == 0 else [])]).double()  # the first step uses its own
        expected = (features.double() - rows.mean(0)) / rows.std(0, correction=0)
        torch.testing.assert_close(standardized.double(), expected, rtol=1e-4, atol=1e-4)
        standardization.commit([sums])
        seen.append(features.flatten(0, 2))
    assert standardization.count.item() == 2 * 3 * 11
    rows = torch.cat(seen).double()
    torch.testing.assert_close(standardization.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(standardization.variance.double(), rows.var(0, correction=0), rtol=1e-4, atol=1e-4)


def test_channels_that_never_change_give_no_infinity() -> None:
    standardization = Standardization(2, "channel")
    features = torch.tensor([[3.0, 1.0], [3.0, 2.0]])
    standardized = standardization(features, standardization.pending(features))
    assert torch.isfinite(standardized).all() and (standardized[:, 0] == 0).all()


def test_cosine_of_equal_directions_is_zero_whatever_their_length() -> None:
    ours = torch.tensor([[3.0, 4.0]])
    for distance, expected in (("cosine", 0.0), ("mse", 12.5 / 4)):
        found, cosine = distances(ours, ours / 2, distance)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(expected, abs=1e-6) and cosine.item() == pytest.approx(1)


# -- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "wanted"), [((14, 14), (16, 16)), ((16, 16), (14, 14)), ((8, 12), (4, 3)), ((8,), (5,))]
)
def test_a_ramp_stays_a_ramp_on_another_grid(grid: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    def ramp(size: tuple[int, ...]) -> Tensor:
        axes = torch.meshgrid(*[(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size], indexing="ij")
        return torch.stack([axis.flatten() for axis in axes], dim=-1).expand(2, 3, -1, -1)  # (V, B, N, axes)

    found = to_grid(ramp(grid), grid, wanted, int(np.prod(wanted))).reshape(2, 3, *wanted, len(wanted))
    expected = ramp(wanted).reshape(found.shape)
    inside = (..., *(slice(2, -2) if n > 4 else slice(None) for n in wanted), slice(None))  # edges are clamped
    if min(wanted) > 4:
        tolerance = 1e-9 if min(wanted) >= min(grid) else 0.01  # antialiasing weighs places that lie unevenly
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        found.mean((2, 3) if len(grid) == 2 else 2), expected.mean((2, 3) if len(grid) == 2 else 2)
    )


def test_grids_that_are_equal_or_unknown_leave_tokens_alone() -> None:
    patches = torch.randn(2, 3, 6, 4)
    assert to_grid(patches, (2, 3), (2, 3), 6) is patches and to_grid(patches, None, (2, 3), 6) is patches
    with pytest.raises(
        ConfigError, match="6 patch tokens cannot be laid on the student's 8: one of them lies on no grid"
    ):
        to_grid(patches, None, (2, 4), 8)
    with pytest.raises(ConfigError, match="grids of other numbers of axes"):
        to_grid(patches, (2, 3), (8,), 8)


def test_backbones_say_their_grids_and_vits_may_have_patches_of_their_own() -> None:
    modality = load_recipe(SMOKE / "image.yaml").modality.build(None)  # views of 32, patches of 8
    views = torch.randn(2, 1, 3, 32, 32)
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    networks = {
        (4, 4): VitConfig(**small).build(modality),
        (8, 8): VitConfig(**small, patch_size=4).build(modality),
        (2, 2): TimmConfig(model="test_vit").build(modality),
        (1, 1): TimmConfig(model="resnet10t").build(modality),
    }
    for grid, network in networks.items():
        [features] = network.eval()([Input(views)])
        assert features.grid == grid and features.patches.shape[2] == grid[0] * grid[1]
        assert features.patches.shape[-1] == getattr(network, "patch_dim", network.embed_dim)
    with pytest.raises(ValueError, match="patch_size: views of 32 x 32 are not a multiple of 5"):
        VitConfig(**small, patch_size=5).build(modality)
    mixed = [{"sizes": {"global": size}, "probability": 0.5} for size in (32, 40)]
    modality = load_recipe(SMOKE / "image.yaml", [f"modality.resolutions={mixed}"]).modality.build(None)
    with pytest.raises(ValueError, match="patch_size: views of 40 x 40 are not a multiple of 16"):
        VitConfig(**small, patch_size=16).build(modality)
    toy = engine.recipe(modality={"name": "tests.probes.toy", "groups": ["global", "local", "signal"]}).modality.build(
        None
    )
    with pytest.raises(ValueError, match="not cut into patches of two axes"):
        VitConfig(**small, patch_size=2).build(toy, "signal")


# -- several teachers, several students -------------------------------------------------------------------------------


def test_each_teacher_runs_once_without_gradient_and_stays_as_it_is() -> None:
    students = {"small": {"backbone": engine.VIT}, "tiny": {"backbone": OTHER}}
    networks = {name: NETWORKS[name] for name in ("large", "other")} | students
    both = ["large", "other"]
    built = parts(networks, one=objective(student="small", teachers=both), two=objective(student="tiny", teachers=both))
    calls: dict[str, int] = {}
    start = {
        name: {k: v.clone() for k, v in built.student_teacher.networks[name].state_dict().items()} for name in both
    }
    for name in both:

        def count(_: Any, arguments: Any, outputs: list[Features], name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1
            assert len(outputs) == 1 and not outputs[0].cls.requires_grad

        built.student_teacher.networks[name].register_forward_hook(count)
    for step in range(2):
        train_step(built, iter([engine.batch(step)]), step, ["one", "two"])
    assert calls == {"large": 2, "other": 2}
    for name in both:
        state = built.student_teacher.networks[name].state_dict()
        assert all(torch.equal(value, start[name][key]) for key, value in state.items())
    assert set(built.trained) == {"small", "tiny", "one_objective", "two_objective"}


@pytest.mark.parametrize("standardize", ["channel", "none"])
def test_two_students_in_one_run_are_the_two_runs_apart(standardize: str) -> None:
    """Bit for bit, weights and losses: clipping, optimiser and statistics of one student do not see the other."""
    backbones = {"small": engine.VIT, "tiny": OTHER | {"depth": 3}}
    optim = {"lr": 0.01, "layer_decay": 0.7, "clip_grad": 0.1}

    def build(names: list[str]) -> Any:
        networks: dict[str, Any] = {"large": NETWORKS["large"]} | {
            name: {"backbone": backbones[name]} for name in names
        }
        objectives = {f"of_{name}": objective(student=name, standardize=standardize) for name in names}
        return engine.parts(networks=networks, heads={}, objectives=objectives, optim=optim)

    both = build(["small", "tiny"])
    apart = {name: build([name]) for name in backbones}
    for name, alone in apart.items():  # networks draw their weights one after another; what stands in files does not
        alone.student_teacher.networks.load_state_dict(
            {k: v for k, v in both.student_teacher.networks.state_dict().items() if k.split(".")[0] in (name, "large")}
        )
    for step in range(4):
        found = train_step(both, iter([engine.batch(step)]), step, ["of_small", "of_tiny"])
        for name, alone in apart.items():
            expected = train_step(alone, iter([engine.batch(step)]), step, [f"of_{name}"])
            assert {k: v for k, v in found.terms.items() if k.startswith(f"of_{name}_")} == expected.terms
    whole = both.student_teacher.state_dict()
    for name, alone in apart.items():
        state = alone.student_teacher.state_dict()
        assert any(key.startswith(f"objectives.of_{name}.") for key in state)
        for key, value in state.items():
            assert torch.equal(value, whole[key]), key
    rates = {n: g["lr"] for g in both.optimizer.param_groups for n in g["names"]}
    assert rates["networks.small.blocks.0.attn.qkv.weight"] == pytest.approx(0.01 * 0.7**2)  # of two blocks
    assert rates["networks.tiny.blocks.0.attn.qkv.weight"] == pytest.approx(0.01 * 0.7**3)  # of three


def test_a_student_learns_its_teacher() -> None:
    built = parts(distill=objective(standardize="channel", patch_distance="mse", cls_distance="mse"))
    values = [train_step(built, iter([engine.batch(step % 3)]), step, ["distill"]).loss.item() for step in range(40)]
    assert values[-1] < 0.5 * values[0]


def test_adaptors_run_in_mixed_precision_and_losses_in_float32() -> None:
    built = engine.parts(networks=NETWORKS, heads={}, objectives={"distill": objective()}, precision="bf16")
    kinds: list[torch.dtype] = []
    layer = built.student_teacher.objective("distill").adaptors.by_name["large_cls"]
    layer.register_forward_hook(lambda module, arguments, output: kinds.append(output.dtype))
    result = train_step(built, iter([engine.batch()]), 0, ["distill"])
    assert kinds == [torch.bfloat16] and result.loss.dtype == torch.float32


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours, to learn from."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(
        load_recipe(SMOKE / "pathology.yaml", [f"run_dir={folder}", "steps=2", "tensorboard=false"]),
        torch.device("cpu"),
    )
    return folder


def run_of(run_dir: Path, teacher: Path, *more: str) -> Any:
    return load_recipe(
        SMOKE / "distill.yaml",
        [f"run_dir={run_dir}", f"networks.large.init.path={teacher}", "steps=4", "save_every=2", "log_every=1",
         "tensorboard=false", "optim.lr=1e-3", *more],
    )  # fmt: skip


def test_resume_is_bit_exact_and_reads_no_teacher_again(teacher: Path, tmp_path: Path) -> None:
    train(run_of(tmp_path / "whole", teacher), torch.device("cpu"))
    partial = run_of(tmp_path / "halves", teacher)
    stop_after(partial, 2)
    train(run_of(tmp_path / "halves", tmp_path / "gone"), torch.device("cpu"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halves", 4)
    state = load_file(tmp_path / "whole/checkpoints/step_00000004/model.safetensors")
    assert state["objectives.small.standardizations.large_patches.count"].item() == 4 * 8 * 2 * 16


def on_two_ranks(recipe: dict[str, Any]) -> None:
    from ssl_platform.recipe import Recipe

    train(validate(Recipe, recipe, world_size=2), torch.device("cpu"))


def test_two_ranks_and_two_micro_batches_equal_one(teacher: Path, tmp_path: Path) -> None:
    masked = ["masks.block={name: block}", "objectives.small.masks=block", "objectives.small.places=hidden"]
    train(run_of(tmp_path / "one", teacher, *masked), torch.device("cpu"))
    run_ranks(2, on_two_ranks, run_of(tmp_path / "two", teacher, *masked).model_dump(mode="json"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    for key in one[0]:
        assert two[-1][key] == pytest.approx(one[-1][key], rel=1e-4, abs=1e-6), key
    train(run_of(tmp_path / "micro", teacher, "accumulate=2"), torch.device("cpu"))
    train(run_of(tmp_path / "whole", teacher), torch.device("cpu"))
    first, second = (
        load_file(tmp_path / name / "checkpoints/step_00000004/model.safetensors") for name in ("micro", "whole")
    )
    for key in first:  # the first step alone uses statistics of its own micro-batch
        if "standardizations" in key:
            torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-5)


def test_every_student_is_exported(teacher: Path, tmp_path: Path) -> None:
    train(run_of(tmp_path / "run", teacher), torch.device("cpu"))
    for network in ("small", "convolutional"):
        out = tmp_path / network
        assert export_main([str(tmp_path / "run"), "--format", "timm", "--out", str(out), "--network", network]) == 0
        assert not any("adaptor" in key for key in load_file(out / "model.safetensors"))
        assert "init" not in json.loads((out / "config.json").read_text())["ssl_platform"]["encoder"]["networks"][
            "large"
        ] or (
            json.loads((out / "config.json").read_text())["ssl_platform"]["encoder"]["networks"]["large"]["init"]
            is None
        )


# -- another normalisation --------------------------------------------------------------------------------------------


def description(mean: list[float], std: list[float]) -> dict[str, Any]:
    return {"mean": mean, "std": std, "normalize_per_sample": False}


@pytest.mark.parametrize(("kind", "in_chans"), [("vit", 3), ("vit", 1), ("convnext", 3)])
def test_a_teacher_sees_its_own_preprocessing(kind: str, in_chans: int, tmp_path: Path) -> None:
    """Features of views with another mean and std equal those of the file's network on views of its own."""
    torch.manual_seed(0)
    theirs, ours = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]), ([0.1] * in_chans, [0.7] * in_chans)
    if kind == "vit":
        model = timm.create_model(
            "vit_small_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=32, patch_size=8
        )
    else:
        model = timm.create_model("test_convnext")
    model.eval()
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    modality = load_recipe(
        SMOKE / "image.yaml", [f"modality.channels={in_chans}"] if in_chans == 1 else []
    ).modality.build(None)
    vit = {"embed_dim": 32, "depth": 2, "num_heads": 2, "layer_scale": None}
    network = (VitConfig(**vit) if kind == "vit" else TimmConfig(model="test_convnext")).build(modality).eval()  # type: ignore[arg-type]
    config = validate(NetworkConfig, {"init": {"path": str(path), "mean": theirs[0], "std": theirs[1]}})
    filling = Initialiser({"large": config}, {}, description(*ours))
    filling.networks({"large": network})
    pixels = torch.rand(2, 1, 32, 32).expand(-1, 3, -1, -1) if in_chans == 1 else torch.rand(2, 3, 32, 32)

    def normalized(values: Tensor, mean: list[float], std: list[float]) -> Tensor:
        return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    with torch.inference_mode():
        expected = model.forward_features(normalized(pixels, *theirs))
        [features] = network([Input(normalized(pixels[:, :in_chans], *ours)[None])])
    expected = expected[:, 1:] if kind == "vit" else expected.flatten(2).mT
    torch.testing.assert_close(features.patches[0], expected, rtol=1e-4, atol=1e-4)
    changed = [text for text in filling.reports[0].resized.values() if "for views of mean 0.1" in text]
    assert len(changed) == 2 and "instead of mean 0.5, 0.4, 0.3 std 0.2, 0.3, 0.25" in changed[0]


def test_our_own_runs_say_their_statistics_themselves(teacher: Path, tmp_path: Path) -> None:
    from ssl_platform.encoder import Encoder

    encoder = Encoder.load(teacher)
    facts = encoder.modality.description()
    recipe = run_of(tmp_path / "run", teacher)
    for shown in (facts, description([0.5] * 3, [0.25] * 3)):
        network = recipe.networks["large"].backbone.build(encoder.modality).eval()
        filling = Initialiser({"large": recipe.networks["large"]}, {}, shown)
        filling.networks({"large": network})
        assert bool(filling.reports[0].resized) == (shown is not facts)
        pixels = torch.rand(2, 3, 32, 32)
        views = [
            (pixels - torch.tensor(one["mean"])[:, None, None]) / torch.tensor(one["std"])[:, None, None]
            for one in (facts, shown)
        ]
        with torch.inference_mode():
            [found] = network([Input(views[1][None])])
        torch.testing.assert_close(found.cls[0], encoder(views[0]).cls, rtol=1e-4, atol=1e-4)


def test_statistics_that_cannot_be_taken_in_are_refused(tmp_path: Path) -> None:
    modality = load_recipe(SMOKE / "image.yaml").modality.build(None)
    network = TimmConfig(model="resnet10t").build(modality)
    path = tmp_path / "resnet.safetensors"
    save_file({k: v.contiguous() for k, v in network.model.state_dict().items()}, path)

    def refusal(views: dict[str, Any], **init: Any) -> str:
        with pytest.raises(ConfigError) as error:
            config = validate(NetworkConfig, {"init": {"path": str(path)} | init})
            Initialiser({"large": config}, {}, views).networks({"large": network})
        return str(error.value)

    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    text = refusal(description([0.1] * 3, [0.2] * 3), **half)
    assert "networks.large.init: mean, std: its first layer is no convolution, pads views or has no bias" in text
    assert "normalises every sample by its own" in refusal({"normalize_per_sample": True}, **half)
    assert "mean and std: give both" in refusal({}, mean=[0.5])
    assert "greater than 0" in refusal({}, mean=[0.5], std=[0.0])


@pytest.mark.parametrize("shape", [(32, 192), (32, 3), (32,)], ids=["linear", "as many as channels", "one axis"])
def test_a_linear_patch_embedding_cannot_take_statistics_in(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Its columns do not say which channel they are of."""
    modality = load_recipe(SMOKE / "image.yaml").modality.build(None)
    network = VitConfig(embed_dim=32, depth=2, num_heads=2, layer_scale=None).build(modality)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    path = tmp_path / "linear.safetensors"
    save_file(state | {"patch_embed.proj.weight": torch.zeros(shape)}, path)
    init = {"path": str(path), "mean": [0.5] * 3, "std": [0.5] * 3}
    for said in (init, {"path": str(path)}):
        with pytest.raises(ConfigError) as error:
            config = validate(NetworkConfig, {"init": said})
            Initialiser({"large": config}, {}, description([0.1] * 3, [0.2] * 3)).networks({"large": network})
        expected = (
            f"networks.large.init: mean, std: patch_embed.proj.weight of the source has the shape {shape}, in which "
            "channels cannot be told apart; expected (width, channels, *patch), as of a convolution"
            if said is init
            else f"patch_embed.proj.weight {shape} instead of"
        )
        assert expected in str(error.value)


# -- what is refused --------------------------------------------------------------------------------------------------


def lines_of(networks: dict[str, Any] | None = None, groups: list[str] | None = None, **changes: Any) -> str:
    modality = {"name": "tests.probes.toy", "groups": groups or ["global", "local"]}
    with pytest.raises(ConfigError) as error:
        engine.recipe(
            modality=modality, networks=networks or NETWORKS, heads={}, objectives={"distill": objective(**changes)}
        )
    return str(error.value)


def test_what_teaches_nothing_is_refused_in_words() -> None:
    trained = NETWORKS | {"large": {"backbone": WIDE}}
    assert "objectives.distill.teachers.large: has update: grad, but a teacher must stay as it is" in lines_of(trained)
    averaged = NETWORKS | {"large": {"update": "ema", "of": "student"}}
    assert "has update: ema" in lines_of(averaged)
    random = NETWORKS | {"large": {"backbone": WIDE, "update": "frozen"}}
    assert (
        "teachers.large: is frozen and random, and teaches nothing; say where its weights are: networks.large.init"
        in (lines_of(random))
    )
    assert "is frozen and random" in lines_of(NETWORKS | {"large": {"update": "frozen", "of": "student"}})
    assert "objectives.distill.teachers: 'larg' does not exist; there are: student, large, other" in lines_of(
        teachers=["larg"]
    )
    assert "objectives.distill.student: 'smal' does not exist" in lines_of(student="smal")
    assert "objectives.distill.student: 'other' is not trained (update: frozen)" in lines_of(student="other")
    assert "objectives.distill.teachers: empty" in lines_of(teachers=[])
    assert "both weights are 0" in lines_of(teachers={"large": {"cls_weight": 0, "patch_weight": 0}})
    assert "places: hidden needs masks" in lines_of(places="hidden")
    assert "patch_weigth: unknown key" in lines_of(teachers={"large": {"patch_weigth": 1.0}})


def test_a_copy_of_a_network_with_weights_teaches() -> None:
    networks = {
        "student": {"backbone": engine.VIT, "init": INIT},
        "large": {"update": "frozen", "of": "student"},
    }
    assert engine.recipe(networks=networks, heads={}, objectives={"distill": objective()})


def test_views_of_other_shapes_or_crops_are_refused() -> None:
    groups = ["global", "local", "clean", "clip", "signal"]
    assert "group 'nowhere' is no group of views; there are global, local" in lines_of(
        teachers={"large": {"group": "nowhere"}}
    )
    assert "'clip' has 1 views, but the student's 'global' has 2" in lines_of(
        groups=groups, teachers={"large": {"group": "clip"}}
    )
    signal = NETWORKS | {"large": NETWORKS["large"] | {"inputs": "signal"}}
    assert "is made for views of shape (1, 16) (networks.large.inputs), but 'global' has (1, 8, 8)" in lines_of(
        signal, groups=groups
    )
    nowhere = lines_of(NETWORKS | {"large": NETWORKS["large"] | {"inputs": "nowhere"}})
    assert "networks.large.inputs: 'nowhere' is no group of views; there are global, local" in nowhere
    built = parts(distill=objective(teachers={"large": {"group": "local"}}))  # as many views, but of other crops
    with pytest.raises(
        ConfigError, match=r"the views of 'local' \(teacher large\) show other crops than those of 'global'"
    ):
        train_step(built, iter([engine.batch()]), 0, ["distill"])


def test_a_teacher_may_see_other_views_of_the_same_crops() -> None:
    modality = {"name": "tests.probes.toy", "groups": ["global", "local", "clean"]}
    built = engine.parts(
        modality=modality,
        networks=NETWORKS,
        heads={},
        objectives={"distill": objective(teachers={"large": {"group": "clean"}})},
    )
    batch = engine.batch()
    clean = ViewGroup(batch.groups["global"].views * 0.5, batch.groups["global"].source)
    both = Batch(batch.groups | {"clean": clean}, batch.keys, batch.ids, batch.labels, batch.step)
    seen: list[Tensor] = []
    built.student_teacher.networks["large"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].views))
    train_step(built, iter([both]), 0, ["distill"])
    assert torch.equal(seen[0], clean.views)


def test_masks_of_another_grid_than_the_backbones_are_refused() -> None:
    networks = NETWORKS | {"student": {"backbone": engine.VIT | {"patch_size": 2}}}
    built = parts(networks, distill=objective(masks="block"))
    with pytest.raises(ConfigError, match="drawn for 4 tokens a view of 'global', but the backbone makes 16 of it"):
        train_step(built, iter([engine.batch()]), 0, ["distill"])


def test_views_that_nobody_sees_are_not_made() -> None:
    for config in (SMOKE / "distill.yaml", SMOKE.parent / "skin_distill.yaml"):
        assert list(load_recipe(config).modality.build(None).groups) == ["global"]


def test_a_backbone_without_places_needs_patch_weight_0() -> None:
    built = parts(distill=objective())
    loss = built.student_teacher.objective("distill")
    assert isinstance(loss, Distill)
    student, [large] = loss.student, loss.teachers.values()
    empty = Features(torch.randn(2, 4, 16), torch.randn(2, 4, 0, 16))
    features = {student: empty, large: Features(torch.randn(2, 4, 24), torch.randn(2, 4, 4, 24))}
    with pytest.raises(ConfigError, match="the backbone of 'student' gives no patch tokens; set patch_weight: 0"):
        loss.loss(Outputs(features, {}), engine.batch(), 0)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(SMOKE / "distill.yaml"),
        f"run_dir={tmp_path / 'run'}",
        f"networks.large.init.path={tmp_path}/none",
    ]
    assert main(arguments) == 1
    assert "networks.large.init" in (text := capsys.readouterr().err) and "no such file or folder" in text
    assert not (tmp_path / "run").exists()
