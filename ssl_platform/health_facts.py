"""What the rules of `health.py` need to know of a run besides its lines: facts of the configuration."""

from typing import NamedTuple

from ssl_platform.optim import Cosine
from ssl_platform.recipe import Recipe

PLATEAU_SHARE, PLATEAU_STEPS = 0.1, 2000
"""Nothing is said of collapse in the first steps: the learning rate's warm-up, then this share of the run, at most so
many. Class tokens start out alike, so every run begins near ln K or with few prototypes, and leaves that by and by."""


class Objective(NamedTuple):
    """What the texts need to know of one objective with prototypes."""

    num_prototypes: int
    student_temp: float | None
    """None = it is a schedule."""
    targets: str


class Facts(NamedTuple):
    """What the rules need to know of a run."""

    batch_size: int
    settled: int
    """The step from which collapse is judged."""
    objectives: dict[str, Objective]
    networks: tuple[str, ...]
    clip_grad: float | None
    workers: int
    precision: str = "fp32"


def facts_of(recipe: Recipe) -> Facts:
    """The facts of a configuration; objectives count as having prototypes if their head has."""
    objectives = {}
    for name, objective in recipe.objectives.items():
        head = recipe.heads.get(str(getattr(objective, "head", None)))
        if number := getattr(head, "num_prototypes", None):
            temp, targets = getattr(objective, "student_temp", None), getattr(objective, "targets", "")
            objectives[name] = Objective(number, temp if isinstance(temp, float) else None, targets)
    warmup = recipe.optim.lr.warmup_steps if isinstance(recipe.optim.lr, Cosine) else 0
    return Facts(
        batch_size=recipe.batch_size,
        settled=warmup + min(int(PLATEAU_SHARE * recipe.steps), PLATEAU_STEPS),
        objectives=objectives,
        networks=tuple(recipe.networks),
        clip_grad=recipe.optim.clip_grad,
        workers=recipe.data.workers,
        precision=recipe.precision,
    )
