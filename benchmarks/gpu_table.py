"""A Markdown table of training steps on one device: models, attention backends, recompute, FSDP2, compile.

`benchmarks/gpu.sh` runs it. Each row is a process of `benchmarks/step.py`; a row that fails shows its error, and rows for
which no time is left say so.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

BATCHES = {"small": 128, "base": 64, "large": 32}
COLUMNS = ("model", "batch", "setting", "samples/s", "MFU (lowest, highest)", "peak memory", "matrix product")


class Row(NamedTuple):
    """One line of the table."""

    model: str
    setting: str
    """What it is called."""
    overrides: tuple[str, ...]
    batch_size: int


def attention(backend: str) -> tuple[str, ...]:
    return (f"networks.student.backbone.attention={backend}",)


VARIANTS = {
    "sdpa": attention("sdpa"),
    "varlen": attention("varlen"),
    "xformers": attention("xformers"),
    "recompute": ("recompute=true",),
    "FSDP2": ("parallel.method=fsdp",),
    "compile": ("compile=true",),  # last: compiling may take what time is left
}
TINY = (
    *(f"networks.student.backbone.{key}" for key in ("embed_dim=32", "depth=1", "num_heads=2")),
    "modality.crops.global.size=64",
    "modality.crops.local.size=32",
)


def rows(quick: bool) -> list[Row]:
    """What is measured, the most telling first; `quick`: a tiny network, to see that the script works."""
    if quick:
        return [Row("small", name, (*VARIANTS[name], *TINY), 2) for name in ("sdpa", "varlen", "recompute")]
    return [
        Row(model, name, VARIANTS[name], BATCHES[model]) for name in VARIANTS for model in ("large", "small", "base")
    ]


def measured(row: Row, arguments: argparse.Namespace, seconds: float) -> tuple[str, ...]:
    """The cells of a row, or what went wrong."""
    begun = (row.model, str(row.batch_size), row.setting)
    if seconds <= 0:
        return (*begun, "not run: no time left", "", "", "")
    command = [sys.executable, str(Path(__file__).parent / "step.py"), "--one", "--device", arguments.device]
    command += ["--precision", arguments.precision, "--prototypes", str(arguments.prototypes)]
    command += ["--repeats", str(arguments.repeats), "--batch-size", str(row.batch_size), "--model", row.model]
    try:
        found = subprocess.run(
            [*command, "--set", *row.overrides], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return (*begun, f"ended after {seconds:.0f} s", "", "", "")
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.strip()] or [f"exit status {found.returncode}"]
        return (*begun, lines[-1].replace("|", "/")[:300], "", "", "")
    line = json.loads(found.stdout.splitlines()[-1])
    low, high = line["mfu_range"]
    return (
        *begun,
        str(line["samples_per_second"]),
        f"{line['mfu']} ({low}, {high})",
        f"{line['peak_memory_gb']} GB",
        f"{line['matmul_gflops'] / 1e3:.4g} TFLOP/s",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="a tiny network and few rows: a test of the script itself")
    parser.add_argument("--out", type=Path, default=Path("gpu_table.md"))
    parser.add_argument("--minutes", type=float, default=7.5, help="for all rows together")
    arguments = parser.parse_args()
    arguments.precision = "bf16" if arguments.device == "cuda" else "fp32"
    arguments.prototypes, arguments.repeats = (64, 1) if arguments.quick else (65536, 10)
    deadline = time.monotonic() + 60 * arguments.minutes
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    written = [f"{arguments.precision}, {arguments.prototypes:,} prototypes, `benchmarks/gpu.sh`", "", *head]
    sys.stdout.write("\n".join(written) + "\n")
    failed = 0
    for row in rows(arguments.quick):
        cells = measured(row, arguments, min(deadline - time.monotonic(), 100.0))
        failed += not cells[-1]
        written.append("| " + " | ".join(cells) + " |")
        sys.stdout.write(written[-1] + "\n")
        sys.stdout.flush()
        arguments.out.write_text("\n".join(written) + "\n")  # after each row: what was measured is not lost
    sys.stdout.write(f"\n{arguments.out}: {len(written) - 4} rows, {failed} without figures\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
