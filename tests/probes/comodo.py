"""COMODO: a frozen video network teaches a network of another kind of data, against a queue of past embeddings."""

import torch
import torch.nn.functional as F
from torch import nn

from ssl_platform import distributed
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig
from ssl_platform.objectives._cross_entropy import cross_entropy


class Config(ObjectiveConfig):
    name: str = "tests.probes.comodo"
    queue_size: int = 16

    def build(self, context: BuildContext) -> "Comodo":
        return Comodo(context.embed_dims["video"], context.embed_dims["student"], self.queue_size)


class Comodo(Objective):
    def __init__(self, video_dim: int, student_dim: int, queue_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(video_dim, 8).requires_grad_(False)  # random and frozen, as published
        self.student_mlp = nn.Linear(student_dim, 8)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, 8), dim=-1))

    def requests(self, step):
        return [Forward("video", "clip"), Forward("student", "signal")]

    def loss(self, outputs, batch, step):
        video, signal = (outputs.features[request].cls[0] for request in self.requests(step))  # (B, D)
        video = F.normalize(self.projection(video), dim=-1)
        bank = torch.cat([self.queue, distributed.gather(video)])
        targets = (video @ bank.T / 0.1).softmax(-1)
        logits = F.normalize(self.student_mlp(signal), dim=-1) @ bank.T
        return Loss({"loss": cross_entropy(logits, targets, 0.05).mean()}, {"video": video})

    def commit(self, step, pending):
        new = torch.cat([distributed.gather(item["video"]) for item in pending])
        self.queue.copy_(torch.cat([self.queue, new])[-len(self.queue) :])
