"""The pipeline: positions in the global order -> records -> examples -> views -> batches with masks."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from ssl_platform.config import Config, ConfigError, plugin
from ssl_platform.data.companions import Companions
from ssl_platform.data.index import Index
from ssl_platform.data.loading import loaded, reproducible
from ssl_platform.data.mixture import SourceConfig, mixture_problems
from ssl_platform.data.order import Order, generator, micro_batch_positions
from ssl_platform.data.reading import BadSampleError, ShardReader, decoded, reason
from ssl_platform.data.remote import RemoteSettings, default_cache_dir
from ssl_platform.data.tar_headers import shown
from ssl_platform.location import Location
from ssl_platform.masks import Masks
from ssl_platform.modalities import Filtered, Modality
from ssl_platform.views import Batch, SampleViews, collate

Item = TypeVar("Item")

MAX_SUBSTITUTES = 20
"""So many bad samples in a row at one position are not chance: the run stops."""
MAX_FILTERED = 1000
"""Likewise of samples that a filter leaves out."""
NUM_AHEAD = 2
"""Remote shards that evaluation has fetched before it reads them."""


class DataConfig(Config):
    """Which samples a run sees, in which order, and how they are read."""

    shards: Location | list[Location] | None = None
    """A folder that ssl-pack made, a folder of WebDataset tars, a tar, a pattern such as `x/*.tar`, or a list; each may be
    a URL (https://, s3://, gs://, ...)."""
    sources: dict[str, SourceConfig] = {}
    """In place of `shards`, a mixture: {name: {shards, weight, balance, max_per_group}}."""
    window_shards: int = Field(default=16, ge=1)
    """Samples are shuffled among this many shards; the shards are shuffled too. More mixes better and reads wider.

    In a mixture, each source (and each class that it balances) has a window of its own.
    """
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
    cache_dir: Path | None = None
    """Where copies of remote shards are kept, for all processes of a node and for later runs: a fast local disk. None = in
    the user's cache folder (~/.cache/ssl_platform/shards)."""
    cache_gigabytes: float = Field(default=50.0, gt=0)
    """So much of it at most (10^9 bytes); what was not used for longest makes room."""
    timeout_seconds: float = Field(default=30.0, gt=0)
    """A transfer that gets no byte for so long has stalled."""
    retries: int = Field(default=7, ge=0)
    """Tries after the first, with growing pauses (one to two minutes in all), before a shard that cannot be had ends the
    run."""
    allow_pipe: bool = False
    """Whether `pipe:COMMAND` in `shards` may run its command in a shell."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        lines = mixture_problems(self.sources)
        if self.shards is None and not self.sources:
            lines.append(
                "shards: missing; give it as data.shards=FOLDER behind the configuration, or a mixture in 'sources'"
            )
        if self.shards is not None and self.sources:
            lines.append("sources: 'shards' is given too; make it a source of its own, or leave one of both out")
        if self.cache_shards < self.window_shards:
            lines.append(
                f"cache_shards: {self.cache_shards} is smaller than the shuffle window, window_shards "
                f"{self.window_shards}: shards would be closed and opened again for every sample"
            )
        if lines:
            raise ValueError(ConfigError(lines))
        return self

    def remote(self) -> RemoteSettings:
        """What the readers of remote shards take."""
        return RemoteSettings(
            cache_dir=self.cache_dir or default_cache_dir(),
            cache_gigabytes=self.cache_gigabytes,
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
            allow_pipe=self.allow_pipe,
        )


def modality_of_step(modality: Modality, seed: int, step: int) -> Modality:
    """What makes the views of a step: the modality, or one of its variants, drawn by seed and step alone.

    So all ranks, workers and micro-batches of a step agree, and nothing needs to be saved.
    """
    variants = getattr(modality, "variants", ())
    if not variants:
        return modality
    shares = np.cumsum([variant.probability for variant in variants])
    drawn = generator("variant", seed, step).random() * shares[-1]
    chosen: Modality = variants[min(int(np.searchsorted(shares, drawn, side="right")), len(variants) - 1)].modality
    return chosen


class MicroBatches(Dataset[Batch]):
    """Item j is the j-th micro-batch of one rank, from `first_step` on: a pure function of its arguments."""

    def __init__(
        self,
        index: Index,
        modality: Modality,
        masks: Mapping[str, Masks],
        *,
        order: Order,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world_size: int = 1,
        cache_shards: int,
        companions: Companions | None = None,
    ) -> None:
        self.index, self.modality, self.masks, self.companions = index, modality, masks, companions
        self.seed, self.batch_size, self.accumulate = seed, batch_size, accumulate
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.world_size = rank, world_size
        self.order = order
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
        modality = modality_of_step(self.modality, self.seed, step)
        self._expect(positions)
        replaced: list[str] = []
        filtered: list[str] = []
        with reproducible():
            samples = [self._sample(modality, position, replaced, filtered) for position in positions]
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
            return self._with_masks(batch, modality, first=positions.start - step * self.batch_size)

    def _expect(self, positions: range) -> None:
        """Has remote shards fetched ahead: those of the windows that these positions are in, and of the next one."""
        if self.reader.remote is None:
            return
        current, following = self.order.windows(positions, self.last_step * self.batch_size)
        self.reader.expect(self.reader.shards_of(current), self.reader.shards_of(following))

    def _sample(
        self, modality: Modality, position: int, replaced: list[str], filtered: list[str]
    ) -> tuple[int, str, dict[str, SampleViews]]:
        """The sample at a position of the order: its id, its key, its views."""
        epoch, sample = self.order[position]  # an epoch is a pass of the sample's source or class
        bad: list[str] = []
        unwanted: list[str] = []
        while len(bad) <= MAX_SUBSTITUTES and len(unwanted) <= MAX_FILTERED:
            attempt = len(bad) + len(unwanted)
            try:
                key, views = self._views(modality, sample, epoch, *([position, attempt] if attempt else []))
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

    def _views(
        self, modality: Modality, sample: int, epoch: int, *more_seeds: int
    ) -> tuple[str, dict[str, SampleViews]]:
        """Read -> decode -> (companions likewise) -> augment, seeded by (seed, key, epoch).

        A substitute has more seeds, lest it looks exactly like itself where the epoch shows it anyway.
        """
        key, example = decoded(self.reader, self.modality, sample)
        rng = generator("augment", self.seed, key, epoch, *more_seeds)
        others = self.companions(sample, rng) if self.companions else ()
        examples = (example, *(decoded(self.reader, self.modality, other)[1] for other in others))
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # torch.manual_seed would seed GPUs too
        try:
            return key, modality.augment(examples, rng)
        except Exception as error:  # whatever one sample makes a library raise must not end the run
            raise BadSampleError(f"{self.reader.shard_name(sample)}: {shown(key)}: {reason(error)}") from error

    def _with_masks(self, batch: Batch, modality: Modality, first: int) -> Batch:
        """Draws this micro-batch's part of the masks of the global batch."""
        groups = dict(batch.groups)
        for name, masks in self.masks.items():
            spec = modality.groups[masks.group]
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
    return loaded(MicroBatches(index, modality, masks, **micro_batches), workers, prefetch)


class _Preprocessed(Dataset[tuple[Tensor, Tensor]]):
    """Item j is the j-th batch of evaluation views."""

    def __init__(
        self, index: Index, modality: Modality, ids: Sequence[int] | NDArray[np.int64], batch_size: int
    ) -> None:
        self.modality, self.ids, self.batch_size = modality, ids, batch_size
        self.reader = ShardReader(index, cache_shards=32)
        self._shards = [] if self.reader.remote is None else self.reader.shards_of(np.asarray(ids))

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        ids = [int(sample) for sample in self.ids[number * self.batch_size : (number + 1) * self.batch_size]]
        if self.reader.remote is not None:
            current = self.reader.shards_of(np.array(ids))
            next_shard = self._shards.index(current[-1]) + 1
            self.reader.expect(current, self._shards[next_shard : next_shard + NUM_AHEAD])
        with reproducible():
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
    return loaded(
        _Preprocessed(index, modality, range(len(index)) if ids is None else ids, batch_size), workers, prefetch
    )
