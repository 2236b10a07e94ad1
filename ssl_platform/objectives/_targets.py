"""What a student's logits are compared with: a teacher's distributions, by centering or Sinkhorn-Knopp."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ssl_platform import distributed
from ssl_platform.objectives._cross_entropy import slices
from ssl_platform.optim import ScheduleConfig, within

TargetName = Literal["centering", "sinkhorn"]
Temperature = Annotated[ScheduleConfig, within(0, open_end=True)]


class Centering(nn.Module):
    """softmax((logits - center) / temperature); the center is a moving average of the teacher's mean LOGITS.

    The center that a step uses comes from the steps before it (DINOv2 applies its update one call late, too); the mean
    is over all rows of all ranks and micro-batches, weighted by their number, so ranks with few masked tokens count less.
    """

    center: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(self, logits: Tensor, temperature: float, *, in_place: bool = False) -> Tensor:
        """(rows, K) -> probabilities (rows, K) in float32, without gradient; `in_place`: in the memory of float32 logits."""
        logits = logits.detach()
        result = logits if in_place and logits.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        for at in slices(logits):
            shifted = torch.sub(logits[at].float(), self.center, out=result[at]).div_(temperature)
            torch.softmax(shifted, dim=-1, out=shifted)
        return result

    def pending(self, logits: Tensor) -> dict[str, Tensor]:
        """The sums that `commit` needs of one micro-batch."""
        return {
            "logit_sum": logits.sum(0, dtype=torch.float32),  # (K,)
            "row_count": torch.full(
                (), float(len(logits)), device=logits.device
            ),  # made there: nothing waits for a copy
        }

    def commit(self, pending: Sequence[dict[str, Tensor]]) -> None:
        """Moves the center, once per optimiser step."""
        count = distributed.total(torch.stack([item["row_count"] for item in pending]).sum())
        total = distributed.total(torch.stack([item["logit_sum"] for item in pending]).sum(0))
        weight = (1 - self.momentum) * (
            count > 0
        )  # of no rows the mean is 0 / 1, and counts nothing; no wait for `count`
        self.center.lerp_(total / count.clamp_min(1), weight.to(self.center.dtype))


TINY = 1e-30
"""What a prototype's mass is at least; sums of its inverse over any number of prototypes stay finite."""


class Sinkhorn(nn.Module):
    """Sinkhorn-Knopp: rows that sum to 1, with the mass spread evenly over prototypes, over the rows of all ranks.

    Written as scalings u, v of a fixed matrix E = exp(logits / temperature), so an iteration only reads E:
    v = 1 / (K E' u), u = 1 / (rows E v). Each row's and then each prototype's largest logit is subtracted first: nothing
    overflows, and every row and every prototype keeps an entry of 1. v cancels what was taken from the prototypes, and u
    begins with what was taken from the rows. (SwAV; DINOv2 does the same in place without the subtractions.)
    """

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations

    def forward(self, logits: Tensor, temperature: float, *, in_place: bool = False) -> Tensor:
        """(rows, K) -> probabilities (rows, K) in float32; every rank must call it, even with no rows.

        `in_place`: in the memory of float32 logits.
        """
        logits = logits.detach().float() if in_place else logits.detach().to(torch.float32, copy=True)
        scaled = logits.div_(temperature)
        row_largest = scaled.amax(1)  # (rows,)
        scaled.sub_(row_largest[:, None])
        largest = scaled.new_full((scaled.shape[1] + 1,), -torch.inf)  # of each prototype, and of all rows' largest
        if len(scaled):
            largest = torch.cat([scaled.amax(0), row_largest.amax(0, keepdim=True)])
        largest = distributed.maximum(largest)
        mass = scaled.sub_(largest[:-1]).exp_()  # (rows, K)
        row_scale = (row_largest - largest[-1]).exp()  # (rows,)
        for _ in range(self.iterations):
            prototype_scale = 1 / distributed.total(row_scale @ mass).clamp_min_(TINY)  # (K,)
            row_scale = 1 / (mass @ prototype_scale)  # (rows,)
        return mass.mul_(prototype_scale).mul_(row_scale[:, None])

    def pending(self, logits: Tensor) -> dict[str, Tensor]:
        """Nothing: Sinkhorn has no state."""
        return {}

    def commit(self, pending: Sequence[dict[str, Tensor]]) -> None: ...


def build_targets(name: TargetName, prototypes: int, center_momentum: float, iterations: int) -> Centering | Sinkhorn:
    """The rule of that name."""
    return Centering(prototypes, center_momentum) if name == "centering" else Sinkhorn(iterations)
