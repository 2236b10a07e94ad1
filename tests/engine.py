"""A tiny student and teacher built by hand, and batches for it: what the engine's tests start from."""

from collections.abc import Sequence
from typing import Any

import torch

from ssl_platform import distributed
from ssl_platform.config import validate
from ssl_platform.recipe import Recipe, build_student_teacher
from ssl_platform.step import Parts
from ssl_platform.student_teacher import StudentTeacher
from ssl_platform.views import Batch, ViewGroup
from tests.probes.toy import SPECS

NUM_PROTOTYPES = 12
VIT = {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "layer_scale": None}
HEAD = {"name": "projection", "num_prototypes": NUM_PROTOTYPES, "hidden_dim": 16, "bottleneck_dim": 8, "num_layers": 2}
DINO = {"name": "dino", "teacher_temp": 0.04, "masks": {"global": "block"}}
IBOT = {"name": "ibot", "teacher_temp": 0.04}
KOLEO = {"name": "koleo", "masks": "block"}


def settings(**changes: Any) -> dict[str, Any]:
    """DINO + iBOT with a shared head + KoLeo on the toy modality, as plain data."""
    data: dict[str, Any] = {
        "run_dir": "unused",
        "steps": 10,
        "batch_size": 4,
        "modality": {"name": "tests.probes.toy"},
        "data": {"shards": "unused"},
        "networks": {"student": {"backbone": VIT}, "teacher": {"update": "ema", "of": "student", "momentum": 0.9}},
        "heads": {"dino": HEAD},
        "masks": {"block": {"name": "block", "min_tokens": 1}},
        "objectives": {"dino": DINO, "ibot": IBOT, "koleo": KOLEO},
        "optim": {"lr": 0.01},
    }
    return data | changes


def recipe(**changes: Any) -> Recipe:
    return validate(Recipe, settings(**changes), world_size=distributed.world_size())


def model(**changes: Any) -> StudentTeacher:
    made = recipe(**changes)
    return build_student_teacher(made, made.modality.build(None), 8, torch.device("cpu"))


def parts(**changes: Any) -> Parts:
    from ssl_platform.step import build

    made = recipe(**changes)
    return build(made, made.modality.build(None), 8, torch.device("cpu"))


def batch(seed: int = 0, size: int = 4, masked: float = 0.5) -> Batch:
    """Noise views; a share of the tokens of every second global view is masked, at least one."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2, 1, size, 4, dtype=torch.bool)
    masks[:, :, ::2, : max(int(4 * masked), 0)] = True
    groups = {
        "global": ViewGroup(
            torch.randn(2, size, *SPECS["global"].shape, generator=generator), torch.arange(2), {"block": masks}
        ),
        "local": ViewGroup(torch.randn(2, size, *SPECS["local"].shape, generator=generator), torch.tensor([2, 3])),
    }
    ids = torch.arange(size)
    return Batch(groups, [f"sample{seed}-{i}" for i in range(size)], ids, ids, seed)


def split(whole: Batch, pieces: int) -> Sequence[Batch]:
    """The micro-batches of a batch."""
    size = len(whole.keys) // pieces
    made = []
    for piece in range(pieces):
        rows = slice(piece * size, (piece + 1) * size)
        groups = {
            name: ViewGroup(g.views[:, rows], g.source, {key: m[:, :, rows] for key, m in g.masks.items()})
            for name, g in whole.groups.items()
        }
        made.append(Batch(groups, whole.keys[rows], whole.ids[rows], whole.labels[rows], whole.step))
    return made


__all__ = ["batch", "model", "parts", "recipe", "settings", "split"]
