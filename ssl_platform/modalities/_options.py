"""Types of options that modalities share."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ssl_platform.config import Config, ConfigError

# Values that a validator has touched are validated as Python objects, where strict mode refuses lists for tuples.
from_list = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Pixels = Annotated[int, Field(ge=1)]
Interval = Annotated[tuple[float, float], from_list]
"""[min, max]"""
PerView = Annotated[tuple[Probability, ...], from_list, Field(min_length=1)]
"""One probability for each view of a group; repeated if the group has more."""
SizeOption = Annotated[Pixels | tuple[Pixels, Pixels], from_list]
"""One number, or [height, width]."""


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width)"""
    return (size, size) if isinstance(size, int) else size


def check_interval(key: str, interval: tuple[float, float], largest: float = float("inf")) -> list[str]:
    """What is wrong with an interval of positive numbers."""
    low, high = interval
    if 0 < low <= high <= largest:
        return []
    end = f" <= {largest:g}" if largest < float("inf") else ""
    return [f"{key}: [{low:g}, {high:g}] must be [min, max] with 0 < min <= max{end}"]


def raise_if_any(lines: Sequence[str]) -> None:
    """Makes a validator report several problems at once."""
    if lines:
        raise ValueError(ConfigError(lines))


def over_defaults(default: dict[str, Any], value: Any) -> Any:
    """A user's map over the default one, key by key and inside sections, so that a YAML holds the difference only."""
    if not isinstance(value, dict):
        return value
    merged: dict[str, Any] = dict(default)
    for key, given in value.items():
        before = merged.get(key)
        if isinstance(before, Config) and isinstance(given, dict):
            given = {**before.model_dump(), **given}
        merged[key] = given
    return merged
