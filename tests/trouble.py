"""An objective that makes trouble on one rank at one step: what the launcher's tests train with."""

import os
import signal
import time
from collections.abc import Sequence
from typing import Literal

import torch

from ssl_platform import distributed
from ssl_platform.objectives import BuildContext, Forward, Loss, Objective, ObjectiveConfig, Outputs
from ssl_platform.views import Batch


class Config(ObjectiveConfig):
    name: str = "tests.trouble"
    kind: Literal["raise", "hang", "kill", "pause", "slow", "out of memory"]
    rank: int = 1
    step: int = 3
    """Counted from 1."""

    def build(self, context: BuildContext) -> "Trouble":
        return Trouble(self.kind, self.rank, self.step)


class Trouble(Objective):
    def __init__(self, kind: str, rank: int, step: int) -> None:
        super().__init__()
        self.kind, self.rank, self.step = kind, rank, step

    def requests(self, step: int) -> Sequence[Forward]:
        return []

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Loss:
        if distributed.rank() == self.rank:
            if self.kind == "slow":
                time.sleep(1.0)  # far more than a step of the others, even on a busy machine
            elif step + 1 == self.step:
                self.begin()
        return Loss({"loss": torch.zeros(())})

    def begin(self) -> None:
        match self.kind:
            case "raise":
                raise ValueError("told to raise")
            case "hang":
                time.sleep(60)
            case "out of memory":
                torch.empty(1 << 60)
            case _:
                os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)
