"""Kinds of values that several commands take on the command line."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ssl_platform.data.pack_options import count
from ssl_platform.location import Url


def positive_share(text: str) -> float:
    """A number above 0, up to 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number above 0, up to 1")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}': expected a number")
    return value


def add_workers(parser: argparse.ArgumentParser) -> None:
    """`--workers`, the same for each command."""
    parser.add_argument("--workers", metavar="N", type=count, default=1, help="processes; default 1")


def on_this_machine(places: Sequence[Path | Url]) -> list[Path]:
    """Places as paths; raises ValueError if one is a URL."""
    if urls := [place for place in places if isinstance(place, Url)]:
        raise ValueError(
            f"{urls[0]}: this command copies from and to folders on this machine; download the whole folder, with its "
            "index.json and index.npy, and upload what comes out"
        )
    return [place for place in places if isinstance(place, Path)]


def printable(name: str) -> str:
    """A key or member name that can be written anywhere: bytes of a tar that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def counted(number: int, thing: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{number} {thing}{'s' * (number != 1)}"
