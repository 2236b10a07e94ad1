"""The commands of ssl-pack that look at, check, join and thin out shards: one file each.

A command is a module with `add_arguments(parser)` and `run(arguments) -> exit code`; its docstring is its help text, the
first line the summary. Modules load what is slow to import inside `run`.
"""

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence

from ssl_platform.config import plugin_names


def main(name: str, argv: Sequence[str]) -> int:
    """Runs `ssl-pack NAME ...`; returns the command's exit code, 2 for an error, 130 for Ctrl-C."""
    module = importlib.import_module(f"{__name__}.{name}")
    parser = argparse.ArgumentParser(
        prog=f"ssl-pack {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    arguments = parser.parse_args(argv)
    from ssl_platform.log import set_up_logging  # torch takes seconds to load, --help should not

    set_up_logging()
    try:
        return int(module.run(arguments))
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename2 or error.filename or name}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; make room and give the same command again"
    except KeyboardInterrupt:
        sys.stderr.write(f"ssl-pack {name}: interrupted\n")
        return 130
    sys.stderr.write(f"ssl-pack {name}: {reason}\n")
    return 2


def summaries() -> str:
    """A line for each command, for the help text of ssl-pack."""
    lines = ["commands (ssl-pack COMMAND --help explains one; a folder of that name is packed as ./COMMAND):"]
    for name in plugin_names(__name__):
        text = importlib.import_module(f"{__name__}.{name}").__doc__ or ""
        lines.append(f"  {name:<9} {text.splitlines()[0]}")
    return "\n".join(lines) + "\n"
