"""Packs items into folders of tar shards with an index: makes what no earlier run has finished, then the index."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssl_platform.data.identity import Names, numbered, own_salt, write_lookup
from ssl_platform.data.index_files import read_description, write_index
from ssl_platform.data.index_rows import describe
from ssl_platform.data.items import Item
from ssl_platform.data.media import Options, check_packages, statistics_of
from ssl_platform.data.pack_state import (
    Lock,
    Part,
    check_folder,
    clear,
    clear_parts,
    missing_parts,
    read_state,
    write_state,
)
from ssl_platform.data.planning import Plan, check_room, make_plan
from ssl_platform.data.processes import parallel
from ssl_platform.data.splits import Splits, assign_splits
from ssl_platform.data.tar_writing import Job, Shard, make_shard, statistics
from ssl_platform.data.tars import ShardScan, atomic_file, scan_shard
from ssl_platform.data.work_progress import WorkProgress

logger = logging.getLogger(__name__)


class NothingToPack(ValueError):
    """Not one input of a folder can be used."""


class Packed(NamedTuple):
    """What is in one folder now."""

    folder: Path
    about: dict[str, Any] | None
    """What `index.json` says; None where other parts have still to finish theirs."""
    missing: str = ""
    """What they have to finish, in words."""
    num_left_out: int = 0
    """Inputs that could not be read, of the whole folder, or of this part where others are not finished."""


def pack(
    items: Sequence[Item],
    out: Path,
    settings: Mapping[str, Any],
    *,
    samples_per_shard: int = 1000,
    shard_megabytes: float | None = None,
    seed: int = 0,
    tile: int = 0,
    min_tissue: float = 0.0,
    splits: Splits = None,
    names: Names | None = None,
    keep_columns: Sequence[str] = (),
    part: Part = Part(),  # noqa: B008 (immutable)
    workers: int = 1,
    overwrite: bool = False,
    ignore_room: bool = False,
) -> list[Packed]:
    """Packs items into `out`, or each split into its folder of `out`; returns what is there now, folder by folder.

    Finished shards of the same plan are kept. `settings` is what the user asked for besides: it decides, with the other
    options and the items, whether a plan is the same. Without `names` they are hashed with a salt of their own.
    Raises ValueError for what a user can mend, OSError if the disk cannot.
    """
    if overwrite and not part.is_whole:
        raise ValueError("--overwrite: parts would delete each other's shards; delete OUT, or give it without --part")
    check_folder(out, _split_names(items, splits))
    media = {item.medium for item in items}
    check_packages(media)
    settings = {**settings, **({"statistics_of": of} if (of := statistics_of(media)) != {} else {})}
    names = own_salt(out) if names is None else names
    samples = numbered(items, names, keep_columns)
    divided = assign_splits(samples, splits, seed)
    if splits is not None and all(item.group is None for item in items):
        logger.warning("no sample has a group: whoever is in several samples may be in several splits")
    plans = [
        make_plan(
            out / split,
            held,
            {**settings, "min_tissue": min_tissue, **({"split": splits, "name": split} if splits else {})},
            names,
            Options(tile, keep_metadata=names.are_plain),
            samples_per_shard=samples_per_shard,
            shard_megabytes=shard_megabytes,
            seed=seed,
            min_tissue=min_tissue,
        )
        for split, held in divided.items()
    ]
    to_do = [job for plan in plans for job in plan.unfinished(read_state(plan.folder, plan.settings, overwrite))]
    check_room(out, to_do, ignore_room)
    if not names.are_plain:
        write_lookup(out, items, names, divided)
    packed, empty = [], []
    for plan in plans:  # one split of bad files takes nothing from the others
        try:
            packed.append(_pack_folder(plan, part, workers, overwrite))
        except NothingToPack as error:
            empty.append(str(error))
    if empty:
        others = [str(one.folder) for one in packed]
        raise ValueError("\n".join(empty) + f"\npacked: {', '.join(others)}" * bool(others))
    return packed


def _split_names(items: Sequence[Item], splits: Splits) -> set[str]:
    if isinstance(splits, str):
        return {item.split for item in items if item.split}
    return {*(splits or ())}


def _pack_folder(plan: Plan, part: Part, workers: int, overwrite: bool) -> Packed:
    mine = part.shards(len(plan.jobs))
    lock = Lock(plan.folder)
    try:
        lock.take(None if part.is_whole else mine)
        finished = read_state(plan.folder, plan.settings, overwrite)
        if overwrite:
            clear(plan.folder)
        if mine and not (plan.folder / "pack.json").exists():
            write_state(plan.folder, Part(), plan.settings, {})
        jobs = [plan.jobs[number]._replace(done=finished.get(plan.jobs[number].path.name)) for number in mine]
        _remove_leftovers(plan.folder, None if part.is_whole else [job.path.name for job in jobs])
        ours = {job.path.name for job in jobs}
        before = {name: shard for name, shard in finished.items() if name in ours}
        shards, scans = _make(plan, part, jobs, before, workers)
        if part.is_whole:
            return _finish(plan, shards, scans, workers)
        lock.release_shards()
        lock.wait_for_index()
        everything = read_state(plan.folder, plan.settings)
        num_left_out = sum(len(shard.left_out) for shard in shards.values())
        if not all(_is_there(job.path, everything) for job in plan.jobs):
            return Packed(plan.folder, None, missing_parts(plan.folder), num_left_out)
        if not lock.take_all():
            return Packed(plan.folder, None, "the index, which the last part at work writes", num_left_out)
        about = read_description(plan.folder)  # of a part that finished with this one
        if about is not None:
            clear_parts(plan.folder)
            return Packed(plan.folder, about, num_left_out=about["unreadable"])
        return _finish(plan, everything, scans, workers)
    finally:
        lock.close()


def _is_there(path: Path, shards: Mapping[str, Shard]) -> bool:
    return path.name in shards and path.is_file() and path.stat().st_size == shards[path.name].bytes


def _remove_leftovers(folder: Path, shards: Sequence[str] | None) -> None:
    """Deletes what killed runs left: all of it, or what they left of certain shards while others are at work."""
    for pattern in [".*.part"] if shards is None else [f".{name}.*.part" for name in shards]:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _make(
    plan: Plan, part: Part, jobs: Sequence[Job], finished: Mapping[str, Shard], workers: int
) -> tuple[dict[str, Shard], dict[str, ShardScan]]:
    """Makes the shards of the jobs and keeps account of them, whatever ends this run."""
    shards, scans = dict(finished), dict[str, ShardScan]()
    due = -math.inf
    with WorkProgress(sum(len(job.samples) for job in jobs), "packing") as progress:
        try:
            for job, made in parallel(make_shard, jobs, workers):
                for line in made.reasons:
                    logger.warning("left out: %s", line)
                shards[job.path.name], scans[job.path.name] = made.shard, made.scan
                progress.advance(len(job.samples), made.shard.bytes, is_new=made.is_new)
                if (begun := time.monotonic()) > due:
                    write_state(plan.folder, part, plan.settings, shards)
                    due = time.monotonic() + max(5, 20 * (time.monotonic() - begun))  # of many shards it takes seconds
        finally:
            if jobs:
                write_state(plan.folder, part, plan.settings, shards)
    return shards, scans


def _finish(plan: Plan, shards: Mapping[str, Shard], scans: Mapping[str, ShardScan], workers: int) -> Packed:
    """Writes the list of what was left out, the state of all parts together, and last the index."""
    every = [shards[job.path.name] for job in plan.jobs]
    left_out = [entry for shard in every for entry in shard.left_out]
    write_state(plan.folder, Part(), plan.settings, shards)
    clear_parts(plan.folder)
    _write_left_out(plan.folder, left_out)
    without_tissue = sum(shard.without_tissue for shard in every)
    dropped = dict(sum((Counter(shard.dropped) for shard in every), Counter[str]()))
    if not any(shard.samples for shard in every):
        raise NothingToPack(
            f"{plan.folder}: nothing to pack: of {sum(len(job.samples) for job in plan.jobs)} inputs {len(left_out)} cannot "
            "be used (named above)"
            + f" and {without_tissue} have less than min_tissue {plan.settings['min_tissue']}" * bool(without_tissue)
            + "".join(f", {number} are {check}" for check, number in dropped.items())
        )
    noted = dict(sum((Counter(shard.noted) for shard in every), Counter[str]()))
    if noted:
        counts = ", ".join(f"{number} {note}" for note, number in sorted(noted.items()))
        logger.warning("%s: of %d samples, %s", plan.folder, sum(shard.samples for shard in every), counts)
    channels = sorted({int(channels) for shard in every for channels in shard.pixels})
    if len(channels) > 1:
        logger.warning("the samples have %s channels, so there is no mean and std", " and ".join(map(str, channels)))
    others = [job.path for job in plan.jobs if job.path.name not in scans]
    about, rows = describe(
        {**scans, **{path.name: scan for path, scan in parallel(scan_shard, others, workers)}},
        scanned=False,
        statistics=statistics(every, plan.settings.get("statistics_of", {})),
        unreadable=len(left_out),
        without_tissue=without_tissue,
        dropped=dropped,
        noted=noted,
        packed=plan.settings,
    )
    write_index(plan.folder, about, rows)
    return Packed(plan.folder, about, num_left_out=len(left_out))


def _write_left_out(folder: Path, left_out: Sequence[Sequence[str]]) -> None:
    path = folder / "left_out.tsv"
    if not left_out:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as file:
        file.write("".join(f"{key}\t{reason}\n" for key, reason in [("key", "reason"), *left_out]).encode())
