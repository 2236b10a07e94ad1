"""What a run says: the logger, `metrics.jsonl`, TensorBoard, Weights & Biases, and events such as skipped steps."""

import errno
import importlib.util
import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ssl_platform import distributed
from ssl_platform.config import ConfigError

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
    handler.addFilter(_ToTerminal())
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)


class _ToTerminal(logging.Filter):
    """Leaves out what is for the log of the rank alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(record, "rank_log_only", False)


class _ToFile(logging.Filter):
    """Leaves out names of samples, which stand in `events.jsonl`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(record, "names_samples", False)


class _RankLog(logging.StreamHandler[IO[str]]):
    """Is silent about a full disk, of which the terminal hears once and not with every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def open_rank_log(run_dir: Path) -> IO[str] | None:
    """From now on this rank also logs to `run_dir/logs/rank-N.log`, behind what earlier parts of the run left there.

    None, with a warning, where that cannot be written, as by a rank on a machine that does not have the folder.
    """
    path = run_dir / "logs" / f"rank-{distributed.rank()}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", encoding="utf-8")
    except OSError as error:
        logger.warning(
            "rank %d goes on without a log of its own: %s cannot be written (%s)",
            distributed.rank(), path, error.strerror,
        )  # fmt: skip
        return None
    handler = _RankLog(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    for other in logger.handlers:
        other.setLevel(level)  # the terminal goes on showing rank 0, and warnings of others
    handler.addFilter(_ToFile())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    to_rank_log("rank %d of %d, process %d", distributed.rank(), distributed.world_size(), os.getpid())
    return stream


def to_rank_log(message: str, *values: object, error: bool = False) -> None:
    """A line for the rank's own log and not for the terminal."""
    logger.log(logging.ERROR if error else logging.INFO, message, *values, extra={"rank_log_only": True})


class Metrics:
    """Writes one JSON object per line to `metrics.jsonl`, the same numbers to TensorBoard and, if asked, to Weights &
    Biases; does nothing off rank 0."""

    def __init__(
        self, run_dir: Path, first_step: int, tensorboard: bool = True, wandb: Mapping[str, Any] | None = None
    ) -> None:
        """Lines of `first_step` steps or fewer stay; later ones are of a run that was cut off, and go.

        `wandb` holds the arguments of `start_wandb`; raises ConfigError if it cannot be started.
        """
        self.writer: Any = None
        self.wandb: Any = None
        if wandb is not None and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                ["wandb: the package is not installed; pip install 'ssl-platform[wandb]', or leave the section out"]
            )
        self.path = run_dir / "metrics.jsonl"
        self.active = distributed.rank() == 0
        if not self.active:
            return
        cut_back(self.path, first_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        if wandb is not None:
            self.wandb = start_wandb(run_dir, **wandb)

    def write(self, step: int, values: dict[str, float | int]) -> dict[str, float | int | None]:
        """One line, which is returned; `step` counts finished optimiser steps."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no nan
        line = {"step": step, **known}
        if not self.active:
            return line
        append_line(self.path, line)
        try:
            for name, value in values.items():
                if self.writer is not None:
                    self.writer.add_scalar(name, value, step)
        except OSError as error:  # its thread has ended, and so does this part of TensorBoard's curves
            logger.warning("no more is written for TensorBoard until the run is started again: %s", error)
            self.writer = None
        if self.wandb is not None:
            self.wandb.log(line)
        return line

    def close(self) -> None:
        warn_of_unwritten()
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(
    run_dir: Path, *, project: str, mode: Any, entity: str | None, name: str | None, config: Mapping[str, Any]
) -> Any:
    """A run of Weights & Biases, the same one after a resume: its id is kept in `run_dir/wandb_id`.

    It is given the figures of `write` and `config`, and told to gather nothing by itself: no code, git remote, command
    line, host, console output or list of packages. Raises ConfigError if it cannot be started.
    """
    import wandb

    kept = run_dir / "wandb_id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        host="hidden",
        program="ssl-train",
        program_abspath="",
        program_relpath="",
        save_code=False,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    try:
        run = wandb.init(
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            project=project,
            entity=entity,
            name=name,
            mode=mode,
            dir=str(run_dir),
            config=dict(config),
            settings=settings,
        )
    except Exception as error:  # no account, no network, a name it does not take: wandb raises many kinds
        raise ConfigError([f"wandb: cannot start ({error}); wandb.mode=offline keeps the run in run_dir"]) from error
    run.define_metric("*", step_metric="step")  # a resumed run may log a step again, which wandb's own count forbids
    return run


_unwritten: dict[Path, list[str]] = {}
_MAX_UNWRITTEN = 100_000


def append_line(path: Path, item: dict[str, Any]) -> None:
    """Appends one JSON object as a line, in one write, so that a killed run leaves no half of one.

    On a disk that is full or has become read-only the line is kept, and written with the next one that can be.
    """
    lines = _unwritten.pop(path, [])
    text = "".join([*lines, json.dumps(item) + "\n"])
    try:
        _append(path, text.encode())
    except OSError as error:
        if not lines:
            logger.warning("%s cannot be written (%s): its lines are kept until it can", path, error.strerror)
        _unwritten[path] = text.splitlines(keepends=True)[-_MAX_UNWRITTEN:]


def _append(path: Path, content: bytes) -> None:
    """All or nothing."""
    with path.open("ab", buffering=0) as file:
        length = file.tell()
        try:
            if (written := file.write(content)) < len(content):
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {written} bytes of {len(content)} fit")
        except OSError:
            file.truncate(length)
            raise


def warn_of_unwritten() -> None:
    """Says which lines are lost, at the end of a process."""
    if lost := unwritten():
        logger.warning("could not be written, and are lost: %s", lost)


def unwritten() -> str:
    """Which lines are still not written; they are lost if the process ends now."""
    return ", ".join(f"{len(lines)} lines of {path}" for path, lines in _unwritten.items())


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
