"""What takes minutes: the README's main job from raw image to export, and a run that is killed over and over."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_resume import assert_equal, command, lines

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1500)
def test_make_train_beats_random_initialisation_and_pixels(tmp_path: Path) -> None:
    program = [sys.executable, "benchmarks/skin.py", "--folder", str(tmp_path)]
    ended = subprocess.run(program, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=1400)  # stderr shows progress
    sys.stdout.write(ended.stdout)
    assert ended.returncode == 0
    result = json.loads((tmp_path / "knn/knn.json").read_text())
    k = str(result["headline_k"])
    assert k == "20"  # the default, settled before any score was known
    assert result["data"]["counts"]["test_groups"] > 20  # spatial blocks
    for baseline in ("random", "pixels"):
        assert result["differences"][baseline][k]["balanced_accuracy"]["low"] > 0, baseline
    assert (tmp_path / "pca/skin.png").is_file()
    exported = json.loads((tmp_path / "export/config.json").read_text())
    assert exported["num_features"] == 192


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_equals_an_undisturbed_one(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    rng = random.Random(seed)
    overrides = ["steps=1200", "save_every=3", "log_every=1", "keep_last=2", "data.workers=1", "tensorboard=false"]
    kills = 0
    with (tmp_path / "log.txt").open("w+") as log:
        assert command(f"run_dir={tmp_path / 'whole'}", *overrides, log=log).wait(300) == 0
        for _ in range(40):
            process = command(f"run_dir={tmp_path / 'killed'}", *overrides, log=log)
            try:  # loading torch takes some seconds, so most kills come while it trains or saves
                code = process.wait(rng.uniform(4, 9) if kills < 12 else 300)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait(60)
                kills += 1
                continue
            assert code == 0, (tmp_path / "log.txt").read_text()[-2000:]
            break
    sys.stdout.write(f"{kills} kills\n")
    assert kills >= 5, "too few kills to mean anything"
    assert lines(tmp_path / "killed")[-1]["step"] == 1200
    assert_equal(tmp_path / "whole", tmp_path / "killed", 1200)
    leftovers = [path.name for path in (tmp_path / "killed/checkpoints").iterdir() if not path.name.startswith("step_")]
    assert not leftovers
