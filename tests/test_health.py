"""Each warning from lines written by hand: raised once with evidence and advice, cleared, quiet where it should be."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ssl_platform.health import IN_A_ROW, TITLES, Health, Notice
from ssl_platform.health_facts import Facts, Objective, facts_of
from tests import engine

FACTS = Facts(
    batch_size=100,
    settled=100,
    objectives={"dino": Objective(4096, 0.1, "centering")},
    networks=("student", "teacher"),
    clip_grad=3.0,
    workers=4,
)


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A healthy one: the loss falls, the teacher is sharp, features are spread, data keeps up."""
    healthy = {
        "loss": 9 - step / 1000 + 0.05 * math.sin(step),
        "dino_teacher_entropy": 4.0,
        "dino_kl": 1.5,
        "dino_teacher_temp": 0.05,
        "lr": 1e-3,
        "grad_norm_student": 2.0 + math.sin(step),
        "samples_per_second": 100.0,
        "data_wait_share": 0.01,
        "skipped_steps": 0,
        "teacher_rankme": 80.0,
        "teacher_rank_share": 0.2,
        "teacher_cosine": 0.3,
        "dino_prototype_perplexity": 1000.0,
        "pooled_samples": 512,
    }
    return {"step": step, **healthy, **changes}


def judge(lines: list[dict[str, Any]], facts: Facts = FACTS) -> list[Notice]:
    health = Health(facts)
    return [notice for item in lines for notice in health.judge(item)]


def spoilt(first: int, last: int, end: int = 600, **changes: Any) -> list[Notice]:
    """Lines every ten steps, of which those from `first` to `last` are changed."""
    steps = range(10, end + 1, 10)
    return judge([line(step, **(changes if first <= step <= last else {})) for step in steps])


UNIFORM = {"dino_teacher_entropy": 8.315, "dino_kl": 0.001, "teacher_cosine": 0.998}


def test_a_healthy_run_is_quiet() -> None:
    assert spoilt(0, 0, end=5000) == []


def test_uniform() -> None:
    raised, cleared = spoilt(300, 400, **UNIFORM)
    assert raised.message == (
        "collapse to uniform (dino): the teacher's entropy has gone back to ln K: 8.3150 of 8.3178 for 4096 prototypes, "
        "and the student agrees (KL 0.0010); class tokens of different samples have a mean cosine of 0.998 (teacher). "
        "Its targets say nothing, so nothing is learnt. Try a lower objectives.dino.teacher_temp (now 0.05; the student "
        "has 0.1), a lower momentum of the teacher early on, a larger batch_size or fewer prototypes "
        "(docs/health.md#uniform)"
    )
    assert (raised.name, raised.subject, raised.cleared) == ("uniform", "dino", False)
    assert cleared == Notice("uniform", "dino", "over: collapse to uniform (dino)", True)


def test_the_plateau_at_the_beginning_is_no_collapse() -> None:
    assert spoilt(0, 100, **UNIFORM) == []
    [raised, _] = spoilt(0, 200, **UNIFORM)
    assert "has not left ln K" in raised.message


def test_a_high_entropy_alone_is_no_collapse() -> None:
    """The student has still to follow (a large KL), or the teacher is soft but says something."""
    assert spoilt(300, 500, dino_teacher_entropy=8.315, dino_kl=1.0) == []
    assert spoilt(300, 500, dino_teacher_entropy=8.1, dino_kl=0.1) == []


def test_one_prototype() -> None:
    raised, cleared = spoilt(300, 400, dino_prototype_perplexity=1.02, dino_teacher_entropy=0.01)
    assert "collapse to one prototype (dino)" in raised.message and cleared.cleared
    assert "worth 1.02 of 4096 prototypes, with an entropy of 0.010" in raised.message
    assert "objectives.dino.targets: sinkhorn" in raised.message
    assert spoilt(300, 400, dino_teacher_entropy=0.01) == [], "sure of itself, but of many prototypes"
    assert spoilt(300, 400, dino_prototype_perplexity=1.02, pooled_samples=16) == [], "too few samples to tell"
    sinkhorn = FACTS._replace(objectives={"dino": Objective(4096, 0.1, "sinkhorn")})
    [raised] = judge([line(step, dino_prototype_perplexity=1.02) for step in range(10, 300, 10)], sinkhorn)
    assert (
        "sinkhorn_iterations" in raised.message
        and "targets: sinkhorn" not in raised.message
        and "center" not in raised.message
    )


def test_dimensional() -> None:
    raised, _ = spoilt(300, 400, teacher_rank_share=0.01, teacher_rankme=4.1)
    assert raised.name == "dimensional" and raised.subject == "teacher"
    assert "4.1 dimensions (RankMe), 1.0 % of what 512 samples could" in raised.message and "koleo" in raised.message
    both = spoilt(300, 600, teacher_rank_share=0.01, **UNIFORM)
    assert [notice.name for notice in both] == ["uniform"], "its cause is said, not its consequence"


def test_stuck() -> None:
    lines = [line(step, loss=9.0 + 0.05 * math.sin(step)) for step in range(10, 600, 10)]
    [raised] = judge(lines)
    assert (
        raised.name == "stuck"
        and "average over the latest 10 lines" in raised.message
        and "optim.lr (now 1.00e-03" in raised.message
    )
    converged = [line(step, loss=4 + 5 * math.exp(-step / 50) + 0.05 * math.sin(step)) for step in range(10, 2000, 10)]
    assert judge(converged) == [], "flat, but far below where it began"
    entropy_rises = [line(step, loss=5 + min(step / 100, 1) + 0.05 * math.sin(step)) for step in range(10, 2000, 10)]
    assert judge(entropy_rises) == [], "flat, but above: the teacher became less sure"
    late = [line(step, loss=9.0 - max(step - 160, 0) / 100) for step in range(10, 600, 10)]
    assert judge(late) == [], "a plateau that it leaves in time"


def test_gradients() -> None:
    raised, cleared = spoilt(300, 330, grad_norm_student=5000.0)
    assert raised.subject == "student" and cleared.cleared
    assert "exploding gradients (student): the gradient norm is 5e+03, usual was" in raised.message
    assert "clip_grad 3 takes most of it away" in raised.message
    assert spoilt(300, 310, grad_norm_student=5000.0) == [], "two lines are no explosion yet"
    tiny = [line(step, grad_norm_student=1e-4 if step < 300 else 5.0) for step in range(10, 600, 10)]
    assert judge(tiny) == [], "it only left its plateau"
    unclipped = [line(step, grad_norm_student=2.0 if step < 300 else 900.0) for step in range(10, 600, 10)]
    assert "clip_grad: 3.0" in judge(unclipped, FACTS._replace(clip_grad=None))[0].message


def test_data() -> None:
    [raised, cleared] = spoilt(0, 300, data_wait_share=0.4)  # ten seconds a line
    assert "40 % of the time" in raised.message and "data.workers=8 (now 4)" in raised.message and cleared.cleared
    assert spoilt(0, 40, data_wait_share=0.4) == [], "workers need a while to fill their queues"
    assert (
        "data.workers=2 (now 0)"
        in judge([line(step, data_wait_share=0.4) for step in range(10, 200, 10)], FACTS._replace(workers=0))[0].message
    )
    quick = [line(step, data_wait_share=0.6, samples_per_second=1e4) for step in range(10, 600, 10)]
    assert judge(quick) == [], "a run of a few seconds"


def test_skipped() -> None:
    lines = [line(step, skipped_steps=max(step - 300, 0) // 10) for step in range(10, 400, 10)]
    [raised] = judge(lines)
    assert raised.name == "skipped" and "were not finite" in raised.message
    assert "precision" not in raised.message, "it is fp32"
    assert "precision: fp32" in judge(lines, FACTS._replace(precision="bf16"))[0].message
    once = [line(step, skipped_steps=int(step > 300)) for step in range(10, 600, 10)]
    assert judge(once) == []


@pytest.mark.parametrize("kind", ["uniform", "one-prototype"])
def test_each_warning_is_said_once_until_it_clears_and_then_again(kind: str) -> None:
    changes = UNIFORM if kind == "uniform" else {"dino_prototype_perplexity": 1.0}
    lines = [line(step, **(changes if step % 400 > 200 else {})) for step in range(10, 1200, 10)]
    told = [(notice.name, notice.cleared) for notice in judge(lines)]
    assert told == [(kind, False), (kind, True)] * 2 + [(kind, False)] * (len(told) % 2)
    flickering = [line(step, **(changes if step // 10 % IN_A_ROW else {})) for step in range(10, 1200, 10)]
    assert judge(flickering) == []


def test_lines_without_a_figure_and_null_figures_are_no_evidence() -> None:
    bare = [
        {"step": step, "loss": None, "dino_teacher_entropy": None, "grad_norm_student": None} for step in range(1, 400)
    ]
    assert judge(bare) == []
    sparse = [
        {
            key: value
            for key, value in line(step, **UNIFORM).items()
            if step % 100 == 0 or "teacher_" in key or key in ("step", "dino_kl")
        }
        for step in range(10, 600, 10)
    ]
    assert [notice.name for notice in judge(sparse)] == ["uniform"]


def test_reading_its_own_lines_again_gives_the_same_state() -> None:
    """What a resumed run does: no warning is said twice, and it clears as it would have."""
    lines = [line(step, **(UNIFORM if 300 <= step <= 500 else {})) for step in range(10, 700, 10)]
    lines = json.loads(json.dumps(lines))
    whole = judge(lines)
    for cut in range(0, len(lines), 7):
        resumed = Health(FACTS)
        before = [notice for item in lines[:cut] for notice in resumed.judge(item)]
        assert before + [notice for item in lines[cut:] for notice in resumed.judge(item)] == whole


def test_every_warning_is_explained() -> None:
    page = (Path(__file__).parents[1] / "docs" / "health.md").read_text()
    assert {line[4:] for line in page.splitlines() if line.startswith("### ")} == TITLES.keys()


def test_facts_of_a_configuration() -> None:
    lr = {"schedule": "cosine", "start": 0.01, "end": 0.0, "warmup_steps": 50}
    facts = facts_of(engine.recipe(steps=1000, optim={"lr": lr}))
    assert facts.settled == 50 + 100
    assert facts.objectives == {name: Objective(engine.NUM_PROTOTYPES, 0.1, "centering") for name in ("dino", "ibot")}
    assert facts_of(engine.recipe(steps=1_000_000)).settled == 2000
