"""The items of a dataset from worker processes that leave signals to the training process and end when they should."""

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from ssl_platform.data.reading import BadSampleError, ShardReader
from ssl_platform.data.transfer import Cancelled, RemoteError

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


class Readable(Protocol):
    """A dataset that reads shards."""

    reader: ShardReader

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...


@contextmanager
def reproducible() -> Iterator[None]:
    """One thread, and a torch RNG of its own: the result does not depend on which process computes it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


class _Reported(Dataset[Any]):
    """The items of a dataset, or the error that ends the run: raised in a worker, its text would be a traceback."""

    def __init__(self, dataset: Readable) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except (RemoteError, Cancelled) as error:
            return error
        except BadSampleError as error:
            return BadSampleError(str(error))


def loaded(dataset: Readable, workers: int, prefetch: int) -> Generator[Any, None, None]:
    """Every item in its order; close the iterator (`contextlib.closing`) to end the workers and their transfers."""
    loader = DataLoader(
        _Reported(dataset),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        multiprocessing_context="fork" if workers else None,  # starts in .1 s; forkserver and spawn take 3 s
        pin_memory=torch.cuda.is_available(),  # by Batch.pin_memory, in a thread of its own
        generator=torch.Generator(),  # or it would draw from the global RNG
    )
    try:
        with _signals_held():  # which a worker would end by until it leaves them alone
            items = iter(loader)
        try:
            for item in items:
                if isinstance(item, RemoteError | Cancelled | BadSampleError):
                    raise item
                yield item
        finally:
            dataset.reader.close()  # before the workers end, which wait for their transfers
            del items  # the workers end when this generator is closed
    except Exception as error:
        if not workers or isinstance(error, RemoteError):
            raise
        # The frames of this traceback hold the workers, in a cycle in which their end takes them many seconds; the
        # traceback in the worker is in the error's text.
        raise error.with_traceback(None) from None


def _as_it_is(item: Any) -> Any:
    return item


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait; processes forked meanwhile go on holding them until `_begin_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_: int) -> None:
    """Leaves signals to the training process: a scheduler sends them to workers too, and batches are needed to the end
    of the step. A worker that somebody does want to end still does so, half a minute after SIGTERM."""
    for number in _SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
