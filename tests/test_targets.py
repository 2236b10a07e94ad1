"""Centering, Sinkhorn and cross-entropy against written-out float64 references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_platform import distributed
from ssl_platform.objectives._targets import Centering, Sinkhorn
from tests.ranks import run_ranks


def sinkhorn_in_place(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """SwAV's and DINOv2's loop: prototypes x samples, normalised in place."""
    q = np.exp(logits.T / temperature)
    q /= q.sum()
    num_prototypes, num_samples = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True)
        q /= num_prototypes
        q /= q.sum(0, keepdims=True)
        q /= num_samples
    return (q * num_samples).T


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), prototypes=st.integers(2, 12), iterations=st.integers(1, 4), seed=st.integers(0, 99))
def test_sinkhorn_equals_the_loop(rows: int, prototypes: int, iterations: int, seed: int) -> None:
    logits = np.random.default_rng(seed).uniform(-1, 1, (rows, prototypes))
    expected = sinkhorn_in_place(logits, 0.07, iterations)
    found = Sinkhorn(iterations)(torch.from_numpy(logits), 0.07)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(rows))


def test_sinkhorn_survives_logits_that_overflow_exp() -> None:
    logits = torch.tensor([[900.0, 0.0, -900.0], [0.0, 900.0, -900.0], [3.0, 5.0, 1.0]])
    found = Sinkhorn(3)(logits, 0.04)  # exp(900 / .04) is infinite in any precision
    assert torch.isfinite(found).all()
    assert torch.isinf(torch.exp(logits[0, 0] / 0.04))


def unequal_counts(rows: list[list[float]], split: int) -> list[list[float]]:
    mine = torch.tensor(rows)[:split] if distributed.rank() == 0 else torch.tensor(rows)[split:]
    center = Centering(mine.shape[1])
    center.commit([center.pending(mine)])
    return [Sinkhorn(3)(mine, 0.05).tolist(), center.center.tolist()]


def log_domain_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """Sinkhorn-Knopp with logarithms, in which nothing can underflow."""
    logs = logits.astype(np.float64) / temperature
    for _ in range(iterations):
        logs = logs - np.logaddexp.reduce(logs, axis=0, keepdims=True) - np.log(logs.shape[1])
        logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)
    found: np.ndarray = np.exp(logs)
    return found


def test_sinkhorn_keeps_rows_that_lie_far_below_all_others() -> None:
    logits = np.array([[4.0, 0, 0], [0, 4, 0], [0, 0, 4], [-1, -1, -1]])
    found = Sinkhorn(3)(torch.from_numpy(logits).float(), 0.04)
    np.testing.assert_allclose(found.sum(1).numpy(), 1, rtol=1e-5)
    np.testing.assert_allclose(found.numpy(), log_domain_sinkhorn(logits, 0.04, 3), atol=1e-5)
    rng = np.random.default_rng(0)
    spread = rng.uniform(-1.5, 1.5, size=(7, 5)) * rng.choice([0.1, 0.5, 1], size=(7, 1))
    found = Sinkhorn(3)(torch.from_numpy(spread).float(), 0.04)
    np.testing.assert_allclose(found.numpy(), log_domain_sinkhorn(spread, 0.04, 3), atol=1e-5)


@pytest.mark.parametrize("split", [3, 5])
def test_two_ranks_with_unequal_rows_equal_the_joined_batch(split: int) -> None:
    """Masked-token counts differ between ranks; split 5 leaves rank 1 with no row, which DINOv2's centre cannot take."""
    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(3))
    parts = run_ranks(2, unequal_counts, rows.tolist(), split)
    joined = torch.tensor([row for part, _ in parts for row in part])
    torch.testing.assert_close(joined, Sinkhorn(3)(rows, 0.05), rtol=1e-5, atol=1e-6)
    expected = 0.1 * rows.mean(0)
    for _, center in parts:
        torch.testing.assert_close(torch.tensor(center), expected)


def test_centering_uses_the_center_of_earlier_steps_and_logits() -> None:
    rule = Centering(3, momentum=0.9)
    logits = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 1.0]])
    torch.testing.assert_close(rule(logits, 0.5), (logits / 0.5).softmax(-1))
    assert torch.equal(rule.center, torch.zeros(3)), "the forward pass must not move the center"
    rule.commit([rule.pending(logits)])
    torch.testing.assert_close(rule.center, 0.1 * logits.mean(0))
    torch.testing.assert_close(rule(logits, 0.5), ((logits - rule.center) / 0.5).softmax(-1))


def test_center_over_a_hundred_steps_is_of_logits_not_probabilities() -> None:
    rule = Centering(5)
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(5.0)
    for _ in range(100):
        rule.commit([rule.pending(logits)])
    torch.testing.assert_close(rule.center, logits.mean(0), rtol=1e-3, atol=1e-3)
    assert rule.center.max() > 1, "a center of probabilities would be near 1/5 everywhere"


def test_center_of_micro_batches_equals_the_whole_batch() -> None:
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = Centering(5), Centering(5)
    whole.commit([whole.pending(logits)])
    parts.commit([parts.pending(part) for part in (logits[:2], logits[2:5], logits[5:5], logits[5:])])
    torch.testing.assert_close(parts.center, whole.center, rtol=1e-6, atol=1e-7)


def test_no_rows_leave_the_center_alone() -> None:
    rule = Centering(3)
    rule.commit([rule.pending(torch.zeros(0, 3))])
    assert torch.equal(rule.center, torch.zeros(3))
    assert Sinkhorn()(torch.zeros(0, 3), 0.05).shape == (0, 3)


@pytest.mark.parametrize("rule", [Centering(5), Sinkhorn()], ids=["centering", "sinkhorn"])
def test_targets_in_the_memory_of_the_logits(rule: Centering | Sinkhorn) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    expected = rule(logits, 0.05)
    assert torch.equal(logits, before), "without in_place the logits stay"
    found = rule(logits, 0.05, in_place=True)
    assert torch.equal(found, expected) and found.data_ptr() == logits.data_ptr()
    rounded = before.bfloat16()
    assert rule(rounded, 0.05, in_place=True).dtype == torch.float32
    assert torch.equal(rounded, before.bfloat16()), "other memory than float32's cannot hold them"
