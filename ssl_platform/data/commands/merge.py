"""Joins packed folders, or tars made elsewhere, into one folder with one index, without opening a sample.

Tars are copied byte for byte, or with --link share the space of the originals, under new names in the order given.
Labels and groups are joined by name. Channel statistics are joined exactly if all inputs are whole folders that have
them, else left out. The same inputs give the same bytes, and a command that was cut off goes on when given again.

`cls` members keep the class numbers of their input. Where those differ (A's classes are cat and dog, B's are dog and
eel), ssl-train and ssl-eval are right, because they go by the names in `json`; other tools that read `cls` are not, and
a warning says so.

examples:
  ssl-pack merge hospital-a hospital-b all
  ssl-pack merge --link old 'new/*.tar' all
"""

import argparse

from ssl_platform.data.commands._options import add_workers, on_this_machine
from ssl_platform.location import location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "paths", metavar="SHARDS ... OUT", type=location, nargs="+", help="two or more inputs, then OUT"
    )
    parser.add_argument("--link", action="store_true", help="hard links instead of copies (same disk; change neither)")
    parser.add_argument(
        "--allow-duplicate-keys", action="store_true", help="keep all samples although some have the same key"
    )
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    from ssl_platform.data.commands._joining import merge
    from ssl_platform.data.commands._out import report

    *inputs, out = on_this_machine(arguments.paths)
    if len(inputs) < 2:
        raise ValueError(f"{out}: expected two or more inputs and then the folder to write: merge A B OUT")
    about = merge(
        inputs,
        out,
        link=arguments.link,
        allow_duplicate_keys=arguments.allow_duplicate_keys,
        workers=arguments.workers,
    )
    report(out, about)
    return 0
