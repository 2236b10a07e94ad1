"""Makes one shard of a pack: reads its inputs, checks that each decodes, and writes them as WebDataset members."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset

from ssl_platform.data.channel_statistics import Tally, describe_distribution
from ssl_platform.data.distribution import Distribution, merged
from ssl_platform.data.identity import Names, Numbered
from ssl_platform.data.items import Item
from ssl_platform.data.media import Content, Options, load
from ssl_platform.data.slides.tiles import Unwanted
from ssl_platform.data.tar_headers import shown
from ssl_platform.data.tars import ShardScan, atomic_file, scan_shard
from ssl_platform.modalities.pathology import tissue_fraction

logger = logging.getLogger(__name__)


@dataclass
class Shard:
    """What is known of a finished shard besides the tar itself. It is kept beside the tars, so it names no input."""

    bytes: int = 0
    samples: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    """By the number of channels, as text."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Of the values of each channel: integers as shares of their largest value, floats as they are."""
    squares: dict[str, list[float]] = field(default_factory=dict)
    distributions: dict[str, dict[str, str]] = field(default_factory=dict)
    """As `Distribution.to_json`; {} in shards that were made before these were kept."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """The key of each input that was left out, and "unreadable" (the file) or "unusable" (what is in it)."""
    without_tissue: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """How many tiles of slides each check left out."""
    noted: dict[str, int] = field(default_factory=dict)
    """How many samples have each of the media's notes, such as "silent"."""
    inputs: str = ""
    """Sizes and times of the files that it was made from, as a salted digest."""

    @property
    def adds_up(self) -> bool:
        """False if the sums are not of the same channels, which a damaged file may say."""
        kinds = self.sums, self.squares
        return (
            all(kind.keys() == self.pixels.keys() for kind in kinds)
            and all(str(len(values)) == channels for kind in kinds for channels, values in kind.items())
            and all(self._counts_all(channels) for channels in self.distributions)
        )

    def _counts_all(self, channels: str) -> bool:
        try:
            distribution = Distribution.from_json(self.distributions[channels], len(self.sums[channels]))
        except (ValueError, KeyError):
            return False
        num_values = self.pixels[channels] * len(self.sums[channels])
        return bool((distribution.totals == num_values // len(distribution.counts)).all())

    def measured(self, tally: Tally) -> None:
        """Keeps what was added up of its samples."""
        self.pixels = dict(tally.num_values)
        self.sums = {channels: values.tolist() for channels, values in tally.sums.items()}
        self.squares = {channels: values.tolist() for channels, values in tally.squares.items()}
        self.distributions = {channels: found.to_json() for channels, found in tally.distributions.items()}


class Job(NamedTuple):
    """One shard to be made."""

    path: Path
    samples: list[Numbered]
    options: Options
    min_tissue: float
    names: Names
    done: Shard | None


class Made(NamedTuple):
    """A shard that is there now."""

    shard: Shard
    scan: ShardScan
    reasons: list[str] = []
    """One line for each input that was left out now: path, reason. For whoever packs, and for no file."""
    is_new: bool = True


def make_shard(job: Job) -> Made:
    """Writes a shard, unless it is there, whole, made from the inputs as they are and nothing was left out of it."""
    if job.done is not None and _is_current(job, job.done):
        scan = scan_shard(job.path)
        if len(scan.starts) == job.done.samples:
            return Made(job.done, scan, is_new=False)
    shard, tally, reasons = Shard(inputs=_inputs(job)), Tally(), []
    with (
        atomic_file(job.path) as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar,
    ):
        for sample in job.samples:
            try:
                if job.names.are_plain:
                    _check_name(sample.item.name)
                content = _load(sample.item, job.options)
                enough = job.min_tissue <= 0 or _tissue(content) >= job.min_tissue
            except Unwanted as check:
                shard.dropped[str(check)] = shard.dropped.get(str(check), 0) + 1
                continue
            except (OSError, ValueError) as error:
                shard.left_out.append((sample.key, "unreadable" if isinstance(error, OSError) else "unusable"))
                why = getattr(error, "strerror", None) or error
                reasons.append(f"{shown(sample.item.name)}: {why}{_where(sample.item)}")
                continue
            if not enough:
                shard.without_tissue += 1
                continue
            tar.write(_members(sample, content))
            shard.samples += 1
            for note in content.notes:
                shard.noted[note] = shard.noted.get(note, 0) + 1
            if content.values is not None:
                tally.add(content.values)
        # What is written now is no longer what the index says, which whoever finishes last writes again.
        (job.path.parent / "index.json").unlink(missing_ok=True)
    scan = scan_shard(job.path)
    assert len(scan.starts) == shard.samples, f"{job.path}: {len(scan.starts)} samples written, not {shard.samples}"
    shard.bytes = scan.size
    shard.measured(tally)
    return Made(shard, scan, reasons)


def _where(item: Item) -> str:
    """The file of an item that is named otherwise, if it is not there."""
    return "" if item.path.exists() or str(item.path).endswith(item.name) else f" ({shown(str(item.path))})"


def _is_current(job: Job, done: Shard) -> bool:
    whole = job.path.is_file() and job.path.stat().st_size == done.bytes
    return whole and not done.left_out and _inputs(job) == done.inputs


def _inputs(job: Job) -> str:
    """Changes whenever a file does, an older copy put in its place included; missing files have no size."""
    digest = job.names.hash(16)
    for path in dict.fromkeys(sample.item.path for sample in job.samples):
        found = path.stat() if path.exists() else None
        digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode() if found else b"- ")
    return digest.hexdigest()


def _check_name(name: str) -> None:
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError("its name is not valid UTF-8; rename it")


def _load(item: Item, options: Options) -> Content:
    content = load(item, options)
    values = content.values
    if values is not None and values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("has values that are no finite numbers (NaN, infinity, or so large that they become it)")
    return content


def _tissue(content: Content) -> float:
    assert content.values is not None, "min_tissue is for images"
    return tissue_fraction(torch.from_numpy(content.values))


def _members(sample: Numbered, content: Content) -> dict[str, Any]:
    """The sample as WebDataset wants it: the bytes, `json` with all that may be known, `cls` with the label's number."""
    item = sample.item
    about = {**content.about, **dict(item.columns), "label": item.label, "group": item.group}
    if item.corner is not None:
        about |= {"x": item.corner[0], "y": item.corner[1]}
    members: dict[str, Any] = {
        "__key__": sample.key,
        content.extension: content.data,
        "json": json.dumps(about).encode(),
    }
    if sample.label >= 0:
        members["cls"] = str(sample.label).encode()
    return members


def statistics(shards: Sequence[Shard], of: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Mean, std and percentiles of each channel over all pixels of all shards, as `index.json` has them.

    `of` says what the values are (`media.statistics_of`). None if that or the number of channels differs; without
    percentiles if a shard was made before these were kept.
    """
    kinds = {channels for shard in shards for channels in shard.pixels}
    if len(kinds) != 1 or of is None:
        return None
    (channels,) = kinds
    filled = [shard for shard in shards if channels in shard.pixels]
    pixels = sum(shard.pixels[channels] for shard in filled)
    mean = np.sum([shard.sums[channels] for shard in filled], axis=0) / pixels  # (C,)
    variance = np.sum([shard.squares[channels] for shard in filled], axis=0) / pixels - np.square(mean)
    about = {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist(), "pixels": pixels}
    about |= {"of": dict(of)} if of else {}
    if older := sum(channels not in shard.distributions for shard in filled):
        logger.warning(
            "no percentiles: %d shards were packed before these were kept; --overwrite packs them anew", older
        )
        return about
    every = (Distribution.from_json(shard.distributions[channels], len(mean)) for shard in filled)
    return about | describe_distribution(merged(every))
