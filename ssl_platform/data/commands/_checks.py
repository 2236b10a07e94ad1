"""What `ssl-pack verify` looks for in a shard and between shards."""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from ssl_platform.data.commands._declared import (
    Declared,
    Job,
    Problem,
    Value,
    folder_jobs,
    folders,
    num_rows,
    remote_jobs,
    without,
)
from ssl_platform.data.commands._examine import decode_member, parse_json
from ssl_platform.data.commands._jobs import results
from ssl_platform.data.commands._options import printable
from ssl_platform.data.reading import reason
from ssl_platform.data.remote import Remote, RemoteSettings
from ssl_platform.data.slides import tiles
from ssl_platform.data.tar_headers import tar_members
from ssl_platform.data.tars import Record, ShardScan, parse_record, scan_shard
from ssl_platform.data.transfer import RemoteError
from ssl_platform.location import Url


@dataclass
class Checked:
    """What was looked at and what is wrong with it."""

    shards: int = 0
    samples: int = 0
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def check(
    paths: Sequence[Path | Url],
    *,
    decode: bool,
    unique_keys: bool,
    workers: int,
    remote: RemoteSettings | None = None,
) -> Checked:
    """Checks folders and tars; raises ValueError only if a path stands for nothing, RemoteError if no server answers."""
    whole, jobs = Checked(), list[Job]()
    fetched = Remote(remote or RemoteSettings()) if any(isinstance(path, Url) for path in paths) else None
    for path in paths:
        if isinstance(path, Url):
            assert fetched is not None
            for url, names in fetched.expand(path):
                jobs += remote_jobs(fetched, url, names, with_folder=len(paths) > 1)
            continue
        for folder, names in folders(path):
            jobs += folder_jobs(folder, names, whole.problems, with_folder=len(paths) > 1)
    if not jobs and not whole.problems:
        raise ValueError(f"{paths[0]}: no tar shards in this folder (ssl-pack makes them)")
    whole.shards = len(jobs)
    first_use: dict[bytes, str] = {}
    work = partial(_check_shard, decode=decode, remote=fetched)
    for job, part in results(work, jobs, workers=workers, description="verifying", size=num_rows):
        whole.samples += part.samples
        whole.decoded += part.decoded
        whole.problems += part.problems
        for key in part.keys if unique_keys else ():
            short = hashlib.blake2b(key.encode(), digest_size=16).digest()
            if (other := first_use.setdefault(short, job.name)) != job.name:
                whole.problems.append(Problem(job.name, key, f"the key is also used in {other}"))
        if unique_keys:
            used = set[str]()
            for key in part.keys:
                if key in used:
                    whole.problems.append(Problem(job.name, key, "the key is used twice in this shard"))
                used.add(key)
    return whole


def _check_shard(job: Job, decode: bool, remote: Remote | None) -> Checked:
    if isinstance(job.path, Path):
        return _check_file(job, job.path, decode)
    assert remote is not None
    try:
        with remote.copy(job.path) as path:
            return _check_file(job, path, decode)
    except RemoteError as error:
        if error.out_of_reach:  # the others are too; without an answer nothing can be said of any
            raise
        return Checked(problems=[Problem(job.name, "", printable(without(str(error), job.path)))])


def _check_file(job: Job, path: Path, decode: bool) -> Checked:
    """Checks the shard of a job, which lies at `path`."""
    found = Checked()

    def wrong(key: str, why: str) -> None:
        found.problems.append(Problem(job.name, printable(key), printable(why)))

    if not path.is_file():
        wrong("", "listed in index.json, but there is no such file")
        return found
    size = path.stat().st_size
    if job.declared is not None and size != job.declared.size:
        wrong("", f"has {size} bytes, and {job.declared.size} when it was indexed")
    scan = None
    try:
        scan = scan_shard(path)
    except Exception as error:
        wrong("", without(reason(error), path))
    for name, why in _bad_members(path):
        wrong(name, why)
    if scan is not None and scan.stops and size < scan.stops[-1] + tarfile.BLOCKSIZE:
        wrong("", "the end-of-archive mark is missing: is the file complete?")
    ranges = _ranges(job, scan)
    found.samples, keys = len(ranges), dict[int, str]()
    try:
        file = path.open("rb")
    except OSError:  # as told above
        return found
    with file:
        for number, (start, stop) in enumerate(ranges):
            try:
                file.seek(start)
                data = file.read(max(min(stop, size) - start, 0))
                if len(data) < stop - start:
                    raise ValueError(f"the shard ends at byte {start + len(data)}, inside this sample")
                record = parse_record(data)
            except Exception as error:  # damaged headers make `tarfile` raise almost anything
                wrong(f"sample {number}", f"bytes {start} to {stop}: {reason(error)}")
                continue
            found.keys.append(printable(record.key))
            keys[start] = record.key
            for why in _bad_record(record, job.declared):
                wrong(record.key, why)
            if decode:
                bad, decoded = _bad_media(record, job.path)
                found.decoded += decoded
                for why in bad:
                    wrong(record.key, why)
    if scan is not None and job.declared is not None:
        for number, why in _unlike_the_scan(job.declared, scan):
            wrong(f"sample {number}", why)
        for start, why in _other_categories(job.declared, scan):
            wrong(keys.get(start, f"the sample at byte {start}"), why)
    return found


def _bad_members(path: Path) -> Iterator[tuple[str, str]]:
    """Members that no sample should have, by the headers alone; a damaged tar ends the search, and is told elsewhere."""
    try:
        with path.open("rb") as file:
            for member, _ in tar_members(file):
                parts = PurePosixPath(member.name).parts
                if member.name.startswith("/"):
                    yield member.name, "absolute name"
                if ".." in parts:
                    yield member.name, "name with '..'"
                if member.issym() or member.islnk():
                    yield member.name, f"a link to {member.linkname}, which is not read"
                elif not member.isreg() and not member.isdir():
                    yield member.name, "neither a file nor a folder"
                if member.name.lower().endswith((".gz", ".bz2", ".xz", ".zst")):
                    yield member.name, "compressed member, which is not decompressed when read"
    except Exception:
        return


def _ranges(job: Job, scan: ShardScan | None) -> list[tuple[int, int]]:
    if job.declared is not None:
        rows = job.declared.rows
        return list(zip(rows["start"].tolist(), rows["stop"].tolist(), strict=True))
    return [] if scan is None else list(zip(scan.starts, scan.stops, strict=True))


def _unlike_the_scan(declared: Declared, scan: ShardScan) -> Iterator[tuple[int, str]]:
    """Samples whose byte range is not that of exactly one whole sample."""
    real = dict(zip(scan.starts, scan.stops, strict=True))
    starts, stops = declared.rows["start"], declared.rows["stop"]
    differs = [real.get(start) != stop for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    for number in np.flatnonzero(differs).tolist():
        stop = real.get(int(starts[number]))
        there = "no sample begins there" if stop is None else f"the sample there ends at {stop}"
        yield number, f"the index says bytes {starts[number]} to {stops[number]}, but {there}"
    for start in sorted(real.keys() - set(starts.tolist())):
        yield scan.starts.index(start), f"a sample begins at byte {start}, and the index does not have it"


def _other_categories(declared: Declared, scan: ShardScan) -> Iterator[tuple[int, str]]:
    """Where a sample begins whose label or group, as a scan finds it in `json` or `cls`, is not that of the index."""
    rows = dict(zip(declared.rows["start"].tolist(), declared.rows, strict=True))
    for start, label, group in zip(scan.starts, scan.labels, scan.groups, strict=True):
        for what, value in (("label", label), ("group", group)):
            indexed = declared.value(rows[start], what) if start in rows else value
            if _text(value) != _text(indexed):
                yield start, f"{what} {_said(value)} in the sample, {_said(indexed)} in the index"


def _bad_record(record: Record, declared: Declared | None) -> Iterator[str]:
    """What contradicts itself in a sample."""
    if not record.members.keys() - {"json", "cls"}:
        yield f"no data: the only members are {', '.join(record.members)}"
    if declared is None or declared.about.get("cls_differs"):
        return
    names, label = declared.about["label_names"], parse_json(record.members.get("json", b"")).get("label")
    number = record.members.get("cls", b"").decode(errors="replace").strip()
    if names and isinstance(label, str) and label and number.isdecimal() and len(number) < 10:
        named = names[int(number)] if int(number) < len(names) else "no label"
        if named != label:
            yield f"cls says {number}, which is {named} in the index, and json says '{label}'"


def _text(value: Value) -> str:
    """Numbers as text equal numbers; negative ones are none."""
    text = "" if value is None else str(value)
    return "" if text.startswith("-") and text[1:].isdecimal() else text


def _said(value: Value) -> str:
    return "none" if value is None else repr(value)


def _bad_media(record: Record, shard: Path | Url) -> tuple[list[str], int]:
    """What cannot be decoded, and 1 if something could."""
    bad, decoded = [], 0
    try:
        record = tiles.resolved(record, shard)
    except Exception as error:
        return [f"{tiles.REFERENCE}: {reason(error)}"], 0
    for extension, data in record.members.items():
        try:
            decoded |= decode_member(extension.rpartition(".")[2], data) is not None
        except Exception as error:
            bad.append(f"{extension}: {reason(error)}")
    return bad, decoded
