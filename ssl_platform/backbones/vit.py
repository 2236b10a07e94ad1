"""The vision transformer: several resolutions in one call, masks, registers, drop path on a subset of the rows.

Parameter names are timm's (`blocks.0.attn.qkv.weight`, ...), so that an export loads in `timm.create_model` with strict
keys. Rows: the axes V, M and B flattened to one.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_platform import config as configuration
from ssl_platform.backbones import Features, Input
from ssl_platform.backbones._attention import Backend
from ssl_platform.backbones._blocks import Block, Rows
from ssl_platform.backbones._positions import interpolate_positions
from ssl_platform.backbones._resizing import with_patches
from ssl_platform.backbones._rope import Rope, Rotation, check_rope, rotation
from ssl_platform.backbones._vit_options import PositionConfig, UntiedNormsConfig
from ssl_platform.config import ConfigError
from ssl_platform.modalities import Modality
from ssl_platform.patch_embed import Tokens


class Config(configuration.PluginConfig):
    """A vision transformer; the defaults are ViT-S with DINOv2's initialisation."""

    name: str = "vit"
    embed_dim: int = Field(default=384, gt=0)
    """Width of the tokens."""
    depth: int = Field(default=12, gt=0)
    """Number of blocks."""
    num_heads: int = Field(default=6, gt=0)
    """Attention heads; must divide embed_dim."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the feed-forward part over embed_dim; `swiglu` takes two thirds of it, a multiple of 8."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    """The feed-forward part: two layers with GELU, or SwiGLU."""
    num_registers: int = Field(default=0, ge=0)
    """Register tokens, which are neither patches nor the embedding."""
    layer_scale: float | None = 1e-5
    """Initial value of LayerScale; null leaves LayerScale out."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows that skip a branch while training."""
    drop_path_schedule: Literal["uniform", "linear"] = "uniform"
    """The same rate in every block, or rising from 0 in the first to `drop_path` in the last."""
    qkv_bias: bool = True
    mask_k_bias: bool = False
    """The keys have no bias all the same: that part of qkv.bias counts as 0 (DINOv3). With RoPE it would matter."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of the layer norms; DINOv3's released models have 1e-5."""
    untied_norms: UntiedNormsConfig = UntiedNormsConfig()
    position: PositionConfig = PositionConfig()
    patch_size: int | None = Field(default=None, gt=0)
    """Side of its patches, where it differs from the modality's: a frozen teacher's, say; None = the modality's."""
    attention: Backend = "auto"
    """The attention kernel: `sdpa` anywhere, group by group; `varlen` (torch, half precision) or `xformers` over all groups
    packed, on CUDA. `auto` is `sdpa`."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Config":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self

    def build(self, modality: Modality, group: str = "global") -> "VisionTransformer":
        """The network for the views of `group`, initialised from the global torch generator."""
        patch_embed = modality.patch_embed(self.embed_dim, group)
        if (local := self.untied_norms.local) is not None and local not in modality.groups:
            raise ValueError(f"untied_norms.local: no group '{local}' of views; there are {', '.join(modality.groups)}")
        if self.patch_size is not None:
            shapes = [modality.groups[group].shape]
            shapes += [one.modality.groups[group].shape for one in getattr(modality, "variants", ())]
            patch_embed = with_patches(patch_embed, self.embed_dim, shapes, self.patch_size)
        return VisionTransformer(
            patch_embed,
            native_grid=getattr(patch_embed, "native_grid", None),
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            swiglu=self.ffn == "swiglu",
            num_registers=self.num_registers,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path_rates,
            qkv_bias=self.qkv_bias,
            norm_eps=self.norm_eps,
            interpolation=self.position.interpolation,
            interpolation_offset=self.position.offset,
            interpolation_antialias=self.position.antialias,
            mask_k_bias=self.mask_k_bias,
            rope=self.position.rope,
            untie_cls=self.untied_norms.cls,
            local_group=self.untied_norms.local,
            attention=self.attention,
        )

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward part; of each of the two halves for `swiglu` (DINOv2's rounding)."""
        if self.ffn == "mlp":
            return int(self.embed_dim * self.mlp_ratio)
        return (int(int(self.embed_dim * self.mlp_ratio) * 2 / 3) + 7) // 8 * 8

    @property
    def drop_path_rates(self) -> list[float]:
        """The rate of each block."""
        if self.drop_path_schedule == "uniform":
            return [self.drop_path] * self.depth
        return [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]


class VisionTransformer(nn.Module):
    """A vision transformer with class, register and patch tokens, in this order (arXiv 2010.11929, 2309.16588).

    `native_grid` is the grid of the learned position embedding; None if `patch_embed` brings its own positions. With
    `rope` there is none, and `native_grid` is but the usual one. `untie_cls` and `local_group`: see UntiedNormsConfig.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        native_grid: tuple[int, ...] | None,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        hidden_dim: int,
        swiglu: bool = False,
        num_registers: int = 0,
        layer_scale: float | None = 1e-5,
        drop_path: Sequence[float] = (),
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        interpolation: Literal["dinov2", "timm"] = "dinov2",
        interpolation_offset: float = 0.1,
        interpolation_antialias: bool = False,
        mask_k_bias: bool = False,
        rope: Rope | None = None,
        untie_cls: bool = False,
        local_group: str | None = None,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        if rope is not None:
            check_rope(native_grid, embed_dim // num_heads)
        self.embed_dim, self.num_layers, self.num_registers, self.num_heads = embed_dim, depth, num_registers, num_heads
        self.hidden_dim, self.swiglu, self.layer_scale = hidden_dim, swiglu, layer_scale
        self.qkv_bias, self.mask_k_bias, self.norm_eps = qkv_bias, mask_k_bias and qkv_bias, norm_eps
        self.rope, self.local_group = rope, local_group
        self.native_grid, self.drop_path = native_grid, list(drop_path) or [0.0] * depth
        self.interpolation, self.offset, self.antialias = interpolation, interpolation_offset, interpolation_antialias
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        learned = native_grid is not None and rope is None
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(native_grid or ()), embed_dim)) if learned else None
        self.reg_token = nn.Parameter(torch.empty(1, num_registers, embed_dim)) if num_registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden_dim, swiglu, layer_scale, qkv_bias, norm_eps, mask_k_bias, attention)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.cls_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if untie_cls else None
        self.local_cls_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if local_group is not None else None
        self._initialise()

    def _initialise(self) -> None:
        """DINOv2's initialisation; the patch embedding keeps its own."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    def forward(self, inputs: Sequence[Input]) -> list[Features]:
        """One entry for each input; equal to separate calls in the same order, bit for bit, drop path included."""
        embedded = [self._embed(item) for item in inputs]
        groups = [tokens.rows for tokens in embedded]
        # All drawn before the blocks, so that recomputing a block meets the same; a group's together, as in its own call.
        drawn = [(self._rotation(tokens), self._draw_rows(len(tokens.rows), tokens.rows.device)) for tokens in embedded]
        rotations = [turned for turned, _ in drawn]
        wanted = {layer for item in inputs for layer in item.layers}
        between: dict[int, list[Tensor]] = {}
        for i, block in enumerate(self.blocks):
            groups = block(groups, [kept[i] for _, kept in drawn], rotations)
            if i in wanted:
                between[i] = groups
        return [
            self._features(item, groups[g], [between[layer][g] for layer in item.layers], tokens)
            for g, (item, tokens) in enumerate(zip(inputs, embedded, strict=True))
        ]

    @property
    def rope_base(self) -> float | tuple[float, float] | None:
        """What RoPE's periods come from, which no weight shows; None for a learned embedding."""
        return None if self.rope is None else self.rope.min_max_period or self.rope.base

    def layer_of(self, parameter: str) -> int:
        """0 for what comes before the blocks, i + 1 for block i, num_layers + 1 for the final norms."""
        first, _, rest = parameter.partition(".")
        if first == "blocks":
            return int(rest.partition(".")[0]) + 1
        return self.num_layers + 1 if first in ("norm", "cls_norm", "local_cls_norm") else 0

    def _embed(self, item: Input) -> "_Embedded":
        """Views to rows of tokens: masked, with positions, behind the class and register tokens."""
        if item.arch is not None:
            raise ValueError(f"arch {item.arch!r}: the backbone 'vit' has no sub-networks, so arch must be None")
        (num_views, batch), masks = item.views.shape[:2], item.masks
        tokens: Tokens = self.patch_embed(item.views.flatten(0, 1))
        content = tokens.content.reshape(num_views, batch, *tokens.content.shape[1:])  # (V, B, N, D)
        cls_position, position = self._positions(tokens)
        position = position if position is None or len(position) == 1 else position.reshape(content.shape)
        visible = None
        if masks is not None:
            if masks.shape[-1] != content.shape[-2]:
                raise ConfigError(
                    [f"masks: drawn for {masks.shape[-1]} tokens a view of '{item.group}', but the backbone makes "
                     f"{content.shape[-2]} of it; leave backbone.patch_size out for a network that is shown masks"]
                )  # fmt: skip
            content = content[:, None]  # (V, 1, B, N, D)
            position = position if position is None or len(position) == 1 else position[:, None]
            if item.mode == "token":
                content = torch.where(masks[..., None], self.mask_token.to(content.dtype), content)  # (V, M, B, N, D)
        patches = content if position is None else content + position
        if masks is not None and item.mode == "drop":
            visible = _visible(masks)  # (V, M, B, N_visible)
            patches = patches.expand(*masks.shape, -1).gather(
                3, visible[..., None].expand(-1, -1, -1, -1, self.embed_dim)
            )
        patches = patches.flatten(0, -3)  # (rows, N, D)
        front = [self.cls_token + cls_position] + ([self.reg_token] if self.reg_token is not None else [])
        rows = torch.cat([*(token.expand(len(patches), -1, -1) for token in front), patches], dim=1)
        coordinates = tokens.coordinates
        return _Embedded(
            rows,
            visible,
            None if coordinates is None else coordinates.reshape(num_views, batch, *coordinates.shape[1:]),
            tokens.grid,
        )

    def _positions(self, tokens: Tokens) -> tuple[Tensor | float, Tensor | None]:
        """What is added to the class token, and to the patches: (1 or V B, N, D), or None."""
        if self.rope is not None:
            return 0.0, None
        if self.pos_embed is None:
            assert tokens.position is not None, "a patch embedding without a native grid must bring positions"
            return 0.0, tokens.position
        assert tokens.grid is not None and self.native_grid is not None
        interpolated = interpolate_positions(
            self.pos_embed[:, 1:], self.native_grid, tokens.grid, self.interpolation, self.offset, self.antialias
        )
        return self.pos_embed[:, :1], interpolated

    def _rotation(self, tokens: "_Embedded") -> Rotation | None:
        """By what the tokens of a group are turned in every block."""
        if self.rope is None:
            return None
        assert tokens.grid is not None
        return rotation(
            self.rope,
            tokens.grid,
            head_dim=self.embed_dim // self.num_heads,
            num_front=1 + self.num_registers,
            augment=self.training,
            dtype=torch.promote_types(tokens.rows.dtype, torch.float32),  # bfloat16 does not tell neighbours apart
            device=tokens.rows.device,
            visible=None if tokens.visible is None else tokens.visible.flatten(0, -2),
        )

    def _draw_rows(self, num_rows: int, device: torch.device) -> list[Rows | None]:
        """The rows that each block computes."""
        if not self.training or not any(self.drop_path):
            return [None] * self.num_layers
        orders = torch.rand(self.num_layers, 2, num_rows, device=device).argsort(dim=-1)
        counts = [max(int(num_rows * (1 - rate)), 1) for rate in self.drop_path]
        return [
            Rows(order[0, :count], order[1, :count]) if rate else None
            for order, count, rate in zip(orders, counts, self.drop_path, strict=True)
        ]

    def _features(self, item: Input, last: Tensor, between: Sequence[Tensor], embedded: "_Embedded") -> Features:
        cls, registers, patches = self._split(self._normalised(last, item.group), item)
        layers = [self._split(rows, item) for rows in between]
        return Features(
            cls=cls,
            patches=patches,
            registers=registers if self.num_registers else None,
            layers=tuple((cls, patches) for cls, _, patches in layers),
            visible=embedded.visible,
            positions=embedded.coordinates,
            grid=embedded.grid,
        )

    def _normalised(self, rows: Tensor, group: str) -> Tensor:
        """(rows, 1 + R + N, D) after the final norm, or the final norms of class and register tokens and of patches."""
        front = self.norm if self.cls_norm is None else self.cls_norm
        if self.local_cls_norm is not None and self.training and group == self.local_group:
            front = self.local_cls_norm
        if front is self.norm:
            return self.norm(rows)  # type: ignore[no-any-return]
        first = 1 + self.num_registers
        return torch.cat([front(rows[:, :first]), self.norm(rows[:, first:])], dim=1)

    def _split(self, rows: Tensor, item: Input) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, 1 + R + N, D) -> the class, register and patch tokens with their axes V, [M], B."""
        axes = item.views.shape[:2] if item.masks is None else item.masks.shape[:3]
        prefix = [1, self.num_registers]
        rows = rows.reshape(*axes, *rows.shape[1:])
        cls, registers, patches = torch.split(rows, [*prefix, rows.shape[-2] - sum(prefix)], dim=-2)
        return cls.squeeze(-2), registers, patches


class _Embedded(NamedTuple):
    rows: Tensor
    visible: Tensor | None
    coordinates: Tensor | None
    grid: tuple[int, ...] | None


def _visible(masks: Tensor) -> Tensor:
    """The raster positions (V, M, B, N_visible) of the tokens that are not hidden."""
    counts = masks.logical_not().sum(-1)
    count = int(counts.flatten()[0])
    assert bool((counts == count).all()), 'mode "drop" needs masks that hide the same number of tokens everywhere'
    return masks.to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]
