"""The pipeline: bit-equal batches for any number of workers and ranks, substitutes, evaluation views."""

import io
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_platform.config import Config, ConfigError, validate
from ssl_platform.data import loading
from ssl_platform.data.companions.random import Config as RandomCompanions
from ssl_platform.data.index import Index
from ssl_platform.data.order import Order, micro_batch_positions
from ssl_platform.data.reading import BadSampleError, ShardReader
from ssl_platform.data.shards import DataConfig, preprocessed, train_batches
from ssl_platform.modalities import GroupSpec
from ssl_platform.views import Batch, SampleViews


class Toy:
    """Four bytes are an example; its views show it with noise from both generators. Bytes of 255 are bad."""

    groups = {"global": GroupSpec(2, (1, 4), (2, 2)), "local": GroupSpec(3, (2,), (1, 2))}

    def decode(self, record: dict[str, bytes]) -> Tensor:
        values = torch.tensor(list(record["bin"]), dtype=torch.float32)
        if values[0] == 255:
            raise ValueError("all white")
        return values

    def augment(self, examples: tuple[Any, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        if examples[0][0] == 254:
            raise RuntimeError("this augmentation\nfails")
        companions = torch.stack([example[0] for example in examples])
        noisy = examples[0] + torch.rand(2, 1, 4) + float(rng.random())
        conv = nn.functional.conv2d(torch.rand(1, 8, 40, 40), torch.rand(8, 8, 3, 3)).mean()
        return {
            "global": SampleViews(noisy, torch.tensor([0, 1]), {"companions": companions, "conv": conv}),
            "local": SampleViews(examples[0][:2] + torch.rand(3, 2), torch.tensor([2, 3, 4])),
        }

    def preprocess(self, example: Any) -> Tensor:
        if example[0] == 253:
            raise IndexError("no centre")
        return example[None]  # type: ignore[no-any-return]

    def patch_embed(self, embed_dim: int, group: str = "global") -> nn.Module:
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        return {}


class ToyMasks:
    """Says what it was asked for."""

    def __init__(self, group: str) -> None:
        self.group = group

    def draw(
        self, num_views: int, grid: tuple[int, ...], *, seed: int, step: int, batch_size: int, first: int, count: int
    ) -> Tensor:
        numbers = torch.arange(batch_size)[first : first + count] + 7 * step + seed  # (B,)
        return (numbers[:, None] % 5 == torch.arange(int(np.prod(grid)))).expand(num_views, 1, -1, -1)


def write_shards(folder: Path, counts: Sequence[int], bad: dict[int, int] | None = None) -> Index:
    """Sample i holds the byte i four times, or `bad[i]`; its label is i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(len(counts)):
        with tarfile.open(folder / f"s{shard:x}.tar", "w") as tar:
            for sample in range(sum(counts[:shard]), sum(counts[: shard + 1])):
                for name, contents in (
                    ("bin", bytes([(bad or {}).get(sample, sample)] * 4)),
                    ("cls", b"%d" % (sample % 3)),
                ):
                    member = tarfile.TarInfo(f"k{sample:03d}.{name}")
                    member.size = len(contents)
                    tar.addfile(member, io.BytesIO(contents))
    return Index.open(folder)


def batches(index: Index, workers: int = 0, **given_: Any) -> Generator[Batch, None, None]:
    arguments: dict[str, Any] = {
        "seed": 3, "batch_size": 8, "accumulate": 1, "first_step": 0, "last_step": 9, "rank": 0, "world_size": 1,
        "cache_shards": 3, "companions": None, "prefetch": 2,
    }  # fmt: skip
    arguments["order"] = Order.of_shards(index.shard_counts, given_.get("seed", 3), given_.pop("window_shards", 2))
    masks = {"a": ToyMasks("global"), "b": ToyMasks("local"), "c": ToyMasks("global")}
    return train_batches(index, Toy(), masks, workers=workers, **(arguments | given_))


def assert_equal(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    """Bit for bit."""
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert (one.keys, one.step, one.replaced) == (other.keys, other.step, other.replaced)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        assert one.groups.keys() == other.groups.keys()
        for name, group in one.groups.items():
            twin = other.groups[name]
            assert torch.equal(group.views, twin.views) and torch.equal(group.source, twin.source)
            assert group.masks.keys() == twin.masks.keys() and group.extra.keys() == twin.extra.keys()
            assert all(torch.equal(group.masks[key], twin.masks[key]) for key in group.masks)
            assert all(torch.equal(group.extra[key], twin.extra[key]) for key in group.extra)


def joined(parts: Sequence[Batch]) -> Batch:
    """What one rank sees of what several do."""
    groups = {}
    for name, first in parts[0].groups.items():
        groups[name] = type(first)(
            torch.cat([part.groups[name].views for part in parts], dim=1),
            first.source,
            {key: torch.cat([part.groups[name].masks[key] for part in parts], dim=2) for key in first.masks},
            {key: torch.cat([part.groups[name].extra[key] for part in parts]) for key in first.extra},
        )
    return Batch(
        groups,
        [key for part in parts for key in part.keys],
        torch.cat([part.ids for part in parts]),
        torch.cat([part.labels for part in parts]),
        parts[0].step,
        [line for part in parts for line in part.replaced],
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 7, 4, 6], bad={3: 255, 11: 254})


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_what_it_says(index: Index) -> None:
    seen = list(batches(index, last_step=3))
    assert [batch.step for batch in seen] == [0, 1, 2]
    for batch in seen:
        assert batch.groups["global"].views.shape == (2, 8, 1, 4) and batch.groups["local"].views.shape == (3, 8, 2)
        assert batch.groups["global"].masks.keys() == {"a", "c"} and batch.groups["local"].masks["b"].shape == (
            3,
            1,
            8,
            2,
        )
        assert batch.keys == [f"k{sample:03d}" for sample in batch.ids.tolist()]
        assert batch.ids.dtype == batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, batch.ids % 3)
        shown = batch.groups["global"].views.amin(dim=(0, 2, 3))
        assert torch.equal((shown - batch.ids >= 0) & (shown - batch.ids < 2), torch.ones(8, dtype=torch.bool))
        expected = ToyMasks("global").draw(2, (2, 2), seed=3, step=batch.step, batch_size=8, first=0, count=8)
        assert torch.equal(batch.groups["global"].masks["a"], expected)


def test_an_epoch_shows_each_good_sample_with_new_noise_each_time(index: Index) -> None:
    seen = [batch for batch in batches(index, batch_size=11, last_step=4)]
    epochs = [joined(seen[:2]), joined(seen[2:])]
    good = set(range(22)) - {3, 11}
    assert all(good <= set(epoch.ids.tolist()) <= good for epoch in epochs)
    views = [dict(zip(epoch.ids.tolist(), epoch.groups["global"].views.unbind(1), strict=True)) for epoch in epochs]
    assert all(not torch.equal(views[0][sample], views[1][sample]) for sample in good)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_workers_gives_the_same_bits(index: Index, accumulate: int) -> None:
    companions = RandomCompanions(num=2).build(index, {})
    torch.set_num_threads(2)  # the number of threads must not matter either
    alone = list(batches(index, accumulate=accumulate, companions=companions))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert len(alone) == 9 * accumulate
    assert_equal(alone, list(batches(index, accumulate=accumulate, companions=companions)))
    for workers in (1, 2):
        assert_equal(alone, list(batches(index, workers, accumulate=accumulate, companions=companions)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_share_the_batches_of_one_rank(index: Index, accumulate: int) -> None:
    whole = list(batches(index, batch_size=12, accumulate=accumulate))
    for ranks in (2, 3):
        parts = [
            list(batches(index, batch_size=12, accumulate=accumulate, rank=rank, world_size=ranks))
            for rank in range(ranks)
        ]
        assert_equal(whole, [joined(micro_batch) for micro_batch in zip(*parts, strict=True)])


def test_accumulation_splits_the_same_global_batch(index: Index) -> None:
    whole = list(batches(index))
    micro = list(batches(index, accumulate=4))
    assert_equal(whole, [joined(micro[4 * step : 4 * step + 4]) for step in range(9)])


def test_resuming_goes_on_where_it_stopped(index: Index) -> None:
    whole = list(batches(index, accumulate=2))
    assert_equal(whole[10:], list(batches(index, accumulate=2, first_step=5)))
    assert list(batches(index, first_step=9)) == []


def test_global_generators_are_left_alone(index: Index) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.random()
    np.random.seed(1)
    list(batches(index, last_step=2))
    list(batches(index, 2, last_step=2))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.random() == before[1]


def test_no_steps_and_uneven_batches(index: Index) -> None:
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of accumulate 3 times 1 ranks"):
        next(batches(index, accumulate=3))


# -- bad samples -------------------------------------------------------------------------------------------------------


def test_bad_samples_are_replaced_and_named(index: Index) -> None:
    seen = joined(list(batches(index, batch_size=22, last_step=1)))
    assert set(seen.replaced) == {"s0.tar: k003: all white", "s1.tar: k011: RuntimeError: this augmentation fails"}
    assert len(seen.keys) == 22 and {3, 11}.isdisjoint(seen.ids.tolist())


def test_a_substitute_comes_from_the_window_and_looks_different(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [6, 6, 6, 6], bad={3: 255, 15: 255})
    for step, batch in enumerate(batches(index, batch_size=12, last_step=8)):
        shards = set(index.shard_of[batch.ids.numpy()].tolist())
        assert len(shards) <= 2, f"step {step}: one window is two shards, and half an epoch"
        views = batch.groups["global"].views.flatten(2).transpose(0, 1).flatten(1)  # (B, 8)
        assert len(torch.unique(views, dim=0)) == 12, "a substitute must not equal the sample itself"


def test_the_run_stops_where_nothing_can_be_read(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [5], bad=dict.fromkeys(range(5), 255))
    with pytest.raises(BadSampleError, match="21 samples in a row cannot be used") as raised:
        next(batches(index, batch_size=1))
    assert str(raised.value).count("all white") == 21
    with (
        pytest.raises(BadSampleError, match="21 samples in a row cannot be used"),
        closing(batches(index, 2)) as loaded,
    ):
        next(loaded)


def test_shards_that_change_under_way(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [4, 4, 4])
    tar = tmp_path / "s1.tar"
    os.truncate(tar, 1700)
    (tmp_path / "s2.tar").unlink()
    seen = next(batches(index, batch_size=12, last_step=1, window_shards=3))
    assert set(seen.ids.tolist()) <= set(range(4))
    assert any(line.startswith("s1.tar: sample 4: the shard ends at byte 1700, inside") for line in seen.replaced)
    assert any(line.startswith("s2.tar: sample 8: FileNotFoundError: ") for line in seen.replaced)


def test_a_bad_companion_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [2], bad={1: 255})
    seen = next(batches(index, batch_size=2, last_step=1, companions=lambda sample, rng: (0,)))
    assert set(seen.ids.tolist()) == {0} and set(seen.replaced) == {"s0.tar: k001: all white"}
    with pytest.raises(BadSampleError, match=r"s0\.tar: k001: all white"):
        next(batches(index, batch_size=2, companions=RandomCompanions().build(index, {})))


# -- reading -----------------------------------------------------------------------------------------------------------


def test_open_files_are_bounded(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [1] * 12)
    reader = ShardReader(index, cache_shards=3)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for sample in [*range(12), *range(12), 11, 0, 11]:
        assert reader.read(sample).members["bin"] == bytes([sample] * 4)
        assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 3
    del reader
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


# -- workers -----------------------------------------------------------------------------------------------------------


def test_workers_end_when_the_iterator_is_closed(index: Index) -> None:
    before = multiprocessing.active_children()
    with closing(batches(index, 2, last_step=10_000)) as loaded:
        next(loaded)
        workers = [process for process in multiprocessing.active_children() if process not in before]
        assert len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_signal_to_all_processes_does_not_lose_the_batches_of_the_step(
    index: Index, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if it comes while the second worker still begins."""
    begin = loading._begin_worker
    monkeypatch.setattr(loading, "_begin_worker", lambda number: (time.sleep(number * seconds), begin(number)))
    before = multiprocessing.active_children()
    with closing(batches(index, 2, last_step=50)) as loaded:
        next(loaded)
        for worker in multiprocessing.active_children():
            if worker in before:
                continue
            assert worker.pid is not None
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                os.kill(worker.pid, number)
        time.sleep(0.1)
        assert len(list(loaded)) == 49


# -- companions --------------------------------------------------------------------------------------------------------


class Counted:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@given(st.integers(2, 30), st.data())
def test_random_companions_are_others_and_different(size: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, size - 1))
    sample = data.draw(st.integers(0, size - 1))
    draw = RandomCompanions(num=num).build(Counted(size), {})  # type: ignore[arg-type]
    drawn = draw(sample, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert len(drawn) == num == len({*drawn} - {sample}) and all(0 <= other < size for other in drawn)


def test_random_companions_are_uniform() -> None:
    draw = RandomCompanions().build(Counted(5), {})  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(2, rng)[0] for _ in range(8000)], minlength=5)
    assert counts[2] == 0 and np.abs(np.delete(counts, 2) - 2000).max() < 150


def test_companions_follow_the_sample(index: Index) -> None:
    companions = RandomCompanions(num=3).build(index, {})
    for batch in batches(index, companions=companions, last_step=2):
        shown = batch.groups["global"].extra["companions"]  # (B, 4)
        assert torch.equal(shown[:, 0].long(), batch.ids)
        assert all(len(set(row)) == 4 for row in shown.tolist())
    with pytest.raises(ValueError, match=r"companions\.num: 22 other samples cannot be drawn from 22 samples"):
        RandomCompanions(num=22).build(index, {})


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_preprocessed_keeps_the_order(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [5, 7])
    for workers in (0, 2):
        seen = list(preprocessed(index, Toy(), batch_size=5, workers=workers))
        assert [len(ids) for _, ids in seen] == [5, 5, 2]
        assert torch.cat([ids for _, ids in seen]).tolist() == list(range(12))
        views = torch.cat([views for views, _ in seen])
        assert torch.equal(views, torch.arange(12.0)[:, None, None].expand(12, 1, 4))
    chosen = np.array([7, 1, 1])
    (views, ids), (last, _) = preprocessed(index, Toy(), batch_size=2, ids=chosen)
    assert ids.tolist() == [7, 1] and views[:, 0, 0].tolist() == [7, 1] and last.shape == (1, 1, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_preprocessed_stops_at_a_bad_sample(tmp_path: Path, workers: int) -> None:
    index = write_shards(tmp_path, [5], bad={2: 253})
    with pytest.raises(BadSampleError, match=r"s0\.tar: k002: IndexError: no centre"):
        list(preprocessed(index, Toy(), batch_size=2, workers=workers))


# -- configuration -----------------------------------------------------------------------------------------------------


class Run(Config):
    data: DataConfig


def test_config_reads_as_it_should() -> None:
    run = validate(Run, {"data": {"shards": ["a", "b"], "companions": {"name": "random", "num": 3}}})
    assert run.data.shards == [Path("a"), Path("b")] and run.data.companions == RandomCompanions(num=3)
    assert validate(Run, {"data": {"shards": "a", "companions": "random"}}).data.shards == Path("a")


def test_config_errors_are_lines() -> None:
    with pytest.raises(ConfigError) as raised:
        validate(Run, {"data": {"shards": "a", "cache_shards": 8}})
    assert raised.value.lines == [
        "data.cache_shards: 8 is smaller than the shuffle window, window_shards 16: shards would be closed and opened "
        "again for every sample"
    ]
    with pytest.raises(ConfigError) as raised:
        validate(Run, {"data": {"shards": "a", "worker": 2, "workers": -1, "companions": {"name": "rndom"}}})
    assert raised.value.lines[0].startswith("data.workers: input should be greater than or equal to 0")
    assert raised.value.lines[1] == "data.companions: unknown name 'rndom'; did you mean 'random'?"
    assert raised.value.lines[2] == "data.worker: unknown key; did you mean 'workers'?"


def test_micro_batches_are_where_the_order_says(index: Index) -> None:
    order = [sample for batch in batches(index, last_step=4) for sample in batch.ids.tolist()]
    for rank in range(2):
        for number, batch in enumerate(batches(index, accumulate=2, rank=rank, world_size=2, last_step=4)):
            positions = micro_batch_positions(
                number // 2, number % 2, batch_size=8, accumulate=2, rank=rank, world_size=2
            )
            assert batch.ids.tolist() == order[positions.start : positions.stop]
