"""First layers for views that are normalised otherwise than those that the weights learned with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssl_platform.backbones.timm_models import TimmBackbone
from ssl_platform.config import ConfigError
from ssl_platform.log import logger


class Normalization(NamedTuple):
    """Views are (value - mean) / std, for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    values: str = "pixels"
    """What the values are: those of two kinds have no mean in common."""

    def equals(self, other: "Normalization") -> bool:
        """Up to rounding."""
        return len(self.mean) == len(other.mean) and all(
            abs(a - b) <= 1e-6 for a, b in zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        )

    def __str__(self) -> str:
        return "mean {} std {}".format(*(", ".join(f"{value:.4g}" for value in values) for values in self[:2]))


class Change(NamedTuple):
    """From the views that weights learned with to those of a run, by the names of the first layer's weight and bias.

    Between `undone` and `apply` the layer is one for values as they are: there, patches and channels can be resized.
    """

    layer: tuple[str, str]
    learned: Normalization
    shown: Normalization

    def undone(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W (x - mean) / std + b = W' x + b': the tensors with W' and b', in float64."""
        weight, bias = (tensors[key].double() for key in self.layer)  # (D, C, *patch), (D,)
        mean, std = (weight.new_tensor(values) for values in self.learned[:2])  # (C,)
        weight = (weight.movedim(1, -1) / std).movedim(-1, 1)
        return {**tensors, self.layer[0]: weight, self.layer[1]: bias - weight.flatten(2).sum(2) @ mean}

    def apply(self, state: dict[str, Tensor], changed: dict[str, str]) -> None:
        """Makes the layer in `state` one for the run's views, and says so in `changed`, {key: what was done}."""
        weight, bias = (state[key].double() for key in self.layer)
        mean, std = (weight.new_tensor(values) for values in self.shown[:2])
        fitting = (weight.movedim(1, -1) * std).movedim(-1, 1), bias + weight.flatten(2).sum(2) @ mean
        for key, value in zip(self.layer, fitting, strict=True):
            state[key] = value.float()
            how = f"for views of {self.shown} instead of {self.learned}"
            changed[key] = f"{changed[key]}; {how}" if key in changed else how


def normalization_of(description: Mapping[str, Any]) -> Normalization | None:
    """What `Modality.description()` or timm's pretrained_cfg says; None if each sample is normalised by its own."""
    if description.get("normalize_per_sample") or not description.get("mean") or not description.get("std"):
        return None
    mean, std = (tuple(map(float, description[key])) for key in ("mean", "std"))
    return Normalization(mean, std, description.get("values", "pixels"))


def change_of(
    network: nn.Module,
    found: Mapping[str, Tensor],
    said: Normalization | None,
    known: Normalization | None,
    views: Mapping[str, Any] | None,
    where: str,
) -> Change | None:
    """What makes `network` see a run's views as the weights `found` saw theirs; None if nothing, or nothing is known.

    `said` is the user's word of the views that the weights learned with, `known` that of their source, and `views` the
    description of the run's. ConfigError if what was said cannot be done; a warning if it is only known.
    """
    learned, shown = said or known, normalization_of(views) if views is not None else None
    values = views.get("values", "pixels") if views is not None else ""
    if learned is not None and said is None and values not in ("", learned.values):
        logger.info("%s: the weights learned with %s, these views are %s; the first layer stays as it is", where,
                    learned.values, values)  # fmt: skip
        return None
    if learned is None or views is None or (shown is not None and learned.equals(shown)):
        return None
    layer = _first_layer(network)
    weight = found.get(layer[0]) if layer is not None else None
    if shown is None:
        reason = "this run normalises every sample by its own mean and std"
    elif layer is None or weight is None or layer[1] not in found:
        reason = (
            "its first layer is no convolution, pads views or has no bias, so it cannot take another mean in; set "
            "modality.mean and std"
        )
    elif weight.ndim < 3:
        reason = (
            f"{layer[0]} of the source has the shape {tuple(weight.shape)}, in which channels "
            "cannot be told apart; expected (width, channels, *patch), as of a convolution"
        )
    elif weight.shape[1] != len(learned.mean):
        reason = f"they are of {len(learned.mean)} channels, but the first layer has {weight.shape[1]}"
    else:
        return Change(layer, learned, shown)
    if said is not None:
        raise ConfigError([f"mean, std: {reason}"])
    logger.warning("%s: the weights learned with %s and see other views here: %s", where, learned, reason)
    return None


def _first_layer(network: nn.Module) -> tuple[str, str] | None:
    """The names of the weight and bias that views meet first; None where the mean cannot be taken into them exactly.

    That is so without a bias, and where a convolution pads views with zeros, which stand for the mean and not for black.
    """
    name = "patch_embed.proj"
    if isinstance(network, TimmBackbone):
        named = network.model.pretrained_cfg.get("first_conv")
        if not isinstance(named, str):
            return None
        name = f"model.{named}"
    layer = dict(network.named_modules()).get(name)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.bias is None:
        return None
    padded = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    return None if padded else (f"{name}.weight", f"{name}.bias")
