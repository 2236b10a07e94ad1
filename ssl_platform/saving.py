"""Checkpoints are written beside the training: the step waits for a copy in memory, a thread does the rest.

All ranks copy at the same step. Then, in each rank's thread: rank 0 makes an empty folder; every rank that holds a part
writes and flushes it (rank 0 alone, where parameters are not sharded); rank 0, once all have, writes `state.json`, renames
the folder and prunes; or, if any could not, removes it. What rank 0 writes alone it finishes although another rank is gone.
What they tell each other goes through the rendezvous store: collectives of a second thread could mix with the loop's.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_platform import checkpoint, distributed, peers, tensor_files
from ssl_platform.checkpoint import TrainState
from ssl_platform.log import logger
from ssl_platform.worker import Worker

_POLL_SECONDS = (0.005, 0.2)
_TOLD_RANKS = 4
LAST_SECONDS = 30.0
"""How long rank 0 goes on writing once another rank is gone: as torchrun and SLURM leave it."""


class Outcome(NamedTuple):
    """How a save ended."""

    step: int
    failure: str
    """Rank, file and reason; empty if the checkpoint is there."""


class _Failed(Exception):
    """This save cannot be finished; the message says why."""


class Saver:
    """The checkpoints of a run. At most one save is in flight; every rank calls the methods at the same steps."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None, timeout_seconds: float) -> None:
        """`timeout_seconds` is how long a rank may take to write its part."""
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.timeout = 0.8 * timeout_seconds  # less than the loop may wait for all of it
        self.in_a_row = 0
        """Saves that failed since the last that did not."""
        self.step = 0
        """Of the save in flight, or of the last one."""
        self._worker = Worker("saving")
        self._work: futures.Future[None] | None = None
        self._outcome: Outcome | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}
        store = distributed.store(self.timeout) or dist.HashStore()  # type: ignore[attr-defined]
        self._words = _Words(store, distributed.from_rank_zero(f"{time.time_ns():x}"))

    def begin(
        self, state: TrainState, config_yaml: str, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Copies what this rank writes and returns; `take` must have been called since the last save."""
        assert self._work is None, "one save at a time"
        self.step, self._outcome = state.step, None
        groups = {"model": model, "optimizer": optimizer}
        index = tensor_files.index(groups)
        copies: dict[str, dict[str, Tensor]] | str
        try:
            copies = {group: self._copy(group, tensors) for group, tensors in groups.items()}
        except (RuntimeError, MemoryError) as error:
            if not peers.is_of_memory(error):
                raise
            copies = f"no memory for a copy of what it writes ({error})".splitlines()[0]
        copied = None
        if torch.cuda.is_available():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            copied = torch.cuda.current_device(), event
        self._words.begin(self.timeout)
        arguments = (state, config_yaml, index, copies, copied)
        self._work = self._worker.give(partial(self._run, *arguments))
        if index is None:  # no other rank is needed
            peers.before_leaving(partial(futures.wait, [self._work], LAST_SECONDS))

    def has_ended(self) -> bool:
        """Whether this rank knows how the save in flight ended; where all do, none waits in `take`."""
        return self._outcome is not None and self._work is not None

    def take(self) -> Outcome | None:
        """Waits for the save in flight and says how it ended, the same on every rank; None if there was none."""
        if self._work is None:
            return None
        self.wait()
        assert self._outcome is not None
        failures = [text for text in distributed.gather_objects(self._outcome.failure) if text]
        outcome = self._outcome._replace(failure=failures[0] if failures else "")
        self.in_a_row = self.in_a_row + 1 if failures else 0
        self._outcome = None
        return outcome

    def wait(self) -> None:
        """Waits for this rank's thread alone."""
        if self._work is not None:
            self._work.result()
            self._work = None

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Waits for a save in flight when the block ends by an error of this rank: the process may end after it.

        Not when another rank is gone, whose part would not come (what needs no other rank, `peers.leave` waits for), or
        when the user does not want to wait.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt) and not peers.is_of_a_collective(error):
                self.wait()
                if self._outcome is not None and self._outcome.failure and distributed.rank() == 0:
                    logger.warning("the checkpoint of step %d was not written: %s", self.step, self._outcome.failure)
            raise

    def _copy(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU, in memory that is kept for the next save; of CUDA tensors only begun, in the order of the stream."""
        copies = {}
        for key, tensor in tensors.items():
            part = tensor_files.own_part(tensor)
            if part is None:
                continue
            buffer = self._buffers.get((group, key))
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            copies[key] = self._buffers[group, key] = buffer.copy_(part, non_blocking=True)
        return copies

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self, state: TrainState, *rest: Any) -> None:
        try:
            failure = self._write(state, *rest)
        except Exception as error:  # whatever it is, the run shall hear of it
            failure = f"rank {distributed.rank()}: {_reason(error)}"
        self._outcome = Outcome(state.step, failure)

    def _write(
        self,
        state: TrainState,
        config_yaml: str,
        index: dict[str, Any] | None,
        copies: dict[str, dict[str, Tensor]] | str,
        copied: tuple[int, Any] | None,
    ) -> str:
        """Writes this rank's part and, on rank 0, finishes the checkpoint; returns what failed."""
        rank, words = distributed.rank(), self._words
        temporary = checkpoint.part_of(self.folder, state.step)
        if rank == 0:
            words.tell("open", _attempt(lambda: checkpoint.open_part(self.folder, state.step))[1])
        if refused := words.hear("open"):
            return f"rank 0: {refused}"
        if rank == 0 or index is not None:
            words.tell(f"written/{rank}", self._write_own(temporary, index is not None, copies, copied))
        if rank == 0:
            words.tell("ended", self._finish(temporary, state, config_yaml, index))
        return str(words.hear("ended", patience=1.2))

    @staticmethod
    def _write_own(
        temporary: Path, sharded: bool, copies: dict[str, dict[str, Tensor]] | str, copied: tuple[int, Any] | None
    ) -> tuple[dict[str, Any], str]:
        """({file name: size and checksum}, what failed) of this rank's part."""
        if isinstance(copies, str):
            return {}, copies
        if copied is not None:
            device, event = copied
            torch.cuda.set_device(device)  # a new thread has the first one, where it would take memory
            event.synchronize()
        files, failure = _attempt(lambda: checkpoint.write_part(temporary, copies, distributed.rank(), sharded=sharded))
        return files or {}, failure

    def _finish(self, temporary: Path, state: TrainState, config_yaml: str, index: dict[str, Any] | None) -> str:
        """Rank 0: waits for every part, then makes the folder a checkpoint, or removes it; returns what failed."""
        try:
            files = _complete(temporary, self._words.gather("written", everywhere=index is not None))
            path = checkpoint.commit(temporary, state, config_yaml, files, index)
        except (OSError, _Failed) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return str(error) if isinstance(error, _Failed) else f"rank 0: {_reason(error)}"
        logger.info("saved %s", path)
        try:
            checkpoint.prune(self.folder, self.keep_last, self.keep_every)
        except OSError as error:
            logger.warning("older checkpoints could not be removed: %s", _reason(error))
        return ""


def _complete(temporary: Path, reports: list[Any]) -> dict[str, dict[str, Any]]:
    """Every rank's files, which must be there."""
    failures = [f"rank {rank}: {report[1]}" for rank, report in enumerate(reports) if report[1]]
    if failures:
        more = f" and {len(failures) - _TOLD_RANKS} more ranks" if len(failures) > _TOLD_RANKS else ""
        raise _Failed("; ".join(failures[:_TOLD_RANKS]) + more)
    files: dict[str, dict[str, Any]] = {}
    for rank, (own, _) in enumerate(reports):
        for name, facts in own.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != facts["bytes"]:
                raise _Failed(
                    f"rank {rank} has written {temporary / name}, which rank 0 does not see: run_dir must be on a file "
                    "system that all machines share"
                )
        files |= own
    return files


def _attempt(action: Any) -> tuple[Any, str]:
    """(result, "") or (None, what failed)."""
    try:
        return action(), ""
    except Exception as error:
        return None, _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{error if isinstance(error, OSError | _Failed) else repr(error)}".splitlines()[0]


class _Words:
    """What ranks tell each other about one save after another, in a store that all of them reach."""

    def __init__(self, store: Any, name: str) -> None:
        self.store, self.name = store, name
        self.number, self.timeout, self.begun = 0, 0.0, 0.0
        self.rank, self.size = distributed.rank(), distributed.world_size()

    def begin(self, timeout: float) -> None:
        """The next save; the words of the one before the last are forgotten: no rank can still ask for them."""
        if self.rank == 0 and self.number > 1:
            old = ["open", "ended", *(f"written/{rank}" for rank in range(self.size))]
            for word in old:
                self.store.delete_key(self._key(word, self.number - 1))
        self.number, self.timeout, self.begun = self.number + 1, timeout, time.monotonic()

    def tell(self, word: str, item: Any) -> None:
        """To every rank."""
        self.store.set(self._key(word), json.dumps(item))

    def hear(self, word: str, patience: float = 1.0) -> Any:
        """What rank 0 has told; raises _Failed if it does not in time."""
        if not self._wait([self._key(word)], patience):
            raise _Failed(f"no word from rank 0 within {self.timeout:.0f} s")
        return json.loads(self.store.get(self._key(word)))

    def gather(self, word: str, *, everywhere: bool) -> list[Any]:
        """What every rank has told, or rank 0 alone; raises _Failed naming those that do not in time."""
        keys = [self._key(f"{word}/{rank}") for rank in range(self.size if everywhere else 1)]
        if not self._wait(keys, 1.0):
            late = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
            more = ", ..." if len(late) > _TOLD_RANKS else ""
            raise _Failed(
                f"rank {', '.join(late[:_TOLD_RANKS])}{more} has not written its part within {self.timeout:.0f} s"
            )
        return [json.loads(self.store.get(key)) for key in keys]

    def _wait(self, keys: list[str], patience: float) -> bool:
        pause = _POLL_SECONDS[0]
        while not self.store.check(keys):
            if time.monotonic() - self.begun > patience * self.timeout:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])
        return True

    def _key(self, word: str, number: int | None = None) -> str:
        return f"save/{self.name}/{self.number if number is None else number}/{word}"
