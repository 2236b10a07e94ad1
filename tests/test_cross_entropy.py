"""Cross-entropy and entropy against written-out float64 references, by chunks and as a Triton kernel."""

import importlib.util
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ssl_platform.objectives import _cross_entropy
from ssl_platform.objectives._cross_entropy import cross_entropy, entropy


def reference(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return -(targets * (logits / temperature).log_softmax(-1)).sum(-1)


def example(mass: int = 1, rows: int = 6, prototypes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and targets in float64, and a weight for each row."""
    generator = torch.Generator().manual_seed(1)
    logits, *others = torch.randn(1 + mass, rows, prototypes, generator=generator, dtype=torch.float64)
    targets = torch.stack([other.softmax(-1) for other in others]).sum(0)
    return logits.requires_grad_(), targets, torch.rand(rows, generator=generator, dtype=torch.float64)


@pytest.fixture(params=[1, 7, 1 << 18])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(_cross_entropy.CHUNK_ELEMENTS, "cpu", request.param)
    return int(request.param)


@pytest.mark.parametrize("mass", [1, 2])
@pytest.mark.parametrize("reuse", [False, True])
def test_float64_equals_the_reference_to_1e_12(mass: int, reuse: bool, chunk: int) -> None:
    logits, targets, weights = example(mass)
    expected = reference(logits, targets, 0.1)
    [expected_gradient] = torch.autograd.grad((expected * weights).sum(), logits)
    rows = cross_entropy(logits, targets.clone(), 0.1, mass, reuse_targets=reuse)
    [gradient] = torch.autograd.grad((rows * weights).sum(), logits)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reuse", [False, True])
def test_gradcheck(reuse: bool, chunk: int) -> None:
    logits, targets, _ = example(2)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets.clone(), 0.5, 2, reuse_targets=reuse), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype, chunk: int) -> None:
    logits, targets, weights = (tensor.detach() for tensor in example())
    logits, targets = logits.to(dtype), targets.float()
    wanted = logits.double().requires_grad_()
    expected = reference(wanted, targets.double(), 0.1)
    (expected * weights).sum().backward()
    ours = logits.clone().requires_grad_()
    rows = cross_entropy(ours, targets, 0.1)
    (rows * weights.float()).sum().backward()
    assert rows.dtype == torch.float32 and ours.grad is not None and ours.grad.dtype == dtype
    torch.testing.assert_close(rows.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert wanted.grad is not None
    torch.testing.assert_close(
        ours.grad.double(), wanted.grad, rtol=1e-4 if dtype == torch.float32 else 8e-3, atol=1e-5
    )


def test_a_graph_that_is_kept_gives_the_same_gradient_twice() -> None:
    logits, targets, weights = example()
    loss = (cross_entropy(logits, targets, 0.1, reuse_targets=True) * weights).sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=kept)[0].clone() for kept in (True, False))
    assert torch.equal(first, second)


def test_targets_stay_unless_their_memory_is_given_away() -> None:
    logits, targets, _ = example()
    before = targets.clone()
    cross_entropy(logits, targets, 0.1).sum().backward()
    assert torch.equal(targets, before)
    with torch.no_grad():
        cross_entropy(logits, targets, 0.1, reuse_targets=True)
    assert torch.equal(targets, before), "without a gradient there is nothing to keep"
    cross_entropy(logits, targets, 0.1, reuse_targets=True)
    torch.testing.assert_close(targets, (logits / 0.1).softmax(-1).detach() - before)


def test_only_the_differences_are_kept() -> None:
    """One (rows, K) tensor between forward and backward, and none if the targets' memory is taken."""
    logits, targets, _ = example()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for reuse in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            cross_entropy(logits, targets, 0.1, reuse_targets=reuse)
    assert [tensor.shape for tensor in kept] == [targets.shape] * 2
    assert [tensor.data_ptr() == targets.data_ptr() for tensor in kept] == [False, True]


def test_numbers_that_overflow_and_no_rows() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    rows = cross_entropy(logits, targets, 0.1)
    assert rows.tolist() == pytest.approx([0.0, math.log(3)])
    rows.sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert torch.isnan(cross_entropy(torch.tensor([[float("nan"), 0.0]]), torch.tensor([[0.5, 0.5]]), 0.1)).all()
    assert cross_entropy(torch.zeros(0, 3), torch.zeros(0, 3), 0.1).shape == (0,)


def test_cross_entropy_is_entropy_plus_divergence() -> None:
    logits, targets = torch.randn(4, 16), torch.rand(4, 16).softmax(-1)
    divergence = (targets * (targets.log() - (logits / 0.1).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, targets, 0.1).mean(), entropy(targets) + divergence)


def test_entropy_equals_torchs_and_knows_zeros(chunk: int) -> None:
    targets = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 60).softmax(-1)
    targets[0, 0] = torch.tensor([0.0, 1, 0, 0, 0])
    torch.testing.assert_close(entropy(targets), torch.special.entr(targets).sum(-1).mean())
    assert entropy(targets[0, :1]).item() == 0
    assert torch.isnan(entropy(torch.zeros(0, 5)))


# -- the Triton kernel -------------------------------------------------------------------------------------------------


def compare_kernel(device: str) -> None:
    """The kernel against the torch version: several blocks of prototypes, a tail, every dtype and mass."""
    from ssl_platform.objectives import _cross_entropy_triton as kernel

    for prototypes in (5, 4096, 9001):
        for dtype in (torch.float32, torch.bfloat16):
            for mass in (1, 2):
                logits, targets, _ = (tensor.detach() for tensor in example(mass, 3, prototypes))
                logits, targets = logits.to(device, dtype), targets.to(device, torch.float32)
                ours, theirs = torch.empty_like(targets), torch.empty_like(targets)
                rows = kernel.row_losses(logits, targets, 0.1, mass, ours)
                expected = _cross_entropy._by_chunks(logits, targets, 0.1, mass, theirs)
                torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(kernel.row_losses(logits, targets, 0.1, mass, None), rows)
                kernel.row_losses(logits, targets, 0.1, mass, targets)
                assert torch.equal(targets, ours), "in the memory of the targets"
    assert kernel.row_losses(logits[:0], targets[:0], 0.1, 1, None).shape == (0,)


@pytest.mark.gpu
def test_kernel_equals_torch_on_cuda() -> None:
    compare_kernel("cuda")
    logits = torch.randn(4, 7, device="cuda", requires_grad=True)
    cross_entropy(logits, torch.rand(4, 7, device="cuda").softmax(-1), 0.1).sum().backward()
    assert _cross_entropy._row_losses(logits) is not _cross_entropy._by_chunks


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with CUDA builds of torch")
def test_kernel_equals_torch_in_tritons_interpreter() -> None:
    """The kernel's arithmetic, without a GPU; the interpreter is chosen when Triton is imported, hence a process."""
    command = [sys.executable, "-c", "from tests.test_cross_entropy import compare_kernel; compare_kernel('cpu')"]
    found = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, ["gcc"]),
        PermissionError(13, "cache"),
    ],
)
def test_where_triton_cannot_compile_torch_takes_over(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def row_losses(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(_cross_entropy.logger, "propagate", True)  # a run switches it off
    kernel = SimpleNamespace(row_losses=row_losses)
    monkeypatch.setitem(sys.modules, "ssl_platform.objectives._cross_entropy_triton", kernel)  # type: ignore[arg-type]
    assert _cross_entropy._triton.__wrapped__(torch.device("cpu")) is None
    assert str(error).partition("\n")[0] in caplog.text and "apt install gcc python3-dev" in caplog.text
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        _cross_entropy._triton.__wrapped__(torch.device("cpu"))


def test_the_cpu_takes_the_torch_version() -> None:
    assert _cross_entropy._row_losses(torch.zeros(1, 2)) is _cross_entropy._by_chunks
