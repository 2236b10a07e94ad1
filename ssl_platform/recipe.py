"""A run's whole configuration: every key that a YAML file may hold, what is checked across sections, what is built."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import nn

from ssl_platform.config import Config, ConfigError, PluginConfig, load_config, plugin
from ssl_platform.data.index import Index
from ssl_platform.data.mixture import build_order, open_shards
from ssl_platform.data.order import Order
from ssl_platform.data.shards import DataConfig
from ssl_platform.modalities import Modality
from ssl_platform.objectives import BuildContext
from ssl_platform.optim import Cosine, OptimConfig, ScheduleConfig, build_schedule, within
from ssl_platform.student_teacher import Role, StudentTeacher


class NetworkConfig(Config):
    """One network of the run and how it gets its weights."""

    backbone: plugin("ssl_platform.backbones") | None = None  # type: ignore[valid-type]
    """Its architecture; None = the same as the network in `of`, which it then starts as an exact copy of."""
    update: Literal["grad", "ema", "snapshot", "frozen"] = "grad"
    """Trained; a moving average of `of`; a copy of `of` taken now and then; or left as it is."""
    of: str | None = None
    inputs: str = "global"
    """The group of views whose shape its patch embedding is made for."""
    momentum: Annotated[ScheduleConfig, within(0, 1)] = 0.996
    """Of ema."""
    first_step: int = Field(0, ge=0)
    """Of snapshot."""
    every: int = Field(1, ge=1)
    """Of snapshot."""
    mode: Literal["eval", "train"] = "eval"
    """Of networks that are not trained: how drop path and batch norm behave."""
    buffers: Literal["own", "copy"] = "own"
    """Whether ema and snapshot copy running statistics too."""


class StageConfig(Config):
    """One phase of a run."""

    steps: int = Field(ge=1)
    repeat: int = Field(1, ge=1)
    objectives: list[str] | None = None
    """Those that are active; None = all."""
    prepare: plugin("ssl_platform.stages") | None = None  # type: ignore[valid-type]
    """What is done before each repetition."""
    init: dict[str, str] = {}
    """{network: network}: the first starts the stage as a copy of the second."""


class WandbConfig(Config):
    """Where on Weights & Biases the metrics go. The configuration goes too, without paths; keys of samples do not."""

    project: str = Field(min_length=1)
    mode: Literal["online", "offline"] = "online"
    """offline keeps everything in run_dir/wandb, for `wandb sync`."""
    entity: str | None = None
    """Team or user; None = the account's default."""
    name: str | None = None
    """Of the run; None = one that wandb makes up."""


class Recipe(Config):
    """A run. Steps are optimiser steps; sizes of batches count samples of the whole run, over all ranks."""

    run_dir: Path
    """Where checkpoints, metrics and logs go; an unfinished run found there is resumed."""
    steps: int = Field(ge=1)
    save_every: int = Field(1000, ge=1)
    log_every: int = Field(10, ge=1)
    monitor_every: int | None = Field(None, ge=0)
    """Steps between signals of collapse, a multiple of log_every; None = 10 x log_every, 0 = never."""
    seed: int = Field(0, ge=0)
    batch_size: int = Field(ge=1)
    """Samples per optimiser step, over all ranks and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimiser step. Centers see the whole batch; Sinkhorn and KoLeo see micro-batches."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast: weights, optimiser, averages and losses stay in float32."""
    modality: plugin("ssl_platform.modalities")  # type: ignore[valid-type]
    data: DataConfig
    networks: dict[str, NetworkConfig]
    heads: dict[str, plugin("ssl_platform.heads")] = {}  # type: ignore[valid-type]
    masks: dict[str, plugin("ssl_platform.masks")] = {}  # type: ignore[valid-type]
    objectives: dict[str, plugin("ssl_platform.objectives")]  # type: ignore[valid-type]
    optim: OptimConfig = OptimConfig()
    stages: dict[str, StageConfig] = {}
    """Phases in order; empty = one phase of all steps with all objectives."""
    keep_last: int = Field(3, ge=1)
    """Checkpoints that are kept; `keep_every` keeps those at its multiples as well."""
    keep_every: int | None = Field(None, ge=1)
    max_skipped_steps: int = Field(20, ge=0)
    """The run stops when more steps than this had losses or gradients that are not finite."""
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    """Weights & Biases as well; it needs the package wandb."""

    @property
    def signal_interval(self) -> int:
        """Steps between signals of collapse; 0 = never."""
        return 10 * self.log_every if self.monitor_every is None else self.monitor_every

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "Recipe":
        lines = check_sizes(self, (info.context or {}).get("world_size", 1)) + check_names(self)
        if lines:
            raise ValueError(ConfigError(lines))
        return self


def load_recipe(path: Path, overrides: Sequence[str] = (), world_size: int = 1) -> Recipe:
    """Reads and checks a configuration; raises ConfigError with all that is wrong."""
    return load_config(Recipe, path, overrides, world_size=world_size)


# -- checks across sections --------------------------------------------------------------------------------------------


def check_sizes(recipe: Recipe, world_size: int) -> list[str]:
    """Numbers that cannot work together, one line each."""
    lines = []
    if recipe.batch_size < world_size:
        lines.append(f"batch_size: {recipe.batch_size} is smaller than the number of ranks, {world_size}")
    elif recipe.batch_size % (world_size * recipe.accumulate):
        lines.append(
            f"batch_size: {recipe.batch_size} cannot be split over {world_size} ranks x accumulate {recipe.accumulate}; "
            f"use a multiple of {world_size * recipe.accumulate}"
        )
    total = sum(stage.steps * stage.repeat for stage in recipe.stages.values())
    if recipe.stages and total != recipe.steps:
        lines.append(f"steps: {recipe.steps}, but the stages add up to {total} (steps x repeat)")
    if (interval := recipe.signal_interval) % recipe.log_every:
        below = interval // recipe.log_every * recipe.log_every
        near = " or ".join(str(number) for number in (below, below + recipe.log_every) if number)
        lines.append(f"monitor_every: {interval} is not a multiple of log_every {recipe.log_every}; use {near}")
    groups = recipe.modality.build(None).groups
    for name, masks in recipe.masks.items():
        if masks.group not in groups:
            lines.append(f"masks.{name}.group: '{masks.group}' is no group of views; there are {', '.join(groups)}")
        else:
            lines += [f"masks.{name}.{problem}" for problem in masks.problems(groups[masks.group].grid)]
    return lines


def doubtful(recipe: Recipe) -> list[str]:
    """Settings that work but hardly do what was meant, one line each."""
    sections: dict[str, Config] = {"optim": recipe.optim}
    sections |= {f"networks.{name}": network for name, network in recipe.networks.items()}
    sections |= {f"objectives.{name}": objective for name, objective in recipe.objectives.items()}
    return [
        f"{key}.{name}.warmup_steps: {value.warmup_steps}, so the run of {recipe.steps} steps ends inside its warm-up"
        for key, section in sections.items()
        for name, value in section
        if isinstance(value, Cosine) and value.warmup_steps >= recipe.steps
    ]


def check_names(recipe: Recipe) -> list[str]:
    """References to networks, heads, groups, masks and objectives that do not exist, one line each."""
    lines = []
    for name, network in recipe.networks.items():
        where = f"networks.{name}"
        if network.update in ("ema", "snapshot") and network.of is None:
            lines.append(f"{where}.of: missing; update: {network.update} needs the network it follows")
        if network.of is not None and network.of not in recipe.networks:
            lines.append(f"{where}.of: '{network.of}' is no network; there are {', '.join(recipe.networks)}")
        if network.inputs not in (groups := recipe.modality.build(None).groups):
            lines.append(f"{where}.inputs: '{network.inputs}' is no group of views; there are {', '.join(groups)}")
        if network.of is None and network.backbone is None and network.update in ("grad", "frozen"):
            lines.append(f"{where}.backbone: missing")
    if not any(network.update == "grad" for network in recipe.networks.values()):
        lines.append("networks: none has update: grad, so nothing would be trained")
    for name, head in recipe.heads.items():
        if head.network not in recipe.networks:
            lines.append(f"heads.{name}.network: '{head.network}' is no network")
    for name, stage in recipe.stages.items():
        if stage.objectives == []:
            lines.append(f"stages.{name}.objectives: empty, so nothing would be trained; leave the key out for all")
        for objective in stage.objectives or ():
            if objective not in recipe.objectives:
                lines.append(f"stages.{name}.objectives: '{objective}' is no objective")
        for used in [*stage.init, *stage.init.values()]:
            if used not in recipe.networks:
                lines.append(f"stages.{name}.init: '{used}' is no network")
    return lines + _check_requests(recipe)


def _check_requests(recipe: Recipe) -> list[str]:
    """Every name in an objective's section that refers to another section."""
    groups = recipe.modality.build(None).groups
    kinds: dict[str, Any] = {
        "head": recipe.heads,
        "teacher": recipe.networks,
        "student": recipe.networks,
        "group": groups,
        "teacher_group": groups,
        "student_groups": groups,
        "masks": recipe.masks,
    }
    lines = []
    for name, objective in recipe.objectives.items():
        for key, known in kinds.items():
            value = getattr(objective, key, None)
            used = (
                list(value.values()) if isinstance(value, dict) else [value] if isinstance(value, str) else value or ()
            )
            lines += [
                f"objectives.{name}.{key}: '{item}' does not exist; there are: {', '.join(known) or 'none'}"
                for item in used
                if item not in known
            ]
        if not lines:
            lines += _check_uses(recipe, name, objective)
    return lines


def _check_uses(recipe: Recipe, name: str, objective: Any) -> list[str]:
    """What an objective asks of masks and heads that are there but not such as it needs."""
    lines = []
    masks, where = getattr(objective, "masks", None), f"objectives.{name}"
    by_group = masks if isinstance(masks, dict) else {getattr(objective, "group", None): masks} if masks else {}
    for group, used in by_group.items():
        if group is not None and recipe.masks[used].group != group:
            lines.append(f"{where}.masks: '{used}' hides tokens of '{recipe.masks[used].group}', not of '{group}'")
        if getattr(objective, "mode", "token") == "drop" and not recipe.masks[used].same_count():
            lines.append(
                f"{where}.mode: drop needs masks that hide the same number of tokens in every view, which '{used}' does "
                "not; use random masks with one ratio and probability 1"
            )
    head, teacher = getattr(objective, "head", None), getattr(objective, "teacher", None)
    if isinstance(head, str) and isinstance(teacher, str):
        owner: str = recipe.heads[head].network
        network = recipe.networks[teacher]
        follows = network.update == "ema" and network.of in (owner, None)  # a missing `of` has a line of its own
        if teacher != owner and not follows:
            lines.append(
                f"{where}.teacher: '{teacher}' has no copy of the head '{head}', which only '{owner}' and the networks with "
                f"update: ema, of: {owner} have"
            )
    return lines


# -- building ----------------------------------------------------------------------------------------------------------


def open_index(recipe: Recipe) -> Index:
    """The training shards."""
    index = open_shards(recipe.data.shards, recipe.data.sources, recipe.data.remote())
    if index.remote is not None:
        try:
            index.remote.check_room(recipe.data.window_shards)
        except ValueError as error:
            raise ConfigError([f"data.{error}"]) from error
    return index


def open_order(recipe: Recipe, index: Index) -> Order:
    """The order in which the run sees the samples."""
    return build_order(index, recipe.data.sources, recipe.seed, recipe.data.window_shards)


def build_modality(recipe: Recipe, statistics: dict[str, list[float]] | None) -> Modality:
    """The kind of data, with the channel statistics that it normalises by."""
    try:
        modality: Modality = recipe.modality.build(statistics)
    except ValueError as error:
        raise ConfigError([f"modality: {error}"]) from error
    return modality


def build_networks(configs: dict[str, NetworkConfig], seed: int, modality: Modality) -> dict[str, nn.Module]:
    """The networks as they are before the first step; the same for the same configuration and seed."""
    torch.manual_seed(seed)
    networks: dict[str, nn.Module] = {}
    for name, network in configs.items():
        try:
            if network.backbone is not None:
                networks[name] = network.backbone.build(modality, network.inputs)
        except ValueError as error:
            raise ConfigError([f"networks.{name}.backbone: {error}"]) from error
    waiting = [name for name in configs if name not in networks]
    while waiting:
        ready = [name for name in waiting if configs[name].of in networks]
        if not ready:
            raise ConfigError([f"networks: {', '.join(waiting)} follow each other, and none has a backbone"])
        for name in ready:
            networks[name] = copy.deepcopy(networks[configs[name].of])  # type: ignore[index]
            waiting.remove(name)
    for name, network in configs.items():
        if network.of is not None and network.update in ("ema", "snapshot"):
            check_follower(name, network, networks[name], networks[network.of])
            networks[name].load_state_dict(networks[network.of].state_dict())
    return {name: networks[name] for name in configs}


def check_follower(name: str, config: NetworkConfig, follower: nn.Module, followed: nn.Module) -> None:
    """Raises ConfigError if a network cannot follow another one, or would quietly keep statistics of noise."""
    mine, theirs = ({key: value.shape for key, value in one.state_dict().items()} for one in (follower, followed))
    if mine != theirs:
        different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        raise ConfigError(
            [
                f"networks.{name}.backbone: update: {config.update} needs the architecture of '{config.of}', but "
                f"{', '.join(different[:3])}{' ...' if len(different) > 3 else ''} differ; leave the backbone out"
            ]
        )
    normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in follower.modules())
    if normalises and config.mode == "eval" and config.buffers == "own":
        raise ConfigError(
            [
                f"networks.{name}: '{config.of}' has batch norm, whose running statistics this network would never learn; "
                "set mode: train (it uses each batch's own, as DINO does), or buffers: copy (it takes over the student's)"
            ]
        )


def build_student_teacher(recipe: Recipe, modality: Modality, num_samples: int, device: torch.device) -> StudentTeacher:
    """Networks, heads and objectives on `device`; averaged copies start equal to what they follow."""
    networks = build_networks(recipe.networks, recipe.seed, modality)
    embed_dims: dict[str, int] = {name: network.embed_dim for name, network in networks.items()}  # type: ignore[misc]
    heads = {name: _build_head(recipe, head, embed_dims) for name, head in recipe.heads.items()}
    context = BuildContext(modality, embed_dims, recipe.heads, recipe.steps, recipe.seed, num_samples)
    built = StudentTeacher(
        networks,
        {name: _role(network, recipe.steps) for name, network in recipe.networks.items()},
        heads,
        {name: objective.build(context) for name, objective in recipe.objectives.items()},
        {name: build_schedule(objective.weight, recipe.steps) for name, objective in recipe.objectives.items()},
        autocast=(device.type, torch.bfloat16) if recipe.precision == "bf16" else None,
    )
    return built.to(device)


def _build_head(recipe: Recipe, head: PluginConfig, embed_dims: dict[str, int]) -> dict[str, nn.Module]:
    network: str = head.network  # type: ignore[attr-defined]
    trained: nn.Module = head.build(embed_dims[network])  # type: ignore[attr-defined]
    followers = [name for name, other in recipe.networks.items() if other.of == network and other.update == "ema"]
    return {network: trained} | {name: copy.deepcopy(trained) for name in followers}


def _role(network: NetworkConfig, steps: int) -> Role:
    return Role(
        update=network.update,
        of=network.of,
        momentum=build_schedule(network.momentum, steps),
        first_step=network.first_step,
        every=network.every,
        mode=network.mode,
        buffers=network.buffers,
    )
