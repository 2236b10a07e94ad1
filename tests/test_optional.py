"""Packages that are missing, or broken, are named with the command that installs them."""

import sys
from pathlib import Path

import pytest

from ssl_platform.optional import optional_package


def test_a_missing_package_and_one_whose_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "brokenwheel.py").write_text("raise OSError('libsound.so.1: cannot open shared object file')")
    with pytest.raises(ValueError) as error:
        optional_package("brokenwheel", "whales need brokenwheel", "sea")
    reason = "libsound.so.1: cannot open shared object file"
    assert str(error.value) == f"whales need brokenwheel ({reason}): pip install 'ssl-platform[sea]'"
    with pytest.raises(ValueError) as error:
        optional_package("nosuchwheel", "whales need nosuchwheel", "sea")
    assert str(error.value) == "whales need nosuchwheel: pip install 'ssl-platform[sea]'"
    assert optional_package("sys", "", "") is sys
