"""Work in several processes: complete, in order if asked, few tasks under way, and one lock for all that writes shards."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl_platform.data.commands._out import unfinished
from ssl_platform.data.pack_state import Lock, Part
from ssl_platform.data.processes import parallel
from tests.test_remote import processes


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("in_order", [False, True])
def test_every_task_with_its_result(workers: int, in_order: bool) -> None:
    add = 10

    def function(number: int) -> tuple[int, int]:  # what is no module's cannot be sent, but is inherited
        time.sleep(0.02 if number == 0 else 0)
        return number + add, os.getpid()

    found = list(parallel(function, range(30), workers, in_order=in_order))
    assert sorted(task for task, _ in found) == list(range(30))
    assert not in_order or [task for task, _ in found] == list(range(30))
    assert all(result[0] == task + add for task, result in found)
    assert ({result[1] for _, result in found} == {os.getpid()}) == (workers == 1)


def test_few_tasks_are_under_way(tmp_path: Path) -> None:
    def function(number: int) -> None:
        (tmp_path / str(number)).touch()

    results = parallel(function, range(200), 2, in_order=True)
    for done, _ in zip(range(1, 11), results, strict=False):
        assert len(list(tmp_path.iterdir())) <= done + 3 * 2 + 2
    results.close()  # type: ignore[attr-defined]


def test_errors_and_killed_processes_reach_who_asked() -> None:
    def fails(number: int) -> None:
        raise OSError(f"task {number}")

    with pytest.raises(OSError, match="task 0"):
        list(parallel(fails, range(4), 2, in_order=True))
    with pytest.raises(
        ValueError, match="a worker process was killed, perhaps for want of memory: try fewer --workers"
    ):
        list(parallel(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


def test_one_lock_for_packing_and_commands(tmp_path: Path) -> None:
    """Another process that packs a part of OUT, or merges into it, is named; afterwards nothing is left of the lock."""
    out = tmp_path / "out"

    def others(number: int) -> None:
        with pytest.raises(ValueError, match="another ssl-pack is at work"), unfinished(out, {}, 0):
            pass
        with pytest.raises(ValueError, match="another ssl-pack is at work"):
            Lock(out).take(Part(0, 1).shards(3))

    with unfinished(out, {}, 0):
        assert processes(1, others) == [0]
    assert {path.name for path in out.iterdir()} == {"pack.json"}
    lock = Lock(out)
    lock.take(Part(1, 3).shards(3))
    with_part = processes(1, lambda _: _refused(out))
    lock.close()
    assert with_part == [0] and not (out / ".lock").exists()


def _refused(out: Path) -> None:
    with pytest.raises(ValueError, match="another ssl-pack is at work"), unfinished(out, {}, 0):
        pass
