"""Losses; one file an objective, and the folder is the registry (names with an underscore hold shared parts).

An objective's module holds a class `Config` (of ObjectiveConfig) whose `build(context)` makes an `Objective`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ssl_platform.backbones import Features
from ssl_platform.config import PluginConfig
from ssl_platform.modalities import GroupSpec, Modality
from ssl_platform.optim import ScheduleConfig
from ssl_platform.views import Batch


class Forward(NamedTuple):
    """A request: run `network` on the views of `group`. Equal requests of several objectives run once."""

    network: str
    group: str
    masks: str | None = None
    """The name of the masks to hide tokens with; None shows everything."""
    mode: Literal["token", "drop"] = "token"
    layers: tuple[int, ...] = ()
    arch: Any = None


class Outputs(NamedTuple):
    """What the engine hands to a loss."""

    features: Mapping[Forward, Features]
    """One entry for each request."""
    heads: Mapping[str, Mapping[str, nn.Module]]
    """heads[name][network]: the trained head, or its average that goes with an averaged network."""


class Loss(NamedTuple):
    """What a loss returns for one micro-batch of one rank."""

    terms: dict[str, Tensor]
    """Scalars whose sum, times the objective's weight, is minimised."""
    pending: dict[str, Tensor] = {}
    """What `commit` needs of this micro-batch to change state; dropped when the step is."""
    metrics: dict[str, Tensor] = {}
    """Scalars that are only logged, under the same names on every rank; nan = nothing to measure here, left out of means."""


class BuildContext(NamedTuple):
    """What an objective may look at while it is built."""

    modality: Modality
    embed_dims: dict[str, int]
    """Of each network."""
    heads: dict[str, Any]
    """The configuration of each head (`num_prototypes`, ...)."""
    steps: int
    """The length of the run, which schedules refer to."""
    seed: int
    num_samples: int
    """In the training shards: the size of a store keyed by sample id."""
    patch_dims: dict[str, int] = {}
    """Of each network: the width of its patch tokens."""


class ObjectiveConfig(PluginConfig):
    """The keys that every objective has."""

    weight: ScheduleConfig = 1.0
    """Factor of the objective's terms: a number or a schedule."""

    def problems(self, networks: Mapping[str, Any], groups: Mapping[str, GroupSpec]) -> list[str]:
        """What does not go together with the run's networks (their sections) and groups: lines that begin with a key."""
        return []

    def taught_by(self) -> dict[str, str]:
        """{key: network} of the teachers in this section that teach nothing while they are random."""
        return {}


class Objective(nn.Module):
    """One loss. Its own parameters are trained if they require gradients; its buffers change only in `commit`."""

    def requests(self, step: int) -> Sequence[Forward]:
        """The forward passes this loss needs at `step`."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        """Pure: reads buffers, changes none, so that a bad batch or a recomputation leaves no trace."""
        raise NotImplementedError

    def commit(self, step: int, pending: Sequence[dict[str, Tensor]]) -> None:
        """Changes state, once per optimiser step, after the finite check; one entry of `pending` per micro-batch.

        Runs on every rank: what `pending` holds must be summed or gathered over ranks here.
        """

    def begin_stage(self, prepared: Mapping[str, Tensor]) -> None:
        """Called when a stage begins or is resumed, with what its `prepare` step made; must be repeatable."""
