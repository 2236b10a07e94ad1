"""FSDP2: each rank keeps a shard of every parameter, its gradient, moments and average; a unit is whole while it runs.

Units are the blocks of networks, the networks around them, heads, and the objectives together. What is sharded may only
be used through `forward` of its unit; objectives' own parameters are whole during the whole of `StudentTeacher.forward`.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from ssl_platform.blocks import blocks_of
from ssl_platform.config import Config

if TYPE_CHECKING:  # importing them takes seconds
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class ParallelConfig(Config):
    """How the ranks of a run hold its networks. Any choice gives the same training, up to rounding."""

    method: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds everything; fsdp: a shard of each parameter, gradient, moment and average (FSDP2)."""
    replicas: int = Field(1, ge=1)
    """Of fsdp: groups of ranks, each with a whole copy in shards (HSDP), such as one for each node; 1 = one group."""

    def problems(self, world_size: int) -> list[str]:
        """What does not fit the number of ranks, one line each."""
        lines = []
        if self.replicas > 1 and self.method == "ddp":
            lines.append(
                f"parallel.replicas: {self.replicas} needs parallel.method: fsdp; with ddp every rank is a replica already"
            )
        elif world_size % self.replicas:
            fit = ", ".join(str(number) for number in range(1, world_size + 1) if world_size % number == 0)
            lines.append(
                f"parallel.replicas: {self.replicas} does not divide the number of ranks, {world_size}; use {fit}"
            )
        return lines


def shard(
    root: nn.Module,
    networks: Iterable[nn.Module],
    heads: Iterable[nn.Module],
    mesh: "DeviceMesh",
    half: torch.dtype | None,
    timed: Callable[[], AbstractContextManager[None]],
) -> nn.Module:
    """Shards `root`, which holds `networks` and `heads`, in place; starts from rank 0's values.

    With `half`, networks and heads compute in it, from weights that are gathered in it; shards, sums of gradients and the
    features that networks return are float32. `timed` is a context around each wait for weights in a forward pass.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for tensor in [*root.parameters(), *root.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    inner = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    outer = MixedPrecisionPolicy(inner.param_dtype, inner.reduce_dtype, output_dtype=torch.float32 if half else None)
    # Features are views of one tensor, and losses are pure: nobody writes into them.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    networks = list(networks)
    units = [(block, inner) for network in networks for block in blocks_of(network)]
    units += [(network, outer) for network in networks] + [(head, inner) for head in heads]
    for module, policy in [*units, (root, MixedPrecisionPolicy())]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        _time_gathering(module, timed)
    # Otherwise the first unit that runs would be the root, and a stage's `prepare` runs networks by themselves.
    cast(Any, root)._get_fsdp_state()._lazy_init()
    return root


def _time_gathering(unit: nn.Module, timed: Callable[[], AbstractContextManager[None]]) -> None:
    """Enters `timed` before the hook with which FSDP gathers the unit's weights, and leaves it after."""
    running: list[AbstractContextManager[None]] = []

    def begin(*_: object) -> None:
        running.append(timed())
        running[-1].__enter__()

    def end(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    unit.register_forward_pre_hook(begin, prepend=True)
    unit.register_forward_pre_hook(end)


def is_wrapped(module: nn.Module) -> bool:
    """Whether `shard` has been given it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def average_gradients(root: nn.Module, wanted: bool) -> None:
    """Whether the coming backward passes sum gradients over ranks; until one does, each rank keeps whole gradients."""
    cast("FSDPModule", root).set_requires_gradient_sync(wanted)


# -- tensors in shards -------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor | None) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor; loading that module takes a second, and without it there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, which shares its memory; the tensor itself if it is not in shards."""
    return cast("DTensor", tensor.detach()).to_local() if is_sharded(tensor) else tensor


def whole_norms(norms: Sequence[Tensor], like: Tensor | None) -> Sequence[Tensor]:
    """The norms of tensors of which each rank has those of its shards, with one collective; every rank must ask.

    `like` is one of the tensors: if it is not in shards, the norms are whole as they are.
    """
    if not is_sharded(like):
        return norms
    squares = torch.stack([norm.to(like.device).double().square() for norm in norms])
    dist.all_reduce(squares, group=like.device_mesh.get_group(mesh_dim=-1))
    return squares.sqrt().float().unbind()
