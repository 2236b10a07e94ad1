"""What a run leaves in its folder while it trains: checkpoints, metrics and events; and how it is taken up again."""

from pathlib import Path

import torch

from ssl_platform import __version__, checkpoint, distributed
from ssl_platform.config import to_yaml
from ssl_platform.data.index import Index
from ssl_platform.log import Metrics, append_line, logger
from ssl_platform.progress import Clock, duration
from ssl_platform.recipe import Recipe
from ssl_platform.step import Parts, StepResult


class TrainingStopped(Exception):
    """The run cannot go on; the message says why and what to try."""


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
        logger.info(
            "saved by %d ranks, going on with %d: equal up to rounding", state.world_size, distributed.world_size()
        )
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
    values = torch.stack(
        [result.loss, *(v.to(result.loss.device).float() for v in [*result.terms.values(), *result.metrics.values()])]
    )
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
