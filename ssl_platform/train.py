"""`ssl-train CONFIG [key=value ...]`: the training loop. It owns time; data, losses and checkpoints know only steps.

Read it as: main (configuration) -> build (parts) -> train (loop) -> train_step.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_platform import __version__, checkpoint, distributed, optim, run_lock
from ssl_platform.config import ConfigError, to_yaml
from ssl_platform.data.index import Index
from ssl_platform.data.shards import train_batches
from ssl_platform.log import Metrics, append_line, cut_back, logger, set_up_logging
from ssl_platform.modalities import Modality
from ssl_platform.progress import Clock, StopFlag, duration
from ssl_platform.recipe import Recipe, build_student_teacher, load_recipe
from ssl_platform.stages import StageContext
from ssl_platform.stages._plan import Stage, begin_stage, stage_plan
from ssl_platform.student_teacher import StudentTeacher
from ssl_platform.views import Batch

# -- configuration -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (0 finished or stopped by a signal after saving, 1 refused or failed)."""
    parser = argparse.ArgumentParser(
        prog="ssl-train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Pretrain an encoder without labels. Resumes by itself if run_dir holds an unfinished run.",
        epilog="""examples:
  ssl-train configs/smoke/pathology.yaml                     seconds on one core
  ssl-train my.yaml run_dir=runs/a steps=50000 optim.lr=1e-3 any key of the YAML can be set
  ssl-train my.yaml --estimate                               memory, samples and time, then stops
  torchrun --nproc-per-node 8 -m ssl_platform.train my.yaml  eight GPUs of one machine

what comes out, in run_dir:
  config.yaml      the whole configuration, defaults included; a valid CONFIG
  metrics.jsonl    one object every log_every steps: step, loss, each term, learning rate, gradient norms
  checkpoints/     step_XXXXXXXX folders: for ssl-eval, ssl-export, and to resume
keys: docs/configuration.md""",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; its paths are relative to it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-3 or masks.block.ratio=[.1,.4]")
    parser.add_argument("--estimate", action="store_true", help="measure a few steps, print memory, samples seen and time")
    arguments = parser.parse_args(argv)
    set_up_logging()
    try:
        recipe = load_recipe(arguments.config, arguments.overrides, distributed.environment_world_size())
        device = distributed.start()
        set_up_logging()
        if arguments.estimate:
            from ssl_platform.estimate import estimate

            sys.stdout.write(estimate(recipe, device))
            return 0
        with run_lock.locked(recipe.run_dir):
            train(recipe, device)
    except (ConfigError, checkpoint.CheckpointError, run_lock.RunLocked, TrainingStopped, FileNotFoundError) as error:
        logger.error("%s", error)
        return 1
    finally:
        distributed.stop()
    return 0


class TrainingStopped(Exception):
    """The run cannot go on; the message says why and what to try."""


# -- parts -------------------------------------------------------------------------------------------------------------


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
    counters: dict[str, int] = field(default_factory=lambda: {"skipped_steps": 0, "replaced_samples": 0})


def build(recipe: Recipe, modality: Modality, num_samples: int, device: torch.device) -> Parts:
    """Everything that has state, as it is before the first step."""
    student_teacher = build_student_teacher(recipe, modality, num_samples, device)
    settings = recipe.optim
    factor, lr = settings.lr_factor(recipe.batch_size), optim.build_schedule(settings.lr, recipe.steps)
    return Parts(
        student_teacher=student_teacher,
        module=distributed.wrap(student_teacher, device),
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
    )


# -- loop --------------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, device: torch.device) -> None:
    """Trains from the newest checkpoint, or from the start, to the last step."""
    try:
        index = Index.open(recipe.data.shards)
    except ValueError as error:
        raise ConfigError([f"data.shards: {error}"]) from error
    modality: Modality = recipe.modality.build(index.statistics)
    masks = {name: config.build() for name, config in recipe.masks.items()}
    parts = build(recipe, modality, len(index), device)
    step = resume(recipe, parts)
    if distributed.rank() == 0:
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        (recipe.run_dir / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        cut_back(recipe.run_dir / "events.jsonl", step)
    metrics = Metrics(recipe.run_dir, step, recipe.tensorboard)
    stop = StopFlag()
    logger.info(
        "%d samples in %d shards, batch %d, %.1f epochs, %.1f M trained parameters, peak lr %.2e, %d ranks on %s",
        len(index), index.num_shards, recipe.batch_size, recipe.steps * recipe.batch_size / len(index),
        sum(p.numel() for ps in parts.trained.values() for p in ps) / 1e6,
        max(parts.lr(s) for s in range(0, recipe.steps, max(recipe.steps // 1000, 1))),
        distributed.world_size(), device,
    )  # fmt: skip
    if step == recipe.steps:
        logger.info("%s: all %d steps are done", recipe.run_dir, step)
    for stage in stage_plan(recipe):
        if step >= stage.end:
            continue
        folder = recipe.run_dir / "stages" / f"{stage.name}_{stage.repetition}"
        context = StageContext(
            parts.student_teacher, modality, index, device, recipe.seed, stage.name, stage.repetition, folder
        )
        prepared = begin_stage(stage, context, resumed=step > stage.begin)
        batches = train_batches(
            index,
            modality,
            masks,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            accumulate=recipe.accumulate,
            first_step=step,
            last_step=stage.end,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            window_shards=recipe.data.window_shards,
            cache_shards=recipe.data.cache_shards,
            companions=recipe.data.companions.build(index) if recipe.data.companions else None,
            workers=recipe.data.workers,
            prefetch=recipe.data.prefetch,
        )
        with closing(batches):
            step = run_stage(stage, recipe, parts, batches, step, metrics, index, stop)
        if stop:
            logger.info("stopped by %s after step %d; the same command goes on from there", stop.name, step)
            break
    stop.restore()
    metrics.close()


def run_stage(
    stage: Stage,
    recipe: Recipe,
    parts: Parts,
    batches: Iterator[Batch],
    step: int,
    metrics: Metrics,
    index: Index,
    stop: StopFlag,
) -> int:
    """Steps until the stage ends or a signal asks to stop, with a checkpoint at the end; returns the finished steps."""
    active = stage.config.objectives or list(recipe.objectives)
    clock = Clock(recipe.batch_size)
    while step < stage.end and not stop:
        result = train_step(parts, clock.waiting(batches), step, active, stop)
        step += 1
        clock.steps += 1
        keep_count(recipe, parts, result, step)
        if step % recipe.log_every == 0 or step == recipe.steps:
            report(metrics, recipe, parts, result, clock, step)
        if step % recipe.save_every == 0 or step == recipe.steps or stop:
            save(recipe, parts, index, step)
    return step


@dataclass
class StepResult:
    """What one optimiser step did; tensors are still this rank's own."""

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    grad_norms: dict[str, Tensor]
    keys: list[str]
    replaced: list[str]
    skipped: bool


def train_step(
    parts: Parts, batches: Iterator[Batch], step: int, active: Sequence[str], stop: StopFlag | None = None
) -> StepResult:
    """One optimiser step over `accumulate` micro-batches.

    A step whose loss or gradients are not finite on any rank is skipped on all: no parameter, average or objective
    state changes.
    """
    optim.set_step(
        parts.optimizer,
        lr=parts.lr(step),
        weight_decay=parts.weight_decay(step),
        freeze_last_layer=step < parts.freeze_last_layer_steps,
    )
    outputs, keys, replaced = [], [], []
    for micro_step in range(parts.accumulate):
        batch = next(batches).to(parts.device)
        torch.manual_seed(model_seed(parts.seed, step, micro_step, distributed.rank()))
        with distributed.no_sync(parts.module, micro_step < parts.accumulate - 1):
            output = parts.module(batch, step, active)
            (output.loss / parts.accumulate).backward()
        outputs.append(output)
        keys += batch.keys
        replaced += batch.replaced
    grad_norms = optim.clip_gradients(parts.trained, parts.clip_grad)
    loss = torch.stack([output.loss.detach() for output in outputs]).mean()
    finite = torch.isfinite(torch.stack([loss, *(norm.to(loss.device) for norm in grad_norms.values())])).all()
    skipped, stopping = distributed.any_rank(not finite.item(), bool(stop))
    if stop is not None and stopping:
        stop.set("a signal to another rank")
    if not skipped:
        parts.optimizer.step()
        parts.student_teacher.update(step)
        parts.student_teacher.commit(step, [output.pending for output in outputs])
    parts.optimizer.zero_grad()
    terms, step_metrics = (_mean([getattr(output, name) for output in outputs]) for name in ("terms", "metrics"))
    return StepResult(loss, terms, step_metrics, grad_norms, keys if not finite else [], replaced, skipped)


def model_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The seed of a forward pass: nothing about randomness needs to be saved."""
    mixed = seed
    for number in (step, micro_step, rank):
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed


def _mean(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for item in items for name in item)
    return {name: torch.stack([item[name] for item in items if name in item]).mean() for name in names}


# -- checkpoints and what is said ----------------------------------------------------------------------------------------


def save(recipe: Recipe, parts: Parts, index: Index, step: int) -> None:
    """Writes a checkpoint of `step` finished steps from rank 0; the other ranks wait for it."""
    if distributed.rank() == 0:
        state = checkpoint.TrainState(
            step=step,
            batch_size=recipe.batch_size,
            accumulate=recipe.accumulate,
            world_size=distributed.world_size(),
            seed=recipe.seed,
            statistics=index.statistics,
            counters=dict(parts.counters),
            versions={"ssl_platform": __version__, "torch": torch.__version__},
        )
        folder = recipe.run_dir / "checkpoints"
        model, moments = parts.student_teacher.state_dict(), checkpoint.optimizer_tensors(parts.optimizer)
        path = checkpoint.save(folder, state, to_yaml(recipe), model, moments)
        checkpoint.prune(folder, recipe.keep_last, recipe.keep_every)
        logger.info("saved %s", path)
    distributed.barrier()


def resume(recipe: Recipe, parts: Parts) -> int:
    """Loads the newest usable checkpoint of run_dir into `parts`; returns the finished steps, 0 for a fresh run."""
    found = distributed.from_rank_zero(_newest(recipe.run_dir / "checkpoints") if distributed.rank() == 0 else None)
    if isinstance(found, checkpoint.CheckpointError):
        raise found
    if found is None:
        return 0
    state = checkpoint.read_state(found)
    for name in ("seed", "batch_size"):
        before, now = getattr(state, name), getattr(recipe, name)
        if before != now:
            raise checkpoint.CheckpointError(
                f"{found}: {name} was {before} and is now {now}, which would repeat or leave out samples. "
                f"Set {name}={before}, or start another run_dir."
            )
    checkpoint.load_model(parts.student_teacher, checkpoint.read_tensors(found, "model"), found)
    checkpoint.load_optimizer_tensors(parts.optimizer, checkpoint.read_tensors(found, "optimizer"))
    parts.counters.update(state.counters)
    if state.world_size != distributed.world_size():
        logger.info("saved by %d ranks, going on with %d: equal up to rounding", state.world_size, distributed.world_size())
    logger.info("resuming %s after step %d", found, state.step)
    return state.step


def _newest(folder: Path) -> Path | checkpoint.CheckpointError | None:
    try:
        return checkpoint.latest(folder)
    except checkpoint.CheckpointError as error:
        return error


def keep_count(recipe: Recipe, parts: Parts, result: StepResult, step: int) -> None:
    """Counts and records skipped steps and replaced samples of all ranks; stops the run when they are too many."""
    if not distributed.any_rank(bool(result.skipped or result.replaced))[0]:
        return
    reports = distributed.gather_objects((result.keys, result.replaced))
    replaced = [line for _, lines in reports for line in lines]
    keys = {rank: keys for rank, (keys, _) in enumerate(reports) if keys}
    parts.counters["skipped_steps"] += result.skipped
    parts.counters["replaced_samples"] += len(replaced)
    if distributed.rank() == 0:
        events = recipe.run_dir / "events.jsonl"
        if result.skipped:
            append_line(events, {"step": step, "event": "not_finite", "keys_by_rank": keys})
            logger.warning("step %d skipped: loss or gradients not finite; keys by rank: %s", step, keys)
        for line in replaced:
            append_line(events, {"step": step, "event": "replaced_sample", "sample": line})
            logger.warning("bad sample replaced: %s", line)
    if parts.counters["skipped_steps"] > recipe.max_skipped_steps:
        raise TrainingStopped(
            f"step {step}: {parts.counters['skipped_steps']} steps were not finite, more than max_skipped_steps="
            f"{recipe.max_skipped_steps}; see {recipe.run_dir / 'events.jsonl'}. Try a lower optim.lr, a longer "
            "warm-up or precision=fp32, and look at the samples whose keys are listed there."
        )
    if parts.counters["replaced_samples"] > recipe.data.max_bad_samples:
        raise TrainingStopped(
            f"step {step}: {parts.counters['replaced_samples']} samples could not be used, more than "
            f"data.max_bad_samples={recipe.data.max_bad_samples}; see {recipe.run_dir / 'events.jsonl'}"
        )


def report(metrics: Metrics, recipe: Recipe, parts: Parts, result: StepResult, clock: Clock, step: int) -> None:
    """One line of metrics: the values of this step, averaged over ranks, and the speed since the last line."""
    names = [*result.terms, *result.metrics]
    values = torch.stack([result.loss, *(v.to(result.loss.device).float() for v in [*result.terms.values(), *result.metrics.values()])])
    loss, *rest = distributed.mean(values).tolist()
    line: dict[str, float | int] = {"loss": loss, **dict(zip(names, rest, strict=True))}
    line["lr"] = parts.lr(step - 1)
    line["weight_decay"] = parts.weight_decay(step - 1)
    line |= {f"grad_norm_{name}": norm.item() for name, norm in result.grad_norms.items()}
    line |= clock.lap() | parts.counters
    metrics.write(step, line)
    remaining = (recipe.steps - step) * recipe.batch_size / max(float(line["samples_per_second"]), 1e-9)
    logger.info(
        "step %d/%d  loss %.4f  %s  lr %.2e  %.1f samples/s  waiting for data %.0f %%  %s left",
        step, recipe.steps, loss, "  ".join(f"{name} {line[name]:.3f}" for name in result.terms), line["lr"],
        line["samples_per_second"], 100 * line["data_wait_share"], duration(remaining),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
