"""DINO's projection head: an MLP, L2 normalisation, and a bias-free layer onto K prototypes."""

from collections import OrderedDict
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_platform.batch_norm import BatchNorm
from ssl_platform.heads import HeadConfig


class Config(HeadConfig):
    name: str = "projection"
    num_prototypes: int = Field(65536, ge=1)
    hidden_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(256, ge=1)
    num_layers: int = Field(3, ge=1)
    """Linear layers before the prototypes; 1 = a single one without hidden layer."""
    last_layer: Literal["weight_norm", "weight_norm_frozen", "linear"] = "weight_norm"
    """weight_norm: trained direction and length (DINOv2); ..._frozen: length 1 (DINO's norm_last_layer); linear: DINOv3."""
    batch_norm: bool = False
    """Batch norm behind each hidden layer, before its GELU (DINO's use_bn), over all rows of a call and all ranks."""

    def build(self, embed_dim: int) -> "ProjectionHead":
        return ProjectionHead(
            embed_dim,
            self.num_prototypes,
            self.hidden_dim,
            self.bottleneck_dim,
            self.num_layers,
            self.last_layer,
            self.batch_norm,
        )


class Prototypes(nn.Module):
    """The last layer (K, bottleneck), without bias, weight-normalised: weight = weight_g * weight_v / |weight_v|."""

    def __init__(self, in_dim: int, num_prototypes: int, train_length: bool) -> None:
        super().__init__()
        # What nn.utils.weight_norm makes of an nn.Linear and DINOv2 then sets to 1, under DINOv2's names.
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=train_length)
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_prototypes, in_dim), std=0.02))

    def forward(self, embeddings: Tensor) -> Tensor:
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(embeddings, weight)  # (rows, K)


class ProjectionHead(nn.Module):
    """Embeddings (..., D) -> logits (..., K). Trunc-normal .02 weights and zero biases (numerics of DINO's DINOHead)."""

    def __init__(
        self,
        embed_dim: int,
        num_prototypes: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_layers: int,
        last_layer: str,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [embed_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        steps: dict[str, nn.Module] = {}
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            steps[str(2 * index)] = linear
            if index < num_layers - 1:
                if batch_norm:  # named, so that other layers keep DINO's numbers and weight decay leaves it out
                    steps[f"norm_{2 * index}"] = BatchNorm(fan_out)
                steps[str(2 * index + 1)] = nn.GELU()
        self.mlp = nn.Sequential(OrderedDict(steps)) if num_layers > 1 else steps["0"]
        self.num_prototypes = num_prototypes
        if last_layer == "linear":
            self.last_layer: nn.Module = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)
        else:
            self.last_layer = Prototypes(bottleneck_dim, num_prototypes, train_length=last_layer == "weight_norm")

    def forward(self, embeddings: Tensor) -> Tensor:
        bottleneck = self.mlp(embeddings.reshape(-1, embeddings.shape[-1]))  # batch norm takes rows
        bottleneck = bottleneck.view(*embeddings.shape[:-1], bottleneck.shape[-1])
        # In half precision a smaller eps would round to zero.
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(bottleneck, dim=-1, eps=eps))  # type: ignore[no-any-return]
