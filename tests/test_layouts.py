"""ssl-pack imagenet and the rest: public data sets as they are unpacked, here as tiny trees."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_platform.data import layouts
from ssl_platform.data.index import Index
from ssl_platform.data.pack import main


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def labels(folder: Path) -> dict[str, int]:
    counts: dict[str, int] = json.loads((folder / "index.json").read_text())["label_counts"]
    return counts


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout_explains_itself_and_refuses_another_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"ssl-pack {name} " in capsys.readouterr().out, "the docstring holds the command"
    (tmp_path / "readme.txt").write_text("nothing")
    assert main([name, str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ssl-pack {name}: {tmp_path}: not the layout of {name}: missing "), error
    assert "there is readme.txt" in error and not (tmp_path / "out").exists()
    assert main([name, str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'nowhere'}: no such folder; expected {name} as it is unpacked" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "ILSVRC/Data/CLS-LOC/"])
def test_imagenet(prefix: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number, name in enumerate(("train/n01/a", "train/n01/b", "train/n02/c", "val/n01/d", "val/n02/e")):
        image(data / f"{prefix}{name}.JPEG", number)
    assert main(["imagenet", str(data), str(tmp_path / "out")]) == 0
    assert labels(tmp_path / "out" / "train") == {"n01": 2, "n02": 1}
    assert labels(tmp_path / "out" / "val") == {"n01": 1, "n02": 1}
    assert main(["imagenet", str(data), str(tmp_path / "all"), "--without-splits"]) == 0
    assert labels(tmp_path / "all") == {"n01": 3, "n02": 2}
    assert main(["imagenet", str(data), str(tmp_path / "shares"), "--split", "a=0.5", "b=0.5"]) == 0
    assert sum(len(Index.open(tmp_path / "shares" / name)) for name in "ab") == 5


def test_imagenet_without_folders_in_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for number, name in enumerate(("train/n01/a", "train/n02/c", "val/v1", "val/v2")):
        image(data / f"ILSVRC/Data/CLS-LOC/{name}.JPEG", number)
    (data / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nv1,n02 1 2 3 4 \nv2,n01 1 2 3 4 n01 5 6 7 8 \n"
    )
    assert main(["imagenet", str(data), str(tmp_path / "out")]) == 0
    assert labels(tmp_path / "out" / "val") == {"n01": 1, "n02": 1}
    (data / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nv1,n02 1 2 3 4\n")
    assert main(["imagenet", str(data), str(tmp_path / "other")]) == 2
    assert "LOC_val_solution.csv: says no class of val/v2.JPEG and 0 more" in capsys.readouterr().err
