"""What networks over frames share: the views that they take, the requests that they refuse, the numbers of layers."""

import re

from torch import Tensor

from ssl_platform.backbones import Features, Input
from ssl_platform.config import ConfigError
from ssl_platform.modalities import Modality


def bins_of(modality: Modality, group: str, name: str) -> int:
    """Frequency bins of `group`'s views, which must be (1, frames, bins); ValueError if they are of another kind."""
    shape = modality.groups[group].shape
    if len(shape) != 3 or shape[0] != 1:
        raise ValueError(
            f"{name} takes filter banks of sound, (1, frames, bins), but views of '{group}' have shape {shape}; use the "
            "backbone 'vit' or 'timm_models' for others"
        )
    return shape[2]


def frames_of(item: Input, num_bins: int, name: str) -> Tensor:
    """The rows of one input, (V B, frames, bins); ConfigError for what such networks cannot do."""
    if item.masks is not None:
        raise ConfigError([f"{name} has no mask token: ibot, and masks of dino and koleo, need the backbone 'vit'"])
    if item.layers or item.arch is not None:
        raise ConfigError([f"{name} gives only its last features: layers and arch need the backbone 'vit'"])
    channels, _, bins = item.views.shape[2:]
    if channels != 1 or bins != num_bins:
        raise ConfigError(
            [
                f"{name} was made for views of 1 channel and {num_bins} bins, but those of '{item.group}' have "
                f"{channels} and {bins}: give all groups of views the same"
            ]
        )
    return item.views.flatten(0, 2)


def features(item: Input, embeddings: Tensor, frames: Tensor) -> Features:
    """Of embeddings (V B, D) and the frames that were pooled, (V B, width, N)."""
    num_views, batch = item.views.shape[:2]
    width, length = frames.shape[1:]
    return Features(
        cls=embeddings.view(num_views, batch, -1),
        patches=frames.mT.view(num_views, batch, length, width),
        grid=(length,),
    )


def layer_of(parameter: str, num_layers: int) -> int:
    """0 for the stem, i + 1 for `layers.i`, `num_layers` + 1 for what follows."""
    if found := re.match(r"layers\.(\d+)\.", parameter):
        return int(found[1]) + 1
    return 0 if parameter.startswith("stem.") else num_layers + 1
