"""An objective that makes trouble on one rank at one step: what the launcher's tests train with."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ssl_platform import checkpoint, distributed
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.views import Batch


class Config(ObjectiveConfig):
    name: str = "tests.trouble"
    kind: Literal[
        "raise", "hang", "kill", "pause", "slow", "out of memory", "nan",
        "full disk", "read only", "small files", "slow save", "kill while saving",
    ]  # fmt: skip
    rank: int = 1
    step: int = 3
    """Counted from 1."""
    until: int = 1000
    """Of trouble with the disk: the step in which it is over."""
    folder: Path | None = None
    """Likewise: what is filled, or made read-only."""

    def build(self, context: BuildContext) -> "Trouble":
        if "sav" in self.kind:
            _meddle(self)
        return Trouble(self)


class Trouble(Objective):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kind, self.rank, self.step, self.config = config.kind, config.rank, config.step, config

    def requests(self, step: int) -> Sequence[Forward]:
        return []

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        if distributed.rank() == self.rank:
            if self.kind == "slow":
                time.sleep(1.0)  # far more than a step of the others, even on a busy machine
            elif step + 1 == self.step:
                if self.kind == "nan":
                    return Loss({"loss": torch.tensor(torch.nan)})
                self.begin()
            elif step + 1 == self.config.until:
                self.end()
        return Loss({"loss": torch.zeros(())})

    def begin(self) -> None:
        if self.config.folder is not None:
            _wait_for_save(self.config.folder, self.step - 1)
        match self.kind:
            case "raise":
                raise ValueError("told to raise")
            case "hang":
                time.sleep(60)
            case "out of memory":
                torch.empty(1 << 60)
            case "full disk":
                assert self.config.folder is not None
                with (self.config.folder / "filler").open("wb", buffering=0) as file:
                    try:
                        while file.write(bytes(1 << 12)):
                            pass
                    except OSError:
                        pass
            case "read only":
                folder = str(self.config.folder)
                subprocess.run(["mount", "--bind", folder, folder], check=True)
                subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
            case "small files":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            case "slow save" | "kill while saving":
                pass
            case _:
                os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)

    def end(self) -> None:
        match self.kind:
            case "full disk":
                assert self.config.folder is not None
                (self.config.folder / "filler").unlink()
            case "read only":
                subprocess.run(["umount", "-l", str(self.config.folder)], check=True)
            case "small files":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _wait_for_save(folder: Path, step: int) -> None:
    """So that trouble with the disk begins between two saves, and not in the one of the step before."""
    deadline = time.monotonic() + 60
    while not any(folder.rglob(f"step_{step:08d}")):
        assert time.monotonic() < deadline, "a save does not end"
        time.sleep(0.05)


def _meddle(config: Config) -> None:
    """Makes writes slow, or the last, for one rank and from a step on."""
    original = checkpoint.write

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if distributed.rank() == config.rank and int(path.parent.name[6:14]) >= config.step:
            if config.kind == "kill while saving":
                path.write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.7)
        return original(path, tensors)

    checkpoint.write = write  # type: ignore[assignment]
