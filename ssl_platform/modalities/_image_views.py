"""Which views a sample of images has: groups of crops, groups that show the same as another, sizes mixed over the steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from ssl_platform.config import Config as Section
from ssl_platform.modalities._image_augmentations import Cut, Step
from ssl_platform.modalities._images import Size
from ssl_platform.modalities._options import Interval, SizeOption, check_interval, pair, raise_if_any

# -- configuration -----------------------------------------------------------------------------------------------------


class CropsConfig(Section):
    """One group of crops."""

    num: int = Field(ge=0)
    """Views of this group; 0 leaves it out."""
    size: SizeOption
    """One number, or [height, width]; a multiple of the patch size."""
    scale: Interval
    """Share of the image's area that a crop shows: uniform in [min, max]."""
    aspect: Interval = (3 / 4, 4 / 3)
    """Width / height of the part shown: log-uniform in [min, max]."""

    @model_validator(mode="after")
    def _check(self) -> "CropsConfig":
        raise_if_any(check_interval("scale", self.scale, 1) + check_interval("aspect", self.aspect))
        return self


class CopyConfig(Section):
    """A group of views that shows what another one shows."""

    of: str = "global"
    """That group of crops."""
    size: SizeOption
    """Of these views; height / width as in the other group."""


class ResolutionConfig(Section):
    """Sizes that views have together in some of the steps."""

    sizes: dict[str, SizeOption]
    """{group: size}; groups that are left out keep their own."""
    probability: float = Field(gt=0, le=1)


def copies_problems(crops: Mapping[str, CropsConfig], copies: Mapping[str, CopyConfig]) -> list[str]:
    """What is wrong with groups that show what others show, one line each."""
    lines, shown = [], {name: pair(group.size) for name, group in crops.items() if group.num}
    for name, copied in copies.items():
        size = pair(copied.size)
        if name in crops:
            lines.append(f"copies.{name}: there is a group of crops of this name; choose another")
        if copied.of not in shown:
            lines.append(f"copies.{name}.of: no group of crops '{copied.of}'; there are {', '.join(shown)}")
        elif size[0] * shown[copied.of][1] != size[1] * shown[copied.of][0]:
            height, width = shown[copied.of]
            lines.append(
                f"copies.{name}.size: {size[0]} x {size[1]} has another height / width than the views of "
                f"'{copied.of}', {height} x {width}, which it shows"
            )
    return lines


def resolutions_problems(
    resolutions: Sequence[ResolutionConfig],
    groups: Sequence[str],
    problems: Callable[[Mapping[str, SizeOption]], list[str]],
) -> list[str]:
    """What is wrong with mixed resolutions, one line each; `problems` says what is with other sizes."""
    lines: list[str] = []
    total = sum(resolution.probability for resolution in resolutions)
    if resolutions and abs(total - 1) > 1e-6:
        lines.append(f"resolutions: the probabilities add up to {total:g}, not to 1")
    for number, resolution in enumerate(resolutions):
        unknown = [name for name in resolution.sizes if name not in groups]
        lines += [f"resolutions.{number}.sizes: no group '{name}'; there are {', '.join(groups)}" for name in unknown]
        lines += [f"resolutions.{number}: {line}" for line in ([] if unknown else problems(resolution.sizes))]
    return lines


# -- how they are made -------------------------------------------------------------------------------------------------


class GroupRecipe(NamedTuple):
    """How the views of one group are made."""

    size: Size
    cut: Callable[[Tensor, np.random.Generator], Cut]
    """Draws what a view shows."""
    colors: tuple[tuple[Step, ...], ...]
    """What happens to the pixels of each view, as float32."""


class CopyRecipe(NamedTuple):
    """A group that shows what the views of `of` show."""

    of: str
    size: Size


class Views(NamedTuple):
    """How the views of a sample are made."""

    recipes: dict[str, GroupRecipe]
    copies: dict[str, CopyRecipe]
