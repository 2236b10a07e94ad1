"""Checkpoints: everything a resumed run needs for the same next step, written all or nothing, without pickle.

A checkpoint is a folder `step_00000100/` (100 finished steps) with `config.yaml` (the resolved configuration),
`model.safetensors` (networks, heads, objectives), `optimizer.safetensors` and, written last, `state.json`, which lists
the size and checksum of the others.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_platform.log import logger

FORMAT = 1
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


def save(
    folder: Path, state: TrainState, config_yaml: str, model: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> Path:
    """Writes `folder/step_XXXXXXXX` and returns it: a temporary folder first, flushed to the disk, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".{final.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
    save_file(_plain(model), temporary / "model.safetensors")
    save_file(_plain(optimizer), temporary / "optimizer.safetensors")
    files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
    text = json.dumps({"format": FORMAT, **asdict(state), "files": files}, indent=1)
    (temporary / "state.json").write_text(text, encoding="utf-8")
    for path in temporary.iterdir():
        _flush(path)
    _flush(temporary)
    if final.exists():  # an unusable one of the same step, which `latest` passed over
        shutil.rmtree(final)
    temporary.rename(final)
    _flush(folder)
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
    listed = _read_json(path)["files"]
    for name in ("config.yaml", "model.safetensors", "optimizer.safetensors"):
        file = path / name
        if name not in listed or not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        expected, found = listed[name], file.stat().st_size
        if found != expected["bytes"]:
            raise CheckpointError(f"{file}: {found} bytes instead of {expected['bytes']}: it was cut off or replaced")
        if _fingerprint(file) != expected:
            raise CheckpointError(f"{file}: its content does not match the checksum in state.json")


def read_state(path: Path) -> TrainState:
    """`state.json` of a checkpoint."""
    data = _read_json(path)
    known = {key: data[key] for key in TrainState.__dataclass_fields__ if key in data}
    try:
        return TrainState(**known)
    except TypeError as error:
        raise CheckpointError(f"{path / 'state.json'}: not a checkpoint of this platform ({error})") from error


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `model` or `optimizer`."""
    try:
        return load_file(path / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / name}.safetensors: cannot be read ({error})") from error


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


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse; raises CheckpointError for tensors of parameters that are not there."""
    names = {
        name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"], strict=True)
    }
    foreign = sorted({key.rpartition("/")[0] for key in tensors} - names.keys())
    if foreign:
        raise CheckpointError(f"the checkpoint's optimiser holds parameters this configuration has not: {foreign[:5]}")
    on_device = bool(optimizer.defaults.get("fused"))  # where the fused kernel wants its step counts too
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        parameter = names[name]
        optimizer.state[parameter][state] = value.to(parameter.device if value.ndim or on_device else value.device)


def load_model(module: torch.nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Strict: raises CheckpointError naming keys that are missing, unexpected or of another shape."""
    expected = module.state_dict()
    problems = [f"missing {key}" for key in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source}: was written by another configuration: {'; '.join(problems[:5])}{more}. "
            "Use the configuration saved in it (config.yaml) or another run_dir."
        )
    module.load_state_dict(tensors)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("files"), dict):
        found = data.get("format") if isinstance(data, dict) else None
        raise CheckpointError(f"{file}: not a checkpoint of format {FORMAT} (found {found})")
    return data


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
