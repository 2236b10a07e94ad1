"""Which rank is slowest: the time that each spends on its own work, without what it waits for the others.

Ranks leave a step together, so its length tells nothing. Own work is reading batches and the forward pass, from which the
time inside collectives is taken off; the backward pass, whose collectives overlap, would show the same ratio. On CUDA
events are recorded, and read when metrics are due, when the GPU has been waited for anyway.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ssl_platform import distributed

_MAX_EVENTS = 2000
"""Pairs that are kept until the next metrics; passes of an interval after so many are not timed."""
_seconds = 0.0
_events: list[tuple[int, Any, Any]] = []


@contextmanager
def working(device: torch.device) -> Iterator[None]:
    """Around a forward pass, whose collectives count as waiting."""
    if distributed.world_size() == 1:
        yield
        return
    distributed.collective_timer = lambda: _timed(device, -1)
    try:
        with _timed(device, 1):
            yield
    finally:
        distributed.collective_timer = None


@contextmanager
def _timed(device: torch.device, sign: int) -> Iterator[None]:
    global _seconds
    if device.type == "cuda":
        if sign > 0 and len(_events) >= _MAX_EVENTS:  # its collectives go with it
            distributed.collective_timer = None
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        _events.append((sign, begin, end))
    else:
        began = time.perf_counter()
        yield
        _seconds += sign * (time.perf_counter() - began)


def figures(clock_seconds: float, data_wait_share: float) -> dict[str, float | int]:
    """`data_wait_share` of the rank that waits longest; with several ranks, which is slowest and by what factor.

    `clock_seconds` is what this rank waited for data since the last call. The factor is over the median rank, the lower
    one of an even number. Every rank must ask, and gets the same.
    """
    global _seconds
    if distributed.world_size() == 1:
        return {"data_wait_share": data_wait_share}
    own = clock_seconds + _seconds + sum(sign * begin.elapsed_time(end) / 1000 for sign, begin, end in _events)
    _seconds = 0.0
    _events.clear()
    every = distributed.gather(torch.tensor([[own, data_wait_share]], dtype=torch.float64))
    seconds = every[:, 0]
    slowest = int(seconds.argmax())
    ratio = seconds[slowest] / seconds.median().clamp_min(1e-9)
    return {"data_wait_share": every[:, 1].max().item(), "slowest_rank": slowest, "slowest_rank_ratio": ratio.item()}
