"""KoLeo: spreads the student's class tokens by pushing each away from its nearest neighbour (Sablayrolles et al. 2019)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_platform import distributed
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.optim import ScheduleConfig
from ssl_platform.views import Batch


class Config(ObjectiveConfig):
    name: str = "koleo"
    weight: ScheduleConfig = 0.1
    student: str = "student"
    group: str = "global"
    masks: str | None = None
    """The masks of DINO's forward pass of that group, if it has some; the same request runs once."""
    scope: Literal["rank", "global"] = "rank"
    """Where neighbours are looked for: among one rank's samples of a micro-batch (DINOv2), or among all ranks'."""

    def build(self, context: BuildContext) -> "Koleo":
        return Koleo(Forward(self.student, self.group, self.masks), everywhere=self.scope == "global")


class Koleo(Objective):
    """The sum over views of koleo(class tokens of that view), pre-head; never across two views of one sample."""

    def __init__(self, student: Forward, everywhere: bool) -> None:
        super().__init__()
        self.student, self.everywhere = student, everywhere

    def requests(self, step: int) -> Sequence[Forward]:
        return [self.student]

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        views = outputs.features[self.student].cls.flatten(0, -3)  # (V, B, D)
        return Loss({"loss": torch.stack([koleo(view, self.everywhere) for view in views]).sum()})


def koleo(embeddings: Tensor, everywhere: bool = False, eps: float = 1e-8) -> Tensor:
    """-mean log(distance to the nearest neighbour + eps) of the L2-normalised rows (B, D), in float32 whatever comes in.

    A single row has no neighbour and gives 0. Exact duplicates stay finite: the distance has eps inside, as
    torch's PairwiseDistance, so -log is about 15 for D = 384; in half precision eps would round to 0 and give infinity.
    """
    rows = F.normalize(embeddings.float(), dim=-1, eps=eps)  # (B, D)
    others = distributed.gather_with_gradient(rows) if everywhere else rows  # (B of all ranks, D)
    if len(others) < 2:
        return rows.sum() * 0.0
    first = distributed.rank() * len(rows) if everywhere else 0
    with torch.no_grad():
        similarity = rows @ others.T
        similarity.diagonal(first).fill_(-1)
        nearest = similarity.argmax(1)  # (B,)
    distance = F.pairwise_distance(rows, others[nearest], p=2, eps=eps)
    return -torch.log(distance + eps).mean()
