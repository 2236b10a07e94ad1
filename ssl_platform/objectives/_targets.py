"""What a student's logits are compared with: teacher distributions by centering or Sinkhorn-Knopp, and cross-entropy."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ssl_platform import distributed
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

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """(rows, K) -> probabilities (rows, K) in float32."""
        shifted = (logits.float() - self.center).div_(temperature)
        return torch.softmax(shifted, dim=-1, out=shifted) if not shifted.requires_grad else shifted.softmax(-1)

    def pending(self, logits: Tensor) -> dict[str, Tensor]:
        """The sums that `commit` needs of one micro-batch."""
        return {
            "logit_sum": logits.sum(0, dtype=torch.float32),  # (K,)
            "row_count": torch.tensor(float(len(logits)), device=logits.device),
        }

    def commit(self, pending: Sequence[dict[str, Tensor]]) -> None:
        """Moves the center, once per optimiser step."""
        count = distributed.total(torch.stack([item["row_count"] for item in pending]).sum())
        total = distributed.total(torch.stack([item["logit_sum"] for item in pending]).sum(0))
        if count > 0:
            self.center.lerp_(total / count, 1 - self.momentum)


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

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """(rows, K) -> probabilities (rows, K) in float32; every rank must call it, even with no rows."""
        scaled = logits.float() / temperature
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


def entropy(probabilities: Tensor) -> Tensor:
    """The mean entropy of the rows, in nats."""
    total: Tensor = torch.special.entr(probabilities).sum(-1)
    return total.mean()


CHUNK_ELEMENTS = 1 << 18
"""Rows are worked on in chunks of this many numbers, which stay in a core's cache: measured in docs/benchmarks.md."""


class _CrossEntropy(torch.autograd.Function):
    """mass * logsumexp(z) - sum(p z), z = logits / temperature, keeping no float32 copy of the (rows, K) logits."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor, temperature: float, mass: float) -> Tensor:
        chunk = max(CHUNK_ELEMENTS // logits.shape[-1], 1)
        normalisers, losses = [], []
        for rows, target in zip(torch.split(logits, chunk), torch.split(targets, chunk), strict=True):
            scaled = rows.float() / temperature
            normaliser = scaled.logsumexp(-1)
            normalisers.append(normaliser)
            losses.append(mass * normaliser - torch.linalg.vecdot(target, scaled))
        context.save_for_backward(logits, targets, torch.cat(normalisers) if normalisers else logits.new_zeros(0))
        context.temperature, context.mass = temperature, mass
        return torch.cat(losses) if losses else logits.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        logits, targets, normalisers = context.saved_tensors
        result = torch.empty_like(logits)
        chunk = max(CHUNK_ELEMENTS // logits.shape[-1], 1)
        parts = (torch.split(tensor, chunk) for tensor in (logits, targets, normalisers, gradient, result))
        for rows, target, normaliser, scale, out in zip(*parts, strict=True):
            probabilities = (rows.float() / context.temperature).sub_(normaliser[:, None]).exp_()
            difference = (
                probabilities.mul_(context.mass).sub_(target) if context.mass != 1 else probabilities.sub_(target)
            )
            out.copy_(difference.mul_((scale / context.temperature)[:, None]))
        return result, None, None, None


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float, mass: float = 1.0) -> Tensor:
    """-sum_k targets_k log softmax(logits / temperature)_k of each row, (rows, K) x 2 -> (rows,), in float32.

    `mass` is what each row of `targets` sums to: 1 for a distribution, n for a sum of n of them. No gradient for targets.
    """
    rows: Tensor = _CrossEntropy.apply(logits, targets.detach(), temperature, mass)
    return rows
