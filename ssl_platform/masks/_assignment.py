"""Which views of the global batch are masked, and how much of each."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ssl_platform.masks import generator


def hidden_shares(
    num_views: int, batch_size: int, *, probability: float, ratio: tuple[float, float], seed: int, step: int
) -> NDArray[np.float64]:
    """The share of tokens to hide in each view of the global batch, (V, B), 0 = none: DINOv2's collate_data_and_cast.

    n = int(V B probability) views are masked; the i-th of them draws its share from the i-th of n equal parts of
    `ratio`, so that the total is nearly the same in every batch; then the list is shuffled.
    """
    total = num_views * batch_size
    num_masked = int(total * probability)
    edges = np.linspace(*ratio, num_masked + 1)
    rng = generator(seed, step, num_views, batch_size)  # no view has the number `num_views`: not the stream of any mask
    shares = np.zeros(total)
    shares[rng.permutation(total)[:num_masked]] = rng.uniform(edges[:-1], edges[1:])
    return shares.reshape(num_views, batch_size)


def ratio_problems(ratio: tuple[float, float], num_tokens: int, rounded: Callable[[float], int]) -> list[str]:
    """What is wrong with hiding shares in the range `ratio` of `num_tokens` tokens."""
    low, high = ratio
    if not 0 <= low <= high:
        return [f"ratio: [{low:g}, {high:g}] must be [min, max] with 0 <= min <= max"]
    most = rounded(high * num_tokens)
    if most >= num_tokens:
        return [f"ratio: {high:g} hides {most} of {num_tokens} tokens; at least one must stay visible"]
    return [] if most > 0 else [f"ratio: {high:g} hides none of {num_tokens} tokens; raise it"]
