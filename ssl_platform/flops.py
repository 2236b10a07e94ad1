"""Model FLOPs by formula: the matrix products of a step, two operations per multiply-add.

Counts what the mathematics needs: rows that drop path leaves out do not count, nor does what a kernel recomputes.
tests/test_flops.py holds it against torch's own counter.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ssl_platform.backbones._blocks import Block
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.heads.projection import ProjectionHead
from ssl_platform.student_teacher import StudentTeacher
from ssl_platform.views import Batch


def linear(rows: int, fan_in: int, fan_out: int, *, trained: bool, input_gradient: bool = True) -> int:
    """One linear layer: forward, and when trained the gradients of its weight and (unless it is the first) its input."""
    return 2 * rows * fan_in * fan_out * (1 + trained * (1 + input_gradient))


def vit_flops(vit: VisionTransformer, rows: int, num_patches: int, *, trained: bool) -> int:
    """`rows` views of `num_patches` patches through the backbone; drop path's share of the rows counts when trained."""
    length, dim = 1 + vit.num_registers + num_patches, vit.embed_dim
    weight = vit.patch_embed.proj.weight  # type: ignore[union-attr]
    assert isinstance(weight, torch.Tensor)
    total = linear(rows * num_patches, weight[0].numel(), dim, trained=trained, input_gradient=False)
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


def step_flops(
    model: StudentTeacher, batch: Batch, *, student: Sequence[str], teacher: Sequence[str], masks: str
) -> int:
    """One DINO + iBOT micro-batch: `student` and `teacher` are the groups that each sees, `masks` iBOT's masks."""
    networks, groups = model.networks, batch.groups
    total = 0
    for name, seen, trained in (("student", student, True), ("teacher", teacher, False)):
        network = networks[name]
        assert isinstance(network, VisionTransformer)
        for group in seen:
            views = groups[group].views
            patch = network.patch_embed.patch_size
            num_patches = 1
            for size, length in zip(views.shape[3:], patch, strict=True):  # type: ignore[arg-type]
                num_patches *= size // length
            total += vit_flops(network, views.shape[0] * views.shape[1], num_patches, trained=trained)
    masked = int(groups[teacher[0]].masks[masks].sum())
    for objective, rows in (("dino", {"student": student, "teacher": teacher}), ("ibot", None)):
        copies = model.heads[str(model.objective(objective).head)]
        assert isinstance(copies, nn.ModuleDict)
        for name, trained in (("student", True), ("teacher", False)):
            head = copies[name]
            assert isinstance(head, ProjectionHead)
            count = (
                masked if rows is None else sum(groups[g].views.shape[0] * groups[g].views.shape[1] for g in rows[name])
            )
            total += head_flops(head, count, trained=trained)
    return total
