"""Cuts whole slides into tiles at a given resolution and packs those with tissue; INPUT is a folder, table or slide.

Reads what openslide reads: SVS, NDPI, MRXS, TIFF, SCN, BIF, DICOM-WSI. INPUT is a folder of slides, one slide, or a CSV
or TSV with a header: path, and optionally mpp (where a slide does not say its own, or says it wrong), label, group or
patient, include, exclude and labels (GeoJSON files of that slide), and any other columns.

A tile is kept if enough of it is tissue, and little of it ink; what is dropped is counted by reason. Tissue is told from
glass at about 8 microns per pixel, by Otsu's threshold on the saturation. All lengths of tiles are in pixels of --mpp.

The same slides, options and seed give the same tiles. A run that was cut off goes on when the same command is given
again: slides that were looked at are remembered, and finished shards kept. Slides and tiles that cannot be read are
named, left out, and make the exit status 1; a slide without tissue is named and left out, too.

The label and overview images that a slide's file may hold are never read. In shards and OUT/slides.json a slide is a
hash; the folder OUT.lookup beside OUT, which nobody else needs, has the salt.

examples:
  ssl-pack slides raw shards --mpp 0.5 --tile 256 --workers 16
  ssl-pack slides slides.csv shards --patients patients.csv --max-tiles-per-slide 500 --preview looks
      one patient's slides are one group, which an evaluation must not split; a picture of each slide's tiles in looks/
  ssl-pack slides raw shards --exclude-geojson artefacts --labels-geojson annotations
      annotations/NAME.geojson, exported from QuPath, label the tiles of NAME.svs by the classes of the regions
  ssl-pack slides raw index --index-only
      only notes where the tiles lie: with data.shards=index, training reads them from the slides
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_platform.data.slides.listing import SlideRow
    from ssl_platform.data.slides.tiling import SlidePlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("input", metavar="INPUT", type=Path, help="folder of slides, table, or one slide")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards, empty or new")
    parser.add_argument("--patients", metavar="CSV", type=Path, help="columns slide and patient: patients are groups")
    add_slide_options(parser)


def add_slide_options(parser: argparse.ArgumentParser) -> None:
    """The options that `pack_slides` reads, besides `out`."""
    from ssl_platform.data.pack_options import add_pack_options, count

    parser.add_argument("--preview", metavar="DIR", type=Path, help="a picture of each slide with its tiles drawn in")
    parser.add_argument(
        "--index-only", action="store_true", help="leave the pixels in the slides, for training to read"
    )
    parser.add_argument(
        "--unread", action="store_true", help="with --index-only: do not read the tiles; no statistics, no tile checks"
    )
    add_pack_options(parser)
    _add_tiles(parser.add_argument_group("tiles"))
    _add_checks(parser.add_argument_group("which tiles are kept"))
    _add_regions(
        parser.add_argument_group("regions (GeoJSON as QuPath exports it; a file, or a folder of NAME.geojson)")
    )
    stain = parser.add_argument_group("stain")
    stain.add_argument(
        "--normalize-stain",
        choices=["none", "macenko", "reinhard"],
        default="none",
        help="move each slide's colours to those of a reference; default none",
    )
    stain.add_argument(
        "--stain-tiles", metavar="N", type=count, default=16, help="of a slide, that are measured for it; default 16"
    )


def _add_tiles(group: Any) -> None:
    from ssl_platform.data.pack_options import count

    group.add_argument("--mpp", metavar="MICRONS", type=_positive, default=0.5, help="per pixel; default 0.5 (20x)")
    group.add_argument("--tile", metavar="PIXELS", type=count, default=224, help="width and height; default 224")
    group.add_argument("--stride", metavar="PIXELS", type=count, help="from tile to tile; default: the tile's width")
    group.add_argument("--max-tiles-per-slide", metavar="N", type=count, help="chosen at random, by the seed")
    group.add_argument("--override-mpp", metavar="MICRONS", type=_positive, help="of level 0, whatever slides say")
    group.add_argument(
        "--mpp-from-objective", action="store_true", help="where only the objective is known: 10 microns / its power"
    )
    group.add_argument(
        "--max-upsampling",
        metavar="FACTOR",
        type=_positive,
        default=1.1,
        help="refuse slides whose pixels would be enlarged by more; default 1.1",
    )


def _add_checks(group: Any) -> None:
    from ssl_platform.data.pack_options import share

    group.add_argument("--min-tissue", metavar="SHARE", type=share, default=0.5, help="of the tile; default 0.5")
    group.add_argument("--mask-mpp", metavar="MICRONS", type=_positive, default=8.0, help="of the mask; default 8")
    group.add_argument(
        "--saturation",
        metavar="LOW,HIGH",
        type=_range,
        default=(10.0, 40.0),
        help="Otsu's threshold is held inside; of 255, default 10,40",
    )
    group.add_argument(
        "--closing", metavar="MICRONS", type=_length, default=40.0, help="radius that fills gaps; default 40"
    )
    group.add_argument("--max-ink", metavar="SHARE", type=share, default=0.05, help="pen marks; default 0.05")
    group.add_argument(
        "--ink-saturation", metavar="SHARE", type=share, default=0.4, help="of blue and green ink; default 0.4"
    )
    group.add_argument(
        "--ink-black", metavar="SHARE", type=share, default=0.25, help="black ink is darker; default 0.25"
    )
    group.add_argument(
        "--min-stained",
        metavar="SHARE",
        type=share,
        default=0.0,
        help="of the tile's pixels with hue, saturation and value of stain, as modality.min_tissue; default 0",
    )
    group.add_argument(
        "--min-sharpness",
        metavar="VARIANCE",
        type=_length,
        default=0.0,
        help="of the Laplacian of the grey values 0 ... 255; default 0, see docs/modalities/pathology.md",
    )


def _add_regions(group: Any) -> None:
    from ssl_platform.data.pack_options import share

    group.add_argument("--include-geojson", metavar="PATH", type=Path, help="only tiles in these regions")
    group.add_argument("--exclude-geojson", metavar="PATH", type=Path, help="no tiles in these regions")
    group.add_argument("--labels-geojson", metavar="PATH", type=Path, help="a region's class is the label of its tiles")
    group.add_argument("--include-share", metavar="SHARE", type=share, default=0.5, help="at least; default 0.5")
    group.add_argument("--exclude-share", metavar="SHARE", type=share, default=0.1, help="at most; default 0.1")
    group.add_argument("--label-share", metavar="SHARE", type=share, default=0.5, help="at least; default 0.5")
    group.add_argument(
        "--uncropped-geojson", action="store_true", help="regions were drawn with the slide's empty margins (--no-crop)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0, or 1 if slides or tiles were left out because they cannot be read."""
    from ssl_platform.data.slides.listing import list_slides, with_patients

    rows = list_slides(arguments.input, splits=arguments.split == ["column"])
    if arguments.patients is not None:
        rows = with_patients(rows, arguments.patients)
    return pack_slides(rows, arguments)


def pack_slides(rows: "Sequence[SlideRow]", arguments: argparse.Namespace, settings: Mapping[str, Any] = {}) -> int:
    """Cuts and packs slides that are listed; `settings` are the caller's own that decide what is packed.

    The exit code is `run`'s.
    """
    from ssl_platform.data.identity import lookup_folder, own_salt
    from ssl_platform.data.pack import report
    from ssl_platform.data.pack_options import names_as_asked, pack_as_asked
    from ssl_platform.data.slides import planning, tiles, tiling
    from ssl_platform.data.slides.listing import keyed, with_regions
    from ssl_platform.data.tars import write_json

    later = _tile_checks(arguments)
    if arguments.shard_megabytes is not None:
        raise ValueError("--shard-megabytes: the sizes of tiles are not known before; use --samples-per-shard")
    rows = with_regions(
        rows,
        {
            "include": arguments.include_geojson,
            "exclude": arguments.exclude_geojson,
            "labels": arguments.labels_geojson,
        },
    )
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"{arguments.out}: is a file; expected a folder for the shards")
    rows = keyed(rows, names_as_asked(arguments.out, arguments) or own_salt(arguments.out))
    options = _options(arguments)
    plans = planning.plan_slides(
        rows,
        options,
        arguments.out,
        workers=arguments.workers,
        previews=arguments.preview,
        part=arguments.part or (0, 1),
    )
    failed = [plan for plan in plans if plan.failed]
    items = planning.items(rows, plans, options, later)
    if not items:
        reasons = [plan.failed or plan.left_out for plan in plans]
        raise ValueError(f"nothing to pack: none of the {len(rows)} slides has a tile; the first: {reasons[0]}")
    asked = {f"slides.{name}": value for name, value in (options._asdict() | later._asdict()).items()}
    packed = pack_as_asked(items, arguments.out, {**settings, **asked}, arguments, tile=arguments.tile)
    for folder in (folder for folder, *_ in packed if (folder / "pack.json").exists()):  # else no part has begun it
        write_json(folder / tiles.REPORT, planning.report(plans, options, later))
    if arguments.index_only:
        paths = {row.key: str(row.path.absolute()) for row in rows}
        write_json(lookup_folder(arguments.out) / tiles.PATHS, paths)
    status = report(packed, arguments.allow_bad)
    dropped = sum((Counter(about["dropped"]) for _, about, *_ in packed if about is not None), Counter[str]())
    _report_slides(plans, tiling.total_dropped(plans), dropped)
    return 1 if failed and not arguments.allow_bad else status


def _options(arguments: argparse.Namespace) -> Any:
    from ssl_platform.data.slides.tiling import Options

    renamed = {
        "stride": arguments.stride or arguments.tile,
        "max_tiles": arguments.max_tiles_per_slide,
        "stain": arguments.normalize_stain,
    }
    given: dict[str, Any] = {name: renamed.get(name, getattr(arguments, name, None)) for name in Options._fields}
    return Options(**given)


def _tile_checks(arguments: argparse.Namespace) -> Any:
    from ssl_platform.data.slides.planning import TileChecks

    if arguments.unread and not arguments.index_only:
        raise ValueError("--unread: only with --index-only; shards with pixels cannot be made without reading them")
    if arguments.unread and (arguments.min_stained or arguments.min_sharpness):
        raise ValueError("--unread: --min-stained and --min-sharpness look at the pixels; leave out one or the other")
    return TileChecks(**{name: getattr(arguments, name) for name in TileChecks._fields})


def _report_slides(plans: "list[SlidePlan]", planned: dict[str, int], later: dict[str, int]) -> None:
    """Two or three lines: how many slides gave tiles, and why places and slides gave none."""
    used, empty, failed = (
        sum(bool(getattr(plan, what)) for plan in plans) for what in ("corners", "left_out", "failed")
    )
    lines = [f"  {used} of {len(plans)} slides have tiles"]
    lines[0] += f", {empty} have none" * bool(empty) + f", {failed} cannot be used (named above)" * bool(failed)
    places = sum(plan.places for plan in plans)
    dropped = [f"{count} {check}" for check, count in [*planned.items(), *later.items()] if count]
    lines.append(f"  {places} places for tiles" + "; dropped: " * bool(dropped) + ", ".join(dropped))
    sys.stdout.write("\n".join(lines) + "\n")


def _positive(text: str) -> float:
    if (value := _number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number above 0")
    return value


def _length(text: str) -> float:
    if (value := _number(text)) < 0:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number of at least 0")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if value < float("inf") else -1.0


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    values = _number(low), _number(high)
    if not 0 <= values[0] <= values[1] <= 255:
        raise argparse.ArgumentTypeError(f"'{text}': expected LOW,HIGH from 0 to 255, such as 10,40")
    return values
