"""`ssl-train CONFIG [key=value ...]`: the training loop. It owns time; data, losses and checkpoints know only steps.

Read it as: main (configuration) -> train (parts, then stages) -> run_stage (loop) -> step.train_step.
"""

import argparse
import signal
import sys
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from ssl_platform import checkpoint, distributed, peers, run_lock
from ssl_platform.config import ConfigError, to_yaml
from ssl_platform.costs import split_assumptions
from ssl_platform.data.index import Index
from ssl_platform.data.mixture import doubtful_cache, summary
from ssl_platform.data.order import Order
from ssl_platform.data.reading import BadSampleError
from ssl_platform.data.shards import modality_of_step, train_batches
from ssl_platform.init_report import write_reports
from ssl_platform.initialise import Initialiser
from ssl_platform.log import Metrics, cut_back, logger, open_rank_log, set_up_logging, to_rank_log, warn_of_unwritten
from ssl_platform.mishaps import keep_count, out_of_memory
from ssl_platform.modalities import Modality
from ssl_platform.monitors import Monitor
from ssl_platform.optim import peak, peak_rates
from ssl_platform.progress import Clock, StopFlag
from ssl_platform.recipe import Recipe, build_modality, load_recipe, open_index, open_order
from ssl_platform.recipe_checks import doubtful, unseen
from ssl_platform.run_folder import Run, TrainingStopped, find, report, resume, save, settle, wandb_arguments
from ssl_platform.saving import Saver
from ssl_platform.stages import StageContext
from ssl_platform.stages._plan import Stage, begin_stage, stage_plan
from ssl_platform.step import OutOfMemory, build, train_step
from ssl_platform.views import Batch

# -- configuration -----------------------------------------------------------------------------------------------------

INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (0 finished or stopped by a signal after saving, 1 refused or failed, 130
    interrupted without saving).

    With several ranks it ends the process itself where one failed, with 3 if that was another rank (`peers`).
    """
    parser = argparse.ArgumentParser(
        prog="ssl-train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Pretrain an encoder without labels. Resumes by itself if run_dir holds an unfinished run.",
        epilog="""examples:
  ssl-train configs/smoke/pathology.yaml                     seconds on one core
  ssl-train my.yaml run_dir=runs/a steps=50000 optim.lr=1e-3 any key of the YAML can be set
  ssl-train my.yaml --estimate                               memory, samples and time, then stops
  ssl-train my.yaml --estimate gpus=64 gpu=h100_sxm          the same and traffic, calculated (docs/scaling.md)
  ssl-train my.yaml --show-views views.png                   a picture of what the networks will see, then stops
  python -m launch.local my.yaml gpus=8                      eight GPUs of one machine (docs/launch.md)

what comes out, in run_dir:
  config.yaml      the whole configuration, defaults included; a valid CONFIG
  metrics.jsonl    one object every log_every steps: losses, entropies, gradient norms, speed, signals of collapse
  events.jsonl     skipped steps, bad samples, and warnings when the run looks unhealthy (docs/health.md)
  init.json        what a network was started from (`init`): keys matched, resized, fresh; checksum of the file
  logs/            rank-N.log: what each rank said, over all parts of the run
  checkpoints/     step_XXXXXXXX folders: for ssl-eval, ssl-export, and to resume
keys: docs/configuration.md""",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; its paths are relative to it")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-3 or masks.block.ratio=[.1,.4]"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="measure a few steps, print memory, samples seen and time; with gpus=N calculate them for other hardware",
    )
    parser.add_argument(
        "--show-views",
        type=Path,
        metavar="FILE",
        help="draw the views and masks of some samples of step 0 (.png, .jpg)",
    )
    arguments = parser.parse_intermixed_args(argv)
    set_up_logging()
    try:
        assumed, overrides = (
            split_assumptions(arguments.overrides) if arguments.estimate else (None, arguments.overrides)
        )
        world_size = assumed.gpus if assumed else distributed.environment_world_size()
        recipe = load_recipe(arguments.config, overrides, world_size)
        device = distributed.start(recipe.collective_timeout_minutes)
        set_up_logging()
        peers.watch(60 * recipe.collective_timeout_minutes, logger.error)
        if arguments.estimate:
            from ssl_platform.estimate import calculated, estimate

            text = calculated(recipe, assumed) if assumed else estimate(recipe, device)
            sys.stdout.write(text if distributed.rank() == 0 else "")
            return 0
        if arguments.show_views:
            show_views(recipe, arguments.show_views)
            return 0
        with run_lock.locked(recipe.run_dir):
            train(recipe, device)
    except (
        ConfigError, checkpoint.CheckpointError, run_lock.RunLocked, TrainingStopped, BadSampleError, OSError
    ) as error:  # fmt: skip
        peers.ends_with(error)
        warn_of_unwritten()
        logger.error("%s", error)
        peers.leave(1)
        return 1
    except KeyboardInterrupt as error:
        peers.ends_with(error)
        logger.error("interrupted: the steps since the last checkpoint are lost; the same command goes on from there")
        peers.leave(INTERRUPTED, finish=False)
        return INTERRUPTED
    except BaseException as error:  # of any kind, even SystemExit: the other ranks must be told
        if blame := peers.ends_with(error):
            to_rank_log("%s", traceback.format_exc())
            logger.error("%s", blame)
            peers.leave(peers.LEFT_BEHIND)
        to_rank_log("%s", traceback.format_exc(), error=True)
        if distributed.world_size() > 1:
            sys.stderr.write(traceback.format_exc())
        peers.leave(1)
        raise
    finally:
        peers.stop()
        distributed.stop()
    return 0


def show_views(recipe: Recipe, path: Path) -> None:
    """Draws samples of the first step, as this rank would see them, into the file `path`; writes nothing else."""
    from ssl_platform.show_views import NUM_SAMPLES, check_path, contact_sheet, write_picture

    if distributed.rank() > 0:
        return
    check_path(path)
    index = open_index(recipe)
    modality = build_modality(recipe, index.statistics)
    one_by_one = recipe.batch_size // distributed.world_size()  # so that a large batch need not be read whole
    recipe = recipe.model_copy(update={"accumulate": one_by_one, "data": recipe.data.model_copy(update={"workers": 0})})
    order = open_order(recipe, index)
    with closing(stage_batches(stage_plan(recipe)[0], recipe, index, order, modality, 0, {})) as batches:
        samples = [next(batches) for _ in range(min(NUM_SAMPLES, one_by_one))]
    write_picture(contact_sheet(modality_of_step(modality, recipe.seed, 0), samples), path)
    logger.info("wrote %s: views and masks of the first %d samples of step 0", path, len(samples))


# -- loop --------------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, device: torch.device) -> None:
    """Trains from the newest checkpoint, or from the start, to the last step."""
    index = open_index(recipe)
    found, order = find(recipe, index), open_order(recipe, index)
    statistics = found.state.statistics if found else index.statistics
    modality = build_modality(recipe, statistics)
    # A resumed run has its weights in the checkpoint, and reads no `init` again.
    fill = None if found else Initialiser(recipe.networks, recipe.heads, modality.description())
    parts = build(recipe, modality, len(index), device, statistics, fill)
    rank_log = open_rank_log(recipe.run_dir)
    if distributed.world_size() > 1:
        peers.dump_stacks_to(rank_log)
    step = resume(found, parts)
    if distributed.rank() == 0:
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        (recipe.run_dir / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        write_reports(recipe.run_dir, fill.reports if fill else [])
        cut_back(recipe.run_dir / "events.jsonl", step)
    metrics = Metrics(recipe.run_dir, step, recipe.tensorboard, wandb_arguments(recipe))
    saver = Saver(
        recipe.run_dir / "checkpoints", recipe.keep_last, recipe.keep_every, 60 * recipe.collective_timeout_minutes
    )
    run = Run(recipe, index, order, modality, parts, metrics, StopFlag(), Monitor(recipe, parts), saver)
    say_what_begins(run, device)
    if step == recipe.steps:
        logger.info("%s: all %d steps are done", recipe.run_dir, step)
    for stage in stage_plan(recipe):
        if step >= stage.end:
            continue
        folder = recipe.run_dir / "stages" / f"{stage.name}_{stage.repetition}"
        context = StageContext(
            parts.student_teacher, modality, index, device, recipe.seed, stage.name, stage.repetition, folder
        )
        peers.begin(step + 1, f"preparing stage {stage.name}")
        prepared = begin_stage(stage, context, resumed=step > stage.begin)
        with saver.finished(), closing(stage_batches(stage, recipe, index, order, modality, step, prepared)) as batches:
            step, stopping = run_stage(run, stage, batches, step)
        if stopping:
            name = run.stop.name or "a signal to another rank"
            logger.info("stopped by %s after step %d; the same command goes on from there", name, step)
            break
    peers.begin(step, "finishing")
    run.stop.restore()
    metrics.close()


def say_what_begins(run: Run, device: torch.device) -> None:
    """The size of the run, of each source of a mixture, and warnings of settings that hardly do what was meant."""
    recipe, index, order, parts = run.recipe, run.index, run.order, run.parts
    logger.info(
        "%d samples in %d shards, batch %d, %s, %.1f M trained parameters, peak lr %.2e, %d ranks on %s",
        len(index), index.num_shards, recipe.batch_size,
        f"{len(order.sources)} sources" if recipe.data.sources
        else f"{recipe.steps * recipe.batch_size / len(index):.1f} epochs",
        sum(p.numel() for ps in parts.trained.values() for p in ps) / 1e6,
        peak(parts.lr, recipe.steps),
        distributed.world_size(), device,
    )  # fmt: skip
    for line in peak_rates(parts.optimizer, parts.lr, recipe.steps, parts.freeze_last_layer_steps):
        logger.info("%s", line)
    for line in summary(recipe.data.sources, order, recipe.steps * recipe.batch_size) if recipe.data.sources else ():
        logger.info("%s", line)
    student_teacher = parts.student_teacher
    objectives = {name: student_teacher.objective(name) for name in recipe.objectives}
    lines = doubtful(recipe) + unseen(recipe, run.modality.groups, objectives)
    for line in lines + doubtful_cache(recipe.data.cache_shards, recipe.data.window_shards, index, order):
        logger.warning("%s", line)


def stage_batches(
    stage: Stage,
    recipe: Recipe,
    index: Index,
    order: Order,
    modality: Modality,
    first_step: int,
    prepared: dict[str, Tensor],
) -> Generator[Batch, None, None]:
    """This rank's micro-batches from `first_step` to the end of the stage."""
    return train_batches(
        index,
        modality,
        {name: config.build() for name, config in recipe.masks.items()},
        order=order,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        first_step=first_step,
        last_step=stage.end,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        cache_shards=recipe.data.cache_shards,
        companions=recipe.data.companions.build(index, prepared) if recipe.data.companions else None,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
    )


def run_stage(run: Run, stage: Stage, batches: Iterator[Batch], step: int) -> tuple[int, bool]:
    """Steps until the stage ends or a signal asks to stop, with a checkpoint at the end: (finished steps, stopping)."""
    recipe, parts, monitor = run.recipe, run.parts, run.monitor
    active = stage.config.objectives or list(recipe.objectives)
    clock = Clock(recipe.batch_size)
    stopping = False
    while step < stage.end and not stopping:
        try:
            with monitor.watching(step, active):
                result = train_step(parts, clock.waiting(batches), step, active, run.stop, run.saver.has_ended)
        except OutOfMemory as error:
            raise out_of_memory(run, step + 1, error) from error
        monitor.keep(result.skipped)
        step, stopping = step + 1, result.stopping  # agreed between ranks; the flag itself may differ
        clock.steps += 1
        keep_count(recipe, parts, result, step)
        if result.saved:
            settle(run, step)
        if step % recipe.log_every == 0 or step == recipe.steps:
            report(run, result, clock, step, active)
        if step % recipe.save_every == 0 or step == recipe.steps or stopping:
            save(run, step)
    settle(run, step, needed=stopping or step == recipe.steps)
    return step, stopping


if __name__ == "__main__":
    sys.exit(main())
