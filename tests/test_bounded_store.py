"""A rendezvous store whose machine no longer answers, played by a proxy that stops passing bytes on."""

import gc
import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ssl_platform import peers
from ssl_platform.bounded_store import BoundedStore

ROOT = Path(__file__).parents[1]


class Way:
    """A store's server, and a way to it that can be cut without anybody being told."""

    def __init__(self) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
        self.open = threading.Event()
        self.open.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def client(self) -> Any:
        port = self.listener.getsockname()[1]
        found = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), wait_for_workers=False)
        found.set_timeout(timedelta(seconds=1))
        return found

    def _serve(self) -> None:
        while True:
            ours, _ = self.listener.accept()
            theirs = socket.create_connection(("127.0.0.1", self.server.port))
            for source, target in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.open.wait()
                target.sendall(data)
        except OSError:
            pass


def in_seconds(limit: float, function: Any, *arguments: Any) -> Any:
    """What a call raises or returns; AssertionError if it does not end."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(function(*arguments))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(limit)
    assert found, f"no end within {limit} s"
    return found[0]


def test_the_calls_are_those_of_the_store() -> None:
    store = BoundedStore(Way().client(), 20)
    store.set("a", "1")
    assert store.get("a") == b"1" and store.check(["a"]) and not store.check(["a", "b"])
    assert store.delete_key("a") and not store.check(["a"]) and not store.delete_key("a")
    with pytest.raises(dist.DistError):
        store.get("b")  # torch's own time-out for a key that does not come


def test_a_store_that_no_longer_answers_is_an_error_in_time_and_may_come_back() -> None:
    way = Way()
    store = BoundedStore(way.client(), 2.0)
    store.set("a", "1")
    assert store.check(["a"])
    way.open.clear()
    for _ in range(2):
        error = in_seconds(20, store.check, ["a"])
        assert isinstance(error, dist.DistNetworkError), error
        assert str(error) == "no answer from the rendezvous store within 2 s"
    way.open.set()
    deadline = time.monotonic() + 20
    while in_seconds(20, store.check, ["a"]) is not True:
        assert time.monotonic() < deadline


def test_the_thread_ends_with_the_store() -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "store"}
    store = BoundedStore(dist.HashStore(), 5)
    (mine,) = {thread for thread in threading.enumerate() if thread.name == "store"} - before
    store.set("a", "1")
    del store
    gc.collect()
    mine.join(20)
    assert not mine.is_alive()


def left_alone() -> None:
    """Rank 1, in a collective that may take two seconds, of a rank 0 whose machine vanishes."""
    way = Way()
    way.client().set("place/0", '[1, 1, 7, "the backward pass", 0.0]')
    store = BoundedStore(way.client(), 3.0)
    peers._here.watch = peers._Watch(peers._here, store, 1, 2, 2.0, lambda line: sys.stderr.write(f"{line}\n"))
    peers.begin(6, "beginning")
    deadline = time.monotonic() + 30
    while peers._here.watch.holder is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    way.open.clear()
    peers.at(7, "the forward pass")
    time.sleep(60)


def test_a_rank_whose_rank_0_has_vanished_ends_and_says_so() -> None:
    command = [sys.executable, "-c", "from tests.test_bounded_store import left_alone; left_alone()"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=55
    )
    assert ended.returncode == peers.LEFT_BEHIND, ended.stderr
    expected = (
        r"step 7, the forward pass: rank 1 waited in vain for \d+ s .*; rank 0, which holds the rendezvous, is gone, "
        r"last seen at step 7, the backward pass"
    )
    assert re.search(expected, ended.stderr), ended.stderr
