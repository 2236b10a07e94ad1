"""Writes a folder with fewer of the samples: at random, by a score, or without near-duplicates.

Samples are copied byte for byte, in their order. Several rules are applied one after the other: bad samples, scores,
near-duplicates (of each group the one with the highest score stays, else the first), then the random choice.

  --scores FILE             .csv with the columns key (or id, a sample's place in the index) and score; or .npy, a score
                            a sample. Keep the highest with --keep-top, or those within --min-score and --max-score
  --near-duplicates COSINE  keeps no two samples whose cosine is COSINE or more: between 16 x 16 grey thumbnails, which
                            brightness, contrast, size and compression hardly change, or between the rows of --features,
                            such as an encoder's (`ssl-eval extract` writes them)

what comes out: shards with an index in OUT, and OUT/dropped.csv: key, id, rule, why. Channel statistics are measured
again, which decodes all samples that stay; --no-statistics saves that time and leaves them out.

examples:
  ssl-pack prune shards half --keep 0.5 --seed 1
  ssl-pack prune shards best --scores scores.csv --keep-top 0.7
  ssl-pack prune shards distinct --near-duplicates 0.95 --drop-bad --workers 16
"""

import argparse
from pathlib import Path

from ssl_platform.data.commands._options import add_workers, number, on_this_machine, positive_share
from ssl_platform.data.pack_options import count
from ssl_platform.location import location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shards", metavar="SHARDS", type=location, nargs="+", help="folders, tars or quoted patterns")
    parser.add_argument("out", metavar="OUT", type=location, help="folder for the shards, empty or new")
    parser.add_argument(
        "--keep", metavar="SHARE", type=positive_share, help="keep so many of those left, drawn by --seed"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of that choice; default 0")
    parser.add_argument("--scores", metavar="FILE", type=Path, help="a score for each sample, .csv or .npy")
    parser.add_argument("--keep-top", metavar="SHARE", type=positive_share, help="keep this share, the highest scores")
    parser.add_argument("--min-score", metavar="X", type=number, help="keep scores of at least this")
    parser.add_argument("--max-score", metavar="X", type=number, help="keep scores of at most this")
    parser.add_argument(
        "--near-duplicates", metavar="COSINE", type=positive_share, help="keep one of each group; try 0.95"
    )
    parser.add_argument(
        "--features", metavar="FILE.npy", type=Path, help="rows (N, D) to compare instead of thumbnails"
    )
    parser.add_argument("--drop-bad", action="store_true", help="leave out samples that cannot be read or decoded")
    parser.add_argument("--no-statistics", action="store_true", help="do not measure the channels' mean and std")
    parser.add_argument("--samples-per-shard", metavar="N", type=count, default=1000, help="at most; default 1000")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    from ssl_platform.data.commands._choosing import Rules
    from ssl_platform.data.commands._out import report
    from ssl_platform.data.commands._thinning import prune

    limits = arguments.keep_top, arguments.min_score, arguments.max_score
    if arguments.scores is None and any(limit is not None for limit in limits):
        raise ValueError("--keep-top, --min-score, --max-score: need --scores FILE")
    if arguments.features is not None and arguments.near_duplicates is None:
        raise ValueError("--features: only with --near-duplicates")
    if arguments.scores is not None and all(limit is None for limit in limits) and arguments.near_duplicates is None:
        raise ValueError("--scores: say what to keep with --keep-top, --min-score or --max-score")
    rules = Rules(
        keep=arguments.keep,
        seed=arguments.seed,
        scores=arguments.scores,
        keep_top=arguments.keep_top,
        min_score=arguments.min_score,
        max_score=arguments.max_score,
        near_duplicates=arguments.near_duplicates,
        features=arguments.features,
        drop_bad=arguments.drop_bad,
    )
    if rules == Rules(seed=arguments.seed):
        raise ValueError("what to leave out? give --keep, --scores, --near-duplicates or --drop-bad")
    *inputs, out = on_this_machine([*arguments.shards, arguments.out])
    about = prune(
        inputs,
        out,
        rules,
        samples_per_shard=arguments.samples_per_shard,
        measure=not arguments.no_statistics,
        workers=arguments.workers,
    )
    report(out, about)
    return 0
