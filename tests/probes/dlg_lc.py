"""DLG-LC: pseudo-labels from clustering between stages, a loss store keyed by sample id, a gate on it, label correction."""

import torch
import torch.nn.functional as F
from torch import nn

from ssl_platform import distributed
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig


class Config(ObjectiveConfig):
    name: str = "tests.probes.dlg_lc"
    clusters: int = 3

    def build(self, context: BuildContext) -> "DlgLc":
        return DlgLc(context.embed_dims["student"], self.clusters, context.num_samples)


class DlgLc(Objective):
    def __init__(self, embed_dim: int, clusters: int, num_samples: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embed_dim, clusters, bias=False)
        self.register_buffer("log_losses", torch.full((num_samples,), torch.nan))
        self.register_buffer("threshold", torch.tensor(torch.inf))
        self.register_buffer("pseudo_labels", torch.zeros(num_samples, dtype=torch.int64))

    def begin_stage(self, prepared):
        self.pseudo_labels.copy_(prepared["clusters"])

    def requests(self, step):
        return [Forward("student", "global"), Forward("student", "clean")]

    def loss(self, outputs, batch, step):
        augmented, clean = (self.classifier(outputs.features[r].cls[0]) for r in self.requests(step))  # (B, clusters)
        labels = self.pseudo_labels[batch.ids]
        own = F.cross_entropy(augmented, labels, reduction="none")
        reliable = own.detach().log() <= self.threshold
        confidence, corrected = (clean.detach() / 0.1).softmax(-1).max(-1)
        fixed = F.cross_entropy(augmented, corrected, reduction="none") * (confidence > 0.5)
        pending = {"ids": batch.ids, "log_losses": own.detach().log()}
        return Loss({"loss": torch.where(reliable, own, fixed).mean()}, pending)

    def commit(self, step, pending):
        ids, losses = (torch.cat([distributed.gather(item[k]) for item in pending]) for k in ("ids", "log_losses"))
        self.log_losses[ids] = losses
        self.threshold.copy_(self.log_losses.nanquantile(0.8))
