"""A real HTTP server on loopback that misbehaves on demand and counts what it is asked."""

import contextlib
import functools
import http.server
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Server:
    """Serves a folder. `faults[name]` are what the next GETs of a file get, one each; then it behaves."""

    def __init__(self, folder: Path) -> None:
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.sent = 0
        """Bytes of "endless" bodies."""
        self.lock = threading.Lock()
        self.half_sent = threading.Event()
        """Set when "stall" has sent its half."""
        self.released = threading.Event()
        """What "stall" waits for before it ends."""
        handler = functools.partial(_Handler, self, directory=str(folder))
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def tars(self) -> dict[str, int]:
        """{name: number of GETs} of tars."""
        return {name: count for name, count in sorted(self.gets.items()) if name.endswith(".tar")}


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join(timeout=10)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: Any, **options: Any) -> None:
        self.ours = server
        super().__init__(*arguments, **options)

    def do_HEAD(self) -> None:
        with self.ours.lock:
            self.ours.heads[self._name()] += 1
        super().do_HEAD()

    def do_GET(self) -> None:
        with self.ours.lock:
            self.ours.gets[self._name()] += 1
            self.ours.headers.append(dict(self.headers))
            faults = self.ours.faults[self._name()]
            fault = faults.pop(0) if faults else ""
        if fault:
            self._misbehave(fault)
        else:
            super().do_GET()

    def _name(self) -> str:
        return self.path.partition("?")[0].rpartition("/")[2]

    def _misbehave(self, fault: str) -> None:
        if fault[:3].isdecimal():  # "503" or "429 after 7"
            status, _, after = fault.partition(" after ")
            self.send_response(int(status))
            if after:
                self.send_header("Retry-After", after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault.startswith("to "):  # "to URL"
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = Path(self.translate_path(self.path)).read_bytes()
        half = body[: len(body) // 2]
        self.send_response(200)
        if fault not in ("short, unsaid", "endless"):
            self.send_header("Content-Length", str(len(half) if fault == "short, wrong length" else len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(half)
        self.wfile.flush()
        if fault == "trickle":  # three seconds in all
            for piece in range(10):
                time.sleep(0.3)
                self.wfile.write(body[len(half) :][piece * len(half) // 10 : (piece + 1) * len(half) // 10])
            self.wfile.write(body[2 * len(half) :])
        elif fault == "endless":
            with contextlib.suppress(OSError):  # until the other side hangs up
                while not self.ours.released.is_set():
                    self.wfile.write(body)
                    self.ours.sent += len(body)
        elif fault == "longer than said":
            self.wfile.write(body[len(half) :] + body)
        elif fault == "stall":
            self.ours.half_sent.set()
            self.ours.released.wait(60)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            assert fault in ("short", "short, unsaid", "short, wrong length"), fault
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
