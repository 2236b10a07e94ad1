"""What ssl-pack can put into shards: a file of this folder for each medium, with a function `load`.

`Item.medium` names the file. Whatever depends on the kind of data is in it: which bytes are stored, what shows that they
can be decoded, and the values of which the index keeps mean, std and percentiles.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from ssl_platform.data.sources import Item


class Options(NamedTuple):
    """What of the command line matters to the contents of a sample."""

    tile: int = 0
    """Width and height of a tile in pixels, for items with a corner."""
    keep_metadata: bool = False
    """True: files are public and stored as they are. False: stored is nothing that could name anybody."""


class Content(NamedTuple):
    """The contents of one sample."""

    data: bytes
    extension: str
    """Of the tar member; what the modality's `decode` looks for."""
    values: NDArray[Any] | None = None
    """(C, ...) of which mean, std and percentiles are taken for each channel: integers count as shares of their largest
    value, floats, which must be finite, as they are. None: no statistics."""
    about: dict[str, Any] = {}
    """What the sample's `json` says besides label, group and columns."""


class Medium(Protocol):
    """A module of this folder."""

    def load(self, item: Item, options: Options) -> Content:
        """Reads and checks an item; raises ValueError or OSError with the reason if it is bad, and it is left out."""


def check_packages(media: Iterable[str]) -> None:
    """Raises ValueError if a medium cannot be packed here at all: before every file is left out for it."""
    for module in [medium(name) for name in sorted({*media})]:
        getattr(module, "check_packages", lambda: None)()


def statistics_of(media: Iterable[str]) -> dict[str, Any] | None:
    """What the values of these media are: `STATISTICS_OF` of their modules, {} for pixels; None if they differ."""
    kinds = [getattr(medium(name), "STATISTICS_OF", {}) for name in sorted({*media})]
    return kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else None


def medium(name: str) -> Medium:
    module: Any = import_module(f"{__name__}.{name}")
    found: Medium = module
    return found
