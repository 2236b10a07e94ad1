"""What flows from the data to the losses: the views of one sample, and of a batch of samples.

Tensors carry meaning by axis: V views, B samples, M masked versions of a view, N tokens of a view, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleViews:
    """The views of one shape that a modality made of one sample."""

    views: Tensor
    """(V, *shape)"""
    source: Tensor
    """(V,) int64: which crop each view shows. Two views of the same crop, in any group, have the same number."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What only one modality or objective knows (a clean version, a pixel mask, coordinates), per sample."""


@dataclass(frozen=True)
class ViewGroup:
    """The views of one shape of B samples."""

    views: Tensor
    """(V, B, *shape)"""
    source: Tensor
    """(V,) int64, the same for all samples: tells the pairs "same", "other" and "all" apart."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """{name: (V, M, B, N) bool}, True = hidden: M masked versions of each view."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """{name: (B, ...)}: the samples' extras, stacked."""
    positions: dict[str, Tensor] = field(default_factory=dict)
    """What `hidden` returns, of masks that were on the host before they were moved; `Batch.to` fills it."""

    def hidden(self, masks: str) -> Tensor:
        """(masked,) int64: where the masks of that name hide tokens, as positions in (V M B N); in order."""
        if masks in self.positions:
            return self.positions[masks]
        return self.masks[masks].flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class Batch:
    """The views of B samples, with what names them."""

    groups: dict[str, ViewGroup]
    keys: list[str]
    """The samples' keys in their shards."""
    ids: Tensor
    """(B,) int64: the samples' numbers in the index, the key of every per-sample store."""
    labels: Tensor
    """(B,) int64; -1 where a sample has none. Training never reads them; stages and evaluation may."""
    step: int
    """The optimiser step, counted from 0, that this batch belongs to."""
    replaced: list[str] = field(default_factory=list)
    """One line for each unreadable sample that a substitute stands in for: shard, key, reason."""
    filtered: int = 0
    """How many samples the modality's own filter left out, likewise with substitutes."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch with every tensor of its groups on `device`; from page-locked memory to CUDA nothing waits.

        What is hidden is looked up before, on the host: there it needs no wait for the device.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to CUDA run beside the computation."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: move(tensor) for name, tensor in tensors.items()}

        groups = {
            name: ViewGroup(
                move(group.views),
                group.source,
                moved(group.masks),
                moved(group.extra),
                moved({masks: group.hidden(masks) for masks in group.masks}),
            )
            for name, group in self.groups.items()
        }
        return replace(self, groups=groups)


def collate(samples: Sequence[dict[str, SampleViews]], **names: Any) -> Batch:
    """Stacks the views of B samples along the batch axis; `names` are the other fields of Batch.

    Every sample must bring the same groups with the same shapes and sources: ragged data ends at the modality's door.
    """
    groups = {}
    for name, first in samples[0].items():
        group = [sample[name] for sample in samples]
        assert all(torch.equal(views.source, first.source) for views in group), f"sources of '{name}' differ"
        groups[name] = ViewGroup(
            views=torch.stack([views.views for views in group], dim=1),  # (V, B, *shape)
            source=first.source,
            extra={key: torch.stack([views.extra[key] for views in group]) for key in first.extra},
        )
    return Batch(groups=groups, **names)
