"""DINO: the student's class token of each view predicts the teacher's of another crop (Caron et al. 2021)."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_platform.config import ConfigError
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.objectives._cross_entropy import cross_entropy, entropy
from ssl_platform.objectives._targets import TargetName, Temperature, build_targets
from ssl_platform.optim import Linear, Schedule, build_schedule
from ssl_platform.views import Batch

Pairs = Literal["other", "same", "all"]


class Config(ObjectiveConfig):
    name: str = "dino"
    head: str = "dino"
    """Which of the run's heads makes the logits."""
    teacher: str = "teacher"
    """The network that makes the targets, and `teacher_group` the views it sees."""
    teacher_group: str = "global"
    student: str = "student"
    student_groups: tuple[str, ...] = ("global", "local")
    """The views that the student sees."""
    masks: dict[str, str] = {}
    """{group: masks}: the student sees that group with tokens hidden, as in DINOv2: then it shares iBOT's forward pass."""
    mode: Literal["token", "drop"] = "token"
    """How masked tokens are hidden from the student."""
    pairs: Pairs = "other"
    """Which (teacher view, student view) pairs count: of another crop, of the same crop, or all."""
    targets: TargetName = "centering"
    center_momentum: float = Field(0.9, ge=0, lt=1)
    sinkhorn_iterations: int = Field(3, ge=1)
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: Temperature = Linear(schedule="linear", start=0.04, end=0.07, over_steps=37500)

    def build(self, context: BuildContext) -> "Dino":
        students = tuple(
            Forward(self.student, group, masks, self.mode if masks else "token")
            for group in self.student_groups
            for masks in [self.masks.get(group)]
        )
        return Dino(
            head=self.head,
            teacher=Forward(self.teacher, self.teacher_group),
            students=students,
            pairs=self.pairs,
            targets=build_targets(
                self.targets, context.heads[self.head].num_prototypes, self.center_momentum, self.sinkhorn_iterations
            ),
            student_temp=self.student_temp,
            teacher_temp=build_schedule(self.teacher_temp, context.steps),
        )


class Dino(Objective):
    """The mean cross-entropy over pairs of views,

        for t in teacher views:
            for s in student views, if source[s] != source[t]:
                loss += mean over samples of -sum(P[t] * log softmax(logits[s] / student_temp)) / number of pairs

    returned as one term for each group of student views, which add up to it.
    """

    def __init__(
        self,
        *,
        head: str,
        teacher: Forward,
        students: Sequence[Forward],
        pairs: Pairs,
        targets: torch.nn.Module,
        student_temp: float,
        teacher_temp: Schedule,
    ) -> None:
        super().__init__()
        self.head, self.teacher, self.students, self.pairs = head, teacher, tuple(students), pairs
        self.targets, self.student_temp, self.teacher_temp = targets, student_temp, teacher_temp

    def requests(self, step: int) -> Sequence[Forward]:
        return [self.teacher, *self.students]

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        with torch.no_grad():
            embeddings = outputs.features[self.teacher].cls  # (T, B, D)
            teacher_logits = outputs.heads[self.head][self.teacher.network](embeddings.flatten(0, 1))  # (T B, K)
            pending = self.targets.pending(teacher_logits)  # type: ignore[operator]
            targets = self.targets(teacher_logits, self.teacher_temp(step), in_place=True)
            targets = targets.unflatten(0, embeddings.shape[:2])  # (T, B, K)
            teacher_entropy = entropy(targets)
        views = [outputs.features[request].cls.flatten(0, -3) for request in self.students]  # each (S, B, D)
        logits = outputs.heads[self.head][self.students[0].network](torch.cat(views).flatten(0, 1))
        logits = logits.unflatten(0, (-1, len(batch.keys)))  # (S of all groups, B, K)
        sources = [self._sources(request, batch, len(cls)) for request, cls in zip(self.students, views, strict=True)]
        allowed = pair_matrix(batch.groups[self.teacher.group].source, torch.cat(sources), self.pairs)  # (T, S)
        losses = pair_losses(logits, targets, allowed, self.student_temp)  # (S,)
        parts = torch.split(losses, [len(cls) for cls in views])
        terms = {request.group: part.sum() for request, part in zip(self.students, parts, strict=True)}
        metrics = {"teacher_entropy": teacher_entropy, "kl": losses.detach().sum() - teacher_entropy}
        return Loss(terms, pending, metrics)

    def commit(self, step: int, pending: Sequence[dict[str, Tensor]]) -> None:
        self.targets.commit(pending)  # type: ignore[operator]

    def _sources(self, request: Forward, batch: Batch, num_views: int) -> Tensor:
        source = batch.groups[request.group].source
        return source.repeat_interleave(num_views // len(source))  # a view's masked versions show the same crop


def pair_matrix(teacher_source: Tensor, student_source: Tensor, pairs: Pairs) -> Tensor:
    """(T,), (S,) -> (T, S) bool: which pairs count."""
    same = teacher_source[:, None] == student_source[None, :]
    return {"other": ~same, "same": same, "all": torch.ones_like(same)}[pairs]


def pair_losses(logits: Tensor, targets: Tensor, allowed: Tensor, student_temp: float) -> Tensor:
    """Each student view's share of the mean cross-entropy over the allowed pairs.

    logits (S, B, K), targets (T, B, K), allowed (T, S) -> (S,). The cross-entropies of one student view with several
    teacher views share their log-sum-exp, so they are one cross-entropy with the sum of the targets.
    """
    used_by_view: list[list[bool]] = allowed.T.tolist()
    num_pairs = sum(map(sum, used_by_view))
    if num_pairs == 0:
        raise ConfigError(
            [
                "dino: no pair of views is left; a teacher with one view needs pairs: all, or student_groups of other crops"
            ]
        )
    sums: dict[tuple[bool, ...], Tensor] = {}
    losses = []
    for view, teachers in zip(logits, used_by_view, strict=True):
        chosen = [target for target, used in zip(targets, teachers, strict=True) if used]
        if not chosen:
            losses.append(view.sum() * 0.0)
            continue
        key = tuple(teachers)
        if key not in sums:
            sums[key] = chosen[0] if len(chosen) == 1 else torch.stack(chosen).sum(0)  # (B, K)
        losses.append(cross_entropy(view, sums[key], student_temp, mass=len(chosen)).mean() / num_pairs)
    return torch.stack(losses)
