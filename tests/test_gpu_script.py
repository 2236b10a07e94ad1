"""`benchmarks/gpu.sh` where there is no GPU: the script itself, rows that fail included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=290, check=False)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


@pytest.mark.slow
def test_a_table_with_a_row_that_fails(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    found = run("--device", "cpu", "--quick", "--out", str(out))
    assert found.returncode == 0, found.stderr
    head, _, *lines = [line for line in out.read_text().splitlines() if line.startswith("|")]
    rows = {row[2]: row for row in map(cells, lines)}
    assert len(cells(head)) == 7 and list(rows) == ["sdpa", "varlen", "recompute"]
    assert float(rows["sdpa"][3]) > 0 and rows["sdpa"][5].endswith(" GB")
    assert rows["varlen"][3].startswith("ValueError: attention: varlen runs on CUDA only")
    assert "test_nothing_waits_for_cuda_before_the_finite_check" in found.stdout, "the tests marked gpu are collected"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    found = run("--out", str(tmp_path / "table.md"))
    assert found.returncode == 1 and "no CUDA device: torch.cuda.is_available() is false" in found.stderr
    assert not (tmp_path / "table.md").exists()


def test_rows_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_table.py"),
        "--device",
        "cpu",
        "--quick",
        "--minutes",
        "0",
    ]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=100, capture_output=True)
    rows = [cells(line) for line in out.read_text().splitlines() if line.startswith("| small")]
    assert [row[3] for row in rows] == ["not run: no time left"] * 3
