"""Feature anchor: keeps the student near a frozen network, so that continued pretraining forgets less.

The frozen network is a copy of the student as it started: `networks: {anchor: {update: frozen, of: student}}`.
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.views import Batch


class Config(ObjectiveConfig):
    name: str = "anchor"
    student: str = "student"
    teacher: str = "anchor"
    """The frozen network."""
    group: str = "global"
    masks: str | None = None
    """The masks of DINO's forward pass of that group, if it has some; the same request runs once."""
    tokens: Literal["cls", "patches", "both"] = "both"
    """Which features are held: the embedding, the patches that the student sees, or each with a term of its own."""
    distance: Literal["cosine", "smooth_l1"] = "cosine"
    """cosine: 1 - cosine of the features; smooth_l1: with beta 1, the mean over their elements."""

    def build(self, context: BuildContext) -> "Anchor":
        if context.embed_dims[self.student] != context.embed_dims[self.teacher]:
            raise ValueError(
                f"'{self.teacher}' has width {context.embed_dims[self.teacher]}, '{self.student}' "
                f"{context.embed_dims[self.student]}; an anchor is a copy: {{update: frozen, of: {self.student}}}"
            )
        student = Forward(self.student, self.group, self.masks)
        return Anchor(student, Forward(self.teacher, self.group), self.tokens, self.distance)


class Anchor(Objective):
    """The mean over views, samples and tokens of the distance between the student's and the frozen features, pre-head."""

    def __init__(self, student: Forward, teacher: Forward, tokens: str, distance: str) -> None:
        super().__init__()
        self.student, self.teacher, self.tokens, self.distance = student, teacher, tokens, distance

    def requests(self, step: int) -> Sequence[Forward]:
        return [self.student, self.teacher]

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        ours, theirs = outputs.features[self.student], outputs.features[self.teacher]
        is_masked, terms = self.student.masks is not None, {}
        if self.tokens != "patches":
            cls = theirs.cls[:, None] if is_masked else theirs.cls  # (V, [1,] B, D)
            terms["cls"] = self._distance(ours.cls, cls).mean()
        if self.tokens != "cls":
            patches = theirs.patches[:, None] if is_masked else theirs.patches  # (V, [1,] B, N, D)
            each = self._distance(ours.patches, patches)  # (V, [M,] B, N)
            if self.student.masks is not None:
                seen = batch.groups[self.student.group].masks[self.student.masks].logical_not()
                terms["patches"] = (each * seen).sum() / seen.sum().clamp(min=1)
            else:
                terms["patches"] = each.mean()
        return Loss(terms)

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """(..., D) -> (...), in float32."""
        ours, theirs = ours.float(), theirs.detach().float()
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(ours, theirs, dim=-1)
        return F.smooth_l1_loss(ours, theirs.expand_as(ours), reduction="none").mean(-1)
