"""On one CUDA device: shards, bf16, compiled and recomputed blocks against plain float32; NCCL where there are two."""

import os
from typing import Any

import pytest
import torch

from ssl_platform import distributed
from ssl_platform.step import Parts, build, train_step
from tests import engine
from tests.courses import ACTIVE, VIT, batch, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
CUDA = torch.device("cuda", 0)
FSDP: dict[str, Any] = {"parallel": {"method": "fsdp"}}
NETWORKS: dict[str, Any] = {
    "student": {"backbone": VIT | {"embed_dim": 64, "num_heads": 2, "depth": 4}},
    "teacher": {"update": "ema", "of": "student", "momentum": 0.9},
    "fixed": {"update": "frozen", "of": "student"},
}
STEPS = 3


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    distributed.stop()


def made(changes: dict[str, Any], device: torch.device = CUDA) -> Parts:
    recipe = engine.recipe(**settings(**{"networks": NETWORKS} | changes))
    return build(recipe, recipe.modality.build(None), 8, device)


def losses(changes: dict[str, Any]) -> list[float]:
    parts = made(changes)
    found = [train_step(parts, iter([batch(step)]), step, ACTIVE[0]) for step in range(STEPS)]
    assert not any(result.skipped for result in found)
    return [result.loss.item() for result in found]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (FSDP, 1e-5),
        ({"recompute": True}, 1e-5),
        (FSDP | {"recompute": True}, 1e-5),
        ({"compile": True}, 1e-4),
        (FSDP | {"compile": True, "recompute": True}, 1e-4),
        ({"precision": "bf16"}, 0.1),
        (FSDP | {"precision": "bf16"}, 0.1),
        (FSDP | {"precision": "bf16", "compile": True, "recompute": True}, 0.1),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_equals_plain_float32(changes: dict[str, Any], tolerance: float) -> None:
    """bf16's tolerance is what tests/test_blocks.py derives for a network of half the depth."""
    for ours, theirs in zip(losses(changes), losses({}), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


def test_float32_equals_the_cpu() -> None:
    expected = made({}, torch.device("cpu"))
    for step, ours in enumerate(losses({})):
        theirs = train_step(expected, iter([batch(step)]), step, ACTIVE[0]).loss.item()
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_recomputed_blocks_need_less_memory() -> None:
    wide = {"networks": NETWORKS | {"student": {"backbone": VIT | {"embed_dim": 256, "depth": 12}}}}
    peaks = []
    for recompute in (False, True):
        parts = made(wide | {"batch_size": 256, "recompute": recompute, "optim": {"name": "sgd"}})
        many = engine.batch(0, size=256)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        train_step(parts, iter([many]), 0, ACTIVE[0])
        peaks.append(torch.cuda.max_memory_allocated() - held)
        del parts
    assert peaks[1] < 0.8 * peaks[0], peaks


def ranks_on_nccl(rank: int, port: int, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = distributed.start(timeout_minutes=2)
    for changes in ({}, FSDP):
        parts = made(changes, device)
        for step in range(STEPS):
            mine = engine.split(batch(step), 2)[rank]
            result = train_step(parts, iter([mine]), step, ACTIVE[0])
            answers.put((len(changes), step, distributed.mean(result.loss).item()))
    distributed.stop()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_equal_one() -> None:
    import socket

    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    ranks = [context.Process(target=ranks_on_nccl, args=(rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    expected = losses({})
    for _ in range(2 * 2 * STEPS):
        _, step, loss = answers.get(timeout=240)
        assert loss == pytest.approx(expected[step], rel=1e-5)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
