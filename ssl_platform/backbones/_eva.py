"""Weights of a `vit` with RoPE from and to DINOv3's own format and timm's (its class Eva)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssl_platform.backbones._rope import periods
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.patch_embed import GridPatchEmbed

EVA_BY_EPS = {1e-5: "vit_small_patch16_dinov3", 1e-6: "vit_base_patch16_rope_reg1_gap_256"}
"""Registered models that fix no more than the layer norms' epsilon, which no argument of timm's sets."""


def is_dinov3(names: Mapping[str, Any]) -> bool:
    """Whether a state dict is of DINOv3's own format."""
    return any(
        name.endswith("storage_tokens") or "rope_embed." in name or name.endswith("qkv.bias_mask") for name in names
    )


def dinov3_names(state: Mapping[str, Tensor], vit: VisionTransformer) -> dict[str, Tensor]:
    """The tensors of a DINOv3-format state dict as `vit` means them; raises ValueError if its RoPE is another one.

    A bias that the file masks is 0. Biases of queries, keys and values that are all 0 are left out where `vit` has none,
    as timm does with the released models.
    """
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("rope_embed.periods"):
            _check_periods(value, vit)
        elif key.endswith(".mlp.w1.weight") or key.endswith(".mlp.w1.bias"):
            ours[key.replace(".w1.", ".fc1.")] = torch.cat([value, state[key.replace(".w1.", ".w2.")]])
        elif key.endswith("qkv.bias"):
            mask = state.get(key + "_mask")
            bias = value if mask is None else torch.where(mask.nan_to_num() == 0, torch.zeros_like(value), value)
            if vit.qkv_bias or bool(bias.any()):
                ours[key] = bias
        elif not key.endswith((".bias_mask", ".mlp.w2.weight", ".mlp.w2.bias")):
            ours[key.replace("storage_tokens", "reg_token").replace(".mlp.w3.", ".mlp.fc2.")] = value
    return ours


def _check_periods(found: Tensor, vit: VisionTransformer) -> None:
    if vit.rope is None:
        return
    num_heads, rest = divmod(vit.embed_dim, 4 * len(found))  # a period for every fourth channel of a head
    if num_heads != vit.num_heads and num_heads and not rest:
        raise ValueError(
            f"its heads have {4 * len(found)} channels, the backbone's {vit.embed_dim // vit.num_heads}; set num_heads to "
            f"{num_heads}"
        )
    expected = periods(vit.rope, len(found), torch.float32, found.device)
    if not bool(torch.isclose(found.float(), expected, rtol=0.01).all()):  # files hold them in bfloat16
        raise ValueError(
            f"its RoPE has periods from {found.min():.4g} to {found.max():.4g}, the backbone from {expected.min():.4g} to "
            f"{expected.max():.4g}; set position.base or position.min_max_period to the file's"
        )


def eva_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict of timm's Eva under the names of `vit`; those of its other models stay as they are."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        block, _, name = key.rpartition(".")
        if name in ("gamma_1", "gamma_2"):
            ours[f"{block}.ls{name[-1]}.gamma"] = value
        elif name == "q_bias":
            ours[f"{block}.qkv.bias"] = torch.cat([value, torch.zeros_like(value), state[f"{block}.v_bias"]])
        elif ".mlp.fc1_g." in key:
            ours[key.replace(".fc1_g.", ".fc1.")] = torch.cat([value, state[key.replace(".fc1_g.", ".fc1_x.")]])
        elif name not in ("v_bias", "k_bias") and ".mlp.fc1_x." not in key:
            ours[key] = value
    return ours


def to_eva(vit: VisionTransformer) -> dict[str, Tensor]:
    """The state dict of `vit` under the names of timm's Eva; without mask token and the norm of local views.

    Where `vit` has no LayerScale it is of ones, which `timm_names` leaves out again.
    """
    theirs: dict[str, Tensor] = {}
    if vit.layer_scale is None:
        scales = (f"blocks.{i}.gamma_{branch}" for i in range(vit.num_layers) for branch in (1, 2))
        theirs = {scale: torch.ones(vit.embed_dim) for scale in scales}
    for key, value in vit.state_dict().items():
        block = key.rpartition(".")[0]
        if key == "mask_token" or key.startswith("local_cls_norm."):
            continue
        if key.endswith(("ls1.gamma", "ls2.gamma")):
            theirs[f"{block[:-4]}.gamma_{block[-1]}"] = value
        elif key.endswith("qkv.bias") and vit.mask_k_bias:
            attention = block.removesuffix(".qkv")
            theirs[f"{attention}.q_bias"], _, theirs[f"{attention}.v_bias"] = value.chunk(3)
        else:
            theirs[key] = value
    return theirs


def eva_arguments(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """The name of a registered timm model and the arguments that make it `vit`; raises ValueError if there is none."""
    embed, rope = vit.patch_embed, vit.rope
    assert isinstance(embed, GridPatchEmbed) and vit.native_grid is not None and rope is not None
    if vit.norm_eps not in EVA_BY_EPS:
        raise ValueError(f"norm_eps {vit.norm_eps}: timm's models with RoPE have {' or '.join(map(str, EVA_BY_EPS))}")
    if rope.min_max_period is not None or rope.normalize != "separate":
        raise ValueError("position: timm's RoPE has a base and is normalised by each axis (normalize: separate)")
    if vit.embed_dim // vit.num_heads % 4:
        raise ValueError(f"heads of {vit.embed_dim // vit.num_heads} channels: timm's RoPE needs a multiple of 4")
    ratio = vit.hidden_dim / vit.embed_dim
    if int(vit.embed_dim * ratio) != vit.hidden_dim:  # timm takes the integer part; the division may have rounded down
        ratio = math.nextafter(ratio, math.inf)
    return EVA_BY_EPS[vit.norm_eps], {
        "img_size": [length * patch for length, patch in zip(vit.native_grid, embed.patch_size, strict=True)],
        "patch_size": list(embed.patch_size),
        "in_chans": embed.in_chans,
        "num_classes": 0,
        "global_pool": "token",
        "use_fc_norm": False,
        "embed_dim": vit.embed_dim,
        "depth": vit.num_layers,
        "num_heads": vit.num_heads,
        "mlp_ratio": ratio,
        "swiglu_mlp": vit.swiglu,
        "swiglu_align_to": 0,  # the gate and the value packed in one layer, as here
        "qkv_bias": vit.qkv_bias,
        "attn_type": "rope" if vit.qkv_bias and not vit.mask_k_bias else "eva",  # whose keys have a bias, or have none
        "init_values": 1e-5,  # no argument removes LayerScale from models that have it: `to_eva` fills it with ones
        "class_token": True,
        "num_reg_tokens": vit.num_registers,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": rope.base,
        "rope_rotate_half": True,
        "dynamic_img_size": True,
    }
