"""Gram anchoring: the similarities among a view's patches stay those of an earlier network (arXiv 2508.10104, section 4).

The earlier network is a copy of the teacher taken now and then, and best sees the same crops at a higher resolution:

    networks: {gram: {update: snapshot, of: teacher, first_step: 0, every: 10000, max_updates: 3}}
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from ssl_platform.backbones import Features
from ssl_platform.backbones._positions import resize_tokens
from ssl_platform.config import ConfigError
from ssl_platform.modalities import GroupSpec
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.views import Batch

Negatives = Literal["keep", "remove", "remove_teachers"]


class Config(ObjectiveConfig):
    name: str = "gram"
    student: str = "student"
    teacher: str = "gram"
    """The earlier network."""
    group: str = "global"
    masks: str | None = None
    """The masks of DINO's forward pass of that group, if it has some; the same request runs once."""
    teacher_group: str = "global"
    """The views that the earlier network sees: the same crops, at any resolution (`gram` of the modality image)."""
    level: Literal["image", "batch"] = "image"
    """Similarities among the patches of each view (DINOv3), or among all patches of a rank's micro-batch."""
    tokens: Literal["all", "masked", "visible"] = "all"
    """Which patches count; other than all needs masks and level: batch."""
    normalize: bool = True
    """Cosine similarities instead of products."""
    negatives: Negatives = "keep"
    """What becomes of negative similarities: kept, 0, or 0 where the teacher's are negative."""
    antialias: bool = False
    """When the teacher's features are resized (bicubic) to the student's grid."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.tokens != "all" and (self.masks is None or self.level == "image"):
            raise ValueError(
                f"tokens: {self.tokens} needs masks, and level: batch, as views then differ in their number"
            )
        return self

    def problems(self, networks: Mapping[str, Any], groups: Mapping[str, GroupSpec]) -> list[str]:
        if networks[self.teacher].update != "grad":
            return []
        return [f"teacher: '{self.teacher}' is trained; name a network with update: snapshot, frozen or ema"]

    def taught_by(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    def build(self, context: BuildContext) -> "Gram":
        return Gram(
            Forward(self.student, self.group, self.masks),
            Forward(self.teacher, self.teacher_group),
            tokens=self.tokens,
            each_view=self.level == "image",
            normalize=self.normalize,
            negatives=self.negatives,
            antialias=self.antialias,
        )


class Gram(Objective):
    """mean((S S' - T T')^2) over all pairs of patches of a view, S and T the student's and the teacher's features."""

    def __init__(
        self,
        student: Forward,
        teacher: Forward,
        *,
        tokens: str,
        each_view: bool,
        normalize: bool,
        negatives: Negatives,
        antialias: bool,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.tokens, self.each_view = student, teacher, tokens, each_view
        self.normalize, self.negatives, self.antialias = normalize, negatives, antialias

    def requests(self, step: int) -> Sequence[Forward]:
        return [self.student, self.teacher]

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        self._check_views(batch)
        ours, theirs = outputs.features[self.student], outputs.features[self.teacher]
        student, teacher = ours.patches, self._on_grid(theirs, ours)  # (V, [M,] B, N, D), (V, B, N, D')
        if self.student.masks is not None:
            teacher = teacher[:, None].expand(-1, student.shape[1], -1, -1, -1)
        if self.tokens != "all":
            assert self.student.masks is not None
            masks = batch.groups[self.student.group].masks[self.student.masks]  # (V, M, B, N)
            chosen = masks if self.tokens == "masked" else masks.logical_not()
            student, teacher = student[chosen], teacher[chosen]
        if not self.each_view:
            student, teacher = (x.reshape(1, -1, x.shape[-1]) for x in (student, teacher))
        return Loss({"loss": gram_loss(student, teacher, self.normalize, self.negatives)})

    def _on_grid(self, theirs: Features, ours: Features) -> Tensor:
        """The teacher's patches (V, B, N, D) at the student's places."""
        patches = theirs.patches.detach()
        if theirs.grid == ours.grid and patches.shape[-2] == ours.patches.shape[-2]:
            return patches
        if theirs.grid is None or ours.grid is None:
            raise ConfigError(
                [
                    f"gram: '{self.teacher.network}' has {patches.shape[-2]} patches and '{self.student.network}' "
                    f"{ours.patches.shape[-2]}, of no known grid, so one cannot be resized to the other; use the backbone "
                    "'vit' for both, or teacher_group of the same size"
                ]
            )
        resized = resize_tokens(patches.flatten(0, 1), theirs.grid, ours.grid, self.antialias)
        return resized.reshape(*patches.shape[:2], *resized.shape[1:])

    def _check_views(self, batch: Batch) -> None:
        sources = [batch.groups[forward.group].source for forward in (self.student, self.teacher)]
        if not torch.equal(*sources):
            raise ConfigError(
                [
                    f"gram: the views of '{self.teacher.group}' show other crops than those of '{self.student.group}'; "
                    f"teacher_group must show the same ones, such as the modality's copies: {{gram: {{of: "
                    f"{self.student.group}, size: ...}}}}"
                ]
            )


def gram_loss(student: Tensor, teacher: Tensor, normalize: bool = True, negatives: Negatives = "keep") -> Tensor:
    """The mean squared difference of the Gram matrices of (..., N, D) and (..., N, D'), in float32; 0 without patches."""
    if not student.numel():
        return student.sum() * 0.0
    similarities = []
    for features in (student, teacher):
        rows = features.float()
        rows = F.normalize(rows, dim=-1) if normalize else rows
        similarities.append(rows @ rows.mT)  # (..., N, N)
    ours, theirs = similarities
    if negatives == "remove":
        ours = ours.clamp(min=0)
    elif negatives == "remove_teachers":
        ours = ours.masked_fill((ours < 0) & (theirs < 0), 0.0)
    if negatives != "keep":
        theirs = theirs.clamp(min=0)
    return F.mse_loss(ours, theirs)
