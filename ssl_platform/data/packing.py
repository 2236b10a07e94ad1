"""Packs items into a folder of tar shards with an index: the plan, and what of it an earlier run has finished."""

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_platform.data.index_files import describe, number, write_index
from ssl_platform.data.order import generator
from ssl_platform.data.sources import Item
from ssl_platform.data.tar_writing import Job, Numbered, Shard, make_shard, statistics
from ssl_platform.data.tars import ShardScan, shown, write_json

logger = logging.getLogger(__name__)

_SHARDS = TypeAdapter(dict[str, Shard])


def pack(
    items: Sequence[Item],
    out: Path,
    settings: dict[str, Any],
    *,
    samples_per_shard: int,
    seed: int,
    tile: int = 0,
    min_tissue: float = 0.0,
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Packs items into `out`; returns what `index.json` says, and a line for each input that could not be read.

    Finished shards of the same plan are kept. `settings` is what the user asked for: it decides, with the items,
    whether a plan is the same. Raises ValueError for what a user can mend, OSError if the disk cannot.
    """
    settings = settings | {"samples_per_shard": samples_per_shard, "seed": seed, "items": _digest(items)}
    settings = json.loads(json.dumps(settings))  # tuples are lists, as in the file that it is compared with
    with _locked(out):
        finished = _finished(out, settings, overwrite)
        jobs = _jobs(items, out, finished, samples_per_shard, seed, tile, min_tissue)
        scans: dict[str, ShardScan] = {}
        saved = 0.0
        try:
            for name, shard, scan in _progress(jobs, workers):
                finished[name], scans[name] = shard, scan
                if time.monotonic() - saved > 5:
                    _save(out, settings, finished)
                    saved = time.monotonic()
        finally:  # what is finished counts, whatever ends this run
            _save(out, settings, finished)
        shards = [finished[name] for name in sorted(finished)]
        unreadable = [line for shard in shards for line in shard.unreadable]
        if not any(shard.samples for shard in shards):
            reason = unreadable[0] if unreadable else f"none of the {len(items)} images has min_tissue {min_tissue}"
            raise ValueError(f"nothing to pack: {reason}")
        channels = sorted({int(channels) for shard in shards for channels in shard.pixels})
        if len(channels) > 1:
            logger.warning("the images have %s channels, so there is no mean and std", " and ".join(map(str, channels)))
        about, rows = describe(
            scans,
            scanned=False,
            statistics=statistics(shards),
            unreadable=len(unreadable),
            without_tissue=sum(shard.without_tissue for shard in shards),
            packed=settings,
        )
        write_index(out, about, rows)
    return about, unreadable


# -- the plan --------------------------------------------------------------------------------------------------------


def _digest(items: Sequence[Item]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(repr(item[1:]).encode())  # all but the path, so that a data set may move
    return digest.hexdigest()


def _jobs(
    items: Sequence[Item],
    out: Path,
    finished: dict[str, Shard],
    samples_per_shard: int,
    seed: int,
    tile: int,
    min_tissue: float,
) -> list[Job]:
    """Shuffled items in shards of equal size, give or take one."""
    labels, _ = number([item.label for item in items])
    num_shards = -(-len(items) // samples_per_shard)
    digits = max(6, len(str(len(items))))
    order = generator("pack", seed).permutation(len(items))
    jobs = []
    for shard, chosen in enumerate(np.array_split(order, num_shards)):
        name = f"shard-{shard:06d}.tar"
        places: list[int] = chosen.tolist()
        if tile:  # the tiles of an image together, so that it is decoded once a shard
            places.sort(key=lambda i: items[i].path)
        samples = [Numbered(_key(items[i], f"{i:0{digits}d}"), items[i], int(labels[i])) for i in places]
        jobs.append(Job(out / name, samples, tile, min_tissue, finished.get(name)))
    return jobs


def _key(item: Item, number: str) -> str:
    """Sorted keys are in the order of the input; no dots, which would end the key."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(item.name).stem)[:60]
    return f"{number}_{stem}" + (f"_x{item.corner[0]}_y{item.corner[1]}" if item.corner else "")


def _finished(out: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Shard]:
    """The shards that an earlier run of the same plan finished; raises ValueError if something else is in `out`."""
    ours = {path.name for path in out.glob("shard-*.tar")} | {"pack.json", "index.json", "index.npy"}
    found = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    if foreign := sorted(found - ours):
        raise ValueError(f"{out}: holds files that ssl-pack did not write ({foreign[0]}, ...): name an empty folder")
    for part in out.glob(".*.part"):
        part.unlink()
    if overwrite:
        for name in sorted(found):  # index.json first: without it nobody takes the rest for a data set
            (out / name).unlink()
        return {}
    if not found:
        return {}
    try:
        about = json.loads((out / "pack.json").read_text(encoding="utf-8"))
        shards = _SHARDS.validate_json(json.dumps(about["shards"]), strict=True)
        before = {**about["settings"]}
    except FileNotFoundError:
        raise ValueError(
            f"{out}: not empty, and without the pack.json of an earlier run: name an empty folder"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = shown(f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else " ".join(str(error).split()))
        raise ValueError(f"{out / 'pack.json'}: cannot be read ({why}); start afresh with --overwrite") from error
    differ = [f"{key} ({_short(before, key)}, now {_short(settings, key)})" for key in sorted({*before, *settings})
              if before.get(key) != settings.get(key)]  # fmt: skip
    if differ:
        raise ValueError(
            f"{out}: holds shards of another plan, which differs in {', '.join(differ)}; "
            "name an empty folder, or start afresh with --overwrite"
        )
    return shards


def _short(settings: dict[str, Any], key: str) -> str:
    return "other files, labels or groups" if key == "items" else json.dumps(settings.get(key))


def _save(out: Path, settings: dict[str, Any], finished: dict[str, Shard]) -> None:
    shards = {name: asdict(shard) for name, shard in sorted(finished.items())}
    write_json(out / "pack.json", {"settings": settings, "shards": shards})


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps a second ssl-pack out of it. (POSIX locks are not inherited by forked workers.)"""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; expected a folder for the shards")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another ssl-pack is at work in this folder") from None
        try:
            yield
        finally:
            (out / ".lock").unlink()


# -- the work --------------------------------------------------------------------------------------------------------


def _progress(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, Shard, ShardScan]]:
    """Does the jobs, with a bar where stderr is a terminal, else with a line in the log from time to time."""
    total, done, begun = sum(len(job.samples) for job in jobs), 0, time.monotonic()
    said = begun
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("packing", total=total)
        for job, (shard, scan) in _done(jobs, workers):
            for line in shard.unreadable:
                logger.warning("left out: %s", line)
            done += len(job.samples)
            bar.advance(task, len(job.samples))
            if not sys.stderr.isatty() and time.monotonic() - said > 30:
                said = time.monotonic()
                logger.info("%d of %d samples, %.0f a second", done, total, done / (said - begun))
            yield job.path.name, shard, scan


def _done(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, tuple[Shard, ShardScan]]]:
    """The jobs with their results, as they are done; no more than a few are under way, so that memory stays small."""
    if workers <= 1 or len(jobs) == 1:
        yield from ((job, make_shard(job)) for job in jobs)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("fork"), initializer=_begin_worker, initargs=(os.getpid(),)
    )
    waiting = iter(jobs)
    running: dict[Future[tuple[Shard, ShardScan]], Job] = {}
    try:
        while True:
            while len(running) < 2 * workers and (job := next(waiting, None)) is not None:
                running[pool.submit(make_shard, job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """One thread each; Ctrl-C is the parent's business; nobody goes on when the parent is killed."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=follow, daemon=True).start()
