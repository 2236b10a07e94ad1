"""ECAPA-TDNN and the speaker ResNet34: their parts against loops in float64, their sizes against the published ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_platform.backbones import Input, ecapa, resnet34
from ssl_platform.backbones._pooling import AttentiveStatisticsPooling, StatisticsPooling
from ssl_platform.config import ConfigError, validate
from ssl_platform.modalities import GroupSpec
from tests.probes.toy import Toy
from tests.speech import Speech


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_bins(bins: int) -> Any:
    modality = Speech()
    modality.groups = {"global": GroupSpec(2, (1, 300, bins), (300,)), "local": GroupSpec(4, (1, 200, bins), (200,))}
    return modality


@pytest.mark.parametrize(
    ("config", "millions", "pooled"),
    [
        (ecapa.Config(), 6.19, (1536, 300)),
        (ecapa.Config(channels=1024), 14.66, (1536, 300)),
        (resnet34.Config(), 6.63, (2560, 38)),
    ],
    ids=["ecapa c512", "ecapa c1024", "resnet34"],
)
def test_sizes_are_the_published_ones(config: Any, millions: float, pooled: tuple[int, int]) -> None:
    """wespeaker gives 6.19 M, 14.65 M and 6.63 M."""
    network = config.build(with_bins(80))
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    features = network.eval()([Input(torch.randn(1, 1, 1, 300, 80))])[0]
    assert features.cls.shape == (1, 1, config.embed_dim)
    assert (features.patches.shape[3], features.patches.shape[2]) == pooled and features.grid == (pooled[1],)


# -- pooling -----------------------------------------------------------------------------------------------------------


def pooled_by_loops(frames: Tensor, weights: Tensor) -> Tensor:
    """(D, T), (D, T) -> (2 D,)"""
    means, deviations = [], []
    for x, w in zip(frames.tolist(), weights.tolist(), strict=True):
        mean = sum(a * b for a, b in zip(w, x, strict=True))
        means.append(mean)
        deviations.append((sum(a * (b - mean) ** 2 for a, b in zip(w, x, strict=True)) + 1e-8) ** 0.5)
    return torch.tensor(means + deviations, dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 9), global_context=st.booleans(), seed=st.integers(0, 99))
def test_attentive_pooling_equals_the_loops(length: int, global_context: bool, seed: int) -> None:
    torch.manual_seed(seed)
    pool = AttentiveStatisticsPooling(5, 3, global_context).double()
    frames = noise(2, 5, length, seed=seed) * 2 + 1
    found = pool(frames)
    for row in range(2):
        context = pooled_by_loops(frames[row], torch.full((5, length), 1 / length, dtype=torch.float64))
        scores = torch.empty(5, length, dtype=torch.float64)
        for t in range(length):
            seen = torch.cat([frames[row, :, t], context]) if global_context else frames[row, :, t]
            hidden = torch.tanh(pool.hidden.weight[..., 0] @ seen + pool.hidden.bias)  # type: ignore[operator]
            scores[:, t] = pool.scores.weight[..., 0] @ hidden + pool.scores.bias  # type: ignore[operator]
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        torch.testing.assert_close(found[row], pooled_by_loops(frames[row], weights))


def test_plain_pooling_is_attention_with_equal_weights() -> None:
    frames = noise(2, 5, 7)
    attentive = AttentiveStatisticsPooling(5, 3, global_context=True).double()
    torch.nn.init.zeros_(attentive.scores.weight)
    torch.nn.init.zeros_(attentive.scores.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(StatisticsPooling()(frames), attentive(frames))
    equal = torch.full((5, 7), 1 / 7, dtype=torch.float64)
    torch.testing.assert_close(StatisticsPooling()(frames)[0], pooled_by_loops(frames[0], equal))


@pytest.mark.parametrize("frames", [torch.zeros(1, 5, 4), torch.ones(1, 5, 1), torch.full((1, 5, 6), 1e4)], ids=str)
def test_pooling_of_constant_frames_has_a_gradient(frames: Tensor) -> None:
    for pool in (StatisticsPooling(), AttentiveStatisticsPooling(5, 3, True)):
        x = frames.clone().requires_grad_()
        pool(x).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        half = pool.bfloat16()(frames.bfloat16())
        assert half.dtype == torch.bfloat16 and half.isfinite().all()


# -- ECAPA's parts -----------------------------------------------------------------------------------------------------


def conv_by_loops(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """(C, T) -> (C', T), zeros beyond the ends."""
    reach = dilation * (weight.shape[2] // 2)
    result = torch.zeros(weight.shape[0], x.shape[1], dtype=x.dtype)
    for t in range(x.shape[1]):
        for k in range(weight.shape[2]):
            source = t + k * dilation - reach
            if 0 <= source < x.shape[1]:
                result[:, t] += weight[:, :, k] @ x[:, source]
    return result if bias is None else result + bias[:, None]


def conv_relu_norm(layer: Any, x: Tensor, dilation: int = 1) -> Tensor:
    """One row in evaluation mode."""
    hidden = conv_by_loops(x, layer.conv.weight, layer.conv.bias, dilation).clamp_min(0)
    scale = layer.norm.weight / (layer.norm.running_var + 1e-5).sqrt()
    return (hidden - layer.norm.running_mean[:, None]) * scale[:, None] + layer.norm.bias[:, None]


def settled(module: Any) -> Any:
    """In float64 and evaluation mode, with running statistics and affine weights that are not those of the start."""
    for number, layer in enumerate(m for m in module.modules() if isinstance(m, ecapa.BatchNorm)):
        generator = torch.Generator().manual_seed(number)
        for tensor, low in (
            (layer.weight, 0.5), (layer.bias, -1), (layer.running_mean, -1), (layer.running_var, 0.5),
        ):  # fmt: skip
            tensor.data.uniform_(low, 2, generator=generator)  # type: ignore[union-attr]
    return module.double().eval()


@settings(deadline=None, max_examples=10)
@given(scale=st.sampled_from([2, 3, 4]), dilation=st.integers(1, 4), length=st.integers(1, 9))
def test_res2_equals_the_loops(scale: int, dilation: int, length: int) -> None:
    res2 = settled(ecapa.Res2(12, scale, dilation))
    x = noise(2, 12, length)
    found = res2(x)
    width = 12 // scale
    for row in range(2):
        parts = [x[row, width * i : width * (i + 1)] for i in range(scale)]
        outputs = [parts[0], conv_relu_norm(res2.layers[0], parts[1], dilation)]
        for i in range(2, scale):
            outputs.append(conv_relu_norm(res2.layers[i - 1], parts[i] + outputs[i - 1], dilation))
        torch.testing.assert_close(found[row], torch.cat(outputs))


def test_a_block_equals_the_loops() -> None:
    torch.manual_seed(0)
    block = settled(ecapa.Block(12, 3, 2, 4))
    x = noise(2, 12, 7)
    found = block(x)
    for row in range(2):
        hidden = block.res2(conv_relu_norm(block.expand, x[row])[None])[0]
        hidden = conv_relu_norm(block.project, hidden)
        mean = hidden.sum(1) / 7
        squeeze, excite = block.squeeze_excite.squeeze, block.squeeze_excite.excite
        gates = excite.weight @ (squeeze.weight @ mean + squeeze.bias).clamp_min(0) + excite.bias
        torch.testing.assert_close(found[row], x[row] + hidden / (1 + torch.exp(-gates))[:, None])


def test_ecapa_is_its_parts_in_order() -> None:
    torch.manual_seed(0)
    config = ecapa.Config(channels=8, scale=2, pooled_channels=10, embed_dim=6, attention_dim=4)
    network = settled(config.build(Speech()))  # type: ignore[arg-type]
    views = noise(2, 3, 1, 24, 16)
    features = network([Input(views)])[0]
    x = conv_relu_norm(network.stem, views[1, 2, 0].mT)
    outputs = []
    for layer in network.layers:
        outputs.append(layer(x[None] if not outputs else outputs[-1]))
    weight, bias = network.aggregate.weight, network.aggregate.bias
    frames = conv_by_loops(torch.cat(outputs, 1)[0], weight, bias, 1).clamp_min(0)  # (10, 24)
    torch.testing.assert_close(features.patches[1, 2], frames.mT)
    embedding = network.embed_norm(network.embed(network.pool_norm(network.pool(frames[None]))))
    torch.testing.assert_close(features.cls[1, 2], embedding[0])


def test_resnet_pools_all_bins_of_all_channels() -> None:
    torch.manual_seed(0)
    network = settled(resnet34.Config(channels=2, depths=(1, 2, 1), embed_dim=6).build(with_bins(19)))
    views = noise(1, 2, 1, 21, 19)
    features = network([Input(views)])[0]
    assert network.patch_dim == 8 * 5 and features.grid == (6,)  # 19 -> 10 -> 5 bins, 21 -> 11 -> 6 frames
    x = torch.relu(network.stem(views[0]))
    for layer in network.layers:
        hidden = torch.relu(layer.first(x))
        x = torch.relu(layer.second(hidden) + (layer.shortcut(x) if hidden.shape != x.shape else x))
    assert x.shape == (2, 8, 6, 5)
    torch.testing.assert_close(features.patches[0, 1, 4].view(8, 5), x[1, :, 4])
    mean, deviation = x.mean(2).flatten(1), (x.var(2, correction=0) + 1e-8).sqrt()
    pooled = torch.stack([torch.stack([mean[r], deviation[r].flatten()]) for r in range(2)]).flatten(1)
    torch.testing.assert_close(features.cls[0], network.embed(pooled))


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [ecapa.Config(channels=8, scale=2, pooled_channels=8), resnet34.Config(channels=2, depths=(1, 1))]
)
def test_each_group_of_views_is_normalised_by_itself(config: Any) -> None:
    """All views of a group together, and not those of other groups: as DINO runs each resolution as one batch."""
    torch.manual_seed(0)
    network = config.build(Speech()).train()
    first, second = torch.randn(2, 3, 1, 24, 16), 5 * torch.randn(2, 3, 1, 16, 16) + 2
    together = network([Input(first), Input(second, group="local")])
    torch.testing.assert_close(together[0].cls, network([Input(first)])[0].cls)
    one_view = network([Input(first[:1])])[0].cls
    assert not torch.allclose(together[0].cls[:1], one_view, atol=1e-3), "the other view of the group counts"
    counts = {int(b) for name, b in network.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {4}, "each group of each call moves the running statistics once"


# -- what they refuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ecapa.Config(), resnet34.Config()], ids=["ecapa", "resnet34"])
def test_what_they_cannot_do_is_said(config: Any) -> None:
    name = config.name
    with pytest.raises(
        ValueError, match=rf"{name} takes filter banks of sound, \(1, frames, bins\), but views of 'clip'"
    ):
        config.build(Toy(("global", "clip")), "clip")
    network = config.build(Speech()).eval()
    views = torch.zeros(1, 2, 1, 16, 16)
    with pytest.raises(
        ConfigError, match=f"{name} has no mask token: ibot, and masks of dino and koleo, need .* 'vit'"
    ):
        network([Input(views, torch.zeros(1, 1, 2, 16, dtype=torch.bool))])
    with pytest.raises(ConfigError, match=f"{name} gives only its last features: layers and arch"):
        network([Input(views, layers=(1,))])
    with pytest.raises(ConfigError, match="views of 1 channel and 16 bins, but those of 'local' have 1 and 8"):
        network([Input(views[..., :8], group="local")])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"channels": 100}, "channels: 100 is no multiple of scale: 8"),
        ({"dilations": [2, 0]}, r"dilations\.1: input should be greater than or equal to 1, got 0"),
        ({"scale": 1}, "scale: "),
        ({"chanels": 8}, "chanels: unknown key; did you mean 'channels'"),
    ],
)
def test_wrong_settings_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ecapa.Config, {"name": "ecapa", **section})
