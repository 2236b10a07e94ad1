"""Kinds of data; one file a modality, and the folder is the registry (names with an underscore hold shared parts).

A modality's module holds a class `Config` whose `build(statistics)` makes it; `statistics` are what was measured of
the channels on the training shards, {"mean": [...], "std": [...], "percentiles": {"1": [...], ...}}, or None; shards
packed before percentiles were kept have none. `build(None)` must give `groups` all the same; a Config that needs more says
why in `needs_statistics`, the name of the key that needs them, and training on shards without is refused. A Config that
names files which only training reads has `for_export()`, the same without them, and its modality `prepare()`, which opens
them before a run and never for evaluation; it raises ValueError that begins with the key.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_platform.views import SampleViews


class Filtered(ValueError):
    """What `augment` raises for a sample that is whole but that the configuration does not want (no tissue, say)."""


class GroupSpec(NamedTuple):
    """What a modality promises of one group of views."""

    num_views: int
    shape: tuple[int, ...]
    """Of one view, without the batch axis: (C, H, W) for images."""
    grid: tuple[int, ...]
    """Tokens along each axis: (H / patch, W / patch) for images."""
    shows: str | None = None
    """Another group whose crops, view by view, these views show; None: crops of its own."""


class Variant(NamedTuple):
    """One of the ways in which a modality may make the views of a step."""

    probability: float
    modality: "Modality"
    """The same but for the shapes of its groups."""


class Modality(Protocol):
    """Everything the platform knows about one kind of data. Views have fixed shapes: ragged data ends here."""

    groups: dict[str, GroupSpec]
    """The groups that `augment` makes; "global" is always there."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Where the sizes of views differ from step to step: what one is drawn of for each step (`data/shards.py`).

        `groups` then says only what networks and evaluation are made for. May be left out.
        """
        ...

    def decode(self, record: dict[str, bytes]) -> Any:
        """One record of a shard ({extension: bytes}) -> an example; raises ValueError with the reason if it is bad."""
        ...

    def augment(self, examples: tuple[Any, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        """The training views of examples[0]; further examples are its companions (donors, pairs).

        Raises Filtered for a sample that is not wanted, ValueError with the reason for one that is bad.

        Reproducible from `rng` and the global torch RNG, both seeded by the caller from (seed, key, epoch).
        """
        ...

    def preprocess(self, example: Any) -> Tensor:
        """The one view that an encoder is shown in evaluation; (*shape) of the group "global"."""
        ...

    def picture(self, view: Tensor) -> NDArray[np.uint8]:
        """A view of any group as a picture for people, (H, W, 3) uint8: what `ssl-train CONFIG --show-views` draws.

        Where tokens lie on a grid of two axes these are the picture's height and width, so that masks can be drawn over
        it; of one axis, its width. A modality without this method trains all the same.
        """
        ...

    def patch_embed(self, embed_dim: int, group: str = "global") -> nn.Module:
        """The layer that turns (B, *shape) into `ssl_platform.patch_embed.Tokens`."""
        ...

    def description(self) -> dict[str, Any]:
        """The facts of `preprocess` as JSON (input_size, mean, std, interpolation, ...): what an export carries."""
        ...
