"""The mean and the spread of a frozen network's features, which training learns as it goes."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_platform import distributed

Standardize = Literal["none", "channel", "isotropic"]
TINY = 1e-12
"""The smallest variance that is divided by: channels that never change become 0."""


class Standardization(nn.Module):
    """(features - mean) / std over all rows that the run has seen, of all ranks; none = the features as they are.

    `channel` divides every channel by a std of its own (as UNIC, arXiv 2408.05088, and Theia, 2407.20179, do); `isotropic`
    all of them by one, the root of the mean variance: PHI-S (2410.01680) without its rotation, which an adaptor that ends
    in a linear layer absorbs. The statistics that a step uses come from the steps before it; the first uses its own.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, kind: Standardize) -> None:
        super().__init__()
        self.kind = kind
        self._started = False  # what count > 0 would say, but asking a device in each step stops the host
        if kind != "none":
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("variance", torch.zeros(width))
            self.register_load_state_dict_post_hook(_look)  # type: ignore[no-untyped-call]

    def forward(self, features: Tensor, pending: dict[str, Tensor]) -> Tensor:
        """(..., D) -> (..., D) in float32; every rank must call it, with what `pending` gave for the same features."""
        if self.kind == "none":
            return features.float()
        mean, variance = (self.mean, self.variance) if self._started else self._with([pending])[1:]
        if self.kind == "isotropic":
            variance = variance.mean()
        standardized: Tensor = (features.float() - mean) * variance.clamp_min(TINY).rsqrt()
        return standardized

    def pending(self, features: Tensor) -> dict[str, Tensor]:
        """The sums that `commit` needs of one micro-batch: of what is above the mean so far, and its squares."""
        if self.kind == "none":
            return {}
        rows = features.detach().float().flatten(0, -2) - self.mean
        return {
            "count": torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device),
            "sum": rows.sum(0),
            "squares": rows.square().sum(0),
        }

    def commit(self, pending: Sequence[dict[str, Tensor]]) -> None:
        """Takes the rows of one optimiser step in."""
        if self.kind != "none":
            count, mean, variance = self._with(pending)
            self.count.copy_(count)
            self.mean.copy_(mean)
            self.variance.copy_(variance)
            self._started = True

    def _with(self, pending: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean, variance) over the rows so far and those of `pending` on all ranks (Chan et al. 1979)."""
        new = distributed.total(torch.stack([item["count"] for item in pending]).sum())
        sums = torch.stack([torch.stack([item["sum"], item["squares"]]) for item in pending]).double().sum(0)
        above, squares = distributed.total(sums)
        count = self.count + new
        shift = above / count.clamp_min(1)
        variance = (self.variance.double() * self.count + squares) / count.clamp_min(1) - shift.square()
        return count, (self.mean + shift).float(), variance.clamp_min(0).float()


def _look(standardization: nn.Module, keys: object) -> None:
    """After statistics were loaded: whether they are of any rows."""
    standardization._started = bool(standardization.count > 0)  # type: ignore[assignment, operator]
