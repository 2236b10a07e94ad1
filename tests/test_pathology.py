"""The pathology modality: stains and hues against written-out references, context translation, the tissue filter."""

import colorsys
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_platform.config import ConfigError, validate
from ssl_platform.modalities import pathology

SMALL = {"patch_size": 4, "crops": {"global": {"size": 8}, "local": {"size": 4, "num": 2}}}
PLAIN = {
    "color_jitter": {"probability": 0.0},
    "grey": 0.0,
    "blur": {"global": [0.0], "local": [0.0]},
    "stain": None,
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
}


def config(**options: Any) -> pathology.Config:
    return validate(pathology.Config, options)


def random_tile(size: tuple[int, int] = (24, 24), seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# -- stains ------------------------------------------------------------------------------------------------------------

RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def separate_stains(rgb: np.ndarray) -> np.ndarray:
    """scikit-image's rgb2hed, (H, W, 3) float64, without its last line that sets negative stains to 0."""
    return np.log(np.maximum(rgb, 1e-6)) / np.log(1e-6) @ np.linalg.inv(RGB_FROM_HED)


def combine_stains(stains: np.ndarray) -> np.ndarray:
    """scikit-image's hed2rgb."""
    return np.clip(np.exp(-(stains * -np.log(1e-6)) @ RGB_FROM_HED), 0, 1)


def rows_last(pixels: torch.Tensor) -> np.ndarray:
    return pixels.movedim(-3, -1).double().numpy()


def test_rgb_to_hed_is_that_of_scikit_image() -> None:
    pixels = torch.rand(2, 3, 9, 7)
    pixels[0, :, 0, 0] = 0  # the logarithm's guard
    pixels[0, :, 0, 1] = 1
    expected = separate_stains(rows_last(pixels))
    found = rows_last(pathology.rgb_to_hed(pixels))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.maximum(found, 0), np.maximum(expected, 0), atol=1e-5)  # what rgb2hed returns


def test_hed_to_rgb_is_that_of_scikit_image_and_the_inverse() -> None:
    stains = torch.rand(3, 9, 7) * 0.2 - 0.05
    np.testing.assert_allclose(rows_last(pathology.hed_to_rgb(stains)), combine_stains(rows_last(stains)), atol=1e-5)
    pixels = torch.rand(3, 9, 7)
    torch.testing.assert_close(pathology.hed_to_rgb(pathology.rgb_to_hed(pixels)), pixels, atol=1e-5, rtol=0)


def test_stain_jitter_is_alpha_times_stain_plus_beta() -> None:
    pixels = torch.rand(3, 9, 7)
    alpha, beta = torch.tensor([0.8, 1.2, 1.05]), torch.tensor([0.1, -0.2, 0.03])
    expected = combine_stains(alpha.numpy() * separate_stains(rows_last(pixels)) + beta.numpy())
    np.testing.assert_allclose(rows_last(pathology.stain_jitter(pixels, alpha, beta)), expected, atol=1e-5)
    unchanged = pathology.stain_jitter(pixels, torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(unchanged, pixels, atol=1e-5, rtol=0)


def test_more_of_a_stain_darkens_the_channel_it_absorbs_most() -> None:
    grey = torch.full((3, 1, 1), 0.6)
    for stain, channel in ((0, 1), (1, 1), (2, 2)):  # haematoxylin and eosin absorb green, DAB blue
        more = pathology.stain_jitter(grey, torch.ones(3), torch.eye(3)[stain] * 0.05)
        assert (grey - more).flatten().argmax() == channel


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_stain_jitter_draws_each_stain_within_sigma(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []
    record = lambda pixels, alpha, beta: (drawn.append(np.stack([alpha - 1, beta])), pixels)[1]  # noqa: E731
    monkeypatch.setattr(pathology, "stain_jitter", record)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        pathology.random_stain_jitter(torch.zeros(3, 1, 1), rng, probability=1.0, sigma=sigma)
    values = np.stack(drawn).reshape(1000, 6)
    assert np.abs(values).max() <= sigma
    np.testing.assert_allclose(values.std(0), sigma / math.sqrt(3), rtol=0.1)
    assert np.abs(np.corrcoef(values.T) - np.eye(6)).max() < 0.13


@pytest.mark.parametrize(
    ("options", "probability"), [({}, 0.5), ({"stain": {"probability": 0.9}}, 0.9), ({"stain": None}, 0)]
)
def test_probability_of_stain_jitter(options: Any, probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathology, "stain_jitter", lambda pixels, *_: torch.full_like(pixels, 7.0))
    modality = config(**{**PLAIN, "stain": {}, **SMALL, **options}).build()
    rng, count = np.random.default_rng(0), 0
    for _ in range(1000):
        count += int((modality.augment((random_tile(),), rng)["global"].views == 7).all((1, 2, 3)).sum())
    assert abs(count - 2000 * probability) <= 4 * math.sqrt(2000 * probability * (1 - probability))


def test_stain_jitter_comes_before_the_other_colors_and_needs_them() -> None:
    steps: Any = config().build().recipes["local"].colors[0]
    assert steps[0].func is pathology.random_stain_jitter
    steps = config(channels=1, to_grey=True).build().recipes["local"].colors[0]  # colours become grey at the end
    assert steps[0].func is pathology.random_stain_jitter
    steps = config(channels=4).build().recipes["local"].colors[0]
    assert all(step.func is not pathology.random_stain_jitter for step in steps)


# -- geometry ----------------------------------------------------------------------------------------------------------


def test_all_eight_symmetries_are_equally_likely_by_default() -> None:
    crops = {"global": {"size": 8, "scale": [1.0, 1.0], "aspect": [1.0, 1.0], "num": 4}, "local": {"num": 0}}
    modality = config(patch_size=4, crops=crops, **PLAIN).build()
    tile, rng, counts = random_tile((8, 8)), np.random.default_rng(0), np.zeros(8)
    turned = [torch.rot90(tile / 255, turns, (-2, -1)) for turns in range(4)]
    candidates = torch.stack([*turned, *(view.flip(-1) for view in turned)])
    for _ in range(500):
        for view in modality.augment((tile,), rng)["global"].views:
            counts[torch.nonzero((candidates - view).abs().amax((1, 2, 3)) < 1e-6)[0, 0]] += 1
    assert np.abs(counts - 250).max() <= 4 * math.sqrt(2000 / 8 * 7 / 8)


def test_context_crops_have_nearly_the_size_of_their_views() -> None:
    rng, sampler = np.random.default_rng(0), config(context={})._box_sampler(config().crops["global"])
    boxes = [sampler(rng, (392, 392), (224, 224)) for _ in range(4000)]
    sides = np.array([math.sqrt(box.height * box.width) for box in boxes]) / 224
    aspects = np.array([box.width / box.height for box in boxes])
    for values, low, high in ((sides, 0.9, 1.1), (aspects, 0.95, 1.05)):
        np.testing.assert_allclose([values.min(), values.max()], [low, high], atol=0.01)
        quartiles = [0.25, 0.5, 0.75]
        expected = np.quantile([low, high], quartiles)
        np.testing.assert_allclose(np.quantile(values, quartiles), expected, atol=0.008)
    for start, length in (("top", "height"), ("left", "width")):  # anywhere in the tile
        places = np.array([getattr(box, start) / (392 - getattr(box, length)) for box in boxes])
        assert places.min() == 0 and places.max() == 1
        np.testing.assert_allclose(np.quantile(places, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)


def test_context_of_a_larger_tile_is_one_region_for_all_views() -> None:
    """Each pixel tells its column, so that views tell which columns they show."""
    modality = config(**SMALL, context={"size": 16}, **{**PLAIN, "right_angle_rotation": 0.0}).build()
    tile, rng, lowest = torch.arange(256, dtype=torch.uint8).expand(3, 40, 256), np.random.default_rng(0), []
    for _ in range(100):
        views = [group.views * 255 for group in modality.augment((tile,), rng).values()]
        low = min(float(view.min()) for view in views)
        assert max(float(view.max()) for view in views) - low <= 17
        lowest.append(low)
    assert min(lowest) < 30 and max(lowest) > 200


def test_tiles_smaller_than_the_context_are_refused_in_training_only() -> None:
    modality = config(context={}).build()
    tile = random_tile((256, 500))
    expected = r"the tile has 256 x 500 pixels, context.size needs 392 x 392; pack larger tiles, lower context.size"
    with pytest.raises(ValueError, match=expected):
        modality.augment((tile,), np.random.default_rng(0))
    assert modality.preprocess(tile).shape == (3, 224, 224)
    assert modality.augment((random_tile((392, 392)),), np.random.default_rng(0))["global"].views.shape[0] == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_the_promised_shapes_in_grey_and_color(channels: int) -> None:
    modality = config(**SMALL, channels=channels, to_grey=channels == 1, min_tissue=0.01).build()
    tile = torch.tensor([200, 120, 180], dtype=torch.uint8).view(3, 1, 1).expand(3, 24, 24)
    groups = modality.augment((tile,), np.random.default_rng(0))
    assert {name: tuple(group.views.shape[1:]) for name, group in groups.items()} == {
        name: spec.shape for name, spec in modality.groups.items()
    }


# -- tissue ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=20))
def test_hsv_is_that_of_colorsys(colors: list[tuple[int, int, int]]) -> None:
    pixels = torch.tensor(colors, dtype=torch.float32).T.reshape(3, 1, -1) / 255
    expected = np.array([colorsys.rgb_to_hsv(*(value / 255 for value in color)) for color in colors])
    found = rows_last(pathology.rgb_to_hsv(pixels))[0]
    difference = np.abs(found - expected)
    difference[:, 0] = np.minimum(difference[:, 0], 1 - difference[:, 0])  # hue is a circle
    assert difference.max() < 1e-5


def test_tissue_is_what_midnights_rule_says() -> None:
    colors = np.random.default_rng(0).integers(0, 256, (4000, 3))
    expected = []
    for color in colors:
        hue, saturation, value = colorsys.rgb_to_hsv(*(color / 255))
        expected.append(90 <= round(hue * 180) <= 180 and round(saturation * 255) >= 8 and round(value * 255) >= 103)
    tile = torch.tensor(colors.T.reshape(3, 40, 100).astype(np.uint8))
    assert abs(pathology.tissue_fraction(tile) - np.mean(expected)) <= 1 / 4000
    sixteen = torch.from_numpy(tile.numpy().astype(np.uint16) * 257)
    assert pathology.tissue_fraction(sixteen) == pathology.tissue_fraction(tile)


@pytest.mark.parametrize(
    ("color", "is_tissue"),
    [
        ((200, 120, 180), True),
        ((120, 80, 160), True),
        ((245, 245, 245), False),
        ((60, 40, 80), False),
        ((90, 160, 90), False),
    ],
)
def test_eosin_and_haematoxylin_are_tissue_glass_ink_and_shadow_are_not(
    color: tuple[int, ...], is_tissue: bool
) -> None:
    tile = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    assert pathology.tissue_fraction(tile) == float(is_tissue)


def test_tiles_with_too_little_tissue_are_refused_in_training_only() -> None:
    modality = config(**SMALL, min_tissue=0.6).build()
    tile = torch.full((3, 10, 10), 245, dtype=torch.uint8)
    tile[:, :5] = torch.tensor([200, 120, 180], dtype=torch.uint8).view(3, 1, 1)
    with pytest.raises(ValueError, match="tissue share 0.500 is below min_tissue 0.6"):
        modality.augment((tile,), np.random.default_rng(0))
    assert modality.preprocess(tile).shape == (3, 8, 8)
    tile[:, 5] = tile[:, 0]
    assert modality.augment((tile,), np.random.default_rng(0))["global"].views.shape == (2, 3, 8, 8)
    assert config(**SMALL).build().augment((tile * 0 + 245,), np.random.default_rng(0))  # off by default


# -- configuration -----------------------------------------------------------------------------------------------------


def test_defaults_that_differ_from_photographs() -> None:
    found = config(color_jitter={"hue": 0.01})
    assert found.color_jitter.model_dump() == {
        "probability": 0.8, "brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.01,
    }  # fmt: skip
    assert (found.horizontal_flip, found.vertical_flip, found.right_angle_rotation) == (0.5, 0.5, 0.75)
    assert found.solarize == {"global": (0.0,), "local": (0.0,)} and found.context is None and found.min_tissue == 0


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"context": {"size": 250}},
            [
                "context.size: 250 is too small for crops.global.size 224, whose crops have sides of up to 253 pixels; "
                "raise it, or use smaller crops"
            ],
        ),
        ({"context": {"scale": [1.1, 0.9]}}, ["context.scale: [1.1, 0.9] must be [min, max] with 0 < min <= max"]),
        ({"stain": {"sigma": -1.0}}, ["stain.sigma: input should be greater than or equal to 0, got -1.0"]),
        ({"min_tissue": 1.5}, ["min_tissue: input should be less than or equal to 1, got 1.5"]),
        (
            {"min_tissue": 0.5, "channels": 5},
            ["min_tissue: tells tissue by its colour, which channels: 5 do not have"],
        ),
        ({"stain": {"sigmma": 0.1}}, ["stain.sigmma: unknown key; did you mean 'sigma'?"]),
    ],
)
def test_errors_are_one_readable_line_each(options: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.lines == lines
