"""Distillation: a student learns the features of one or several frozen networks, without labels (docs/distill.md).

    networks: {student: {backbone: ...}, large: {backbone: ..., init: {path: runs/large}, update: frozen}}
    objectives: {distill: {name: distill, teachers: [large]}}

Several students are several objectives that name the same teachers: each teacher still runs once.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from zlib import crc32

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from ssl_platform import config as configuration
from ssl_platform.config import ConfigError
from ssl_platform.modalities import GroupSpec
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.objectives._standardization import Standardization, Standardize
from ssl_platform.views import Batch

Distance = Literal["cosine", "cosine_smooth_l1", "smooth_l1", "mse"]
KINDS = ("cls", "patches")


class TeacherConfig(configuration.Config):
    """One frozen network and what the student learns from it."""

    cls_weight: float = Field(1.0, ge=0)
    """Factor of the class token's term; 0 leaves it out."""
    patch_weight: float = Field(1.0, ge=0)
    """Factor of the patch tokens' term; 0 leaves it out."""
    group: str | None = None
    """The views that it sees, of the same crops as the student's; None = the student's own."""


def _by_name(value: Any) -> Any:
    """`large` and `[large, other]` are short for maps."""
    if isinstance(value, str):
        value = [value]
    return {str(name): {} for name in value} if isinstance(value, list) else value


class Config(ObjectiveConfig):
    name: str = "distill"
    teachers: Annotated[dict[str, TeacherConfig], BeforeValidator(_by_name)]
    """Frozen networks: one name, a list, or a map with weights, {large: {cls_weight: 1.0, patch_weight: 0.25}}."""
    student: str = "student"
    group: str = "global"
    """The views that the student sees."""
    masks: str | None = None
    """Hides tokens from the student, never from a teacher; with DINO's or iBOT's masks their forward pass is shared."""
    places: Literal["all", "visible", "hidden"] = "all"
    """With masks: which patch tokens are compared. all: as GPFM; hidden: only those the student must guess."""
    cls_distance: Distance = "cosine"
    patch_distance: Distance = "cosine_smooth_l1"
    """cosine: 1 - cosine; cosine_smooth_l1: .9 of it and .1 smooth L1 (AM-RADIO, arXiv 2312.06709); mse: mean square."""
    standardize: Standardize = "channel"
    """What teachers' features are divided by, after their running mean is taken away: a std for each channel, or one."""
    adaptor: Literal["linear", "mlp"] = "mlp"
    """From the student's width to each teacher's, for class and patch tokens each; trained, and no part of an export."""
    adaptor_dim: int | None = Field(None, ge=1)
    """Hidden width of the mlp; None = the teacher's width."""

    def problems(self, networks: Mapping[str, Any], groups: Mapping[str, GroupSpec]) -> list[str]:
        lines = []
        if (update := networks[self.student].update) != "grad":
            lines.append(f"student: '{self.student}' is not trained (update: {update})")
        if not self.teachers:
            lines.append("teachers: empty; name at least one frozen network")
        if self.places != "all" and self.masks is None:
            lines.append(f"places: {self.places} needs masks")
        for name, teacher in self.teachers.items():
            lines += [f"teachers.{name}: {problem}" for problem in self._problems_of(name, teacher, networks, groups)]
        return lines

    def _problems_of(
        self, name: str, teacher: TeacherConfig, networks: Mapping[str, Any], groups: Mapping[str, GroupSpec]
    ) -> list[str]:
        if networks[name].update != "frozen":
            return [
                f"has update: {networks[name].update}, but a teacher must stay as it is; set networks.{name}.update: frozen"
            ]
        lines = []
        if teacher.cls_weight == teacher.patch_weight == 0:
            lines.append("both weights are 0; leave the teacher out, or give one of them a value")
        seen = teacher.group or self.group
        if seen not in groups:
            return [*lines, f"group '{seen}' is no group of views; there are {', '.join(groups)}"]
        if groups[seen].num_views != groups[self.group].num_views:
            lines.append(
                f"'{seen}' has {groups[seen].num_views} views, but the student's '{self.group}' has "
                f"{groups[self.group].num_views}; they must show the same crops"
            )
        if networks[name].inputs not in groups:
            return lines  # which is told of the network
        made, shown = groups[networks[name].inputs].shape, groups[seen].shape
        if len(made) != len(shown) or made[0] != shown[0]:
            lines.append(f"is made for views of shape {made} (networks.{name}.inputs), but '{seen}' has {shown}")
        return lines

    def taught_by(self) -> dict[str, str]:
        return {f"teachers.{name}": name for name in self.teachers}

    def build(self, context: BuildContext) -> "Distill":
        weights = {
            (name, kind): weight
            for name, teacher in self.teachers.items()
            for kind, weight in zip(KINDS, (teacher.cls_weight, teacher.patch_weight), strict=True)
            if weight
        }
        dims = {"cls": context.embed_dims, "patches": context.patch_dims}
        adaptors: dict[str, nn.Module] = {}
        standardizations: dict[str, nn.Module] = {}
        for name, kind in weights:
            width, wanted = dims[kind][self.student], dims[kind][name]
            with torch.random.fork_rng(devices=[]):  # so that another student or teacher changes nothing here
                torch.manual_seed(context.seed + crc32(f"{self.student} {name} {kind}".encode()))
                hidden = None if self.adaptor == "linear" else self.adaptor_dim or wanted
                adaptors[f"{name}_{kind}"] = _adaptor(width, hidden, wanted)
            standardizations[f"{name}_{kind}"] = Standardization(wanted, self.standardize)
        return Distill(
            student=Forward(self.student, self.group, self.masks),
            teachers={name: Forward(name, teacher.group or self.group) for name, teacher in self.teachers.items()},
            weights=weights,
            adaptors=adaptors,
            standardizations=standardizations,
            distances={"cls": self.cls_distance, "patches": self.patch_distance},
            places=self.places,
        )


class Distill(Objective):
    """For each teacher and kind of token: weight * mean over views, samples and places of the distance of

    adaptor(student's token)   and   (teacher's token - mean) / std, its map interpolated to the student's grid
    """

    def __init__(
        self,
        *,
        student: Forward,
        teachers: Mapping[str, Forward],
        weights: Mapping[tuple[str, str], float],
        adaptors: dict[str, nn.Module],
        standardizations: dict[str, nn.Module],
        distances: Mapping[str, Distance],
        places: Literal["all", "visible", "hidden"],
    ) -> None:
        """`weights` by (teacher, kind of token); `adaptors` and `standardizations` by "<teacher>_<kind>"."""
        super().__init__()
        self.student, self.teachers, self.weights, self.distances = student, teachers, weights, distances
        self.places = places
        self.adaptors = Adaptors(adaptors)
        self.standardizations = nn.ModuleDict(standardizations)

    def requests(self, step: int) -> Sequence[Forward]:
        return [self.student, *self.teachers.values()]

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        ours = outputs.features[self.student]
        terms: dict[str, Tensor] = {}
        pending: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for (name, kind), weight in self.weights.items():
            key, request = f"{name}_{kind}", self.teachers[name]
            self._same_crops(request, batch)
            theirs = outputs.features[request]
            found = (theirs.cls if kind == "cls" else theirs.patches).detach()  # (V, B, [N,] D)
            sums = self.standardizations[key].pending(found)  # type: ignore[operator]
            pending |= {f"{key}.{item}": value for item, value in sums.items()}
            target = self.standardizations[key](found, sums)
            if kind == "patches":
                self._has_places(ours.patches, self.student.network)
                self._has_places(found, name)
                target = to_grid(target, theirs.grid, ours.grid, ours.patches.shape[-2])
            if self.student.masks is not None:
                target = target[:, None]  # one teacher's view for all masked versions of it
            predicted = self.adaptors(key, ours.cls if kind == "cls" else ours.patches)
            distance, cosine = distances(predicted, target, self.distances[kind])  # (V, [M,] B[, N])
            terms[key] = weight * (self._over_places(distance, batch) if kind == "patches" else distance.mean())
            metrics[f"{key}_cosine"] = cosine.mean()
        return Loss(terms, pending, metrics)

    def commit(self, step: int, pending: Sequence[dict[str, Tensor]]) -> None:
        for key, standardization in self.standardizations.items():
            mine = [
                {name.rpartition(".")[2]: value for name, value in item.items() if name.rpartition(".")[0] == key}
                for item in pending
            ]
            standardization.commit(mine)  # type: ignore[operator]

    def _over_places(self, each: Tensor, batch: Batch) -> Tensor:
        """(V, [M,] B, N) -> the mean over the places that count, of each view by itself, then over views."""
        if self.places == "all":
            return each.mean()
        hidden = batch.groups[self.student.group].masks[self.student.masks]  # type: ignore[index]
        used = hidden if self.places == "hidden" else ~hidden
        return ((each * used).sum(-1) / used.sum(-1).clamp_min(1)).mean()

    def _same_crops(self, request: Forward, batch: Batch) -> None:
        theirs, ours = batch.groups[request.group], batch.groups[self.student.group]
        if theirs.source.tolist() != ours.source.tolist():
            raise ConfigError(
                [f"distill: the views of '{request.group}' (teacher {request.network}) show other crops than those of "
                 f"'{self.student.group}' (student); a teacher's group must show the same ones"]
            )  # fmt: skip

    def _has_places(self, patches: Tensor, network: str) -> None:
        if patches.shape[-2] == 0:
            raise ConfigError(
                [f"distill: the backbone of '{network}' gives no patch tokens; set patch_weight: 0 for its teachers"]
            )


class Adaptors(nn.Module):
    """The layers from the student's width to the teachers', by name: one module, so that it runs in mixed precision."""

    def __init__(self, adaptors: dict[str, nn.Module]) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict(adaptors)

    def forward(self, name: str, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., width of the teacher)"""
        adapted: Tensor = self.by_name[name](tokens)
        return adapted


def _adaptor(width: int, hidden: int | None, wanted: int) -> nn.Module:
    """One linear layer, or two with layer norm and GELU between, as AM-RADIO's."""
    if hidden is None:
        return nn.Linear(width, wanted)
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(width, hidden), norm=nn.LayerNorm(hidden), act=nn.GELU(), fc2=nn.Linear(hidden, wanted)
        )
    )


def distances(ours: Tensor, theirs: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """(..., D) twice, the second without gradient -> (distance, cosine), each (...), in float32."""
    ours, theirs = ours.float(), theirs.float()
    cosine = F.cosine_similarity(ours, theirs, dim=-1)
    if distance == "cosine":
        return 1 - cosine, cosine.detach()
    theirs = theirs.expand_as(ours)
    if distance == "mse":
        return (ours - theirs).square().mean(-1), cosine.detach()
    smooth = F.smooth_l1_loss(ours, theirs, reduction="none").mean(-1)  # with beta 1
    return smooth if distance == "smooth_l1" else 0.9 * (1 - cosine) + 0.1 * smooth, cosine.detach()


def to_grid(patches: Tensor, grid: tuple[int, ...] | None, wanted: tuple[int, ...] | None, num_places: int) -> Tensor:
    """(..., N, D) on `grid` -> (..., num_places, D) on `wanted`: linear between places, antialiased where 2-D maps shrink.

    Unchanged where the grids are the same, or where one is not known and the numbers are.
    """
    if grid == wanted or ((grid is None or wanted is None) and patches.shape[-2] == num_places):
        return patches
    if grid is None or wanted is None or len(grid) != len(wanted):
        raise ConfigError(
            [f"distill: the teacher's {patches.shape[-2]} patch tokens cannot be laid on the student's {num_places}: "
             + ("grids of other numbers of axes" if grid and wanted else "one of them lies on no grid")
             + "; set patch_weight: 0"]
        )  # fmt: skip
    maps = patches.flatten(0, -3).mT.reshape(-1, patches.shape[-1], *grid)  # (rows, D, *grid)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(grid)]
    maps = F.interpolate(maps, size=wanted, mode=mode, antialias=len(grid) == 2)
    resized: Tensor = maps.flatten(2).mT.reshape(*patches.shape[:-2], num_places, -1)
    return resized
