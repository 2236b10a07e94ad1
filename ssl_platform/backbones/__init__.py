"""Networks that turn views into tokens; one file a backbone, and the folder is the registry.

A backbone's module holds a class `Config` whose `build(modality, group)` makes the network for the views of that group.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor


class Input(NamedTuple):
    """What one forward pass is given."""

    views: Tensor
    """(V, B, *shape)"""
    masks: Tensor | None = None
    """(V, M, B, N) bool, True = hidden: every view runs once for each of its M masks."""
    mode: Literal["token", "drop"] = "token"
    """How tokens are hidden: replaced by the mask token, or left out (the same number in every mask)."""
    layers: tuple[int, ...] = ()
    """Blocks, counted from 0, whose outputs are wanted as well."""
    arch: Any = None
    """Which sub-network runs; only elastic backbones accept one."""
    group: str = "global"
    """The name of the group of views: a network may treat one in its own way (`vit` has norms for local views)."""


class Features(NamedTuple):
    """What one forward pass returns; the axis M is there exactly if the input had masks."""

    cls: Tensor
    """(V, [M,] B, D): the embedding of each view, after the final norm."""
    patches: Tensor
    """(V, [M,] B, N, D): its patch tokens after the final norm; N counts the visible ones in mode "drop"."""
    registers: Tensor | None = None
    """(V, [M,] B, R, D)"""
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    """(cls, patches) after each block that `layers` asked for, without the final norm."""
    visible: Tensor | None = None
    """(V, M, B, N_visible) int64, mode "drop": the raster positions of `patches`."""
    positions: Tensor | None = None
    """(V, B, N, d): coordinates of the tokens, where tokens have coordinates rather than a grid."""
    grid: tuple[int, ...] | None = None
    """Tokens along each axis of a view, where they lie on a grid; hidden ones are counted."""


class Backbone(Protocol):
    """A torch module; several inputs in one call (of other resolutions, say) give what separate calls would.

    Where patches are of another width than the embedding, an attribute `patch_dim` says theirs.
    """

    embed_dim: int
    num_layers: int

    def __call__(self, inputs: Sequence[Input]) -> list[Features]: ...

    def layer_of(self, parameter: str) -> int:
        """0 for what comes before the blocks, i + 1 for block i, num_layers + 1 for what follows: layer-wise lr decay."""
        ...
