"""Where every rank of the run is, so that a collective which fails can say who did not come to it.

Each rank marks in `at` what it is about to do: a counter and a word, nothing that waits. A thread tells the rendezvous
store of it twice a second, and ends the process when the loop stands still for longer than a collective may take: a rank
that hangs in Python, or in NCCL, which would be ended without a word.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from ssl_platform import distributed

LEFT_BEHIND = 3
"""The exit code of a rank that ends because of another one."""
BEAT_SECONDS = 0.5
SILENT_SECONDS = 4 * BEAT_SECONDS
"""A rank that does not tell of itself for so long is gone."""


class Place(NamedTuple):
    """What a rank is doing; all ranks go through the same places in the same order."""

    number: int
    """Counts the places."""
    step: int
    """Counted from 1, as metrics and checkpoints are; 0 = before the first."""
    doing: str
    since: float
    limited: bool
    """Whether it may take no longer than a collective."""


class _Process:
    """What this process knows of itself, of which there is one, as there is one process."""

    def __init__(self) -> None:
        self.place = Place(0, 0, "starting", time.monotonic(), False)
        self.slow_step = 1
        """The step that may take as long as it likes."""
        self.watch: _Watch | None = None
        """None for one process alone."""
        self.finish: Callable[[], object] | None = None
        """What rank 0 does before it ends because of another one."""
        self.stacks: IO[str] | None = None
        """Where stacks are written; None = stderr."""


def at(step: int, doing: str) -> None:
    """Marks what this rank does next; `step` counts from 1. Cheap: it is called several times a step."""
    _here.place = Place(_here.place.number + 1, step, doing, time.monotonic(), step != _here.slow_step)


def begin(step: int, doing: str) -> None:
    """Marks what may take as long as it likes, as may the step after it, `step`, which compiles and fills queues."""
    _here.slow_step = step
    at(step, doing)


def watch(timeout_seconds: float, tell: Callable[[str], None]) -> None:
    """Begins to tell the other ranks of this one and to look after it; nothing for one process alone.

    `tell` is given the one line that a run ends with; it must not wait.
    """
    if (store := distributed.store()) is not None:
        _here.watch = _Watch(_here, store, distributed.rank(), distributed.world_size(), timeout_seconds, tell)


def ends_with(error: BaseException) -> str:
    """Tells the other ranks that this one ends by `error`; one line that says who is to blame if it was another, else ""."""
    if (watch := _here.watch) is None:
        return ""
    watch.ending = True
    if not is_of_a_collective(error):
        watch.tell_others(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return ""
    late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    return watch.account("timed out" if late else "lost its connection")


def is_of_a_collective(error: BaseException) -> bool:
    """Whether the network between ranks failed: gloo raises plain RuntimeErrors."""
    words = ("gloo", "pair closure", "Connection closed by peer", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an error of its own for CUDA's; the CPU's is a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def stop() -> None:
    """The run is over: no more is told."""
    if _here.watch is not None:
        _here.watch.over.set()
        _here.watch = None
    _here.finish = None


def before_leaving(finish: Callable[[], object]) -> None:
    """What rank 0 finishes before it ends because of another rank: it must need no other, and end by itself."""
    _here.finish = finish


def leave(code: int, *, finish: bool = True) -> None:
    """Ends a process whose group is broken, in which an orderly end would wait for ranks that are gone."""
    if _here.watch is None:
        return
    if distributed.rank() == 0:
        begun = time.monotonic()
        if finish and _here.finish is not None:
            _here.finish()
        time.sleep(max(begun + 2 * SILENT_SECONDS - time.monotonic(), 0))  # it holds the store, which others still ask
    with suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
    os._exit(code)


def dump_stacks_to(file: IO[str] | None) -> None:
    """Where the stacks of a process that hangs or crashes are written; None = stderr."""
    _here.stacks = file
    faulthandler.enable(file or sys.stderr)


class _Watch:
    """The thread that tells the store of this process, and ends the process when it stands still."""

    def __init__(
        self, here: _Process, store: Any, rank: int, size: int, timeout_seconds: float, tell: Callable[[str], None]
    ) -> None:
        self.here, self.store, self.rank, self.size = here, store, rank, size
        self.timeout, self.tell = timeout_seconds, tell
        self.accounting = threading.Lock()
        self.beats = 0
        self.holder: Any = None
        """The last that was heard of rank 0, which takes the store with it."""
        self.late = False
        """Whether it turned out that the others wait for this rank."""
        self.ending = False
        """Whether the loop has failed, so that its own thread says why."""
        self.over = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _watch(self) -> None:
        failure = False
        while not self.over.wait(BEAT_SECONDS):
            seen = failure  # in the beat before: by now this rank, too, has had the time to say what it knows
            with suppress(RuntimeError):  # rank 0 is gone with the store; the next collective says so
                self.beat()
                failure = self.store.check(["failure"])
                self.holder = self.read("place", [0]).get(0)
            place = self.here.place
            late = place.limited and time.monotonic() - place.since > self.timeout
            if (late or seen) and not self.ending:
                self.tell(self.account("timed out" if late else "left behind"))
                faulthandler.dump_traceback(self.here.stacks or sys.stderr)
                if self.late:
                    self.tell_others(f"it hung there; the stack is in the log of rank {self.rank}")
                leave(1 if self.late else LEFT_BEHIND)

    def beat(self) -> None:
        self.beats += 1
        place = self.here.place
        self.post("place", [self.beats, place.number, place.step, place.doing, time.monotonic() - place.since])

    def tell_others(self, reason: str) -> None:
        """That this rank ends, by itself."""
        with suppress(RuntimeError):  # the store is gone with rank 0: nobody can be told
            self.beat()
            self.post("ended", reason)
            self.store.set("failure", str(self.rank))

    def post(self, name: str, item: Any) -> None:
        self.store.set(f"{name}/{self.rank}", json.dumps(item))

    def read(self, name: str, of: Iterable[int] | None = None) -> dict[int, Any]:
        """What each rank, or those of `of`, has posted under a name."""
        ranks = [rank for rank in of or range(self.size) if self.store.check([f"{name}/{rank}"])]
        return {rank: json.loads(self.store.get(f"{name}/{rank}")) for rank in ranks}

    def account(self, fate: Literal["timed out", "lost its connection", "left behind"]) -> str:
        """Says, once, where this rank was, and which other one is missing."""
        self.accounting.acquire()  # for good: the process ends
        place = self.here.place
        waited = f"for {time.monotonic() - place.since:.0f} s (collective_timeout_minutes={self.timeout / 60:.3g})"
        missing = self.missing()
        happened = f"waited in vain {waited}" if fate == "timed out" else f"was {fate}" if fate[:4] == "left" else fate
        if self.late and fate == "timed out":
            happened = f"is here {waited}"
        return f"step {place.step}, {place.doing}: rank {self.rank} {happened}; {missing}"

    def missing(self) -> str:
        """Which ranks did not arrive, as far as the store tells."""
        try:
            before, until = self.read("place"), time.monotonic() + SILENT_SECONDS
            while not self.read("ended") and time.monotonic() < until:
                time.sleep(BEAT_SECONDS)
                self.beat()  # others may be asking just now whether this rank is alive
            after, ended = self.read("place"), self.read("ended")
        except RuntimeError:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return "torchrun on the first machine, which holds the rendezvous, is gone: its output may say why"
            return (
                f"rank 0, which holds the rendezvous, is gone, last seen at {_said(self.holder)}: killed, or its machine "
                "is out of reach"
            )
        ended.pop(self.rank, None)
        if ended:
            return ", ".join(
                f"rank {rank} ended at {_said(after.get(rank), False)}: {ended[rank]}" for rank in _few(ended)
            )
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent = [rank for rank in others if before.get(rank) == after.get(rank)]
        if silent:
            where = ", ".join(f"rank {rank}, last seen at {_said(after.get(rank))}" for rank in _few(silent))
            return f"no sign of life from {where}: killed, stopped, or its machine is out of reach"
        furthest = max(item[1] for item in after.values())
        behind = [rank for rank in sorted(after) if after[rank][1] < furthest]
        if self.rank in behind:
            self.late = True
            return "the others wait for it; below is where it hangs"
        if behind:
            return ", ".join(f"rank {rank} did not arrive: it is at {_said(after[rank])}" for rank in _few(behind))
        return "every rank is alive and at the same place: is the network between them at fault, or the time too short?"


def _said(place: Any, how_long: bool = True) -> str:
    if not place:
        return "the start"
    return f"step {place[2]}, {place[3]}" + (f", for {place[4]:.0f} s" if how_long else "")


def _few(ranks: Iterable[int]) -> list[int]:
    return sorted(ranks)[:4]


_here = _Process()
