"""Weights of `vit` from DINOv2's format, and from and to timm's. Strict: an error lists every key that is left over."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_platform.backbones._blocks import without_key_bias
from ssl_platform.backbones._eva import eva_arguments, eva_names, to_eva
from ssl_platform.backbones._positions import interpolate_positions
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.patch_embed import GridPatchEmbed


class TimmModel(NamedTuple):
    """One of our networks in timm: `timm.create_model(architecture, **model_args).load_state_dict(state)`."""

    architecture: str
    model_args: dict[str, Any]
    """JSON-able arguments of `create_model`."""
    state: dict[str, Tensor]


def dinov2_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a DINOv2-format state dict under the names of `vit`; heads are left out.

    Takes plain names or those of a training checkpoint (`backbone.` in front, heads beside them, blocks in chunks).
    """
    if any(key.startswith("backbone.") for key in state):
        state = {key: value for key, value in state.items() if not key.startswith(("dino_head.", "ibot_head."))}
        state = {key.removeprefix("backbone."): value for key, value in state.items()}
    ours = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        ours["reg_token" if key == "register_tokens" else key] = value
    return ours


def from_timm(state: Mapping[str, Tensor], vit: VisionTransformer) -> dict[str, Tensor]:
    """The state dict for `vit` that one of a timm vision transformer says; raises ValueError listing what does not fit.

    A classification head is left out. timm has no mask token: it starts at zero. Where timm adds no position to the
    class token (`no_embed_class`) its position is zero; positions that timm adds to registers are merged into them.
    LayerScale of ones, which `to_timm` may have added, is left out where `vit` has no LayerScale. The norm of local views,
    which timm does not know, starts as that of all.
    """
    ours = timm_names(state, vit.layer_scale is not None, vit.native_grid)
    ours.setdefault("mask_token", torch.zeros(1, vit.embed_dim))
    if vit.local_cls_norm is not None:
        ours |= {
            f"local_cls_norm.{name}": ours[f"norm.{name}"] for name in ("weight", "bias") if f"norm.{name}" in ours
        }
    if "pos_embed" in ours:
        ours["pos_embed"] = _at_native_grid(ours["pos_embed"], vit)
    return _checked(ours, vit)


def timm_names(state: Mapping[str, Tensor], layer_scale: bool, grid: tuple[int, ...] | None) -> dict[str, Tensor]:
    """The tensors of a timm state dict as `vit` means them: see `from_timm`; `grid` is the likely one of its positions."""
    ours = eva_names({key: value for key, value in state.items() if not key.startswith(("head.", "fc_norm."))})
    if not layer_scale:
        ours = {key: value for key, value in ours.items() if not (key.endswith(".gamma") and bool((value == 1).all()))}
    if "pos_embed" in ours:
        positions, registers = ours["pos_embed"], ours["reg_token"].shape[1] if "reg_token" in ours else 0
        prefix = _prefix_rows(positions.shape[1], registers, grid)
        if prefix == 0:
            positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        elif prefix > 1:
            ours["reg_token"] = ours["reg_token"] + positions[:, 1:prefix]
            positions = torch.cat([positions[:, :1], positions[:, prefix:]], dim=1)
        ours["pos_embed"] = positions
    return ours


def to_timm(vit: VisionTransformer) -> TimmModel:
    """`vit` as a timm model with equal outputs at the native size; raises ValueError where timm has no such model.

    The mask token is left out. With registers, the position of the class token is merged into it (`no_embed_class`), as
    timm itself converts DINOv2's register models.
    """
    architecture, model_args = timm_arguments(vit)
    if vit.rope is not None:
        return TimmModel(architecture, model_args, {key: value.contiguous() for key, value in to_eva(vit).items()})
    left_out = ("mask_token", "local_cls_norm.")
    state = {key: value for key, value in vit.state_dict().items() if not key.startswith(left_out)}
    if vit.mask_k_bias:
        for key in (f"blocks.{i}.attn.qkv.bias" for i in range(vit.num_layers)):
            state[key] = without_key_bias(state[key])
    if vit.num_registers:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    if "init_values" in model_args:
        for name in (f"blocks.{i}.{scale}.gamma" for i in range(vit.num_layers) for scale in ("ls1", "ls2")):
            state.setdefault(name, torch.ones(vit.embed_dim))
    return TimmModel(architecture, model_args, {key: value.contiguous() for key, value in state.items()})


def timm_arguments(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """The name of a registered timm model and the arguments of `create_model` that turn it into `vit`."""
    embed = vit.patch_embed
    if not isinstance(embed, GridPatchEmbed) or len(embed.patch_size) != 2 or vit.native_grid is None:
        raise ValueError("timm's vision transformer takes images: only networks on 2-D patches can be exported to it")
    if vit.cls_norm is not None:
        raise ValueError("untied_norms.cls: timm's vision transformers have one final norm for all tokens")
    if vit.rope is not None:
        return eva_arguments(vit)
    if vit.norm_eps != 1e-6:
        raise ValueError(f"norm_eps {vit.norm_eps}: timm's vision transformer has 1e-6, and no argument changes that")
    hidden = vit.hidden_dim * (2 if vit.swiglu else 1)
    ratio = hidden / vit.embed_dim
    if int(vit.embed_dim * ratio) != hidden:  # timm takes the integer part; the division may have rounded down
        ratio = math.nextafter(ratio, math.inf)
    arguments = {
        "img_size": [length * patch for length, patch in zip(vit.native_grid, embed.patch_size, strict=True)],
        "patch_size": list(embed.patch_size),
        "in_chans": embed.in_chans,
        "num_classes": 0,
        "global_pool": "token",
        "embed_dim": vit.embed_dim,
        "depth": vit.num_layers,
        "num_heads": vit.num_heads,
        "mlp_ratio": ratio,
        "qkv_bias": vit.qkv_bias,
        "reg_tokens": vit.num_registers,
        "no_embed_class": vit.num_registers > 0,
        "dynamic_img_size": True,
    }
    if vit.swiglu:
        # The registered model with SwiGLU has LayerScale, which no argument removes: `to_timm` fills it with ones.
        return "vit_giant_patch14_reg4_dinov2", arguments | {"init_values": 1e-5}
    return "vit_small_patch16_224", arguments | ({} if vit.layer_scale is None else {"init_values": 1e-5})


def _prefix_rows(rows: int, registers: int, grid: tuple[int, ...] | None) -> int:
    """How many rows of a timm position embedding belong to the class token and the registers: 0, 1 or 1 + registers."""
    choices = sorted({0, 1, 1 + registers})
    native = math.prod(grid or ())
    for fitting in (
        [prefix for prefix in choices if rows - prefix == native],
        [prefix for prefix in choices if rows > prefix and math.isqrt(rows - prefix) ** 2 == rows - prefix],
    ):
        if len(fitting) == 1:
            return fitting[0]
    raise ValueError(
        f"the timm checkpoint's pos_embed has {rows} rows, which are not a square grid and "
        f"{' or '.join(map(str, choices))} rows for the class token and the registers"
    )


def _at_native_grid(positions: Tensor, vit: VisionTransformer) -> Tensor:
    """A position embedding (1, 1 + N, D) of another square grid, read at the native grid of `vit`."""
    rows, native = positions.shape[1] - 1, vit.native_grid
    side = math.isqrt(max(rows, 0))
    if native is None or len(native) != 2 or rows == math.prod(native) or side**2 != rows:
        return positions  # it fits, or the check of the shapes will tell
    patches = interpolate_positions(
        positions[:, 1:], (side, side), native, vit.interpolation, vit.offset, vit.antialias
    )
    return torch.cat([positions[:, :1], patches.to(positions.dtype)], dim=1)


def _checked(state: dict[str, Tensor], vit: VisionTransformer) -> dict[str, Tensor]:
    expected = vit.state_dict()
    matched = [key for key in state if key in expected and state[key].shape == expected[key].shape]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in state
        if key in expected and state[key].shape != expected[key].shape
    ]
    missing, unknown = [key for key in expected if key not in state], [key for key in state if key not in expected]
    if missing or unknown or shapes:
        lines = [f"the timm checkpoint does not fit the backbone: {len(matched)} of {len(expected)} keys match"]
        for title, keys in (("missing", missing), ("unknown", unknown), ("other shapes", shapes), ("matched", matched)):
            lines += [f"  {title}: {', '.join(keys)}"] * bool(keys)
        lines.append("  embed_dim, depth, num_registers, layer_scale, ffn and qkv_bias must be the checkpoint's")
        raise ValueError("\n".join(lines))
    return state
