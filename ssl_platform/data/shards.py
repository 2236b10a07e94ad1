"""The pipeline: positions in the global order -> records -> examples -> views -> batches with masks."""

import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_platform.config import Config, plugin
from ssl_platform.data.companions import Companions
from ssl_platform.data.index import Index
from ssl_platform.data.order import Order, generator, micro_batch_positions
from ssl_platform.data.reading import BadSampleError, ShardReader, decoded, reason
from ssl_platform.data.tars import shown
from ssl_platform.masks import Masks
from ssl_platform.modalities import Filtered, Modality
from ssl_platform.views import Batch, SampleViews, collate

Item = TypeVar("Item")

MAX_SUBSTITUTES = 20
"""So many bad samples in a row at one position are not chance: the run stops."""
MAX_FILTERED = 1000
"""Likewise of samples that a filter leaves out."""


class DataConfig(Config):
    """Which samples a run sees, in which order, and how they are read."""

    shards: Path | list[Path]
    """A folder that ssl-pack made, a folder of WebDataset tars, a tar, a pattern such as `x/*.tar`, or a list."""
    window_shards: int = Field(default=16, ge=1)
    """Samples are shuffled among this many shards; the shards are shuffled too. More mixes better and reads wider."""
    cache_shards: int = Field(default=32, ge=1)
    """So many shards are kept open at once, by each worker."""
    workers: int = Field(default=2, ge=0)
    """Processes that read and augment; 0 = in the training process. The batches do not depend on it."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that each worker makes ahead."""
    max_bad_samples: int = Field(default=100, ge=0)
    """Unreadable samples are replaced and logged; the run stops when there were more than this many different ones."""
    companions: plugin("ssl_platform.data.companions") | None = None  # type: ignore[valid-type]
    """Other samples that each sample's augmentation gets to see (donors, pairs), for the objectives that need them."""

    @model_validator(mode="after")
    def _window_fits_cache(self) -> "DataConfig":
        if self.cache_shards < self.window_shards:
            raise ValueError(
                f"cache_shards {self.cache_shards} is smaller than the shuffle window, window_shards "
                f"{self.window_shards}: shards would be closed and opened again for every sample"
            )
        return self


class MicroBatches(Dataset[Batch]):
    """Item j is the j-th micro-batch of one rank, from `first_step` on: a pure function of its arguments."""

    def __init__(
        self,
        index: Index,
        modality: Modality,
        masks: Mapping[str, Masks],
        *,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
        window_shards: int,
        cache_shards: int,
        companions: Companions | None = None,
    ) -> None:
        self.index, self.modality, self.masks, self.companions = index, modality, masks, companions
        self.seed, self.batch_size, self.accumulate = seed, batch_size, accumulate
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.world_size = rank, world_size
        self.order = Order(index.shard_counts, seed, window_shards)
        self.reader = ShardReader(index, cache_shards)

    def __len__(self) -> int:
        return max(self.last_step - self.first_step, 0) * self.accumulate

    def __getitem__(self, number: int) -> Batch:
        step, micro_step = self.first_step + number // self.accumulate, number % self.accumulate
        positions = micro_batch_positions(
            step,
            micro_step,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=self.rank,
            world_size=self.world_size,
        )
        replaced: list[str] = []
        filtered: list[str] = []
        with _reproducible():
            samples = [self._sample(position, replaced, filtered) for position in positions]
            ids, keys, views = zip(*samples, strict=True)
            batch = collate(
                views,
                keys=list(keys),
                ids=torch.tensor(ids),
                labels=torch.tensor([self.index[sample].label for sample in ids]),
                step=step,
                replaced=replaced,
                filtered=len(filtered),
            )
            return self._with_masks(batch, first=positions.start - step * self.batch_size)

    def _sample(
        self, position: int, replaced: list[str], filtered: list[str]
    ) -> tuple[int, str, dict[str, SampleViews]]:
        """The sample at a position of the order: its id, its key, its views."""
        epoch, sample = self.order[position]
        bad: list[str] = []
        unwanted: list[str] = []
        while len(bad) <= MAX_SUBSTITUTES and len(unwanted) <= MAX_FILTERED:
            attempt = len(bad) + len(unwanted)
            try:
                key, views = self._views(sample, epoch, *([position, attempt] if attempt else []))
            except BadSampleError as error:
                (unwanted if isinstance(error.__cause__, Filtered) else bad).append(str(error))
                window = self.order.window(position)
                sample = int(generator("substitute", self.seed, position, attempt).choice(window))
            else:
                replaced += bad
                filtered += unwanted
                return sample, key, views
        reasons = bad if len(bad) > MAX_SUBSTITUTES else unwanted
        listed = "\n  ".join(reasons[: MAX_SUBSTITUTES + 1])
        raise BadSampleError(f"{len(reasons)} samples in a row cannot be used:\n  {listed}")

    def _views(self, sample: int, epoch: int, *more_seeds: int) -> tuple[str, dict[str, SampleViews]]:
        """Read -> decode -> (companions likewise) -> augment, seeded by (seed, key, epoch).

        A substitute has more seeds, lest it looks exactly like itself where the epoch shows it anyway.
        """
        key, example = decoded(self.reader, self.modality, sample)
        rng = generator("augment", self.seed, key, epoch, *more_seeds)
        others = self.companions(sample, rng) if self.companions else ()
        examples = (example, *(decoded(self.reader, self.modality, other)[1] for other in others))
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # torch.manual_seed would seed GPUs too
        try:
            return key, self.modality.augment(examples, rng)
        except Exception as error:  # whatever one sample makes a library raise must not end the run
            raise BadSampleError(f"{self.reader.shard_name(sample)}: {shown(key)}: {reason(error)}") from error

    def _with_masks(self, batch: Batch, first: int) -> Batch:
        """Draws this micro-batch's part of the masks of the global batch."""
        groups = dict(batch.groups)
        for name, masks in self.masks.items():
            spec = self.modality.groups[masks.group]
            drawn = masks.draw(
                spec.num_views,
                spec.grid,
                seed=self.seed,
                step=batch.step,
                batch_size=self.batch_size,
                first=first,
                count=len(batch.keys),
            )  # (V, M, B, N)
            group = groups[masks.group]
            groups[masks.group] = replace(group, masks={**group.masks, name: drawn})
        return replace(batch, groups=groups)


def train_batches(
    index: Index, modality: Modality, masks: Mapping[str, Masks], *, workers: int, prefetch: int, **micro_batches: Any
) -> Generator[Batch, None, None]:
    """The micro-batches of one rank in their order; `micro_batches` are the other arguments of MicroBatches.

    Close the iterator (`contextlib.closing`) to end its workers.
    """
    return _loaded(MicroBatches(index, modality, masks, **micro_batches), workers, prefetch)


class _Preprocessed(Dataset[tuple[Tensor, Tensor]]):
    """Item j is the j-th batch of evaluation views."""

    def __init__(
        self, index: Index, modality: Modality, ids: Sequence[int] | NDArray[np.int64], batch_size: int
    ) -> None:
        self.modality, self.ids, self.batch_size = modality, ids, batch_size
        self.reader = ShardReader(index, cache_shards=32)

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        ids = [int(sample) for sample in self.ids[number * self.batch_size : (number + 1) * self.batch_size]]
        with _reproducible():
            return torch.stack([self._view(sample) for sample in ids]), torch.tensor(ids)

    def _view(self, sample: int) -> Tensor:
        key, example = decoded(self.reader, self.modality, sample)
        try:
            return self.modality.preprocess(example)
        except Exception as error:
            raise BadSampleError(f"{self.reader.shard_name(sample)}: {shown(key)}: {reason(error)}") from error


def preprocessed(
    index: Index,
    modality: Modality,
    *,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 2,
    ids: Sequence[int] | NDArray[np.int64] | None = None,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The evaluation views of the samples `ids` (None = all), in that order: (views (B, *shape), ids (B,)).

    Raises BadSampleError at the first sample that cannot be used: a score needs every one of its samples.
    """
    return _loaded(
        _Preprocessed(index, modality, range(len(index)) if ids is None else ids, batch_size), workers, prefetch
    )


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, and a torch RNG of its own: the result does not depend on which process computes it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


class _WithErrors(Dataset[Item | BadSampleError]):
    """Gives errors that name a sample as items: a worker would turn them into the text of their traceback."""

    def __init__(self, dataset: Dataset[Item]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Item | BadSampleError:
        try:
            return self.dataset[number]
        except BadSampleError as error:
            return BadSampleError(str(error))


def _loaded(dataset: Dataset[Item], workers: int, prefetch: int) -> Generator[Item, None, None]:
    loader = DataLoader(
        _WithErrors(dataset),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        multiprocessing_context="fork" if workers else None,  # starts in .1 s; forkserver and spawn take 3 s
        generator=torch.Generator(),  # or it would draw from the global RNG
    )
    try:
        for item in loader:  # the workers end when this generator is closed
            if isinstance(item, BadSampleError):
                raise item
            yield item
    except Exception as error:
        if not workers:
            raise
        # The frames of this traceback hold the workers, in a cycle in which their end takes them many seconds; the
        # traceback in the worker is in the error's text.
        raise error.with_traceback(None) from None


def _as_it_is(item: Any) -> Any:
    return item


def _begin_worker(_: int) -> None:
    """Leaves signals to the training process: a scheduler sends them to workers too, and batches are needed to the end
    of the step. A worker that somebody does want to end still does so, half a minute after SIGTERM."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
