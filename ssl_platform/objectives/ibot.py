"""iBOT: the student's masked patch tokens predict the teacher's at the same places of the same crop (Zhou et al. 2022)."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.objectives._cross_entropy import cross_entropy, entropy
from ssl_platform.objectives._targets import TargetName, Temperature, build_targets
from ssl_platform.optim import Linear, Schedule, build_schedule
from ssl_platform.views import Batch


class Config(ObjectiveConfig):
    name: str = "ibot"
    head: str = "dino"
    """Which of the run's heads makes the logits; naming DINO's shares it (with a center of its own)."""
    teacher: str = "teacher"
    student: str = "student"
    group: str = "global"
    """The views that both see, the student with tokens hidden by `masks`."""
    masks: str = "block"
    targets: TargetName = "centering"
    center_momentum: float = Field(0.9, ge=0, lt=1)
    sinkhorn_iterations: int = Field(3, ge=1)
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: Temperature = Linear(schedule="linear", start=0.04, end=0.07, over_steps=37500)

    def build(self, context: BuildContext) -> "Ibot":
        return Ibot(
            head=self.head,
            teacher=Forward(self.teacher, self.group),
            student=Forward(self.student, self.group, self.masks),
            targets=build_targets(
                self.targets, context.heads[self.head].num_prototypes, self.center_momentum, self.sinkhorn_iterations
            ),
            student_temp=self.student_temp,
            teacher_temp=build_schedule(self.teacher_temp, context.steps),
        )


class Ibot(Objective):
    """For each view: the mean cross-entropy over its masked tokens; then the mean over views, unmasked ones included as 0

        loss = sum over views of (1 / masked tokens of the view) * sum over them of -sum(P log q) / number of views

    as in DINOv2 (`ibot_patch_loss.py`), where half of the views are unmasked and so halve the value.
    """

    def __init__(
        self,
        *,
        head: str,
        teacher: Forward,
        student: Forward,
        targets: torch.nn.Module,
        student_temp: float,
        teacher_temp: Schedule,
    ) -> None:
        super().__init__()
        self.head, self.teacher, self.student = head, teacher, student
        self.targets, self.student_temp, self.teacher_temp = targets, student_temp, teacher_temp

    def requests(self, step: int) -> Sequence[Forward]:
        return [self.teacher, self.student]

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        assert self.student.masks is not None
        group = batch.groups[self.student.group]
        masks, hidden = group.masks[self.student.masks], group.hidden(self.student.masks)  # (V, M, B, N), (masked,)
        with torch.no_grad():
            teacher_patches = outputs.features[self.teacher].patches  # (V, B, N, D)
            seen = (
                teacher_patches[:, None].expand(*masks.shape, -1).flatten(0, 3).index_select(0, hidden)
            )  # (masked, D)
            teacher_logits = outputs.heads[self.head][self.teacher.network](seen)  # (masked, K)
            pending = self.targets.pending(teacher_logits)  # type: ignore[operator]
            targets = self.targets(teacher_logits, self.teacher_temp(step), in_place=True)
            del teacher_logits  # one tensor less of this size while the student's logits are there
            teacher_entropy = entropy(targets)  # nan if this rank has no masked token, like the mean of no rows
        student_patches = outputs.features[self.student].patches.flatten(0, 3).index_select(0, hidden)  # (masked, D)
        logits = outputs.heads[self.head][self.student.network](student_patches)  # (masked, K)
        counts = masks.sum(-1, keepdim=True)  # (V, M, B, 1)
        weights = (1 / counts.clamp_min(1)).expand_as(masks).flatten().index_select(0, hidden)  # (masked,)
        num_views = masks[..., 0].numel()
        rows = cross_entropy(logits, targets, self.student_temp, reuse_targets=True)  # (masked,)
        metrics = {"teacher_entropy": teacher_entropy, "kl": rows.detach().mean() - teacher_entropy}
        return Loss({"loss": (rows * weights).sum() / num_views}, pending, metrics)

    def commit(self, step: int, pending: Sequence[dict[str, Tensor]]) -> None:
        self.targets.commit(pending)  # type: ignore[operator]
