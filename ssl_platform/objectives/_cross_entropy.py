"""Cross-entropy of logits with given targets, and entropy, over tens of thousands of prototypes.

Both work on a few rows at a time, which stay in a core's cache, and the cross-entropy keeps one (rows, K) tensor for its
gradient: what the forward pass computes anyway. On CUDA it is one Triton kernel where Triton is installed.
"""

import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_platform.log import logger

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""How many numbers are worked on at a time: on a CPU what stays in a core's cache, on CUDA few kernels."""

Rows = Callable[[Tensor, Tensor, float, float, Tensor | None], Tensor]
"""(logits, targets, temperature, mass, where the differences go) -> (rows,) losses."""


def cross_entropy(
    logits: Tensor, targets: Tensor, temperature: float, mass: float = 1.0, *, reuse_targets: bool = False
) -> Tensor:
    """-sum_k targets_k log softmax(logits / temperature)_k of each row, (rows, K) x 2 -> (rows,).

    `mass` is what each row of `targets` sums to: 1 for a distribution, n for a sum of n of them. No gradient for targets.
    Arithmetic and result are in float32, in float64 for float64 logits. With `reuse_targets` the memory of the targets is
    taken for the gradient: the caller must not read them afterwards.
    """
    differences = None
    if logits.requires_grad and torch.is_grad_enabled():
        dtype = torch.promote_types(logits.dtype, torch.float32)
        reused = reuse_targets and targets.dtype == dtype and targets.is_contiguous()
        differences = targets.detach() if reused else targets.new_empty(targets.shape, dtype=dtype)
    rows: Tensor = _CrossEntropy.apply(logits, targets.detach(), temperature, mass, differences)
    return rows


def entropy(probabilities: Tensor) -> Tensor:
    """The mean entropy of the rows of (..., K), in nats; nan without rows."""
    flat = probabilities.flatten(0, -2)
    tiny = torch.finfo(flat.dtype).tiny
    parts = [torch.linalg.vecdot(flat[at], flat[at].clamp_min(tiny).log_()) for at in slices(flat)]
    return -(torch.cat(parts) if parts else flat.sum(-1)).mean()


class _CrossEntropy(torch.autograd.Function):
    """mass * logsumexp(z) - sum(p z), z = logits / temperature; keeps mass * softmax(z) - p."""

    @staticmethod
    def forward(
        context: Any, logits: Tensor, targets: Tensor, temperature: float, mass: float, differences: Tensor | None
    ) -> Tensor:
        rows = _row_losses(logits)(logits, targets, temperature, mass, differences)
        context.save_for_backward(differences)
        context.temperature, context.dtype = temperature, logits.dtype
        return rows

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        (differences,) = context.saved_tensors
        scale = (gradient / context.temperature)[:, None]
        # In place unless the graph is kept, since then a second backward pass may come.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        result = differences * scale if again else differences.mul_(scale)
        return result.to(context.dtype), None, None, None, None


def slices(rows: Tensor) -> Iterator[slice]:
    """Of a few rows each."""
    step = max(CHUNK_ELEMENTS.get(rows.device.type, 1 << 26) // rows.shape[-1], 1)
    return (slice(begin, begin + step) for begin in range(0, len(rows), step))


def _by_chunks(logits: Tensor, targets: Tensor, temperature: float, mass: float, differences: Tensor | None) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = logits.new_empty(len(logits), dtype=dtype)
    for at in slices(logits):
        scaled, target = logits[at].to(dtype) / temperature, targets[at].to(dtype)
        cross, largest = torch.linalg.vecdot(target, scaled), scaled.amax(-1)
        probabilities = torch.softmax(scaled, -1, out=scaled)
        # The largest probability is exp(0) over the sum of exponentials.
        normaliser = largest - probabilities.amax(-1).log_()
        torch.sub(mass * normaliser, cross, out=losses[at])
        if differences is not None:
            torch.sub(probabilities.mul_(mass) if mass != 1 else probabilities, target, out=differences[at])
    return losses


@cache
def _triton(device: torch.device) -> Rows | None:
    """The kernel, where Triton is installed (with torch's CUDA builds for Linux) and finds the C compiler that it needs."""
    try:
        from ssl_platform.objectives._cross_entropy_triton import row_losses

        one = torch.ones(1, 1, device=device)
        row_losses(one, one, 1.0, 1.0, None)  # compiles it
    except ImportError:
        return None
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.warning(
            "Triton cannot compile the kernel of the cross-entropy, torch's operators take its place (slower, the same "
            "result): %s. It needs a C compiler and Python's headers: apt install gcc python3-dev",
            reason,
        )
        return None
    return row_losses


def _row_losses(logits: Tensor) -> Rows:
    on_gpu = logits.device.type == "cuda" and logits.dtype != torch.float64
    return (_triton(logits.device) if on_gpu else None) or _by_chunks
