"""The rows of a cross-entropy in one pass over each: a Triton kernel, one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    differences,
    losses,
    num_prototypes,
    logits_stride,
    targets_stride,
    differences_stride,
    temperature,
    mass,
    HAS_DIFFERENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    targets += row * targets_stride
    lane = tl.arange(0, BLOCK)
    # Each lane keeps the largest number it has met and the exponentials relative to it.
    largest = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, num_prototypes, BLOCK):
        inside = begin + lane < num_prototypes
        scaled = tl.load(logits + begin + lane, mask=inside, other=0.0).to(tl.float32) / temperature
        target = tl.load(targets + begin + lane, mask=inside, other=0.0).to(tl.float32)
        higher = tl.where(inside, tl.maximum(largest, scaled), largest)
        total = total * tl.exp(largest - higher) + tl.where(inside, tl.exp(scaled - higher), 0.0)
        cross += target * scaled
        largest = higher
    top = tl.max(largest, 0)
    normaliser = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    tl.store(losses + row, mass * normaliser - tl.sum(cross, 0))
    if HAS_DIFFERENCES:
        differences += row * differences_stride
        for begin in range(0, num_prototypes, BLOCK):
            inside = begin + lane < num_prototypes
            scaled = tl.load(logits + begin + lane, mask=inside, other=0.0).to(tl.float32) / temperature
            target = tl.load(targets + begin + lane, mask=inside, other=0.0).to(tl.float32)
            tl.store(differences + begin + lane, mass * tl.exp(scaled - normaliser) - target, mask=inside)


def row_losses(logits: Tensor, targets: Tensor, temperature: float, mass: float, differences: Tensor | None) -> Tensor:
    """mass * logsumexp(z) - sum(p z) of each row, z = logits / temperature; `differences` gets mass * softmax(z) - p.

    (rows, K) x 2 -> (rows,) float32. `differences` is float32 and may be `targets`: what is written was read before.
    """
    logits, targets = logits.contiguous(), targets if targets.stride(-1) == 1 else targets.contiguous()
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        written = targets if differences is None else differences
        _kernel[(len(logits),)](
            logits,
            targets,
            written,
            losses,
            logits.shape[1],
            logits.stride(0),
            targets.stride(0),
            written.stride(0),
            float(temperature),
            float(mass),
            HAS_DIFFERENCES=differences is not None,
            BLOCK=BLOCK,
        )
    return losses
