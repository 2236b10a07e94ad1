"""Starting from other weights: the same features, every key accounted for, resizing, frozen first steps, bad files."""

import argparse
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_platform import optim
from ssl_platform.backbones import Input
from ssl_platform.backbones._positions import interpolate_positions
from ssl_platform.backbones._resizing import adapt_channels, resize_matrix, resize_patches
from ssl_platform.backbones.timm_models import Config as TimmConfig
from ssl_platform.config import Config as Section
from ssl_platform.config import ConfigError, plugin, validate
from ssl_platform.encoder import Encoder
from ssl_platform.export import main as export_main
from ssl_platform.init_report import Report
from ssl_platform.initialise import Initialiser, fit
from ssl_platform.recipe import InitConfig, NetworkConfig, load_recipe
from ssl_platform.train import main, train
from ssl_platform.weights import _of_module, read
from tests.ranks import run_ranks
from tests.test_conversion import CASES, conformance, conformance_vit, images_of, make, run
from tests.test_resume import assert_equal

SMOKE = Path(__file__).parents[1] / "configs" / "smoke" / "pathology.yaml"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "layer_scale": None}


def fill(network: nn.Module, /, **init: Any) -> Report:
    """Fills `network` as a run's student would be."""
    config = validate(NetworkConfig, {"init": {key: str(v) if isinstance(v, Path) else v for key, v in init.items()}})
    filling = Initialiser({"student": config}, {})
    filling.networks({"student": network})
    return filling.reports[0]


def refusal(network: nn.Module, /, **init: Any) -> str:
    """What is said of weights that cannot be used; the network must be as it was."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        fill(network, **init)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return str(error.value)


def timm_vit(name: str = "vit_small_patch16_224", seed: int = 3, **arguments: Any) -> Any:
    """A small model of timm's with every parameter moved off its initial value."""
    torch.manual_seed(seed)
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    model = timm.create_model(name, pretrained=False, **{**size, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def saved(model: nn.Module, path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "changes"),
    [
        ("vit_small_patch16_224", {"num_classes": 7}, {}),
        ("vit_small_patch14_reg4_dinov2", {"reg_tokens": 3}, {"num_registers": 3, "layer_scale": 1e-5}),
        ("vit_small_patch16_224", {"qkv_bias": False, "no_embed_class": True}, {"qkv_bias": False}),
    ],
)
def test_a_timm_file_gives_timms_features(
    name: str, arguments: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    model, vit = timm_vit(name, **arguments), make(8, 32, **{**SMALL, **changes})
    vit.mask_token.data.fill_(0.5)
    report = fill(vit, path=saved(model, tmp_path / "model.safetensors"))
    with torch.inference_mode():
        theirs = model.forward_features(images_of(32))
    ours = run(vit, images_of(32))
    torch.testing.assert_close(ours.cls[0], theirs[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.patches[0], theirs[:, 1 + vit.num_registers :], atol=1e-5, rtol=1e-5)
    assert report.fresh == ["mask_token"] and not report.resized and not report.unused
    assert sorted(report.heads_left_out) == sorted(key for key in model.state_dict() if key.startswith("head."))
    assert sorted(report.matched + report.fresh) == sorted(vit.state_dict())
    assert (vit.mask_token == 0.5).all(), "what is fresh keeps its own initialisation"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["released.pth", "training.pth", "plain.safetensors"])
def test_a_dinov2_file_gives_dinov2s_features(case: str, kind: str, tmp_path: Path) -> None:
    facts, tensors = conformance(case)
    whole = {key.removeprefix("teacher_final/"): v for key, v in tensors.items() if key.startswith("teacher_final/")}
    trunk = {key.removeprefix("backbone."): v.clone() for key, v in whole.items() if key.startswith("backbone.")}
    path = tmp_path / kind
    if kind == "training.pth":
        torch.save({"teacher": whole, "iteration": 7}, path)
    elif kind == "released.pth":
        torch.save(trunk, path)
    else:
        save_file(trunk, path)
    vit = conformance_vit(facts)
    report = fill(vit, path=path)
    assert report.layout == "dinov2" and sorted(report.matched) == sorted(vit.state_dict()) and not report.fresh
    for probe in ("square", "rect"):
        features = run(vit, tensors[f"probe/{probe}"])
        for found, name in ((features.cls[0], "cls"), (features.patches[0], "patch")):
            torch.testing.assert_close(found, tensors[f"expected/{probe}_{name}"], atol=1e-5, rtol=1e-5)
        if facts["registers"]:
            assert features.registers is not None
            torch.testing.assert_close(features.registers[0], tensors[f"expected/{probe}_reg"], atol=1e-5, rtol=1e-5)


def test_any_timm_model_starts_from_its_file(tmp_path: Path) -> None:
    modality = load_recipe(SMOKE).modality.build(None)
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=4).eval()
    backbone = TimmConfig(model="resnet10t").build(modality).eval()
    report = fill(backbone, path=saved(model, tmp_path / "resnet.safetensors"))
    assert sorted(report.heads_left_out) == ["fc.bias", "fc.weight"] and not report.fresh
    with torch.inference_mode():
        [features] = backbone([Input(images_of(32)[None])])
        theirs = model.forward_head(model.forward_features(images_of(32)), pre_logits=True)
    torch.testing.assert_close(features.cls[0], theirs, atol=1e-5, rtol=1e-5)


def test_layers_of_a_timm_models_head_that_serve_its_features_are_no_head(tmp_path: Path) -> None:
    modality = load_recipe(SMOKE).modality.build(None)
    model = timm.create_model("test_convnext", pretrained=False, num_classes=4)
    backbone = TimmConfig(model="test_convnext").build(modality)
    report = fill(backbone, path=saved(model, tmp_path / "convnext.safetensors"))
    assert "model.head.norm.weight" in report.matched
    assert sorted(report.heads_left_out) == ["head.fc.bias", "head.fc.weight"] and not report.unused


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours, of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(
        load_recipe(SMOKE, [f"run_dir={folder}", "steps=4", "save_every=4", "tensorboard=false"]), torch.device("cpu")
    )
    return folder


def test_our_runs_checkpoints_and_exports(finished: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    assert export_main([str(finished), "--format", "timm", "--out", str(export)]) == 0
    for network in ("teacher", "student"):
        theirs = Encoder.load(finished, network=network)
        for path in (finished, finished / "checkpoints/step_00000004"):
            vit = make(8, 32, **SMALL)
            report = fill(vit, path=path, network=network)
            assert all(torch.equal(v, theirs.network.state_dict()[key]) for key, v in vit.state_dict().items())
            assert report.layout == "ssl_platform" and f"network {network} after 4 steps" in report.source
    vit = make(8, 32, **SMALL)
    fill(vit, path=export)
    torch.testing.assert_close(run(vit, images_of(32)).cls[0], Encoder.load(export)(images_of(32)).cls)
    again = make(8, 32, **SMALL)
    report = fill(again, timm=f"local-dir:{export}")  # through timm's own loading of pretrained weights
    torch.testing.assert_close(run(again, images_of(32)).cls, run(vit, images_of(32)).cls)
    assert report.fresh == ["mask_token"] and report.sha256 is None


def test_training_files_of_dino_and_ibot_are_read_with_their_arguments_and_their_mask_token(tmp_path: Path) -> None:
    model, vit = timm_vit(), make(8, 32, **SMALL)
    trunk = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    trunk["masked_embed"] = torch.full((1, 32), 0.25)
    teacher = {f"module.backbone.{key}": value for key, value in trunk.items()} | {
        "module.head.mlp.0.bias": torch.ones(3)
    }
    torch.save({"teacher": teacher, "epoch": 9, "args": argparse.Namespace(arch="vit_small")}, tmp_path / "ibot.pth")
    report = fill(vit, path=tmp_path / "ibot.pth")
    assert not report.fresh and report.heads_left_out == ["head.mlp.0.bias"]
    assert torch.equal(vit.mask_token, trunk["masked_embed"]) and torch.equal(vit.cls_token, trunk["cls_token"])


class Runs:
    """What a pickle may do when it is read: here, write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [False, True])
def test_nothing_in_a_file_runs(inside: bool, tmp_path: Path) -> None:
    trap = Runs(tmp_path / "ran")
    arguments = argparse.Namespace(trap=trap) if inside else trap
    torch.save({"teacher": timm_vit().state_dict(), "args": arguments}, tmp_path / "trap.pth")
    assert "reading such objects can run code" in refusal(make(8, 32, **SMALL), path=tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_a_network_that_is_named_must_be_in_the_file(tmp_path: Path) -> None:
    vit, state = make(8, 32, **SMALL), timm_vit().state_dict()
    plain = saved(timm_vit(), tmp_path / "plain.safetensors")
    assert "has no network 'student': it holds one network, without a name; leave init.network out" in refusal(
        vit, path=plain, network="student"
    )
    torch.save({"model": {"student": state}}, tmp_path / "nested.pth")
    assert "has no network 'teacher': it has student; set init.network" in refusal(vit, path=tmp_path / "nested.pth")
    fill(vit, path=tmp_path / "nested.pth", network="student")
    assert torch.equal(vit.cls_token, state["cls_token"])


# -- resizing ---------------------------------------------------------------------------------------------------------


def reference_matrix(old: int, new: int) -> np.ndarray[Any, Any]:
    """(new, old): a triangle filter around each new pixel's centre, as wide as a new pixel when that is the wider."""
    matrix, scale = np.zeros((new, old)), old / new
    for i in range(new):
        centre, radius = (i + 0.5) * scale, max(scale, 1.0)
        for j in range(old):
            matrix[i, j] = max(0.0, 1 - abs((j + 0.5 - centre) / radius))
        matrix[i] /= matrix[i].sum()
    return matrix


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((8, 8), (5, 5)), ((6, 4), (3, 8)), ((7, 7), (7, 9))])
def test_flexivits_resize_written_out(old: tuple[int, int], new: tuple[int, int]) -> None:
    weight = torch.randn(3, 2, *old, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = np.kron(reference_matrix(old[0], new[0]), reference_matrix(old[1], new[1]))  # on raster-order patches
    inverse = np.linalg.pinv(matrix.T)
    found = resize_patches(weight, new)
    for d in range(3):
        for c in range(2):
            expected = (inverse @ weight[d, c].numpy().ravel()).reshape(new)
            np.testing.assert_allclose(found[d, c].numpy(), expected, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(old=st.integers(2, 10), new=st.integers(2, 14), seed=st.integers(0, 99))
def test_tokens_of_resized_patches_stay_what_they_were(old: int, new: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, old, old, dtype=torch.float64, generator=generator)
    patch = torch.randn(3, old, old, dtype=torch.float64, generator=generator)
    resize = resize_matrix(old, new)
    if new < old:  # only what a smaller patch can hold comes back
        back = torch.linalg.pinv(resize)
        patch = back @ torch.randn(3, new, new, dtype=torch.float64, generator=generator) @ back.T
    resized = resize @ patch @ resize.T
    tokens = (weight * patch).sum((1, 2, 3))
    torch.testing.assert_close(
        (resize_patches(weight, (new, new)) * resized).sum((1, 2, 3)), tokens, atol=1e-8, rtol=1e-6
    )


def test_patches_of_lines_and_volumes_are_resized_along_each_axis() -> None:
    weight = torch.randn(2, 1, 3, 4, 5, dtype=torch.float64)
    steps = resize_patches(resize_patches(weight, (6, 4, 5)), (6, 4, 7))
    torch.testing.assert_close(resize_patches(weight, (6, 4, 7)), steps)
    line = resize_patches(weight[:, :, :, 0, 0], (6,))
    torch.testing.assert_close(
        line[0, 0], torch.from_numpy(np.linalg.pinv(reference_matrix(3, 6).T)) @ weight[0, 0, :, 0, 0]
    )


@settings(deadline=None, max_examples=40)
@given(old=st.integers(1, 6), new=st.integers(1, 12))
def test_grey_images_keep_their_tokens_with_any_number_of_channels(old: int, new: int) -> None:
    weight = torch.randn(3, old, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(old))
    found = adapt_channels(weight, new)
    assert found.shape == (3, new, 4, 4)
    torch.testing.assert_close(found.sum(1), weight.sum(1))
    if new == old:
        assert torch.equal(found, weight)


def test_channels_as_the_documentation_says() -> None:
    red, green, blue = torch.randn(3, 2, 1, 4, 4)
    rgb = torch.cat([red, green, blue], 1)
    torch.testing.assert_close(adapt_channels(rgb, 1), red + green + blue)
    torch.testing.assert_close(adapt_channels(rgb, 4), torch.cat([red / 2, green, blue, red / 2], 1))
    torch.testing.assert_close(adapt_channels(rgb, 6), torch.cat([red, green, blue, red, green, blue], 1) / 2)
    torch.testing.assert_close(adapt_channels(rgb, 2), torch.cat([red + blue, green], 1))


def test_a_file_of_another_grid_patch_and_channels_is_resized_and_told(tmp_path: Path) -> None:
    path = saved(timm_vit(img_size=64, patch_size=16, in_chans=1), tmp_path / "a.safetensors")
    vit = make(8, 48, **SMALL)
    report = fill(vit, path=path)
    assert report.resized == {
        "pos_embed": "grid 4 x 4 -> 6 x 6, bicubic by the convention of dinov2",
        "patch_embed.proj.weight": "channels 1 -> 3, with the same sum over channels; "
        "patches 16 x 16 -> 8 x 8, pseudo-inverse resize (FlexiViT)",
    }
    source = load_file(path)
    expected = interpolate_positions(source["pos_embed"][:, 1:], (4, 4), (6, 6), "dinov2", 0.1, False)
    assert torch.equal(vit.state_dict()["pos_embed"][:, 1:], expected)
    weight = resize_patches(source["patch_embed.proj.weight"] / 3, (8, 8)).repeat(1, 3, 1, 1)
    torch.testing.assert_close(vit.state_dict()["patch_embed.proj.weight"], weight)


def test_rectangular_grids_both_ways(tmp_path: Path) -> None:
    vit = make(8, 32, **SMALL)
    wide = {"pos_embed": torch.randn(1, 1 + 2 * 6, 32)}
    path = saved(timm_vit(), tmp_path / "square.safetensors")
    save_file({**load_file(path), **wide}, tmp_path / "wide.safetensors")
    assert "pos_embed has 13 rows, which are not a square" in refusal(vit, path=tmp_path / "wide.safetensors")
    assert "say their grid: init.grid: [height, width]" in refusal(vit, path=tmp_path / "wide.safetensors")
    assert "init.grid: 3 x 5 does not fit pos_embed, which has 16 places" in refusal(vit, path=path, grid=[3, 5])
    v2 = {**load_file(tmp_path / "wide.safetensors"), "mask_token": torch.zeros(1, 32)}  # as DINOv2's files have
    save_file(v2, tmp_path / "v2.safetensors")
    assert "12 places, which are no square: say its grid, such as init.grid: [4, ...]" in refusal(
        vit, path=tmp_path / "v2.safetensors"
    )
    fill(vit, path=tmp_path / "wide.safetensors", grid=[2, 6])
    expected = interpolate_positions(wide["pos_embed"][:, 1:], (2, 6), (4, 4), "dinov2", 0.1, False)
    assert torch.equal(vit.state_dict()["pos_embed"][:, 1:], expected)
    vit.native_grid = (2, 8)  # as many places as the file's 4 x 4
    report = fill(vit, path=path)
    assert report.resized["pos_embed"].startswith("grid 4 x 4 -> 2 x 8")


# -- strictness -------------------------------------------------------------------------------------------------------


def test_another_architecture_is_described_with_the_fix(tmp_path: Path) -> None:
    path = saved(timm_vit(embed_dim=64, depth=3), tmp_path / "b.safetensors")
    text = refusal(make(8, 32, **SMALL), path=path)
    assert f"networks.student.init: {path} does not fit the backbone: 0 of 31 keys fit" in text
    assert "cls_token (1, 1, 64) instead of (1, 1, 32)" in text
    assert "in the file, but not in the backbone (12): blocks.2." in text
    assert "the file holds embed_dim 64, depth 3, num_registers 0, layer_scale null, ffn mlp, qkv_bias true" in text
    assert "make networks.student.backbone what the file holds" in text


def test_keys_that_do_not_fit_are_errors_unless_they_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**timm_vit().state_dict(), "norm_pre.weight": torch.ones(32)}
    save_file(state, tmp_path / "a.safetensors")
    vit = make(8, 32, **{**SMALL, "num_registers": 2, "layer_scale": 1e-5})
    text = refusal(vit, path=tmp_path / "a.safetensors")
    assert "missing in the file (5): reg_token, blocks.0.ls1.gamma" in text
    assert "in the file, but not in the backbone (1): norm_pre.weight" in text
    assert "norm_pre" in refusal(vit, path=tmp_path / "a.safetensors", allow_missing=["reg_token", "*.gamma"])
    logging.getLogger("ssl_platform").addHandler(caplog.handler)
    try:
        report = fill(
            vit,
            path=tmp_path / "a.safetensors",
            allow_missing=["reg_token", "*.gamma", "regs"],
            allow_unused=["norm_pre.*"],
        )
    finally:
        logging.getLogger("ssl_platform").removeHandler(caplog.handler)
    assert "the pattern 'regs' allows nothing" in caplog.text and "does not say its num_heads" in caplog.text
    assert len(report.fresh) == 6 and report.unused == ["norm_pre.weight"]
    assert "1 unused" in report.lines()[0] and any(line.startswith("  unused: norm_pre") for line in report.lines())


def test_other_heads_than_a_known_networks_are_an_error(finished: Path) -> None:
    text = refusal(make(8, 32, **{**SMALL, "num_heads": 4}), path=finished)
    assert "num_heads 2, but the backbone has 4" in text


def test_bad_files_are_errors_in_words(finished: Path, tmp_path: Path) -> None:
    vit, good = make(8, 32, **SMALL), saved(timm_vit(num_classes=3), tmp_path / "good.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:5000])
    assert f"{cut}: cannot be read as safetensors" in refusal(vit, path=cut)
    objects = tmp_path / "objects.pth"
    torch.save(timm_vit(), objects)
    assert "reading such objects can run code. Save its state dict alone" in refusal(vit, path=objects)
    torch.save(timm_vit().state_dict(), tmp_path / "whole.pth")
    cut_off = tmp_path / "cut.pth"
    cut_off.write_bytes((tmp_path / "whole.pth").read_bytes()[:3000])
    assert f"{cut_off}: " in refusal(vit, path=cut_off)
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "empty.pth: cannot be read" in refusal(vit, path=tmp_path / "empty.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    assert "holds a list, where a state dict {name: tensor} is needed" in refusal(vit, path=tmp_path / "list.pth")
    torch.save({"student": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "student.pth")
    assert "has no network 'teacher': it has student; set init.network" in refusal(vit, path=tmp_path / "student.pth")
    save_file({key: v for key, v in load_file(good).items() if key.startswith("head.")}, tmp_path / "head.safetensors")
    assert "it holds only heads: head.bias, head.weight" in refusal(vit, path=tmp_path / "head.safetensors")
    nan = load_file(good)
    nan["norm.bias"][3] = math.nan
    save_file(nan, tmp_path / "nan.safetensors")
    assert "norm.bias has values that are not finite" in refusal(vit, path=tmp_path / "nan.safetensors")
    assert "none.pth: no such file or folder" in refusal(vit, path=tmp_path / "none.pth")
    assert "neither a run folder with a checkpoint" in refusal(vit, path=tmp_path)
    assert "has no network 'studnt', but student, teacher" in refusal(vit, path=finished, network="studnt")
    inside = finished / "checkpoints/step_00000004/model.safetensors"
    assert f"name its folder, {inside.parent}" in refusal(vit, path=inside)
    assert "timm's 'vit_smal': its weights cannot be had" in refusal(vit, timm="vit_smal")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pth", "old.pth", "safetensors"])
def test_damaged_files_are_read_or_refused_in_words(kind: str, tmp_path: Path) -> None:
    """The reader of torch raises AssertionError, IndexError, struct.error, ... for damaged bytes."""
    tensors = {"cls_token": torch.zeros(1, 1, 8), "norm.weight": torch.ones(8), "mask_token": torch.zeros(1, 8)}
    path = tmp_path / f"file.{kind}"
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pth")
    whole, rng, refused = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0), 0
    for _ in range(400):
        damaged = whole[: rng.integers(len(whole)) if rng.random() < 0.2 else None].copy()
        damaged[rng.integers(0, max(len(damaged), 1), min(len(damaged), 3))] = rng.integers(0, 256)
        path.write_bytes(damaged.tobytes())
        try:
            read(InitConfig(path=path))
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_positions_of_another_kind_and_other_readers_are_refused(tmp_path: Path) -> None:
    vit = make(8, 32, **SMALL)
    rotary = timm.create_model("vit_small_patch16_dinov3", pretrained=False, embed_dim=32, depth=1, num_heads=2)
    text = refusal(vit, path=saved(rotary, tmp_path / "r.safetensors"))
    assert "has no pos_embed, as models of DINOv3 and EVA" in text and "position: {kind: rope}" in text
    turning, learned = make(8, 32, position={"kind": "rope"}, **SMALL), saved(timm_vit(), tmp_path / "l.safetensors")
    text = refusal(turning, path=learned)
    assert "set position.kind: learned, or give up its positions with init.allow_unused: [pos_embed]" in text
    assert fill(turning, path=learned, allow_unused=["pos_embed"]).unused == ["pos_embed"]
    rope_run, learned_run = make(8, 32, position={"kind": "rope"}, **SMALL), make(8, 32, **SMALL)
    for network, other, allowed in (
        (turning, learned_run, {"allow_unused": ["pos_embed"]}),
        (vit, rope_run, {"allow_missing": ["pos_embed"]}),
    ):
        state = _of_module(other, "a run", None)
        config = validate(InitConfig, {"path": "run", **allowed})
        report, _ = fit(state, network, config, "student")
        assert sorted(report.matched) == sorted(rope_run.state_dict()), "as the message says"
    save_file({"embeddings.cls_token": torch.zeros(1)}, tmp_path / "hf.safetensors")
    assert "transformers' format" in refusal(vit, path=tmp_path / "hf.safetensors")


def test_a_network_whose_patches_bring_their_own_positions_continues() -> None:
    vit = make(8, 32, **SMALL)
    vit.pos_embed = vit.native_grid = None
    report, _ = fit(_of_module(vit, "a run", None), vit, validate(InitConfig, {"path": "run"}), "student")
    assert sorted(report.matched) == sorted(vit.state_dict())


@pytest.mark.parametrize(
    ("network", "init", "message"),
    [
        ("student", "{}", "networks.student.init: needs one of path: FILE OR FOLDER and timm: NAME"),
        ("student", "{path: a, timm: b}", "networks.student.init: needs one of path: FILE OR FOLDER and timm: NAME"),
        ("student", "{path: a, allow_mising: [x]}", "unknown key; did you mean 'allow_missing'?"),
        (
            "teacher",
            "{path: a}",
            "networks.teacher.init: 'teacher' starts as a copy of 'student'; give the init to that",
        ),
    ],
)
def test_sections_that_cannot_be_meant(
    network: str, init: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(SMOKE), f"run_dir={tmp_path / 'run'}", f"networks.{network}.init={init}"]) == 1
    assert message in capsys.readouterr().err


# -- runs -------------------------------------------------------------------------------------------------------------


def arguments(run_dir: Path, source: Path, *more: str, freeze: int = 0) -> list[str]:
    init = f"networks.student.init={{path: {source}, freeze_steps: {freeze}}}"
    return [
        f"run_dir={run_dir}",
        "steps=6",
        "save_every=1",
        "keep_last=9",
        "log_every=1",
        "tensorboard=false",
        init,
        *more,
    ]


def trunk_of(run_dir: Path, step: int, network: str) -> dict[str, Tensor]:
    prefix = f"networks.{network}."
    found = load_file(run_dir / f"checkpoints/step_{step:08d}/model.safetensors")
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def test_a_frozen_trunk_stays_and_heads_move_and_a_resume_in_the_midst_is_exact(tmp_path: Path) -> None:
    source = saved(timm_vit(), tmp_path / "a.safetensors")
    train(load_recipe(SMOKE, arguments(tmp_path / "whole", source, freeze=4)), torch.device("cpu"))
    expected = load_file(source)
    fresh = {"mask_token": torch.zeros(1, 32)}
    for step in range(1, 7):
        for network in ("student", "teacher"):
            trunk = trunk_of(tmp_path / "whole", step, network)
            same = [torch.equal(value, {**expected, **fresh}[key]) for key, value in trunk.items()]
            assert all(same) if step <= 4 else not any(same), (step, network)
    heads = [load_file(tmp_path / f"whole/checkpoints/step_{s:08d}/model.safetensors") for s in (1, 2)]
    moved = [key for key in heads[0] if key.startswith("heads.") and not torch.equal(heads[0][key], heads[1][key])]
    assert len(moved) == len([key for key in heads[0] if key.startswith("heads.")])
    report = json.loads((tmp_path / "whole/init.json").read_text())["student"]
    assert report["freeze_steps"] == 4 and report["fresh"] == ["mask_token"] and len(report["matched"]) == 30
    assert re.fullmatch("[0-9a-f]{64}", report["sha256"])

    train(load_recipe(SMOKE, arguments(tmp_path / "halves", source, freeze=4)), torch.device("cpu"))
    written = (tmp_path / "halves/init.json").stat().st_mtime_ns
    for path in (tmp_path / "halves/checkpoints").glob("step_*"):
        if int(path.name[5:]) > 2:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    source.unlink()  # a resumed run does not read it again
    train(load_recipe(SMOKE, arguments(tmp_path / "halves", source, freeze=4)), torch.device("cpu"))
    assert_equal(tmp_path / "whole", tmp_path / "halves", 6)
    assert (tmp_path / "halves/init.json").stat().st_mtime_ns == written


def test_a_refused_run_leaves_nothing_and_a_mended_one_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = saved(timm_vit(depth=1), tmp_path / "bad.safetensors")
    assert main([str(SMOKE), *arguments(tmp_path / "run", bad)]) == 1
    error = capsys.readouterr().err
    assert "missing in the file (12): blocks.1.norm1.weight" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
    good = saved(timm_vit(), tmp_path / "good.safetensors")
    changes = ["optim.layer_decay=0.5", "optim.patch_embed_lr=0.1", "optim.scale_lr=linear256", "optim.lr=0.00128"]
    assert main([str(SMOKE), *arguments(tmp_path / "run", good, *changes, "steps=1", freeze=2)]) == 0
    error = capsys.readouterr().err
    assert "network student starts from" in error and "30 of 31 keys matched, 0 resized, 1 fresh" in error
    assert "networks.student.init.freeze_steps: 2, the whole run of 1 steps" in error
    assert "peak learning rate of network student" in error and "peak learning rate of head dino: 4.00e-05" in error
    assert ".safetensors" not in json.dumps(Encoder.load(tmp_path / "run").config.model_dump(mode="json")["networks"])


def test_heads_start_alike_with_and_without_init(tmp_path: Path) -> None:
    source = saved(timm_vit(), tmp_path / "a.safetensors")
    still = ["steps=1", "optim.lr=0.0"]
    train(load_recipe(SMOKE, arguments(tmp_path / "with", source, *still)), torch.device("cpu"))
    without = [item for item in arguments(tmp_path / "without", source, *still) if ".init" not in item]
    train(load_recipe(SMOKE, without), torch.device("cpu"))
    one, two = (
        load_file(tmp_path / f"{name}/checkpoints/step_00000001/model.safetensors") for name in ("with", "without")
    )
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert different and not any(key.startswith("heads.") for key in different)
    assert not (tmp_path / "without/init.json").exists()


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_heads_are_taken_over_from_a_run_if_asked_for(network: str, finished: Path, tmp_path: Path) -> None:
    init = f"networks.student.init={{path: {finished}, network: {network}, heads: true}}"
    settings = [item for item in arguments(tmp_path / "run", finished) if ".init" not in item]
    train(load_recipe(SMOKE, [*settings, init, "steps=1", "optim.lr=0.0"]), torch.device("cpu"))
    before = load_file(finished / "checkpoints/step_00000004/model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/step_00000001/model.safetensors")
    heads = [key for key in after if key.startswith("heads.")]
    assert len(heads) == 16
    for key in heads:
        _, head, _, rest = key.split(".", 3)
        assert torch.equal(after[key], before[f"heads.{head}.{network}.{rest}"]), key
    report = json.loads((tmp_path / "run/init.json").read_text())["student"]
    assert report["heads_taken_over"] == ["dino"] and not report["heads_left_out"]


def test_heads_of_a_run_that_start_fresh_are_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(SMOKE), *arguments(tmp_path / "run", finished, "steps=1")]) == 0
    error = capsys.readouterr().err
    assert "1 of heads left out" in error and "init.heads: true takes over those of the same names" in error


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (
            "run",
            "heads.dino.num_prototypes=32",
            "init.heads: the source's head 'dino' is another one: last_layer.weight_g",
        ),
        (
            "run",
            "heads.dino.last_layer=linear",
            "last_layer.weight None instead of (64, 16), last_layer.weight_g (64, 1)",
        ),
        (
            "run",
            "heads.third={name: projection, hidden_dim: 8}",
            "has no head third, but only dino; leave init.heads",
        ),
        ("file", "seed=1", "has no head dino, but none (public files and exports hold none)"),
    ],
)
def test_heads_that_cannot_be_taken_over(
    source: str, change: str, message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished if source == "run" else saved(timm_vit(), tmp_path / "a.safetensors")
    init = f"networks.student.init={{path: {path}, heads: true}}"
    assert main([str(SMOKE), f"run_dir={tmp_path / 'run'}", "steps=1", init, change]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_heads_of_a_dinov2_training_file(case: str, tmp_path: Path) -> None:
    facts, tensors = conformance(case)
    whole = {key.removeprefix("teacher_final/"): v for key, v in tensors.items() if key.startswith("teacher_final/")}
    torch.save({"teacher": whole}, tmp_path / "training.pth")
    found = read(InitConfig(path=tmp_path / "training.pth", heads=True)).heads
    assert found and set(found) <= {"dino", "ibot"}
    for name, state in found.items():
        heads = validate(Heads, {"heads": {name: head_like(state)}}).heads
        config = InitConfig(path=tmp_path / "training.pth", heads=True)
        filling = Initialiser({"student": NetworkConfig(init=config)}, heads)
        filling.networks({"student": conformance_vit(facts)})
        head = heads[name].build(embed_dim=conformance_vit(facts).embed_dim)
        filling.heads({name: head})
        assert all(torch.equal(value, whole[f"{name}_head.{key}"]) for key, value in head.state_dict().items())
        assert not any(key.startswith(f"{name}_head.") for key in filling.reports[0].heads_left_out)


class Heads(Section):
    heads: dict[str, plugin("ssl_platform.heads")]  # type: ignore[valid-type]


def head_like(state: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of the head whose tensors these are."""
    layers = [key for key in state if key.startswith("mlp.") and key.endswith(".weight")]
    return {
        "name": "projection",
        "num_prototypes": len(state["last_layer.weight_v"]),
        "bottleneck_dim": state["last_layer.weight_v"].shape[1],
        "hidden_dim": len(state[layers[0]]),
        "num_layers": len(layers),
    }


def test_peak_rates_are_those_that_are_applied() -> None:
    rules = {
        "networks.student.patch_embed.proj.weight": optim.ParameterRule(0.01, 1.0, False, 3),
        "networks.student.blocks.0.norm1.weight": optim.ParameterRule(0.25, 0.0, False, 3),
        "networks.student.blocks.1.norm1.weight": optim.ParameterRule(0.5, 0.0, False, 3),
        "networks.student.norm.weight": optim.ParameterRule(1.0, 0.0, False, 3),
        "heads.dino.student.mlp.weight": optim.ParameterRule(1.0, 1.0, False),
        "heads.dino.student.last_layer.weight_v": optim.ParameterRule(1.0, 1.0, True),
        "heads.dino_two.student.last_layer.weight_v": optim.ParameterRule(1.0, 1.0, True),
        "objectives.kde.scale": optim.ParameterRule(1.0, 1.0, False),
    }
    named = [(name, nn.Parameter(torch.zeros(1)), rule) for name, rule in rules.items()]
    optimizer = optim.build_optimizer(named, name="adamw", betas=(0.9, 0.999), eps=1e-8)
    schedule = optim.Cosine(schedule="cosine", start=0.8, end=0.0, warmup_steps=2).build(10)
    applied = dict.fromkeys(rules, 0.0)
    for step in range(10):
        optim.set_step(optimizer, step=step, lr=schedule(step), weight_decay=0.0, freeze_last_layer=step < 5)
        for group in optimizer.param_groups:
            for name in group["names"]:
                applied[name] = max(applied[name], group["lr"])
    peak = {name.partition(".")[2]: f"{value:.2e}" for name, value in applied.items()}
    assert optim.peak_rates(optimizer, schedule, 10, 5) == [
        f"peak learning rate of network student: patch_embed {peak['student.patch_embed.proj.weight']}; "
        f"blocks {peak['student.blocks.0.norm1.weight']} (lowest layer) to "
        f"{peak['student.blocks.1.norm1.weight']} (highest); "
        f"norm {peak['student.norm.weight']}; 0 in the first 3 steps",
        f"peak learning rate of head dino: mlp {peak['dino.student.mlp.weight']}; "
        f"last_layer {peak['dino.student.last_layer.weight_v']}; last_layer 0 in the first 5 steps",
        f"peak learning rate of objective kde: {peak['kde.scale']}",
        f"peak learning rate of head dino_two: {peak['dino_two.student.last_layer.weight_v']}; "
        "last_layer 0 in the first 5 steps",
    ]
    assert peak["student.norm.weight"] != peak["dino.student.mlp.weight"] == "8.00e-01"


# -- several processes ------------------------------------------------------------------------------------------------


def filled_on_a_rank(path: str) -> str:
    vit = make(8, 32, **SMALL)
    try:
        fill(vit, path=path)
    except ConfigError as error:
        return str(error)
    return f"filled {vit.state_dict()['cls_token'].sum():.6f}"


def test_every_rank_is_filled_and_every_rank_is_told(tmp_path: Path) -> None:
    one, two = run_ranks(2, filled_on_a_rank, str(saved(timm_vit(), tmp_path / "a.safetensors")))
    assert one == two and one.startswith("filled")
    one, two = run_ranks(2, filled_on_a_rank, str(tmp_path / "none.pth"))
    assert one == two and "none.pth: no such file or folder" in one


# -- the anchor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("masks", [None, "block"])
def test_an_anchor_holds_the_student_at_its_start(distance: str, masks: str | None) -> None:
    from ssl_platform.step import train_step
    from tests import engine

    networks = engine.settings()["networks"] | {"anchor": {"update": "frozen", "of": "student"}}
    anchor = {"name": "anchor", "distance": distance, "masks": masks}
    parts = engine.parts(networks=networks, objectives={"dino": engine.DINO, "anchor": anchor})
    model, batch = parts.student_teacher, engine.batch()
    first = model(batch, 0, ["anchor"])
    if masks is None:
        assert first.loss.item() == pytest.approx(0, abs=1e-6), "the anchor starts as the student"
    start = {key: value.clone() for key, value in model.networks["anchor"].state_dict().items()}
    train_step(parts, iter([batch]), 0, ["dino"])
    with torch.no_grad():
        output = model(batch, 1, ["anchor"])
        views = batch.groups["global"].views
        hidden = batch.groups["global"].masks["block"] if masks else None
        ours, theirs = (
            model.networks[name]([Input(views, m)])[0] for name, m in (("student", hidden), ("anchor", None))
        )
    values: dict[str, list[float]] = {"cls": [], "patches": []}
    for v in range(len(views)):
        for b in range(views.shape[1]):
            pairs = [("cls", ours.cls[(v, 0, b) if masks else (v, b)], theirs.cls[v, b])]
            for n in range(theirs.patches.shape[2]):
                if hidden is None or not hidden[v, 0, b, n]:
                    pairs.append(
                        ("patches", ours.patches[(v, 0, b, n) if masks else (v, b, n)], theirs.patches[v, b, n])
                    )
            for term, x, y in pairs:
                d = (x - y).abs()
                smooth = torch.where(d < 1, d**2 / 2, d - 0.5).mean()
                values[term].append(float(1 - x @ y / x.norm() / y.norm() if distance == "cosine" else smooth))
    for term, found in values.items():
        assert output.terms[f"anchor_{term}"].item() == pytest.approx(np.mean(found), rel=1e-4, abs=1e-6)
        assert np.mean(found) > 1e-6
    assert all(torch.equal(v, start[key]) for key, v in model.networks["anchor"].state_dict().items())
    train_step(parts, iter([batch]), 1, ["dino", "anchor"])
