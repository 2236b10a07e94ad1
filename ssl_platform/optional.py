"""Packages that only some data needs: imported where such data is met, and missed in words."""

from importlib import import_module
from typing import Any


def optional_package(name: str, why: str, extra: str) -> Any:
    """The module `name`; raises ValueError with `why` ("videos need PyAV") and the command that installs it."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a wheel whose shared library is missing
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise ValueError(f"{why}{reason}: pip install 'ssl-platform[{extra}]'") from error
