"""The README is true: its commands run as written, and what it points at exists."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path, starting_with: str) -> list[str]:
    """The lines of a page's indented blocks that begin so, with continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith(f"    {starting_with}")]


def test_the_commands_of_the_start_run_in_order(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "tests/data/skin_tiles", tmp_path / "tests/data/skin_tiles")
    found = commands(ROOT / "README.md", ".venv/bin/")
    assert {"ssl-train", "ssl-eval", "ssl-export"} <= {Path(shlex.split(line)[0]).name for line in found}
    for line in found:
        program, *arguments = shlex.split(line, comments=True)
        script = str(Path(sys.executable).with_name(Path(program).name))
        ended = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
    assert (tmp_path / "runs/smoke/export/model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:tests|docs|configs|benchmarks|ssl_platform|eval_protocols)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for target in re.findall(r"make ([a-z-]+)", " ".join(re.findall(r"`(make [a-z-]+)`", text))):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{page.name} names make {target}"
