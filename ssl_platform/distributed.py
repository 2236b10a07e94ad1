"""Processes that train together: start and stop, and collectives that are identities for one process alone."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ssl_platform import sharding
from ssl_platform.bounded_store import BoundedStore
from ssl_platform.sharding import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def environment_world_size() -> int:
    """The number of processes that the launcher (torchrun, submitit) announces; 1 without a launcher."""
    return _number("WORLD_SIZE", "1", smallest=1)


def _number(name: str, default: str, smallest: int = 0) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < smallest:
        raise ConnectionError(
            f"the environment's {name}={text}: expected a whole number from {smallest}, as launchers set it"
        )
    return int(text)


START_MINUTES = 5.0
"""At least so long ranks wait for each other when they start: machines begin, and import, at different times."""
NCCL_MARGIN = timedelta(seconds=30)
_store: Any = None
collective_timer: Callable[[], AbstractContextManager[None]] | None = None
"""Set while somebody wants to know the time inside collectives (`stragglers`)."""


def _timed() -> AbstractContextManager[None]:
    return collective_timer() if collective_timer is not None else nullcontext()


def start(timeout_minutes: float = 10.0) -> torch.device:
    """Joins the launcher's process group, if there is one, and returns this process's device.

    `timeout_minutes` is how long a rank waits for the others in each collective, and here if longer; ConnectionError if
    they do not come, if the port of the rendezvous is taken, or if the environment is not such as a launcher makes it.
    """
    global _store
    if environment_world_size() > 1:
        _check_environment()
    local_rank = _number("LOCAL_RANK", "0")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConnectionError(
                f"LOCAL_RANK={local_rank}, but torch finds {torch.cuda.device_count()} GPUs here: start one process for "
                "each GPU, and let each of them see all GPUs of its machine (CUDA_VISIBLE_DEVICES)"
            )
        torch.cuda.set_device(device)
    if environment_world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        patience = max(timeout, timedelta(minutes=START_MINUTES))
        try:
            found, number, size = next(iter(rendezvous("env://", timeout=patience)))
            found.set_timeout(timeout)
            dist.init_process_group(
                backend, store=found, rank=number, world_size=size, timeout=_of_collectives(device, timeout)
            )
        except (dist.DistError, RuntimeError) as error:
            raise ConnectionError(_apart(error)) from error
        _store = found
    return device


def _of_collectives(device: torch.device, timeout: timedelta) -> timedelta:
    """How long torch lets a collective wait: NCCL ends the process, after `peers` has had the time to say why."""
    return timeout + NCCL_MARGIN if device.type == "cuda" else timeout


def _check_environment() -> None:
    wanted = ["RANK", "MASTER_ADDR", "MASTER_PORT", *["LOCAL_RANK"] * torch.cuda.is_available()]
    if missing := [name for name in wanted if not os.environ.get(name)]:
        raise ConnectionError(
            f"WORLD_SIZE={environment_world_size()} is set, but {', '.join(missing)} not: start with torchrun or `python -m "
            "launch.local`, which set all of them (docs/launch.md), or unset WORLD_SIZE for one process"
        )
    if (number := _number("RANK", "0")) >= environment_world_size():
        raise ConnectionError(
            f"RANK={number} and WORLD_SIZE={environment_world_size()}: ranks count from 0, over all machines"
        )


def _apart(error: Exception) -> str:
    number, place = os.environ.get("RANK"), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"rank {number} cannot wait for the others at {place}: the port is in use; set MASTER_PORT to another one"
        )
    reason = str(error).strip().splitlines()[0]
    return (
        f"rank {number} of {environment_world_size()} does not meet the others at {place} (MASTER_ADDR, MASTER_PORT): "
        f"{reason}. Have all of them started, and can this machine reach that address?"
    )


def store(answer_seconds: float = 5.0) -> BoundedStore | None:
    """A connection of its own to the store that all ranks share; None for one process alone.

    Its calls raise DistNetworkError where no answer comes within `answer_seconds`.
    """
    if _store is None:
        return None
    own = _store.clone()
    own.set_timeout(timedelta(seconds=answer_seconds))
    return BoundedStore(own, answer_seconds)


def stop() -> None:
    """Leaves the process group."""
    global _store
    _store = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier()


def total(tensor: Tensor) -> Tensor:
    """The sum over processes, without gradient."""
    if world_size() == 1:
        return tensor
    summed = tensor.detach().clone()
    with _timed():
        dist.all_reduce(summed)
    return summed


def maximum(tensor: Tensor) -> Tensor:
    """The elementwise maximum over processes, without gradient."""
    if world_size() == 1:
        return tensor
    largest = tensor.detach().clone()
    with _timed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def mean(tensor: Tensor) -> Tensor:
    """The mean over processes, without gradient."""
    return total(tensor) / world_size() if world_size() > 1 else tensor


def mean_of_known(tensor: Tensor) -> Tensor:
    """The mean over the processes where an element is not nan, nan if it is on all; without gradient."""
    known = ~tensor.isnan()
    sums, counts = total(torch.stack([tensor.nan_to_num(0.0), known.to(tensor.dtype)])).unbind()
    return sums / counts


def gather(tensor: Tensor) -> Tensor:
    """The processes' tensors joined along the first axis (of the same length everywhere), without gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    with _timed():
        dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return total(gradient).chunk(world_size())[rank()]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Like `gather`; the gradients that other processes have for this one's part are summed into it."""
    joined: Tensor = _Gather.apply(tensor) if world_size() > 1 else tensor
    return joined


def gather_objects(item: Any) -> list[Any]:
    """Every process's `item`, by rank; for rare, small things such as error reports."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_rank_zero(item: Any) -> Any:
    """Rank 0's `item` on every process."""
    if world_size() == 1:
        return item
    items: list[Any] = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


def wrap(
    module: nn.Module,
    device: torch.device,
    parallel: ParallelConfig | None = None,
    half: torch.dtype | None = None,
    timeout_minutes: float = 10.0,
) -> nn.Module:
    """The module whose forward and backward pass average gradients over processes.

    DDP: a wrapper, or the module itself when alone. FSDP2: the module itself, a StudentTeacher whose `networks` and
    `heads` compute in `half`, now in shards, also when alone: make optimisers and lists of parameters afterwards.
    `timeout_minutes` is that of `start`.
    """
    if parallel is not None and parallel.method == "fsdp":
        heads = [head for copies in module.heads.children() for head in copies.children()]  # type: ignore[union-attr]
        networks = module.networks.children()  # type: ignore[union-attr]
        mesh = _mesh(device, parallel.replicas, _of_collectives(device, timedelta(minutes=timeout_minutes)))
        return sharding.shard(module, networks, heads, mesh, half, _timed)
    if world_size() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.14 has another name for it, which older ones do not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # objective state is changed in `commit`, alike on every rank
            find_unused_parameters=True,  # stages, late objectives and sub-networks leave parameters out of a step
            gradient_as_bucket_view=True,
        )


def _mesh(device: torch.device, replicas: int, timeout: timedelta) -> "DeviceMesh":
    """All ranks in `replicas` rows, along which parameters are in shards; neighbouring ranks are in one row."""
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_initialized():  # one process without a launcher
        backend, own = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, store=own, rank=0, world_size=1, timeout=timeout)
    if replicas == 1:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device.type)
    ranks = torch.arange(world_size()).view(replicas, -1)
    # Made here, because those of `init_device_mesh` would wait for torch's time-out instead of the run's.
    columns, rows = (dist.new_subgroups_by_enumeration(each.tolist(), timeout=timeout)[0] for each in (ranks.T, ranks))
    groups = [cast(dist.ProcessGroup, group) for group in (columns, rows)]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


@contextmanager
def no_sync(module: nn.Module, wanted: bool) -> Iterator[None]:
    """A context in which backward leaves gradients unaveraged, for all micro-batches of a step but the last."""
    if sharding.is_wrapped(module):
        sharding.average_gradients(module, not wanted)
    with module.no_sync() if wanted and isinstance(module, DistributedDataParallel) else nullcontext():
        yield
