"""What happens between phases of a run (extract, cluster, ...); one file a step, and the folder is the registry.

A step's module holds a class `Config` whose `build()` makes a `Prepare`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ssl_platform.data.index import Index
from ssl_platform.modalities import Modality
from ssl_platform.student_teacher import StudentTeacher


@dataclass(frozen=True)
class StageContext:
    """What a `prepare` step may use. All ranks hold the same; `distributed` tells them apart."""

    student_teacher: StudentTeacher
    modality: Modality
    index: Index
    device: torch.device
    seed: int
    stage: str
    repetition: int
    folder: Path
    """The stage's own folder, for files worth keeping."""


class Prepare(Protocol):
    """Runs once when a stage begins, on all ranks; a stage that is resumed reads the saved result instead."""

    def __call__(self, context: StageContext) -> dict[str, Tensor]:
        """Named tensors, the same on every rank: saved, and given to the objectives' `begin_stage` and to companions."""
        ...
