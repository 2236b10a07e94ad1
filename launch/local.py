"""`python -m launch.local CONFIG [key=value ...] gpus=8`: a run on the GPUs, or the cores, of this machine.

Starts `ssl_platform.train` once per GPU, passes signals on, and ends all ranks within seconds when one of them ends
badly; its last line then says which, how, and where to read on.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO

from pydantic import ConfigDict

from ssl_platform.config import Config, ConfigError, load_config

PROGRAM = "ssl_platform.train"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LEFT_BEHIND = 3
"""The exit code of a rank that ends because of another rank."""
GRACE_SECONDS = 6.0
"""How long the others have, once a rank has failed, to say what they saw of it; they look for two seconds."""
POLL_SECONDS = 0.05
TAIL_LINES = 200
PR_SET_PDEATHSIG = 1

USAGE = """usage: python -m launch.local CONFIG [key=value ...] [gpus=N | processes=N]

Trains on this machine with one process for each GPU; without gpus, on all there are, else in one process on the CPU.

  gpus=N        on the first N GPUs (CUDA_VISIBLE_DEVICES chooses others)
  processes=N   N processes on the CPU, without GPUs
  key=value     and options such as --estimate go to ssl-train as they are

Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save at the end of the step and stop; the same command goes on from there.
The log of rank N is run_dir/logs/rank-N.log; rank 0's is on the terminal too. More: docs/launch.md
"""


class _RunDir(Config):
    """The one key of a configuration that the launcher reads."""

    model_config = ConfigDict(extra="ignore")
    run_dir: Path


class Rank:
    """One process of the run, with the end of what it said on stderr."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.number = number
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        launcher = os.getpid()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,  # in a process group of its own, asking the terminal would stop it for good
            stdout=None if number == 0 else subprocess.PIPE,
            stderr=None if number == 0 else subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches the launcher alone, and workers can be ended with their rank
            preexec_fn=lambda: _end_with(launcher),
        )

    def follow(self) -> None:
        """Keeps the end of what it says; rank 0 writes to the terminal itself."""
        if self.process.stdout is not None:
            threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self.tail.append(line.decode(errors="replace").rstrip())

    def end(self) -> None:
        """Ends the process and its workers, whatever they are doing."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _end_with(launcher: int) -> None:
    """In the new process: it is killed when the launcher ends, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code of the run: that of the rank that failed first, 128 + N after signal N."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return 0
    if (config := config_of(arguments)) is None:
        sys.stderr.write(USAGE)
        return 2
    try:
        size, on_cpu, passed = sizes(arguments)
    except ValueError as error:
        say(str(error))
        return 2
    with socket.socket() as free:  # the kernel hands out another one to the next run
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return supervise(
        [sys.executable, "-m", PROGRAM, *passed], environments(size, on_cpu, port), run_dir(config, passed)
    )


def config_of(arguments: Sequence[str]) -> Path | None:
    """The file among the arguments; None if there is none."""
    found = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    return Path(found[0]) if found else None


def sizes(arguments: Sequence[str]) -> tuple[int, bool, list[str]]:
    """(number of processes, whether they leave GPUs alone, the arguments of ssl-train); ValueError with the fix."""
    asked = {name: text for name, _, text in (a.partition("=") for a in arguments) if name in ("gpus", "processes")}
    passed = [argument for argument in arguments if argument.partition("=")[0] not in ("gpus", "processes")]
    if len(asked) > 1:
        raise ValueError("gpus and processes: choose one; processes=N runs on the CPU")
    for name, text in asked.items():
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{name}={text}: expected a whole number from 1, for example {name}=2")
    if "processes" in asked:
        return int(asked["processes"]), True, passed
    found = num_gpus()
    if "gpus" in asked and int(asked["gpus"]) > found:
        if "--estimate" in arguments:
            raise ValueError(
                f"gpus={asked['gpus']}: torch finds {found} on this machine, and --estimate measures on those that are "
                "there; `ssl-train CONFIG --estimate gpus=N`, without a launcher, calculates for others"
            )
        raise ValueError(
            f"gpus={asked['gpus']}: torch finds {found} on this machine; ask for at most as many, look at "
            "CUDA_VISIBLE_DEVICES and `nvidia-smi`, or run on the CPU with processes=N"
        )
    return int(asked["gpus"]) if asked else max(found, 1), found == 0, passed


def num_gpus() -> int:
    """How many GPUs torch finds, asked in a process of its own: this one needs neither torch nor a GPU's memory."""
    question = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=300)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"torch cannot be imported by {sys.executable}: {last}")
    return int(answer.stdout.split()[-1])


def environments(size: int, on_cpu: bool, port: int) -> list[dict[str, str]]:
    """What each rank is told by its environment; nothing of a launcher around this one is left in it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "GROUP_"))}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common = {
        "OMP_NUM_THREADS": str(max(cores // size, 1)),
        **inherited,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if on_cpu:
        common |= {"CUDA_VISIBLE_DEVICES": ""}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_dir(config: Path, arguments: Sequence[str]) -> Path | None:
    """Where the run writes; None if the configuration does not say, of which the ranks will complain."""
    overrides = [argument for argument in arguments if argument.startswith("run_dir=")]
    try:
        return load_config(_RunDir, config, overrides).run_dir
    except (ConfigError, OSError):
        return None


def supervise(command: Sequence[str], ranks_environments: Sequence[dict[str, str]], folder: Path | None) -> int:
    """Runs the ranks to their end; none of them outlives this function."""
    ranks: list[Rank] = []
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        for number, environment in enumerate(ranks_environments):
            if not received:  # asked to stop before all have begun
                ranks.append(Rank(number, command, environment))
        for rank in ranks:
            rank.follow()
        failed = wait(ranks, received)
    finally:
        for rank in ranks:
            rank.end()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received.count(signal.SIGINT) > 1 and any(rank.process.returncode for rank in ranks):
        say(
            "ended by a second Ctrl-C: the steps since the last checkpoint are lost; the same command goes on from there"
        )
        return 128 + signal.SIGINT
    if failed is None:
        return 128 + received[0] if len(ranks) < len(ranks_environments) else 0
    code = failed.process.returncode
    if len(ranks) > 1 or code < 0:
        say(epitaph(failed, folder, received))
    return 128 - code if code < 0 else code


def wait(ranks: Sequence[Rank], received: Sequence[int] = ()) -> Rank | None:
    """Waits until all have ended; returns the one whose end was the cause of the others', None if all is well.

    That is the first to end badly by itself, else the first of those that were left behind by one that hangs.
    `received` grows by the signals that come meanwhile: a second Ctrl-C ends ranks that do not hear it.
    """
    ended: list[Rank] = []
    deadline = float("inf")
    while len(ended) < len(ranks) and time.monotonic() < deadline:
        ended += [rank for rank in ranks if rank not in ended and rank.process.poll() is not None]
        failed = any(rank.process.returncode for rank in ended)
        if deadline == float("inf") and (failed or received.count(signal.SIGINT) > 1):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(POLL_SECONDS)
    bad = [rank for rank in ended if rank.process.returncode]
    return min(bad, key=lambda rank: _blame(rank.process.returncode)) if bad else None


def _blame(code: int) -> int:
    """Smaller = rather the cause: a signal, then an error of its own, then one that was left behind."""
    return 0 if code < 0 else 2 if code == LEFT_BEHIND else 1


def epitaph(rank: Rank, folder: Path | None, received: Sequence[int]) -> str:
    """The last line of a run that failed: which rank, how it ended, its last error and its log."""
    code = rank.process.returncode
    if (stopped_by := abs(code) % 128) in received and (code < 0 or code > 128):
        return f"stopped by {signal.Signals(stopped_by).name} before training began, or after it ended; no step is lost"
    how = f"exit code {code}"
    if code < 0:
        how = f"killed by {_signal_name(-code)}"
        how += ": out of memory? (`dmesg` or the machine's log may say)" if -code == signal.SIGKILL else ""
    elif code == LEFT_BEHIND:
        how = "ended because of another rank"
    log = folder / "logs" / f"rank-{rank.number}.log" if folder else None
    lines = own_lines(log, rank.process.pid) if log else []
    wrote = bool(lines)
    last = (last_error(lines) or last_error(rank.tail)) if code > 0 else ""
    parts = [f"rank {rank.number} failed: {how}", f"last error: {last}" if last else ""]
    parts.append(f"log: {log}" if wrote else "it had no log yet")
    return "; ".join(part for part in parts if part)


def own_lines(log: Path, process: int) -> list[str]:
    """The last lines of a rank's log, from where that process began to write; empty if it did not come so far."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    begun = [number for number, line in enumerate(lines) if line.endswith(f", process {process}")]
    return lines[begun[-1] :][-TAIL_LINES:] if begun else []


def last_error(lines: Sequence[str] | deque[str]) -> str:
    """The last line of an error report: of the logger, or the end of a traceback."""
    for line in reversed(lines):
        before, error, after = line.partition(" ERROR ")
        if error and before[:2].isdecimal():
            return after
        if line[:1].isalpha() and ("Error" in line or "Exception" in line or line.startswith("terminate called")):
            return line
    return ""


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def say(text: str) -> None:
    """One line on the terminal."""
    sys.stderr.write(f"launch.local: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
