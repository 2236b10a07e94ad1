"""Accuracies and their intervals against brute force, scikit-learn and what statistics says they must be."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from eval_protocols import metrics
from eval_protocols.metrics import Floats, Integers

SCORES = {"top1": accuracy_score, "balanced_accuracy": balanced_accuracy_score}


def make(
    seed: int, num_samples: int = 60, num_classes: int = 3, num_groups: int = 7, lone: float = 0.2
) -> list[Integers]:
    """Labels, two sets of predictions, and groups of which some samples are in none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_samples)
    predictions, others = (
        np.where(rng.random(num_samples) < chance, labels, rng.integers(num_classes, size=num_samples))
        for chance in (0.6, 0.3)
    )
    groups = np.where(rng.random(num_samples) < lone, -1, rng.integers(num_groups, size=num_samples))
    return [labels, predictions, others, groups]


@given(seed=st.integers(0, 10_000), num_samples=st.integers(1, 40), num_classes=st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_scores_equal_scikit_learn(seed: int, num_samples: int, num_classes: int) -> None:
    labels, predictions, *_ = make(seed, num_samples, num_classes)
    confusion = metrics.confusion_matrix(labels, predictions, num_classes)
    assert (confusion == sklearn_confusion_matrix(labels, predictions, labels=range(num_classes))).all()
    with warnings.catch_warnings():  # scikit-learn warns of predicted classes that no sample has
        warnings.simplefilter("ignore", UserWarning)
        assert metrics.balanced_accuracy(confusion) == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert metrics.top1(confusion) == pytest.approx(accuracy_score(labels, predictions))
    estimates = metrics.bootstrap(labels, predictions, num_classes, n_boot=2)
    assert estimates["top1"].estimate == pytest.approx(metrics.top1(confusion))
    assert estimates["balanced_accuracy"].estimate == pytest.approx(metrics.balanced_accuracy(confusion))


def test_recall_of_a_class_without_samples_is_nan() -> None:
    shares = metrics.recall(metrics.confusion_matrix(np.array([0, 0, 2]), np.array([0, 1, 2]), 3))
    np.testing.assert_array_equal(shares, [0.5, np.nan, 1.0])


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@given(seed=st.integers(0, 10_000), lone=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=30, deadline=None)
def test_a_resample_scores_as_the_samples_it_consists_of(seed: int, lone: float) -> None:
    """The sufficient statistics give, for any weights, what scikit-learn gives on the samples written out."""
    labels, predictions, others, groups = make(seed, lone=lone)
    correct = np.stack([predictions == labels, others == labels])
    statistics, multiplicity = metrics._units(labels, correct, 3, groups)
    assert multiplicity.sum() == metrics.num_units(len(labels), groups)
    weights = next(metrics._resample(multiplicity, 5, np.random.default_rng(seed)))
    assert (weights.sum(1) == multiplicity.sum()).all()
    scores = metrics._metrics(weights @ statistics, 3)
    for row, weight in enumerate(weights):
        written = written_out(statistics, weight)
        for name, score in SCORES.items():
            for predictor in (0, 1):
                expected = score(written[:, 0], np.where(written[:, 1 + predictor] == 1, written[:, 0], -1))
                assert scores[name][row, predictor] == pytest.approx(expected)


def written_out(statistics: Floats, weight: Integers) -> Integers:
    """Samples (label, right by the first, right by the second) that have these statistics, each unit `weight` times.

    How right answers of the two predictors fall together inside a unit does not matter to either score.
    """
    samples = []
    for unit, times in zip(statistics.astype(int).reshape(len(statistics), 3, 3), weight, strict=True):
        for label in range(3):
            size, *right = unit[:, label]
            samples += [[label, *(int(place < count) for count in right)] for place in range(size)] * int(times)
    return np.array(samples)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("lone", [0.0, 0.3, 1.0])
def test_the_interval_is_that_of_a_plain_loop(lone: float) -> None:
    """Another random stream, so equal to the precision of 4,000 resamples: .01 is four standard errors of a bound."""
    labels, predictions, others, groups = make(3, num_samples=200, num_groups=12, lone=lone)
    rng = np.random.default_rng(9)
    units = [np.flatnonzero(groups == group) for group in np.unique(groups[groups >= 0])]
    units += [np.array([sample]) for sample in np.flatnonzero(groups < 0)]
    looped: dict[str, list[list[float]]] = {name: [] for name in SCORES}
    for _ in range(4000):
        chosen = np.concatenate([units[unit] for unit in rng.integers(len(units), size=len(units))])
        counts = np.bincount(labels[chosen], minlength=3)
        for name in SCORES:
            looped[name].append(
                [plain_score(name, labels[chosen], made[chosen], counts) for made in (predictions, others)]
            )
    alone = metrics.bootstrap(labels, predictions, 3, groups, n_boot=4000)
    paired = metrics.paired_bootstrap(labels, predictions, others, 3, groups, n_boot=4000)
    for name in SCORES:
        values = np.array(looped[name])
        bounds: NDArray[np.float64] = np.quantile(values[:, 0], [0.025, 0.975])
        np.testing.assert_allclose(alone[name][1:], bounds, atol=0.01)
        np.testing.assert_allclose(
            paired[name][1:], np.quantile(values[:, 0] - values[:, 1], [0.025, 0.975]), atol=0.01
        )


def plain_score(name: str, labels: Integers, predictions: Integers, counts: Integers) -> float:
    if name == "top1":
        return float((labels == predictions).mean())
    right = np.bincount(labels[labels == predictions], minlength=3)
    return float(np.mean(right[counts > 0] / counts[counts > 0]))


def test_intervals_of_grouped_samples_are_wider() -> None:
    """40 patients x 25 patches, right or wrong mostly together: an interval over patches is less than half as wide."""
    rng = np.random.default_rng(0)
    right = rng.random(1000) < np.repeat(rng.beta(1.5, 0.7, 40), 25)
    labels = rng.integers(2, size=1000)
    predictions = np.where(right, labels, 1 - labels)
    by_sample = metrics.bootstrap(labels, predictions, 2)["top1"]
    by_group = metrics.bootstrap(labels, predictions, 2, np.repeat(np.arange(40), 25))["top1"]
    assert by_sample.estimate == by_group.estimate == right.mean()
    assert (by_group.high - by_group.low) > 2 * (by_sample.high - by_sample.low)
    expected = 2 * 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 1000)
    assert by_sample.high - by_sample.low == pytest.approx(expected, rel=0.08)


def test_pairing_finds_a_difference_that_separate_intervals_hide() -> None:
    """A constant small gain inside groups of very different difficulty."""
    groups, place = np.repeat(np.arange(30), 20), np.tile(np.arange(20), 30)
    share = np.repeat(np.linspace(0.1, 0.9, 30), 20)
    labels = place % 2
    worse = np.where(place < share * 20, labels, 1 - labels)
    better = np.where(place < share * 20 + 1, labels, 1 - labels)
    difference = metrics.paired_bootstrap(labels, better, worse, 2, groups)["top1"]
    one, other = (metrics.bootstrap(labels, made, 2, groups)["top1"] for made in (better, worse))
    assert one.low < other.high
    assert difference.excludes_zero and difference.low > 0
    assert not metrics.paired_bootstrap(labels, worse, worse, 2, groups)["top1"].excludes_zero


def test_coverage_is_near_95_percent() -> None:
    """About 95 % of the intervals of 200 test sets with 40 groups hold the true accuracy (percentile: some less)."""
    rng, covered = np.random.default_rng(1), 0
    groups = np.repeat(np.arange(40), 10)
    for repeat in range(200):
        right = rng.random(400) < np.repeat(rng.beta(2, 1, 40), 10)
        labels = np.zeros(400, np.int64)
        interval = metrics.bootstrap(labels, 1 - right.astype(np.int64), 2, groups, n_boot=300, seed=repeat)["top1"]
        covered += interval.low <= 2 / 3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.98


def test_seeds_repeat_and_group_numbers_do_not_matter() -> None:
    labels, predictions, _, groups = make(5)
    first = metrics.bootstrap(labels, predictions, 3, groups, seed=4)
    assert first == metrics.bootstrap(labels, predictions, 3, groups, seed=4)
    assert first != metrics.bootstrap(labels, predictions, 3, groups, seed=5)
    assert first == metrics.bootstrap(labels, predictions, 3, np.where(groups < 0, -1, groups * 1000 + 7), seed=4)
    nobody = np.full(len(labels), -1)
    assert metrics.bootstrap(labels, predictions, 3, nobody) == metrics.bootstrap(labels, predictions, 3)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, predictions, _, groups = make(6)
    whole = metrics.bootstrap(labels, predictions, 3, groups, n_boot=50)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 100)
    assert metrics.bootstrap(labels, predictions, 3, groups, n_boot=50) == whole


def test_one_group_has_no_interval() -> None:
    interval = metrics.bootstrap(np.array([0, 1, 1]), np.array([0, 1, 0]), 2, np.array([4, 4, 4]))["top1"]
    assert interval.estimate == pytest.approx(2 / 3)
    assert np.isnan(interval.low) and np.isnan(interval.high)


def test_no_samples_are_an_error() -> None:
    nothing = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="no test samples to score"):
        metrics.bootstrap(nothing, nothing, 2)


def test_majority_share() -> None:
    assert metrics.majority_share(np.array([2, 2, 0, 2])) == 0.75
