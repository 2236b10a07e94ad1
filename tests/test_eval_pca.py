"""`ssl-eval pca`: patch tokens over an image, averaged over windows, as colours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from eval_protocols import pca
from eval_protocols.__main__ import main
from ssl_platform import train
from ssl_platform.encoder import Encoder
from ssl_platform.modalities.image import Image

CONFIG = Path(__file__).parents[1] / "configs/smoke/image.yaml"  # windows of 32 pixels, patches of 8


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pca") / "run"
    assert train.main([str(CONFIG), f"run_dir={folder}", "steps=1", "tensorboard=false"]) == 0
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """70 x 45 pixels: no multiple of the patch size."""
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_tokens_are_averaged_over_the_windows_that_hold_them(run_dir: Path, photo: Path, stride: int) -> None:
    encoder = Encoder.load(run_dir)
    assert isinstance(encoder.modality, Image)
    image = pca.read_image(photo, encoder.modality)
    found = pca.patch_map(encoder, image, stride, batch_size=3)
    assert found.shape == (5, 8, encoder.embed_dim)
    tokens: dict[tuple[int, int], list[torch.Tensor]] = {}
    for y in sorted({*range(0, 40 - 32, stride), 40 - 32}):
        for x in sorted({*range(0, 64 - 32, stride), 64 - 32}):
            patches = encoder(encoder.modality.preprocess(image[:, y : y + 32, x : x + 32])[None]).patches[0]
            for number, vector in enumerate(patches):
                tokens.setdefault((y // 8 + number // 4, x // 8 + number % 4), []).append(vector)
    assert len(tokens) == 40  # no patch is left out
    for place, vectors in tokens.items():
        np.testing.assert_allclose(found[place], torch.stack(vectors).mean(0).numpy(), atol=1e-5)


def test_colours_tell_regions_apart_and_constants_are_grey() -> None:
    rng = np.random.default_rng(1)
    features = np.repeat(np.eye(4, 16, dtype=np.float32)[:3] * 5, 6, axis=0).reshape(3, 6, 16)
    noisy = features + rng.normal(scale=0.01, size=features.shape).astype(np.float32)
    colours, shares = pca.component_colours(noisy)
    means = colours.reshape(3, 6, 3).mean(1)
    assert all(np.abs(means[a] - means[b]).max() > 100 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert 0.99 < sum(shares[:2]) <= 1
    grey, shares = pca.component_colours(np.ones((4, 5, 16), np.float32))
    assert (grey == 128).all() and sum(shares) == 0
    assert pca.component_colours(rng.normal(size=(4, 5, 2)).astype(np.float32))[0].shape == (4, 5, 3)


def test_the_command_draws_three_panels(run_dir: Path, photo: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(run_dir), "--image", str(photo), "--out", str(tmp_path / "out"), "--width", "128"]
    assert main(["pca", *options, "--device", "cpu", "--region", "0,0,64,40"]) == 0
    with Pillow.open(tmp_path / "out/photo.png") as picture:
        assert picture.size == (3 * 128 + 2 * 8, 24 + 80)
    result = json.loads((tmp_path / "out/pca.json").read_text())
    shares = result["images"][str(photo)]["variance_shares"]
    assert list(shares) == ["teacher, step 1", "random initialisation"]
    assert all(0 < sum(values) <= 1 for values in shares.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "12"], "--stride 12: give a multiple of 8 (the patch size) up to 32"),
        (["--region", "0,0,71,45"], "--region 0,0,71,45: give x0,y0,x1,y1 with x0 < x1 <= 70 and y0 < y1 <= 45"),
        (["--region", "0,0,40,31"], "photo.png: 31 x 40 pixels are less than a window, 32 x 32"),
        (["--device", "cuda:99"], "--device cuda:99: cannot be used"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, run_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--checkpoint", str(run_dir), "--image", str(photo), "--out", str(tmp_path / "out"), *options]
    assert main(["pca", *given]) == 2
    assert message in capsys.readouterr().err


def test_bad_images_are_named(run_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(photo.read_bytes()[:60])
    (tmp_path / "twin").mkdir()
    twin = tmp_path / "twin/photo.png"
    twin.write_bytes(photo.read_bytes())
    out = ["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), "--image"]
    for files, message in (
        ([damaged], f"{damaged}: "),
        (
            [photo, tmp_path / "none.png"],
            f"ssl-eval: --image {tmp_path}/none.png: no such file; paths are relative to ",
        ),
        ([photo, twin], "photo: two files of one name"),
    ):
        assert main(["pca", *out, *map(str, files)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out/pca.json").exists()
