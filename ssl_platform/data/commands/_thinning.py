"""Writes the samples that are kept into new shards, byte for byte, and says what went."""

import csv
import hashlib
import io
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.channel_statistics import Tally
from ssl_platform.data.commands._choosing import Choice, Rules, choose
from ssl_platform.data.commands._examine import decode_members
from ssl_platform.data.commands._jobs import files_of, folders_of, results
from ssl_platform.data.commands._joining import cls_differs
from ssl_platform.data.commands._options import counted
from ssl_platform.data.commands._out import Unfinished, unfinished
from ssl_platform.data.index import Index
from ssl_platform.data.index_files import write_index
from ssl_platform.data.index_rows import describe
from ssl_platform.data.media import statistics_of
from ssl_platform.data.pack_state import shard_name
from ssl_platform.data.reading import reason
from ssl_platform.data.slides import tiles
from ssl_platform.data.tar_writing import Shard, statistics
from ssl_platform.data.tars import Record, ShardScan, atomic_file, parse_record, scan_shard

logger = logging.getLogger(__name__)


class _Job(NamedTuple):
    out: Path
    samples: NDArray[np.int64]
    inputs: str
    """A digest of what is copied."""


@dataclass
class _Written:
    """What is known of a finished shard besides the tar itself."""

    inputs: str
    is_measured: bool
    bytes: int = 0
    sums: Shard = field(default_factory=Shard)
    """Of the pixels, for the statistics."""
    media: list[str] = field(default_factory=list)
    """The kinds of data among its samples."""
    undecoded: list[str] = field(default_factory=list)
    """Shard, key and reason of each sample that has no pixels."""


def prune(
    inputs: Sequence[Path], out: Path, rules: Rules, *, samples_per_shard: int, measure: bool, workers: int
) -> dict[str, Any]:
    """Writes the folder `out`; returns its description. Raises ValueError for what a user can mend."""
    index = Index.open(inputs)
    if any(file.parent == out.absolute() for file in files_of(index)):
        raise ValueError(f"{out}: is one of the inputs; name an empty or new folder")
    choice = choose(index, rules, workers)
    kept = choice.left
    if not len(kept):
        raise ValueError(f"none of the {len(index)} samples would be left; keep more")
    chunks = np.array_split(kept, -(-len(kept) // samples_per_shard))
    jobs = [_Job(out / shard_name(number), chunk, _digest(index, chunk)) for number, chunk in enumerate(chunks)]
    settings = {"command": "prune", "samples_per_shard": samples_per_shard, "kept": [job.inputs for job in jobs]}
    needed = int((index.stops[kept] - index.starts[kept]).sum()) + len(jobs) * tarfile.RECORDSIZE
    with unfinished(out, settings, needed, "dropped.csv", tiles.REPORT) as folder:
        tiles.join_tables(folders_of(index), out)
        every, scans = [], {}
        work = partial(_write_shard, index, folder, measure)
        for job, (written, scan) in results(
            work, jobs, workers=workers, description="pruning", size=lambda job: len(job.samples)
        ):
            folder.finish(job.out.name, asdict(written))
            every.append(written)
            scans[job.out.name] = scan
        folder.save()
        if undecoded := [line for written in every for line in written.undecoded]:
            logger.warning("%s cannot be decoded, such as %s", counted(len(undecoded), "sample"), undecoded[0])
        is_known = measure and not undecoded
        of = statistics_of(name for written in every for name in written.media)
        about, rows = describe(
            scans,
            scanned=False,
            statistics=statistics([written.sums for written in every], of) if is_known else None,
            dropped=dict(Counter(rule for rule, _ in choice.dropped.values())),
        )
        about["cls_differs"] = cls_differs([Index.open(path) for path in inputs], about["label_names"])
        with atomic_file(out / "dropped.csv") as file:
            file.write(_dropped_table(choice))
        write_index(out, about, rows)
    return about


def _digest(index: Index, samples: NDArray[np.int64]) -> str:
    digest, files = hashlib.blake2b(digest_size=16), files_of(index)
    for shard in np.unique(index.shard_of[samples]).tolist():
        digest.update(f"{files[shard].name} {files[shard].stat().st_size} ".encode())
    for column in (samples, index.starts[samples], index.stops[samples]):
        digest.update(column.tobytes())
    return digest.hexdigest()


def _write_shard(index: Index, folder: Unfinished, measure: bool, job: _Job) -> tuple[_Written, ShardScan]:
    """Copies the samples of a shard, unless that is done; with `measure`, decodes them for the statistics."""
    record = folder.record(job.out.name)
    if record is not None and record["inputs"] == job.inputs and record["is_measured"] >= measure:
        return _Written(**record | {"sums": Shard(**record["sums"])}), scan_shard(job.out)
    written, tally = _Written(job.inputs, measure), Tally()
    folder.begin()
    with atomic_file(job.out) as file:
        for sample in job.samples.tolist():
            data, record_read = _read(index, sample)
            file.write(data)
            if measure:
                _measure(record_read, files_of(index)[index.shard_number(sample)], written, tally)
        size = file.tell() + 2 * tarfile.BLOCKSIZE  # the end of an archive, filled up as `tarfile` does it
        file.write(bytes(-(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - file.tell()))
    scan = scan_shard(job.out)
    if len(scan.starts) != len(job.samples):
        raise ValueError(
            f"{job.out}: {len(scan.starts)} samples can be told apart, not the {len(job.samples)} that were copied: "
            "two with the same key follow each other, or the index is wrong; `ssl-pack verify` names what it is"
        )
    written.bytes = scan.size
    written.sums.measured(tally)
    return written, scan


def _read(index: Index, sample: int) -> tuple[bytes, Record]:
    """The bytes of a sample, which are exactly one, and what is in them."""
    path = files_of(index)[index.shard_number(sample)]
    file = os.open(path, os.O_RDONLY)
    try:
        index.check(sample)
        place = index[sample]
        data = os.pread(file, place.stop - place.start, place.start)
        return data, parse_record(data)
    except Exception as error:  # damaged headers make `tarfile` raise almost anything
        raise ValueError(f"{path}: sample {sample}: {reason(error)}; leave such samples out with --drop-bad") from error
    finally:
        os.close(file)


def _measure(record: Record, shard: Path, written: _Written, tally: Tally) -> None:
    try:
        decoded = decode_members(tiles.resolved(record, shard).members)
        if decoded is None:
            raise ValueError(f"nothing that can be decoded among its members {', '.join(record.members)}")
    except ValueError as error:
        written.undecoded.append(f"{shard.name}: {record.key}: {error}")
        return
    name, look = decoded
    if (values := look.values()) is not None:
        tally.add(values)
    written.sums.samples += 1
    written.media = sorted({*written.media, name})


def _dropped_table(choice: Choice) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "id", "rule", "why"])
    for sample, (rule, why) in sorted(choice.dropped.items()):
        writer.writerow([choice.keys[sample], sample, rule, why])
    return text.getvalue().encode()
