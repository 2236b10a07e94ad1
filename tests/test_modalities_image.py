"""The image modality: every augmentation against torchvision, every probability by counting, and the configuration."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from ssl_platform.config import ConfigError, to_yaml, validate
from ssl_platform.modalities import GroupSpec, image, pathology
from ssl_platform.modalities import _image_augmentations as augmentations

TINY = {"patch_size": 4, "crops": {"global": {"size": 8}, "local": {"size": 4}}}
PLAIN = {
    "horizontal_flip": 0.0,
    "color_jitter": {"probability": 0.0},
    "grey": 0.0,
    "blur": {"global": [0.0], "local": [0.0]},
    "solarize": {"global": [0.0]},
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
}
WHOLE = {"size": 8, "scale": [1.0, 1.0], "aspect": [1.0, 1.0]}


def config(**options: Any) -> image.Config:
    return validate(image.Config, options)


def random_image(size: tuple[int, int] = (24, 24), channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_binomial(count: float, trials: int, probability: float) -> None:
    """Four standard deviations; exact for 0 and 1."""
    assert abs(count - trials * probability) <= 4 * math.sqrt(trials * probability * (1 - probability)), count


# -- single operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_brightness_and_contrast_are_those_of_torchvision(channels: int, factor: float) -> None:
    pixels = torch.rand(channels, 20, 30)
    torch.testing.assert_close(augmentations.adjust_brightness(pixels, factor), TF.adjust_brightness(pixels, factor))
    torch.testing.assert_close(augmentations.adjust_contrast(pixels, factor), TF.adjust_contrast(pixels, factor))


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.03, 0.5])
def test_hue_is_that_of_torchvision(shift: float) -> None:
    pixels = torch.rand(3, 40, 30)
    pixels[:, :5] = pixels[:1, :5]  # grey
    pixels[0, 5:10] = pixels[1, 5:10]  # two channels equal
    pixels[:, 10] = 0
    torch.testing.assert_close(augmentations.adjust_hue(pixels, shift), TF.adjust_hue(pixels, shift), atol=5e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_that_of_torchvision(sigma: float) -> None:
    pixels = torch.rand(5, 12, 17)
    expected = TF.gaussian_blur(pixels, [9, 9], [sigma, sigma])
    torch.testing.assert_close(augmentations.gaussian_blur(pixels, sigma), expected, atol=2e-6, rtol=0)


def test_blur_of_views_smaller_than_the_kernel_keeps_the_mean_bounds() -> None:
    pixels = torch.rand(3, 3, 2)
    blurred = augmentations.gaussian_blur(pixels, 2.0)
    assert blurred.shape == pixels.shape and blurred.max() <= pixels.max() and blurred.min() >= pixels.min()


def test_solarize_threshold_is_128() -> None:
    levels = torch.arange(256).view(1, 16, 16) / 255
    expected = torch.where(levels * 255 >= 127.5, 1 - levels, levels)
    torch.testing.assert_close(augmentations.solarize(levels), expected)


def test_jitter_draws_all_orders_and_the_stated_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        record = lambda pixels, amount, name=name: (calls.append((name, amount)), pixels)[1]  # noqa: E731
        monkeypatch.setattr(augmentations, f"adjust_{name}", record)
    rng, pixels = np.random.default_rng(0), torch.zeros(3, 2, 2)
    options = {"probability": 1.0, "brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1}
    for _ in range(1000):
        augmentations.random_color_jitter(pixels, rng, **options)
    orders = [tuple(name for name, _ in calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert len(set(orders)) == 24
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        amounts = np.array([amount for called, amount in calls if called == name])
        assert len(amounts) == 1000 and low <= amounts.min() and amounts.max() <= high
        deciles = [0.1, 0.5, 0.9]
        expected = np.quantile([low, high], deciles)
        np.testing.assert_allclose(np.quantile(amounts, deciles), expected, atol=0.06 * (high - low))


# -- crops -------------------------------------------------------------------------------------------------------------


def test_area_and_aspect_of_small_crops_are_uniform() -> None:
    rng = np.random.default_rng(0)
    boxes = [augmentations.random_box(rng, (1000, 1000), (1, 1), (0.05, 0.32), (3 / 4, 4 / 3)) for _ in range(3000)]
    areas = np.array([box.height * box.width for box in boxes]) / 1e6
    aspects = np.log([box.width / box.height for box in boxes]) / math.log(4 / 3)
    for values, low, high in ((areas, 0.05, 0.32), (aspects, -1, 1)):
        assert low - 0.01 <= values.min() and values.max() <= high + 0.01
        np.testing.assert_allclose(np.histogram(values, 5, (low, high))[0], 600, atol=4 * math.sqrt(600 * 0.8))


def test_crops_are_distributed_as_those_of_torchvision() -> None:
    rng, pixels = np.random.default_rng(0), torch.zeros(3, 200, 300)
    torch.manual_seed(0)
    crop = T.RandomResizedCrop(8, scale=(0.32, 1.0))
    theirs = [crop.make_params([pixels]) for _ in range(3000)]
    ours = [augmentations.random_box(rng, (200, 300), (8, 8), (0.32, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    for key in ("top", "left", "height", "width"):
        expected = np.quantile([params[key] for params in theirs], [0.05, 0.25, 0.5, 0.75, 0.95])
        found = np.quantile([getattr(box, key) for box in ours], [0.05, 0.25, 0.5, 0.75, 0.95])
        np.testing.assert_allclose(found, expected, atol=8)


def test_images_that_no_crop_fits_show_their_center() -> None:
    box = augmentations.random_box(np.random.default_rng(0), (10, 1000), (1, 1), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == (0, 493, 10, 13)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_boxes_lie_in_the_image(height: int, width: int, seed: int) -> None:
    box = augmentations.random_box(np.random.default_rng(seed), (height, width), (8, 8), (0.05, 1.0), (0.5, 2.0))
    assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width


def test_views_that_show_the_whole_image_are_the_image() -> None:
    modality = config(patch_size=4, crops={"global": WHOLE, "local": {"num": 0}}, **PLAIN).build()
    pixels = random_image((8, 8))
    views = modality.augment((pixels,), np.random.default_rng(0))["global"].views
    torch.testing.assert_close(views, (pixels / 255).expand(2, 3, 8, 8))


def symmetries(pixels: torch.Tensor) -> list[torch.Tensor]:
    turned = [torch.rot90(pixels, turns, (-2, -1)) for turns in range(4)]
    return [*turned, *(view.flip(-1) for view in turned)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"horizontal_flip": 0.5}, [0.5, 0, 0, 0, 0.5, 0, 0, 0]),
        ({"horizontal_flip": 0.3}, [0.7, 0, 0, 0, 0.3, 0, 0, 0]),
        ({"horizontal_flip": 1.0}, [0, 0, 0, 0, 1, 0, 0, 0]),
        ({"vertical_flip": 0.2}, [0.8, 0, 0, 0, 0, 0, 0.2, 0]),
        ({"right_angle_rotation": 0.6}, [0.4, 0.2, 0.2, 0.2, 0, 0, 0, 0]),
        ({"horizontal_flip": 0.5, "vertical_flip": 0.5, "right_angle_rotation": 0.75}, [0.125] * 8),
    ],
)
def test_probabilities_of_flips_and_right_angles(options: dict[str, float], expected: list[float]) -> None:
    crops = {"global": {**WHOLE, "num": 4}, "local": {"num": 0}}
    modality = config(patch_size=4, crops=crops, **{**PLAIN, **options}).build()
    pixels, rng, counts = random_image((8, 8)), np.random.default_rng(1), np.zeros(8)
    candidates = torch.stack(symmetries(pixels / 255))
    for _ in range(500):
        for view in modality.augment((pixels,), rng)["global"].views:
            (which,) = torch.nonzero((candidates - view).abs().amax((1, 2, 3)) < 1e-6)[0].tolist()
            counts[which] += 1
    for count, probability in zip(counts, expected, strict=True):
        assert_binomial(count, 2000, probability)


def test_views_may_be_oblong_and_turned() -> None:
    crops = {"global": {**WHOLE, "size": [8, 16], "num": 8}, "local": {"num": 0}}
    modality = config(patch_size=4, crops=crops, **{**PLAIN, "right_angle_rotation": 1.0}).build()
    views = modality.augment((random_image((30, 20)),), np.random.default_rng(0))["global"].views
    assert views.shape == (8, 3, 8, 16) and modality.groups["global"].grid == (2, 4)


# -- probabilities of what happens to pixels ---------------------------------------------------------------------------


def count_marks(
    modality: image.Image, name: str, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[int]]:
    """How many of the samples had the operation `name`, for each view."""
    mark: Callable[..., torch.Tensor] = lambda pixels, *_: torch.full_like(pixels, 7.0)  # noqa: E731
    monkeypatch.setattr(augmentations, name, mark)
    rng, pixels = np.random.default_rng(0), random_image((12, 12))
    counts = {group: [0] * spec.num_views for group, spec in modality.groups.items()}
    for _ in range(num_samples):
        for group, sample in modality.augment((pixels,), rng).items():
            for view in range(len(sample.views)):
                counts[group][view] += bool((sample.views[view] == 7).all())
    return counts


@pytest.mark.parametrize(
    ("options", "operation", "expected"),
    [
        ({}, "gaussian_blur", {"global": [1.0, 0.1], "local": [0.5, 0.5]}),
        ({"blur": {"local": [0.0, 0.9]}}, "gaussian_blur", {"global": [1.0, 0.1], "local": [0.0, 0.9]}),
        ({}, "solarize", {"global": [0.0, 0.2], "local": [0.0, 0.0]}),
        ({"solarize": {"local": [0.7]}}, "solarize", {"global": [0.0, 0.2], "local": [0.7, 0.7]}),
        ({}, "to_grey", {"global": [0.2, 0.2], "local": [0.2, 0.2]}),
        ({"grey": 1.0}, "to_grey", {"global": [1.0, 1.0], "local": [1.0, 1.0]}),
        ({}, "adjust_brightness", {"global": [0.8, 0.8], "local": [0.8, 0.8]}),
        ({"color_jitter": {"probability": 0.3}}, "adjust_contrast", {"global": [0.3, 0.3], "local": [0.3, 0.3]}),
    ],
)
def test_probabilities_are_applied_as_written(
    options: dict[str, Any], operation: str, expected: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operation alone is on: the others would change its mark. Defaults are those of `Config`."""
    key = {"gaussian_blur": "blur", "solarize": "solarize", "to_grey": "grey"}.get(operation, "color_jitter")
    silenced = {name: value for name, value in PLAIN.items() if name != key}
    if key == "color_jitter":
        others = [name for name in ("brightness", "contrast", "saturation", "hue") if name not in operation]
        silenced[key] = dict.fromkeys(others, 0.0) | options.get(key, {})
    crops = {"global": {"size": 8}, "local": {"size": 4, "num": 2}}
    num_samples = 1000 if options else 2000
    modality = config(**{**options, **silenced, "patch_size": 4, "crops": crops}).build()
    counts = count_marks(modality, operation, num_samples, monkeypatch)
    for group, probabilities in expected.items():
        for count, probability in zip(counts[group], probabilities, strict=True):
            assert_binomial(count, num_samples, probability)


def test_blur_probabilities_repeat_over_the_views_of_a_group() -> None:
    crops = {"global": {"num": 5}}
    recipe = config(crops=crops).build().recipes["global"]
    steps: list[Any] = [step for steps in recipe.colors for step in steps]
    blurs = [step.keywords["probability"] for step in steps if step.func is augmentations.random_gaussian_blur]
    assert blurs == [1.0, 0.1, 1.0, 0.1, 1.0]


# -- the modality ------------------------------------------------------------------------------------------------------


def encode(pixels: torch.Tensor, kind: str = "png") -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, kind)
    return file.getvalue()


def encode_npy(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels.numpy())
    return file.getvalue()


def test_groups_shapes_and_sources() -> None:
    modality = config(crops={"extra": {"num": 1, "size": 32, "scale": [0.5, 1.0]}}).build()
    groups = modality.augment((random_image((256, 256)),), np.random.default_rng(0))
    assert {name: tuple(views.views.shape) for name, views in groups.items()} == {
        "global": (2, 3, 224, 224), "local": (8, 3, 96, 96), "extra": (1, 3, 32, 32),
    }  # fmt: skip
    assert [views.source.tolist() for views in groups.values()] == [[0, 1], list(range(2, 10)), [10]]
    assert all(views.views.dtype == torch.float32 and views.views.isfinite().all() for views in groups.values())
    assert modality.groups["local"] == GroupSpec(8, (3, 96, 96), (6, 6))


def test_views_are_a_function_of_the_generator_alone() -> None:
    modality, pixels = config(**TINY).build(), random_image()
    views = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        views.append(modality.augment((pixels,), np.random.default_rng(5)))
    other = modality.augment((pixels,), np.random.default_rng(6))
    for group in ("global", "local"):
        assert torch.equal(views[0][group].views, views[1][group].views)
        assert not torch.equal(views[0][group].views, other[group].views)


def test_augment_does_not_change_its_example() -> None:
    pixels = random_image()
    before = pixels.clone()
    config(**TINY).build().augment((pixels,), np.random.default_rng(0))
    assert torch.equal(pixels, before)


def test_16_bits_give_what_8_bits_give() -> None:
    """Up to the rounding of the resized pixels; colour jitter without hue, which is unstable near grey."""
    options = {**TINY, "color_jitter": {"hue": 0.0, "saturation": 0.0}, "mean": [0.0] * 3, "std": [1.0] * 3}
    modality = config(**options).build()
    coarse = random_image((4, 4)).float()[None] / 255
    smooth = torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic")[0].clamp(0, 1)
    eight = (smooth * 255).round().to(torch.uint8)
    sixteen = torch.from_numpy(eight.numpy().astype(np.uint16) * 257)
    torch.testing.assert_close(modality.preprocess(sixteen), modality.preprocess(eight), atol=2 / 255, rtol=0)
    for seed in range(20):
        expected = modality.augment((eight,), np.random.default_rng(seed))
        found = modality.augment((sixteen,), np.random.default_rng(seed))
        for group in expected:
            torch.testing.assert_close(found[group].views, expected[group].views, atol=3 / 255, rtol=0)


def test_five_channels() -> None:
    modality = config(channels=5, **TINY).build()
    pixels = random_image(channels=5)
    example = modality.decode({"npy": encode_npy(pixels), "json": b"{}"})
    assert torch.equal(example, pixels)
    groups = modality.augment((example,), np.random.default_rng(0))
    assert groups["global"].views.shape == (2, 5, 8, 8) and groups["local"].views.shape == (8, 5, 4, 4)
    assert modality.description()["mean"] == [0.5] * 5


def test_records_without_an_image_say_what_they_have() -> None:
    with pytest.raises(ValueError, match="no image in the record: it has txt, json, not jpg/jpeg/png"):
        config().build().decode({"txt": b"", "json": b"{}"})


def test_grey_output_has_no_color_left() -> None:
    pixels = random_image((8, 8))
    luma = (torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1) * pixels / 255).sum(0)
    for channels in (1, 3):
        modality = config(**TINY, channels=channels, to_grey=True, mean=[0.0] * channels, std=[1.0] * channels).build()
        example = modality.decode({"png": encode(pixels)})
        torch.testing.assert_close(modality.preprocess(example), luma.expand(channels, 8, 8))
        views = modality.augment((example,), np.random.default_rng(0))["global"].views
        assert views.shape == (2, channels, 8, 8) and torch.equal(views, views[:, :1].expand_as(views))
        assert modality.decode({"png": encode(pixels[:1].expand(3, -1, -1))}).shape == (3, 8, 8)


@pytest.mark.parametrize(("channels", "to_grey"), [(3, False), (3, True), (1, True)])
def test_samples_normalized_by_themselves(channels: int, to_grey: bool) -> None:
    modality = config(**TINY, channels=channels, to_grey=to_grey, normalize_per_sample=True).build(
        {"mean": [0.9] * 3, "std": [0.1] * 3}
    )
    pixels = random_image()
    views = modality.augment((pixels,), np.random.default_rng(0))["global"].views
    for view in (*views, modality.preprocess(pixels)):
        torch.testing.assert_close(view.mean((1, 2)), torch.zeros(channels), atol=1e-5, rtol=0)
        torch.testing.assert_close(view.std((1, 2), correction=0), torch.ones(channels), atol=1e-4, rtol=0)
    assert modality.preprocess(torch.full((3, 8, 8), 200, dtype=torch.uint8)).abs().max() < 1e-4
    dark = torch.from_numpy((pixels.numpy() // 4).astype(np.uint16) * 40)  # 12 bits of 16
    torch.testing.assert_close(modality.preprocess(dark).std((1, 2), correction=0), torch.ones(channels))
    description = modality.description()
    assert description["normalize_per_sample"] and description["mean"] == [0.0] * channels


def test_preprocess_is_resize_and_center_crop() -> None:
    modality = config(crops={"global": {"size": 64}, "local": {"num": 0}}, mean=[0.5] * 3, std=[0.25] * 3).build()
    pixels = random_image((90, 131))
    steps = [
        T.Resize(73, interpolation=T.InterpolationMode.BICUBIC, antialias=True),
        T.CenterCrop(64),
        T.ToDtype(torch.float32, scale=True),
        T.Normalize([0.5] * 3, [0.25] * 3),
    ]
    torch.testing.assert_close(modality.preprocess(pixels), T.Compose(steps)(pixels))


def test_images_of_exactly_the_evaluation_size_lose_nothing() -> None:
    pixels = random_image((8, 8))
    exact = config(**TINY, mean=[0.0] * 3, std=[1.0] * 3)
    torch.testing.assert_close(exact.build().preprocess(pixels), pixels / 255)
    resized = config(**TINY, mean=[0.0] * 3, std=[1.0] * 3, evaluation_resize=12)
    assert (resized.build().preprocess(pixels) - pixels / 255).abs().max() > 0.05
    assert resized.build().description()["crop_pct"] == 8 / 12


def test_evaluation_sizes_may_be_oblong() -> None:
    modality = config(**TINY, evaluation_size=[16, 32]).build()
    assert modality.preprocess(random_image((100, 20))).shape == (3, 16, 32)
    assert modality.description()["input_size"] == [3, 16, 32]


def test_images_too_thin_to_be_scaled_are_refused() -> None:
    with pytest.raises(ValueError, match=r"an image of 256 x 2560000 pixels, the limit is"):
        config().build().preprocess(torch.zeros(3, 1, 10_000, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "statistics", "mean", "std"),
    [
        ({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, [0.7, 0.2], [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ({}, ([0.7, 0.6, 0.5], [0.3, 0.2, 0.1]), [0.7, 0.6, 0.5], [0.3, 0.2, 0.1]),
        ({}, ([0.7], [0.3]), [0.7] * 3, [0.3] * 3),
        ({}, ([0.7, 0.6, 0.5, 1.0], [0.3, 0.2, 0.1, 0.0]), [0.7, 0.6, 0.5], [0.3, 0.2, 0.1]),
        ({}, None, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"channels": 2}, None, [0.5] * 2, [0.5] * 2),
        ({"channels": 1, "to_grey": True}, ([0.5] * 3, [0.2] * 3), [0.49995], [0.19998]),
    ],
)
def test_where_mean_and_std_come_from(
    options: dict[str, Any], statistics: Any, mean: list[float], std: list[float]
) -> None:
    given_statistics = {"mean": statistics[0], "std": statistics[1]} if statistics else None
    description = config(**options).build(given_statistics).description()
    np.testing.assert_allclose(description["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(description["std"], std, rtol=1e-6)


def test_a_channel_that_never_changes_becomes_zero() -> None:
    modality = config(**TINY).build({"mean": [0.5, 0.5, 0.0], "std": [0.2, 0.2, 0.0]})
    blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert (modality.preprocess(blank)[2] == 0).all()


def test_statistics_of_other_channels_are_an_error() -> None:
    with pytest.raises(ValueError, match="statistics have 5 channels where 3 are configured; set channels: 5, or mean"):
        config().build({"mean": [0.5] * 5, "std": [0.5] * 5})


# -- configuration -----------------------------------------------------------------------------------------------------


def test_partial_maps_keep_the_other_defaults() -> None:
    found = config(crops={"local": {"num": 4}}, blur={"local": [0.2]})
    assert found.crops["global"] == image.Config().crops["global"]
    assert (found.crops["local"].num, found.crops["local"].size, found.crops["local"].scale) == (4, 96, (0.05, 0.32))
    assert found.blur == {"global": (1.0, 0.1), "local": (0.2,)}


def test_resolved_configuration_is_valid_input() -> None:
    import yaml

    found = config(**TINY, mean=[0.5] * 3, std=[0.1] * 3, evaluation_size=[8, 16])
    assert validate(image.Config, yaml.safe_load(to_yaml(found))) == found


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"crops": {"global": {"size": 225}}}, [
            "crops.global.size: 225 is not a multiple of patch_size 16; use 224 or 240"]),
        ({"crops": {"local": {"size": [96, 8]}}}, ["crops.local.size: 8 is not a multiple of patch_size 16; use 16"]),
        ({"evaluation_size": 100, "to_grey": True, "channels": 5}, [
            "evaluation_size: 100 is not a multiple of patch_size 16; use 96 or 112",
            "to_grey: makes 1 or 3 channels, not channels: 5",
        ]),
        ({"horizontal_flip": 1.5}, ["horizontal_flip: input should be less than or equal to 1, got 1.5"]),
        ({"blur": {"global": [0.5, -0.1]}}, ["blur.global.1: input should be greater than or equal to 0, got -0.1"]),
        ({"blur": {"global": []}}, ["blur.global: value should have at least 1 item after validation, not 0, got []"]),
        ({"blur": {"locl": [0.5]}}, ["blur.locl: no group of crops has this name; did you mean 'local'?"]),
        ({"solarize": {"third": [0.5]}}, ["solarize.third: no group of crops has this name; there are global, local"]),
        ({"crops": {"local": {"scale": [0.5, 0.2]}}}, [
            "crops.local.scale: [0.5, 0.2] must be [min, max] with 0 < min <= max <= 1"]),
        ({"crops": {"local": {"aspect": [0.0, 2.0]}}}, [
            "crops.local.aspect: [0, 2] must be [min, max] with 0 < min <= max"]),
        ({"crops": {"global": {"num": 0}}}, ["crops.global.num: at least 1, the teacher needs a view"]),
        ({"crops": {"local": {"nun": 3}}}, ["crops.local.nun: unknown key; did you mean 'num'?"]),
        ({"mean": [0.5] * 3}, ["mean, std: give both or neither"]),
        ({"mean": [0.5] * 2, "std": [0.5, 0.5, 0.0]}, ["mean: 2 values for 3 channels", "std: must be above 0"]),
        ({"evaluation_resize": 200}, ["evaluation_resize: 200 does not cover evaluation_size"]),
    ],
)  # fmt: skip
def test_errors_are_one_readable_line_each(options: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.lines == lines


# -- intensities -------------------------------------------------------------------------------------------------------

PERCENTILES = {"1": [0.1, 0.2, 0.3], "99": [0.5, 0.4, 0.7]}
MEASURED = {"mean": [0.3, 0.3, 0.5], "std": [0.1, 0.1, 0.2], "percentiles": PERCENTILES}


def test_pixels_between_two_percentiles_fill_the_range() -> None:
    modality = config(**TINY, **PLAIN, intensity_range=[1, 99]).build(MEASURED)
    shares = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 1.0])
    example = (shares * 65535).round().to(torch.uint16).expand(3, 8, 8)
    low, high = (torch.tensor(PERCENTILES[key]).view(3, 1, 1) for key in ("1", "99"))
    expected = ((example.float() / 65535 - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(modality.preprocess(example), expected, atol=1e-5, rtol=0)
    tall = config(
        **PLAIN, patch_size=4, crops={"global": WHOLE, "local": {"num": 0, "size": 4}}, intensity_range=[1, 99]
    )
    views = tall.build(MEASURED).augment((example,), np.random.default_rng(0))["global"].views
    torch.testing.assert_close(views[0], expected, atol=1e-4, rtol=0)
    assert modality.description()["intensity_range"] == {
        "percentiles": [1, 99],
        "low": pytest.approx(PERCENTILES["1"]),
        "high": pytest.approx(PERCENTILES["99"]),
    }


def test_mean_and_std_follow_the_range() -> None:
    facts = config(**TINY, intensity_range=[1, 99]).build(MEASURED).description()
    np.testing.assert_allclose(facts["mean"], [0.5, 0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(facts["std"], [0.25, 0.5, 0.5], rtol=1e-5)
    grey = config(**TINY, intensity_range=[1, 99], to_grey=True).build(MEASURED).description()
    np.testing.assert_allclose(grey["mean"], [0.5] * 3, rtol=1e-3)
    one = {"mean": [0.3], "std": [0.1], "percentiles": {"5": [0.1], "95": [0.5]}}
    spread = config(**TINY, intensity_range=[5, 95]).build(one)
    assert spread.description()["intensity_range"]["low"] == pytest.approx([0.1] * 3)


def test_uint8_and_pathology_have_it_too() -> None:
    example = torch.arange(64, dtype=torch.uint8).view(1, 8, 8).expand(3, 8, 8) * 4
    modality = validate(pathology.Config, {**TINY, "context": None, "intensity_range": [1, 99]}).build(MEASURED)
    shown = modality.normalization.visible(modality.preprocess(example))
    low, high = (torch.tensor(PERCENTILES[key]).view(3, 1, 1) for key in ("1", "99"))
    torch.testing.assert_close(shown, ((example / 255 - low) / (high - low)).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "statistics", "message"),
    [
        (
            [1, 99],
            {"mean": [0.5] * 3, "std": [0.1] * 3},
            "needs the percentiles of the shards, which an older ssl-pack",
        ),
        ([2, 99], MEASURED, "percentile 2 is not kept; use two of 1, 99"),
        (
            [1, 99],
            {**MEASURED, "percentiles": {"1": [0.0, 0.0, 0.0], "99": [0.5, 0.0, 0.5]}},
            r"percentiles 1 and 99 of channel 1 are both 0; use a wider range, such as \[0.1, 99.9\]",
        ),
        ([1, 99], {**MEASURED, "percentiles": {"1": [0.1] * 5, "99": [0.5] * 5}}, "statistics have 5 channels where 3"),
    ],
)
def test_a_range_that_cannot_be(given: list[float], statistics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(intensity_range=given).build(statistics)


@pytest.mark.parametrize("given", [[99, 1], [50, 50], [-1, 99], [1, 101]])
def test_a_range_that_is_none(given: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"intensity_range: .*expected \[low, high\], 0 <= low < high <= 100"):
        config(intensity_range=given)
