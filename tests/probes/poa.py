"""POA: a third branch, a sub-network of the student that is drawn anew at each step, distilled from teacher and student."""

import random

import torch
from torch import Tensor, nn

from ssl_platform.backbones import Features, Input
from ssl_platform.config import PluginConfig
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig
from ssl_platform.objectives._cross_entropy import cross_entropy
from ssl_platform.objectives._targets import Centering


class BackboneConfig(PluginConfig):
    name: str = "tests.probes.elastic"
    width: int = 16

    def build(self, modality, group="global") -> "ElasticMlp":
        return ElasticMlp(modality.patch_embed(self.width, group), self.width)


class ElasticMlp(nn.Module):
    """Patches -> two residual layers; `arch` = (width, depth) uses the first channels and layers of the same weights."""

    def __init__(self, patch_embed: nn.Module, width: int) -> None:
        super().__init__()
        self.patch_embed, self.embed_dim, self.num_layers = patch_embed, width, 2
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def layer_of(self, parameter: str) -> int:
        return int(parameter.split(".")[1]) + 1 if parameter.startswith("layers") else 0

    def forward(self, inputs: list[Input]) -> list[Features]:
        return [self._run(item) for item in inputs]

    def _run(self, item: Input) -> Features:
        width, depth = item.arch or (self.embed_dim, 2)
        tokens = self.patch_embed(item.views.flatten(0, 1)).content[..., :width]
        for block in self.layers[:depth]:
            scale = self.embed_dim / width
            tokens = tokens + torch.tanh(tokens @ block.weight[:width, :width].T * scale + block.bias[:width])
        full = torch.nn.functional.pad(tokens, (0, self.embed_dim - width))
        patches = full.unflatten(0, item.views.shape[:2])  # (V, B, N, D)
        return Features(patches.mean(2), patches)


class Config(ObjectiveConfig):
    name: str = "tests.probes.poa"
    heads: tuple[str, ...] = ("small", "large")

    def build(self, context: BuildContext) -> "Poa":
        return Poa({name: context.heads[name].num_prototypes for name in self.heads}, context.seed)


class Poa(Objective):
    def __init__(self, prototypes: dict[str, int], seed: int) -> None:
        super().__init__()
        self.centers = nn.ModuleDict({name: Centering(size) for name, size in prototypes.items()})
        self.seed = seed

    def arch(self, step: int) -> tuple[int, int]:
        return random.Random(f"{self.seed} {step}").choice([(8, 1), (8, 2), (16, 1)])

    def requests(self, step):
        elastic = Forward("student", "global", arch=self.arch(step))
        return [Forward("teacher", "global"), Forward("student", "global"), elastic]

    def loss(self, outputs, batch, step):
        cls = [outputs.features[request].cls for request in self.requests(step)]  # each (2, B, D)
        totals: dict[str, list[Tensor]] = {"intact": [], "elastic": [], "same_view": []}
        pending = {}
        for name, center in self.centers.items():
            teacher = outputs.heads[name]["teacher"](cls[0]).detach()
            target = center(teacher.flatten(0, 1), 0.04).view_as(teacher).flip(0)  # the other crop's
            intact, elastic = (outputs.heads[name]["student"](x) for x in cls[1:])
            totals["intact"].append(0.8 * cross_entropy(intact.flatten(0, 1), target.flatten(0, 1), 0.1).mean())
            totals["elastic"].append(0.2 * cross_entropy(elastic.flatten(0, 1), target.flatten(0, 1), 0.1).mean())
            own = (intact.detach() / 0.1).softmax(-1).flatten(0, 1)
            totals["same_view"].append(0.2 * cross_entropy(elastic.flatten(0, 1), own, 0.1).mean())
            pending |= {f"{name}/{key}": value for key, value in center.pending(teacher.flatten(0, 1)).items()}
        return Loss({name: torch.stack(values).mean() for name, values in totals.items()}, pending)

    def commit(self, step, pending):
        for name, center in self.centers.items():
            center.commit(
                [{k.removeprefix(f"{name}/"): v for k, v in item.items() if k.startswith(name)} for item in pending]
            )
