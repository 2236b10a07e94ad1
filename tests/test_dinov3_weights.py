"""DINOv3's weights: from its own files and timm's, to timm, with timm's features."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor

from ssl_platform.backbones._conversion import from_timm, to_timm
from ssl_platform.backbones.vit import Config, VisionTransformer
from ssl_platform.encoder import Encoder
from ssl_platform.export import main as export_main
from ssl_platform.recipe import load_recipe
from ssl_platform.train import train
from tests.test_conversion import images_of, make, run
from tests.test_init import fill, refusal, saved

SMOKE = Path(__file__).parents[1] / "configs" / "smoke" / "pathology.yaml"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
ROPE = {"position": {"kind": "rope"}}
RELEASED = {**SMALL, **ROPE, "num_registers": 4, "norm_eps": 1e-5}
"""As DINOv3's released models but for the size."""


def same(ours: VisionTransformer, theirs: Any, size: int = 32, width: int | None = None) -> None:
    """Class, register and patch tokens agree to 1e-5."""
    images = images_of(size, width)
    with torch.inference_mode():
        expected = theirs.eval().forward_features(images)
    features, first = run(ours, images), 1 + ours.num_registers
    torch.testing.assert_close(features.cls[0], expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.patches[0], expected[:, first:], atol=1e-5, rtol=1e-5)
    if features.registers is not None:
        torch.testing.assert_close(features.registers[0], expected[:, 1:first], atol=1e-5, rtol=1e-5)


def timm_model(name: str = "vit_small_patch16_dinov3", **arguments: Any) -> Any:
    """A small DINOv3 model of timm's with every parameter moved off its initial value."""
    torch.manual_seed(3)
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    model = timm.create_model(name, pretrained=False, **{**size, **arguments}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if "gamma" in key else 0.1)
    return model


# -- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"norm_eps": 1e-5, "num_registers": 4, "qkv_bias": False}, "vit_small_patch16_dinov3"),
        ({"norm_eps": 1e-5, "num_registers": 4, "mask_k_bias": True}, "vit_small_patch16_dinov3"),
        ({"norm_eps": 1e-5, "ffn": "swiglu", "mlp_ratio": 3.0}, "vit_small_patch16_dinov3"),
        ({"num_registers": 1, "layer_scale": None}, "vit_base_patch16_rope_reg1_gap_256"),
        ({"position": {"kind": "rope", "base": 50.0}}, "vit_base_patch16_rope_reg1_gap_256"),
    ],
)
def test_a_network_goes_to_timm_with_strict_keys_and_comes_back(changes: dict[str, Any], architecture: str) -> None:
    vit = make(8, 32, **{**SMALL, **ROPE, **changes})
    with torch.no_grad():
        for name, bias in vit.named_parameters():
            if name.endswith("qkv.bias"):
                bias.add_(torch.randn_like(bias))  # of the keys too, which `mask_k_bias` must not see
    model = to_timm(vit)
    assert model.architecture == architecture
    theirs = timm.create_model(architecture, **json.loads(json.dumps(model.model_args)))
    theirs.load_state_dict(model.state, strict=True)
    same(vit, theirs)
    same(vit, theirs, 24, 48)
    with torch.inference_mode():
        pooled = theirs(images_of(32))
    torch.testing.assert_close(pooled, run(vit, images_of(32)).cls[0], atol=1e-5, rtol=1e-5)
    back = make(8, 32, seed=1, **{**SMALL, **ROPE, **changes})
    back.load_state_dict(from_timm(model.state, back))
    assert torch.equal(run(back, images_of(32)).patches, run(vit, images_of(32)).patches)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_eps": 1e-4}, "norm_eps 0.0001: timm's models with RoPE have 1e-05 or 1e-06"),
        ({"position": {"kind": "rope", "normalize": "max"}}, "normalised by each axis"),
        ({"position": {"kind": "rope", "min_max_period": (1.0, 9.0)}}, "timm's RoPE has a base"),
        ({"embed_dim": 12}, "heads of 6 channels: timm's RoPE needs a multiple of 4"),
        ({"untied_norms": {"cls": True}}, "untied_norms.cls: timm's vision transformers have one final norm"),
    ],
)
def test_what_timm_does_not_have_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        to_timm(make(8, 32, **{**SMALL, **ROPE, **changes}))
    assert words in str(error.value)


def test_a_learned_network_without_bias_of_keys_has_none_in_timm() -> None:
    vit = make(8, 32, mask_k_bias=True, untied_norms={"local": "local"}, **SMALL)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.bias.add_(torch.randn_like(block.attn.qkv.bias))
    model = to_timm(vit)
    theirs = timm.create_model(model.architecture, **model.model_args)
    theirs.load_state_dict(model.state, strict=True)
    same(vit, theirs)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_small_patch16_dinov3", {"qkv_bias": False}),
        ("vit_small_patch16_dinov3_qkvb", {"mask_k_bias": True}),
        ("vit_small_plus_patch16_dinov3", {"qkv_bias": False, "ffn": "swiglu", "mlp_ratio": 6.0}),
    ],
)
def test_a_timm_file_gives_timms_features(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, vit = timm_model(name), make(8, 32, **{**RELEASED, **changes})
    report = fill(vit, path=saved(model, tmp_path / "model.safetensors"))
    assert report.layout == "timm" and report.fresh == ["mask_token"] and not report.unused
    same(vit, model)
    same(vit, model, 40, 24)


def test_facts_that_no_tensor_shows_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that timm made says its RoPE, norms and heads."""
    model = timm_model(rope_temperature=50)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    text = refusal(make(8, 32, **{**RELEASED, "qkv_bias": False}), timm="vit_small_patch16_dinov3.lvd1689m")
    assert "rope_base 50.0, but the backbone has 100.0" in text
    vit = make(8, 32, **{**RELEASED, "qkv_bias": False, "position": {"kind": "rope", "base": 50.0}})
    fill(vit, timm="vit_small_patch16_dinov3.lvd1689m")
    same(vit, model)


@pytest.mark.parametrize(
    ("name", "embed_dim", "settings"),
    [
        ("vit_small_patch16_dinov3", 384, {}),
        ("vit_small_plus_patch16_dinov3", 384, {"ffn": "swiglu", "mlp_ratio": 6.0}),
        ("vit_huge_plus_patch16_dinov3", 1280, {"ffn": "swiglu", "mlp_ratio": 6.0, "num_heads": 20}),
        ("vit_7b_patch16_dinov3", 4096, {"ffn": "swiglu", "mlp_ratio": 3.0, "num_heads": 32}),
    ],
)
def test_the_widths_of_the_page_are_those_of_the_models(name: str, embed_dim: int, settings: dict[str, Any]) -> None:
    """docs/dinov3.md; on the meta device, one block of each."""
    model = timm.create_model(name, pretrained=False, depth=1, device="meta")
    config = Config(embed_dim=embed_dim, **settings)
    assert model.blocks[0].mlp.fc2.in_features == config.hidden_dim and model.embed_dim == embed_dim
    assert model.blocks[0].attn.num_heads == config.num_heads


# -- DINOv3's own files -----------------------------------------------------------------------------------------------


def dinov3_state(vit: VisionTransformer, swiglu: bool = False) -> dict[str, Tensor]:
    """A state dict as facebookresearch/dinov3 names it, random where the released files hold weights."""
    generator, dim = torch.Generator().manual_seed(11), vit.embed_dim

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    state = {"cls_token": noise(1, 1, dim), "mask_token": noise(1, dim), "storage_tokens": noise(1, 4, dim)}
    state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = noise(dim, 3, 8, 8), noise(dim)
    state["rope_embed.periods"] = (100 ** (torch.arange(4) / 4)).bfloat16()  # heads of 16 channels
    for i in range(vit.num_layers):
        of = f"blocks.{i}."
        state[of + "attn.qkv.weight"], state[of + "attn.qkv.bias"] = noise(3 * dim, dim), noise(3 * dim)
        state[of + "attn.qkv.bias_mask"] = torch.cat([torch.ones(dim), torch.zeros(dim), torch.ones(dim)])
        state[of + "attn.proj.weight"], state[of + "attn.proj.bias"] = noise(dim, dim), noise(dim)
        for name, shape in (
            {"w1": (vit.hidden_dim, dim), "w2": (vit.hidden_dim, dim), "w3": (dim, vit.hidden_dim)}
            if swiglu
            else {"fc1": (vit.hidden_dim, dim), "fc2": (dim, vit.hidden_dim)}
        ).items():
            state[f"{of}mlp.{name}.weight"], state[f"{of}mlp.{name}.bias"] = noise(*shape), noise(shape[0])
        for name in ("ls1.gamma", "ls2.gamma"):
            state[of + name] = noise(dim)
        for name in ("norm1", "norm2"):
            state[f"{of}{name}.weight"], state[f"{of}{name}.bias"] = 1 + noise(dim), noise(dim)
    state["norm.weight"], state["norm.bias"] = 1 + noise(dim), noise(dim)
    return state


@pytest.mark.parametrize("kind", ["released.pth", "training.pth", "plain.safetensors"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_dinov3_file_gives_the_features_that_timm_makes_of_it(kind: str, swiglu: bool, tmp_path: Path) -> None:
    ffn = {"ffn": "swiglu", "mlp_ratio": 6.0} if swiglu else {}
    vit = make(8, 32, **{**RELEASED, "mask_k_bias": True, **ffn})
    state, path = dinov3_state(vit, swiglu), tmp_path / kind
    if kind == "training.pth":
        heads = {"dino_head.last_layer.weight": torch.zeros(3, 3)}
        torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()} | heads}, path)
    elif kind == "released.pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    report = fill(vit, path=path)
    assert report.layout == "dinov3" and sorted(report.matched) == sorted(vit.state_dict()) and not report.fresh
    assert torch.equal(vit.mask_token, state["mask_token"]) and not report.unused
    name = "vit_small_plus_patch16_dinov3_qkvb" if swiglu else "vit_small_patch16_dinov3_qkvb"
    theirs = timm_model(name, **({"mlp_ratio": vit.hidden_dim / 32} if swiglu else {}))
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs), strict=True)
    same(vit, theirs)
    same(vit, theirs, 24, 48)


def test_biases_that_are_all_zero_are_left_out_and_others_are_not(tmp_path: Path) -> None:
    """The released models have such biases: timm's models of the same name have none."""
    vit = make(8, 32, **{**RELEASED, "qkv_bias": False})
    state = dinov3_state(vit)
    save_file(state, tmp_path / "biased.safetensors")
    assert "in the file, but not in the backbone (2): blocks.0.attn.qkv.bias" in refusal(
        vit, path=tmp_path / "biased.safetensors"
    )
    zero = {key: value * 0 if key.endswith("qkv.bias") else value for key, value in state.items()}
    save_file(zero, tmp_path / "zero.safetensors")
    assert not fill(vit, path=tmp_path / "zero.safetensors").unused


def test_norms_of_their_own_are_taken_and_missed(tmp_path: Path) -> None:
    untied = make(8, 32, **{**RELEASED, "mask_k_bias": True, "untied_norms": {"local": "local"}})
    state = dinov3_state(untied)
    save_file(state, tmp_path / "tied.safetensors")
    assert "missing in the file (2): local_cls_norm.weight, local_cls_norm.bias" in refusal(
        untied, path=tmp_path / "tied.safetensors"
    )
    state |= {"local_cls_norm.weight": torch.full((32,), 2.0), "local_cls_norm.bias": torch.zeros(32)}
    save_file(state, tmp_path / "untied.safetensors")
    assert not fill(untied, path=tmp_path / "untied.safetensors").fresh
    assert untied.local_cls_norm is not None and bool((untied.local_cls_norm.weight == 2).all())
    tied = make(8, 32, **{**RELEASED, "mask_k_bias": True})
    report = fill(tied, path=tmp_path / "untied.safetensors", allow_unused=["local_cls_norm.*"])
    assert sorted(report.unused) == ["local_cls_norm.bias", "local_cls_norm.weight"]


def test_other_periods_and_learned_positions_are_refused(tmp_path: Path) -> None:
    vit = make(8, 32, **{**RELEASED, "mask_k_bias": True, "position": {"kind": "rope", "base": 50.0}})
    path = tmp_path / "v3.safetensors"
    save_file(dinov3_state(vit), path)
    text = refusal(vit, path=path)
    assert "its RoPE has periods from 1 to 31.6" in text and "the backbone from 1 to 18.8" in text
    assert "has no pos_embed" in refusal(make(8, 32, num_registers=4, **SMALL), path=path)


def test_biases_of_keys_are_not_lost_in_silence(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_small_patch16_dinov3", embed_dim=32, depth=1, num_heads=2, patch_size=8, img_size=32, qkv_bias=True,
        attn_type="rope",
    )  # fmt: skip
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias.fill_(0.1)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "file.safetensors")
    settings = {**RELEASED, "depth": 1, "qkv_bias": True, "position": {"kind": "rope"}}
    text = refusal(make(8, 32, **settings, mask_k_bias=True), path=tmp_path / "file.safetensors")
    assert "its keys have biases, which matter with RoPE; set mask_k_bias: false" in text
    assert not fill(make(8, 32, **settings), path=tmp_path / "file.safetensors").unused


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    path, position = tmp_path / "v3.safetensors", {"kind": "rope"}
    save_file(dinov3_state(make(8, 32, **{**RELEASED, "mask_k_bias": True, "position": position})), path)
    other = make(8, 32, **{**RELEASED, "mask_k_bias": True, "position": position, "num_heads": 4})
    assert "its heads have 16 channels, the backbone's 8; set num_heads to 2" in refusal(other, path=path)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_is_exported_and_loaded_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The norm of local views is training's alone: neither timm nor the encoder needs it."""
    backbone = (
        "{name: vit, embed_dim: 32, depth: 2, num_heads: 2, num_registers: 2, norm_eps: 1.0e-5, mask_k_bias: true, "
        "position: {kind: rope, rescale: 2.0}, untied_norms: {local: local}}"
    )
    changes = [f"run_dir={tmp_path / 'run'}", "steps=2", "tensorboard=false", f"networks.student.backbone={backbone}"]
    train(load_recipe(SMOKE, changes), torch.device("cpu"))
    assert export_main([str(tmp_path / "run"), "--format", "timm", "--out", str(tmp_path / "out")]) == 0, (
        capsys.readouterr().err
    )
    assert not any("local" in key or "mask" in key for key in load_file(tmp_path / "out" / "model.safetensors"))
    views = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    run_features, export_features = (Encoder.load(tmp_path / name)(views) for name in ("run", "out"))
    assert torch.equal(run_features.patches, export_features.patches)
