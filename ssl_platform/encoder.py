"""A pretrained network and the preprocessing that belongs to it: all that evaluation and users need.

encoder = Encoder.load(Path("runs/skin"))
features = encoder(torch.stack([encoder.modality.preprocess(encoder.modality.decode(record))]))
features.cls, features.patches
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_platform import checkpoint
from ssl_platform.backbones import Features, Input
from ssl_platform.backbones._conversion import from_timm
from ssl_platform.backbones.timm_models import TimmBackbone
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.checkpoint import CheckpointError
from ssl_platform.config import Config, ConfigError, PluginConfig, plugin, validate
from ssl_platform.modalities import Modality
from ssl_platform.recipe import NetworkConfig, build_networks, load_recipe


class EncoderConfig(Config):
    """What makes an encoder again, without its weights: the part of a recipe that exports carry."""

    modality: plugin("ssl_platform.modalities")  # type: ignore[valid-type]
    networks: dict[str, NetworkConfig]
    network: str
    """Which of them the encoder is."""
    seed: int
    step: int
    """Finished optimiser steps."""
    statistics: dict[str, Any] | None = None
    """The channels' mean, std and percentiles in the training shards, and what they are of if not of pixels."""


class Encoder(nn.Module):
    """One network of a run in evaluation mode; `modality.preprocess` makes what it is shown."""

    def __init__(self, network: nn.Module, modality: Modality, config: EncoderConfig) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.modality = modality
        self.config = config
        self.embed_dim: int = network.embed_dim  # type: ignore[assignment]
        self.eval()

    @classmethod
    def load(cls, path: Path, network: str = "teacher", random_init: bool = False) -> "Encoder":
        """The network `network` of a run folder (its newest usable checkpoint), a checkpoint folder or an export.

        `random_init` gives it the random weights of the run's seed instead (before any `init`), as a baseline. Raises
        ValueError or ConfigError if the folder is none of the three, is damaged or has no such network.
        """
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder")
        try:
            if (path / "config.json").is_file():
                config, state = _read_export(path, network)
            else:
                config, state = _read_checkpoint(path, network)
            modality: Modality = config.modality.build(config.statistics)
            if random_init:
                return cls(_initial_network(config, modality), modality, config)
            built = _build_network(config, modality)
            if (path / "config.json").is_file():
                state = _from_export(state, built)
            checkpoint.load_model(built, state, path)
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        return cls(built, modality, config)

    @torch.inference_mode()
    def forward(self, views: Tensor, layers: Sequence[int] = ()) -> Features:
        """(B, *shape) -> features with cls (B, D), patches (B, N, D); `layers` as in `Input`."""
        (features,) = self.network([Input(views[None], layers=tuple(layers))])
        return Features(
            cls=features.cls[0],
            patches=features.patches[0],
            registers=None if features.registers is None else features.registers[0],
            layers=tuple((cls[0], patches[0]) for cls, patches in features.layers),
            positions=None if features.positions is None else features.positions[0],
            grid=features.grid,
        )


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_checkpoint(path: Path, network: str) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """What a run folder or a checkpoint folder says of `network`, and its weights."""
    if not (path / "state.json").is_file():
        found = checkpoint.latest(path / "checkpoints")
        if found is None:
            raise ValueError(
                f"{path}: neither a run folder with a checkpoint (checkpoints/step_XXXXXXXX), nor a checkpoint "
                "(state.json), nor an export (config.json)"
            )
        path = found
    else:
        checkpoint.verify(path)
    recipe, state = load_recipe(path / "config.yaml"), checkpoint.read_state(path)
    if network not in recipe.networks:
        raise ValueError(f"{path}: has no network '{network}', but {', '.join(recipe.networks)}")
    config = EncoderConfig(
        modality=recipe.modality.for_export() if hasattr(recipe.modality, "for_export") else recipe.modality,
        networks={name: one.model_copy(update={"init": None}) for name, one in recipe.networks.items()},  # holds a path
        network=network,
        seed=recipe.seed,
        step=state.step,
        statistics=state.statistics,
    )
    prefix = f"networks.{network}."
    tensors = checkpoint.read_tensors(path, "model", prefix)
    return config, {key.removeprefix(prefix): value for key, value in tensors.items()}


def _read_export(path: Path, network: str) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """What the export in `path` says of itself, and its weights under timm's names."""
    file = path / "config.json"
    try:
        section: Any = json.loads(file.read_text(encoding="utf-8")).get("ssl_platform")
        tensors = load_file(path / "model.safetensors")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole export ({error})") from error
    if not isinstance(section, dict) or "encoder" not in section:
        raise ValueError(f"{file}: has no section 'ssl_platform', so it was not written by ssl-export")
    config = validate(EncoderConfig, section["encoder"], str(file))
    if network != config.network:
        raise ValueError(f"{path}: holds the network '{config.network}', not '{network}'")
    return config, tensors


def _from_export(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    if isinstance(network, VisionTransformer):
        return from_timm(state, network)
    assert isinstance(network, TimmBackbone)
    return {f"model.{key}": value for key, value in state.items()}


# -- building ----------------------------------------------------------------------------------------------------------


def _build_network(config: EncoderConfig, modality: Modality) -> nn.Module:
    """The network, whose weights are about to be replaced."""
    owner, seen = config.networks[config.network], {config.network}
    while owner.backbone is None:  # it copies the architecture of another one
        if owner.of is None or owner.of in seen or owner.of not in config.networks:
            raise ConfigError([f"networks.{config.network}: follows no network with a backbone"])
        seen.add(owner.of)
        owner = config.networks[owner.of]
    backbone: PluginConfig = owner.backbone
    if getattr(backbone, "pretrained", False):  # nothing needs to be downloaded
        backbone = backbone.model_copy(update={"pretrained": False})
    network: nn.Module = backbone.build(modality, owner.inputs)  # type: ignore[attr-defined]
    return network


def _initial_network(config: EncoderConfig, modality: Modality) -> nn.Module:
    """The network as the run began with it; drawing random numbers here leaves the global generators alone."""
    with torch.random.fork_rng(devices=[]):
        return build_networks(config.networks, config.seed, modality)[config.network]
