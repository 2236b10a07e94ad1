"""The options that every way of packing has: sizes and number of shards, splits, parts, and what names become."""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to load, --help should not
    from ssl_platform.data.identity import Names
    from ssl_platform.data.items import Item
    from ssl_platform.data.packing import Packed

logger = logging.getLogger(__name__)


def add_pack_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `pack_as_asked` reads."""
    shards = parser.add_argument_group("shards")
    size = shards.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", metavar="N", type=count, default=1000, help="at most; default 1000")
    size.add_argument(
        "--shard-megabytes",
        metavar="MB",
        type=_megabytes,
        help="instead: shards of about this size, whatever is in them",
    )
    shards.add_argument("--seed", metavar="N", type=int, default=0, help="of the shuffle before sharding; default 0")
    shards.add_argument(
        "--split",
        metavar="NAME=SHARE",
        nargs="+",
        help="such as train=0.8 val=0.1 test=0.1: shards in OUT/train, ...; no group is divided. "
        "`--split column`: as the table's column split says",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--workers", metavar="N", type=count, default=1, help="shards made at the same time; default 1")
    work.add_argument(
        "--part",
        metavar="I/N",
        type=_part,
        help="make the I-th of N shares of the shards, I from 0: in a SLURM array of 0-63, $SLURM_ARRAY_TASK_ID/64",
    )
    work.add_argument("--overwrite", action="store_true", help="delete what an earlier ssl-pack wrote into OUT")
    work.add_argument("--ignore-room", action="store_true", help="begin although the disk seems too small")
    work.add_argument("--allow-bad", action="store_true", help="exit status 0 although inputs were left out")
    names = parser.add_argument_group(
        "identity (keys and groups are salted hashes; OUT.lookup has the salt and a table)"
    )
    names.add_argument(
        "--keep-columns",
        metavar="A,B,...",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=[],
        help="columns of the table that go into the shards as they are, besides the label",
    )
    names.add_argument("--salt-file", metavar="FILE", type=Path, help="a salt that several data sets share")
    names.add_argument(
        "--plain-names",
        action="store_true",
        help="for public data: readable keys and groups, paths, all columns, and files with their metadata",
    )


def pack_as_asked(
    items: "Sequence[Item]",
    out: Path,
    settings: Mapping[str, Any],
    arguments: argparse.Namespace,
    tile: int = 0,
    min_tissue: float = 0.0,
) -> "list[Packed]":
    """Packs items with the options of the command line; `settings` are the command's own that decide what is packed."""
    from ssl_platform.data.pack_state import Part
    from ssl_platform.data.packing import pack
    from ssl_platform.data.splits import parse_splits

    if arguments.shard_megabytes is not None and not all(item.is_whole for item in items):
        raise ValueError(
            "--shard-megabytes: the sizes of tiles and other parts of files are not known before; use --samples-per-shard"
        )
    return pack(
        items,
        out,
        settings,
        samples_per_shard=arguments.samples_per_shard,
        shard_megabytes=arguments.shard_megabytes,
        seed=arguments.seed,
        tile=tile,
        min_tissue=min_tissue,
        splits=None if arguments.split is None else parse_splits(arguments.split),
        names=names_as_asked(out, arguments),
        keep_columns=arguments.keep_columns,
        part=Part(*arguments.part) if arguments.part else Part(),
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        ignore_room=arguments.ignore_room,
    )


def names_as_asked(out: Path, arguments: argparse.Namespace) -> "Names | None":
    """None: with a salt of the folder's own."""
    from ssl_platform.data.identity import PLAIN, is_open_to_others, salted

    salt_file: Path | None = arguments.salt_file
    if arguments.plain_names:
        if salt_file is not None or arguments.keep_columns:
            raise ValueError("--plain-names: nothing is hidden, so --salt-file and --keep-columns say nothing")
        return PLAIN
    if salt_file is None:
        return None
    if salt_file.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--salt-file {salt_file}: is in {out}, and would travel with the shards; keep it elsewhere")
    names = salted(salt_file)
    if is_open_to_others(salt_file):
        logger.warning("%s: others can read this salt; chmod 600 keeps it secret", salt_file)
    return names


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number from 0 to 1")
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 1")
    return int(text)


def _megabytes(text: str) -> float:
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}': expected a number of megabytes above 0")
    return megabytes


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,5})", text)
    if found is None or int(found[2]) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N, such as 3/64")
    number, of = int(found[1]), int(found[2])
    if number >= of:
        raise argparse.ArgumentTypeError(f"'{text}': parts count from 0: of {of} the last is {of - 1}/{of}")
    return number, of
