"""ssl-eval: what a pretrained encoder has learnt, beside what no pretraining would give.

A protocol is one way of looking at it: knn scores it on labelled shards, pca draws what it tells apart in an image.
`ssl-eval PROTOCOL --help` explains it. Each writes a JSON file with everything needed to repeat it.

examples:
  ssl-eval knn --checkpoint runs/skin --train 'shards/train-*.tar' --test 'shards/test-*.tar'
  ssl-eval pca --checkpoint runs/skin --image section.tif
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import eval_protocols
from ssl_platform.config import ConfigError, plugin_names
from ssl_platform.log import set_up_logging


def main(argv: Sequence[str] | None = None) -> int:
    """The command `ssl-eval`; returns the exit code, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        prog="ssl-eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(title="protocols", metavar="PROTOCOL", required=True)
    for name, module in protocols().items():
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.split("\n", 1)[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    set_up_logging()
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, ConfigError) as error:
        sys.stderr.write(f"ssl-eval: {error}\n")
        return 2


def protocols() -> dict[str, ModuleType]:
    """The protocols of this folder: its modules that define `add_arguments(parser)` and `run(arguments) -> exit code`.

    The module's docstring is the help text of the sub-command, its first line the summary.
    """
    modules = {
        name: importlib.import_module(f"{eval_protocols.__name__}.{name}") for name in plugin_names("eval_protocols")
    }
    return {name: module for name, module in modules.items() if {"add_arguments", "run"} <= vars(module).keys()}


if __name__ == "__main__":
    sys.exit(main())
