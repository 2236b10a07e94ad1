"""What ssl-pack measures of the channels is what a run, its checkpoints, its exports and its evaluations use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval_protocols.__main__ import main as ssl_eval
from ssl_platform import export
from ssl_platform.config import to_yaml, validate
from ssl_platform.data.index import Index
from ssl_platform.data.pack import main as ssl_pack
from ssl_platform.encoder import Encoder
from ssl_platform.recipe import Recipe
from ssl_platform.train import main as ssl_train

NUM_IMAGES = 12


def pack_images(folder: Path, seed: int, largest: int) -> Path:
    """Shards of 16-bit images of two classes that fill the range up to `largest` only."""
    rng = np.random.default_rng(seed)
    for number in range(NUM_IMAGES):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, largest, (20, 20), dtype=np.uint16) // (1 + number % 2)
        Image.fromarray(pixels).save(path)
    assert ssl_pack([str(folder / "images"), str(folder / "shards"), "--labels", "folder"]) == 0
    return folder / "shards"


def recipe_of(run_dir: Path, shards: Path, modality: Mapping[str, Any]) -> Recipe:
    data = {
        "run_dir": str(run_dir),
        "steps": 1,
        "batch_size": 4,
        "log_every": 1,
        "modality": {
            "name": "image",
            "channels": 1,
            "patch_size": 8,
            "crops": {"global": {"size": 16}, "local": {"num": 1, "size": 8}},
            **modality,
        },
        "data": {"shards": str(shards), "workers": 0},
        "networks": {
            "student": {"backbone": {"name": "vit", "embed_dim": 16, "depth": 1, "num_heads": 2}},
            "teacher": {"update": "ema", "of": "student"},
        },
        "heads": {"dino": {"name": "projection", "num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}},
        "objectives": {"dino": {"name": "dino"}},
    }
    return validate(Recipe, data)


def train(folder: Path, name: str, shards: Path, **modality: Any) -> Path:
    """One step; returns the run folder."""
    recipe = recipe_of(folder / name, shards, modality)
    (folder / f"{name}.yaml").write_text(to_yaml(recipe))
    assert ssl_train([str(folder / f"{name}.yaml")]) == 0
    return folder / name


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("dim"), seed=0, largest=2000)


@pytest.fixture(scope="module")
def run(shards: Path) -> Path:
    return train(shards.parent, "run", shards, intensity_range=[1, 99])


def expected(shards: Path) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """The index's statistics, and all pixels."""
    pixels = [np.asarray(Image.open(path)) for path in sorted(shards.parent.glob("images/*/*.png"))]
    statistics = Index.open(shards).statistics
    assert statistics is not None
    return statistics, np.stack(pixels)


def test_the_index_has_percentiles_of_the_training_data(shards: Path) -> None:
    statistics, pixels = expected(shards)
    assert set(statistics) == {"mean", "std", "percentiles"}, "what joins them stays in the index"
    for share, (value,) in statistics["percentiles"].items():
        wanted = np.percentile(pixels, float(share), method="inverted_cdf")
        assert value * 65535 == pytest.approx(wanted, rel=1e-12 if wanted < 1024 else 1 / 1024)


def test_checkpoint_and_export_carry_them(run: Path, shards: Path) -> None:
    statistics, _ = expected(shards)
    (state,) = run.glob("checkpoints/step_*/state.json")
    assert json.loads(state.read_text())["statistics"] == statistics
    out = run.parent / "exported"
    assert export.main([str(run), "--format", "timm", "--out", str(out), "--overwrite"]) == 0
    section = json.loads((out / "config.json").read_text())["ssl_platform"]
    assert section["encoder"]["statistics"] == statistics
    intensity = section["preprocessing"]["intensity_range"]
    assert intensity["percentiles"] == [1, 99]
    assert intensity["low"] == pytest.approx(statistics["percentiles"]["1"])
    assert intensity["high"] == pytest.approx(statistics["percentiles"]["99"])


def test_the_export_says_that_timm_does_not_map_intensities(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), "--format", "timm", "--out", str(run.parent / "noted"), "--overwrite"]) == 0
    assert "note: timm's transform does not map intensities" in capsys.readouterr().out


def test_preprocess_is_what_the_export_describes(run: Path) -> None:
    out = run.parent / "described"
    assert export.main([str(run), "--format", "timm", "--out", str(out), "--overwrite"]) == 0
    facts = json.loads((out / "config.json").read_text())["ssl_platform"]["preprocessing"]
    example = torch.from_numpy(np.random.default_rng(4).integers(0, 2500, (1, 16, 16), dtype=np.uint16))
    low, high = facts["intensity_range"]["low"][0], facts["intensity_range"]["high"][0]
    mapped = np.clip((example.numpy() / 65535 - low) / (high - low), 0, 1)
    written_out = (mapped - facts["mean"][0]) / facts["std"][0]
    for path in (run, out):
        found = Encoder.load(path).modality.preprocess(example)
        np.testing.assert_allclose(found.numpy(), written_out, atol=1e-4)


def test_evaluation_goes_by_the_checkpoint_and_not_by_the_shards_it_is_shown(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = pack_images(tmp_path, seed=1, largest=60_000)
    built: list[dict[str, Any]] = []
    load = Encoder.load

    def loaded(*arguments: Any, **options: Any) -> Encoder:
        encoder = load(*arguments, **options)
        built.append(encoder.modality.description())
        return encoder

    monkeypatch.setattr(Encoder, "load", loaded)
    command = ["knn", "--checkpoint", run, "--train", other, "--test", other, "--k", "1", "--baselines", "random"]
    assert ssl_eval([str(argument) for argument in [*command, "--out", tmp_path / "result"]]) == 0
    statistics = Index.open(run.parent / "shards").statistics
    assert statistics is not None and statistics != Index.open(other).statistics
    assert built and all(
        facts["intensity_range"]["high"] == pytest.approx(statistics["percentiles"]["99"]) for facts in built
    )


def test_a_resumed_run_keeps_what_it_began_with(tmp_path: Path) -> None:
    shards = pack_images(tmp_path, seed=2, largest=5000)
    run = train(tmp_path, "run", shards)
    index = json.loads((shards / "index.json").read_text())
    index["statistics"] |= {"mean": [0.9], "std": [0.7]}
    (shards / "index.json").write_text(json.dumps(index))
    assert ssl_train([str(tmp_path / "run.yaml"), "steps=2"]) == 0
    state = json.loads((run / "checkpoints/step_00000002/state.json").read_text())
    assert state["step"] == 2 and state["statistics"]["mean"][0] < 0.1


def test_mean_and_std_of_a_config_win(shards: Path, run: Path) -> None:
    stated = train(run.parent, "stated", shards, mean=[0.25], std=[0.125])
    facts = Encoder.load(stated).modality.description()
    assert facts["mean"] == [0.25] and facts["std"] == [0.125] and facts["intensity_range"] is None
    measured = Encoder.load(train(run.parent, "measured", shards)).modality.description()
    statistics, _ = expected(shards)
    assert measured["mean"] == pytest.approx(statistics["mean"]) and measured["std"] == pytest.approx(statistics["std"])
    assert (state := next(stated.glob("checkpoints/step_*/state.json"))), "they are carried all the same"
    assert json.loads(state.read_text())["statistics"] == statistics


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (
            {"mean", "std", "pixels"},
            "modality: intensity_range: needs the percentiles of the shards, which an older ssl-",
        ),
        (set[str](), "modality.intensity_range: needs the statistics of the shards, which are not known: ssl-pack"),
    ],
    ids=["older shards", "no statistics"],
)
def test_shards_without_percentiles_are_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left: set[str], message: str
) -> None:
    shards = pack_images(tmp_path, seed=3, largest=5000)
    index = json.loads((shards / "index.json").read_text())
    index["statistics"] = {key: index["statistics"][key] for key in left} or None
    (shards / "index.json").write_text(json.dumps(index))
    train(tmp_path, "plain", shards)
    recipe = recipe_of(tmp_path / "mapped", shards, {"intensity_range": [1, 99]})
    (tmp_path / "mapped.yaml").write_text(to_yaml(recipe))
    capsys.readouterr()
    assert ssl_train([str(tmp_path / "mapped.yaml")]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "mapped" / "checkpoints").exists()
