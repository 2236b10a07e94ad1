"""Layouts of public data sets as they are unpacked: a file of this folder for each, which `ssl-pack NAME DIR OUT` reads.

A layout is a module with `items(folder, arguments) -> list[Item]`. Its docstring is the command's help text, the first
line the summary. Where it has options of its own it has `add_arguments(parser)` and `settings(arguments) -> dict`, the
part of them that decides what is packed. `COLUMNS` names the columns of its items that are stored although names are
hidden: nothing in them may say who somebody is. Items with `split` are packed into a folder for each split.

A layout that is not packed item by item has `run(arguments) -> exit code` in place of `items` and `settings`; its
`add_arguments` then adds all options, those of packing too.
"""

import argparse
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ssl_platform.config import plugin_names

if TYPE_CHECKING:  # torch takes seconds to load, --help should not
    from ssl_platform.data.items import Item
    from ssl_platform.data.slides.listing import SlideRow

Row = TypeVar("Row", "Item", "SlideRow")

MAX_NAMED = 5
"""So many of the things that are missing are named in an error."""


def names() -> list[str]:
    """The layouts, as the command line writes them."""
    return [name.replace("_", "-") for name in plugin_names(__name__)]


class LayoutCommand:
    """The command of ssl-pack that packs a data set of one layout."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout: Any = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        self.__doc__ = self.layout.__doc__

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        from ssl_platform.data.pack_options import add_pack_options

        parser.add_argument("folder", metavar="DIR", type=Path, help="where the data set was unpacked")
        parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards, empty or new")
        parser.add_argument(
            "--without-splits", action="store_true", help="one folder of shards, whatever splits the data set has"
        )
        if hasattr(self.layout, "run"):
            self.layout.add_arguments(parser)
            return
        if hasattr(self.layout, "add_arguments"):
            self.layout.add_arguments(parser.add_argument_group(f"{self.name}"))
        add_pack_options(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        """Exit code 0, or 1 if files were left out because they cannot be used."""
        from ssl_platform.data.pack import report
        from ssl_platform.data.pack_options import pack_as_asked

        if not arguments.folder.is_dir():
            raise ValueError(f"{arguments.folder}: no such folder; expected {self.name} as it is unpacked")
        if hasattr(self.layout, "run"):
            return int(self.layout.run(arguments))
        items = splits_as_asked(self.layout.items(arguments.folder, arguments), arguments, self.name)
        keep_columns(items, arguments, getattr(self.layout, "COLUMNS", ()))
        own = self.layout.settings(arguments) if hasattr(self.layout, "settings") else {}
        asked = {"layout": self.name} | {f"{self.name}.{key}": value for key, value in own.items()}
        return report(pack_as_asked(items, arguments.out, asked, arguments), arguments.allow_bad)


def add_num_points(parser: Any) -> None:
    """The option of layouts that hold meshes."""
    from ssl_platform.data.media.points import NUM_POINTS
    from ssl_platform.data.pack_options import count

    parser.add_argument(
        "--points",
        metavar="N",
        type=count,
        default=NUM_POINTS,
        help=f"drawn from the surface of a mesh; default {NUM_POINTS}",
    )


def splits_as_asked(rows: Sequence[Row], arguments: argparse.Namespace, layout: str) -> list[Row]:
    """The items or slides with the splits of their data set, or without if other splits or none are asked for."""
    if arguments.without_splits and arguments.split is not None:
        raise ValueError("--without-splits and --split: one or the other")
    if arguments.split is None and not arguments.without_splits and any(row.split for row in rows):
        arguments.split = ["column"]
    if arguments.split != ["column"]:
        return [row._replace(split=None) for row in rows]
    if not all(row.split for row in rows):
        raise ValueError(f"--split column: {layout} says no splits here; give shares, such as train=0.9 test=0.1")
    return list(rows)


def keep_columns(rows: "Sequence[Item | SlideRow]", arguments: argparse.Namespace, columns: Sequence[str]) -> None:
    """Adds those of a layout's columns that there are to the columns that are stored."""
    if not arguments.plain_names:
        there = {name for row in rows for name, _ in row.columns}
        arguments.keep_columns += [name for name in columns if name in there and name not in arguments.keep_columns]


def missing(folder: Path, wanted: Iterable[str], layout: str) -> ValueError:
    """The error that says which files or folders a layout needs and `folder` has not."""
    lacking = list(wanted)
    listed = ", ".join(lacking[:MAX_NAMED]) + f" and {len(lacking) - MAX_NAMED} more" * (len(lacking) > MAX_NAMED)
    found = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    there = ", ".join(found[:MAX_NAMED]) + ", ..." * (len(found) > MAX_NAMED)
    return ValueError(f"{folder}: not the layout of {layout}: missing {listed}; there is {there or 'nothing'}")
