"""Weights from DINOv2, and from and to timm: the same outputs, every key accounted for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ssl_platform.backbones import Features, Input
from ssl_platform.backbones._conversion import dinov2_names, from_timm, timm_arguments, to_timm
from ssl_platform.backbones.vit import Config, VisionTransformer
from ssl_platform.patch_embed import GridPatchEmbed

VECTORS = Path(__file__).parent / "data" / "conformance"
CASES = ["dinov2_centering_shared", "dinov2_sinkhorn_separate_registers"]


def make(patch: int, size: int, seed: int = 0, **settings: Any) -> VisionTransformer:
    """A network as `Config` describes it, for `size` x `size` images, every parameter moved off its initial value."""
    config = Config(**settings)
    grid = (size // patch, size // patch)
    torch.manual_seed(seed)
    vit = VisionTransformer(
        GridPatchEmbed(3, config.embed_dim, (patch, patch), grid),
        grid,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        hidden_dim=config.hidden_dim,
        swiglu=config.ffn == "swiglu",
        num_registers=config.num_registers,
        layer_scale=config.layer_scale,
        qkv_bias=config.qkv_bias,
        interpolation=config.position.interpolation,
        norm_eps=config.norm_eps,
        mask_k_bias=config.mask_k_bias,
        rope=config.position.rope,
        untie_cls=config.untied_norms.cls,
        local_group=config.untied_norms.local,
    )
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if "gamma" in name else 0.02)
    return vit.eval()


def run(vit: VisionTransformer, images: Tensor) -> Features:
    with torch.inference_mode():
        return vit([Input(images[None])])[0]


def images_of(size: int, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, size, width or size, generator=torch.Generator().manual_seed(1))


SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


# -- DINOv2 -----------------------------------------------------------------------------------------------------------


def conformance(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((VECTORS / f"{case}.json").read_text()), load_file(VECTORS / f"{case}.safetensors")


def conformance_vit(facts: dict[str, Any]) -> VisionTransformer:
    return make(
        facts["patch_size"],
        facts["global_px"],
        embed_dim=facts["embed_dim"],
        depth=facts["depth"],
        num_heads=facts["num_heads"],
        num_registers=facts["registers"],
    )


def test_swiglu_and_chunked_blocks_of_dinov2_have_our_names() -> None:
    """Released files have plain names; a training checkpoint has heads beside the backbone, and blocks in chunks."""
    vit = make(8, 32, ffn="swiglu", num_registers=2, **SMALL)
    theirs = {
        key.replace("mlp.fc1.", "mlp.w12.")
        .replace("mlp.fc2.", "mlp.w3.")
        .replace("reg_token", "register_tokens"): value
        for key, value in vit.state_dict().items()
    }
    trained = {"backbone." + re.sub(r"^blocks\.", "blocks.0.", key): value for key, value in theirs.items()}
    for state in (theirs, trained | {"dino_head.mlp.0.weight": torch.zeros(3)}):
        found = dinov2_names(state)
        assert found.keys() == vit.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in vit.state_dict().items())


# -- timm -------------------------------------------------------------------------------------------------------------

REAL_WIDTHS = {
    "ViT-S/16": (16, 224, {"depth": 3}),
    "ViT-B/14 with registers": (14, 224, {"embed_dim": 768, "num_heads": 12, "depth": 2, "num_registers": 4}),
    "ViT-S/16 with SwiGLU": (16, 224, {"depth": 3, "ffn": "swiglu"}),
    "ViT-S/14 with SwiGLU and registers": (14, 224, {"depth": 2, "ffn": "swiglu", "num_registers": 4}),
}
VARIANTS = {
    "without LayerScale": (8, 32, {"layer_scale": None, **SMALL}),
    "SwiGLU without LayerScale": (8, 32, {"layer_scale": None, "ffn": "swiglu", **SMALL}),
    "without bias of qkv": (8, 32, {"qkv_bias": False, "num_registers": 1, **SMALL}),
}
EVERY = REAL_WIDTHS | VARIANTS


@pytest.mark.parametrize("name", EVERY)
def test_timm_gives_our_outputs_at_the_native_size(name: str) -> None:
    patch, size, settings = EVERY[name]
    vit = make(patch, size, **settings)
    architecture, model_args, state = to_timm(vit)
    model = timm.create_model(architecture, **json.loads(json.dumps(model_args))).eval()
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        theirs, pooled = model.forward_features(images_of(size)), model(images_of(size))
    ours = run(vit, images_of(size))
    assert torch.equal(pooled, theirs[:, 0])
    torch.testing.assert_close(ours.cls[0], pooled, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours.patches[0], theirs[:, 1 + vit.num_registers :], atol=2e-5, rtol=2e-5)
    if ours.registers is not None:
        torch.testing.assert_close(ours.registers[0], theirs[:, 1 : 1 + vit.num_registers], atol=2e-5, rtol=2e-5)


# timm's SwiGLU model always has LayerScale, so that a network of ours without it cannot take its checkpoint.
@pytest.mark.parametrize("name", [name for name in EVERY if name != "SwiGLU without LayerScale"])
def test_our_network_gives_the_outputs_of_a_timm_checkpoint(name: str) -> None:
    patch, size, settings = EVERY[name]
    vit = make(patch, size, **settings)
    architecture, model_args = timm_arguments(vit)
    torch.manual_seed(3)
    model = timm.create_model(architecture, **{**model_args, "num_classes": 7}).eval()  # its head is left out
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    vit.load_state_dict(from_timm(model.state_dict(), vit))
    with torch.inference_mode():
        theirs = model.forward_features(images_of(size))
    ours = run(vit, images_of(size))
    torch.testing.assert_close(ours.cls[0], theirs[:, 0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours.patches[0], theirs[:, 1 + vit.num_registers :], atol=2e-5, rtol=2e-5)
    assert not vit.mask_token.any()


def test_timm_positions_of_registers_are_merged_into_them() -> None:
    vit = make(8, 32, num_registers=3, **SMALL)
    architecture, model_args = timm_arguments(vit)
    model = timm.create_model(architecture, **{**model_args, "no_embed_class": False}).eval()
    assert model.pos_embed.shape[1] == 16 + 1 + 3
    vit.load_state_dict(from_timm(model.state_dict(), vit))
    with torch.inference_mode():
        torch.testing.assert_close(run(vit, images_of(32)).cls[0], model(images_of(32)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("registers", [0, 2])
def test_other_sizes_agree_under_timms_convention(registers: int) -> None:
    vit = make(8, 32, num_registers=registers, position={"interpolation": "timm"}, **SMALL)
    architecture, model_args, state = to_timm(vit)
    model = timm.create_model(architecture, **model_args).eval()
    model.load_state_dict(state)
    for images in (images_of(48), images_of(24, 64)):
        with torch.inference_mode():
            torch.testing.assert_close(run(vit, images).cls[0], model(images), atol=2e-5, rtol=2e-5)


def test_a_timm_checkpoint_of_another_resolution_is_read_at_the_native_grid() -> None:
    source = make(8, 64, num_registers=2, position={"interpolation": "timm"}, **SMALL)
    vit = make(8, 32, seed=1, num_registers=2, position={"interpolation": "timm"}, **SMALL)
    vit.load_state_dict(from_timm(to_timm(source).state, vit))
    torch.testing.assert_close(run(vit, images_of(32)).cls, run(source, images_of(32)).cls)


@settings(deadline=None, max_examples=50)
@given(dim=st.integers(1, 400), ratio=st.floats(0.3, 8), swiglu=st.booleans())
def test_timm_computes_the_same_hidden_width(dim: int, ratio: float, swiglu: bool) -> None:
    config = Config(embed_dim=dim, num_heads=1, depth=1, mlp_ratio=ratio, ffn="swiglu" if swiglu else "mlp")
    if config.hidden_dim == 0:
        return
    embed, sizes = GridPatchEmbed(1, dim, (2, 2), (1, 1)), {"embed_dim": dim, "hidden_dim": config.hidden_dim}
    vit = VisionTransformer(embed, (1, 1), depth=1, num_heads=1, swiglu=swiglu, **sizes)
    _, model_args = timm_arguments(vit)
    assert int(dim * model_args["mlp_ratio"]) == config.hidden_dim * (2 if swiglu else 1)


def test_what_timm_cannot_express_is_refused() -> None:
    line = VisionTransformer(GridPatchEmbed(1, 24, (4,), (8,)), (8,), embed_dim=24, depth=1, num_heads=2, hidden_dim=48)
    with pytest.raises(ValueError, match="only networks on 2-D patches can be exported"):
        to_timm(line)
    vit = make(8, 32, **SMALL)
    vit.norm_eps = 1e-5
    with pytest.raises(ValueError, match="norm_eps 1e-05: timm's vision transformer has 1e-6"):
        to_timm(vit)


def test_a_timm_checkpoint_that_does_not_fit_is_described() -> None:
    vit = make(8, 32, **SMALL)
    other = to_timm(make(8, 32, **{**SMALL, "depth": 1})).state
    with pytest.raises(ValueError, match="the timm checkpoint does not fit the backbone: 21 of 35 keys match"):
        from_timm(other, vit)
    with pytest.raises(ValueError, match="pos_embed has 23 rows, which are not a square grid and 0 or 1 rows"):
        from_timm(other | {"pos_embed": torch.zeros(1, 23, 24)}, vit)
    vit, state = make(8, 32, num_registers=4, **SMALL), make(8, 32, ffn="swiglu", **SMALL).state_dict()
    with pytest.raises(ValueError) as error:
        from_timm(state | {"blocks.0.extra": torch.zeros(1)}, vit)
    lines = str(error.value).split("\n")
    assert lines[0] == "the timm checkpoint does not fit the backbone: 29 of 36 keys match"
    assert lines[1:3] == ["  missing: reg_token", "  unknown: blocks.0.extra"]
    assert "blocks.0.mlp.fc1.weight (128, 24) instead of (96, 24)" in lines[3]
    assert lines[4].startswith("  matched: cls_token, pos_embed, mask_token")
    assert lines[5] == "  embed_dim, depth, num_registers, layer_scale, ffn and qkv_bias must be the checkpoint's"
