"""A run's whole configuration: every key that a YAML file may hold, what is checked across sections, what is built."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import nn

from ssl_platform.config import Config, ConfigError, PluginConfig, load_config, plugin
from ssl_platform.data.shards import DataConfig
from ssl_platform.modalities import Modality
from ssl_platform.objectives import BuildContext
from ssl_platform.optim import OptimConfig, ScheduleConfig, build_schedule
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
    momentum: ScheduleConfig = 0.996
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


class Recipe(Config):
    """A run. Steps are optimiser steps; sizes of batches count samples of the whole run, over all ranks."""

    run_dir: Path
    """Where checkpoints, metrics and logs go; an unfinished run found there is resumed."""
    steps: int = Field(ge=1)
    save_every: int = Field(1000, ge=1)
    log_every: int = Field(10, ge=1)
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
    groups = recipe.modality.build(None).groups
    for name, masks in recipe.masks.items():
        if masks.group not in groups:
            lines.append(f"masks.{name}.group: '{masks.group}' is no group of views; there are {', '.join(groups)}")
        else:
            lines += [f"masks.{name}.{problem}" for problem in masks.problems(groups[masks.group].grid)]
    return lines


def check_names(recipe: Recipe) -> list[str]:
    """References to networks, heads, groups, masks and objectives that do not exist, one line each."""
    lines = []
    for name, network in recipe.networks.items():
        where = f"networks.{name}"
        if network.update in ("ema", "snapshot") and network.of is None:
            lines.append(f"{where}.of: missing; update: {network.update} needs the network it follows")
        if network.of is not None and network.of not in recipe.networks:
            lines.append(f"{where}.of: '{network.of}' is no network; there are {', '.join(recipe.networks)}")
        if network.of is None and network.backbone is None and network.update in ("grad", "frozen"):
            lines.append(f"{where}.backbone: missing")
    if not any(network.update == "grad" for network in recipe.networks.values()):
        lines.append("networks: none has update: grad, so nothing would be trained")
    for name, head in recipe.heads.items():
        if head.network not in recipe.networks:
            lines.append(f"heads.{name}.network: '{head.network}' is no network")
    for name, stage in recipe.stages.items():
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
    return lines


# -- building ----------------------------------------------------------------------------------------------------------


def build_networks(configs: dict[str, NetworkConfig], seed: int, modality: Modality) -> dict[str, nn.Module]:
    """The networks as they are before the first step; the same for the same configuration and seed."""
    torch.manual_seed(seed)
    networks: dict[str, nn.Module] = {
        name: network.backbone.build(modality, network.inputs)
        for name, network in configs.items()
        if network.backbone is not None
    }
    waiting = [name for name in configs if name not in networks]
    while waiting:
        ready = [name for name in waiting if configs[name].of in networks]
        if not ready:
            raise ConfigError([f"networks: {', '.join(waiting)} follow each other, and none has a backbone"])
        for name in ready:
            networks[name] = copy.deepcopy(networks[configs[name].of])  # type: ignore[index]
            waiting.remove(name)
    return {name: networks[name] for name in configs}


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
