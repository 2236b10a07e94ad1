"""Rotary positions, untied norms and keys without bias against loops in float64, one token and one channel at a time."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_platform.backbones import Input
from ssl_platform.backbones._rope import Rope, coordinates, periods, rotate, rotation
from ssl_platform.backbones.vit import Config, VisionTransformer
from ssl_platform.config import ConfigError, validate
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.recipe import build_networks
from ssl_platform.student_teacher import StudentTeacher
from tests import engine
from tests.probes.toy import Toy
from tests.test_vit import feed_forward_branch, images, make_vit, masks_of

PLAIN = Rope()
AUGMENTED = Rope(shift=0.3, jitter=1.5, rescale=2.0)
WIDE = {"embed_dim": 24, "num_heads": 3, "hidden_dim": 40}  # heads of 8 channels: 2 periods for each of 2 axes


# -- the written-out reference ----------------------------------------------------------------------------------------


def turned(vector: Tensor, place: tuple[float, ...], base: float = 100.0) -> Tensor:
    """One head's query or key of the token at `place`, pair by pair."""
    half, per_axis = len(vector) // 2, len(vector) // 2 // len(place)
    result = vector.clone()
    for axis, x in enumerate(place):
        for i in range(per_axis):
            angle = 2 * math.pi * x / base ** (i / per_axis)
            pair = axis * per_axis + i
            a, b = vector[pair].item(), vector[pair + half].item()
            result[pair] = a * math.cos(angle) - b * math.sin(angle)
            result[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def attention_branch(
    block: nn.Module, x: Tensor, places: list[tuple[float, ...]], num_heads: int, front: int
) -> Tensor:
    """What the attention adds to the tokens (N, D) of one view; the first `front` are not turned."""
    p, dim = dict(block.named_parameters()), x.shape[-1]
    normed = F.layer_norm(x, (dim,), p["norm1.weight"], p["norm1.bias"], 1e-6)
    bias = p["attn.qkv.bias"].clone()
    if block.attn.mask_k_bias:
        bias[dim : 2 * dim] = 0
    qkv, heads = normed @ p["attn.qkv.weight"].T + bias, []
    for head in range(num_heads):
        at = slice(head * dim // num_heads, (head + 1) * dim // num_heads)
        q, k, v = (qkv[:, part * dim : (part + 1) * dim][:, at] for part in range(3))
        q, k = (
            torch.stack([row if n < front else turned(row, places[n - front]) for n, row in enumerate(rows)])
            for rows in (q, k)
        )
        heads.append((q @ k.T / math.sqrt(dim // num_heads)).softmax(-1) @ v)
    return (torch.cat(heads, -1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]) * p.get("ls1.gamma", 1)


def grid_places(height: int, width: int) -> list[tuple[float, float]]:
    return [(2 * (r + 0.5) / height - 1, 2 * (c + 0.5) / width - 1) for r in range(height) for c in range(width)]


def reference(vit: VisionTransformer, image: Tensor, mask: Tensor | None, mode: str, places: Any = None) -> Tensor:
    """The tokens (1 + R + N, D) of one image before the final norm."""
    patches = F.conv2d(image[None], vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=4)[0]
    places = places or grid_places(*patches.shape[1:])
    rows = list(patches.flatten(1).T)
    if mask is not None and mode == "token":
        rows = [vit.mask_token[0] if hidden else row for row, hidden in zip(rows, mask, strict=True)]
    if mask is not None and mode == "drop":
        rows, places = ([x for x, hidden in zip(xs, mask, strict=True) if not hidden] for xs in (rows, places))
    x = torch.cat([vit.cls_token[0], vit.reg_token[0], torch.stack(list(rows))])
    for block in vit.blocks:
        x = x + attention_branch(block, x, list(places), vit.num_heads, 1 + vit.num_registers)
        x = x + feed_forward_branch(block, x)
    return x


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("changes", [{}, {"mask_k_bias": True}], ids=["", "mask_k_bias"])
@pytest.mark.parametrize("mode", ["", "token", "drop"])
def test_every_token_equals_the_reference(mode: str, changes: dict[str, Any]) -> None:
    """Two resolutions, one of them no square, in one call; masks hide tokens in the first."""
    vit = make_vit(rope=PLAIN, depth=2, **changes).double()
    assert vit.pos_embed is None and not any("rope" in key for key in vit.state_dict())
    first, second = images(2, 2, 16).double(), images(1, 2, 24).double()[..., :12]
    masks = None if not mode else torch.rand(2, 2, 2, 16, generator=torch.Generator().manual_seed(4)).argsort(-1) < 6
    inputs = [Input(first, masks, mode=mode or "token"), Input(second)]  # type: ignore[arg-type]
    whole, tall = vit(inputs)
    assert whole.grid == (4, 4) and tall.grid == (6, 3)
    versions = [()] if masks is None else [(m,) for m in range(2)]
    for v, b, m in [(v, b, m) for v in range(2) for b in range(2) for m in versions]:
        expected = normed(reference(vit, first[v, b], None if masks is None else masks[v, m[0], b], mode), vit.norm)
        at = (v, *m, b)
        torch.testing.assert_close(whole.cls[at], expected[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(whole.patches[at], expected[3:], rtol=1e-9, atol=1e-11)
    for b in range(2):
        expected = normed(reference(vit, second[0, b], None, ""), vit.norm)
        torch.testing.assert_close(tall.patches[0, b], expected[3:], rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    half=st.integers(3, 9),
    normalize=st.sampled_from(["separate", "min", "max"]),
    base=st.floats(2, 1000),
)
def test_rotation_on_one_two_and_three_axes(grid: tuple[int, ...], half: int, normalize: Any, base: float) -> None:
    """Channel pairs that do not divide among the axes, and tokens in front, stay as they are."""
    rope, head_dim, generator = Rope(base=base, normalize=normalize), 2 * half, torch.Generator().manual_seed(0)
    count = math.prod(grid)
    x = torch.randn(1, 2 + count, 2, 1, head_dim, generator=generator, dtype=torch.float64)
    by = rotation(
        rope, grid, head_dim=head_dim, num_front=2, augment=False, dtype=torch.float64, device=torch.device("cpu")
    )
    found = rotate(x, by)
    assert torch.equal(found[:, :2], x[:, :2])
    measure = {"separate": None, "min": min(grid), "max": max(grid)}[normalize]
    for n in range(count):
        index = [int(i) for i in torch.unravel_index(torch.tensor(n), grid)]
        place = tuple(2 * (i + 0.5) / (measure or length) - 1 for i, length in zip(index, grid, strict=True))
        for part in range(2):
            torch.testing.assert_close(found[0, 2 + n, part, 0], turned(x[0, 2 + n, part, 0], place, base))


def test_scores_depend_on_the_distance_alone() -> None:
    """<turn(q, x), turn(k, y)> = <q, turn(k, y - x)>: what RoPE is for."""
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    here, there = (0.3, -0.8), (-0.5, 0.1)
    apart = tuple(b - a for a, b in zip(here, there, strict=True))
    torch.testing.assert_close(turned(q, here) @ turned(k, there), q @ turned(k, apart))


def test_periods_between_two_numbers() -> None:
    found = periods(Rope(min_max_period=(0.5, 8.0)), 5, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64))


# -- augmentation -----------------------------------------------------------------------------------------------------


def drawn_places(rope: Rope, grid: tuple[int, int], seed: int) -> list[tuple[float, float]]:
    """What `rope` makes of the coordinates, from the same draws, written out."""
    torch.manual_seed(seed)
    sy, sx, jy, jx, r = (2 * torch.rand(5) - 1).double().tolist()
    rescale = math.exp(math.log(rope.rescale) * r)
    factors = [math.exp(math.log(rope.jitter) * j) * rescale for j in (jy, jx)]
    return [((y + rope.shift * sy) * factors[0], (x + rope.shift * sx) * factors[1]) for y, x in grid_places(*grid)]


def test_training_moves_and_scales_the_coordinates_once_for_a_group_and_evaluation_does_not() -> None:
    vit, views = make_vit(rope=AUGMENTED, depth=2).double(), images(1, 2, 16).double()
    torch.manual_seed(7)
    [features] = vit([Input(views)])
    places = drawn_places(AUGMENTED, (4, 4), 7)
    for b in range(2):  # one draw for all samples and both blocks
        expected = normed(reference(vit, views[0, b], None, "", places), vit.norm)
        torch.testing.assert_close(features.patches[0, b], expected[3:], rtol=1e-9, atol=1e-11)
    before = torch.get_rng_state()
    [plain] = vit.eval()([Input(views)])
    assert torch.equal(torch.get_rng_state(), before), "evaluation draws nothing"
    torch.testing.assert_close(plain.cls[0, 0], normed(reference(vit, views[0, 0], None, ""), vit.norm)[0])


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(0, 1), jitter=st.floats(1, 3), rescale=st.floats(1, 3), seed=st.integers(0, 10**6))
def test_draws_stay_within_their_bounds(shift: float, jitter: float, rescale: float, seed: int) -> None:
    torch.manual_seed(seed)
    by = [
        rotation(
            Rope(1.0 + 1e-9, shift=shift, jitter=jitter, rescale=rescale), (3,), head_dim=2, num_front=0,
            augment=augment, dtype=torch.float64, device=torch.device("cpu"),
        )
        for augment in (True, False)
    ]  # fmt: skip
    places = coordinates(PLAIN, (3,), torch.float64, torch.device("cpu"))[:, 0]
    torch.manual_seed(seed)
    s, j, r = (2 * torch.rand(3) - 1).double().tolist()
    moved = (places + shift * s) * jitter**j * rescale**r
    torch.testing.assert_close(by[0].cos[0, :, 0, 0, 0], (2 * math.pi * moved).cos())
    torch.testing.assert_close(by[1].cos[0, :, 0, 0, 0], (2 * math.pi * places).cos())
    assert float((moved - places * jitter**j * rescale**r).abs().max()) <= shift * jitter * rescale + 1e-12


def test_several_inputs_in_one_call_equal_separate_calls_with_all_that_is_drawn() -> None:
    vit = make_vit(rope=AUGMENTED, drop_path=[0.3] * 3)
    masks = torch.rand(2, 1, 4, 16, generator=torch.Generator().manual_seed(4)).argsort(-1) < 6
    inputs = [Input(images(2, 4, 16), masks, mode="drop"), Input(images(3, 4, 8)), Input(images(1, 4, 20))]
    torch.manual_seed(5)
    together = vit(inputs)
    torch.manual_seed(5)
    apart = [vit([item])[0] for item in inputs]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.cls, other.cls) and torch.equal(one.patches, other.patches)


def test_recomputed_blocks_meet_the_same_rotation() -> None:
    gradients = []
    for recompute in (False, True):
        vit = make_vit(rope=AUGMENTED, drop_path=[0.3] * 3)
        for block in vit.blocks if recompute else ():
            forward = block.forward
            block.forward = lambda *a, f=forward: checkpoint(f, *a, use_reentrant=False, preserve_rng_state=False)
        torch.manual_seed(6)
        [features] = vit([Input(images(2, 3, 16), masks_of((2, 1, 3, 16)))])
        features.patches.square().sum().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_angles_are_float32_whatever_the_precision() -> None:
    """In bfloat16 the places of a grid of 64 would fall together; features then differ by rounding alone."""
    vit, views = make_vit(rope=PLAIN, depth=1).eval(), images(1, 1, 256)
    seen: list[torch.dtype] = []
    hook = vit.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2][0].cos.dtype))
    [exact] = vit([Input(views)])
    with torch.autocast("cpu", torch.bfloat16):
        [half] = vit([Input(views)])
    [low] = vit.bfloat16()([Input(views.bfloat16())])
    hook.remove()
    assert seen == [torch.float32] * 3
    for other in (half, low):
        assert (other.patches.float() - exact.patches).abs().mean().item() < 0.02


# -- untied norms -----------------------------------------------------------------------------------------------------


def untied(**changes: Any) -> VisionTransformer:
    vit = make_vit(depth=1, **changes)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.split(".")[0].endswith("norm"):
                parameter.add_(torch.randn_like(parameter))
    return vit.double()


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("local", [None, "local"])
@pytest.mark.parametrize("training", [False, True])
def test_each_kind_of_token_goes_through_its_norm(cls: bool, local: str | None, training: bool) -> None:
    vit = untied(untie_cls=cls, local_group=local).train(training)
    before: list[Tensor] = []
    vit.blocks[-1].register_forward_hook(lambda _m, _a, output: before.extend(output))
    views = images(2, 2, 16).double()
    outputs = vit([Input(views, group="global"), Input(views, group="local")])
    for group, features, rows in zip(("global", "local"), outputs, before, strict=True):
        expected = vit.cls_norm if cls else vit.norm
        if local and training and group == "local":
            expected = vit.local_cls_norm
        assert expected is not None and features.registers is not None
        rows = rows.reshape(2, 2, *rows.shape[1:])
        torch.testing.assert_close(features.cls, normed(rows[:, :, 0], expected))
        torch.testing.assert_close(features.registers, normed(rows[:, :, 1:3], expected))
        torch.testing.assert_close(features.patches, normed(rows[:, :, 3:], vit.norm))
    assert ("cls_norm.weight" in vit.state_dict()) == cls


def network(model: StudentTeacher, name: str = "student") -> VisionTransformer:
    found = model.networks[name]
    assert isinstance(found, VisionTransformer)
    return found


def test_the_engine_says_which_group_is_local_and_trains_its_norm_without_decay() -> None:
    backbone = engine.VIT | {"untied_norms": {"cls": True, "local": "local"}, "position": {"kind": "rope"}}
    model = engine.model(networks={"student": {"backbone": backbone}, "teacher": {"update": "ema", "of": "student"}})
    model(engine.batch(), 0, ["dino", "ibot", "koleo"]).loss.backward()
    student = network(model)
    for norm in (student.norm, student.cls_norm, student.local_cls_norm):
        assert norm is not None and norm.weight.grad is not None and bool(norm.weight.grad.any())
    rules = {name: rule for name, _, rule in model.trained_parameters(layer_decay=0.5, patch_embed_lr=1.0)}
    for name in ("norm", "cls_norm", "local_cls_norm"):
        rule = rules[f"networks.student.{name}.weight"]
        assert rule.lr_multiplier == 1.0 and rule.weight_decay_multiplier == 0.0
    assert rules["networks.student.cls_token"].lr_multiplier == 0.5**3


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": {"rescale": 2.0}}, "rescale: of kind: rope, but this is kind: learned"),
        ({"position": {"kind": "rope", "antialias": True}}, "antialias: of kind: learned, but this is kind: rope"),
        ({"position": {"kind": "rope", "min_max_period": [4, 2]}}, "must be [min, max] with 0 < min <= max"),
        ({"position": {"kind": "rope", "jitter": 0.5}}, "greater than or equal to 1"),
        ({"position": {"kind": "rotary"}}, "position.kind"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Config, changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"untied_norms": {"local": "lokal"}},
            "untied_norms.local: no group 'lokal' of views; there are global, local",
        ),
        ({"embed_dim": 6, "position": {"kind": "rope"}}, "2 at least, but heads have 3 channels"),
    ],
)
def test_what_does_not_fit_the_views_is_refused(changes: dict[str, Any], words: str) -> None:
    configs = engine.recipe(
        networks={"student": {"backbone": engine.VIT | changes}}, objectives={"koleo": engine.KOLEO}
    )
    with pytest.raises(ConfigError) as error:
        build_networks(configs.networks, 0, Toy(("global", "local")))
    assert words in str(error.value)


def test_tokens_without_a_grid_cannot_be_turned() -> None:
    with pytest.raises(ValueError, match="needs tokens on a grid"):
        VisionTransformer(
            GridPatchEmbed(3, 24, (4, 4), (4, 4)),
            None,
            **WIDE,
            depth=1,
            swiglu=False,
            rope=PLAIN,  # type: ignore[arg-type]
        )
