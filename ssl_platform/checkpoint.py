"""Checkpoints: everything a resumed run needs for the same next step, written all or nothing, without pickle.

A checkpoint is a folder `step_00000100/` (100 finished steps) with `config.yaml` (the resolved configuration),
`model.safetensors` (networks, heads, objectives), `optimizer.safetensors` and, written last, `state.json`, which lists
the size and checksum of the others. Where parameters are sharded over ranks the two are one file for each rank, and
`index.json` (`tensor_files`). `saving` writes them beside the training.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ssl_platform.log import logger
from ssl_platform.sharding import is_sharded
from ssl_platform.tensor_files import INDEX, TensorFiles, file_name, fingerprint, flush, write

FORMAT, SHARDED = 1, 2
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint that cannot be used, with the reason and what to do."""


@dataclass(frozen=True)
class TrainState:
    """The small part of a checkpoint, `state.json`."""

    step: int
    """Finished optimiser steps; the data position is step * batch_size."""
    batch_size: int
    accumulate: int
    world_size: int
    seed: int
    order: str = ""
    """What, with seed and batch size, decides which samples come when: `Index.fingerprint` and the shuffle window."""
    optimizer: str = ""
    """The optimiser's name: another one has no use for its moments."""
    statistics: dict[str, Any] | None = None
    """The channels' mean, std and percentiles in the training shards: they belong to the weights."""
    counters: dict[str, int] = field(default_factory=dict)
    """Skipped steps, replacements of bad samples, samples that a filter left out."""
    bad_samples: list[str] = field(default_factory=list)
    """Those replaced so far, once each."""
    versions: dict[str, str] = field(default_factory=dict)
    averaged: list[int] = field(default_factory=list)
    """The steps whose weights it is the mean of, if `ssl-average` made it: nothing can be resumed from it."""


def save(
    folder: Path, state: TrainState, config_yaml: str, model: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> Path:
    """Writes `folder/step_XXXXXXXX` of one process and returns it; `saving` does the same for several, in steps."""
    temporary = open_part(folder, state.step)
    groups = {"model": _plain(model), "optimizer": _plain(optimizer)}
    files = write_part(temporary, groups, 0, sharded=False)
    return commit(temporary, state, config_yaml, files, None)


def open_part(folder: Path, step: int) -> Path:
    """An empty folder for what will be the checkpoint of `step`; nobody may be writing in it."""
    temporary = part_of(folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def part_of(folder: Path, step: int) -> Path:
    """Where it is written."""
    return folder / f".step_{step:08d}.part"


def write_part(
    temporary: Path, groups: Mapping[str, Mapping[str, Tensor]], rank: int, *, sharded: bool
) -> dict[str, dict[str, Any]]:
    """Writes what `rank` holds of each group, {file name: size and checksum}; OSError names the file."""
    files = {}
    for group, tensors in groups.items():
        if tensors or (rank == 0 and not sharded):
            name = file_name(group, rank, sharded)
            files[name] = write(temporary / name, tensors)
    return files


def commit(
    temporary: Path,
    state: TrainState,
    config_yaml: str,
    files: Mapping[str, dict[str, Any]],
    index: dict[str, Any] | None,
) -> Path:
    """Makes a checkpoint of a folder in which all `files` are: writes what tells of them, flushes, renames."""
    texts = {"config.yaml": config_yaml} | ({} if index is None else {INDEX: json.dumps(index)})
    for name, text in texts.items():
        (temporary / name).write_text(text, encoding="utf-8")
        flush(temporary / name)
    listed = dict(files) | {name: fingerprint(temporary / name) for name in texts}
    heading = {"format": FORMAT if index is None else SHARDED, **asdict(state)}
    text = json.dumps({**heading, "files": dict(sorted(listed.items()))}, indent=1)
    (temporary / "state.json").write_text(text, encoding="utf-8")
    flush(temporary / "state.json")
    flush(temporary)
    final = temporary.with_name(f"step_{state.step:08d}")
    if final.exists():  # an unusable one of the same step, which `latest` passed over
        shutil.rmtree(final)
    temporary.rename(final)
    flush(final.parent)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, oldest first, whatever state they are in."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest(folder: Path) -> Path | None:
    """The newest usable checkpoint of `folder`; None if there never was one.

    Says which newer ones it passed over and why; raises CheckpointError if there are some but none can be used.
    """
    reasons = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
            reasons.append(str(error))
            continue
        return path
    if reasons:
        lines = "\n  ".join(reasons)
        raise CheckpointError(f"{folder}: no checkpoint can be used:\n  {lines}\nRemove the folder to start again.")
    return None


def set_aside_newer(path: Path) -> None:
    """Renames the checkpoints after `path`, which `latest` passed over: the run goes on below them and will meet them."""
    for newer in checkpoints(path.parent):
        if int(newer.name.removeprefix("step_")) > int(path.name.removeprefix("step_")):
            aside = newer.with_name(f"damaged_{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
            logger.warning("%s cannot be used and is now %s", newer.name, aside.name)


def verify(path: Path) -> None:
    """Raises CheckpointError with the reason unless every file of the checkpoint is whole."""
    data = _read_json(path)
    listed = data["files"]
    needed = {
        "config.yaml",
        *((INDEX,) if data["format"] == SHARDED else ("model.safetensors", "optimizer.safetensors")),
    }
    for name in sorted(needed | listed.keys()):
        file = path / name
        if name not in listed or not file.is_file():
            part = f", the part of rank {int(name[-17:-12])}" if "-rank-" in name else ""
            raise CheckpointError(f"{path}: {name}{part} is missing: copy the whole folder")
        expected, found = listed[name], file.stat().st_size
        if found != expected["bytes"]:
            raise CheckpointError(f"{file}: {found} bytes instead of {expected['bytes']}: it was cut off or replaced")
        if fingerprint(file) != expected:
            raise CheckpointError(f"{file}: its content does not match the checksum in state.json")


def read_state(path: Path) -> TrainState:
    """`state.json` of a checkpoint."""
    data = _read_json(path)
    known = {key: data[key] for key in TrainState.__dataclass_fields__ if key in data}
    try:
        return TrainState(**known)
    except TypeError as error:
        raise CheckpointError(f"{path / 'state.json'}: not a checkpoint of this platform ({error})") from error


def read_tensors(path: Path, group: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of `model` or `optimizer` whose keys begin with `prefix`, whole, however many ranks wrote them."""
    with _reading(path, group):
        tensors = TensorFiles(path, group)
        return {key: tensors[key] for key in tensors if key.startswith(prefix)}


def digest(path: Path) -> str:
    """The checksum of the networks' weights, as `state.json` has it: of the one file, or of its parts' checksums."""
    listed = _read_json(path)["files"]
    sums = [listed[name]["sha256"] for name in sorted(listed) if name.startswith("model")]
    return str(sums[0]) if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


@contextmanager
def _reading(path: Path, group: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: the tensors of {group} cannot be read ({error})") from error


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Removes all but the last `keep_last` checkpoints and those at multiples of `keep_every` steps.

    What a run that was killed had half written or half removed goes too, so nobody may be saving in `folder`.
    """
    for leftover in [*folder.glob(".step_*.removed"), *folder.glob(".step_*.part")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for path in checkpoints(folder)[:-keep_last]:
        step = int(path.name.removeprefix("step_"))
        if keep_every is None or step % keep_every:
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)  # at once, so that a kill leaves no half of a checkpoint under its name
            shutil.rmtree(doomed, ignore_errors=True)


# -- the optimiser's state as named tensors ----------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{parameter name/state name: tensor}; needs the "names" that `optim.build_optimizer` puts into groups."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Takes the optimiser's state from a checkpoint, this rank's part of it where parameters are sharded."""
    names = {
        name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"], strict=True)
    }
    with _reading(path, "optimizer"):
        tensors = TensorFiles(path, "optimizer")
        foreign = sorted({key.rpartition("/")[0] for key in tensors} - names.keys())
        if foreign:
            raise CheckpointError(
                f"{path}: its optimiser holds parameters this configuration has not: {', '.join(foreign[:5])}"
            )
        on_device = bool(optimizer.defaults.get("fused"))  # where the fused kernel wants its step counts too
        for key in tensors:
            name, _, state = key.rpartition("/")
            parameter, shape = names[name], tensors.shape(key)
            value = tensors.like(key, parameter) if shape == parameter.shape and shape else tensors[key]
            if (shape or on_device) and not is_sharded(value):
                value = value.to(parameter.device)
            optimizer.state[parameter][state] = value.clone()  # what is read is the file itself, mapped into memory


def load_model(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Strict: raises CheckpointError naming keys that are missing, unexpected or of another shape.

    Of `TensorFiles` only what this rank holds is read.
    """
    expected = module.state_dict()
    lazy = tensors if isinstance(tensors, TensorFiles) else None
    shapes = {key: lazy.shape(key) if lazy else tuple(tensors[key].shape) for key in tensors}
    problems = [f"missing {key}" for key in sorted(expected.keys() - shapes.keys())]
    problems += [f"unexpected {key}" for key in sorted(shapes.keys() - expected.keys())]
    problems += [
        f"{key} is {shapes[key]} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in shapes and shapes[key] != tuple(value.shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source}: was written by another configuration: {'; '.join(problems[:5])}{more}. "
            "Use the configuration saved in it (config.yaml) or another run_dir."
        )
    module.load_state_dict({key: lazy.like(key, value) if lazy else tensors[key] for key, value in expected.items()})


def load_networks(module: torch.nn.Module, path: Path) -> None:
    """`load_model` from a checkpoint."""
    with _reading(path, "model"):
        load_model(module, TensorFiles(path, "model"), path)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found not in (FORMAT, SHARDED) or not isinstance(data.get("files"), dict):
        raise CheckpointError(f"{file}: not a checkpoint of format {FORMAT} or {SHARDED} (found {found})")
    return dict(data)
