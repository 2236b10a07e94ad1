"""Work on many samples or shards, in several processes with results in order; and where each sample lies."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.commands._options import printable
from ssl_platform.data.index import Index
from ssl_platform.data.processes import parallel
from ssl_platform.data.reading import reason
from ssl_platform.data.tar_headers import tar_members
from ssl_platform.data.tars import split_name
from ssl_platform.data.work_progress import WorkProgress

Job = TypeVar("Job")
Result = TypeVar("Result")

_SAMPLES_A_JOB = 200


def results(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    description: str,
    size: Callable[[Job], int],
) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, in the order of `jobs`, and how far it is; size: the number of samples in a job."""
    with WorkProgress(sum(size(job) for job in jobs), description) as progress:
        for job, result in parallel(function, jobs, workers, in_order=True):
            progress.advance(size(job))
            yield job, result


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
        for member, _ in tar_members(file):
            if member.isreg() and (name := split_name(member.name)):
                return printable(name[0])
            break
    except Exception as error:  # damaged headers make `tarfile` raise almost anything
        raise ValueError(f"{path}: byte {start}: {reason(error)}; `ssl-pack verify` names all that is wrong") from error
    raise ValueError(f"{path}: byte {start}: no sample begins here; `ssl-pack verify` names all that is wrong")
