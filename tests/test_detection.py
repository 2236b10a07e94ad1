"""Equal error rates and detection costs against definitions written out, known cases and what must not matter."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eval_protocols import detection
from eval_protocols.detection import convex_hull_eer, error_rates, interpolated_eer, min_dcf, ranking


def rates_of(scores: list[float], is_target: list[bool]) -> detection.ErrorRates:
    return error_rates(ranking(np.array(scores, float)), np.array(is_target, bool))


def points_written_out(scores: list[float], is_target: list[bool]) -> list[tuple[float, float]]:
    """(false alarms, misses) when scores above a threshold are accepted, for one below all and one at each score."""
    targets = [score for score, target in zip(scores, is_target, strict=True) if target]
    others = [score for score, target in zip(scores, is_target, strict=True) if not target]
    return [
        (sum(score > t for score in others) / len(others), sum(score <= t for score in targets) / len(targets))
        for t in [-np.inf, *sorted(set(scores))]
    ]


def hull_eer_written_out(scores: list[float], is_target: list[bool]) -> float:
    """The lowest point of the diagonal that is on a chord between two thresholds."""
    found = []
    for (fa, ma), (fb, mb) in itertools.combinations_with_replacement(points_written_out(scores, is_target), 2):
        a, b = fa - ma, fb - mb
        if a * b <= 0:
            share = a / (a - b) if a != b else 0.0
            found.append(fa + share * (fb - fa))
    return min(found)


def interpolated_written_out(scores: list[float], is_target: list[bool]) -> float:
    for (fa, ma), (fb, mb) in itertools.pairwise(points_written_out(scores, is_target)):
        if ma < fa and mb >= fb:
            share = (fa - ma) / ((fa - ma) - (fb - mb))
            return ma + share * (mb - ma)
    raise AssertionError("the first threshold accepts all, the last none")


@st.composite
def trials(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    """Scores with many ties, at least one target and one other."""
    rest = draw(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), max_size=20))
    pairs = [(draw(st.integers(-4, 4)), True), (draw(st.integers(-4, 4)), False), *rest]
    pairs = draw(st.permutations(pairs))
    return [float(score) for score, _ in pairs], [target for _, target in pairs]


@given(trials())
@settings(max_examples=150, deadline=None)
def test_against_the_definitions(given_trials: tuple[list[float], list[bool]]) -> None:
    rates, points = rates_of(*given_trials), points_written_out(*given_trials)
    np.testing.assert_allclose(np.stack([rates.false_alarms, rates.misses], 1), points, atol=1e-12)
    assert convex_hull_eer(rates) == pytest.approx(hull_eer_written_out(*given_trials), abs=1e-12)
    assert interpolated_eer(rates) == pytest.approx(interpolated_written_out(*given_trials), abs=1e-12)
    bayes = max(min(p * m + (1 - p) * f for f, m in points) for p in np.linspace(0, 1, 1001))
    assert bayes <= convex_hull_eer(rates) + 1e-12 <= bayes + 2e-3
    assert convex_hull_eer(rates) <= min(interpolated_eer(rates), 0.5) + 1e-12
    for prior in detection.PRIORS:
        cost = min(prior * m + (1 - prior) * f for f, m in points) / min(prior, 1 - prior)
        assert min_dcf(rates, prior) == pytest.approx(cost, abs=1e-12)
        assert min_dcf(rates, prior) <= 1


@given(trials(), st.sampled_from([np.arctan, np.exp, lambda x: 3 * x - 7, lambda x: x**3]), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_only_the_order_of_scores_matters(
    given_trials: tuple[list[float], list[bool]], change: object, seed: int
) -> None:
    scores, is_target = np.array(given_trials[0]), np.array(given_trials[1])
    expected = detection.figures(error_rates(ranking(scores), is_target))
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    changed: NDArray[np.float64] = change(scores)[shuffled]  # type: ignore[operator]
    assert detection.figures(error_rates(ranking(changed), is_target[shuffled])) == pytest.approx(expected, abs=1e-12)


def test_known_cases() -> None:
    for scores, is_target, hull, interpolated in (
        ([5, 5, 5, 5, 5], [1, 0, 1, 0, 0], 0.5, 0.5),  # all are equal: a coin
        ([3, 4, 1, 2], [1, 1, 0, 0], 0.0, 0.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.5, 1.0),  # the wrong way round: the hull may toss a coin
        ([1, 2], [1, 0], 0.5, 1.0),
        ([1, 3, 2, 4], [0, 0, 1, 1], 0.25, 0.5),  # from (1/2, 0) to (0, 1/2)
    ):
        rates = rates_of([float(score) for score in scores], [bool(target) for target in is_target])
        assert convex_hull_eer(rates) == pytest.approx(hull), scores
        assert interpolated_eer(rates) == pytest.approx(interpolated), scores
    assert min_dcf(rates_of([3, 4, 1, 2], [True, True, False, False]), 0.01) == 0
    assert min_dcf(rates_of([5, 5], [True, False]), 0.01) == pytest.approx(1)
    # Half of the targets rejected without a false alarm: .5 p / p. All accepted for one false alarm of two: .5 (1 - p) / p.
    rates = rates_of([1, 3, 2, 4], [False, False, True, True])
    assert min_dcf(rates, 0.01) == pytest.approx(0.5) and min_dcf(rates, 0.05) == pytest.approx(0.5)
    assert min_dcf(rates, 0.05, miss_cost=100) == pytest.approx(0.5 * 0.95 / 0.95)


def test_a_weight_is_that_many_trials() -> None:
    rng = np.random.default_rng(0)
    scores, is_target, weights = rng.integers(0, 9, 40) / 3, rng.random(40) < 0.4, rng.integers(0, 4, 40)
    repeated = np.repeat(np.arange(40), weights)
    expected = detection.figures(error_rates(ranking(scores[repeated]), is_target[repeated]))
    assert detection.figures(error_rates(ranking(scores), is_target, weights)) == pytest.approx(expected)


def test_resampling_speakers_is_writing_out_their_copies() -> None:
    """Each resample's figures are those of the trials among the persons drawn, a speaker's copies being strangers."""
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(5), 4)
    left, right = np.triu_indices(len(owner), 1)
    is_target = owner[left] == owner[right]
    scores = rng.normal(size=len(left)).round(1) + is_target
    speakers = np.stack([owner[left], owner[right]], 1)
    estimates, resamples = detection.resampled_figures([scores], is_target, speakers, n_boot=20, seed=3)
    assert estimates[0] == pytest.approx(detection.figures(error_rates(ranking(scores), is_target)))
    draws, rows = np.random.default_rng(3), []
    for _ in range(20):
        drawn = draws.integers(5, size=5)
        kept: list[int] = []
        for a, b in itertools.combinations_with_replacement(range(5), 2):  # persons: places in `drawn`
            same, pair = a == b, {int(drawn[a]), int(drawn[b])}
            if same or len(pair) == 2:
                kept += [i for i, sides in enumerate(speakers.tolist()) if set(sides) == pair]
        if is_target[kept].any() and not is_target[kept].all():
            rows.append(detection.figures(error_rates(ranking(scores[kept]), is_target[kept])))
    np.testing.assert_allclose(resamples[:, 0], rows, atol=1e-12)


def test_intervals_of_speakers_are_wider_than_those_of_trials() -> None:
    """Speakers that differ in how hard they are make an interval that more trials of each cannot narrow."""
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(12), 12)
    left, right = np.triu_indices(len(owner), 1)
    is_target = owner[left] == owner[right]
    ease = rng.normal(1.5, 1.5, 12)
    scores = rng.normal(size=len(left)) + is_target * ease[owner[left]]
    speakers = np.stack([owner[left], owner[right]], 1)
    _, of_speakers = detection.resampled_figures([scores], is_target, speakers, n_boot=200)
    of_trials = []
    for _ in range(200):
        drawn = rng.integers(len(scores), size=len(scores))
        of_trials.append(detection.figures(error_rates(ranking(scores[drawn]), is_target[drawn]))[0])
    assert of_speakers[:, 0, 0].std() > 2 * np.std(of_trials)
    assert detection.resampled_figures([scores], is_target, None)[1].shape == (0, 1, len(detection.METRICS))
