"""Tensors on disk: which part of each a rank writes, and the parts put together again, whole or for one rank.

Tensors that every rank holds whole lie in one file, `model.safetensors`. Where some are sharded over ranks (FSDP's DTensors)
each rank of the first replica writes its own, `model-rank-00003.safetensors`, without a gather, and `index.json` tells of
every tensor its shape and where its parts begin:

    {"model": {"files": [name, ...], "tensors": {key: {"shape": [...], "dim": 0, "parts": [[file, offset], ...]}}}, ...}
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssl_platform import distributed
from ssl_platform.sharding import is_sharded

INDEX = "index.json"


class Sharding(NamedTuple):
    """How a tensor lies over ranks: cut along `dim` into a part for each of `ranks`, as `torch.chunk` cuts."""

    shape: tuple[int, ...]
    dim: int
    ranks: tuple[int, ...]
    """Of the first replica."""
    number: int
    """Of the part that this rank holds."""
    first: bool
    """Whether this rank is of the first replica, which writes."""

    def bounds(self, number: int) -> tuple[int, int]:
        """Where part `number` begins and ends along `dim`; the last ones may be short or empty."""
        length = self.shape[self.dim]
        size = -(-length // len(self.ranks))
        return min(number * size, length), min((number + 1) * size, length)


def sharding(tensor: Any) -> Sharding:
    """Of a DTensor; ValueError if it is cut along several dimensions or holds sums that are still to be made."""
    mesh, placements = tensor.device_mesh, tensor.placements
    cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if any(type(placements[axis]).__name__ != "Shard" for axis in cut) or len(cut) > 1:
        raise ValueError(
            f"a tensor laid out as {placements} cannot be saved: expected one Shard, or none, and replicas"
        )
    own = mesh.get_coordinate()
    first = all(own[axis] == 0 for axis in range(mesh.ndim) if axis not in cut)
    if not cut:
        return Sharding(tuple(tensor.shape), 0, (int(mesh.mesh.flatten()[0]),), 0, first)
    axis = cut[0]
    ranks = mesh.mesh.movedim(axis, 0).flatten(1)[:, 0] if mesh.ndim > 1 else mesh.mesh
    return Sharding(tuple(tensor.shape), placements[axis].dim, tuple(ranks.tolist()), own[axis], first)


def own_part(tensor: Tensor) -> Tensor | None:
    """What this rank writes of a tensor; None if others do."""
    if not is_sharded(tensor):
        return tensor.detach() if distributed.rank() == 0 else None
    how = sharding(tensor)
    begin, end = how.bounds(how.number)
    if not how.first or (begin == end and how.number > 0):
        return None
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    assert not how.shape or len(how.ranks) == 1 or local.shape[how.dim] == end - begin, (how, local.shape)
    return local


def file_name(group: str, rank: int, sharded: bool) -> str:
    """Of what `rank` writes of a group, model or optimizer."""
    return f"{group}-rank-{rank:05d}.safetensors" if sharded else f"{group}.safetensors"


def index(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any] | None:
    """What `index.json` says of {group: {key: tensor}}; None if no tensor is sharded. The same on every rank."""
    if not any(is_sharded(tensor) for tensors in groups.values() for tensor in tensors.values()):
        return None
    found: dict[str, Any] = {}
    for group, tensors in groups.items():
        where = {key: list(_places(tensor)) for key, tensor in tensors.items()}
        ranks = sorted({rank for places in where.values() for rank, _ in places})
        found[group] = {
            "files": [file_name(group, rank, True) for rank in ranks],
            "tensors": {
                key: {
                    "shape": list(tensor.shape),
                    "dim": sharding(tensor).dim if is_sharded(tensor) else 0,
                    "parts": [[ranks.index(rank), offset] for rank, offset in where[key]],
                }
                for key, tensor in tensors.items()
            },
        }
    return found


def _places(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(rank that writes it, offset) of each part."""
    if not is_sharded(tensor) or not tensor.ndim:
        yield (sharding(tensor).ranks[0] if is_sharded(tensor) else 0), 0
        return
    how = sharding(tensor)
    for number, rank in enumerate(how.ranks):
        begin, end = how.bounds(number)
        if begin < end or number == 0:
            yield rank, begin


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes contiguous CPU tensors, flushed to the disk; returns the file's size and checksum; OSError with its name."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while serializing: I/O error: ").partition(" (os error")[0]
        raise OSError(f"{path}: {reason}") from error
    flush(path)
    return fingerprint(path)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def flush(path: Path) -> None:
    """Makes sure that a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
        # The file system, such as CIFS, does that for files alone.
    finally:
        os.close(descriptor)


# -- reading -----------------------------------------------------------------------------------------------------------


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of one group of a checkpoint folder, each read when it is asked for, whole.

    However many ranks wrote them. OSError, SafetensorError or ValueError if a file is missing or damaged.
    """

    def __init__(self, folder: Path, group: str) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            section = json.loads((folder / INDEX).read_text(encoding="utf-8"))[group]
            self._names, self._tensors = section["files"], section["tensors"]
        else:
            self._names = [file_name(group, 0, False)]
            self._tensors = {key: {"dim": 0, "parts": [[0, 0]]} for key in self._open(0).keys()}  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, key: str) -> Tensor:
        found = self._tensors[key]
        parts: list[Tensor] = [self._open(number).get_tensor(key) for number, _ in found["parts"]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, found["dim"])

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        found = self._tensors[key]
        return tuple(found["shape"] if "shape" in found else self._open(0).get_slice(key).get_shape())

    def like(self, key: str, tensor: Tensor) -> Tensor:
        """Laid out as `tensor` is, which has the same shape: a DTensor of its own part if that is one, on its device."""
        if not is_sharded(tensor):
            return self[key]
        how = sharding(tensor)
        local = self[key] if len(how.ranks) == 1 else self._between(key, how.dim, *how.bounds(how.number))
        sharded: Any = tensor
        laid_out: Tensor = type(sharded).from_local(
            local.to(tensor.device),
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return laid_out

    def _between(self, key: str, dim: int, begin: int, end: int) -> Tensor:
        """The rows from `begin` to `end` along `dim`, read from the files that hold them."""
        found = self._tensors[key]
        if len(found["parts"]) > 1 and found["dim"] != dim:
            return self[key].narrow(dim, begin, end - begin)
        pieces: list[Tensor] = []
        for number, offset in found["parts"]:
            part = self._open(number).get_slice(key)
            length = part.get_shape()[dim]
            first, last = max(begin - offset, 0), min(end - offset, length)
            if first < last:
                pieces.append(part[(slice(None),) * dim + (slice(first, last),)])
        if not pieces:
            number, _ = found["parts"][0]
            pieces.append(self._open(number).get_tensor(key).narrow(dim, 0, 0))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _open(self, number: int) -> Any:
        name = self._names[number]
        if name not in self._files:
            self._files[name] = safe_open(self._folder / name, framework="pt")
        return self._files[name]
