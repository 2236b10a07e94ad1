"""Published methods as short plug-ins outside the tree: they must need nothing but files of their own.

Each runs through resume (bit for bit), two ranks against one, and accumulation by 2.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load_file

from ssl_platform.config import validate
from ssl_platform.monitors import OF_THE_MACHINE, POOLED
from ssl_platform.recipe import Recipe
from ssl_platform.train import train
from tests.ranks import run_ranks

VIT = {"name": "vit", "embed_dim": 16, "depth": 2, "num_heads": 2, "layer_scale": None}
SMALL_HEAD = {"name": "projection", "num_prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8, "num_layers": 2}
PAIR = {"student": {"backbone": VIT}, "teacher": {"update": "ema", "of": "student", "momentum": 0.9}}
DINO = {"name": "dino", "teacher_temp": 0.04}
GRAM = {"name": "gram", "teacher_group": "double", "masks": "block"}


def toy(*groups: str) -> dict[str, Any]:
    return {"name": "tests.probes.toy", "groups": list(groups)}


PROBES: dict[str, dict[str, Any]] = {
    "asit": {
        "modality": toy("global", "clean", "corrupted"),
        "companions": {"name": "random", "num": 1},
        "networks": PAIR,
        "heads": {"dino": SMALL_HEAD, "data": SMALL_HEAD | {"num_prototypes": 8}},
        "objectives": {
            "dino": DINO | {"teacher_group": "clean", "student_groups": ["corrupted"]},
            "asit": {"name": "tests.probes.asit"},
        },
    },
    "discovr": {
        "modality": toy("global", "clip", "frames"),
        "networks": {
            "video": {"backbone": VIT, "inputs": "clip"},
            "video_teacher": {"update": "ema", "of": "video", "momentum": 0.9},
            "image": {"backbone": VIT, "inputs": "frames"},
            "image_teacher": {"update": "ema", "of": "image", "momentum": 0.9},
        },
        "heads": {"video": SMALL_HEAD | {"network": "video"}, "image": SMALL_HEAD | {"network": "image"}},
        "masks": {
            "tube": {"name": "tube", "group": "clip", "ratio": 0.5, "num_masks": 2},
            "patches": {"name": "random", "group": "frames", "ratio": [0.5, 0.5], "num_masks": 2},
        },
        "objectives": {
            "video": DINO
            | {"head": "video", "teacher": "video_teacher", "student": "video", "teacher_group": "clip"}
            | {"student_groups": ["clip"], "masks": {"clip": "tube"}, "mode": "drop", "pairs": "same"},
            "image": DINO
            | {"head": "image", "teacher": "image_teacher", "student": "image", "teacher_group": "frames"}
            | {"student_groups": ["frames"], "masks": {"frames": "patches"}, "mode": "drop", "pairs": "same"},
            "cluster": {"name": "tests.probes.discovr"},
        },
    },
    "poa": {
        "modality": toy("global"),
        "networks": PAIR | {"student": {"backbone": {"name": "tests.probes.elastic"}}},
        "heads": {"small": SMALL_HEAD, "large": SMALL_HEAD | {"num_prototypes": 20}},
        "objectives": {"poa": {"name": "tests.probes.poa"}},
    },
    "comodo": {
        "modality": toy("global", "clip", "signal"),
        "networks": {
            "video": {"backbone": VIT, "inputs": "clip", "update": "frozen"},
            "student": {"backbone": VIT, "inputs": "signal"},
        },
        "objectives": {"comodo": {"name": "tests.probes.comodo"}},
    },
    "gram": {
        "modality": toy("global", "local", "double"),
        "networks": PAIR | {"gram": {"update": "snapshot", "of": "teacher", "first_step": 1, "every": 2}},
        "heads": {"dino": SMALL_HEAD},
        "masks": {"block": {"name": "block", "min_tokens": 1}},
        "objectives": {"dino": DINO | {"masks": {"global": "block"}}, "gram": GRAM},
    },
    "sdpn": {
        "modality": toy("global", "local", "single"),
        "networks": PAIR,
        "heads": {"embedding": SMALL_HEAD | {"num_prototypes": 8}},
        "objectives": {"sdpn": {"name": "tests.probes.sdpn"}},
    },
    "dlg_lc": {
        "modality": toy("global", "clean"),
        "networks": PAIR,
        "objectives": {"dlg_lc": {"name": "tests.probes.dlg_lc"}},
        "stages": {
            "labels": {"steps": 2, "repeat": 2, "prepare": {"name": "tests.probes.cluster_stage"}},
        },
    },
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars with 26 samples of noise, written with webdataset alone."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for i in range(13):
                buffer = io.BytesIO()
                np.save(buffer, rng.standard_normal((1, 16, 16)).astype(np.float32))
                writer.write({"__key__": f"{shard}-{i}", "npy": buffer.getvalue()})
    return folder


def recipe(name: str, shards: Path, run_dir: Path, **changes: Any) -> Recipe:
    probe = dict(PROBES[name])
    data = {"shards": str(shards), "window_shards": 2, "workers": 0, "companions": probe.pop("companions", None)}
    base = {"run_dir": str(run_dir), "steps": 4, "save_every": 2, "log_every": 1, "batch_size": 8, "data": data}
    return validate(Recipe, base | {"tensorboard": False, "optim": {"lr": 0.01}} | probe | changes)


def losses(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    left_out = (*OF_THE_MACHINE, *POOLED)
    return [{key: value for key, value in line.items() if not key.endswith(left_out)} for line in lines]


def assert_same_checkpoint(first: Path, second: Path, step: int) -> None:
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(run / f"checkpoints/step_{step:08d}/{name}.safetensors") for run in (first, second))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value.nan_to_num(), theirs[key].nan_to_num()), key


def two_ranks(config: dict[str, Any]) -> list[dict[str, float]]:
    train(validate(Recipe, config, world_size=2), torch.device("cpu"))
    return []


@pytest.mark.parametrize("name", PROBES)
def test_resume_is_bit_exact(name: str, shards: Path, tmp_path: Path) -> None:
    train(recipe(name, shards, tmp_path / "whole"), torch.device("cpu"))
    partial = recipe(name, shards, tmp_path / "halves")
    stop_after(partial, 2)
    train(partial, torch.device("cpu"))
    assert [line["step"] for line in losses(tmp_path / "whole")] == [1, 2, 3, 4]
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halves", 4)


def stop_after(partial: Recipe, step: int) -> None:
    """Trains, then removes what came after `step`: what a kill leaves behind."""
    import shutil

    train(partial, torch.device("cpu"))
    for path in (partial.run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("method", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", PROBES)
def test_two_ranks_equal_one(name: str, method: str, shards: Path, tmp_path: Path) -> None:
    train(recipe(name, shards, tmp_path / "one"), torch.device("cpu"))
    both = recipe(name, shards, tmp_path / "two", parallel={"method": method})
    run_ranks(2, two_ranks, both.model_dump(mode="json"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    for key in one[0]:
        tolerance = 1e-4 if "grad" in key else 1e-5
        assert two[0][key] == pytest.approx(one[0][key], rel=tolerance, abs=1e-7), key


@pytest.mark.parametrize("name", PROBES)
def test_accumulation(name: str, shards: Path, tmp_path: Path) -> None:
    """Two micro-batches of 4: one commit and one average a step, and the same samples as one batch of 8."""
    train(recipe(name, shards, tmp_path / "one"), torch.device("cpu"))
    train(recipe(name, shards, tmp_path / "two", accumulate=2), torch.device("cpu"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 4 and all(np.isfinite(line["loss"]) for line in two)
    if name in EQUAL_UNDER_ACCUMULATION:  # the others see micro-batches: Sinkhorn, batch means, in-batch negatives
        for key in one[0]:
            assert two[0][key] == pytest.approx(one[0][key], rel=1e-4, abs=1e-7), key


EQUAL_UNDER_ACCUMULATION = {"asit", "poa", "gram", "dlg_lc"}
