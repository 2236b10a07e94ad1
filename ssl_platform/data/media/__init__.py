"""What ssl-pack can put into shards: a file of this folder for each medium.

`Item.medium` names the file. Whatever depends on the kind of data is in it: which bytes are stored, what shows that they
can be decoded, and the values of which the index keeps mean, std and percentiles. Every medium has `load(item, options)`.

Those that a folder or a table can hold as files say more:

- `PLURAL`: how a message calls them, such as "point clouds";
- `EXTENSIONS`: of the files, without the dot. If two media have the same one, the one with `recognises(data)` is asked
  first, and the other one has the rest;
- `ONLY_IF_ASKED`: further extensions, which other things have too: read where a user names the medium or the file;
- `KEPT`: extensions of files that are stored as they are, give or take metadata; of the others some are encoded to
  estimate the room that all will take;
- `STORED`: extensions of stored members, if they are others than `EXTENSIONS`;
- `look(data, extension)`: what a stored member shows to whoever inspects shards.

As needed: `check_packages()`, which raises ValueError if the medium cannot be packed here at all, and `STATISTICS_OF`,
what the values are if they are not pixels.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from numpy.typing import NDArray
from torch import Tensor

from ssl_platform.config import plugin_names
from ssl_platform.data.items import Item


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
    notes: tuple[str, ...] = ()
    """In a word each, what is odd about it and no reason to leave it out; these are counted, and the counts told."""


class Look(NamedTuple):
    """What a stored member shows of itself."""

    pixels: Tensor
    """(C, H, W) uint8 or uint16: an image, or a picture of what is none, such as a spectrogram."""
    sizes: Mapping[str, float]
    """Histograms are drawn of these: width, height, seconds, ..."""
    values: Callable[[], NDArray[Any] | None]
    """Those that statistics are of, as `Content.values`."""
    likeness: Tensor | None = None
    """(C, H, W): what near-duplicates are found by, where `pixels` would show too little of what tells samples apart."""


def load(item: Item, options: Options) -> Content:
    """Reads and checks an item; raises ValueError or OSError with the reason if it is bad, and it is left out."""
    if item.problem:
        raise ValueError(item.problem)
    content: Content = _module(item.medium).load(item, options)
    return content


def check_packages(media: Iterable[str]) -> None:
    """Raises ValueError if a medium cannot be packed here at all: before every file is left out for it."""
    for name in sorted({*media}):
        getattr(_module(name), "check_packages", lambda: None)()


def statistics_of(media: Iterable[str]) -> dict[str, Any] | None:
    """What the values of these media are: `STATISTICS_OF` of their modules, {} for pixels; None if they differ."""
    kinds = [getattr(_module(name), "STATISTICS_OF", {}) for name in sorted({*media})]
    return kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else None


@cache
def file_media() -> tuple[str, ...]:
    """The media that a folder or table can hold as files; those that recognise what is theirs come first."""
    names = [name for name in plugin_names(__name__) if hasattr(_module(name), "EXTENSIONS")]
    return tuple(sorted(names, key=lambda name: not hasattr(_module(name), "recognises")))


def extensions_of(name: str, asked: bool) -> tuple[str, ...]:
    """The extensions of a medium's files; with `asked`, those too that other things have as well."""
    module = _module(name)
    return (*module.EXTENSIONS, *(getattr(module, "ONLY_IF_ASKED", ()) if asked else ()))


def plural(name: str) -> str:
    return str(_module(name).PLURAL)


def is_kept(name: str, extension: str) -> bool:
    """Whether a file of this medium is stored as it is, give or take metadata."""
    return extension in getattr(_module(name), "KEPT", ())


def medium_of(extension: str, read: Callable[[], bytes], *, asked: bool = False, stored: bool = False) -> str | None:
    """The medium of a file, or with `stored` of a member of a shard; `read` gives its bytes if several have its extension.

    None if no medium has the extension.
    """

    def has(name: str) -> bool:
        return extension in (
            getattr(_module(name), "STORED", _module(name).EXTENSIONS) if stored else extensions_of(name, asked)
        )

    found = [name for name in file_media() if has(name)]
    if len(found) > 1:
        data = read()
        found = [name for name in found if not hasattr(_module(name), "recognises") or _module(name).recognises(data)]
    return found[0] if found else None


def look(name: str, data: bytes, extension: str) -> Look:
    """What a stored member of this medium shows; raises ValueError with the reason if it is damaged."""
    found: Look = _module(name).look(data, extension)
    return found


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")
