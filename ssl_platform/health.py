"""What the figures of a run say about its health, in words: a fold over the lines of `metrics.jsonl`.

Because it reads nothing else, a resumed run reads its own lines again and goes on with the same warnings raised.
docs/health.md explains each warning; its headings are the names here.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean, median
from typing import Any, NamedTuple

from ssl_platform.health_facts import Facts, Objective

Line = Mapping[str, Any]

# -- thresholds, each with its reason ----------------------------------------------------------------------------------

IN_A_ROW = 3
"""Lines in a row that a warning needs to be raised, and again to be cleared: one line is one batch, and batches differ."""
UNIFORM_GAP = 0.01
"""Collapse to uniform: teacher entropy within this share of ln K, and the cross-entropy within twice that. Soft teachers
that still learn were measured .015 to .03 below ln K, one that had collapsed .0003."""
LEFT_GAP = 0.05
"""A run whose teacher was once so far below ln K had left the plateau: the text then says that it fell back."""
ONE_PROTOTYPE = 2.0
"""Collapse to one prototype: the mean assignment is worth fewer than two (its perplexity)."""
FEWEST_PROTOTYPES = 8
"""With fewer than these, two may be what the data has."""
LOW_RANK = 0.05
"""Dimensional collapse: RankMe below this share of min(samples, width). Runs that learn were measured at .12 to .28."""
FEWEST_SAMPLES = 64
"""Figures over fewer pooled samples are not judged: few samples have a low rank and few prototypes by their number."""
STUCK_LINES = 20
"""Stuck: over so many lines the loss has not moved (less than two standard errors between their halves) ..."""
STUCK_SHARE = 0.01
"""... and is within this share of where it started. A run that has converged lies below; above lies one whose teacher
grew less sure, because a cross-entropy rises with the teacher's entropy while the student learns."""
EXPLODED = 100.0
"""A gradient norm this many times the median of the lines before; ten times is common where a run leaves its plateau."""
LARGE_NORM = 30.0
"""Smaller norms are no explosion whatever they were before: ten times the usual clip_grad of 3."""
WAITING_SHARE, WAITING_SECONDS = 0.2, 60.0
"""Waiting for data more than a fifth of the time, over at least a minute: workers need a while to fill their queues."""
SKIPPED_SHARE, SKIPPED_LINES = 0.01, 10
"""Of the steps of so many lines: one bad batch in a hundred is no longer one odd sample."""
SLOW_RANK = 1.3
"""A rank that takes so many times the median's time for its own work holds up all others by about as much."""
NORM_LINES, FEWEST_NORMS = 50, 10
"""How many lines before the usual gradient norm is the median of, and how many it needs at least."""
HISTORY = 200
"""Lines that are remembered."""


class Notice(NamedTuple):
    """A warning that is raised, or one that is over."""

    name: str
    """A heading of docs/health.md."""
    subject: str
    """The objective, network or module that it is about; "" = the run."""
    message: str
    cleared: bool


class Rule(NamedTuple):
    """What one rule found in one line."""

    name: str
    subject: str
    message: str
    """Empty: nothing is wrong."""


class Health:
    """Judges one line after another; says each warning once until it clears."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.raised: dict[tuple[str, str], str] = {}
        self._streaks: dict[tuple[str, str], int] = {}
        self._lines: deque[Line] = deque(maxlen=HISTORY)
        self._first_losses: list[float] = []
        self._losses: deque[float] = deque(maxlen=STUCK_LINES)
        self._waits: deque[tuple[float, float]] = deque()
        """Seconds waited, and seconds in all, of the lines of the last minute."""
        self._known: dict[str, float] = {}
        """The latest value of every figure: the texts quote figures that are not in every line."""
        self._left_plateau: set[str] = set()
        self._slow_ranks: set[int] = set()

    def judge(self, line: Line) -> list[Notice]:
        """What is new with this line of `metrics.jsonl`."""
        known = {name: value for name, value in line.items() if value is not None}
        self._known |= known
        self._time(line)
        self._lines.append(line)
        if "loss" in known:
            self._losses.append(known["loss"])
        if len(self._first_losses) < IN_A_ROW and "loss" in known:
            self._first_losses.append(known["loss"])
        notices = []
        for rule in self._rules(known):
            key = (rule.name, rule.subject)
            streak = self._streaks.get(key, 0)
            streak = max(streak, 0) + 1 if rule.message else min(streak, 0) - 1
            self._streaks[key] = streak
            about = f" ({rule.subject})" if rule.subject else ""
            if streak >= IN_A_ROW and key not in self.raised:
                text = f"{TITLES[rule.name]}{about}: {rule.message} (docs/health.md#{rule.name})"
                self.raised[key] = text
                notices.append(Notice(*key, text, cleared=False))
            elif streak <= -IN_A_ROW and key in self.raised:
                del self.raised[key]
                notices.append(Notice(*key, f"over: {TITLES[rule.name]}{about}", cleared=True))
        return notices

    def _time(self, line: Line) -> None:
        """Keeps how long the latest lines took, and how much of it was waiting."""
        if not self._lines:
            return
        samples = (line["step"] - self._lines[-1]["step"]) * self.facts.batch_size
        seconds = samples / max(line.get("samples_per_second") or 0.0, 1e-9)
        self._waits.append((seconds * (line.get("data_wait_share") or 0.0), seconds))
        while (
            len(self._waits) > HISTORY or sum(lasted for _, lasted in islice(self._waits, 1, None)) >= WAITING_SECONDS
        ):
            self._waits.popleft()

    # -- rules: each says nothing where a line has not what it judges -------------------------------------------------

    def _rules(self, known: Line) -> Iterator[Rule]:
        settled = known["step"] >= self.facts.settled
        for name, objective in self.facts.objectives.items():
            yield from self._uniform(name, objective, known, settled)
            if settled and objective.num_prototypes >= FEWEST_PROTOTYPES:
                yield from self._one_prototype(name, objective, known)
        collapsing = any(self._streaks.get((kind, name), 0) > 0 for kind in COLLAPSES for name in self.facts.objectives)
        if settled and not collapsing:  # else they are its consequences, and one warning says more than three
            yield from self._dimensional(known)
            yield from self._stuck(known)
        yield from self._exploding(known)
        yield from self._starving()
        yield from self._skipping(known)
        yield from self._straggling(known)

    def _uniform(self, name: str, objective: Objective, known: Line, settled: bool) -> Iterator[Rule]:
        entropy, kl = known.get(f"{name}_teacher_entropy"), known.get(f"{name}_kl")
        if entropy is None or kl is None or objective.num_prototypes < 2:
            return
        highest = math.log(objective.num_prototypes)
        if entropy < (1 - LEFT_GAP) * highest:
            self._left_plateau.add(name)
        holds = entropy > (1 - UNIFORM_GAP) * highest and abs(entropy + kl - highest) < 2 * UNIFORM_GAP * highest
        if not settled:
            return
        history = "has gone back to" if name in self._left_plateau else "has not left"
        temperature, student = known.get(f"{name}_teacher_temp"), objective.student_temp
        now = f" (now {temperature:.3g}{f'; the student has {student:.3g}' if student else ''})" if temperature else ""
        message = (
            f"the teacher's entropy {history} ln K: {entropy:.4f} of {highest:.4f} for {objective.num_prototypes} "
            f"prototypes, and the student agrees (KL {kl:.4f}){self._alike()}. Its targets say nothing, so nothing is "
            f"learnt. Try a lower objectives.{name}.teacher_temp{now}, a lower "
            "momentum of the teacher early on, a larger batch_size or fewer prototypes"
        )
        yield Rule("uniform", name, message if holds else "")

    def _one_prototype(self, name: str, objective: Objective, known: Line) -> Iterator[Rule]:
        perplexity = known.get(f"{name}_prototype_perplexity")
        if perplexity is None or known.get("pooled_samples", 0) < FEWEST_SAMPLES:
            return
        entropy = known.get(f"{name}_teacher_entropy", math.nan)
        spread = (
            f"objectives.{name}.targets: sinkhorn or a center_momentum near .9"
            if objective.targets == "centering"
            else f"more objectives.{name}.sinkhorn_iterations, more samples in a micro-batch"
        )
        message = (
            f"the teacher gives all samples the same answer: its mean assignment is worth {perplexity:.2f} of "
            f"{objective.num_prototypes} prototypes, with an entropy of {entropy:.3f}{self._alike()}. The loss falls "
            f"without anything being learnt. Try a higher objectives.{name}.teacher_temp, {spread}, a lower optim.lr"
        )
        yield Rule("one-prototype", name, message if perplexity < ONE_PROTOTYPE else "")

    def _dimensional(self, known: Line) -> Iterator[Rule]:
        for network in self.facts.networks:
            share, rank = known.get(f"{network}_rank_share"), known.get(f"{network}_rankme")
            if share is None or rank is None or known.get("pooled_samples", 0) < FEWEST_SAMPLES:
                continue
            message = (
                f"class tokens use {rank:.1f} dimensions (RankMe), {100 * share:.1f} % of what "
                f"{known['pooled_samples']:.0f} samples could{self._alike(network)}. Try the objective koleo, or a "
                "higher weight of it, a longer warm-up, a lower optim.lr or weight_decay, stronger augmentation"
            )
            yield Rule("dimensional", network, message if share < LOW_RANK else "")

    def _stuck(self, known: Line) -> Iterator[Rule]:
        if len(self._losses) < STUCK_LINES:
            return
        older, newer = (list(islice(self._losses, first, first + STUCK_LINES // 2)) for first in (0, STUCK_LINES // 2))
        half, start = STUCK_LINES // 2, median(self._first_losses)
        holds = abs(fmean(newer) - start) <= STUCK_SHARE * abs(start)
        if holds:
            error = math.sqrt((variance(older) + variance(newer)) / half)
            holds = abs(fmean(older) - fmean(newer)) <= 2 * error
        message = (
            f"the loss is where it started: {fmean(newer):.4f} on average over the latest {half} lines, "
            f"{fmean(older):.4f} over the {half} before, {start:.4f} in the first lines. Try another optim.lr "
            f"(now {known.get('lr', math.nan):.2e}; ten times higher and lower), a lower teacher_temp, a lower momentum "
            "of the teacher, and look at the views (ssl-train CONFIG --show-views views.png)"
        )
        yield Rule("stuck", "", message if holds else "")

    def _exploding(self, known: Line) -> Iterator[Rule]:
        for key in [key for key in known if key.startswith("grad_norm_")]:
            if known[key] <= LARGE_NORM:
                yield Rule("gradients", key.removeprefix("grad_norm_"), "")
                continue
            before = [line[key] for line in list(self._lines)[-NORM_LINES - 1 : -1] if line.get(key) is not None]
            if len(before) < FEWEST_NORMS:
                continue
            usual, clip = median(before), self.facts.clip_grad
            message = (
                f"the gradient norm is {known[key]:.3g}, usual was {usual:.3g}"
                f"{f'; clip_grad {clip:g} takes most of it away' if clip else ', and clip_grad is off'}. Try a lower "
                f"optim.lr (now {known.get('lr', math.nan):.2e}), a longer warm-up"
                f"{'' if clip else ', clip_grad: 3.0'}{self._exact()}, a higher teacher_temp"
            )
            exploded = known[key] > EXPLODED * usual
            yield Rule("gradients", key.removeprefix("grad_norm_"), message if exploded else "")

    def _starving(self) -> Iterator[Rule]:
        waited, lasted = (sum(numbers) for numbers in zip(*self._waits, strict=True)) if self._waits else (0.0, 0.0)
        if lasted < WAITING_SECONDS:
            return
        share, workers = waited / lasted, self.facts.workers
        more = f"data.workers={workers + max(workers, 2)} (now {workers})" if workers else "data.workers=2 (now 0)"
        message = (
            f"{100 * share:.0f} % of the time goes into waiting for data. Try {more}, up to the number of cores, a faster "
            "disk for data.shards, or shards packed at the size that training needs (ssl-pack)"
        )
        yield Rule("data", "", message if share > WAITING_SHARE else "")

    def _skipping(self, known: Line) -> Iterator[Rule]:
        lines = list(self._lines)[-1 - SKIPPED_LINES :]
        if len(lines) < 2 or "skipped_steps" not in known:
            return
        skipped = known["skipped_steps"] - (lines[0].get("skipped_steps") or 0)
        steps = lines[-1]["step"] - lines[0]["step"]
        message = (
            f"{skipped} of the latest {steps} steps had a loss or gradients that were not finite, and were skipped; "
            f"events.jsonl names their samples. Try a lower optim.lr, a longer warm-up{self._exact()}"
        )
        yield Rule("skipped", "", message if skipped >= 2 and skipped > SKIPPED_SHARE * steps else "")

    def _straggling(self, known: Line) -> Iterator[Rule]:
        if (slowest := known.get("slowest_rank")) is None:
            return
        ratio = known.get("slowest_rank_ratio", 1.0)
        if ratio > SLOW_RANK:
            self._slow_ranks.add(int(slowest))
        for rank in sorted(self._slow_ranks):
            message = (
                f"it takes {ratio:.2f} times as long as the median rank to read and forward its share, and all wait for "
                "it. Look on its machine for other programs, a hot or throttled GPU, a slow disk or network, and at "
                f"logs/rank-{rank}.log"
            )
            yield Rule("straggler", f"rank {rank}", message if rank == slowest and ratio > SLOW_RANK else "")

    def _exact(self) -> str:
        return "" if self.facts.precision == "fp32" else ", precision: fp32"

    def _alike(self, network: str = "") -> str:
        """How alike class tokens are, as a clause, where it is known."""
        for name in [network] if network else self.facts.networks[::-1]:
            if (cosine := self._known.get(f"{name}_cosine")) is not None:
                return f"; class tokens of different samples have a mean cosine of {cosine:.3f} ({name})"
        return ""


def variance(numbers: Sequence[float]) -> float:
    """Of a sample; statistics.variance is exact and a hundred times slower, which a resumed run would feel."""
    mean = fmean(numbers)
    return sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)


COLLAPSES = ("uniform", "one-prototype")
TITLES = {
    "uniform": "collapse to uniform",
    "one-prototype": "collapse to one prototype",
    "dimensional": "dimensional collapse",
    "stuck": "the loss does not fall",
    "gradients": "exploding gradients",
    "data": "waiting for data",
    "skipped": "steps are skipped",
    "straggler": "one rank is slower than the others",
}
