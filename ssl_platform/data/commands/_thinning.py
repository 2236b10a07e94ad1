"""Writes the samples that are kept into new shards, byte for byte, and says what went."""

import csv
import hashlib
import io
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.commands._choosing import Choice, Rules, choose
from ssl_platform.data.commands._examine import decode_members
from ssl_platform.data.commands._jobs import results
from ssl_platform.data.commands._joining import cls_differs
from ssl_platform.data.commands._options import counted
from ssl_platform.data.commands._out import Unfinished, shard_name, unfinished
from ssl_platform.data.index import Index
from ssl_platform.data.index_files import describe, write_index
from ssl_platform.data.reading import reason
from ssl_platform.data.tar_writing import Shard, _count, statistics
from ssl_platform.data.tars import ShardScan, atomic_file, parse_record, scan_shard

logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    out: Path
    samples: NDArray[np.int64]
    inputs: str
    """A digest of what is copied."""


def prune(
    inputs: Sequence[Path], out: Path, rules: Rules, *, samples_per_shard: int, measure: bool, workers: int
) -> dict[str, Any]:
    """Writes the folder `out`; returns its description. Raises ValueError for what a user can mend."""
    index = Index.open(inputs)
    if any(shard.parent == out.absolute() for shard in index.shards):
        raise ValueError(f"{out}: is one of the inputs; name an empty or new folder")
    choice = choose(index, rules, workers)
    kept = choice.left
    if not len(kept):
        raise ValueError(f"none of the {len(index)} samples would be left; keep more")
    chunks = np.array_split(kept, -(-len(kept) // samples_per_shard))
    jobs = [_Job(out / shard_name(number), chunk, _digest(index, chunk)) for number, chunk in enumerate(chunks)]
    settings = {"command": "prune", "samples_per_shard": samples_per_shard, "kept": [job.inputs for job in jobs]}
    needed = int((index.stops[kept] - index.starts[kept]).sum()) + len(jobs) * tarfile.RECORDSIZE
    with unfinished(out, settings, needed, "dropped.csv") as folder:
        shards, scans = [], {}
        work = partial(_write_shard, index, folder, measure)
        for job, (shard, scan) in results(
            work, jobs, workers=workers, description="pruning", size=lambda job: len(job.samples)
        ):
            folder.finish(job.out.name, asdict(shard))
            shards.append(shard)
            scans[job.out.name] = scan
        folder.save()
        undecoded = sum(len(shard.unreadable) for shard in shards)
        if undecoded:
            logger.warning("%s cannot be decoded, such as %s", counted(undecoded, "sample"), _first(shards))
        about, rows = describe(
            scans,
            scanned=False,
            statistics=statistics(shards) if measure and not undecoded else None,
            dropped=dict(Counter(rule for rule, _ in choice.dropped.values())),
        )
        about["cls_differs"] = cls_differs([Index.open(path) for path in inputs], about["label_names"])
        with atomic_file(out / "dropped.csv") as file:
            file.write(_dropped_table(choice))
        write_index(out, about, rows)
    return about


def _digest(index: Index, samples: NDArray[np.int64]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard in np.unique(index.shard_of[samples]).tolist():
        digest.update(f"{index.shards[shard].name} {index.shards[shard].stat().st_size} ".encode())
    for column in (samples, index.starts[samples], index.stops[samples]):
        digest.update(column.tobytes())
    return digest.hexdigest()


def _first(shards: Sequence[Shard]) -> str:
    return next(line for shard in shards for line in shard.unreadable)


def _write_shard(index: Index, folder: Unfinished, measure: bool, job: _Job) -> tuple[Shard, ShardScan]:
    """Copies the samples of a shard, unless that is done; with `measure`, decodes them for the statistics."""
    record = folder.record(job.out.name)
    if record is not None and record["inputs"] == job.inputs and (record["samples"] or not measure):
        return Shard(**record), scan_shard(job.out)
    shard = Shard(inputs=job.inputs)
    with atomic_file(job.out) as file:
        for sample in job.samples.tolist():
            data = _bytes_of(index, sample)
            file.write(data)
            if measure:
                _measure(index, sample, data, shard)
        size = file.tell() + 2 * tarfile.BLOCKSIZE  # the end of an archive, filled up as `tarfile` does it
        file.write(bytes(-(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - file.tell()))
    scan = scan_shard(job.out)
    if len(scan.starts) != len(job.samples):
        raise ValueError(
            f"{job.out}: {len(scan.starts)} samples can be told apart, not the {len(job.samples)} that were copied: "
            "two with the same key follow each other, or the index is wrong; `ssl-pack verify` names what it is"
        )
    shard.bytes = scan.size
    return shard, scan


def _bytes_of(index: Index, sample: int) -> bytes:
    place = index[sample]
    file = os.open(index.shards[place.shard], os.O_RDONLY)
    try:
        data = os.pread(file, place.stop - place.start, place.start)
    finally:
        os.close(file)
    try:
        parse_record(data)
    except Exception as error:  # damaged headers make `tarfile` raise almost anything
        raise ValueError(
            f"{index.shards[place.shard]}: sample {sample}: {reason(error)}; leave such samples out with --drop-bad"
        ) from error
    return data


def _measure(index: Index, sample: int, data: bytes, shard: Shard) -> None:
    record = parse_record(data)
    try:
        media = decode_members(record.members)
        if media is None:
            raise ValueError(f"no image among its members {', '.join(record.members)}")
        _count(shard, media.pixels.numpy())
    except ValueError as error:
        shard.unreadable.append(f"{index.shards[index[sample].shard].name}: {record.key}: {error}")


def _dropped_table(choice: Choice) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "id", "rule", "why"])
    for sample, (rule, why) in sorted(choice.dropped.items()):
        writer.writerow([choice.keys[sample], sample, rule, why])
    return text.getvalue().encode()
