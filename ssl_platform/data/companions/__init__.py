"""Which other samples accompany a sample (donors, neighbours, pairs); one file a rule, and the folder is the registry.

A rule's module holds a class `Config` whose `build(index, prepared)` makes the `Companions`; `prepared` is what the stage's
`prepare` step made (clusters, say), empty without one.
"""

from typing import Protocol

import numpy as np


class Companions(Protocol):
    """A rule: their examples follow the sample's own in `Modality.augment(examples, rng)`."""

    def __call__(self, sample: int, rng: np.random.Generator) -> tuple[int, ...]:
        """The ids of the companions of `sample`, always the same number; random only through `rng`."""
        ...
