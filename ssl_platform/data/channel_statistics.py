"""What the index keeps of the channels: mean, std and percentiles, and the distributions that these are joined from."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.distribution import Distribution, bins_of, merged

logger = logging.getLogger(__name__)

PERCENTILES = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)
_SHOWN = ("1", "50", "99")
_MOST_SHOWN = 8
_CONSTANT = 1e-5
"""Of the mean; sums of squares in float64 leave a hundredth of it where a channel has one value."""


class Tally:
    """Adds up samples, apart for each number of channels, which is the key of all four, as text."""

    def __init__(self) -> None:
        self.num_values: dict[str, int] = {}
        """Of each channel."""
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.squares: dict[str, NDArray[np.float64]] = {}
        self.distributions: dict[str, Distribution] = {}

    def add(self, values: NDArray[Any]) -> None:
        """The values (C, ...) of a sample: integers count as shares of their largest value, floats as they are."""
        channels, bins = str(len(values)), bins_of(values)
        known = self.distributions.get(channels)
        fitting = known if known is not None and known.bins == bins else Distribution.empty(bins, len(values))
        added, squares = fitting.add(values)
        self.distributions[channels] = fitting if known is None or known is fitting else merged([known, fitting])
        self.num_values[channels] = self.num_values.get(channels, 0) + values[0].size
        self.sums[channels] = self.sums.get(channels, 0.0) + added
        self.squares[channels] = self.squares.get(channels, 0.0) + squares


def describe_distribution(distribution: Distribution) -> dict[str, Any]:
    """The keys of the index that come from it: the percentiles, and itself, which a later join starts from."""
    found = distribution.percentiles(PERCENTILES).tolist()
    percentiles = {f"{share:g}": values for share, values in zip(PERCENTILES, found, strict=True)}
    return {"percentiles": percentiles, "distribution": distribution.to_json()}


def joined(several: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The statistics of several data sets as one; without percentiles if one has none.

    None if they have other channels, or are of other things: pixels, coordinates, or filter banks of other settings.
    """
    if any(len(one["mean"]) != len(several[0]["mean"]) or one.get("of") != several[0].get("of") for one in several):
        return None
    pixels = np.array([one["pixels"] for one in several], dtype=np.float64)
    means, stds = (np.array([one[name] for one in several]) for name in ("mean", "std"))  # (sets, C)
    mean = pixels @ means / pixels.sum()
    variance = pixels @ (stds**2 + (means - mean) ** 2) / pixels.sum()
    total = sum(one["pixels"] for one in several)
    about: dict[str, Any] = {"mean": mean.tolist(), "std": np.sqrt(variance).tolist(), "pixels": total}
    about |= {"of": several[0]["of"]} if several[0].get("of") else {}
    if all(one.get("distribution") for one in several):
        parts = (Distribution.from_json(one["distribution"], len(mean)) for one in several)
        about |= describe_distribution(merged(parts))
    return about


def used(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """What of the index's statistics a modality is built with, and checkpoints and exports carry.

    A channel that never changes (a filter bank between two lines of the spectrum, always at its floor) has a std of 0 or
    what rounding leaves of it; divided by that, its first other value would be millions. It counts as 1, so that the
    channel is centred and nothing more.
    """
    kept = {key: statistics[key] for key in ("mean", "std", "percentiles", "of") if statistics.get(key)}
    pairs = zip(statistics["mean"], statistics["std"], strict=True)
    constant = [channel for channel, (mean, std) in enumerate(pairs) if std <= _CONSTANT * abs(mean)]
    if constant:
        kept["std"] = [1.0 if channel in constant else std for channel, std in enumerate(statistics["std"])]
        level = logging.INFO if statistics.get("of") else logging.WARNING  # one of 128 filter banks is no news
        named = ", ".join(map(str, constant[:_MOST_SHOWN])) + ", ..." * (len(constant) > _MOST_SHOWN)
        logger.log(
            level, f"{len(constant)} of {len(kept['std'])} channels never change: {named}; their std counts as 1"
        )
    return kept


def channel_line(statistics: Mapping[str, Any] | None) -> str:
    """Mean, std and some percentiles for the screen."""
    if not statistics:
        return "channels: mean and std are not known"
    percentiles = statistics.get("percentiles") or {}
    every = {name: statistics[name] for name in ("mean", "std")}
    every |= {f"percentile {share}": percentiles[share] for share in _SHOWN if share in percentiles}
    parts = [f"{name} {', '.join(f'{value:.4f}' for value in values[:_MOST_SHOWN])}" for name, values in every.items()]
    more = len(statistics["mean"]) - _MOST_SHOWN
    return f"channels: {'; '.join(parts)}" + (f" (and {more} more channels)" if more > 0 else "")
