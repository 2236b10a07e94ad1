"""Attention of several groups: every backend against softmax written out, and what is said where one cannot run."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_platform.backbones import Input, _attention
from ssl_platform.backbones._attention import Heads, Lengths, attention
from ssl_platform.config import ConfigError, validate
from ssl_platform.step import train_step
from tests import engine
from tests.test_vit import images, make_vit, masks_of

SHAPES = ((3, 5), (1, 1), (4, 2), (2, 5))


def groups_of(
    shapes: tuple[tuple[int, int], ...], head_dim: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Heads]:
    """Queries, keys and values with 2 heads, as strided views of one tensor each, as a block makes them."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(rows, length, 3, 2, head_dim, generator=generator) for rows, length in shapes]
    return [Heads(*each.to(device, dtype).requires_grad_().unbind(2)) for each in qkv]


def written_out(heads: Heads) -> Tensor:
    """Row by row and head by head."""
    rows = []
    for q, k, v in zip(*heads, strict=True):  # (N, heads, d)
        each = [(q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5).softmax(-1) @ v[:, h] for h in range(q.shape[1])]
        rows.append(torch.cat(each, -1))
    return torch.stack(rows)


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """A packed backend in plain torch: one attention over all tokens, with a mask of blocks made of the boundaries."""
    boundaries = lengths.boundaries(q.device)
    row = torch.bucketize(torch.arange(len(q)), boundaries, right=True)
    sizes = boundaries.diff()
    assert int(boundaries[-1]) == len(q) and int(sizes.max()) == lengths.longest
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=row[:, None] == row[None, :])
    return mixed[0].transpose(0, 1)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`varlen` is the plain torch version, and runs anywhere."""
    monkeypatch.setitem(_attention.PACKED, "varlen", dense)
    monkeypatch.setattr(_attention, "check", lambda *_: None)


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_values_and_gradients_equal_the_loop(backend: Any, packed: None) -> None:
    ours, theirs = groups_of(SHAPES), groups_of(SHAPES)
    found = attention(ours, backend)
    expected = [written_out(group) for group in theirs]
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference)
    weights = [torch.randn_like(each) for each in expected]
    for outputs in (found, expected):
        sum((w * each).sum() for w, each in zip(weights, outputs, strict=True)).backward()  # type: ignore[union-attr]
    for group, other in zip(ours, theirs, strict=True):
        assert group.q._base is not None and other.q._base is not None
        torch.testing.assert_close(group.q._base.grad, other.q._base.grad)


def test_boundaries() -> None:
    assert Lengths(((2, 3), (1, 4))).boundaries(torch.device("cpu")).tolist() == [0, 3, 6, 10]
    assert Lengths(((2, 3), (1, 4))).boundaries(torch.device("cpu")).dtype == torch.int32


def test_a_network_is_the_same_under_a_packed_backend(packed: None) -> None:
    """Several resolutions, masks and drop path: the block hands the kept rows of all groups to one call."""
    inputs = [Input(images(2, 4, 16), masks_of((2, 1, 4, 16))), Input(images(3, 4, 8))]
    results = []
    for backend in ("sdpa", "varlen"):
        vit = make_vit(drop_path=[0.4] * 3, attention=backend).double().train()
        torch.manual_seed(5)
        outputs = vit([item._replace(views=item.views.double()) for item in inputs])
        sum(each.cls.square().sum() + each.patches.sum() for each in outputs).backward()  # type: ignore[union-attr]
        results.append((outputs, {name: p.grad for name, p in vit.named_parameters()}))
    (first, gradients), (second, others) = results
    for mine, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(mine.cls, theirs.cls)
        torch.testing.assert_close(mine.patches, theirs.patches)
    torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_packed_backends_are_refused_on_the_cpu(backend: str) -> None:
    student = {"backbone": engine.VIT | {"attention": backend}}
    parts = engine.parts(networks={"student": student, "teacher": {"update": "ema", "of": "student"}})
    with pytest.raises(
        ValueError, match=f"attention: {backend} runs on CUDA only, and this runs on cpu; choose attention: sdpa"
    ):
        train_step(parts, iter([engine.batch()]), 0, ["dino"])


def test_half_precision_and_unknown_backends_are_told() -> None:
    with pytest.raises(ValueError, match="varlen takes half precision only, not torch.float32: set precision: bf16"):
        _attention.check("varlen", torch.device("cuda"), torch.float32)
    _attention.check("xformers", torch.device("cuda"), torch.float32)
    from ssl_platform.backbones.vit import Config

    with pytest.raises(
        ConfigError, match="attention: input should be 'auto', 'sdpa', 'varlen' or 'xformers', got \"flash\""
    ):
        validate(Config, {"name": "vit", "attention": "flash"})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_packed_backends_equal_sdpa_on_cuda(backend: Any) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers")
    shapes = ((6, 197), (9, 37), (2, 1))
    found = [groups_of(shapes, 64, torch.bfloat16, "cuda") for _ in range(2)]
    results = [attention(found[0], "sdpa"), attention(found[1], backend)]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    for outputs in results:
        sum(each.float().square().sum() for each in outputs).backward()  # type: ignore[union-attr]
    for group, other in zip(*found, strict=True):
        assert group.q._base is not None and other.q._base is not None
        torch.testing.assert_close(group.q._base.grad, other.q._base.grad, rtol=5e-2, atol=5e-2)
