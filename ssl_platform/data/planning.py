"""The plan of a pack: which samples go into which shard of which folder, and how much room that takes."""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.identity import Names, Numbered
from ssl_platform.data.media import Options, is_kept, load
from ssl_platform.data.order import generator
from ssl_platform.data.pack_state import shard_name
from ssl_platform.data.tar_writing import Job, Shard

logger = logging.getLogger(__name__)

_BLOCK = 512
_MOST_SIZES = 10_000
"""So many files are looked at for the estimate of the whole."""
_MOST_MEASURED = 32
_MOST_TO_CLEAN = 8e6
"""Bytes of a file that is stored without its metadata or its sound, up to which it is measured by how much that is: a
thumbnail in small images is most of them, and an hour of video takes minutes to decode."""


class Plan(NamedTuple):
    """What one folder will hold."""

    folder: Path
    settings: dict[str, Any]
    """What the user asked for; with the items it decides whether a plan is the same."""
    jobs: list[Job]
    """Of all parts."""

    def unfinished(self, finished: Mapping[str, Shard]) -> list[Job]:
        return [job for job in self.jobs if job.path.name not in finished]


def make_plan(
    folder: Path,
    samples: Sequence[Numbered],
    settings: Mapping[str, Any],
    names: Names,
    options: Options,
    *,
    samples_per_shard: int,
    shard_megabytes: float | None,
    seed: int,
    min_tissue: float,
) -> Plan:
    """Shuffles samples into shards of equal numbers, give or take one, or of equal size, give or take one sample."""
    order = generator("pack", seed).permutation(len(samples))
    if shard_megabytes is None:
        chosen = np.array_split(order, -(-len(samples) // samples_per_shard))
    else:
        chosen = _equal_sizes(order, stored_sizes(samples), shard_megabytes * 1e6)
    jobs = []
    for number, places in enumerate(chosen):
        held = [samples[place] for place in places.tolist()]
        if options.tile:  # the tiles of an image together, so that it is decoded once a shard
            firsts = {sample.item.path: place for place, sample in reversed(list(enumerate(held)))}
            held.sort(key=lambda sample: firsts[sample.item.path])
        jobs.append(Job(folder / shard_name(number), held, options, min_tissue, names, None))
    items = names.hash(16)
    for sample in samples:
        items.update(repr((sample.key, *sample.item[1:])).encode())  # all but the path: a data set may move
    whole = {
        **settings,
        **({"shard_megabytes": shard_megabytes} if shard_megabytes else {"samples_per_shard": samples_per_shard}),
        "seed": seed,
        "num_shards": len(jobs),
        "items": items.hexdigest(),
        "names": names.fingerprint,
    }
    if shard_megabytes:  # where the shards are cut depends on the sizes of the files
        whole["cuts"] = names.digest("cuts", [len(job.samples) for job in jobs], size=8)
    return Plan(folder, json.loads(json.dumps(whole)), jobs)  # tuples are lists, as in the file it is compared with


def _equal_sizes(order: NDArray[np.int64], sizes: NDArray[np.float64], wanted: float) -> list[NDArray[np.int64]]:
    """The order, cut where the sum of the sizes passes each multiple of the shards' mean size."""
    sums = np.cumsum(sizes[order])
    num_shards = math.ceil(sums[-1] / wanted)
    cuts = np.searchsorted(sums, sums[-1] * np.arange(1, num_shards) / num_shards)
    return np.split(order, np.unique(cuts[(cuts > 0) & (cuts < len(order))]))


# -- room --------------------------------------------------------------------------------------------------------------


def stored_sizes(samples: Sequence[Numbered]) -> NDArray[np.float64]:
    """(N,): the bytes that whole files take in a tar, with headers and padding; 0 for files that are not there."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return 0

    with ThreadPoolExecutor(16) as pool:  # a network file system answers each slowly, but many at a time
        sizes = np.array(list(pool.map(size, [sample.item.path for sample in samples])), dtype=np.float64)
    return _in_tar(sizes, samples)


def _in_tar(sizes: NDArray[np.float64], samples: Sequence[Numbered]) -> NDArray[np.float64]:
    """With the blocks that a tar adds: a header for each member, and one for the contents of `json` and `cls`."""
    more = np.array([5 if sample.label >= 0 else 3 for sample in samples], dtype=np.float64)
    return (np.ceil(sizes / _BLOCK) + more) * _BLOCK


def estimate(jobs: Sequence[Job]) -> float:
    """About the bytes of shards that are still to be made: of files by their sizes and what becomes of some."""
    samples = [sample for job in jobs for sample in job.samples]
    tiles = [sample for sample in samples if not sample.item.is_whole]
    files = [sample for sample in samples if sample.item.is_whole]
    total = 0.0
    if files:
        total += float(stored_sizes(_some(files, _MOST_SIZES)).mean()) * len(files)
    for is_as_it_is in (True, False):
        alike = [sample for sample in files if is_kept(sample.item.medium, sample.item.extension) == is_as_it_is]
        total += _change(alike, jobs[0].options, _MOST_TO_CLEAN if is_as_it_is else math.inf)
    if tiles:
        same = [tile for tile in tiles if tile.item.path == tiles[0].item.path]  # an image is decoded once for them all
        chosen = tiles if tiles[0].item.corner is None and len(same) < _MOST_MEASURED else same
        measured, sizes = _measured(_some(chosen, _MOST_MEASURED), jobs[0].options)
        total += float(sizes.mean()) * len(tiles) if measured else 0.0
    return total


def _change(files: Sequence[Numbered], options: Options, most_bytes: float) -> float:
    """About the bytes by which shards are larger than files of one kind, or smaller; of larger files nothing is known."""
    if not files:
        return 0.0
    chosen = _some(files, _MOST_MEASURED)
    small = [sample for sample, size in zip(chosen, stored_sizes(chosen), strict=True) if size <= most_bytes]
    measured, sizes = _measured(small, options)
    if not measured:
        return 0.0
    return float(sizes.mean() - stored_sizes(measured).mean()) * len(files) * len(small) / len(chosen)


def _some(samples: Sequence[Numbered], most: int) -> Sequence[Numbered]:
    return samples[:: -(-len(samples) // most)]


def _measured(samples: Sequence[Numbered], options: Options) -> tuple[list[Numbered], NDArray[np.float64]]:
    """Those of the samples that can be used, and the bytes that they take in a tar."""
    sizes, measured = [], []
    for sample in samples:
        try:
            sizes.append(len(load(sample.item, options).data))
            measured.append(sample)
        except (OSError, ValueError):  # it will be left out, with the reason
            continue
    return measured, _in_tar(np.array(sizes, dtype=np.float64), measured)


def check_room(out: Path, jobs: Sequence[Job], ignore: bool) -> None:
    """Says what is to come; raises ValueError if the disk cannot hold it, unless that is to be ignored."""
    if not jobs:
        return
    needed = estimate(jobs)
    there = out.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    room = f"about {size_text(needed)} in {len(jobs)} shard{'s' * (len(jobs) > 1)}, {size_text(free)} free"
    if needed > free and not ignore:
        raise ValueError(f"{out}: {room}: make room, or go on with --ignore-room")
    logger.info("%s: %s", out, room)


def size_text(num_bytes: float) -> str:
    """As people say it: "3.2 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
