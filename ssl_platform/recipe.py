"""A run's whole configuration: every key that a YAML file may hold, what is checked across sections, what is built."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import nn

from ssl_platform.batch_norm import has_batch_norm
from ssl_platform.config import Config, ConfigError, PluginConfig, load_config, plugin
from ssl_platform.data.index import Index
from ssl_platform.data.mixture import build_order, check_room, open_shards
from ssl_platform.data.order import Order
from ssl_platform.data.shards import DataConfig
from ssl_platform.modalities import Modality
from ssl_platform.objectives import BuildContext
from ssl_platform.optim import OptimConfig, ScheduleConfig, build_schedule, within
from ssl_platform.recipe_checks import check_follower, check_names, check_sizes, check_statistics
from ssl_platform.sharding import ParallelConfig
from ssl_platform.student_teacher import Role, StudentTeacher


class InitConfig(Config):
    """Other weights that a network starts from. Strict: keys that do not fit are an error unless they are named here."""

    path: Path | None = None
    """A run, checkpoint or export folder of ours, or a file in DINOv2's, DINOv3's or timm's format (.safetensors, .pth)."""
    timm: str | None = Field(None, min_length=1)
    """Instead of `path`: a name of timm.list_pretrained(), whose weights are downloaded."""
    network: str | None = None
    """Which network of a run, checkpoint or training file; None = the teacher, or the only one that there is."""
    heads: bool = False
    """Whether the heads of this network start from the source's too, which then needs heads of the same names and sizes: a
    run or checkpoint of ours, or a training file of DINOv2. Otherwise they start fresh."""
    grid: tuple[int, ...] | None = None
    """Places of the file's position embedding, such as [14, 28]; None = a square, or what the source says itself."""
    mean: list[float] | None = None
    """The mean of each channel that the weights learned with, if it is not that of this run's views; with `std`."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """The first layer is changed so that the network sees this run's views as it saw its own. None = what runs and exports
    of ours and timm's names say themselves, and for files this run's."""
    allow_missing: list[str] = []
    """Patterns of the network's keys that may stay fresh, such as reg_token or blocks.*.ls?.gamma."""
    allow_unused: list[str] = []
    """Patterns of the file's keys that may be passed over."""
    freeze_steps: int = Field(0, ge=0)
    """The network's lr is 0 for this many first steps, while fresh heads warm up; Adam moments still build up."""

    @model_validator(mode="after")
    def _one_source(self) -> "InitConfig":
        if (self.path is None) == (self.timm is None):
            raise ValueError("needs one of path: FILE OR FOLDER and timm: NAME")
        if len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std: give both, a number for each channel, or neither")
        return self


class NetworkConfig(Config):
    """One network of the run and how it gets its weights."""

    backbone: plugin("ssl_platform.backbones") | None = None  # type: ignore[valid-type]
    """Its architecture; None = the same as the network in `of`, which it then starts as an exact copy of."""
    update: Literal["grad", "ema", "snapshot", "frozen"] = "grad"
    """Trained; a moving average of `of`; a copy of `of` taken now and then; or left as it is."""
    of: str | None = None
    init: InitConfig | None = None
    """Other weights to start from; networks that follow this one start as its copies all the same."""
    inputs: str = "global"
    """The group of views whose shape its patch embedding is made for."""
    momentum: Annotated[ScheduleConfig, within(0, 1)] = 0.996
    """Of ema."""
    first_step: int = Field(0, ge=0)
    """Of snapshot."""
    every: int = Field(1, ge=1)
    """Of snapshot."""
    max_updates: int | None = Field(None, ge=1)
    """Of snapshot: so many are taken at most; None = as long as the run lasts."""
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
    """Micro-batches per optimiser step. Centers see the whole batch; Sinkhorn, KoLeo and batch norm see micro-batches."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast, with fsdp networks and heads in bf16: weights, optimiser, averages, losses stay in float32."""
    parallel: ParallelConfig = ParallelConfig()
    recompute: bool = False
    """Blocks of trained networks keep their input only and run again in the backward pass: less memory, a third slower."""
    compile: bool = False
    """torch.compile of blocks: the first steps take minutes, later ones are faster."""
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
    max_failed_saves: int = Field(3, ge=0)
    """A run whose checkpoint cannot be written, such as on a full disk, goes on; more than this many in a row stop it."""
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    """Weights & Biases as well; it needs the package wandb."""
    collective_timeout_minutes: float = Field(10.0, gt=0)
    """How long a rank waits for the others before the run ends; longer than the slowest save or wait for data."""

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


# -- building ----------------------------------------------------------------------------------------------------------


def open_index(recipe: Recipe) -> Index:
    """The training shards."""
    return open_shards(recipe.data.shards, recipe.data.sources, recipe.data.remote())


def open_order(recipe: Recipe, index: Index) -> Order:
    """The order in which the run sees the samples; raises ConfigError if the cache is too small to read in it."""
    order = build_order(index, recipe.data.sources, recipe.seed, recipe.data.window_shards)
    check_room(index, order, recipe.data.window_shards)
    return order


def build_modality(recipe: Recipe, statistics: dict[str, Any] | None) -> Modality:
    """The kind of data, with the channel statistics that it normalises by."""
    if statistics is None and (key := getattr(recipe.modality, "needs_statistics", "")):
        raise ConfigError(
            [f"modality.{key}: needs the statistics of the shards, which are not known: ssl-pack measures them, if all "
             "samples have as many channels, and tars made elsewhere have none; pack them, or leave it out"]
        )  # fmt: skip
    try:
        modality: Modality = recipe.modality.build(statistics)
    except ValueError as error:
        raise ConfigError([f"modality: {error}"]) from error
    if hasattr(modality, "prepare"):
        try:
            modality.prepare()
        except ValueError as error:
            raise ConfigError([f"modality.{error}"]) from error
    return modality


class Fill(Protocol):
    """Gives networks that have a backbone of their own, and then heads, other weights than random ones, in place."""

    def networks(self, networks: dict[str, nn.Module]) -> None: ...

    def heads(self, heads: dict[str, nn.Module]) -> None: ...


def build_networks(
    configs: dict[str, NetworkConfig], seed: int, modality: Modality, fill: Fill | None = None
) -> dict[str, nn.Module]:
    """The networks as they are before the first step; random where `fill` does not bring what their `init` names."""
    torch.manual_seed(seed)
    networks: dict[str, nn.Module] = {}
    for name, network in configs.items():
        try:
            if network.backbone is not None:
                networks[name] = network.backbone.build(modality, network.inputs)
        except ValueError as error:
            raise ConfigError([f"networks.{name}.backbone: {error}"]) from error
    if fill is not None:
        fill.networks(networks)
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


def build_student_teacher(
    recipe: Recipe, modality: Modality, num_samples: int, device: torch.device, fill: Fill | None = None
) -> StudentTeacher:
    """Networks, heads and objectives on `device`; averaged copies start equal to what they follow."""
    networks = build_networks(recipe.networks, recipe.seed, modality, fill)
    embed_dims: dict[str, int] = {name: network.embed_dim for name, network in networks.items()}  # type: ignore[misc]
    trained = {name: head.build(embed_dims[head.network]) for name, head in recipe.heads.items()}
    if fill is not None:
        fill.heads(trained)
    heads = {name: _copies(recipe, head, trained[name]) for name, head in recipe.heads.items()}
    patch_dims = {name: int(getattr(network, "patch_dim", embed_dims[name])) for name, network in networks.items()}
    context = BuildContext(modality, embed_dims, recipe.heads, recipe.steps, recipe.seed, num_samples, patch_dims)
    built = StudentTeacher(
        networks,
        {name: _role(network, recipe.steps) for name, network in recipe.networks.items()},
        heads,
        {name: objective.build(context) for name, objective in recipe.objectives.items()},
        {name: build_schedule(objective.weight, recipe.steps) for name, objective in recipe.objectives.items()},
    )
    if recipe.precision == "bf16":
        built.mix_precision(device.type, torch.bfloat16, in_shards=recipe.parallel.method == "fsdp")
    return built.to(device)


def _copies(recipe: Recipe, head: PluginConfig, trained: nn.Module) -> dict[str, nn.Module]:
    """{network: head}: the trained head of a network and its copies for those that follow it."""
    network: str = head.network  # type: ignore[attr-defined]
    followers = [name for name, other in recipe.networks.items() if other.of == network and other.update == "ema"]
    for name in followers if has_batch_norm(trained) else ():
        check_statistics(name, recipe.networks[name], "its head has batch norm, whose running statistics it")
    return {network: trained} | {name: copy.deepcopy(trained) for name in followers}


def _role(network: NetworkConfig, steps: int) -> Role:
    return Role(
        update=network.update,
        of=network.of,
        momentum=build_schedule(network.momentum, steps),
        first_step=network.first_step,
        every=network.every,
        max_updates=network.max_updates,
        mode=network.mode,
        buffers=network.buffers,
        freeze_steps=network.init.freeze_steps if network.init else 0,
    )
