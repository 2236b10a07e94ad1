"""The losses of every smoke configuration, step by step, as they were when somebody last looked at them.

A change that should not alter numbers keeps them. One that should regenerates them and says why:

    make golden
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ssl_platform.monitors import OF_THE_MACHINE, POOLED
from ssl_platform.recipe import load_recipe
from ssl_platform.train import train

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "smoke").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "data" / "golden"
STEPS = 6


def losses(config: Path, run_dir: Path) -> list[dict[str, float]]:
    """What the first steps of a configuration report, without what depends on the machine, and what counts by thresholds."""
    overrides = [f"run_dir={run_dir}", f"steps={STEPS}", f"save_every={STEPS}", "log_every=1", "tensorboard=false"]
    overrides.append("stages={}")  # all objectives from the first step
    train(load_recipe(config, overrides), torch.device("cpu"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    left_out = (*OF_THE_MACHINE, *POOLED)
    return [{key: value for key, value in line.items() if not key.endswith(left_out)} for line in lines]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_losses_are_what_they_were(config: Path, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{config.stem}.json").read_text())
    found = losses(config, tmp_path)
    assert len(found) == len(golden) == STEPS
    for ours, theirs in zip(found, golden, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # Other processors round otherwise: measured 2e-6 between AVX2 and plain kernels after these steps.
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (theirs["step"], key)


def regenerate() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for config in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            lines = losses(config, Path(folder))
        (GOLDEN / f"{config.stem}.json").write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
        sys.stdout.write(f"{config.stem}: loss {lines[0]['loss']:.6f} -> {lines[-1]['loss']:.6f}\n")


if __name__ == "__main__":
    regenerate()
