"""ssl-average: the mean of a run's last checkpoints as a checkpoint of its own, for evaluation, export and `init`."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes a second to load, and --help should not
    from torch import Tensor

    from ssl_platform.tensor_files import TensorFiles

AVERAGED = ("networks.", "heads.")
"""What is averaged; the state of objectives (centers) is the newest checkpoint's."""

DESCRIPTION = """\
Averages the weights of a run's last checkpoints: every network and head with its running statistics, summed in float64.
Counters of batches and the state of objectives are the newest checkpoint's. DIR is then a checkpoint folder without an
optimiser's state, which ssl-eval, ssl-export and networks.*.init take like any other; it appears whole or not at all.
"""

EXAMPLES = """\
examples:
  ssl-average runs/voices --last 10 --out runs/voices/average
  ssl-eval knn --checkpoint runs/voices/average --train SHARDS --test SHARDS

A run keeps its last 3 checkpoints unless it says otherwise: keep_last=10, or keep_every.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for an error, after which there is no output folder."""
    parser = argparse.ArgumentParser(
        prog="ssl-average",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--last", type=int, required=True, metavar="N", help="number of checkpoints, the newest ones")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, which must not exist")
    arguments = parser.parse_args(argv)
    from ssl_platform.checkpoint import CheckpointError

    try:
        steps = average(arguments.run, arguments.last, arguments.out)
    except (ValueError, OSError, CheckpointError) as error:
        sys.stderr.write(f"ssl-average: {error}\n")
        return 2
    sys.stdout.write(
        f"{arguments.out}: the mean of {len(steps)} checkpoints, of steps {', '.join(map(str, steps))}\n"
        f"then: ssl-eval knn --checkpoint {arguments.out} --train SHARDS --test SHARDS\n"
    )
    return 0


def average(run: Path, last: int, out: Path) -> list[int]:
    """Writes the folder `out` and returns the steps of the checkpoints that went into it.

    ValueError or CheckpointError if there are fewer than `last`, if one is damaged or of other networks, or if `out` exists.
    """
    from ssl_platform import checkpoint
    from ssl_platform.tensor_files import TensorFiles

    chosen = _chosen(run, last, out)
    for path in chosen:
        checkpoint.verify(path)
    states = [checkpoint.read_state(path) for path in chosen]
    steps = [state.step for state in states]
    files = [TensorFiles(path, "model") for path in chosen]
    for path, one in zip(chosen, files, strict=True):
        _check_same(path, one, chosen[-1], files[-1])
    tensors = {key: _mean(key, files) if key.startswith(AVERAGED) else files[-1][key].clone() for key in files[-1]}
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        config_yaml = (chosen[-1] / "config.yaml").read_text(encoding="utf-8")
        written = checkpoint.save(temporary, replace(states[-1], averaged=steps), config_yaml, tensors, {})
        written.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return steps


def _chosen(run: Path, last: int, out: Path) -> list[Path]:
    """The folders to average, oldest first."""
    from ssl_platform import checkpoint

    if last < 1:
        raise ValueError(f"--last {last}: expected 1 or more")
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it")
    if (run / "state.json").is_file():
        raise ValueError(f"{run}: is a checkpoint; name the run folder, in whose checkpoints/ there are several")
    found = checkpoint.checkpoints(run / "checkpoints")
    if not found:
        raise ValueError(f"{run}: not a run folder with checkpoints (checkpoints/step_XXXXXXXX)")
    if len(found) < last:
        raise ValueError(
            f"{run}: has {len(found)} checkpoints ({found[0].name} to {found[-1].name}), --last {last} needs as many; ask "
            f"for fewer, or train with keep_last={last}"
        )
    return found[-last:]


def _check_same(path: Path, one: "TensorFiles", newest_path: Path, newest: "TensorFiles") -> None:
    """ValueError unless both hold the same tensors; the state of objectives may differ."""
    ours, theirs = ({key: each.shape(key) for key in each if key.startswith(AVERAGED)} for each in (one, newest))
    if ours == theirs:
        return
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    first = different[0]
    raise ValueError(
        f"{path}: holds other networks than {newest_path.name}: {first} is {ours.get(first, 'missing')} instead of "
        f"{theirs.get(first, 'missing')}{f', and {len(different) - 1} more' if len(different) > 1 else ''}; only "
        "checkpoints of one run can be averaged"
    )


def _mean(key: str, files: "Sequence[TensorFiles]") -> "Tensor":
    newest = files[-1][key]
    if not newest.is_floating_point():  # the number of batches that batch norm has seen
        return newest.clone()
    total = sum(one[key].double() for one in files[:-1]) + newest.double()
    mean: Tensor = (total / len(files)).to(newest.dtype)
    if not bool(mean.isfinite().all()):
        raise ValueError(f"{key}: has values that are not finite in one of the checkpoints")
    return mean


if __name__ == "__main__":
    sys.exit(main())
