"""Checks shards against their index, byte range by byte range, and decodes every image.

Each thing that is wrong is one line: shard, key, reason. Looked for are tars that are missing, not in the index, changed,
truncated, damaged or compressed; samples whose byte range is not exactly one whole record; images that cannot be
decoded; labels and groups that differ from the index; keys used twice, in a shard or across shards; and members with
absolute names or `..`, links, devices and sparse files, which other tools unpack at their peril.

what comes out: the lines on the screen, with --json FILE also as JSON; exit status 1 if anything is wrong, 0 if not.

examples:
  ssl-pack verify shards --workers 16
  ssl-pack verify --quick shards/train shards/test --json problems.json
"""

import argparse
import sys
from pathlib import Path

from ssl_platform.data.commands._options import add_workers, counted
from ssl_platform.data.remote import RemoteSettings, add_cache_arguments
from ssl_platform.location import location

_SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shards", metavar="SHARDS", type=location, nargs="+", help="folders, tars or URLs of these")
    parser.add_argument(
        "--quick", action="store_true", help="only names, byte ranges, labels and groups: decode nothing"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what is wrong there too")
    parser.add_argument(
        "--allow-duplicate-keys", action="store_true", help="for what `ssl-pack merge` joined with the same option"
    )
    add_workers(parser)
    add_cache_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 if all is well, 1 if not."""
    from ssl_platform.data.commands._checks import check
    from ssl_platform.data.tars import write_json

    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    found = check(
        arguments.shards,
        decode=not arguments.quick,
        unique_keys=not arguments.allow_duplicate_keys,
        workers=arguments.workers,
        remote=RemoteSettings.of_arguments(arguments),
    )
    if arguments.json is not None:
        problems = [problem._asdict() for problem in found.problems]
        about = {"shards": found.shards, "samples": found.samples, "decoded": found.decoded, "problems": problems}
        write_json(arguments.json, about)
    lines = [": ".join(part for part in problem if part) for problem in found.problems[:_SHOWN]]
    if len(found.problems) > _SHOWN:
        lines.append(f"and {len(found.problems) - _SHOWN} more" + (" (--json FILE has all)" * (not arguments.json)))
    what = f"{counted(found.samples, 'sample')} in {counted(found.shards, 'shard')}, {found.decoded} decoded"
    lines.append(f"{what}: {len(found.problems) or 'nothing'} wrong")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found.problems else 0
