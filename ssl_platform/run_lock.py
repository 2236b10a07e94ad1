"""One run per folder: an advisory lock that ends with the process, however it ends."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ssl_platform import distributed
from ssl_platform.log import logger


class RunLocked(Exception):
    """Another process trains in this folder."""


def lock(run_dir: Path) -> IO[str]:
    """Takes `run_dir/lock` until the returned file is closed or the process ends; raises RunLocked if it is taken."""
    while True:
        file = _locked_file(run_dir)
        try:
            if os.path.samestat((run_dir / "lock").stat(), os.fstat(file.fileno())):
                break
        except FileNotFoundError:
            pass
        file.close()  # a run that was refused has deleted it meanwhile
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    file.flush()
    return file


def _locked_file(run_dir: Path) -> IO[str]:
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            file = (run_dir / "lock").open("a+", encoding="utf-8")
            break
        except FileNotFoundError:  # likewise the folder
            continue
    try:  # lockf's lock, unlike flock's, is not inherited by data workers, which may outlive a killed run
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # such as Lustre that is mounted without `flock`
            logger.warning(
                "%s cannot be locked (%s): nothing keeps a second run from this folder", file.name, error.strerror
            )
            return file
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        file.close()
        raise RunLocked(
            f"{run_dir}: another run is training here ({holder}). Stop it, or choose another folder with run_dir=..."
        ) from error
    return file


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the lock on rank 0; every rank raises RunLocked if it is taken.

    A run that is refused before it has written anything leaves nothing: neither the lock nor the folders made for it.
    """
    taken, reason = None, None
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    if distributed.rank() == 0:
        try:
            taken = lock(run_dir)
        except RunLocked as error:
            reason = str(error)
    if reason := distributed.from_rank_zero(reason):
        raise RunLocked(reason)
    try:
        yield
    finally:
        if taken is not None:
            if [path.name for path in run_dir.iterdir()] == ["lock"]:
                (run_dir / "lock").unlink()
                with suppress(OSError):  # another run has begun in one of them
                    for folder in made:
                        folder.rmdir()
            taken.close()
