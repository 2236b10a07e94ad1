"""Near-duplicates: the same as the loop that defines them, and thumbnails that see what a person sees."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_platform.data.commands import _near_duplicates
from ssl_platform.data.commands._near_duplicates import near_duplicates, thumbnail, thumbnail_features, unit_rows
from ssl_platform.modalities._images import decode_image
from tests.packed import image_bytes, pattern

THRESHOLD = 0.95


def by_loop(features: np.ndarray[Any, Any], threshold: float, order: np.ndarray[Any, Any]) -> list[bool]:
    """Which rows are kept, as the docstring says it."""
    lengths = np.linalg.norm(features, axis=1)
    is_kept = [False] * len(features)
    for row in order:
        is_new = True
        for other in np.flatnonzero(is_kept):
            cosine = features[row] @ features[other] / max(lengths[row] * lengths[other], 1e-30)
            assume(abs(cosine - threshold) > 1e-5)
            is_new &= cosine < threshold
        is_kept[row] = is_new
    return is_kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 40),
    width=st.integers(1, 5),
    threshold=st.floats(0.3, 0.99),
    block=st.integers(1, 50),
)
def test_equal_to_the_loop_for_any_block_and_order(
    seed: int, num: int, width: int, threshold: float, block: int
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, width))
    features[rng.random(num) < 0.3] = features[0]
    features[rng.random(num) < 0.1] = 0
    order = rng.permutation(num)[: rng.integers(1, num + 1)]
    kept = by_loop(features, threshold, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_near_duplicates, "_BLOCK", block)
        twins = near_duplicates(features, threshold, order=order)
    assert [row for row in range(num) if kept[row]] == sorted(row for row in order if twins.of[row] < 0)
    units = unit_rows(features).astype(np.float64)
    for row in np.flatnonzero(twins.of >= 0):
        assert kept[twins.of[row]] and row in order
        assert twins.similarity[row] == pytest.approx(units[row] @ units[twins.of[row]], abs=1e-6)


def test_copies_reach_a_threshold_of_one() -> None:
    features = np.random.default_rng(0).normal(size=(50, 300)).astype(np.float32)
    twins = near_duplicates(np.concatenate([features, features * 3]), 1.0)
    assert twins.of.tolist() == [-1] * 50 + list(range(50))


def test_ten_thousand_samples_need_memory_for_the_kept_ones_only() -> None:
    """All alike: a list of pairs would have 50 million entries."""
    features = np.ones((10_000, 64), np.float32) + np.random.default_rng(0).normal(size=(10_000, 64)) * 1e-3
    twins = near_duplicates(features, THRESHOLD)
    assert twins.of[0] == -1 and (twins.of[1:] == 0).all()


# -- thumbnails ------------------------------------------------------------------------------------------------------


def features_of(*images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The cosines of the first image with all others."""
    rows = [thumbnail(torch.from_numpy(np.atleast_3d(image).copy()).permute(2, 0, 1)) for image in images]
    units = unit_rows(thumbnail_features(np.stack(rows)))
    return units[1:] @ units[0]


def test_the_same_picture_made_differently_is_a_near_duplicate() -> None:
    original = pattern(1, 64)
    larger = np.asarray(Image.fromarray(original).resize((200, 180), Image.Resampling.BILINEAR))
    compressed = decode_image(image_bytes(original, "jpg", quality=30), "jpg").permute(1, 2, 0).numpy()
    darker, grey = (original * 0.6).astype(np.uint8), np.asarray(Image.fromarray(original).convert("L"))
    alpha = np.concatenate([original, np.full((64, 64, 1), 255, np.uint8)], 2)
    deep = original.astype(np.uint16) * 257
    assert features_of(original, larger, compressed, darker, grey, alpha, deep).min() > 0.97


def test_other_pictures_are_not() -> None:
    assert features_of(*(pattern(seed) for seed in range(40))).max() < 0.8
    assert features_of(pattern(1, 64), pattern(1, 64)[::-1]).max() < 0.8


def test_flat_pictures_are_told_apart_by_their_colour() -> None:
    rng = np.random.default_rng(0)

    def flat(*colour: int) -> np.ndarray[Any, Any]:
        noise = rng.integers(-4, 5, (48, 48, len(colour)))
        return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)

    white = flat(230, 230, 230)
    assert features_of(white, flat(230, 230, 230), flat(228, 232, 230))[:2].min() > THRESHOLD
    assert features_of(white, flat(20, 20, 20), flat(230, 60, 60), pattern(3)).max() < 0.9


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_any_number_of_channels_and_any_size(channels: int) -> None:
    for height, width in ((1, 1), (3, 200), (64, 17)):
        rows = thumbnail(torch.randint(0, 256, (channels, height, width), dtype=torch.uint8))
        assert rows.shape == (259,) and np.isfinite(thumbnail_features(rows[None])).all()
