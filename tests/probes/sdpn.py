"""SDPN: one clean view only the teacher sees, augmented views only the student sees, learnable prototypes, me-max."""

import torch
import torch.nn.functional as F
from torch import nn

from ssl_platform import distributed
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig
from ssl_platform.objectives._cross_entropy import cross_entropy
from ssl_platform.objectives._targets import Sinkhorn


class Config(ObjectiveConfig):
    name: str = "tests.probes.sdpn"
    head: str = "embedding"

    def build(self, context: BuildContext) -> "Sdpn":
        return Sdpn(self.head, context.heads[self.head].num_prototypes)


class Sdpn(Objective):
    def __init__(self, head: str, dim: int) -> None:
        super().__init__()
        self.head, self.sinkhorn = head, Sinkhorn(3)
        self.prototypes = nn.Parameter(torch.randn(6, dim))

    def requests(self, step):
        return [Forward("teacher", "single"), Forward("student", "global"), Forward("student", "local")]

    def loss(self, outputs, batch, step):
        teacher, *students = (outputs.features[request].cls for request in self.requests(step))
        prototypes = F.normalize(self.prototypes, dim=-1)
        with torch.no_grad():
            clean = F.normalize(outputs.heads[self.head]["teacher"](teacher[0]), dim=-1)
            sharpened = (clean @ prototypes.T / 0.1 / 0.25).softmax(-1)
            targets = self.sinkhorn(sharpened.log(), 1.0)  # (B, K)
        views = outputs.heads[self.head]["student"](torch.cat(students))  # (V, B, d)
        logits = F.normalize(views, dim=-1) @ prototypes.T  # (V, B, K)
        loss = torch.stack([cross_entropy(rows, targets, 0.1).mean() for rows in logits]).mean()
        mean = (logits / 0.1).softmax(-1).mean((0, 1))
        mean = distributed.gather_with_gradient(mean[None]).mean(0)  # of all ranks: the entropy of a mean is not linear
        return Loss({"loss": loss, "me_max": (mean * mean.log()).sum()})
