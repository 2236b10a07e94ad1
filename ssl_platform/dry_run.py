"""A training step without numbers: the run's own code on tensors that have shapes but no memory.

What it gives follows the code of networks, heads and objectives whatever they are, in seconds for a model of any size.

torch documents FakeTensorMode and TorchDispatchMode under their private modules and has no public names for them. Its
public ones do not do: TorchFunctionMode does not see the backward pass, and meta tensors take other kernels than the CPU's.
"""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssl_platform.backbones._blocks import Block
from ssl_platform.config import ConfigError
from ssl_platform.costs import safetensors_bytes
from ssl_platform.flops import Counted, countable, torchs_counter
from ssl_platform.live_bytes import LiveBytes
from ssl_platform.modalities import Modality
from ssl_platform.objectives import Objective
from ssl_platform.objectives._targets import Centering, Sinkhorn
from ssl_platform.objectives.koleo import Koleo
from ssl_platform.recipe import Recipe, build_student_teacher
from ssl_platform.student_teacher import StudentTeacher
from ssl_platform.views import Batch

aten = torch.ops.aten


class StepFacts(NamedTuple):
    """One micro-batch, forward and backward, of one process; bytes unless the name says otherwise."""

    flops: int
    """Operations of matrix products, forward and backward, by torch's counter, without recomputing blocks."""
    recomputed_flops: int
    """Operations that come on top of them where the recipe has `recompute`: blocks that run again; else 0."""
    flops_by_part: dict[str, int]
    """{network or head of a network: operations}, and "rest": the objectives' own products.

    Empty for networks without a formula (`flops.countable`).
    """
    trained: int
    """Parameters with gradients, a number."""
    trained_bytes: int
    followers_bytes: int
    """Networks and heads that are not trained."""
    state_bytes: int
    """Buffers: centers, running statistics."""
    batch_bytes: int
    activations_bytes: int
    """The most that was alive at once besides weights, gradients and the batch."""
    recomputed_activations_bytes: int
    """The same where blocks keep their input only and run again for the gradient (networks with `blocks`)."""
    largest_unit_bytes: int
    """The largest block or head: what sharding has to gather as a whole."""
    regathered_bytes: int
    """What sharding gathers for second and further calls of a head: twice if it is trained."""
    reduced_bytes: int
    """What objectives sum over processes (centers, Sinkhorn), each once."""
    gathered_bytes: int
    """What objectives gather from each process (KoLeo with scope: global)."""
    moments_bytes: int
    """The optimiser's state."""
    checkpoint_bytes: int
    """Model and optimiser as they are saved."""


class _AllZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Initialisation asks whether a number is out of bounds and draws again: it never is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0 if func is aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def dry_step(recipe: Recipe, modality: Modality, batch: Batch) -> StepFacts:
    """One micro-batch of `recipe` on the shapes of `batch`, whose masks must be real; leaves random numbers alone.

    Raises ConfigError if an objective asks for a value.
    """
    before = torch.get_rng_state()
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = _model(recipe, modality, fake)
        groups = {name: replace(group, views=_shaped(group.views, fake)) for name, group in batch.groups.items()}
        batch = replace(batch, groups=groups)
        with _calls_of_heads(model) as calls:
            flops, parts, activations = _count(model, recipe, batch)
        _checkpoint_blocks(model)
        recomputed = _bytes_alive(model, recipe, batch)
        again = _flops(model, recipe, batch) - flops if recipe.recompute else 0
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            [
                f"--estimate: {error.func} needs values, so a step cannot be calculated by shapes alone; without gpus= "
                "the estimate measures one here"
            ]
        ) from error
    finally:
        torch.set_rng_state(before)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    reduced, gathered = _collectives(model, batch)
    saved = {name: (tensor.nbytes, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    states = ("step", "exp_avg", "exp_avg_sq") if recipe.optim.name == "adamw" else ("momentum_buffer",)
    moments = {
        f"{name}/{state}": (4, ()) if state == "step" else (p.nbytes, tuple(p.shape))
        for name, p in trained
        for state in states
    }
    return StepFacts(
        flops=flops,
        recomputed_flops=again,
        flops_by_part=parts,
        trained=sum(p.numel() for _, p in trained),
        trained_bytes=sum(p.nbytes for _, p in trained),
        followers_bytes=sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        state_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        batch_bytes=sum(group.views.nbytes + sum(m.nbytes for m in group.masks.values()) for group in groups.values()),
        activations_bytes=activations,
        recomputed_activations_bytes=recomputed,
        largest_unit_bytes=max(sum(p.nbytes for p in unit.parameters()) for unit in _units(model)),
        regathered_bytes=sum(
            (number - 1) * sum(p.nbytes * (1 + p.requires_grad) for p in head.parameters())
            for head, number in calls.items()
        ),
        reduced_bytes=reduced,
        gathered_bytes=gathered,
        moments_bytes=sum(size for size, _ in moments.values()),
        checkpoint_bytes=sum(safetensors_bytes(*_sizes_and_shapes(each)) for each in (saved, moments)),
    )


def shapes(recipe: Recipe, modality: Modality) -> StudentTeacher:
    """The model on the meta device: names and shapes, no memory, in fp32; leaves random numbers alone."""
    meta, before = torch.device("meta"), torch.get_rng_state()
    try:
        with meta, _AllZero():  # type: ignore[no-untyped-call]
            return build_student_teacher(recipe.model_copy(update={"precision": "fp32"}), modality, 1, meta)
    finally:
        torch.set_rng_state(before)


def _model(recipe: Recipe, modality: Modality, fake: FakeTensorMode) -> StudentTeacher:
    """The model, every weight of which has a shape and nothing else, as if it were on the CPU."""
    model = shapes(recipe, modality)
    for module in model.modules():
        if isinstance(module, Block):
            module.attention = "sdpa"  # packed kernels run on CUDA only, and need the same memory
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_shaped(parameter.detach(), fake), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _shaped(buffer, fake))
    if recipe.precision == "bf16":
        model.mix_precision("cpu", torch.bfloat16)
    return model


def _shaped(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    with fake:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _sizes_and_shapes(
    tensors: dict[str, tuple[int, tuple[int, ...]]],
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    return {name: size for name, (size, _) in tensors.items()}, {name: shape for name, (_, shape) in tensors.items()}


def _count(model: StudentTeacher, recipe: Recipe, batch: Batch) -> tuple[int, dict[str, int], int]:
    """(operations, those of each part, the most bytes alive) of the forward and backward pass."""
    with ExitStack() as stack:
        counted = stack.enter_context(Counted(model)) if countable(model) else None
        counter = stack.enter_context(torchs_counter())
        alive = _bytes_alive(model, recipe, batch)
    total = counter.get_total_flops()
    return total, counted.parts | {"rest": total - counted.total} if counted else {}, alive


def _flops(model: StudentTeacher, recipe: Recipe, batch: Batch) -> int:
    """Operations of the forward and backward pass, with what is recomputed in it."""
    with torchs_counter() as counter:
        model(batch, 0, list(recipe.objectives)).loss.backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def _bytes_alive(model: StudentTeacher, recipe: Recipe, batch: Batch) -> int:
    """The most at once in the forward and backward pass, besides weights, gradients and the batch.

    Not to be asked inside a FlopCounterMode when blocks are recomputed: the counter keeps what they made.
    """
    watch, hooks = LiveBytes(), []
    for parameter in model.parameters():
        watch.ignore(parameter)
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(lambda p: watch.ignore(p.grad))  # type: ignore[no-untyped-call]
            hooks.append(hook)
    for tensor in chain(model.buffers(), (group.views for group in batch.groups.values())):
        watch.ignore(tensor)
    with watch, _without_collector():
        model(batch, 0, list(recipe.objectives)).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return watch.peak


@contextmanager
def _calls_of_heads(model: StudentTeacher) -> Iterator[dict[nn.Module, int]]:
    """{head: how often it is called}, filled while the context lasts."""
    calls: dict[nn.Module, int] = {}

    def count(head: nn.Module, *_: object) -> None:
        calls[head] = calls.get(head, 0) + 1

    heads = [head for copies in model.heads.values() for head in copies.children()]
    hooks = [head.register_forward_hook(count) for head in heads]
    yield calls
    for hook in hooks:
        hook.remove()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector off: cycles are found in `_collected`, so that the bytes alive are the same every time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _checkpoint_blocks(model: StudentTeacher) -> None:
    for name, network in model.networks.items():
        if model.roles[name].update == "grad":
            for block in getattr(network, "blocks", ()):
                block.forward = partial(
                    checkpoint, partial(_collected, block.forward), use_reentrant=False, preserve_rng_state=False
                )


def _collected(forward: Any, *arguments: Any) -> Any:
    gc.collect(1)  # the cycles that the recomputation of the block before left
    return forward(*arguments)


def _units(model: StudentTeacher) -> list[nn.Module]:
    """Blocks of networks that have some, other networks whole, and heads."""
    networks = [list(getattr(network, "blocks", ())) or [network] for network in model.networks.values()]
    return [*chain(*networks), *(head for copies in model.heads.values() for head in copies.children())]


def _collectives(model: StudentTeacher, batch: Batch) -> tuple[int, int]:
    """Bytes that the objectives of this package sum over processes and gather, in one micro-batch."""
    reduced = gathered = 0
    for objective in model.objectives.values():
        assert isinstance(objective, Objective)
        targets = getattr(objective, "targets", None)
        if isinstance(targets, Centering):
            reduced += targets.center.nbytes + 4
        elif isinstance(targets, Sinkhorn):
            head = model.heads[objective.head][objective.teacher.network]  # type: ignore[index, union-attr]
            reduced += 4 * (head.num_prototypes * (1 + targets.iterations) + 1)
        if isinstance(objective, Koleo) and objective.everywhere:
            dim = model.networks[objective.student.network].embed_dim
            assert isinstance(dim, int)
            group = batch.groups[objective.student.group]
            versions = group.masks[objective.student.masks].shape[1] if objective.student.masks else 1
            gathered += 4 * len(group.source) * versions * len(batch.keys) * dim
    return reduced, gathered
