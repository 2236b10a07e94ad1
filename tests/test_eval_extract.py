"""`ssl-eval extract`: a row for each sample in the order of the index, which ssl-pack takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eval_protocols.__main__ import main
from ssl_platform import train
from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader
from ssl_platform.encoder import Encoder
from tests.packed import ssl_pack, write_tar

ROOT = Path(__file__).parents[1]
TILES = ROOT / "tests/data/skin_tiles"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extract") / "run"
    config = str(ROOT / "configs/smoke/pathology.yaml")
    assert train.main([config, f"data.shards={TILES}", f"run_dir={folder}", "steps=1", "tensorboard=false"]) == 0
    return folder


def test_rows_are_those_of_the_encoder(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "features.npy"
    given = ["--checkpoint", str(run_dir), "--shards", str(TILES), "--out", str(out), "--device", "cpu"]
    assert main(["extract", *given, "--batch-size", "17"]) == 0
    assert "features.npy: 100 samples, " in capsys.readouterr().out
    features = np.load(out)
    encoder, reader = Encoder.load(run_dir), ShardReader(Index.open(TILES), cache_shards=4)
    for number in (0, 16, 17, 63, 99):
        view = encoder.modality.preprocess(encoder.modality.decode(reader.read(number).members))
        row = encoder(torch.as_tensor(view)[None]).cls[0].numpy()
        np.testing.assert_allclose(features[number], row, rtol=1e-4, atol=1e-5)
    assert ssl_pack("inspect", TILES, "--features", out, "--near", 0.99, "--out", tmp_path / "report") == 0
    report = json.loads((tmp_path / "report/inspect.json").read_text())
    assert ssl_pack("prune", TILES, tmp_path / "out", "--near-duplicates", 0.99, "--features", out) == 0
    assert 100 - len(Index.open(tmp_path / "out")) == report["near_duplicates"]["redundant"]


def test_refusals(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "bad/x.tar", [("k", {"png": b"no image"})])
    for shards, out, message in (
        (TILES, tmp_path / "x.txt", "x.txt: expected a name that ends in .npy, in a folder that exists"),
        (TILES, tmp_path / "none/x.npy", "x.npy: expected a name that ends in .npy, in a folder that exists"),
        (tmp_path / "none", tmp_path / "x.npy", "none: no such file or folder"),
        (tmp_path / "bad", tmp_path / "x.npy", "x.tar: k: not an image"),
    ):
        assert main(["extract", "--checkpoint", str(run_dir), "--shards", str(shards), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.npy").exists()
