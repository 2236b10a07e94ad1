"""Gram anchoring: a third network, an old snapshot of the teacher that sees the same crops at twice the resolution."""

import torch.nn.functional as F

from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig


class Config(ObjectiveConfig):
    name: str = "tests.probes.gram"

    def build(self, context: BuildContext) -> "Gram":
        return Gram()


class Gram(Objective):
    def requests(self, step):
        return [Forward("student", "global", "block"), Forward("gram", "double")]

    def loss(self, outputs, batch, step):
        student, anchor = (outputs.features[request].patches for request in self.requests(step))
        small = F.avg_pool2d(anchor.flatten(0, 1).transpose(1, 2).unflatten(2, (4, 4)), 2)  # (2 B, D, 2, 2)
        grams = [
            rows @ rows.transpose(1, 2)
            for rows in (
                F.normalize(student.flatten(0, 2), dim=-1),
                F.normalize(small.flatten(2).transpose(1, 2), dim=-1),
            )
        ]
        return Loss({"loss": F.mse_loss(*grams)})
