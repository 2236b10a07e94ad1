"""Masks: exact counts, the same masks for any number of ranks, and DINOv2's distribution of blocks."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_platform.config import ConfigError, plugin_class, plugin_names, validate
from ssl_platform.masks import Masks, block, tube
from ssl_platform.masks import random as random_masks
from ssl_platform.masks._assignment import hidden_shares

KINDS: dict[str, Any] = {"block": block, "random": random_masks, "tube": tube}
GRID = (14, 14)


def config(kind: str, **options: Any) -> Any:
    return validate(KINDS[kind].Config, options)


def draw(
    kind: str, grid: tuple[int, ...] = GRID, views: int = 2, batch: int = 8, step: int = 0, **options: Any
) -> Tensor:
    masks: Masks = config(kind, **options).build()
    return masks.draw(views, grid, seed=0, step=step, batch_size=batch, first=0, count=batch)


def test_every_rule_of_the_folder_is_tested_here() -> None:
    assert plugin_names("ssl_platform.masks") == sorted(KINDS)
    assert all(plugin_class("ssl_platform.masks", name) is KINDS[name].Config for name in KINDS)


# -- what holds for every rule -----------------------------------------------------------------------------------------

grids = {
    "block": st.one_of(
        st.tuples(st.integers(8, 60)),
        st.tuples(st.integers(3, 12), st.integers(3, 12)),
        st.tuples(st.integers(1, 4), st.integers(3, 8), st.integers(3, 8)),
    ),
    "random": st.lists(st.integers(2, 6), min_size=1, max_size=3).map(tuple),
    "tube": st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(3, 6)),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(data=st.data())
@settings(max_examples=40)
def test_ranks_together_draw_what_one_draws(kind: str, data: st.DataObject) -> None:
    grid = data.draw(grids[kind])
    views, ranks, per_rank = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    num_masks, seed, step = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99)), data.draw(st.integers(0, 99))
    masks, batch = config(kind, num_masks=num_masks).build(), ranks * per_rank
    place = {"seed": seed, "step": step, "batch_size": batch}
    whole = masks.draw(views, grid, first=0, count=batch, **place)
    parts = [masks.draw(views, grid, first=rank * per_rank, count=per_rank, **place) for rank in range(ranks)]
    assert whole.shape == (views, num_masks, batch, math.prod(grid)) and whole.dtype == torch.bool
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_masks_differ_between_steps_seeds_views_samples_and_versions(kind: str) -> None:
    grid = (2, 14, 14) if kind == "tube" else GRID
    options = {"num_masks": 3} | ({} if kind == "tube" else {"probability": 1.0, "ratio": [0.3, 0.3]})
    masks = config(kind, **options).build()
    place = {"batch_size": 4, "first": 0, "count": 4}
    drawn = torch.stack([masks.draw(2, grid, seed=seed, step=step, **place) for seed in (0, 1) for step in (0, 1)])
    assert len({row.numpy().tobytes() for row in drawn.flatten(0, 3)}) == 4 * 2 * 3 * 4


# -- which views are masked --------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 40), st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 9))
def test_shares_are_spread_evenly_over_the_range(
    views: int, batch: int, probability: float, low: float, width: float, step: int
) -> None:
    ratio = (low, low + width)
    shares = hidden_shares(views, batch, probability=probability, ratio=ratio, seed=1, step=step)
    num_masked = int(views * batch * probability)
    assert shares.shape == (views, batch) and np.count_nonzero(shares) <= num_masked
    largest = np.sort(shares, axis=None)[views * batch - num_masked :]
    edges = np.linspace(*ratio, num_masked + 1)
    assert (edges[:-1] - 1e-12 <= largest).all() and (largest <= edges[1:] + 1e-12).all()


def test_masked_views_are_anywhere_in_the_global_batch() -> None:
    counts = np.zeros((2, 8))
    for step in range(2000):
        counts += hidden_shares(2, 8, probability=0.5, ratio=(0.1, 0.5), seed=0, step=step) > 0
    assert np.abs(counts - 1000).max() < 4 * math.sqrt(500)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["block", "random"])
def test_exactly_the_configured_share_of_views_is_masked(kind: str, probability: float) -> None:
    for step in range(5):
        masked = draw(kind, batch=15, step=step, probability=probability, ratio=[0.1, 0.5]).any(-1)
        assert masked.sum() == int(30 * probability)


# -- random and tube ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 7), min_size=1, max_size=3), st.floats(0.01, 0.99), st.integers(1, 3))
@settings(max_examples=50)
def test_random_masks_hide_exactly_the_share(grid: list[int], ratio: float, num_masks: int) -> None:
    masks = draw("random", tuple(grid), batch=3, ratio=ratio, num_masks=num_masks)
    assert (masks.sum(-1) == round(ratio * math.prod(grid))).all()


def test_random_masks_of_a_range_of_shares() -> None:
    counts = draw("random", batch=500, ratio=[0.1, 0.45], num_masks=2).sum(-1)  # (V, M, B)
    assert torch.equal(counts[:, 0], counts[:, 1])
    quantiles = np.quantile(counts / 196, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, np.linspace(0.1, 0.45, 5), atol=0.01)


def test_random_masks_hide_every_token_equally_often() -> None:
    counts = draw("random", (4, 5), views=1, batch=2000, ratio=0.3).sum((0, 1, 2))
    assert (counts - 600).abs().max() < 4 * math.sqrt(2000 * 0.3 * 0.7)


@given(grids["tube"], st.integers(1, 3))
@settings(max_examples=40)
def test_tubes_hide_the_same_places_at_all_times(grid: tuple[int, int, int], num_masks: int) -> None:
    masks = draw("tube", grid, batch=3, num_masks=num_masks).unflatten(-1, grid)  # (V, M, B, T, H, W)
    assert torch.equal(masks, masks[..., :1, :, :].expand_as(masks))
    assert (masks[..., 0, :, :].sum((-1, -2)) == round(0.9 * grid[1] * grid[2])).all()


# -- blocks ------------------------------------------------------------------------------------------------------------


def reference_mask(grid: tuple[int, int], num_wanted: int, rng: random.Random) -> np.ndarray:
    """DINOv2's MaskingGenerator, written out from its description: a rectangle at a time, ten attempts each."""
    height, width = grid
    mask, missing = np.zeros(grid, dtype=bool), num_wanted
    while missing > 0:
        added, limit = 0, min(missing, int(0.5 * height * width))
        for _ in range(10):
            area, aspect = rng.uniform(4, limit), math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if wide >= width or tall >= height:
                continue
            top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
            part = mask[top : top + tall, left : left + wide]
            fresh = int((~part).sum())
            if 0 < fresh <= limit:
                part[:] = True
                added = fresh
                break
        if added == 0:
            break
        missing -= added
    return mask


def borders(mask: np.ndarray) -> int:
    """How often a hidden token has a visible neighbour: few for blocks."""
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_blocks_are_distributed_as_those_of_dinov2(share: float) -> None:
    rng, wanted = random.Random(0), int(share * 196)
    theirs = np.stack([reference_mask(GRID, wanted, rng) for _ in range(600)])
    ours = draw("block", views=1, batch=600, probability=1.0, ratio=[share, share]).view(600, *GRID).numpy()
    for statistic in (
        lambda masks: masks.sum((1, 2)).astype(float),
        lambda masks: np.array([borders(mask) for mask in masks], dtype=float),
        lambda masks: masks[:, 5:9, 5:9].mean((1, 2)),  # the center is hidden more often than
        lambda masks: masks[:, :3, :3].mean((1, 2)),  # the corners
    ):
        expected, found = statistic(theirs), statistic(ours)
        error = math.sqrt((expected.var() + found.var()) / 600)
        assert abs(expected.mean() - found.mean()) <= 4 * error + 1e-9
        assert 0.75 < (found.std() + 1e-3) / (expected.std() + 1e-3) < 1.33


def test_shares_of_a_whole_batch_are_those_of_dinov2() -> None:
    """Half the views empty, the others between 10 and 50 percent, hardly below what was wanted."""
    shares = hidden_shares(2, 64, probability=0.5, ratio=(0.1, 0.5), seed=0, step=3)
    hidden = draw("block", batch=64, step=3).float().mean(-1)[:, 0].numpy()
    assert ((hidden == 0) == (shares == 0)).all() and (hidden == 0).sum() == 64
    assert (hidden * 196 <= (shares * 196).astype(int) + 1e-3).all()
    assert abs(hidden[hidden > 0].mean() - 0.3) < 0.02


@given(grids["block"], st.floats(0.15, 0.7), st.integers(0, 1000))
@settings(max_examples=80)
def test_filled_blocks_hide_exactly_the_share(grid: tuple[int, ...], ratio: float, step: int) -> None:
    masks = draw("block", grid, batch=2, step=step, probability=1.0, ratio=[ratio, ratio], fill=True)
    assert (masks.sum(-1) == int(ratio * math.prod(grid))).all()
    unfilled = draw("block", grid, batch=2, step=step, probability=1.0, ratio=[ratio, ratio])
    assert (unfilled.sum(-1) <= int(ratio * math.prod(grid))).all()
    assert not (unfilled & ~masks).any()  # filling adds to the same blocks


@pytest.mark.parametrize("grid", [(64,), (14, 14), (8, 14, 14), (1, 14, 14)])
def test_blocks_on_grids_of_any_dimension_reach_their_share(grid: tuple[int, ...]) -> None:
    hidden = draw("block", grid, views=1, batch=100, probability=1.0, ratio=[0.4, 0.4]).float().mean(-1)
    assert 0.33 < hidden.mean() <= 0.4


def test_masks_on_one_axis_are_runs() -> None:
    masks = draw("block", (100,), views=1, batch=50, probability=1.0, ratio=[0.3, 0.3], min_tokens=10).view(50, 100)
    starts = (masks[:, 1:] & ~masks[:, :-1]).sum(-1) + masks[:, 0]
    assert starts.float().mean() < 4


def test_a_cube_has_equal_sides_on_average() -> None:
    sides = [
        config("block").build()._sides(216, draws) for draws in np.random.default_rng(0).random((4000, 2)).tolist()
    ]
    logs = np.log(np.array(sides, dtype=float))
    np.testing.assert_allclose(logs.mean(0), math.log(6), atol=0.05)
    np.testing.assert_allclose(np.exp(logs.sum(1)).mean(), 216, rtol=0.05)


def test_an_aspect_of_one_gives_squares() -> None:
    masks = config("block", aspect=[1.0, 1.0]).build()
    assert masks._sides(25, [0.4]) == [5, 5] and masks._sides(27, [0.1, 0.9]) == [3, 3, 3]


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "grid", "problems"),
    [
        ("block", {}, GRID, []),
        ("block", {"ratio": [0.1, 1.0]}, GRID, ["ratio: 1 hides 196 of 196 tokens; at least one must stay visible"]),
        ("block", {"ratio": [0.5, 0.1]}, GRID, ["ratio: [0.5, 0.1] must be [min, max] with 0 <= min <= max"]),
        ("block", {}, (1, 1), ["ratio: 0.5 hides none of 1 tokens; raise it",
                               "min_tokens: 4 is more than the 1 tokens of group 'global'"]),
        ("block", {"min_tokens": 5}, (3, 3), ["max_fraction: 0.5 of 9 tokens is less than min_tokens 5"]),
        ("block", {"aspect": [2.0, 1.0]}, GRID, ["aspect: [2, 1] must be [min, max] with 0 < min <= max"]),
        ("random", {"ratio": 0.5}, (2, 2), []),
        ("random", {"ratio": 0.9}, (2, 2), ["ratio: 0.9 hides 4 of 4 tokens; at least one must stay visible"]),
        ("random", {"ratio": [0.0, 0.1]}, (2, 2), ["ratio: 0.1 hides none of 4 tokens; raise it"]),
        ("tube", {}, (4, 14, 14), []),
        ("tube", {}, GRID, ["name: tube needs a grid of time x height x width; group 'global' has a grid of 14 x 14"]),
        ("tube", {}, (4, 2, 2), ["ratio: 0.9 hides 4 of 4 tokens; at least one must stay visible"]),
    ],
)  # fmt: skip
def test_problems(kind: str, options: dict[str, Any], grid: tuple[int, ...], problems: list[str]) -> None:
    assert config(kind, **options).problems(grid) == problems


@pytest.mark.parametrize("options", [{"probability": 1.1}, {"num_masks": 0}, {"ratio": [0.1]}, {"min_tokens": 0}])
def test_bad_values_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        config("block", **options)
