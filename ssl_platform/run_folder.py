"""What a run leaves in its folder while it trains: checkpoints, metrics and events; and how it is taken up again."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_platform import __version__, checkpoint, distributed, peers, stragglers
from ssl_platform.config import to_yaml
from ssl_platform.data.index import Index
from ssl_platform.data.mixture import described
from ssl_platform.data.order import Order
from ssl_platform.health import Notice
from ssl_platform.log import Metrics, append_line, logger
from ssl_platform.modalities import Modality
from ssl_platform.monitors import Monitor
from ssl_platform.progress import Clock, StopFlag, duration
from ssl_platform.recipe import Recipe
from ssl_platform.saving import Saver
from ssl_platform.step import Parts, StepResult


class TrainingStopped(Exception):
    """The run cannot go on; the message says why and what to try."""


@dataclass(frozen=True)
class Run:
    """What the loop works with from the first step to the last."""

    recipe: Recipe
    index: Index
    order: Order
    modality: Modality
    parts: Parts
    metrics: Metrics
    stop: StopFlag
    monitor: Monitor
    saver: Saver


def save(run: Run, step: int) -> None:
    """Begins a checkpoint of `step` finished steps, of which a thread writes a copy; waits for the one before it."""
    recipe, parts = run.recipe, run.parts
    settle(run, step)
    peers.at(step, "copying a checkpoint")
    state = checkpoint.TrainState(
        step=step,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        world_size=distributed.world_size(),
        seed=recipe.seed,
        order=order_of(recipe, run.index),
        optimizer=recipe.optim.name,
        statistics=parts.statistics,
        counters=dict(parts.counters),
        bad_samples=sorted(parts.bad_samples),
        versions={"ssl_platform": __version__, "torch": torch.__version__},
    )
    model, moments = parts.student_teacher.state_dict(), checkpoint.optimizer_tensors(parts.optimizer)
    run.saver.begin(state, to_yaml(recipe), model, moments)


def settle(run: Run, step: int, *, needed: bool = False) -> None:
    """Waits for the save in flight, on all ranks together; the run goes on if it failed, unless it is `needed`.

    Raises TrainingStopped then, and after more than `max_failed_saves` in a row.
    """
    peers.at(step, f"waiting for the checkpoint of step {run.saver.step}")
    outcome = run.saver.take()
    if outcome is None or not outcome.failure:
        return
    recipe, in_a_row = run.recipe, run.saver.in_a_row
    told = f"the checkpoint of step {outcome.step} could not be written: {outcome.failure}"
    if distributed.rank() == 0:
        event = {"step": step, "event": "save_failed", "saved_step": outcome.step, "reason": outcome.failure}
        append_line(recipe.run_dir / "events.jsonl", event)
    left = checkpoint.checkpoints(recipe.run_dir / "checkpoints")
    newest = f"{left[-1].name} is the newest that is there" if left else "there is none yet"
    if needed or in_a_row > recipe.max_failed_saves:
        why = "" if needed else f" ({in_a_row} in a row, max_failed_saves={recipe.max_failed_saves})"
        raise TrainingStopped(
            f"step {step}: {told}{why}; {newest}. Once that is mended, the same command goes on from there"
        )
    logger.warning(
        "step %d: %s; %s. The run goes on and tries again at step %d (failed %d in a row, max_failed_saves=%d)",
        step, told, newest, min((step // recipe.save_every + 1) * recipe.save_every, recipe.steps), in_a_row,
        recipe.max_failed_saves,
    )  # fmt: skip


class Found(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    state: checkpoint.TrainState


def find(recipe: Recipe, index: Index) -> Found | None:
    """The newest usable checkpoint of run_dir, None for a fresh run; the same on every rank.

    Raises CheckpointError if there are some but none can be used, or if the run would not be the same run.
    """
    path = distributed.from_rank_zero(_newest(recipe.run_dir / "checkpoints") if distributed.rank() == 0 else None)
    if isinstance(path, checkpoint.CheckpointError):
        raise path
    if path is None:
        return None
    state = checkpoint.read_state(path)
    if state.averaged:
        raise checkpoint.CheckpointError(
            f"{path}: is a mean made by ssl-average, without an optimiser's state: take it out of this folder; a new run "
            "can start from it by networks.*.init"
        )
    for name, key, before, now in (
        ("seed", "seed", state.seed, recipe.seed),
        ("batch_size", "batch_size", state.batch_size, recipe.batch_size),
        ("optim.name", "optim.name", state.optimizer, recipe.optim.name),
        (
            "the order of the data",
            "data.shards, data.sources and data.window_shards as they were",
            state.order,
            order_of(recipe, index),
        ),
    ):
        if before != now:
            raise checkpoint.CheckpointError(
                f"{path}: {name} was {before} and is now {now}, which would be another run: samples repeated or left "
                f"out, or moments lost. Set {key}{f'={before}' if key == name else ''}, or start another run_dir."
            )
    if state.step > recipe.steps:
        raise checkpoint.CheckpointError(
            f"{path}: {state.step} steps are done, more than steps={recipe.steps}; set steps to at least {state.step}, "
            "or start another run_dir."
        )
    return Found(path, state)


def order_of(recipe: Recipe, index: Index) -> str:
    """What, with seed and batch size, decides which samples come when."""
    return f"{index.fingerprint} window {recipe.data.window_shards}{described(recipe.data.sources, index)}"


def resume(found: Found | None, parts: Parts) -> int:
    """Loads a checkpoint into `parts`; returns the finished steps, 0 for a fresh run."""
    if found is None:
        return 0
    path, state = found
    checkpoint.load_networks(parts.student_teacher, path)
    checkpoint.load_optimizer(parts.optimizer, path)
    parts.counters.update(state.counters)
    parts.bad_samples.update(state.bad_samples)
    if state.world_size != distributed.world_size():
        logger.info(
            "saved by %d ranks, going on with %d: equal up to rounding", state.world_size, distributed.world_size()
        )
    logger.info("resuming %s after step %d", path, state.step)
    return state.step


def _newest(folder: Path) -> Path | checkpoint.CheckpointError | None:
    try:
        path = checkpoint.latest(folder)
    except checkpoint.CheckpointError as error:
        return error
    if path is not None:
        checkpoint.set_aside_newer(path)
    return path


def report(run: Run, result: StepResult, clock: Clock, step: int, active: Sequence[str]) -> None:
    """One line of metrics: the values of this step, averaged over ranks, and the speed since the last line.

    Where collapse signals are due they stand in the same line; what the line says of the run's health is said in words.
    """
    recipe, parts, monitor = run.recipe, run.parts, run.monitor
    peers.at(step, "gathering the metrics")
    loss, *terms = distributed.mean(_stacked([result.loss, *result.terms.values()], result.loss.device)).tolist()
    line: dict[str, float | int] = {"loss": loss, **dict(zip(result.terms, terms, strict=True))}
    if result.metrics:
        known = distributed.mean_of_known(_stacked(result.metrics.values(), result.loss.device)).tolist()
        line |= zip(result.metrics, known, strict=True)
    line["lr"] = parts.lr(step - 1)
    line["weight_decay"] = parts.weight_decay(step - 1)
    line |= followed_schedules(parts, active, step - 1)
    line |= {f"grad_norm_{name}": norm.item() for name, norm in result.grad_norms.items()}
    waited = clock.waited
    line |= clock.lap() | parts.counters
    if recipe.data.sources:
        line |= {f"drawn_{name}": count for name, count in run.order.drawn(step * recipe.batch_size).items()}
    line |= stragglers.figures(clock_seconds=waited, data_wait_share=line["data_wait_share"])
    line |= monitor.speed(active, line["samples_per_second"])
    if monitor.due(step):
        line |= monitor.signals()
    written = run.metrics.write(step, line)
    remaining = (recipe.steps - step) * recipe.batch_size / max(float(line["samples_per_second"]), 1e-9)
    logger.info(
        "step %d/%d  loss %.4f  %s  lr %.2e  %.1f samples/s  waiting for data %.0f %%%s  %s left",
        step, recipe.steps, loss, "  ".join(f"{name} {line[name]:.3f}" for name in result.terms), line["lr"],
        line["samples_per_second"], 100 * line["data_wait_share"],
        f"  mfu {100 * line['mfu']:.0f} %" if "mfu" in line else "", duration(remaining),
    )  # fmt: skip
    if distributed.rank() == 0:
        tell(recipe.run_dir, step, monitor.health.judge(written))


def tell(run_dir: Path, step: int, notices: Sequence[Notice]) -> None:
    """Says in the log and in `events.jsonl` what is new about the run's health."""
    for notice in notices:
        logger.log(logging.INFO if notice.cleared else logging.WARNING, "step %d: %s", step, notice.message)
        event = {"step": step, "event": "cleared" if notice.cleared else "warning", "warning": notice.name}
        append_line(run_dir / "events.jsonl", event | {"subject": notice.subject, "message": notice.message})


def followed_schedules(parts: Parts, active: Sequence[str], step: int) -> dict[str, float | int]:
    """What else a schedule sets at `step`: momenta of averaged networks, teacher temperatures of objectives."""
    model = parts.student_teacher
    line: dict[str, float | int] = {
        f"{name}_momentum": role.momentum(step) for name, role in model.roles.items() if role.update == "ema"
    }
    for name in active:
        temperature = getattr(model.objective(name), "teacher_temp", None)
        if callable(temperature):
            line[f"{name}_teacher_temp"] = temperature(step)
    return line


def wandb_arguments(recipe: Recipe) -> dict[str, Any] | None:
    """What `log.start_wandb` is given: the section, and the configuration without what is or looks like a path."""
    if recipe.wandb is None:
        return None
    return {**recipe.wandb.model_dump(), "config": _without_paths(recipe.model_dump())}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_paths(item) for key, item in value.items() if not _is_path(item)}
        return {key: item for key, item in kept.items() if item != []}
    return [_without_paths(item) for item in value if not _is_path(item)] if isinstance(value, list | tuple) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and ("/" in value or "\\" in value))


def _stacked(values: Iterable[Tensor], device: torch.device) -> Tensor:
    return torch.stack([value.to(device).float() for value in values])
