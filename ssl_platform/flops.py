"""Model FLOPs by formula: the matrix products of what passes through the networks, two operations per multiply-add.

Counts what the mathematics needs: rows that drop path leaves out do not count, nor does what a kernel recomputes.
tests/test_flops.py holds it against torch's own counter.
"""

import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_platform.backbones import Features, Input
from ssl_platform.backbones._blocks import Block
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.heads.projection import ProjectionHead
from ssl_platform.student_teacher import StudentTeacher


def linear(rows: int, fan_in: int, fan_out: int, *, trained: bool, input_gradient: bool = True) -> int:
    """One linear layer: forward, and when trained the gradients of its weight and (unless it is the first) its input."""
    return 2 * rows * fan_in * fan_out * (1 + trained * (1 + input_gradient))


def vit_flops(vit: VisionTransformer, item: Input, features: Features, *, trained: bool) -> int:
    """One input through the backbone; drop path's share of the rows counts when trained. Reads shapes only."""
    length, dim = 1 + vit.num_registers + features.patches.shape[-2], vit.embed_dim
    num_views = item.views.shape[0] * item.views.shape[1]
    num_patches = features.patches.shape[-2] if item.masks is None else item.masks.shape[-1]
    rows = num_views * (1 if item.masks is None else item.masks.shape[1])
    weight = vit.patch_embed.proj.weight  # type: ignore[union-attr]
    assert isinstance(weight, torch.Tensor)
    total = linear(num_views * num_patches, weight.shape[1:].numel(), dim, trained=trained, input_gradient=False)
    for block, rate in zip(vit.blocks, vit.drop_path, strict=True):
        assert isinstance(block, Block)
        kept = max(int(rows * (1 - rate)), 1) if trained and rate else rows
        hidden, first = block.mlp.fc2.in_features, block.mlp.fc1.out_features
        for fan_in, fan_out in ((dim, 3 * dim), (dim, dim), (dim, first), (hidden, dim)):
            total += linear(kept * length, fan_in, fan_out, trained=trained)
        total += 2 * 2 * kept * length * length * dim * (3 if trained else 1)  # q k' and (softmax) v
    return total


def head_flops(head: ProjectionHead, rows: int, *, trained: bool) -> int:
    """`rows` embeddings through a projection head."""
    layers = [module for module in head.mlp.modules() if isinstance(module, nn.Linear)]
    total = sum(linear(rows, layer.in_features, layer.out_features, trained=trained) for layer in layers)
    return total + linear(rows, layers[-1].out_features, head.num_prototypes, trained=trained)


def countable(model: StudentTeacher) -> bool:
    """Whether the formulas cover the model: vision transformers, projection heads, objectives without weights."""
    networks, heads = model.networks.values(), [head for copies in model.heads.values() for head in copies.children()]
    return (
        all(isinstance(net, VisionTransformer) and hasattr(net.patch_embed, "proj") for net in networks)
        and all(isinstance(head, ProjectionHead) for head in heads)
        and not any(True for _ in model.objectives.parameters())
    )


class Counted:
    """A context in which `total` grows by the model FLOPs, forward and backward, of all forward passes of `model`."""

    def __init__(self, model: StudentTeacher) -> None:
        """The model must be `countable`."""
        self.model, self.total = model, 0
        self.parts: dict[str, int] = {}
        """Those of each network, and of each head of a network."""
        self._hooks: list[Any] = []

    def __enter__(self) -> "Counted":
        for name, network in self.model.networks.items():
            trained = self.model.roles[name].update == "grad"
            self._hooks.append(network.register_forward_hook(self._network_hook(name, trained)))
            for head, copies in self.model.heads.items():
                if name in copies:  # type: ignore[operator]
                    hook = self._head_hook(f"{name}'s {head} head", trained)
                    self._hooks.append(copies[name].register_forward_hook(hook))  # type: ignore[index]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, part: str, flops: int) -> None:
        self.total += flops
        self.parts[part] = self.parts.get(part, 0) + flops

    def _network_hook(self, part: str, trained: bool) -> Any:
        def count(network: VisionTransformer, arguments: tuple[list[Input]], outputs: list[Features]) -> None:
            for item, features in zip(arguments[0], outputs, strict=True):
                self._add(part, vit_flops(network, item, features, trained=trained))

        return count

    def _head_hook(self, part: str, trained: bool) -> Any:
        def count(head: ProjectionHead, arguments: tuple[torch.Tensor], logits: torch.Tensor) -> None:
            self._add(part, head_flops(head, logits.shape[:-1].numel(), trained=trained))

        return count


def torchs_counter() -> FlopCounterMode:
    """torch's own counter, which also sees the attention kernel of the CPU."""
    # Twice the forward for the backward, as the formula has it; kernels that compute the scores again do more.
    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _attention_backward_flops(gradient: Any, *shapes: Any, **_: Any) -> int:
    return 2 * _attention_flops(*shapes)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the two products, from the shapes (batch, heads, tokens, width)."""
    batch, heads, tokens, width = query
    return int(2 * batch * heads * tokens * key[2] * (width + value[3]))


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """FLOP/s of one (size x size) product, the best of .2 seconds: what mfu calls the peak.

    None: 4096 on CUDA, 1024 on the CPU, or 256 where 1024 would take seconds (a processor that emulates bf16).
    """
    if size is None:
        size = 4096 if device.type == "cuda" else 1024
        if device.type != "cuda" and matmul_rate(dtype, device, 256) < 5e9:
            size = 256
    own = torch.Generator(device)  # the run's random numbers stay where they are
    left, right = (torch.randn(size, size, generator=own, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    _synchronise(device)
    while len(seconds) < 4 or (sum(seconds) < 0.2 and len(seconds) < 20):  # others may be busy for a moment
        begun = time.perf_counter()
        left @ right
        _synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
