"""How results are written: a table for people, and a JSON file with everything needed to repeat the measurement."""

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval_protocols.metrics import Difference, Interval
from ssl_platform.data.tars import write_json

PACKAGES = ("torch", "numpy", "faiss-cpu", "scikit-learn", "timm", "webdataset")


def interval_text(interval: Interval, digits: int = 3) -> str:
    """`0.712 [0.653, 0.768]`, as tables show it."""
    estimate, low, high = (f"{value:.{digits}f}" for value in interval)
    return f"{estimate} [{low}, {high}]" if math.isfinite(interval.low) else f"{estimate} [no interval]"


def difference_text(interval: Difference) -> str:
    """`+0.131 [+0.082, +0.179]`, a difference with its sign."""
    bounds = f"[{interval.low:+.3f}, {interval.high:+.3f}]" if math.isfinite(interval.low) else "[no interval]"
    return f"{interval.estimate:+.3f} {bounds}"


def verdict(name: str, other: str, difference: Difference, lower_is_better: bool = False) -> str:
    """One sentence that says whether `name` scores better than `other`, where `difference` is name minus other."""
    if not math.isfinite(difference.low):
        found = f"has no interval, so whether {name} beats {other} cannot be said"
    elif difference.excludes_zero:
        is_better = (difference.low > 0) != lower_is_better
        outcome = f"{name} {'beats' if is_better else 'is WORSE than'} {other} beyond the interval"
        found = f"lies {'above' if difference.low > 0 else 'below'} 0: {outcome}"
    else:
        found = f"contains 0: this test set does not show that {name} beats {other}"
    return f"{name} minus {other}: {difference_text(difference)} {found}."


def show(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    emphasised: Sequence[int] = (),
    sentences: Sequence[str] = (),
    file: TextIO | None = None,
) -> None:
    """Writes a table and sentences below it to `file` (standard output); rows `emphasised` are bold."""
    target = sys.stdout if file is None else file
    console = Console(file=target, width=None if target.isatty() else 120, highlight=False)
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(escape(column))
    for index, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if index in emphasised else None)
    console.print(table)
    for sentence in sentences:
        console.print(escape(sentence))


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON, whole or not at all. Intervals become maps, numbers that are not finite become null."""
    write_json(path, _plain(result))


def output_folder(path: Path) -> Path:
    """Makes the folder of a result, before work that would be lost; raises ValueError if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path}: cannot make this folder ({error.strerror}); give another one") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"--out {path}: this folder cannot be written to; give another one")
    return path


def default_folder(checkpoint: Path) -> Path:
    """Where a checkpoint's results go without --out: eval/ and its path with dashes."""
    return Path("eval", "-".join(part for part in checkpoint.parts if part.strip("./")))


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    found = {"python": platform.python_version()}
    for package in ("ssl-platform", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _plain(value: Any) -> Any:
    """JSON's own types."""
    if isinstance(value, Interval):
        sign = {"excludes_zero": value.excludes_zero} if isinstance(value, Difference) else {}
        return {**_plain(value._asdict()), **sign}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
