"""ASiT: clean teacher views beside corrupted student views; all-token distillation and L1 on corrupted pixels.

The class-token part is the engine's `dino` with teacher_group: clean, student_groups: [corrupted]; the donors come from
data.companions.
"""

import torch
from torch import nn

from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig
from ssl_platform.objectives._cross_entropy import cross_entropy
from ssl_platform.objectives._targets import Centering


class Config(ObjectiveConfig):
    name: str = "tests.probes.asit"
    head: str = "data"

    def build(self, context: BuildContext) -> "Asit":
        return Asit(self.head, context.heads[self.head].num_prototypes, context.embed_dims["student"])


class Asit(Objective):
    def __init__(self, head: str, prototypes: int, embed_dim: int) -> None:
        super().__init__()
        self.head, self.center = head, Centering(prototypes)
        self.reconstruct = nn.Linear(embed_dim, 16)  # 4 x 4 pixels of a patch
        self.teacher, self.student = Forward("teacher", "clean"), Forward("student", "corrupted")

    def requests(self, step):
        return [self.teacher, self.student]

    def loss(self, outputs, batch, step):
        heads, patches = outputs.heads[self.head], outputs.features[self.student].patches  # (2, B, 4, D)
        with torch.no_grad():
            teacher = heads["teacher"](outputs.features[self.teacher].patches).flatten(0, 2)
            targets = self.center(teacher, 0.04)
        data = cross_entropy(heads["student"](patches).flatten(0, 2), targets, 0.1).mean()
        pixels = self.reconstruct(patches).unflatten(2, (2, 2)).unflatten(-1, (4, 4))  # (2, B, 2, 2, 4, 4)
        pixels = pixels.transpose(3, 4).reshape(*pixels.shape[:2], 1, 8, 8)
        mask = batch.groups["corrupted"].extra["pixel_mask"].transpose(0, 1)  # (2, B, 1, 8, 8)
        clean = batch.groups["clean"].views
        reconstruction = ((pixels - clean).abs() * mask).sum() / mask.sum()
        return Loss({"data": data, "reconstruction": 2 * reconstruction}, self.center.pending(teacher))

    def commit(self, step, pending):
        self.center.commit(pending)
