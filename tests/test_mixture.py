"""Mixtures: shares that never drift, each sample once a pass, balance and caps, what is logged, what is refused."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_platform.config import Config, ConfigError, validate
from ssl_platform.data.companions.random import Config as RandomCompanions
from ssl_platform.data.index import Index
from ssl_platform.data.mixture import SourceConfig, build_order, described, doubtful_cache, open_shards, summary
from ssl_platform.data.order import Order, Turns, micro_batch_positions
from ssl_platform.data.shards import DataConfig
from ssl_platform.recipe import load_recipe
from ssl_platform.train import main
from tests.test_index import labelled_tar
from tests.test_shards import assert_equal, batches, joined, write_shards

SKIN = Path(__file__).parent / "data" / "skin_tiles"
SMOKE = Path(__file__).parents[1] / "configs" / "smoke" / "pathology.yaml"

seeds = st.integers(0, 2**40)
weights = st.one_of(st.integers(1, 9).map(float), st.sampled_from([0.01, 0.25, 0.3, 0.37, 1.5, 7e-3]))


# -- turns -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(weights, min_size=1, max_size=6), seeds, st.integers(0, 10**12))
def test_shares_never_drift(given_weights: list[float], seed: int, far: int) -> None:
    shares = [Fraction(repr(weight)) for weight in given_weights]
    shares = [share / sum(shares) for share in shares]
    turns, num = Turns([Fraction(repr(weight)) for weight in given_weights], seed), len(shares)
    for first in (0, far // turns.block_size * turns.block_size):
        counts = turns.counts(first)
        for position in range(first, first + min(2 * turns.block_size + 3, 500)):
            assert sum(counts) == position and (position - first > 20 or counts == turns.counts(position))
            off = [abs(count - share * position) for count, share in zip(counts, shares, strict=True)]
            assert all(each < 2 + max(num - 2, 0) * share for each, share in zip(off, shares, strict=True))
            assert position % turns.block_size or max(off) < 1
            which, before = turns[position]
            assert before == counts[which], "turns of one are numbered without a gap"
            counts[which] += 1


@given(st.integers(2, 7), seeds)
def test_equal_weights_take_turns_in_a_new_order_each_time(num: int, seed: int) -> None:
    turns = Turns([Fraction(1)] * num, seed)
    blocks = [tuple(turns[block * num + i][0] for i in range(num)) for block in range(20)]
    assert all(sorted(block) == list(range(num)) for block in blocks)
    assert len(set(blocks)) > 1


def test_turns_are_spread_evenly_and_pinned() -> None:
    """A change of these numbers changes the order of every mixture that is resumed."""
    turns = Turns([Fraction(5), Fraction(1)], "sources", 3)
    drawn = [turns[position][0] for position in range(24)]
    assert drawn == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    half = [Turns([Fraction(1, 2), Fraction("0.499"), Fraction("0.001")], 1)[position][0] for position in range(1000)]
    assert max(abs(half[:end].count(0) - end / 2) for end in range(1000)) < 3, "unlike coins, which would be off by 16"


# -- mixtures of random shards -----------------------------------------------------------------------------------------


def indexed(sources: Sequence[Sequence[int]], labels: Sequence[int] = (), groups: Sequence[int] = ()) -> Any:
    """What `build_order` needs of an index: the shards of each source by their sizes, and columns."""
    counts = np.array([count for source in sources for count in source])
    last = np.cumsum([0] + [len(source) for source in sources]).tolist()
    total = int(counts.sum())
    columns = {"label": np.resize(np.array([*labels, -1]), total), "group": np.resize(np.array([*groups, -1]), total)}
    return SimpleNamespace(
        sources={f"s{i}": range(last[i], last[i + 1]) for i in range(len(sources))},
        shard_ranges=np.stack([np.cumsum(counts) - counts, np.cumsum(counts)], axis=1),
        shard_of=np.repeat(np.arange(len(counts)), counts),
        column=lambda name: (columns[name], []),
        num_samples=total,
    )


def mixed(index: Any, seed: int = 0, window: int = 2, **each: Sequence[Any]) -> Order:
    """A mixture of the index's sources; `each` are the settings of its sources, in their order."""
    configs = {
        name: SourceConfig(shards=Path("x"), **{key: values[i] for key, values in each.items()})
        for i, name in enumerate(index.sources)
    }
    return build_order(index, configs, seed, window)


def of_sources(index: Any, order: Order, num_positions: int) -> list[list[tuple[int, int]]]:
    """What each source shows in the first positions, in turn: (pass, sample)."""
    shown: list[list[tuple[int, int]]] = [[] for _ in index.sources]
    for position in range(num_positions):
        number, sample = order[position]
        shard = int(index.shard_of[sample])
        shown[next(i for i, shards in enumerate(index.sources.values()) if shard in shards)].append((number, sample))
    return shown


sizes = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any), min_size=1, max_size=4)


@settings(max_examples=40)
@given(sizes, seeds, st.integers(1, 6), st.data())
def test_each_sample_once_in_a_pass_of_its_source(
    shard_counts: list[list[int]], seed: int, window: int, data: st.DataObject
) -> None:
    index = indexed(shard_counts)
    given_weights = [data.draw(weights.filter(lambda weight: weight >= 0.2)) for _ in shard_counts]
    order = mixed(index, seed, window, weight=given_weights)
    shown = of_sources(index, order, 300)
    assert [len(each) for each in shown] == list(order.drawn(300).values())
    for counts, each, shards in zip(shard_counts, shown, index.sources.values(), strict=True):
        size, first = sum(counts), int(index.shard_ranges[shards.start, 0])
        for begin in range(0, len(each) - size + 1, size):
            assert {number for number, _ in each[begin : begin + size]} == {begin // size}
            assert sorted(sample - first for _, sample in each[begin : begin + size]) == list(range(size))
    again = mixed(index, seed, window, weight=given_weights)
    for position in data.draw(st.lists(st.integers(0, 299), max_size=10)):
        assert again[position] == order[position], "any position can be asked for, whatever came before"


@settings(max_examples=40)
@given(sizes, st.lists(st.integers(-1, 3), max_size=12), seeds, st.integers(1, 4))
def test_classes_are_drawn_equally_often_and_each_in_passes(
    shard_counts: list[list[int]], labels: list[int], seed: int, window: int
) -> None:
    index = indexed(shard_counts, labels=labels)
    order = mixed(index, seed, window, balance=["label"] * len(shard_counts))
    codes, _ = index.column("label")
    for each, shards in zip(of_sources(index, order, 200), index.sources.values(), strict=True):
        first, last = int(index.shard_ranges[shards.start, 0]), int(index.shard_ranges[shards.stop - 1, 1])
        classes = Counter(codes[first:last].tolist())
        drawn = Counter(int(codes[sample]) for _, sample in each)
        assert all(len(each) // len(classes) <= drawn[label] <= -(-len(each) // len(classes)) for label in classes)
        for label, size in classes.items():
            of_class = [(number, sample) for number, sample in each if codes[sample] == label]
            for begin in range(0, len(of_class) - size + 1, size):
                assert {number for number, _ in of_class[begin : begin + size]} == {begin // size}
                assert len({sample for _, sample in of_class[begin : begin + size]}) == size


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data(), seeds, st.booleans())
def test_caps_hold_in_each_pass_and_all_get_their_turn(
    shard_counts: list[int], data: st.DataObject, seed: int, balanced: bool
) -> None:
    total, most = sum(shard_counts), data.draw(st.integers(1, 4))
    groups = data.draw(st.lists(st.integers(-1, 2), min_size=total, max_size=total))
    labels = data.draw(st.lists(st.integers(0, 1), min_size=total, max_size=total))
    index = indexed([[2], shard_counts], labels=[0, 0, *labels], groups=[-1, -1, *groups])
    order = mixed(index, seed, balance=[None, "label" if balanced else None], max_per_group=[None, most])
    for pool in order.sources[1].pools:
        members = [i for i in range(total) if not balanced or labels[i] == int(pool.name[1])]
        in_group = Counter(groups[i] for i in members)
        expected = {group: size if group < 0 else min(size, most) for group, size in in_group.items()}
        assert pool.pass_size == sum(expected.values())
        shown: Counter[int] = Counter()
        num_passes = int(np.lcm.reduce([size for group, size in in_group.items() if group >= 0] or [1]))
        for number in range(num_passes):
            places = range(number * pool.pass_size, (number + 1) * pool.pass_size)
            drawn = [pool[place] for place in places]
            assert {each for each, _ in drawn} == {number}
            samples = [sample - 2 for _, sample in drawn]
            assert len(set(samples)) == len(samples) and set(samples) <= set(members)
            assert Counter(groups[sample] for sample in samples) == expected
            assert all({sample - 2 for sample in pool.window(place).tolist()} <= set(samples) for place in places)
            shown.update(samples)
        for sample in members:
            size = in_group[groups[sample]]
            assert shown[sample] == num_passes * (1 if groups[sample] < 0 else min(size, most)) / (
                1 if groups[sample] < 0 else size
            )


def test_a_cap_chooses_others_for_another_seed_and_the_next_pass() -> None:
    index = indexed([[10, 10, 10]], groups=[0] * 30)
    chosen = []
    for seed in (0, 0, 1):
        order = mixed(index, seed, max_per_group=[10])
        chosen.append([frozenset(order[10 * number + i][1] for i in range(10)) for number in range(4)])
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 3 and chosen[0][3] == chosen[0][0] and len(frozenset.union(*chosen[0])) == 30
    assert all({sample // 10 for sample in each} == {0, 1, 2} for each in chosen[0]), "not shard by shard"


@given(sizes, seeds, st.integers(1, 3), st.integers(0, 400))
def test_a_window_is_of_one_source_and_class(
    shard_counts: list[list[int]], seed: int, window: int, position: int
) -> None:
    index = indexed(shard_counts, labels=[0, 1, 1])
    order = mixed(index, seed, window, balance=["label"] + [None] * (len(shard_counts) - 1))
    _, sample = order[position]
    others = order.window(position)
    assert sample in others and len(np.unique(index.shard_of[others])) <= window
    names = [
        name for name, shards in index.sources.items() if {int(index.shard_of[other]) for other in others} & {*shards}
    ]
    assert len(names) == 1
    if names == ["s0"]:
        assert len({int(index.column("label")[0][other]) for other in others}) == 1


@settings(max_examples=40)
@given(sizes, seeds, st.integers(1, 3), st.integers(0, 100), st.integers(1, 30))
def test_windows_to_fetch_and_those_to_fetch_next(
    shard_counts: list[list[int]], seed: int, window: int, first: int, num_positions: int
) -> None:
    index = indexed(shard_counts, labels=[0, 1, 1])
    order = mixed(index, seed, window, balance=["label"] + [None] * (len(shard_counts) - 1))
    positions = range(first, first + num_positions)
    current, following = order.windows(positions, end=10**9)
    nothing_after = order.windows(positions, end=first + num_positions)[1]
    assert {order[position][1] for position in positions} <= set(current.tolist())
    assert set(current.tolist()) == {sample for position in positions for sample in order.window(position).tolist()}
    assert set(nothing_after.tolist()) <= set(current.tolist()), "what begins before the end is one of these positions"
    for position in positions:
        pool, place = order._pool(position)
        begin, samples = pool.window_at(place)
        assert pool[begin + len(samples)][1] in following
        assert pool.window(begin).tolist() == samples.tolist() == [pool[begin + i][1] for i in range(len(samples))]


def test_a_source_keeps_its_own_order_whatever_the_weights() -> None:
    index = indexed([[7, 5, 6], [4, 4]])
    one, other = (of_sources(index, mixed(index, weight=given_), 400) for given_ in ([1.0, 3.0], [5.0, 0.5]))
    for left, right in zip(one, other, strict=True):
        size = min(len(left), len(right))
        assert size > 30 and left[:size] == right[:size]


def test_of_thousands_of_classes_few_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    index = indexed([[6] * 50], labels=list(range(100)))
    order = mixed(index, window=50, balance=["label"])
    expected = [order[position] for position in range(500)]
    pools = order.sources[0].pools
    assert len(pools) == 101 and all(pool._windows for pool in pools)
    monkeypatch.setattr("ssl_platform.data.order.MAX_POOLS_IN_MEMORY", 7)
    order = mixed(index, window=50, balance=["label"])
    assert [order[position] for position in range(500)] == expected
    assert sum(bool(pool._windows) for pool in order.sources[0].pools) == 7


def test_the_order_of_a_mixture_is_pinned() -> None:
    """A change of these numbers changes the order of every mixture that is resumed."""
    index = indexed([[4, 3, 5], [2, 3]], labels=[0, 1, 1, 2, -1], groups=[0, 0, 1, 2])
    order = mixed(index, 5, weight=[2.0, 1.0], balance=["label", None], max_per_group=[None, 1])
    assert [order[position] for position in range(18)] == [
        (0, 1),
        (0, 9),
        (0, 13),
        (0, 0),
        (0, 11),
        (0, 16),
        (0, 6),
        (0, 2),
        (0, 12),
        (0, 3),
        (0, 5),
        (0, 14),
        (1, 3),
        (1, 0),
        (1, 12),
        (0, 4),
        (1, 15),
        (0, 8),
    ]


def test_only_windows_are_in_memory() -> None:
    index = indexed([[10] * 300, [10] * 200], labels=[0, 1, 2])
    order = mixed(index, window=4, balance=[None, "label"])
    for position in range(0, 20_000, 3):
        order[position]
    pools = [pool for source in order.sources for pool in source.pools]
    assert len(pools) == 1 + 4
    for pool in pools:
        assert len(pool._windows) <= 3 and len(pool._passes) <= 3
        assert all(len(samples) <= 40 for samples in pool._windows.values())


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Order]:
    """Three sources of one folder (sample 3 is bad), with the label i % 3 of `write_shards`."""
    folder = tmp_path_factory.mktemp("mixture")
    write_shards(folder, [5, 7, 4, 6, 3, 2], bad={3: 255})
    sources = {
        "a": SourceConfig(shards=[folder / "s0.tar", folder / "s1.tar"], weight=2.0, balance="label"),
        "b": SourceConfig(shards=folder / "s[23].tar"),
        "c": SourceConfig(shards=[folder / "s4.tar", folder / "s5.tar"], weight=0.5),
    }
    index = open_shards(None, sources)
    assert {name: [*shards] for name, shards in index.sources.items()} == {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
    return index, build_order(index, sources, 3, 2)


def test_any_world_size_workers_accumulation_and_resume_give_the_same_batches(mixture: tuple[Index, Order]) -> None:
    index, order = mixture
    companions = RandomCompanions(num=1).build(index, {})
    given_: dict[str, Any] = {"batch_size": 12, "order": order, "companions": companions, "last_step": 6}
    whole = list(batches(index, **given_))
    assert_equal(whole, list(batches(index, 2, **given_)))
    assert_equal(whole[4:], list(batches(index, **given_, first_step=4)))
    for ranks, accumulate in ((2, 1), (3, 2), (1, 4)):
        parts = [
            list(batches(index, **given_, rank=rank, world_size=ranks, accumulate=accumulate)) for rank in range(ranks)
        ]
        micro = [joined(each) for each in zip(*parts, strict=True)]
        assert_equal(whole, [joined(micro[accumulate * step : accumulate * (step + 1)]) for step in range(6)])


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([divisor for divisor in range(1, number + 1) if number % divisor == 0])


@settings(max_examples=60)
@given(sizes, seeds, st.integers(1, 40), st.lists(st.integers(0, 5), max_size=4), st.data())
def test_any_split_of_the_work_gives_the_same_global_batches(
    shard_counts: list[list[int]], seed: int, batch_size: int, stops: list[int], data: st.DataObject
) -> None:
    """Each worker of each rank has an order of its own, and wherever the run is stopped it goes on with other numbers."""
    index, num_steps = indexed(shard_counts, labels=[0, 1], groups=[0, 0, 1]), 5
    made = {
        "weight": [data.draw(weights) for _ in shard_counts],
        "balance": [data.draw(st.sampled_from([None, "label", "group"])) for _ in shard_counts],
        "max_per_group": [data.draw(st.sampled_from([None, 1, 2])) for _ in shard_counts],
    }
    whole = mixed(index, seed, **made)
    seen: dict[int, tuple[int, int]] = {}
    for begin, end in pairwise([0, *sorted(stops), num_steps]):
        world_size, workers = (
            data.draw(divisors(batch_size), label="ranks"),
            data.draw(st.integers(0, 4), label="workers"),
        )
        accumulate = data.draw(divisors(batch_size // world_size), label="accumulate")
        numbers = [(step, micro_step) for step in range(begin, end) for micro_step in range(accumulate)]
        for rank in range(world_size):
            orders = [mixed(index, seed, **made) for _ in range(max(workers, 1))]  # without workers it reads by itself
            for number, (step, micro_step) in enumerate(numbers):
                positions = micro_batch_positions(
                    step, micro_step, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=world_size
                )
                assert len(positions) == batch_size // (world_size * accumulate)
                for position in positions:
                    assert position not in seen and position // batch_size == step
                    seen[position] = orders[number % len(orders)][position]
    assert seen == {position: whole[position] for position in range(num_steps * batch_size)}


def test_substitutes_are_of_the_same_source_and_class(mixture: tuple[Index, Order]) -> None:
    index, order = mixture
    seen = joined(list(batches(index, batch_size=70, last_step=2, order=order)))
    assert set(seen.replaced) == {"s0.tar: k003: all white"}
    expected = [order[position][1] for position in range(140)]
    for sample, shown in zip(expected, seen.ids.tolist(), strict=True):
        assert shown == sample if sample != 3 else shown in {0, 6, 9}, "class 0 of source a, without the bad one"
    assert expected.count(3) >= 2


def test_views_of_a_sample_differ_from_pass_to_pass(mixture: tuple[Index, Order]) -> None:
    index, order = mixture
    seen = joined(list(batches(index, batch_size=100, last_step=2, order=order)))
    views = seen.groups["local"].views.transpose(0, 1).flatten(1)
    assert len(torch.unique(views, dim=0)) == 200


# -- configuration -----------------------------------------------------------------------------------------------------


class Run(Config):
    data: DataConfig


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "data.shards: missing; give it as data.shards=FOLDER behind the configuration, or a mixture in 'sources'"),
        (
            {"shards": "x", "sources": {"a": {"shards": "y"}}},
            "data.sources: 'shards' is given too; make it a source of its own, or leave one of both out",
        ),
        (
            {"sources": {"a b": {"shards": "x"}}},
            "data.sources: 'a b' is no name for a source: use letters, digits, _ and - (metrics are named drawn_a b)",
        ),
        ({"sources": {"a": {}}}, "data.sources.a.shards: missing, and it has no default"),
        ({"sources": {"a": {"shards": "x", "weight": 0}}}, "data.sources.a.weight: input should be greater than 0, got 0"),
        (
            {"sources": {"a": {"shards": "x", "weight": float("nan")}}},
            "data.sources.a.weight: input should be a finite number, got NaN",
        ),
        ({"sources": {"a": {"shards": "x", "wieght": 2}}}, "data.sources.a.wieght: unknown key; did you mean 'weight'?"),
        (
            {"sources": {"a": {"shards": "x", "max_per_group": 0}}},
            "data.sources.a.max_per_group: input should be greater than or equal to 1, got 0",
        ),
        (
            {"sources": {"a": {"shards": "x"}, "b": {"shards": "y", "weight": 1e-7}}},
            "data.sources: a weight of 1e-07 is less than a millionth of the sum, 1",
        ),
    ],
)  # fmt: skip
def test_config_errors_are_one_line(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(Run, {"data": data})
    assert raised.value.lines == [expected]


def test_all_problems_of_the_shards_at_once(tmp_path: Path) -> None:
    labelled_tar(tmp_path / "a" / "a.tar", [None, None], site="x")
    labelled_tar(tmp_path / "b" / "b.tar", ["cat", "dog"])
    sources = {
        "a": SourceConfig(shards=tmp_path / "a", balance="label", max_per_group=3),
        "b": SourceConfig(shards=tmp_path / "b", balance="sites"),
        "c": SourceConfig(shards=tmp_path / "c"),
    }
    with pytest.raises(ConfigError) as raised:
        open_shards(None, sources)
    assert raised.value.lines == [
        "data.sources.a.balance: none of its 2 samples has a label",
        "data.sources.a.max_per_group: none of its 2 samples has a group",
        "data.sources.b.balance: no column 'sites'; there are label, group",
        f"data.sources.c.shards: {tmp_path / 'c'}: no such file or folder; expected a folder of tars, a tar, or a "
        "pattern such as x/*.tar",
    ]
    twice = {"a": SourceConfig(shards=tmp_path / "a"), "b": SourceConfig(shards=tmp_path / "a" / "a.tar")}
    with pytest.raises(ConfigError, match=r"data\.sources: .*a\.tar: this shard is in two sources, 'a' and 'b'"):
        open_shards(None, twice)


def test_balance_by_a_column_that_only_one_source_has(tmp_path: Path) -> None:
    for number, site in enumerate(["x", "x", "x", "y"]):
        labelled_tar(tmp_path / "a" / f"{number}.tar", ["cat", "dog"], site=site, group=f"p{number}")
    labelled_tar(tmp_path / "b" / "b.tar", ["dog"])
    sources = {
        "a": SourceConfig(shards=tmp_path / "a", balance="site", max_per_group=1),
        "b": SourceConfig(shards=tmp_path / "b", weight=3),
    }
    index = open_shards(None, sources)
    order = build_order(index, sources, 0, 16)
    sites, names = index.column("site")
    drawn = Counter(int(sites[order[position][1]]) for position in range(800))
    assert names == ["x", "y"] and drawn == {-1: 600, 0: 100, 1: 100}
    assert summary(sources, order, 800) == [
        "source a: 8 samples in 2 classes of site (2 to 6 samples each), at most 1 of a group, so 4 a pass; weight 1 "
        "(25.0 %), 200 drawn in all, 33.3 to 100.0 passes",
        "source b: 1 samples; weight 3 (75.0 %), 600 drawn in all, 600.0 passes",
    ]
    assert doubtful_cache(5, 16, index, order) == [] and doubtful_cache(3, 1, index, order) == []
    assert doubtful_cache(4, 16, index, order) == [
        "data.cache_shards: 4, but the windows of all sources and classes (3) have up to 5 shards together, so shards are "
        "closed and opened again; set it to 5, or data.window_shards lower"
    ]
    other_way_round = build_order(index, dict(reversed(sources.items())), 0, 16)
    assert [other_way_round[position] for position in range(50)] == [order[position] for position in range(50)]
    before = described(sources, index)
    nearly = {**sources, "b": SourceConfig(shards=tmp_path / "b", weight=3.0000001)}
    assert described(nearly, index) != before, "which is another order"
    labelled_tar(tmp_path / "a" / "0.tar", ["cat", "dog"], site="y", group="p0")
    changed = described(sources, open_shards(None, sources))
    assert before.startswith("; a: 4 shards, weight 1, balance site (") and changed != before
    assert changed.partition("max_per_group")[2] == before.partition("max_per_group")[2], "only the sites have changed"


# -- a run -------------------------------------------------------------------------------------------------------------


def command(run_dir: Path, *overrides: str) -> int:
    sources = {
        "left": {"shards": str(SKIN / "shard-000000.tar"), "weight": 2, "balance": "label", "max_per_group": 2},
        "right": {"shards": str(SKIN / "shard-00000[12].tar")},
    }
    given_ = ["data.shards=null", f"data.sources={json.dumps(sources)}", "data.window_shards=2", "tensorboard=false"]
    return main([str(SMOKE), f"run_dir={run_dir}", "steps=6", "save_every=3", "log_every=2", *given_, *overrides])


def test_a_mixture_trains_logs_what_it_drew_and_is_resumed_only_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert command(run_dir) == 0
    log = capsys.readouterr().err
    assert "100 samples in 3 shards, batch 8, 2 sources" in log
    assert "source right: 66 samples; weight 1 (33.3 %), 16 drawn in all, 0.2 passes" in log
    assert (
        "source left: 34 samples in 4 classes of label (5 to 13 samples each, 13 without), at most 2 of a group" in log
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        drawn = line["drawn_left"], line["drawn_right"]
        assert sum(drawn) == 8 * line["step"] and abs(drawn[1] - 8 * line["step"] / 3) < 2
    assert drawn == (32, 16)
    assert load_recipe(run_dir / "config.yaml").data.sources["left"].weight == 2, "valid as input"

    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    assert command(run_dir) == 0
    again = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]

    capsys.readouterr()
    for change in ("weight=3", "max_per_group=3", "balance=group", "balance=null"):
        assert command(run_dir, "steps=12", f"data.sources.left.{change}") == 1
        error = capsys.readouterr().err
        assert "the order of the data was" in error and "left: 1 shards, weight 2, balance label (" in error
        assert "Set data.shards, data.sources and data.window_shards as they were" in error
    assert command(run_dir, "data.sources.left.balance=site") == 1
    assert "data.sources.left.balance: no column 'site'; there are label, group" in capsys.readouterr().err
