"""The transformer block of `vit`: attention, feed-forward part, LayerScale, drop path."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_platform.backbones._attention import Backend, Heads, attention
from ssl_platform.backbones._rope import Rotation, of_rows, rotate


def without_key_bias(bias: Tensor) -> Tensor:
    """The bias (3 D,) of queries, keys and values with that of the keys 0."""
    query, key, value = bias.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


class Rows(NamedTuple):
    """The rows of one group that a block computes while training, for its two branches."""

    attention: Tensor
    """(kept,) int64"""
    feed_forward: Tensor
    """(kept,) int64"""


class LayerScale(nn.Module):
    """One factor per channel, which the block folds into the weights of the layer before: no pass over the tokens."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))


class Attention(nn.Module):
    """The layers of multi-head self-attention; `attention` mixes tokens, and the block applies `proj`.

    With `mask_k_bias` keys have no bias, whatever is stored.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, mask_k_bias: bool = False) -> None:
        super().__init__()
        self.num_heads, self.mask_k_bias = num_heads, mask_k_bias and qkv_bias
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Heads:
        """(rows, N, D) -> queries, keys and values, (rows, N, heads, d) each; the first two are turned by `rotation`."""
        rows, length, dim = x.shape
        bias: Tensor | None = self.qkv.bias
        if self.mask_k_bias and bias is not None:
            bias = without_key_bias(bias)
        qkv = F.linear(x, self.qkv.weight, bias).view(rows, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.unbind(2)
        if rotation is not None:
            q, k = rotate(qkv[:, :, :2], rotation).unbind(2)
        return Heads(q, k, v)


class FeedForward(nn.Module):
    """Two layers with GELU, or SwiGLU with both first layers packed in `fc1`; without the last layer."""

    def __init__(self, dim: int, hidden_dim: int, swiglu: bool) -> None:
        super().__init__()
        self.swiglu = swiglu
        self.fc1 = nn.Linear(dim, 2 * hidden_dim if swiglu else hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, N, D) -> (rows, N, hidden), what `fc2` is applied to."""
        x = self.fc1(x)
        if not self.swiglu:
            return F.gelu(x)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Block(nn.Module):
    """A pre-norm transformer block over the token groups of all resolutions, which share its weights."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        swiglu: bool,
        layer_scale: float | None,
        qkv_bias: bool,
        norm_eps: float,
        mask_k_bias: bool = False,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, mask_k_bias)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else None
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = FeedForward(dim, hidden_dim, swiglu)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else None

    def forward(
        self, groups: Sequence[Tensor], kept: Sequence[Rows | None], rotations: Sequence[Rotation | None]
    ) -> list[Tensor]:
        """[(rows, N, D)] -> [(rows, N, D)]; where rows are kept, only those are computed and their sum scaled up."""
        projection, output = _scaled(self.attn.proj, self.ls1), _scaled(self.mlp.fc2, self.ls2)
        chosen = [
            x if rows is None else x.index_select(0, rows.attention) for x, rows in zip(groups, kept, strict=True)
        ]
        turned = [
            rotation if rows is None else of_rows(rotation, rows.attention)
            for rotation, rows in zip(rotations, kept, strict=True)
        ]
        heads = [self.attn(self.norm1(x), rotation) for x, rotation in zip(chosen, turned, strict=True)]
        result = []
        for x, rows, mixed in zip(groups, kept, attention(heads, self.attention), strict=True):
            branch = F.linear(mixed, *projection)
            if rows is None:
                x = x + branch
                x = x + F.linear(self.mlp(self.norm2(x)), *output)
            else:
                scale = len(x) / len(branch)
                x = x.index_add(0, rows.attention, branch.to(x.dtype), alpha=scale)
                branch = F.linear(self.mlp(self.norm2(x.index_select(0, rows.feed_forward))), *output)
                # In place, because this tensor is ours and nothing saved it for its gradient.
                x = x.index_add_(0, rows.feed_forward, branch.to(x.dtype), alpha=scale)
            result.append(x)
        return result


def _scaled(layer: nn.Linear, scale: LayerScale | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of `layer` followed by `scale`."""
    if scale is None:
        return layer.weight, layer.bias
    return layer.weight * scale.gamma[:, None], layer.bias * scale.gamma
