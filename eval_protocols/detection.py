"""How well scores tell targets from others: equal error rate and detection cost, with intervals that resample speakers.

Two trials that share a speaker are not two draws, so whole speakers are resampled (Bolle et al. 2004 and Poh and Bengio
2007 resample persons for the same reason). What comes out depends on the order of scores alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval_protocols.metrics import Floats, Integers

PRIORS = (0.01, 0.05)
"""Shares of targets for which a detection cost is stated: NIST's and wespeaker's, and VoxCeleb's."""
METRICS = ("eer", "eer_interpolated", *(f"min_dcf_{prior:g}" for prior in PRIORS))


class ErrorRates(NamedTuple):
    """Of every threshold, from the one that accepts all trials to the one that accepts none."""

    misses: Floats
    """(T,) ascending: the share of targets that are rejected."""
    false_alarms: Floats
    """(T,) descending: the share of others that are accepted."""


class Ranking(NamedTuple):
    """Trials in the order of their scores; those with equal scores pass a threshold together."""

    order: Integers
    """(N,) ascending."""
    last: Integers
    """(T - 1,) the place in `order` of the last trial of each score."""


def ranking(scores: NDArray[np.floating]) -> Ranking:
    """The order of scores (N,)."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    return Ranking(order, np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)))


def error_rates(ranked: Ranking, is_target: NDArray[np.bool_], weights: NDArray[np.number] | None = None) -> ErrorRates:
    """The rates of the trials (N,), each counted `weights` times; there are targets and others of weight above 0."""
    weights = np.ones(len(is_target)) if weights is None else weights
    ordered, is_target = weights[ranked.order], is_target[ranked.order]
    rejected = [np.cumsum(np.where(chosen, ordered, 0.0))[ranked.last] for chosen in (is_target, ~is_target)]
    misses, others = (np.append(0.0, counts) / counts[-1] for counts in rejected)
    return ErrorRates(misses, 1 - others)


def interpolated_eer(rates: ErrorRates) -> float:
    """The rate at which misses and false alarms are equal, on straight lines between neighbouring thresholds."""
    gap = rates.misses - rates.false_alarms  # from -1 to 1, ascending
    place = int(np.argmax(gap >= 0))
    share = gap[place - 1] / (gap[place - 1] - gap[place])
    return float(rates.misses[place - 1] + share * (rates.misses[place] - rates.misses[place - 1]))


def convex_hull_eer(rates: ErrorRates) -> float:
    """The same on the convex hull of the thresholds' rates (ROCCH), which two thresholds drawn by lot reach.

    Never above the interpolated one, nor above one half. It is the largest Bayes error over all priors (Brümmer 2010).
    The edge of the hull that crosses the diagonal is found from its two ends: each step replaces one of them.
    """
    points = np.stack([rates.false_alarms, rates.misses])  # (2, T)
    left, right = points[:, 0], points[:, -1]  # more false alarms, more misses
    while True:
        normal = np.array([right[1] - left[1], left[0] - right[0]])
        costs = normal @ points  # (T,), equal at both ends
        best = int(np.argmin(costs))
        if costs[best] >= normal @ left - 1e-14:
            break
        if points[1, best] < points[0, best]:
            left = points[:, best]
        else:
            right = points[:, best]
    share = (left[0] - left[1]) / (left[0] - left[1] + right[1] - right[0])
    return float(left[0] + share * (right[0] - left[0]))


def min_dcf(rates: ErrorRates, prior: float, miss_cost: float = 1.0, false_alarm_cost: float = 1.0) -> float:
    """The smallest detection cost over all thresholds for a share `prior` of targets; 1 is that of a constant answer."""
    of_misses, of_false_alarms = miss_cost * prior, false_alarm_cost * (1 - prior)
    costs = of_misses * rates.misses + of_false_alarms * rates.false_alarms
    return float(costs.min() / min(of_misses, of_false_alarms))


def figures(rates: ErrorRates) -> list[float]:
    """METRICS."""
    return [convex_hull_eer(rates), interpolated_eer(rates), *(min_dcf(rates, prior) for prior in PRIORS)]


def resampled_figures(
    scores: Sequence[NDArray[np.floating]],
    is_target: NDArray[np.bool_],
    speakers: Integers | None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """METRICS (E, metrics) of E scores of the same trials (N,), and on resamples of their speakers (n_boot, E, metrics).

    `speakers` (N, 2): whose the two sides of a trial are; None: there are no resamples. A speaker that is drawn m times
    is m persons: a target trial of its counts m times, one of two speakers as often as their numbers multiplied, and
    trials between a speaker and its own copy do not exist. Resamples without targets or without others are left out.
    """
    rankings = [ranking(each) for each in scores]
    estimates = np.array([figures(error_rates(ranked, is_target)) for ranked in rankings])
    resamples: list[list[list[float]]] = []
    if speakers is not None:
        rng = np.random.default_rng(seed)
        names, numbers = np.unique(speakers, return_inverse=True)
        first, second = numbers.reshape(speakers.shape).T
        for _ in range(n_boot):
            times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
            weights = np.where(first == second, times[first], times[first] * times[second])
            if weights[is_target].any() and weights[~is_target].any():
                resamples.append([figures(error_rates(ranked, is_target, weights)) for ranked in rankings])
    return estimates, np.array(resamples).reshape(-1, *estimates.shape)
