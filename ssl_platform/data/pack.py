"""ssl-pack: turns images, sound, videos or point clouds into WebDataset tar shards with an index, ready for ssl-train.

ssl-pack photos shards --labels folder
"""

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_platform.data import commands
from ssl_platform.data.pack_options import add_pack_options, count, pack_as_asked, share

if TYPE_CHECKING:
    from ssl_platform.data.items import Item
    from ssl_platform.data.packing import Packed

_MOST_LABELS = 50
"""So many are written out when a folder is described."""

DESCRIPTION = """\
Packs images, sound, videos, point clouds or meshes into WebDataset tar shards with an index of their labels, groups
and statistics, for ssl-train and ssl-eval. Any WebDataset tool can read the tars. INPUT is

  a folder                all files of one medium in it and below it;
  a .csv or .tsv file     a table with a header: path (relative to the table), and optionally label, group (patient,
                          slide, ...: what an evaluation must not split) and others, of which --keep-columns are kept;
                          of sound, start and stop in seconds where a row is a segment;
  an image, with --tile   a large image that is cut into tiles. With --tile and a table, each row is one tile, its upper
                          left pixel in the columns x and y.

The same input, options, seed and salt give the same bytes. A run that was cut off goes on when the same command is given
again; shards whose inputs are newer are made anew. Files that cannot be decoded are named, left out, and make the exit
status 1.

Shards name nobody: keys and groups are salted hashes, files lose their metadata (pixels stay as they are), DICOM keeps
numbers and codes alone. Only OUT.lookup, beside OUT, tells which key is which file: keep it where the files are. Labels and
kept columns are stored as they are. docs/data.md says more.
"""

EXAMPLES = """\
examples:
  ssl-pack photos shards --labels folder
      photos/cat/1.jpg, photos/dog/2.jpg, ...: the sub-folder is the label
  ssl-pack table.csv shards --samples-per-shard 5000 --workers 16
      the images that a table lists
  ssl-pack slide.tif shards --tile 224 --stride 224 --min-tissue 0.5 --labels-image classes.png
      the tiles of an image that are at least half tissue, labelled by a mask
  ssl-pack dicoms shards --split train=0.8 val=0.1 test=0.1
      shards/train, shards/val and shards/test, no patient in two of them
  ssl-pack photos shards --part $SLURM_ARRAY_TASK_ID/64
      in each job of `sbatch --array=0-63`; who finishes last writes the index
  ssl-pack --index tars
      only indexes tars that another tool made (ssl-train does it by itself where the folder is writable)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if inputs were left out, 2 for an error, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in commands.names():
        return commands.main(argv[0], argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    from ssl_platform.log import set_up_logging  # here and below: torch takes seconds to load, --help should not

    set_up_logging()
    try:
        if arguments.index is not None:
            return _index(arguments)
        return _pack(arguments)
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or arguments.out or arguments.index}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; make room and give the same command again: finished shards are kept"
    except KeyboardInterrupt:
        sys.stderr.write("ssl-pack: interrupted; the same command goes on from the finished shards\n")
        return 130
    sys.stderr.write(f"ssl-pack: {reason}\n")
    return 2


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        """With a line for each command and layout, whose files are read only now: runs that need no help do without."""
        self.epilog = EXAMPLES + "\n" + commands.summaries()
        return super().format_help()


def _add_media(parser: argparse.ArgumentParser) -> None:
    media = parser.add_argument_group("media")
    media.add_argument(
        "--medium", metavar="NAME", help="image, audio, video or points; default: what the extensions of the files say"
    )
    media.add_argument("--points", metavar="N", type=count, help="drawn from the surface of a mesh; default 8192")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ssl-pack",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", metavar="INPUT", type=Path, nargs="?", help="folder, table or image")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="folder for the shards, empty or new")
    parser.add_argument("--index", metavar="DIR", type=Path, help="index the tars in DIR, pack nothing")
    parser.add_argument(
        "--labels", choices=["none", "folder"], default="none", help="folder: the sub-folder is the label"
    )
    parser.add_argument(
        "--groups",
        choices=["none", "folder", "subfolder"],
        default="none",
        help="folder: the sub-folder is the group, as a patient's; subfolder: with the folder in it, as SPEAKER/SESSION",
    )
    parser.add_argument(
        "--min-tissue",
        metavar="SHARE",
        type=share,
        default=0.0,
        help="leave out images or tiles of which less has the colours of stained tissue, as modality.min_tissue",
    )
    _add_media(parser)
    add_pack_options(parser)
    tiles = parser.add_argument_group("tiles of a large image")
    tiles.add_argument("--tile", metavar="PIXELS", type=count, help="width and height of a tile")
    tiles.add_argument("--stride", metavar="PIXELS", type=count, help="from tile to tile; default: the tile's width")
    tiles.add_argument("--region", metavar="X0,Y0,X1,Y1", type=_region, help="only tiles wholly inside, in pixels")
    tiles.add_argument("--labels-image", metavar="FILE", type=Path, help="image of class numbers; 255 = no class")
    tiles.add_argument(
        "--label-names", metavar="A,B,...", type=lambda text: text.split(","), help="names of the classes 0, 1, ..."
    )
    tiles.add_argument(
        "--label-purity", metavar="SHARE", type=share, default=0.9, help="of a tile's pixels in one class; default 0.9"
    )
    tiles.add_argument(
        "--group-block", metavar="PIXELS", type=count, help="tiles in the same block form a group; default: 4 tiles"
    )
    return parser


def _pack(arguments: argparse.Namespace) -> int:
    from ssl_platform.data.media import points

    source, tile = arguments.input, arguments.tile
    if source is None or arguments.out is None:
        raise ValueError("INPUT and OUT are needed; see ssl-pack --help")
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    items, asked = _listed(arguments)
    _refuse_of_media(arguments, items[0].medium)
    if arguments.points is not None:
        items, asked = points.with_num_points(items, arguments.points), asked | {"points": arguments.points}
    packed = pack_as_asked(items, arguments.out, asked, arguments, tile=tile or 0, min_tissue=arguments.min_tissue)
    return report(packed, arguments.allow_bad)


def _listed(arguments: argparse.Namespace) -> "tuple[list[Item], dict[str, Any]]":
    """What is to be packed, and the options that decide it."""
    from ssl_platform.data.grids import Grid, grid_items
    from ssl_platform.data.sources import folder_items, is_manifest, manifest_items

    source, tile = arguments.input, arguments.tile
    is_image = source.is_file() and not is_manifest(source)
    _refuse_unused(arguments, is_image)
    if source.is_dir():
        asked = {"tile": tile, "labels": arguments.labels, "groups": arguments.groups}
        depth = ("none", "folder", "subfolder").index(arguments.groups)
        return folder_items(source, arguments.labels == "folder", depth, arguments.medium), asked
    if not is_image:
        by_column = arguments.split == ["column"]
        return manifest_items(source, tile is not None, by_column, medium=arguments.medium), {"tile": tile}
    grid = Grid(tile, arguments.stride or tile, arguments.group_block or 4 * tile, arguments.region)
    purity, names = arguments.label_purity, arguments.label_names
    items = grid_items(source, grid, labels_image=arguments.labels_image, purity=purity, label_names=names or [])
    return items, {"tile": tile, **grid._asdict(), "label_purity": purity, "label_names": names}


def _refuse_of_media(arguments: argparse.Namespace, medium: str) -> None:
    """Options that are for another medium than the input's."""
    from ssl_platform.data.media import plural

    for option, is_given, of in (
        ("tile", arguments.tile is not None, "image"),
        ("min-tissue", bool(arguments.min_tissue), "image"),
        ("points", arguments.points is not None, "points"),
    ):
        if is_given and medium != of:
            raise ValueError(f"--{option}: is for {plural(of)}, and {arguments.input} holds {plural(medium)}")


def _refuse_unused(arguments: argparse.Namespace, is_image: bool) -> None:
    """An option that would do nothing is a mistake of whoever gave it."""
    from ssl_platform.data.media import file_media

    if is_image and arguments.tile is None:
        raise ValueError(
            f"{arguments.input}: one file: give a folder or table to pack, or --tile to cut a large image into tiles"
        )
    if arguments.input.is_dir() and arguments.tile is not None:
        raise ValueError("--tile: needs an image, or a table with the columns path, x and y, not a folder")
    for option in ("labels", "groups"):
        if not arguments.input.is_dir() and getattr(arguments, option) != "none":
            raise ValueError(f"--{option} folder: only with a folder; a table has a column {option[:-1]}")
    if is_image and arguments.medium is not None:
        raise ValueError("--medium: only with a folder or table; a single file is an image that is cut into tiles")
    if arguments.medium is not None and arguments.medium not in file_media():
        raise ValueError(f"--medium {arguments.medium}: unknown; there are {', '.join(sorted(file_media()))}")
    if arguments.split == ["column"] and (arguments.input.is_dir() or is_image):
        raise ValueError("--split column: only with a table, which has a column split")
    for option in ("stride", "region", "labels_image", "label_names", "group_block"):
        if not is_image and getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: only where INPUT is an image that is cut into tiles")
    if arguments.label_names and arguments.labels_image is None:
        raise ValueError("--label-names: needs --labels-image")


def _index(arguments: argparse.Namespace) -> int:
    from ssl_platform.data.index_files import index_folder

    folder: Path = arguments.index
    if arguments.input is not None:
        raise ValueError("--index: takes no INPUT and OUT")
    names = sorted(tar.name for tar in folder.glob("*.tar"))
    if not names:
        raise ValueError(f"{folder}: no tar in this folder")
    about, _ = index_folder(folder, names)
    _describe(folder, about)
    return 0


def report(packed: "Sequence[Packed]", allow_bad: bool) -> int:
    """Says what is there now; returns the exit status."""
    for folder, about, missing, _ in packed:
        if about is None:
            sys.stdout.write(f"{folder}: this part is done; still missing: {missing}\n")
        else:
            _describe(folder, about)
    return 1 if any(one.num_left_out for one in packed) and not allow_bad else 0


def _describe(folder: Path, about: dict[str, Any]) -> None:
    """What is in the folder now, in a few lines."""
    size = sum(shard["bytes"] for shard in about["shards"])
    num_shards = len(about["shards"])
    lines = [f"{folder}: {about['samples']} samples in {num_shards} shard{'s' * (num_shards > 1)}, {size / 1e6:.1f} MB"]
    if len(about["label_counts"]) > _MOST_LABELS:
        counts = about["label_counts"].values()
        lines.append(f"labels: {len(counts)}, of {min(counts)} to {max(counts)} samples")
    elif about["label_counts"]:
        lines.append("labels: " + ", ".join(f"{label}: {count}" for label, count in about["label_counts"].items()))
    if about["label_counts"] and about["unlabelled"]:
        lines[-1] += f"; {about['unlabelled']} without"
    if about["statistics"]:
        from ssl_platform.data.channel_statistics import channel_line  # which loads NumPy

        lines.append(channel_line(about["statistics"]))
    if about.get("without_tissue"):
        lines.append(f"left out: {about['without_tissue']} with too little tissue")
    if about.get("unreadable"):
        lines.append(f"left out: {about['unreadable']} that cannot be used (their keys: left_out.tsv)")
    sys.stdout.write("\n  ".join(lines) + "\n")


def _region(text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}': expected X0,Y0,X1,Y1 in pixels, such as 0,0,640,960")
    x0, y0, x1, y1 = (int(part) for part in parts)
    return x0, y0, x1, y1


if __name__ == "__main__":
    raise SystemExit(main())
