"""Any timm model as a backbone: DINO on convolutional and other networks, and pretrained weights to start from.

timm is imported where it is used: that takes a second, and most runs have none of its models.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor, nn

from ssl_platform.backbones import Features, Input
from ssl_platform.config import ConfigError, PluginConfig
from ssl_platform.modalities import Modality


class Config(PluginConfig):
    """A model of timm's registry. It hides no tokens, so it serves objectives that need none hidden, such as dino."""

    name: str = "timm_models"
    model: str
    """Its name in timm, such as resnet50 or convnext_tiny.fb_in22k (`timm.list_models()` lists them)."""
    pretrained: bool = False
    """Start from timm's released weights, which are downloaded."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as drop_path_rate."""

    @field_validator("model")
    @classmethod
    def _is_known(cls, model: str) -> str:
        import timm

        name = model.partition(".")[0]
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=1)
            raise ValueError(f"timm has no model '{model}'{f'; did you mean {near[0]!r}?' if near else ''}")
        return model

    @field_validator("kwargs")
    @classmethod
    def _are_free(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(kwargs.keys() & {"num_classes", "in_chans", "pretrained", "features_only"})
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set here: the modality and `pretrained` decide")
        return kwargs

    def build(self, modality: Modality, group: str = "global") -> "TimmBackbone":
        """The network for images of `group`'s channels and size; other sizes work as far as the model allows them."""
        shape = modality.groups[group].shape
        if len(shape) != 3:
            raise ValueError(f"timm models take images (C, H, W), but views of '{group}' have shape {shape}")
        return self._create(shape[0], shape[1:])

    def _create(self, in_chans: int, size: Sequence[int]) -> "TimmBackbone":
        """The model with whatever arguments make it accept several image sizes, or at least this one."""
        for several_sizes in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
            try:
                return self._create_with({"in_chans": in_chans, "img_size": list(size), **several_sizes, **self.kwargs})
            except TypeError:  # it has no such argument
                continue
        try:
            return self._create_with({"in_chans": in_chans, **self.kwargs})
        except TypeError as error:
            raise ValueError(f"backbone '{self.model}': timm refuses the arguments {self.kwargs}: {error}") from error

    def _create_with(self, arguments: dict[str, Any]) -> "TimmBackbone":
        import timm

        arguments = {"num_classes": 0, **arguments}
        return TimmBackbone(timm.create_model(self.model, pretrained=self.pretrained, **arguments), arguments)


class TimmBackbone(nn.Module):
    """A timm model; `cls` is its pooled embedding, `patches` its tokens or the places of its last feature map.

    Where a model pools through further layers, `embed_dim` is the width behind them and differs from that of `patches`.
    `model_args` are the arguments that `timm.create_model` made it from.
    """

    def __init__(self, model: Any, model_args: dict[str, Any]) -> None:
        from timm.models._manipulate import group_with_matcher

        super().__init__()
        self.model = model
        self.model_args = model_args
        self.embed_dim: int = getattr(model, "head_hidden_size", None) or model.num_features
        self.patch_dim: int = model.num_features
        self._layers: dict[str, int] = group_with_matcher(
            model.named_parameters(), model.group_matcher(coarse=False), reverse=True
        )
        self.num_layers = max(self._layers.values())

    def forward(self, inputs: Sequence[Input]) -> list[Features]:
        """One entry for each input, in order; raises ConfigError for what timm models cannot do."""
        return [self._forward(item) for item in inputs]

    def layer_of(self, parameter: str) -> int:
        """timm's own numbering of the layers, for layer-wise learning rates."""
        return self._layers[parameter.removeprefix("model.")]

    def _forward(self, item: Input) -> Features:
        if item.masks is not None:
            raise ConfigError(
                ["timm models have no mask token: ibot, and masks of dino and koleo, need the backbone 'vit'"]
            )
        if item.layers or item.arch is not None:
            raise ConfigError(["timm models give only their last features: layers and arch need the backbone 'vit'"])
        num_views, batch = item.views.shape[:2]
        try:
            found = self.model.forward_features(item.views.flatten(0, 1))
        except AssertionError as error:  # how timm refuses a size
            name, size = self.model.pretrained_cfg["architecture"], tuple(item.views.shape[3:])
            raise ConfigError([f"timm's {name} does not take views of size {size}: {error}"]) from error
        cls: Tensor = self.model.forward_head(found, pre_logits=True)
        patches, grid = self._patches(found, cls, tuple(item.views.shape[3:]))
        return Features(
            cls=cls.reshape(num_views, batch, -1),
            patches=patches.reshape(num_views, batch, *patches.shape[1:]),
            grid=grid,
        )

    def _patches(self, found: Any, cls: Tensor, size: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...] | None]:
        """(B, N, width), N = 0 where the model has no places; and their grid, if it is known."""
        if not isinstance(found, Tensor) or found.ndim not in (3, 4):
            return cls.new_empty(len(cls), 0, self.embed_dim), None
        if found.ndim == 3:
            tokens = found[:, getattr(self.model, "num_prefix_tokens", 0) :]
            embed: Any = getattr(self.model, "patch_embed", None)
            grid = tuple(embed.dynamic_feat_size(size)) if hasattr(embed, "dynamic_feat_size") else None
            return tokens, grid if grid is not None and math.prod(grid) == tokens.shape[1] else None
        if str(getattr(self.model, "output_fmt", "NCHW")).rpartition(".")[2] == "NHWC":
            return found.flatten(1, 2), tuple(found.shape[1:3])
        return found.flatten(2).mT, tuple(found.shape[2:])
