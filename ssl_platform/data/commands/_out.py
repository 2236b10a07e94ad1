"""The folder that a command writes shards into: finished shards outlive a kill, and nobody takes it for whole before."""

import fcntl
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssl_platform.data.commands._options import counted
from ssl_platform.data.tars import write_json

_SECONDS_BETWEEN_SAVES = 5
_MOST_CHANNELS = 16


class Unfinished:
    """What of a folder is finished. Its `pack.json` without an `index.json` tells readers to wait."""

    def __init__(self, out: Path, settings: dict[str, Any], finished: dict[str, dict[str, Any]]) -> None:
        self.out, self.settings = out, settings
        self._finished = finished
        self._saved = 0.0

    def record(self, name: str) -> dict[str, Any] | None:
        """What was said of a shard when it was finished; None if it is not there, or not whole."""
        record, path = self._finished.get(name), self.out / name
        whole = record is not None and path.is_file() and path.stat().st_size == record["bytes"]
        return record if whole else None

    def begin(self) -> None:
        """A shard is about to be written, so an index from before no longer holds."""
        (self.out / "index.json").unlink(missing_ok=True)

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """`record` holds the "bytes" of the shard, which is on disk."""
        self._finished[name] = record
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        write_json(self.out / "pack.json", {"settings": self.settings, "shards": dict(sorted(self._finished.items()))})
        self._saved = time.monotonic()


@contextmanager
def unfinished(out: Path, settings: dict[str, Any], needed: int, *others: str) -> Iterator[Unfinished]:
    """The folder, locked, new or left by the same command with the same settings.

    needed: bytes that will be written at most. others: files besides shards and index that the command writes.
    Raises ValueError if the folder holds anything else, or the disk is too small.
    """
    settings = json.loads(json.dumps(settings))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; expected an empty or new folder")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another ssl-pack is at work in this folder") from None
        folder = None
        try:
            finished = _finished(out, settings, others)
            have = sum((out / name).stat().st_size for name in finished if (out / name).is_file())
            free = shutil.disk_usage(out).free
            if needed - have > free:
                raise ValueError(f"{out}: {needed - have:,} bytes are needed and {free:,} are free on this disk")
            folder = Unfinished(out, settings, finished)
            folder.save()
            yield folder
        finally:
            try:
                if folder is not None:  # what is finished counts, whatever ends this run
                    folder.save()
            finally:
                (out / ".lock").unlink()
                if made and not any(out.iterdir()):
                    out.rmdir()


def _finished(out: Path, settings: dict[str, Any], others: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    for part in out.glob(".*.part"):
        part.unlink()
    found = {path.name for path in out.iterdir()} - {".lock"}
    if not found:
        return {}
    ours = {path.name for path in out.glob("shard-*.tar")} | {"pack.json", "index.json", "index.npy", *others}
    if "pack.json" not in found or found - ours:
        raise ValueError(f"{out}: not empty ({min(found - ours or found)}, ...): name an empty or new folder")
    try:
        about = json.loads((out / "pack.json").read_text(encoding="utf-8"))
        before, shards = about["settings"], dict(about["shards"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{out / 'pack.json'}: cannot be read ({error}); delete the folder and begin again") from error
    if before != settings:
        differ = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        raise ValueError(
            f"{out}: holds the result of another command, which differs in {', '.join(differ)}: name an empty folder"
        )
    return shards


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def report(out: Path, about: Mapping[str, Any]) -> None:
    """Says on the screen what is in the folder now."""
    size = sum(shard["bytes"] for shard in about["shards"])
    shards = counted(len(about["shards"]), "shard")
    lines = [f"{out}: {counted(about['samples'], 'sample')} in {shards}, {size / 1e6:.1f} MB"]
    if about["label_counts"]:
        lines.append("labels: " + ", ".join(f"{label}: {count}" for label, count in about["label_counts"].items()))
    statistics = about["statistics"] or {"mean": [], "std": []}
    mean, std = (_listed(statistics[key]) for key in ("mean", "std"))
    lines.append(f"channels: mean {mean}; std {std}" if mean else "channels: mean and std are not known")
    sys.stdout.write("\n  ".join(lines) + "\n")


def _listed(values: Sequence[float]) -> str:
    """All of a few channels' values, the least and the largest of many bins."""
    if len(values) > _MOST_CHANNELS:
        return f"{min(values):.4f} to {max(values):.4f} in {len(values)}"
    return ", ".join(f"{value:.4f}" for value in values)
