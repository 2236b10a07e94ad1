"""What is in shards: counts, duplicates, sizes, bad samples and pictures, as one HTML page.

Counts of samples come from the index. For the rest every sample is read and decoded, or with --sample a seeded choice.
The page needs no network and holds no paths, columns or names from the samples but their keys and labels.

  duplicates        samples whose data is the same, byte for byte
  near-duplicates   samples that look the same: cosine of at least --near between 16 x 16 grey thumbnails, which brightness,
                    contrast, size and compression hardly change, or between the rows of --features, such as an encoder's
                    (`ssl-eval extract` writes them). Of each group one is counted as kept: what `ssl-pack prune
                    --near-duplicates` keeps

what comes out: DIR/inspect.html, DIR/inspect.json with the same numbers, and the main ones on the screen.

examples:
  ssl-pack inspect shards
  ssl-pack inspect shards/train shards/test --sample 20000 --workers 16 --out reports
"""

import argparse
import sys
from pathlib import Path

from ssl_platform.data.commands._options import add_workers, counted, positive_share
from ssl_platform.data.pack_options import count
from ssl_platform.data.remote import RemoteSettings, add_cache_arguments
from ssl_platform.location import location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "shards", metavar="SHARDS", type=location, nargs="+", help="folders, tars, quoted patterns, or URLs of these"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="folder for the report; default: here")
    parser.add_argument("--sample", metavar="N", type=count, help="read only so many samples, drawn by --seed")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of that choice and of the pictures; default 0"
    )
    parser.add_argument(
        "--near", metavar="COSINE", type=positive_share, default=0.95, help="of near-duplicates; default %(default)s"
    )
    parser.add_argument(
        "--features", metavar="FILE.npy", type=Path, help="rows (N, D) to compare instead of thumbnails"
    )
    parser.add_argument(
        "--pictures", metavar="N", type=count, default=8, help="of each label, for at most 30 labels; default 8"
    )
    add_workers(parser)
    add_cache_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0; 1 if samples are bad."""
    from ssl_platform.data.commands._page import page
    from ssl_platform.data.commands._survey import survey
    from ssl_platform.data.tars import atomic_file, write_json

    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; expected a folder")
    report, pictures = survey(
        arguments.shards,
        sample=arguments.sample,
        seed=arguments.seed,
        threshold=arguments.near,
        features=arguments.features,
        pictures_a_label=arguments.pictures,
        workers=arguments.workers,
        remote=RemoteSettings.of_arguments(arguments),
    )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "inspect.html") as file:
        file.write(page(report, pictures).encode())
    write_json(out / "inspect.json", report)
    bad = report["bad"]["samples"]
    lines = [
        f"{counted(report['samples'], 'sample')} in {counted(report['shards'], 'shard')}, {report['bytes'] / 1e6:.1f} MB; "
        f"{report['examined']} read",
        f"labels: {len(report['labels'])}, groups: {report['groups']['number']}",
        f"duplicates: {report['duplicates']['redundant']} to spare; near-duplicates at cosine {arguments.near}: "
        f"{report['near_duplicates']['redundant']} to spare",
        f"bad samples: {bad}",
        f"report: {out / 'inspect.html'}",
    ]
    sys.stdout.write("\n  ".join(lines) + "\n")
    return 1 if bad else 0
