"""One sample to be packed, as sources and layouts list it and media read it."""

from pathlib import Path
from typing import NamedTuple

from ssl_platform.data.slides.reading import SlideTiles


class Item(NamedTuple):
    """One sample to be packed."""

    path: Path
    name: str
    """The path as the user wrote it, or relative to the folder: what the sample remembers of its origin."""
    label: int | str | None = None
    group: int | str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    """Further (name, text) pairs of a manifest."""
    corner: tuple[int, int] | None = None
    """x, y of the upper left pixel of a tile; None = the whole file, as it is."""
    split: str | None = None
    """The split that the user put it into."""
    medium: str = "image"
    """The file of `ssl_platform.data.media` that reads it."""
    slide: SlideTiles | None = None
    """How a tile is read where `path` is a whole slide; `corner` is then in pixels of its level 0."""
    part: tuple[int | float | str, ...] = ()
    """What of the file is meant, in words of the medium: a row of an array, a time; `name` must tell parts apart. Of sound:
    start and stop in seconds, and of an archive the byte at which its file begins. That of `unusable` is the reason."""
    hidden: tuple[str, ...] = ()
    """What names somebody besides the group, and is stored as a salted hash too: "label", columns by their names."""

    @property
    def extension(self) -> str:
        """Of the file's name, in lower case and without the dot; "" if it has none."""
        return self.path.suffix[1:].lower()

    @property
    def is_whole(self) -> bool:
        """Whether the size of the file says how large the sample is."""
        return self.corner is None and not self.part

    @property
    def problem(self) -> str:
        """Why it cannot be packed, if whoever listed it found that; "" else."""
        return str(self.part[1]) if self.part[:1] == (_UNUSABLE,) else ""


_UNUSABLE = "unusable"


def unusable(item: Item, reason: str) -> Item:
    """The item as one that is left out for this reason, named and counted as files are that cannot be decoded."""
    return item._replace(part=(_UNUSABLE, reason))
