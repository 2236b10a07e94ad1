"""A function on several gloo processes of this machine, with a time limit."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Each rank's return value; raises with the first rank's traceback. `function` is a module's, arguments picklable."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, results, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=timeout) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    errors = [value for value in found.values() if isinstance(value, _Failed)]
    if errors:
        raise AssertionError(f"a rank failed:\n{errors[0].text}")
    return [found[rank] for rank in range(world_size)]


class _Failed:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
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

    try:
        distributed.start(timeout_minutes=1)
        results.put((rank, function(*arguments)))
    except BaseException:
        results.put((rank, _Failed(traceback.format_exc())))
    finally:
        distributed.stop()
