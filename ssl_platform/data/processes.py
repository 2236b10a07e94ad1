"""Work in several processes: no more than a few tasks under way, and none that outlives who asked for it."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_A_WORKER = 3

_function: Callable[[Any], Any] | None = None


def parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, *, in_order: bool = False
) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, as they are done or `in_order`; few are under way, so that memory stays small.

    Processes are forked, so `function` may hold what would be slow to send, or cannot be sent; with one worker, or one
    task, there are none. Raises what `function` raises, and ValueError if a process is killed.
    """
    if workers <= 1 or len(tasks) <= 1:
        yield from ((task, function(task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        multiprocessing.get_context("fork"),
        initializer=_begin_worker,
        initargs=(function, os.getpid()),
    )
    waiting = iter(tasks)
    running: dict[Future[Result], Task] = {}
    try:
        while True:
            while len(running) < _TASKS_A_WORKER * workers and (task := next(waiting, None)) is not None:
                running[pool.submit(_call, task)] = task
            if not running:
                return
            done = [next(iter(running))] if in_order else wait(running, return_when=FIRST_COMPLETED).done
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ValueError("a worker process was killed, perhaps for want of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _call(task: Any) -> Any:
    assert _function is not None
    return _function(task)


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
