"""DISCOVR: video and image branches, views that are masks of one clip with tokens dropped, a decoder, and cluster targets.

Both class-token parts are the engine's `dino` with mode: drop and pairs: same; this file is the semantic cluster term.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig
from ssl_platform.objectives._cross_entropy import cross_entropy
from ssl_platform.objectives._targets import Sinkhorn


class Config(ObjectiveConfig):
    name: str = "tests.probes.discovr"

    def build(self, context: BuildContext) -> "ClusterDistillation":
        return ClusterDistillation(context.embed_dims["video"])


class ClusterDistillation(Objective):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.decoder, self.mask_token = nn.Linear(embed_dim, embed_dim), nn.Parameter(torch.zeros(embed_dim))
        self.prototypes, self.sinkhorn = nn.Parameter(torch.randn(6, embed_dim)), Sinkhorn(10)
        self.video = Forward("video", "clip", "tube", "drop")
        self.image = Forward("image_teacher", "frames")

    def requests(self, step):
        return [self.video, self.image]

    def loss(self, outputs, batch, step):
        features = outputs.features[self.video]
        visible = features.visible[..., None].expand_as(features.patches)  # (1, M, B, N_visible, D)
        num_tokens = batch.groups["clip"].masks["tube"].shape[-1]
        everywhere = self.mask_token.expand(*visible.shape[:3], num_tokens, -1)
        tokens = self.decoder(everywhere.scatter(3, visible, features.patches))  # raster order (t h w)
        frames = outputs.features[self.image].patches[::2]  # a frame of each tubelet: (T / 2, B, h w, D)
        teacher = frames.transpose(0, 1).flatten(1, 2)  # (B, t h w, D), the clip's raster order
        teacher = F.normalize((teacher - teacher.mean(1, keepdim=True)) / (teacher.std(1, keepdim=True) + 1e-6), dim=-1)
        prototypes = F.normalize(self.prototypes, dim=-1)
        with torch.no_grad():
            scores = (teacher @ prototypes.T).flatten(0, 1)
            hard = F.one_hot(self.sinkhorn(scores, 0.05).argmax(-1), len(prototypes)).float()
        logits = (F.normalize(tokens[0], dim=-1) @ prototypes.T).flatten(1, 2)  # (M, B N, K)
        return Loss({"cluster": torch.stack([cross_entropy(rows, hard, 0.1).mean() for rows in logits]).mean()})
