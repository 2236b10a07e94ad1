"""Accuracies of a classifier, with intervals that treat the samples of one patient, slide or speaker as one draw.

Samples of one group resemble each other, so an interval that resamples samples is too narrow, by a factor of two and
more on ordinary slide data. Here whole groups are resampled with replacement (cluster bootstrap, percentile interval).
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

METRICS = ("balanced_accuracy", "top1")
BLOCK_ELEMENTS = 1 << 22  # of resampling weights held at once, so that memory stays near 100 MB


class Interval(NamedTuple):
    """A figure on the whole test set, and the bounds between which resampled test sets put it (nan: none)."""

    estimate: float
    low: float
    high: float


class Difference(Interval):
    """An interval of one figure minus another."""

    __slots__ = ()

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; False without an interval."""
        return self.low > 0 or self.high < 0


def confusion_matrix(labels: Integers, predictions: Integers, num_classes: int) -> Integers:
    """Counts (C, C): row = label, column = prediction."""
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def recall(confusion: Integers) -> Floats:
    """The share of each class that is predicted right (C,); nan for a class without samples."""
    counts = confusion.sum(1)
    shares = np.full(len(counts), np.nan)
    np.divide(np.diag(confusion), counts, out=shares, where=counts > 0)
    return shares


def top1(confusion: Integers) -> float:
    """The share of samples that are predicted right."""
    return float(np.trace(confusion) / confusion.sum())


def balanced_accuracy(confusion: Integers) -> float:
    """The mean recall over the classes that have samples: 1 / (their number) for a constant prediction."""
    return float(np.nanmean(recall(confusion)))


def bootstrap(
    labels: Integers,
    predictions: Integers,
    num_classes: int,
    groups: Integers | None = None,
    *,
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each of METRICS on the test set (N,), with its percentile interval over resampled groups.

    `groups` (N,): samples with the same number >= 0 are drawn together, those with -1 alone. A resample without any
    sample of a class leaves that class out of its mean, as the metric does on the test set itself.
    """
    correct = (predictions == labels)[None]  # (1, N)
    estimates, resamples = _scores(labels, correct, num_classes, groups, n_boot, seed)
    return {name: _interval(estimates[name][0], resamples[name][:, 0], confidence) for name in METRICS}


def paired_bootstrap(
    labels: Integers,
    predictions: Integers,
    others: Integers,
    num_classes: int,
    groups: Integers | None = None,
    *,
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """The difference of each of METRICS, `predictions` minus `others`, both scored on the same resampled groups.

    Two encoders find the same groups hard, so this interval is the one that tells them apart: two overlapping
    intervals of their own do not say that they are equal.
    """
    correct = np.stack([predictions == labels, others == labels])  # (2, N)
    estimates, resamples = _scores(labels, correct, num_classes, groups, n_boot, seed)
    gains = {name: resamples[name][:, 0] - resamples[name][:, 1] for name in METRICS}
    return {
        name: Difference(*_interval(estimates[name][0] - estimates[name][1], gains[name], confidence))
        for name in METRICS
    }


def num_units(num_samples: int, groups: Integers | None) -> int:
    """How many things are resampled: groups, and samples that are in none."""
    if groups is None:
        return num_samples
    return len(np.unique(groups[groups >= 0])) + int((groups < 0).sum())


def _interval(estimate: float, resamples: Floats, confidence: float) -> Interval:
    if len(resamples) == 0:
        return Interval(float(estimate), float("nan"), float("nan"))
    low, high = np.quantile(resamples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(estimate), float(low), float(high))


def _scores(
    labels: Integers, correct: NDArray[np.bool_], num_classes: int, groups: Integers | None, n_boot: int, seed: int
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """METRICS of E predictors on the test set {name: (E,)} and on its resamples {name: (n_boot, E)}.

    A single unit cannot be resampled: then there are no resamples, rather than equal ones and a width of 0.
    """
    if len(labels) == 0:
        raise ValueError("there are no test samples to score")
    statistics, multiplicity = _units(labels, correct, num_classes, groups)
    whole = _metrics(multiplicity[None] @ statistics, num_classes)
    blocks = []
    if multiplicity.sum() > 1:
        rng = np.random.default_rng(seed)
        blocks = [_metrics(weights @ statistics, num_classes) for weights in _resample(multiplicity, n_boot, rng)]
    empty = np.zeros((0, len(correct)))
    return (
        {name: whole[name][0] for name in METRICS},
        {name: np.concatenate([empty, *(block[name] for block in blocks)]) for name in METRICS},
    )


def _units(
    labels: Integers, correct: NDArray[np.bool_], num_classes: int, groups: Integers | None
) -> tuple[Floats, Integers]:
    """What is resampled: sufficient statistics (U, (1 + E) C) of U kinds of unit, and how many of each kind there are.

    The statistics of a unit are its number of samples of each class, then for each predictor how many of them are
    right. Lone samples with the same label that the same predictors get right are of one kind: 2^E C kinds at most.
    """
    num_predictors, num_samples = correct.shape
    groups = np.full(num_samples, -1) if groups is None else groups
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    lone = (groups < 0) | (sizes[group] == 1)
    pattern = (correct * (1 << np.arange(num_predictors))[:, None]).sum(0)  # (N,) which predictors get it right
    kind = np.where(lone, -1 - (labels << num_predictors | pattern), groups)
    kinds, first, unit, sizes = np.unique(kind, return_index=True, return_inverse=True, return_counts=True)
    stands_for_others = np.zeros(num_samples, bool)
    stands_for_others[first] = True
    counted = np.flatnonzero(~lone | stands_for_others)  # one lone sample of each kind
    statistics = np.zeros((len(kinds), 1 + num_predictors, num_classes))
    np.add.at(statistics[:, 0], (unit[counted], labels[counted]), 1)
    for predictor in range(num_predictors):
        right = counted[correct[predictor, counted]]
        np.add.at(statistics[:, 1 + predictor], (unit[right], labels[right]), 1)
    return statistics.reshape(len(kinds), -1), np.where(kinds < 0, sizes, 1)


def _resample(multiplicity: Integers, n_boot: int, rng: np.random.Generator) -> Iterator[Integers]:
    """How often each kind of unit is drawn when as many units as there are, are drawn with replacement: (rows, U)."""
    total, num_kinds = int(multiplicity.sum()), len(multiplicity)
    rows_at_once = max(1, BLOCK_ELEMENTS // num_kinds)
    for first in range(0, n_boot, rows_at_once):
        rows = min(rows_at_once, n_boot - first)
        if total > num_kinds:
            yield rng.multinomial(total, multiplicity / total, size=rows)
        else:  # every unit is its own kind: the same law, drawn faster
            drawn = rng.integers(num_kinds, size=(rows, total)) + np.arange(rows)[:, None] * num_kinds
            yield np.bincount(drawn.ravel(), minlength=rows * num_kinds).reshape(rows, num_kinds)


def _metrics(totals: Floats, num_classes: int) -> dict[str, Floats]:
    """METRICS (R, E) from summed statistics (R, (1 + E) C)."""
    counts, right = np.split(totals.reshape(len(totals), -1, num_classes), [1], axis=1)  # (R, 1, C), (R, E, C)
    present = counts > 0
    recalls = np.divide(right, counts, out=np.zeros_like(right), where=present)
    return {
        "balanced_accuracy": recalls.sum(2) / present.sum(2),
        "top1": right.sum(2) / counts.sum(2),
    }


def majority_share(labels: Integers) -> float:
    """The top-1 accuracy of always predicting the most frequent class of the test set."""
    return float(np.bincount(labels).max() / len(labels))
