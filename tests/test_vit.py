"""The vision transformer against written-out references: tokens, masks, positions, drop path, several resolutions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_platform.backbones import Features, Input
from ssl_platform.backbones._positions import interpolate_positions
from ssl_platform.backbones.vit import Config, VisionTransformer
from ssl_platform.config import ConfigError, validate
from ssl_platform.patch_embed import GridPatchEmbed, Tokens


def make_vit(**changes: Any) -> VisionTransformer:
    """A small network whose LayerScale and tokens are large enough to matter."""
    arguments: dict[str, Any] = {
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "hidden_dim": 40,
        "num_registers": 2,
        "layer_scale": 0.5,
    }
    torch.manual_seed(0)
    vit = VisionTransformer(GridPatchEmbed(3, 24, (4, 4), (4, 4)), (4, 4), **(arguments | changes))
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "token" in name or "bias" in name or "gamma" in name:
                parameter += torch.randn_like(parameter) * 0.3
    return vit


def images(num_views: int, batch: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(num_views, batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def masks_of(shape: tuple[int, ...], seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


# -- one view at a time, head by head, in float64 ---------------------------------------------------------------------


def attention_branch(block: nn.Module, x: Tensor, num_heads: int = 3) -> Tensor:
    """What the attention adds to the tokens (N, D) of one view, LayerScale written out."""
    p, dim = dict(block.named_parameters()), x.shape[-1]
    normed = F.layer_norm(x, (dim,), p["norm1.weight"], p["norm1.bias"], 1e-6)
    qkv = normed @ p["attn.qkv.weight"].T + p.get("attn.qkv.bias", 0)
    heads = []
    for head in range(num_heads):
        at = slice(head * dim // num_heads, (head + 1) * dim // num_heads)
        q, k, v = (qkv[:, part * dim : (part + 1) * dim][:, at] for part in range(3))
        heads.append((q @ k.T / math.sqrt(dim // num_heads)).softmax(-1) @ v)
    return (torch.cat(heads, -1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]) * p.get("ls1.gamma", 1)


def feed_forward_branch(block: nn.Module, x: Tensor) -> Tensor:
    """What the feed-forward part adds to the tokens (N, D) of one view."""
    p, dim = dict(block.named_parameters()), x.shape[-1]
    normed = F.layer_norm(x, (dim,), p["norm2.weight"], p["norm2.bias"], 1e-6)
    hidden = normed @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    if hidden.shape[-1] == 2 * p["mlp.fc2.weight"].shape[-1]:
        gate, value = hidden.chunk(2, -1)
        hidden = gate * torch.sigmoid(gate) * value
    else:
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return (hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]) * p.get("ls2.gamma", 1)


def reference_tokens(vit: VisionTransformer, image: Tensor, mask: Tensor | None, hide: str = "token") -> Tensor:
    """The tokens (1 + R + N, D) of one image at the native grid before the first block."""
    patches = F.conv2d(image[None], vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=4)[0].flatten(1).T
    if mask is not None and hide == "token":
        patches = torch.stack([vit.mask_token[0] if hidden else row for row, hidden in zip(patches, mask, strict=True)])
    patches = patches + vit.pos_embed[0, 1:]
    if mask is not None and hide == "drop":
        patches = torch.stack([row for row, hidden in zip(patches, mask, strict=True) if not hidden])
    parts = [vit.cls_token[0] + vit.pos_embed[0, :1], patches]
    return torch.cat([parts[0], vit.reg_token[0], parts[1]] if vit.reg_token is not None else parts)


def reference(vit: VisionTransformer, image: Tensor, mask: Tensor | None = None, hide: str = "token") -> list[Tensor]:
    """The tokens after each block, and normalised at the end."""
    x, after = reference_tokens(vit, image, mask, hide), []
    for block in vit.blocks:
        x = x + attention_branch(block, x)
        x = x + feed_forward_branch(block, x)
        after.append(x)
    return [*after, F.layer_norm(x, x.shape[-1:], vit.norm.weight, vit.norm.bias, 1e-6)]


def check_tokens(features: Features, at: tuple[int, ...], expected: Tensor, num_registers: int) -> None:
    torch.testing.assert_close(features.cls[at], expected[0])
    torch.testing.assert_close(features.patches[at], expected[1 + num_registers :])
    if num_registers:
        assert features.registers is not None
        torch.testing.assert_close(features.registers[at], expected[1 : 1 + num_registers])
    else:
        assert features.registers is None


VARIANTS = [{}, {"swiglu": True}, {"num_registers": 0}, {"layer_scale": None}, {"qkv_bias": False}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_token_equals_the_reference(changes: dict[str, Any]) -> None:
    vit, views = make_vit(**changes).double(), images(2, 3, 16).double()
    (features,) = vit([Input(views, layers=(2, 0))])
    assert features.cls.shape == (2, 3, 24) and features.patches.shape == (2, 3, 16, 24)
    for v in range(2):
        for b in range(3):
            expected = reference(vit, views[v, b])
            check_tokens(features, (v, b), expected[-1], vit.num_registers)
            for (cls, patches), layer in zip(features.layers, (2, 0), strict=True):
                torch.testing.assert_close(cls[v, b], expected[layer][0])
                torch.testing.assert_close(patches[v, b], expected[layer][1 + vit.num_registers :])


def test_masked_tokens_are_replaced_before_positions_are_added_once_for_each_mask() -> None:
    vit, views, masks = make_vit().double(), images(2, 3, 16).double(), masks_of((2, 2, 3, 16))
    (features,) = vit([Input(views, masks, layers=(1,))])
    assert features.cls.shape == (2, 2, 3, 24) and features.layers[0][1].shape == (2, 2, 3, 16, 24)
    for v, m, b in [(v, m, b) for v in range(2) for m in range(2) for b in range(3)]:
        expected = reference(vit, views[v, b], masks[v, m, b])
        check_tokens(features, (v, m, b), expected[-1], 2)
        torch.testing.assert_close(features.layers[0][0][v, m, b], expected[1][0])


def test_dropped_tokens_are_left_out_and_the_visible_ones_named() -> None:
    vit, views = make_vit().double(), images(2, 2, 16).double()
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(2, 3, 2, 16, generator=generator).argsort(-1) < 9
    (features,) = vit([Input(views, masks, mode="drop")])
    assert features.visible is not None and features.visible.shape == (2, 3, 2, 7)
    assert features.patches.shape == (2, 3, 2, 7, 24)
    for v, m, b in [(v, m, b) for v in range(2) for m in range(3) for b in range(2)]:
        assert features.visible[v, m, b].tolist() == [n for n in range(16) if not masks[v, m, b, n]]
        check_tokens(features, (v, m, b), reference(vit, views[v, b], masks[v, m, b], "drop")[-1], 2)


def test_dropping_different_numbers_of_tokens_is_refused() -> None:
    with pytest.raises(AssertionError, match="same number of tokens"):
        make_vit()([Input(images(1, 3, 16), masks_of((1, 1, 3, 16)), mode="drop")])


def test_empty_masks_change_nothing() -> None:
    vit, views = make_vit().eval(), images(1, 2, 16)
    masked, plain = vit([Input(views, torch.zeros(1, 1, 2, 16, dtype=torch.bool)), Input(views)])
    assert torch.equal(masked.cls[:, 0], plain.cls) and torch.equal(masked.patches[:, 0], plain.patches)


def test_a_sub_network_is_refused() -> None:
    with pytest.raises(ValueError, match="'vit' has no sub-networks, so arch must be None"):
        make_vit()([Input(images(1, 1, 16), arch={"depth": 2})])


class PointEmbed(nn.Module):
    """Tokens without a grid: they bring positions and coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.content, self.position = nn.Linear(3, 24), nn.Linear(3, 24)

    def forward(self, points: Tensor) -> Tokens:
        return Tokens(self.content(points), None, self.position(points), points)


def test_tokens_without_a_grid_keep_their_coordinates() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(PointEmbed(), None, embed_dim=24, depth=1, num_heads=3, hidden_dim=48, layer_scale=1.0)
    assert "pos_embed" not in dict(vit.named_parameters())
    points = torch.randn(2, 3, 5, 3)
    masks = masks_of((2, 2, 3, 5))
    plain, masked = vit([Input(points), Input(points, masks)])
    assert torch.equal(plain.positions, points) and torch.equal(masked.positions, points)
    order = torch.tensor([3, 0, 4, 1, 2])
    (shuffled,) = vit([Input(points[:, :, order], masks[..., order])])
    torch.testing.assert_close(shuffled.patches, masked.patches[..., order, :])
    assert not torch.allclose(masked.patches[0, 0], plain.patches[0])


# -- several resolutions, drop path -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["uniform", "linear"])
def test_packed_equals_separate_bit_for_bit(schedule: Any) -> None:
    rates = Config(depth=3, drop_path=0.4, drop_path_schedule=schedule).drop_path_rates
    vit = make_vit(drop_path=rates).train()
    inputs = [Input(images(2, 4, 16), masks_of((2, 1, 4, 16))), Input(images(3, 4, 8)), Input(images(1, 4, 20))]
    torch.manual_seed(5)
    packed = vit(inputs)
    torch.manual_seed(5)
    separate = [vit([item])[0] for item in inputs]
    for ours, theirs in zip(packed, separate, strict=True):
        assert torch.equal(ours.cls, theirs.cls) and torch.equal(ours.patches, theirs.patches)
        assert torch.equal(ours.registers, theirs.registers)
    assert not torch.equal(vit(inputs)[0].cls, packed[0].cls)


def test_without_drop_path_no_random_number_is_drawn() -> None:
    for vit in (make_vit(drop_path=[0.5] * 3).eval(), make_vit().train()):
        before = torch.get_rng_state()
        vit([Input(images(2, 2, 16))])
        assert torch.equal(before, torch.get_rng_state())


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), rate=st.floats(0.01, 0.99))
def test_the_number_of_kept_rows_is_fixed_and_each_is_kept_once(rows: int, rate: float) -> None:
    vit = make_vit(drop_path=[0.0, rate, rate])
    first, *others = vit._draw_rows(rows, torch.device("cpu"))
    assert first is None
    for drawn in others:
        assert drawn is not None
        for kept in drawn:
            assert len(kept) == max(int(rows * (1 - rate)), 1) == len(set(kept.tolist()))
            assert set(kept.tolist()) <= set(range(rows))


def drop_path_reference(vit: VisionTransformer, x: Tensor) -> Tensor:
    """Row by row: a row that is not kept passes unchanged, a kept one adds its branch times rows / kept."""
    for block, drawn in zip(vit.blocks, vit._draw_rows(len(x), x.device), strict=True):
        assert drawn is not None
        for branch, kept in zip((attention_branch, feed_forward_branch), drawn, strict=True):
            rows = list(x)
            for row in kept.tolist():
                rows[row] = x[row] + branch(block, x[row]) * (len(x) / len(kept))
            x = torch.stack(rows)
    return F.layer_norm(x, x.shape[-1:], vit.norm.weight, vit.norm.bias, 1e-6)


def test_drop_path_values_and_gradients_equal_the_row_by_row_reference() -> None:
    vit, views = make_vit(drop_path=[0.5] * 3).double().train(), images(1, 5, 16).double()
    torch.manual_seed(7)
    (features,) = vit([Input(views)])
    torch.manual_seed(7)
    expected = drop_path_reference(vit, torch.stack([reference_tokens(vit, image, None) for image in views[0]]))
    torch.testing.assert_close(features.cls[0], expected[:, 0])
    torch.testing.assert_close(features.patches[0], expected[:, 3:])
    parameters = [p for name, p in vit.named_parameters() if name != "mask_token"]
    weight = torch.randn(24, dtype=torch.float64)
    ours = torch.autograd.grad(
        (features.patches[0] @ weight).square().sum() + (features.cls @ weight).sum(), parameters
    )
    loss = (expected[:, 3:] @ weight).square().sum() + (expected[:, 0] @ weight).sum()
    for mine, theirs in zip(ours, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_drop_path_keeps_the_expectation() -> None:
    vit, views = make_vit(depth=1, drop_path=[0.4]).double(), images(1, 5, 16).double()
    tokens = torch.stack([reference_tokens(vit, image, None) for image in views[0]])
    branch = torch.stack([attention_branch(vit.blocks[0], x) for x in tokens])
    vit.blocks[0].mlp.fc2.weight.data.zero_()
    vit.blocks[0].mlp.fc2.bias.data.zero_()
    torch.manual_seed(0)
    draws = [vit.train()([Input(views, layers=(0,))])[0].layers[0][0][0] for _ in range(400)]
    error = (torch.stack(draws).mean(0) - (tokens + branch)[:, 0]).abs().max()
    assert error < 0.15 * branch[:, 0].abs().max()


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    vit, inputs = make_vit(drop_path=[0.5] * 3).train(), [Input(images(2, 3, 16)), Input(images(2, 3, 8))]

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        loss = sum(features.cls.square().sum() + features.patches.sum() for features in vit(inputs))
        return list(torch.autograd.grad(loss, [p for n, p in vit.named_parameters() if n != "mask_token"]))

    plain = gradients()
    for block in vit.blocks:
        original = block.forward
        block.forward = lambda *args, original=original: checkpoint(original, *args, use_reentrant=False)
    for mine, theirs in zip(gradients(), plain, strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_stays_close_to_float32() -> None:
    vit, inputs = make_vit().eval(), [Input(images(2, 2, 16), masks_of((2, 1, 2, 16))), Input(images(1, 2, 8))]
    exact = vit(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vit(inputs)
    for mine, theirs in zip(rounded, exact, strict=True):
        assert mine.cls.dtype == torch.float32
        assert F.cosine_similarity(mine.patches, theirs.patches, dim=-1).min() > 0.999


# -- patches and positions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "size"), [((4,), (12,)), ((2, 4), (6, 12)), ((2, 4, 2), (4, 8, 6))], ids=str)
def test_patch_embedding_equals_the_convolution(patch: tuple[int, ...], size: tuple[int, ...]) -> None:
    grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    embed = GridPatchEmbed(3, 8, patch, grid).double()
    views = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens = embed(views)
    torch.testing.assert_close(tokens.content, embed.proj(views).flatten(2).mT)
    assert tokens.grid == grid and {name for name, _ in embed.named_parameters()} == {"proj.weight", "proj.bias"}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 18), r"view size \(16, 18\) is not a multiple of the patch size \(4, 4\); choose a size that is"),
        (
            (1, 4, 16, 16),
            r"views of shape \(1, 4, 16, 16\): this patch embedding takes \(batch, 3 channels, size x size\)",
        ),
        ((1, 3, 16), "this patch embedding takes"),
    ],
)
def test_views_that_do_not_fit_the_patches_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GridPatchEmbed(3, 8, (4, 4), (4, 4))(torch.zeros(shape))


@pytest.mark.parametrize("grid", [(6, 6), (20, 13), (14, 14)], ids=str)
def test_timm_convention_equals_timm(grid: tuple[int, int]) -> None:
    positions = torch.randn(1, 196, 8)
    expected = resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=0)
    torch.testing.assert_close(interpolate_positions(positions, (14, 14), grid, "timm"), expected)


def cubic_weight(distance: float) -> float:
    """The cubic convolution kernel (Keys 1981) with torch's a = -0.75."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def cubic_matrix(old: int, new: int, offset: float) -> Tensor:
    """(new, old): bicubic sampling of one axis by the scale factor (new + offset) / old, edges repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        at = (i + 0.5) * old / (new + offset) - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[i, min(max(tap, 0), old - 1)] += cubic_weight(at - tap)
    return weights


@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_dinov2_convention_equals_a_written_out_bicubic(offset: float) -> None:
    positions = torch.randn(1, 7 * 5, 3)
    ours = interpolate_positions(positions, (7, 5), (4, 9), "dinov2", offset)
    rows, columns = cubic_matrix(7, 4, offset), cubic_matrix(5, 9, offset)
    expected = torch.einsum("ih,jw,hwd->ijd", rows, columns, positions.double()[0].view(7, 5, 3)).flatten(0, 1)
    torch.testing.assert_close(ours[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_one_and_three_axes_are_interpolated_axis_by_axis() -> None:
    line, volume = torch.randn(1, 9, 3), torch.randn(1, 4 * 6 * 5, 3)
    torch.testing.assert_close(
        interpolate_positions(line, (9,), (5,))[0].double(),
        cubic_matrix(9, 5, 0.1) @ line[0].double(),
        atol=1e-5,
        rtol=1e-5,
    )
    matrices = [cubic_matrix(4, 2, 0.1), cubic_matrix(6, 3, 0.1), cubic_matrix(5, 7, 0.1)]
    expected = torch.einsum("at,bh,cw,thwd->abcd", *matrices, volume.double().view(4, 6, 5, 3)).reshape(-1, 3)
    ours = interpolate_positions(volume, (4, 6, 5), (2, 3, 7))
    torch.testing.assert_close(ours[0].double(), expected, atol=1e-5, rtol=1e-5)
    unchanged = interpolate_positions(volume, (4, 6, 5), (4, 3, 5), "timm")
    assert unchanged.shape == (1, 60, 3)


def test_the_native_grid_is_read_as_it_is() -> None:
    positions = torch.randn(1, 12, 3)
    assert interpolate_positions(positions, (3, 4), (3, 4)) is positions


# -- configuration and parameters -------------------------------------------------------------------------------------


def test_initialisation_is_dinov2s() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(
        GridPatchEmbed(3, 192, (8, 8), (8, 8)),
        (8, 8),
        embed_dim=192,
        depth=2,
        num_heads=3,
        hidden_dim=768,
        num_registers=4,
    )
    values = dict(vit.named_parameters())
    for name in ("pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"):
        assert values[name].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("cls_token", "reg_token"):
        assert values[name].std().item() == pytest.approx(1e-6, rel=0.2)
    assert not values["mask_token"].any() and not values["blocks.0.attn.qkv.bias"].any()
    assert values["mask_token"].shape == (1, 192) and values["pos_embed"].shape == (1, 65, 192)
    assert (values["blocks.0.ls1.gamma"] == 1e-5).all()
    bound = 1 / math.sqrt(3 * 8 * 8)  # torch's default for a convolution: uniform up to 1 / sqrt(fan in)
    assert values["patch_embed.proj.weight"].abs().max() <= bound
    assert values["patch_embed.proj.weight"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_layers_for_layer_wise_decay() -> None:
    vit = make_vit()
    layers = {name: vit.layer_of(name) for name, _ in vit.named_parameters()}
    assert {
        layers[name] for name in ("cls_token", "pos_embed", "reg_token", "mask_token", "patch_embed.proj.bias")
    } == {0}
    assert layers["blocks.0.attn.qkv.weight"] == 1 and layers["blocks.2.ls2.gamma"] == 3
    assert layers["norm.weight"] == 4 == vit.num_layers + 1


def test_drop_path_schedules() -> None:
    assert Config(depth=3, drop_path=0.3).drop_path_rates == [0.3, 0.3, 0.3]
    assert Config(depth=3, drop_path=0.3, drop_path_schedule="linear").drop_path_rates == pytest.approx([0, 0.15, 0.3])
    assert Config(depth=1, drop_path=0.3, drop_path_schedule="linear").drop_path_rates == [0]


def test_hidden_width_of_swiglu_is_dinov2s() -> None:
    assert Config(embed_dim=1536, num_heads=24, ffn="swiglu").hidden_dim == 4096
    assert Config(embed_dim=384, ffn="swiglu").hidden_dim == 1024
    assert Config(embed_dim=384).hidden_dim == 1536


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"embed_dim": 100}, "embed_dim 100 is not a multiple of num_heads 6"),
        ({"drop_path": 1.0}, "drop_path: input should be less than 1, got 1.0"),
        ({"ffn": "relu"}, "ffn: input should be 'mlp' or 'swiglu', got \"relu\""),
        ({"dept": 3}, "dept: unknown key; did you mean 'depth'?"),
        ({"position": {"ofset": 0}}, "position.ofset: unknown key; did you mean 'offset'?"),
    ],
)
def test_wrong_settings_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Config, {"name": "vit", **section})
    assert error.value.lines == [message]
