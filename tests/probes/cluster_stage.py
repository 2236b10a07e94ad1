"""The prepare step of the DLG-LC probe: embed every sample, cluster, hand out the cluster of each sample."""

import torch
from sklearn.cluster import KMeans

from ssl_platform.backbones import Input
from ssl_platform.config import PluginConfig
from ssl_platform.data.shards import preprocessed


class Config(PluginConfig):
    name: str = "tests.probes.cluster_stage"
    clusters: int = 3

    def build(self):
        return self.prepare

    def prepare(self, context):
        teacher = context.student_teacher.networks["teacher"]
        parts = [
            teacher([Input(views[None])])[0].cls[0]
            for views, _ in preprocessed(context.index, context.modality, batch_size=8, workers=0)
        ]
        labels = KMeans(self.clusters, n_init=1, random_state=context.seed).fit_predict(torch.cat(parts).numpy())
        return {"clusters": torch.from_numpy(labels).long()}
