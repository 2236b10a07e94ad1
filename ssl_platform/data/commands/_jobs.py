"""Work on many samples or shards: in several processes, results in order, with a bar; and where each sample lies."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_platform.data.commands._options import printable
from ssl_platform.data.index import Index
from ssl_platform.data.reading import reason
from ssl_platform.data.tars import _members, split_name

logger = logging.getLogger(__name__)
Job = TypeVar("Job")
Result = TypeVar("Result")

_SAMPLES_A_JOB = 200
_SECONDS_BETWEEN_LINES = 30


def results(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    description: str,
    size: Callable[[Job], int],
) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, in the order of `jobs`, with a bar where stderr is a terminal, else lines in the log.

    size: the number of samples in a job. Processes are forked, so `function` may hold what would be slow to send.
    """
    with progress(sum(size(job) for job in jobs), description) as advance:
        for job, result in _done(function, jobs, workers):
            advance(size(job))
            yield job, result


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A bar where stderr is a terminal, else a line in the log from time to time; yields what advances it."""
    done, begun = 0, time.monotonic()
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

    def advance(number: int) -> None:
        nonlocal done, said
        done += number
        bar.advance(task, number)
        if not sys.stderr.isatty() and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            logger.info("%s: %d of %d samples, %.0f a second", description, done, total, done / (said - begun))

    with bar:
        task = bar.add_task(description, total=total)
        yield advance


def files_of(index: Index) -> list[Path]:
    """The shards of an index that was opened by paths."""
    files = [shard for shard in index.shards if isinstance(shard, Path)]
    assert len(files) == index.num_shards
    return files


def folders_of(index: Index) -> list[Path]:
    """The folders that its shards lie in, each once."""
    return list(dict.fromkeys(file.parent for file in files_of(index)))


def sample_jobs(index: Index, samples: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Ascending sample ids in jobs of consecutive ones, none of which reaches over two shards."""
    shards = index.shard_of[samples]
    by_shard = np.split(samples, np.flatnonzero(np.diff(shards)) + 1)
    return [chunk for part in by_shard for chunk in np.split(part, range(_SAMPLES_A_JOB, len(part), _SAMPLES_A_JOB))]


def read_keys(index: Index, samples: NDArray[np.int64], workers: int) -> list[str]:
    """The keys of samples (ascending ids), from the header of the first member of each: nothing else is read."""

    files = files_of(index)

    def keys(job: NDArray[np.int64]) -> list[str]:
        path = files[index.shard_of[job[0]]]
        with path.open("rb") as file:
            return [_first_key(file, int(index.starts[sample]), path) for sample in job]

    found = results(keys, sample_jobs(index, samples), workers=workers, description="reading keys", size=len)
    return [key for _, part in found for key in part]


def _first_key(file: IO[bytes], start: int, path: Path) -> str:
    file.seek(start)
    try:
        for member, _ in _members(file):
            if member.isreg() and (name := split_name(member.name)):
                return printable(name[0])
            break
    except Exception as error:  # damaged headers make `tarfile` raise almost anything
        raise ValueError(f"{path}: byte {start}: {reason(error)}; `ssl-pack verify` names all that is wrong") from error
    raise ValueError(f"{path}: byte {start}: no sample begins here; `ssl-pack verify` names all that is wrong")


# -- processes ---------------------------------------------------------------------------------------------------------

_function: Callable[[Any], Any] | None = None


def _done(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """No more than a few jobs are under way, so that memory stays small."""
    if workers <= 1 or len(jobs) <= 1:
        yield from ((job, function(job)) for job in jobs)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        multiprocessing.get_context("fork"),
        initializer=_begin_worker,
        initargs=(function, os.getpid()),
    )
    running: deque[tuple[Job, Future[Result]]] = deque()
    try:
        for job in jobs:
            running.append((job, pool.submit(_call, job)))
            if len(running) >= 3 * workers:
                first, future = running.popleft()
                yield first, future.result()
        yield from ((job, future.result()) for job, future in running)
    except BrokenProcessPool as error:
        raise ValueError("a worker process was killed, perhaps for want of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _call(job: Any) -> Any:
    assert _function is not None
    return _function(job)


def _begin_worker(function: Callable[[Any], Any], parent: int) -> None:
    """One thread each; Ctrl-C is the parent's business; nobody goes on when the parent is killed."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=follow, daemon=True).start()
