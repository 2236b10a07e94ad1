"""A training step waits for the device once, for the finite check: nothing else asks a tensor for its value."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_platform.step import build, train_step
from ssl_platform.views import Batch
from tests import engine

aten = torch.ops.aten
WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
ACTIVE = ["dino", "ibot", "koleo"]


class Waits(TorchDispatchMode):  # type: ignore[misc]
    """Notes where an operator whose result depends on values is called: on CUDA the host waits there."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in WAITING or by_mask:
            frames = [f for f in traceback.extract_stack() if "ssl_platform" in f.filename]
            self.lines.append(f"{func} in {frames[-1].name}" if frames else str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_waits_once(targets: str, accumulate: int) -> None:
    objectives = {
        "dino": engine.DINO | {"targets": targets},
        "ibot": engine.IBOT | {"targets": targets},
        "koleo": engine.KOLEO,
    }
    networks = {"student": {"backbone": engine.VIT | {"drop_path": 0.5}}, "teacher": {"update": "ema", "of": "student"}}
    parts = engine.parts(objectives=objectives, networks=networks, accumulate=accumulate)
    pieces = [
        piece.to(torch.device("cpu")) for piece in engine.split(engine.batch(), accumulate)
    ]  # as if it had come over
    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        patch.setattr(Batch, "to", lambda batch, device: batch)
        result = train_step(parts, iter(pieces), 0, ACTIVE)
    assert not result.skipped
    assert waits.lines == ["aten._local_scalar_dense.default in train_step"]


def test_a_batch_knows_what_is_hidden() -> None:
    batch = engine.batch(masked=0.75)
    moved = batch.to(torch.device("cpu"))
    masks = batch.groups["global"].masks["block"]
    for group in (batch.groups["global"], moved.groups["global"]):
        assert group.hidden("block").tolist() == masks.flatten().nonzero().flatten().tolist()
    values = torch.randn(*masks.shape, 3)
    assert torch.equal(values.flatten(0, 3).index_select(0, moved.groups["global"].hidden("block")), values[masks])
    assert moved.groups["global"].positions.keys() == {"block"} and not moved.groups["local"].positions


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_nothing_waits_for_cuda_before_the_finite_check() -> None:
    device = torch.device("cuda")
    made = engine.recipe(precision="bf16")
    parts = build(made, made.modality.build(None), 8, device)
    train_step(parts, iter([engine.batch()]), 0, ACTIVE)  # allocates, and compiles kernels
    batch = engine.batch()
    batch = batch.pin_memory()
    with no_waiting():
        output = parts.module(batch.to(device), 1, ACTIVE)
        output.loss.backward()
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        output.loss.item()
    with no_waiting():
        parts.optimizer.step()
        parts.student_teacher.update(1)
        parts.student_teacher.commit(1, [output.pending])
