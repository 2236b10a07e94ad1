"""A function on several gloo processes of this machine, with a time limit: one pool of ranks, shared by all tests."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_pools: dict[int, "_Pool"] = {}


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Each rank's return value; raises with the first rank's traceback. `function` is a module's, arguments picklable.

    The processes stay for the next call; after a failure they are ended, because a rank may wait for one that failed.
    """
    pool = _pools.pop(world_size, None) or _Pool(world_size)
    try:
        found = pool.run(function, arguments, timeout)
    except BaseException:
        pool.end()
        raise
    _pools[world_size] = pool
    return found


class _Pool:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [context.Pipe() for _ in range(world_size)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_rank, args=(rank, world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that a rank that dies ends its pipe

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        for connection in self.connections:
            connection.send((function, arguments))
        found: dict[int, Any] = {}
        while len(found) < len(self.connections):
            waiting = [c for rank, c in enumerate(self.connections) if rank not in found]
            answered = wait(waiting, max(deadline - time.monotonic(), 0))
            if not answered:
                missing = [rank for rank in range(len(self.connections)) if rank not in found]
                raise AssertionError(f"ranks {missing} have not answered within {timeout:g} s")
            for connection in answered:
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    failed, found[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise AssertionError(f"rank {rank} died") from None
                if failed:
                    raise AssertionError(f"rank {rank} failed:\n{found[rank]}")
        return [found[rank] for rank in range(len(self.connections))]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


def _rank(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    from ssl_platform import distributed

    distributed.start(timeout_minutes=10)  # the limit is that of the pool
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the tests are over
            return
        torch.manual_seed(0)
        try:
            connection.send((False, function(*arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
