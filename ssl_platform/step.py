"""The parts of a run that have state, and one optimiser step over them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssl_platform import distributed, optim, peers, stragglers
from ssl_platform.blocks import compile_blocks, recompute_blocks
from ssl_platform.modalities import Modality
from ssl_platform.recipe import Fill, Recipe, build_student_teacher
from ssl_platform.student_teacher import StudentTeacher
from ssl_platform.views import Batch

COUNTERS = ("skipped_steps", "replaced_samples", "filtered_samples")


@dataclass
class Parts:
    """What a step works on."""

    student_teacher: StudentTeacher
    module: nn.Module
    """student_teacher, or its wrapper that averages gradients over ranks."""
    optimizer: torch.optim.Optimizer
    trained: dict[str, list[nn.Parameter]]
    lr: optim.Schedule
    weight_decay: optim.Schedule
    clip_grad: float | None
    freeze_last_layer_steps: int
    accumulate: int
    seed: int
    device: torch.device
    statistics: dict[str, Any] | None = None
    """The channels' mean, std and percentiles that the run began with: they belong to the weights."""
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    bad_samples: set[str] = field(default_factory=set)
    """Each sample that was replaced, with its reason."""


def build(
    recipe: Recipe,
    modality: Modality,
    num_samples: int,
    device: torch.device,
    statistics: dict[str, Any] | None = None,
    fill: Fill | None = None,
) -> Parts:
    """Everything that has state, as it is before the first step; `statistics` are what `modality` was built with.

    `fill` gives networks the weights that their `init` names; without it they are random, as for a run to be resumed.
    """
    student_teacher = build_student_teacher(recipe, modality, num_samples, device, fill)
    networks, roles = dict(student_teacher.networks.items()), student_teacher.roles
    if recipe.recompute:
        recompute_blocks({name: network for name, network in networks.items() if roles[name].update == "grad"})
    if recipe.compile:
        compile_blocks(networks.values())
    half = torch.bfloat16 if recipe.precision == "bf16" else None
    # Before anybody asks for parameters.
    module = distributed.wrap(student_teacher, device, recipe.parallel, half, recipe.collective_timeout_minutes)
    settings = recipe.optim
    factor, lr = settings.lr_factor(recipe.batch_size), optim.build_schedule(settings.lr, recipe.steps)
    return Parts(
        student_teacher=student_teacher,
        module=module,
        optimizer=optim.build_optimizer(
            student_teacher.trained_parameters(settings.layer_decay, settings.patch_embed_lr),
            name=settings.name,
            betas=settings.betas,
            eps=settings.eps,
        ),
        trained=student_teacher.trained_modules(),
        lr=lambda step: factor * lr(step),
        weight_decay=optim.build_schedule(settings.weight_decay, recipe.steps),
        clip_grad=settings.clip_grad,
        freeze_last_layer_steps=settings.freeze_last_layer_steps,
        accumulate=recipe.accumulate,
        seed=recipe.seed,
        device=device,
        statistics=statistics,
    )


@dataclass
class StepResult:
    """What one optimiser step did; tensors and lists are still this rank's own."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    grad_norms: dict[str, Tensor]
    keys: list[str]
    replaced: list[str]
    num_replaced: int
    """Of all ranks, as are `filtered`, `skipped`, `stopping`, whether a signal asked any of them to stop, and `saved`."""
    filtered: int
    skipped: bool
    stopping: bool = False
    saved: bool = False
    """Whether a save in flight has ended on every rank."""


class OutOfMemory(Exception):
    """A step did not fit into the memory of this rank's device."""

    def __init__(self, error: BaseException, keys: list[str]) -> None:
        first = str(error).partition("\n")[0].partition(" Of the allocated memory")[0]
        super().__init__(first.rstrip(".") or type(error).__name__)
        self.keys = keys
        """Of the micro-batch."""


def train_step(
    parts: Parts,
    batches: Iterator[Batch],
    step: int,
    active: Sequence[str],
    stop: object = None,
    saved: Callable[[], bool] = bool,
) -> StepResult:
    """One optimiser step over `accumulate` micro-batches.

    A step whose loss or gradients are not finite on any rank is skipped on all: no parameter, average or objective
    state changes. `stop` is a StopFlag: true once a signal came; `saved` says the same of the end of a save in flight.
    Raises OutOfMemory with the keys of the batch.
    """
    optim.set_step(
        parts.optimizer,
        step=step,
        lr=parts.lr(step),
        weight_decay=parts.weight_decay(step),
        freeze_last_layer=step < parts.freeze_last_layer_steps,
    )
    outputs, keys, replaced, filtered = [], [], [], 0  # keys by micro-batch
    for micro_step in range(parts.accumulate):
        peers.at(step + 1, "reading a batch")
        batch = next(batches)
        torch.manual_seed(model_seed(parts.seed, step, micro_step, distributed.rank()))
        keys.append(batch.keys)
        with _memory_told(batch.keys), distributed.no_sync(parts.module, micro_step < parts.accumulate - 1):
            batch = batch.to(parts.device)
            peers.at(step + 1, "the forward pass")
            with stragglers.working(parts.device):
                output = parts.module(batch, step, active)
            peers.at(step + 1, "the backward pass")
            (output.loss / parts.accumulate).backward()
        outputs.append(output)
        replaced += batch.replaced
        filtered += batch.filtered
    peers.at(step + 1, "agreeing on the step")
    every_key = [key for some in keys for key in some]
    with _memory_told(every_key):
        grad_norms = optim.clip_gradients(parts.trained, parts.clip_grad)
    losses = torch.stack([output.loss.detach() for output in outputs])
    loss = losses.mean()
    # The step's one wait for the device: what follows must not happen before every rank knows.
    finite = bool(torch.isfinite(torch.stack([loss, *(norm.to(loss.device) for norm in grad_norms.values())])).all())
    bad = _not_finite([output.features for output in outputs]) if not finite else []
    bad_losses = _not_finite([output.loss for output in outputs]) if not finite else []
    flags = [not finite, any(bad), any(bad_losses), bool(stop), saved()]
    mine = torch.tensor([*flags, filtered, len(replaced)], dtype=torch.float64)
    told = map(int, distributed.total(mine).tolist())  # one collective for all
    skipped, num_bad, num_bad_losses, stopping, num_saved, filtered, num_replaced = told
    peers.at(step + 1, "updating the networks")
    if not skipped:
        with _memory_told(every_key):
            parts.optimizer.step()
            parts.student_teacher.update(step)
            parts.student_teacher.commit(step, [output.pending for output in outputs])
    else:
        parts.student_teacher.skip(step)
    parts.optimizer.zero_grad()
    terms, step_metrics = _mean([o.terms for o in outputs]), _mean([o.metrics for o in outputs], skip_nan=True)
    # Features of one rank that are not finite spoil losses that look at all ranks, and its loss the averaged gradients.
    blamed = bad if num_bad else bad_losses if num_bad_losses else [True] * len(keys)
    bad_keys = [key for some, is_bad in zip(keys, blamed, strict=False) if is_bad for key in some] if skipped else []
    return StepResult(
        loss,
        terms,
        step_metrics,
        grad_norms,
        bad_keys,
        replaced,
        num_replaced,
        filtered,
        bool(skipped),
        bool(stopping),
        num_saved == distributed.world_size(),
    )


@contextmanager
def _memory_told(keys: list[str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if peers.is_of_memory(error):
            raise OutOfMemory(error, keys) from error
        raise


def model_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The seed of a forward pass: nothing about randomness needs to be saved."""
    mixed = seed
    for number in (step, micro_step, rank):
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed


def _not_finite(values: Sequence[Tensor]) -> list[bool]:
    flags: list[bool] = (~torch.isfinite(torch.stack([value.detach() for value in values]))).tolist()
    return flags


def _mean(items: Sequence[dict[str, Tensor]], skip_nan: bool = False) -> dict[str, Tensor]:
    names = dict.fromkeys(name for item in items for name in item)
    mean = torch.nanmean if skip_nan else torch.mean
    return {name: mean(torch.stack([item[name] for item in items if name in item])) for name in names}
