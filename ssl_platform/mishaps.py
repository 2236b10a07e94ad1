"""What a run does about steps that are not finite, samples that cannot be used, and memory that runs out."""

from ssl_platform import distributed
from ssl_platform.log import append_line, logger
from ssl_platform.recipe import Recipe
from ssl_platform.run_folder import Run, TrainingStopped
from ssl_platform.step import OutOfMemory, Parts, StepResult


def keep_count(recipe: Recipe, parts: Parts, result: StepResult, step: int) -> None:
    """Counts and records skipped steps and replaced samples of all ranks; stops the run when they are too many."""
    parts.counters["filtered_samples"] += result.filtered
    if not result.skipped and not result.num_replaced:
        return
    reports = distributed.gather_objects((result.keys, result.replaced))
    replaced = [line for _, lines in reports for line in lines]
    keys = {rank: keys for rank, (keys, _) in enumerate(reports) if keys}
    parts.counters["skipped_steps"] += result.skipped
    parts.counters["replaced_samples"] += len(replaced)
    parts.bad_samples.update(replaced)
    if distributed.rank() == 0:
        events = recipe.run_dir / "events.jsonl"
        if result.skipped:
            append_line(events, {"step": step, "event": "not_finite", "keys_by_rank": keys})
            text = "step %d skipped: loss or gradients not finite; keys by rank: %s"
            logger.warning(text, step, keys, extra={"names_samples": True})
        for line in replaced:
            append_line(events, {"step": step, "event": "replaced_sample", "sample": line})
            logger.warning("bad sample replaced: %s", line, extra={"names_samples": True})
    if parts.counters["skipped_steps"] > recipe.max_skipped_steps:
        raise TrainingStopped(
            f"step {step}: {parts.counters['skipped_steps']} steps were not finite, more than max_skipped_steps="
            f"{recipe.max_skipped_steps}; see {recipe.run_dir / 'events.jsonl'}. Try a lower optim.lr, a longer warm-up"
            f"{'' if recipe.precision == 'fp32' else ' or precision=fp32'}, and look at the samples whose keys are listed "
            "there."
        )
    if len(parts.bad_samples) > recipe.data.max_bad_samples:
        raise TrainingStopped(
            f"step {step}: {len(parts.bad_samples)} samples could not be used, more than "
            f"data.max_bad_samples={recipe.data.max_bad_samples}; see {recipe.run_dir / 'events.jsonl'}"
        )


def out_of_memory(run: Run, step: int, error: OutOfMemory) -> TrainingStopped:
    """The end of a run in which this rank ran out of memory: what to try; keys of samples go to `events.jsonl` alone."""
    recipe, rank = run.recipe, distributed.rank()
    event = {"step": step, "event": "out_of_memory", "reason": str(error), "keys_by_rank": {rank: error.keys}}
    append_line(recipe.run_dir / "events.jsonl", event)
    logger.error("step %d: keys of rank %d: %s", step, rank, error.keys, extra={"names_samples": True})
    tries = [f"accumulate={2 * recipe.accumulate} (the same batch_size in smaller pieces)"]
    tries += [] if recipe.precision == "bf16" else ["precision=bf16"]
    tries += ["recompute=true", "a smaller batch_size, crops or fewer of them"]
    if distributed.world_size() > 1:
        tries.append("parallel.method=fsdp")
    return TrainingStopped(
        f"step {step}: rank {rank} is out of memory: {error}. The keys of its {len(error.keys)} samples are in "
        f"{recipe.run_dir / 'events.jsonl'}. Try {', '.join(tries)}; `--estimate` tells what fits"
    )
