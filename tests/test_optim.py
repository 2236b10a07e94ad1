"""Schedules against DINO's formulas, learning-rate rules, clipping by module."""

import math

import numpy as np
import pytest
import torch

from ssl_platform import optim
from ssl_platform.config import Config, ConfigError, validate
from ssl_platform.optim import Cosine, From, Linear, OptimConfig, ScheduleConfig, build_schedule


def dino_schedule(base: float, final: float, steps: int, warmup: int, start: float) -> np.ndarray:
    """DINO's cosine_scheduler."""
    iters = np.arange(steps - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * iters / len(iters)))
    return np.concatenate((np.linspace(start, base, warmup), cosine))


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_cosine_equals_dinos(warmup: int) -> None:
    schedule = Cosine(schedule="cosine", start=4e-3, end=1e-6, warmup_steps=warmup).build(40)
    expected = dino_schedule(4e-3, 1e-6, 40, warmup, 0.0)
    if warmup == 1:
        expected[0] = 0.0
    assert [schedule(step) for step in range(40)] == pytest.approx(expected.tolist(), rel=1e-12)


def test_truncated_cosine_ends_before_its_minimum() -> None:
    """POA computes its cosine for total / .78 and cuts it."""
    schedule = Cosine(schedule="cosine", start=1.0, end=0.0, period_steps=100).build(78)
    assert schedule(78) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.78)))


def test_linear_reaches_its_end_and_stays() -> None:
    schedule = Linear(schedule="linear", start=0.04, end=0.07, over_steps=4).build(10)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


def test_late_start_and_constant() -> None:
    schedule = From(**{"schedule": "from", "begin": 3, "value": 2.0}).build(10)
    assert [schedule(step) for step in (0, 2, 3, 9)] == [0.0, 0.0, 2.0, 2.0]
    assert build_schedule(0.5, 10)(7) == 0.5


class Holder(Config):
    lr: ScheduleConfig = 1.0


def test_schedules_in_a_configuration() -> None:
    assert isinstance(validate(Holder, {"lr": {"schedule": "cosine", "start": 1, "end": 0}}).lr, Cosine)
    assert validate(Holder, {"lr": 2}).lr == 2.0
    with pytest.raises(ConfigError, match=r"lr.warmup_step: unknown key; did you mean 'warmup_steps'\?"):
        validate(Holder, {"lr": {"schedule": "cosine", "start": 1, "end": 0, "warmup_step": 3}})
    with pytest.raises(ConfigError, match="lr: expected a number or a map with schedule: cosine, linear or from"):
        validate(Holder, {"lr": {"schedule": "exponential", "start": 1}})


def test_learning_rate_rules() -> None:
    assert OptimConfig(scale_lr="none").lr_factor(64) == 1
    assert OptimConfig(scale_lr="sqrt1024").lr_factor(256) == 0.5
    assert OptimConfig(scale_lr="linear256").lr_factor(64) == 0.25


def test_each_module_is_clipped_by_itself() -> None:
    large, small = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    large.grad, small.grad = torch.full((4,), 50.0), torch.full((4,), 0.5)
    norms = optim.clip_gradients({"a": [large], "b": [small]}, 3.0)
    assert {name: norm.item() for name, norm in norms.items()} == {"a": 100.0, "b": 1.0}
    assert large.grad.norm().item() == pytest.approx(3.0, rel=1e-4)
    assert torch.equal(small.grad, torch.full((4,), 0.5))
