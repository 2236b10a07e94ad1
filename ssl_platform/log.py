"""What a run says: the logger, `metrics.jsonl`, TensorBoard, and events such as skipped steps."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from ssl_platform import distributed

logger = logging.getLogger("ssl_platform")


def set_up_logging() -> None:
    """Rank 0 logs to stderr, coloured when that is a terminal (rich would wrap the lines of a log file); others warn."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)


class Metrics:
    """Writes one JSON object per line to `metrics.jsonl`, and the same numbers to TensorBoard; does nothing off rank 0."""

    def __init__(self, run_dir: Path, first_step: int, tensorboard: bool = True) -> None:
        """Lines of `first_step` steps or fewer stay; later ones are of a run that was cut off, and go."""
        self.writer: Any = None
        self.path = run_dir / "metrics.jsonl"
        self.active = distributed.rank() == 0
        if not self.active:
            return
        cut_back(self.path, first_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """One line; `step` counts finished optimiser steps."""
        if not self.active:
            return
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no nan
        append_line(self.path, {"step": step, **known})
        for name, value in values.items():
            if self.writer is not None:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def append_line(path: Path, item: dict[str, Any]) -> None:
    """Appends one JSON object as a line, in one write, so that a killed run leaves no half of one."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(item) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


def cut_back(path: Path, last_step: int) -> None:
    """Drops the lines of a .jsonl file whose `step` is greater than `last_step`, all or nothing."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
