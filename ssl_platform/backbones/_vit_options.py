"""Sections of the configuration of `vit`: positions and final norms."""

from typing import Literal

from pydantic import Field, model_validator

from ssl_platform.backbones._rope import Rope
from ssl_platform.config import Config


class PositionConfig(Config):
    """How tokens learn where they lie: a learned embedding added to them, or RoPE inside every attention."""

    kind: Literal["learned", "rope"] = "learned"
    interpolation: Literal["dinov2", "timm"] = "dinov2"
    """`learned`, at another resolution than the native one: `dinov2`, bicubic by the scale factor (size + offset) / native,
    or `timm`, bicubic to size, antialiased."""
    offset: float = 0.1
    """`dinov2` only: guards against a size rounded down; 0 asks for the exact size, as its register models do."""
    antialias: bool = False
    """`dinov2` only: its register models have it on."""
    base: float = Field(default=100.0, gt=0)
    """`rope`, as all below: the periods are base ** (i / number of them), over coordinates from -1 to 1."""
    min_max_period: tuple[float, float] | None = None
    """Instead of `base`: the smallest and the largest period, with equal ratios between."""
    normalize: Literal["separate", "min", "max"] = "separate"
    """What reaches from -1 to 1: each axis, or the shortest or the longest one."""
    shift: float = Field(default=0.0, ge=0)
    """While training, coordinates are moved by U(-shift, shift) along each axis; one draw for a group and a pass."""
    jitter: float = Field(default=1.0, ge=1)
    """While training, each axis is scaled by its own factor, log-uniform in [1 / jitter, jitter]."""
    rescale: float = Field(default=1.0, ge=1)
    """While training, all axes are scaled by one factor, log-uniform in [1 / rescale, rescale]; DINOv3's 7B has 2."""

    @model_validator(mode="after")
    def _check(self) -> "PositionConfig":
        low, high = self.min_max_period or (1, 1)
        if not 0 < low <= high:
            raise ValueError(f"min_max_period: [{low:g}, {high:g}] must be [min, max] with 0 < min <= max")
        names = Rope._fields if self.kind == "learned" else ("interpolation", "offset", "antialias")
        changed = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            other = "rope" if self.kind == "learned" else "learned"
            raise ValueError(f"{', '.join(changed)}: of kind: {other}, but this is kind: {self.kind}")
        return self

    @property
    def rope(self) -> Rope | None:
        """The settings of RoPE; None for a learned embedding."""
        return None if self.kind == "learned" else Rope(*(getattr(self, name) for name in Rope._fields))


class UntiedNormsConfig(Config):
    """Final norms of their own for some tokens (DINOv3)."""

    cls: bool = False
    """Class and register tokens have another final norm than patches."""
    local: str | None = None
    """A group of views, such as local, whose class and register tokens have one of their own while training. In
    evaluation all views go through the others."""
