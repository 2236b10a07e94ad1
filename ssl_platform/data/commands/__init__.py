"""The commands of ssl-pack that look at, check, join and thin out shards: one file each.

A command is a module with `add_arguments(parser)` and `run(arguments) -> exit code`; its docstring is its help text, the
first line the summary. Modules load what is slow to import inside `run`.
"""

import argparse
import ast
import errno
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_platform.config import plugin_names
from ssl_platform.data import layouts


def names() -> list[str]:
    """What may stand after `ssl-pack`: the commands, and the layouts of public data sets."""
    return [*plugin_names(__name__), *layouts.names()]


def main(name: str, argv: Sequence[str]) -> int:
    """Runs `ssl-pack NAME ...`; returns the command's exit code, 2 for an error, 130 for Ctrl-C."""
    module = _command(name)
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
        reason = f"{error.filename2 or error.filename or name}: {error.strerror}" if error.strerror else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; make room and give the same command again"
    except KeyboardInterrupt:
        sys.stderr.write(f"ssl-pack {name}: interrupted\n")
        return 130
    sys.stderr.write(f"ssl-pack {name}: {reason}\n")
    return 2


def _command(name: str) -> Any:
    return layouts.LayoutCommand(name) if name in layouts.names() else importlib.import_module(f"{__name__}.{name}")


def summaries() -> str:
    """A line for each command, for the help text of ssl-pack."""
    lines = ["commands (ssl-pack COMMAND --help explains one; a folder of that name is packed as ./COMMAND):"]
    lines += _summaries({name: _docstring(__name__, name) for name in plugin_names(__name__)})
    lines += [
        "",
        "data sets (ssl-pack NAME DIR OUT packs one as it is unpacked; ssl-pack NAME --help shows its layout):",
    ]
    lines += _summaries({name: _docstring(layouts.__name__, name.replace("-", "_")) for name in layouts.names()})
    return "\n".join(lines) + "\n"


def _summaries(docstrings: Mapping[str, str]) -> list[str]:
    width = max(map(len, docstrings))
    return [f"  {name:<{width}} {text.splitlines()[0]}" for name, text in docstrings.items()]


def _docstring(package: str, name: str) -> str:
    """Read from the source: importing a layout loads torch, which takes seconds."""
    found = importlib.util.find_spec(f"{package}.{name}")
    assert found is not None and found.origin is not None
    return ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8"))) or ""
