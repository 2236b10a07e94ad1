"""The stages of a run as a list of step ranges, and what happens when one begins."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_platform import distributed
from ssl_platform.log import logger
from ssl_platform.recipe import Recipe, StageConfig
from ssl_platform.stages import StageContext
from ssl_platform.student_teacher import follow


@dataclass(frozen=True)
class Stage:
    """One repetition of a stage: the steps from `begin` to `end` - 1."""

    name: str
    repetition: int
    begin: int
    end: int
    config: StageConfig


def stage_plan(recipe: Recipe) -> list[Stage]:
    """All stages in order; a run without stages has one, "train"."""
    configs = recipe.stages or {"train": StageConfig(steps=recipe.steps)}
    plan: list[Stage] = []
    for name, config in configs.items():
        for repetition in range(config.repeat):
            begin = plan[-1].end if plan else 0
            plan.append(Stage(name, repetition, begin, begin + config.steps, config))
    return plan


def begin_stage(stage: Stage, context: StageContext, *, resumed: bool) -> dict[str, Tensor]:
    """Runs the stage's `prepare` step, or reads its saved result; returns the result.

    A stage that begins copies the networks in its `init`; one that is resumed has them in its checkpoint.
    """
    student_teacher = context.student_teacher
    if not resumed:
        for network, source in stage.config.init.items():
            follow(student_teacher.networks[network], student_teacher.networks[source], 0.0, "copy")
    prepared: dict[str, Tensor] = {}
    if stage.config.prepare is not None:
        saved = context.folder / "prepared.safetensors"
        if not resumed:
            _prepare(stage, context, saved)
        prepared = load_file(saved, device=str(context.device))
    for name in stage.config.objectives or list(student_teacher.objectives):
        student_teacher.objective(name).begin_stage(prepared)
    if stage.config.prepare is not None:
        logger.info("stage %s, repetition %d: prepared %s", stage.name, stage.repetition, ", ".join(prepared))
    return prepared


def _prepare(stage: Stage, context: StageContext, saved: Path) -> None:
    context.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(context.seed + stage.begin)
    student_teacher = context.student_teacher
    student_teacher.eval()
    with torch.no_grad():
        result = stage.config.prepare.build()(context)  # type: ignore[union-attr]
    student_teacher.train()
    if distributed.rank() == 0:
        part = saved.with_suffix(".part")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in result.items()}, part)
        os.replace(part, saved)
    distributed.barrier()
