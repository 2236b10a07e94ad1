"""Batch norm over ranks: torch's own bits on one process, and one process's numbers on several, however rows are split."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from ssl_platform import distributed
from ssl_platform.batch_norm import BatchNorm, has_batch_norm
from ssl_platform.blocks import recompute_blocks
from ssl_platform.config import ConfigError
from tests.ranks import run_ranks

CHANNELS = 5


def ours(affine: bool = True) -> BatchNorm:
    torch.manual_seed(0)
    norm = BatchNorm(CHANNELS, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return norm


def torchs(like: BatchNorm, dims: int) -> nn.Module:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d)[dims > 3](CHANNELS, affine=like.affine)
    norm.load_state_dict(like.state_dict())
    return norm


def rows(*shape: int, seed: int = 0, offset: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + offset


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from([(2, 5), (7, 5), (3, 5, 4), (1, 5, 9), (2, 5, 3, 4)]),
    affine=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_one_process_gets_torchs_bits(shape: tuple[int, ...], affine: bool, seed: int, dtype: torch.dtype) -> None:
    norm = ours(affine)
    other = torchs(norm, len(shape))
    if dtype == torch.float64:
        norm, other = norm.double(), other.double()
    found, expected = (rows(*shape, seed=seed).to(dtype).requires_grad_() for _ in range(2))
    for step in range(3):
        for module in (norm, other):
            module.train(step < 2)
        a, b = norm(found), other(expected)
        assert torch.equal(a, b) and a.dtype == dtype
        (a * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))).sum().backward()
        (b * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))).sum().backward()
        assert found.grad is not None and expected.grad is not None and torch.equal(found.grad, expected.grad)
    for name, value in other.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value), name


def parts_of(whole: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return torch.split(whole, list(sizes))


def two_calls(sizes: Sequence[int], shape: Sequence[int], affine: bool, offset: float) -> dict[str, Any]:
    """Two groups of this rank's rows through one layer in training mode, then in evaluation mode; sums of losses."""
    norm, rank = ours(affine), distributed.rank()
    inputs = [
        parts_of(rows(sum(sizes), CHANNELS, *shape, seed=seed, offset=offset), sizes)[rank].requires_grad_()
        for seed in (1, 2)
    ]
    weights = [parts_of(rows(sum(sizes), CHANNELS, *shape, seed=seed), sizes)[rank] for seed in (3, 4)]
    outputs = [norm(x) for x in inputs]
    sum((y.sin() * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        calm = norm.eval()(inputs[0])
    return {
        "outputs": [y.detach() for y in outputs],
        "inputs": [x.grad for x in inputs],
        "weights": [p.grad for p in norm.parameters()],
        "buffers": dict(norm.named_buffers()),
        "calm": calm,
    }


@pytest.mark.parametrize(
    "sizes", [(4, 4), (1, 7), (6, 0), pytest.param((3, 1, 2), marks=pytest.mark.slow)], ids=str
)  # three ranks are processes of their own, which take a minute to begin
@pytest.mark.parametrize("shape", [(), (6,), (3, 4)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_ranks_equal_one_process(sizes: tuple[int, ...], shape: tuple[int, ...], affine: bool) -> None:
    alone = two_calls((sum(sizes),), shape, affine, 3.0)
    found = run_ranks(len(sizes), two_calls, sizes, shape, affine, 3.0)
    for kind, tolerance in (("outputs", 1e-5), ("inputs", 1e-4)):
        for call in range(2):
            joined = torch.cat([one[kind][call] for one in found])
            torch.testing.assert_close(joined, alone[kind][call], rtol=tolerance, atol=tolerance)
    for number, expected in enumerate(alone["weights"]):
        total = torch.stack([one["weights"][number] for one in found]).sum(0)  # averaged over ranks by DDP
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([one["calm"] for one in found]), alone["calm"], rtol=1e-5, atol=1e-5)
    for one in found:
        for name, buffer in alone["buffers"].items():
            torch.testing.assert_close(one["buffers"][name], buffer, rtol=1e-5, atol=1e-6)
            assert torch.equal(one["buffers"][name], found[0]["buffers"][name]), "ranks agree to the bit"


def test_a_large_mean_costs_no_accuracy() -> None:
    """Sums of squares in float32 would leave nothing of a variance of 4 beside a mean of 10,000."""
    alone = two_calls((8,), (6,), True, 1e4)
    found = run_ranks(2, two_calls, (3, 5), (6,), True, 1e4)
    # Float32 holds 1e4 to 1e-3: what differs is the rounding of the means, by about 1e-3 / 2 standard deviations.
    torch.testing.assert_close(
        torch.cat([one["outputs"][0] for one in found]), alone["outputs"][0], rtol=2e-3, atol=2e-3
    )


def gradient_check() -> bool:
    """Against numerical differences, of the loss of both ranks, in float64."""
    norm, rank = ours().double(), distributed.rank()
    whole = rows(6, CHANNELS, 2).double()
    weights = rows(6, CHANNELS, 2, seed=1).double()

    def loss(values: Tensor) -> Tensor:
        part = parts_of(values, (4, 2))[rank]
        return (norm(part).sin() * parts_of(weights, (4, 2))[rank]).sum()

    x = whole.clone().requires_grad_()
    loss(x).backward()
    for place in ((0, 0, 0), (2, 3, 1), (4, 1, 0), (5, 4, 1)):
        above, below = whole.clone(), whole.clone()
        above[place] += 1e-5
        below[place] -= 1e-5
        with torch.no_grad():
            numerical = (distributed.total(loss(above)) - distributed.total(loss(below))) / 2e-5
        assert x.grad is not None
        exact = distributed.total(x.grad[place])  # the rank that has the row gives it, the other gives 0
        torch.testing.assert_close(exact, numerical, rtol=1e-6, atol=1e-8)
    return True


def test_the_gradient_is_that_of_all_ranks_losses() -> None:
    assert run_ranks(2, gradient_check) == [True, True]


def counted() -> tuple[list[int], list[int]]:
    norm, x = ours(), rows(4, CHANNELS).requires_grad_()
    counts = []
    for training in (True, False):
        with CommDebugMode() as forward:
            y = norm.train(training)(x)
        with CommDebugMode() as backward:
            y.sum().backward()
        counts.append([forward.get_total_counts(), backward.get_total_counts()])
    return counts[0], counts[1]


def test_one_collective_each_way_and_none_in_evaluation() -> None:
    assert run_ranks(2, counted) == [([1, 1], [0, 0])] * 2


def half_precision() -> tuple[Tensor, Tensor, torch.dtype]:
    """Input and weights in bf16, as FSDP gathers them; statistics are float32's."""
    norm, rank = ours(), distributed.rank()
    x = parts_of(rows(64, CHANNELS, 8).bfloat16(), (24, 40))[rank].requires_grad_()
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    y = norm(x)
    y.float().square().sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    assert y.dtype == x.grad.dtype == norm.weight.grad.dtype == torch.bfloat16
    return y.detach().float(), norm.running_mean.clone(), norm.running_mean.dtype  # type: ignore[union-attr]


def test_half_precision_keeps_statistics_in_float32() -> None:
    first, second = run_ranks(2, half_precision)
    norm = ours()
    expected = norm(rows(64, CHANNELS, 8).bfloat16().float())
    torch.testing.assert_close(torch.cat([first[0], second[0]]), expected.detach(), rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(first[1], norm.running_mean, rtol=1e-6, atol=1e-6)
    assert first[2] == torch.float32


# -- running statistics ------------------------------------------------------------------------------------------------


def spoilt(sizes: Sequence[int]) -> list[Tensor]:
    norm, rank = ours(), distributed.rank()
    norm(parts_of(rows(8, CHANNELS), sizes)[rank])
    before = [buffer.clone() for buffer in norm.buffers()]
    bad = rows(8, CHANNELS, seed=1)
    bad[-1, 2] = torch.inf
    assert not norm(parts_of(bad, sizes)[rank]).isfinite().all(), "the loss shows it, on every rank"
    return [after - value for after, value in zip(norm.buffers(), before, strict=True)]


@pytest.mark.parametrize("sizes", [(8,), (6, 2)], ids=["alone", "ranks"])
def test_values_that_are_not_finite_leave_no_trace(sizes: tuple[int, ...]) -> None:
    for mean, variance, count in [spoilt(sizes)] if len(sizes) == 1 else run_ranks(2, spoilt, sizes):
        assert not mean.any() and not variance.any() and count == 1


def test_what_cannot_be_normalised_is_said() -> None:
    with pytest.raises(ConfigError, match="batch norm while training needs more than one view or frame .* batch_size"):
        ours()(rows(1, CHANNELS))
    assert ours()(rows(0, CHANNELS)).shape == (0, CHANNELS), "a batch without masked tokens"
    assert ours().eval()(rows(1, CHANNELS)).isfinite().all()


def test_it_is_known_as_batch_norm() -> None:
    """Recomputation would move running statistics twice, and a teacher has to say how it gets its own."""
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), ours())])
    assert has_batch_norm(network) and not has_batch_norm(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="recompute: networks.student has batch norm in its blocks"):
        recompute_blocks({"student": network})
    assert has_batch_norm(copy.deepcopy(network))
