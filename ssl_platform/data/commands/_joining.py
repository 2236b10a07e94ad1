"""Joins the shards of several folders in one, and says whether the class numbers in their tars still hold."""

import errno
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_platform.data.channel_statistics import joined
from ssl_platform.data.commands._jobs import files_of, folders_of, read_keys, results
from ssl_platform.data.commands._out import Unfinished, unfinished
from ssl_platform.data.index import Index
from ssl_platform.data.index_files import read_description, write_index
from ssl_platform.data.index_rows import describe
from ssl_platform.data.pack_state import shard_name
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.slides import tiles
from ssl_platform.data.tars import ShardScan, atomic_file, scan_shard

logger = logging.getLogger(__name__)

_NAMED = 5


class _Job(NamedTuple):
    source: Path
    out: Path
    samples: int
    source_state: list[int]
    """Size and time of the source."""


def merge(inputs: Sequence[Path], out: Path, *, link: bool, allow_duplicate_keys: bool, workers: int) -> dict[str, Any]:
    """Writes the folder `out`; returns its description. Raises ValueError for what a user can mend."""
    index = Index.open(inputs)
    files = files_of(index)
    if any(file.parent == out.absolute() for file in files):
        raise ValueError(f"{out}: is one of the inputs; name an empty or new folder")
    if not allow_duplicate_keys:
        _refuse_duplicates(index, workers)
    jobs = [
        _Job(source, out / shard_name(number), index.shard_counts[number], _state(source))
        for number, source in enumerate(files)
    ]
    settings = {
        "command": "merge",
        "inputs": [
            [source.name, *_state(source)[:1], count] for source, count in zip(files, index.shard_counts, strict=True)
        ],
        "samples": hashlib.blake2b(index.starts.tobytes() + index.stops.tobytes(), digest_size=16).hexdigest(),
    }
    needed = 0 if link else sum(job.source_state[0] for job in jobs)
    with unfinished(out, settings, needed, tiles.REPORT) as folder:
        tiles.join_tables(folders_of(index), out)
        scans = {}
        work = partial(_place, folder, link)
        for job, scan in results(work, jobs, workers=workers, description="merging", size=lambda job: job.samples):
            folder.finish(job.out.name, {"bytes": scan.size, "source": job.source_state})
            scans[job.out.name] = scan
            first, stop = index.shard_ranges[len(scans) - 1].tolist()
            if scan.starts != index.starts[first:stop].tolist() or scan.stops != index.stops[first:stop].tolist():
                raise ValueError(
                    f"{job.source}: its samples do not lie where its index says; `ssl-pack verify` names what is wrong"
                )
        folder.save()
        about, rows = describe(scans, scanned=False, statistics=_joined_statistics(inputs, index))
        about["cls_differs"] = cls_differs([Index.open(path) for path in inputs], about["label_names"])
        write_index(out, about, rows)
    return about


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _refuse_duplicates(index: Index, workers: int) -> None:
    keys = read_keys(index, np.arange(len(index)), workers)
    seen: dict[str, int] = {}
    twice = []
    for sample, key in enumerate(keys):
        first = seen.setdefault(key, sample)
        if first != sample:
            twice.append(f"  '{key}': {_place_of(index, first)} and {_place_of(index, sample)}")
    if twice:
        more = [f"  and {len(twice) - _NAMED} more"] * (len(twice) > _NAMED)
        raise ValueError(
            "\n".join(
                [
                    f"{len(twice)} keys are used twice; --allow-duplicate-keys keeps all these samples",
                    *twice[:_NAMED],
                    *more,
                ]
            )
        )


def _place_of(index: Index, sample: int) -> str:
    shard = files_of(index)[int(index.shard_of[sample])]
    return f"{shard.parent.name}/{shard.name}"


def _place(folder: Unfinished, link: bool, job: _Job) -> ShardScan:
    """Copies or links one shard, unless that is done, and scans it."""
    record = folder.record(job.out.name)
    if record is None or record["source"] != job.source_state:
        folder.begin()
        if link:
            _link(job.source, job.out)
        else:
            with job.source.open("rb") as source, atomic_file(job.out) as file:
                shutil.copyfileobj(source, file, 1 << 22)
    return scan_shard(job.out)


def _link(source: Path, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        os.link(source.resolve(), temporary)
        temporary.replace(out)
        temporary.unlink(missing_ok=True)  # a rename to another link of the same file does nothing
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise ValueError(
                f"{source}: cannot be linked to {out.parent} ({error.strerror}): leave out --link"
            ) from error
        raise


def _joined_statistics(inputs: Sequence[Path], index: Index) -> dict[str, Any] | None:
    """Of all pixels, if every input is a whole folder and says how many pixels its mean and std are of."""
    every = [_whole_statistics(path) for path in inputs]
    known = [statistics for statistics in every if statistics is not None]
    missing = [str(path) for path, statistics in zip(inputs, every, strict=True) if statistics is None]
    together = None if missing else joined(known)
    if together is None:
        logger.warning(
            "no mean and std of the channels: %s",
            f"not known for the whole of {missing[0]}"
            if missing
            else "the inputs differ in their number of channels, or in what the values are",
        )
        return None
    older = [str(path) for path, statistics in zip(inputs, known, strict=True) if not statistics.get("distribution")]
    if older:
        logger.warning(
            "no percentiles of the channels: %s was packed before these were kept; pack it again to have them", older[0]
        )
    return together


def _whole_statistics(path: Path) -> dict[str, Any] | None:
    """A tar of a folder is not what the folder's statistics are of."""
    about = read_description(path) if path.is_dir() else None
    statistics = about["statistics"] if about else None
    return statistics if statistics and "pixels" in statistics else None


def cls_differs(indexes: Sequence[Index], label_names: Sequence[str]) -> bool:
    """Whether `cls` members, numbered as in their own index, disagree with `label_names`; warns if so."""
    for index in indexes:
        if not index.label_names:
            continue
        present = np.unique(index.labels[index.labels >= 0]).tolist()
        for label in present:
            name = index.label_names[label]
            number = label_names.index(name) if name in label_names else label  # pruned away
            if number != label and _has_cls(index, label):
                logger.warning(
                    "the number of class '%s' is %d in `cls` members of %s and %d in the new index.json: ssl-train and "
                    "ssl-eval go by the names and are right, other tools that read `cls` are not",
                    label_names[number],
                    label,
                    files_of(index)[0].parent,
                    number,
                )
                return True
    return any(_says_so(shard.parent) for index in indexes for shard in files_of(index)[:1])


def _has_cls(index: Index, label: int) -> bool:
    """Whether the first sample with that label has both a class number and a name of its own."""
    sample = int(np.flatnonzero(index.labels == label)[0])
    members = ShardReader(index, cache_shards=1).read(sample).members
    return members.get("cls", b"").strip().isdigit() and b"label" in members.get("json", b"")


def _says_so(folder: Path) -> bool:
    """An input that was itself merged from such."""
    about = read_description(folder)
    return bool(about and about.get("cls_differs"))
