"""ssl-pack slides, from raw slides to shards or to an index of places, as a user runs it."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch
from PIL import Image

from ssl_platform.config import validate
from ssl_platform.data.identity import lookup_folder
from ssl_platform.data.index import Index
from ssl_platform.data.order import Order
from ssl_platform.data.pack import main
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.shards import train_batches
from ssl_platform.data.slides import reading, tiles
from ssl_platform.data.slides.listing import SlideRow
from ssl_platform.data.slides.tiling import Options, SlidePlan, grid, plan_slide
from ssl_platform.modalities import pathology
from ssl_platform.views import Batch
from tests.packed import packed_images
from tests.whole_slides import LABEL_COLOUR, disk_share, pyramid, section, write_dicom, write_svs, write_tiff

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH = 1024, 1280
SMALL = ("--tile", 64, "--mask-mpp", 4)


def slides(*arguments: object) -> int:
    return main(["slides", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert slides(*arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err[captured.err.index("ssl-pack slides: ") :].strip()


def samples(folder: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    """(json, pixels (C, H, W)) of each sample, by slide and place."""
    return sorted(packed_images(folder), key=lambda item: (item[0]["slide"], item[0]["y"], item[0]["x"]))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides with tissue in the middle: a TIFF, an SVS below a folder with a name in Greek, a DICOM series."""
    folder = tmp_path_factory.mktemp("raw")
    write_tiff(folder / "Müller Anna.tif", pyramid(section(HEIGHT, WIDTH, 0), (1, 4)))
    write_svs(folder / "ασθενής" / "H-12 34.svs", pyramid(section(HEIGHT, WIDTH, 1), (1, 4)))
    write_dicom(folder / "series", pyramid(section(HEIGHT, WIDTH, 2), (1, 4)), patient="Meier^Berta")
    (folder / "notes.txt").write_text("no slide")
    return folder


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_folder_of_slides(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slides(raw, tmp_path / "out", *SMALL, "--preview", tmp_path / "looks") == 0
    said = capsys.readouterr().out
    packed = samples(tmp_path / "out")
    assert f"{len(packed)} samples in 1 shard" in said and "3 of 3 slides have tiles" in said
    index = Index.open(tmp_path / "out")
    assert len(index.group_names) == 3, "a slide is a group"
    for about, pixels in packed:
        assert pixels.shape == (3, 64, 64) and pixels.dtype == np.uint8
        assert about["level"] == 0 and about["mpp"] == 0.5
        box = [about["x"], about["y"], about["x"] + 128, about["y"] + 128]
        assert disk_share(HEIGHT, WIDTH, box) > 0.4
    for number, slide in enumerate(sorted({about["slide"] for about, _ in packed})):
        found = {(about["x"], about["y"]) for about, _ in packed if about["slide"] == slide}
        wanted = {
            (x, y)
            for x in range(0, WIDTH - 127, 128)
            for y in range(0, HEIGHT - 127, 128)
            if disk_share(HEIGHT, WIDTH, (x, y, x + 128, y + 128)) > 0.6
        }
        assert wanted <= found, number
    report = json.loads((tmp_path / "out" / "slides.json").read_text())["slides"]
    for about in report.values():
        assert about["places"] == 80 and about["places"] - about["tiles"] == sum(about["dropped"].values())
    assert sorted(path.stem for path in (tmp_path / "looks").iterdir()) == sorted(report)
    assert f"{3 * 80} places for tiles; dropped: {3 * 80 - len(packed)} too little tissue" in said


def test_the_pixels_are_the_slides(raw: Path, tmp_path: Path) -> None:
    assert slides(raw / "Müller Anna.tif", tmp_path / "out", *SMALL, "--mpp", 0.25, "--min-tissue", 0.9) == 0
    whole = section(HEIGHT, WIDTH, 0)
    for about, pixels in samples(tmp_path / "out"):
        x, y = about["x"], about["y"]
        assert (np.moveaxis(pixels, 0, -1) == whole[y : y + 64, x : x + 64]).all()


def test_label_and_macro_images_are_never_read(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: object) -> None:
        raise AssertionError("somebody looked at the images that show names")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(poisoned))
    arguments = (raw / "ασθενής", tmp_path / "out", *SMALL, "--min-tissue", 0, "--preview", tmp_path / "looks")
    assert slides(*arguments, "--normalize-stain", "macenko") == 0
    for _, pixels in samples(tmp_path / "out"):
        assert not (pixels == np.array(LABEL_COLOUR).reshape(3, 1, 1)).all(0).any()
    (look,) = (tmp_path / "looks").iterdir()
    assert not (np.asarray(Image.open(look)) == np.array(LABEL_COLOUR)).all(-1).any()


@pytest.mark.parametrize("more", [(), ("--index-only",)])
def test_names_stay_out_of_what_is_shared(raw: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """The slide's key does not give its name away, nor is what DICOM knows of the patient anywhere."""
    assert slides(raw, tmp_path / "out", *SMALL, "--preview", tmp_path / "looks", *more) == 0
    names = [name.encode() for name in ("Müller", "ασθενής", "H-12 34", "H-12_34", "Meier", "Berta")]
    for path in [*(tmp_path / "looks").rglob("*"), *(tmp_path / "out").rglob("*")]:
        text = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        assert not any(name in text or json.dumps(name.decode())[1:-1].encode() in text for name in names), path
    for about, _ in samples(tmp_path / "out"):
        assert len(about["slide"]) == 20 and set(about["slide"]) <= set("0123456789abcdef")


def with_salt_of(out: Path, other: Path) -> None:
    lookup_folder(other).mkdir(exist_ok=True)
    shutil.copy(lookup_folder(out) / "salt", lookup_folder(other) / "salt")


def test_equal_bytes_for_any_number_of_workers(raw: Path, tmp_path: Path) -> None:
    more = (*SMALL, "--samples-per-shard", 9, "--max-tiles-per-slide", 12, "--normalize-stain", "reinhard")
    assert slides(raw, tmp_path / "a", *more) == 0
    with_salt_of(tmp_path / "a", tmp_path / "b")
    assert slides(raw, tmp_path / "b", *more, "--workers", 2) == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_killed_run_goes_on_to_the_same_bytes(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the middle of the second shard; slides that were looked at are not looked at again."""
    more = [*map(str, SMALL), "--samples-per-shard", "20"]
    assert slides(raw, tmp_path / "whole", *more) == 0
    with_salt_of(tmp_path / "whole", tmp_path / "out")
    program = (
        "import os, signal, sys\n"
        "from ssl_platform.data import pack, tar_writing\n"
        "load, left = tar_writing._load, [25]\n"
        "def loading(*arguments):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return load(*arguments)\n"
        "tar_writing._load = loading\n"
        "pack.main(sys.argv[1:])\n"
    )
    command = ["slides", str(raw), str(tmp_path / "out"), *more]
    killed = subprocess.run([sys.executable, "-c", program, *command], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert "shard-000000.tar" in bytes_of(tmp_path / "out") and "index.json" not in bytes_of(tmp_path / "out")
    monkeypatch.setattr("ssl_platform.data.slides.planning.plan_slide", None)  # whoever calls it fails
    assert main(command) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# -- which tiles -------------------------------------------------------------------------------------------------------


def test_the_cap_is_a_choice_by_the_seed(raw: Path) -> None:
    row = SlideRow(raw / "Müller Anna.tif", "a", key="a")
    options = Options(tile=64, stride=64, mask_mpp=4)
    every, _ = plan_slide(row, options)
    chosen = [plan_slide(row, options._replace(max_tiles=5, seed=seed))[0] for seed in (0, 0, 1)]
    assert [len(plan.corners) for plan in chosen] == [5, 5, 5] and set(chosen[0].corners) < set(every.corners)
    assert chosen[0].corners == chosen[1].corners != chosen[2].corners
    assert chosen[0].dropped["above the cap"] == len(every.corners) - 5
    assert plan_slide(row, options._replace(max_tiles=10**6))[0].corners == every.corners


def test_grid_in_fractions_of_pixels() -> None:
    """At 0.3 microns for 0.25, a tile of 100 is 120 pixels wide; whole corners, no drift over a wide slide."""
    plan = SlidePlan("a", mpp=(0.25, 0.25), size=(100 * 0.33 / 0.25,) * 2)
    boxes = grid((10, 20, 1000, 264), plan, Options(mpp=0.33, tile=100, stride=50))
    assert sorted(set(boxes[:, 0])) == [10 + round(66 * number) for number in range(14)]
    assert sorted(set(boxes[:, 1])) == [20, 86, 152]
    assert boxes[:, 2].max() <= 1010.5 and boxes[:, 3].max() <= 284.5
    assert (boxes[:, 2] - boxes[:, 0] == 132).all()
    assert len(grid((0, 0, 131, 500), plan, Options(mpp=0.33, tile=100, stride=50))) == 0


def test_ink_is_dropped_and_counted(tmp_path: Path) -> None:
    image = section(HEIGHT, WIDTH)
    image[:, 640:768] = 30, 70, 190
    path = write_tiff(tmp_path / "a.tif", [image])
    options = Options(tile=64, stride=64, mask_mpp=4)
    plan, _ = plan_slide(SlideRow(path, "a", key="a"), options)
    assert plan.dropped["ink"] >= 8 and not any(512 < x < 768 for x, _ in plan.corners)
    kept, _ = plan_slide(SlideRow(path, "a", key="a"), options._replace(max_ink=1.0))
    assert kept.dropped["ink"] == 0 and len(kept.corners) >= len(plan.corners)


def test_blurred_and_unstained_tiles_are_dropped_when_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = section(HEIGHT, WIDTH)
    image[:, 640:] = np.where(image[:, 640:, 1:2] < 230, (190, 110, 170), (244, 244, 244))  # sharpness 0 inside
    write_tiff(tmp_path / "in" / "a.tif", [image])
    assert slides(tmp_path / "in", tmp_path / "all", *SMALL, "--min-tissue", 1) == 0
    assert slides(tmp_path / "in", tmp_path / "out", *SMALL, "--min-tissue", 1, "--min-sharpness", 20) == 0
    every, sharp = samples(tmp_path / "all"), samples(tmp_path / "out")
    assert {about["x"] < 640 for about, _ in sharp} == {True} and len(sharp) < len(every)
    num_blurred = len(every) - len(sharp)
    assert f"{num_blurred} blurred" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "index.json").read_text())["dropped"] == {"blurred": num_blurred}
    assert "4 are blurred" in refused(
        capsys, tmp_path / "in", tmp_path / "none", *SMALL, "--min-tissue", 1, "--min-sharpness", 1e6
    ), "nothing left"


def test_regions_and_labels(tmp_path: Path) -> None:
    write_tiff(tmp_path / "in" / "a.tif", [section(HEIGHT, WIDTH)])
    write_tiff(tmp_path / "in" / "b.tif", [section(HEIGHT, WIDTH, 1)])

    def square(name: str, x0: int, y0: int, x1: int, y1: int) -> dict[str, Any]:
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}

    for kind, regions in [
        ("include", [square("Region", 0, 0, WIDTH, 512)]),
        ("exclude", [square("Fold", 640, 0, WIDTH, HEIGHT), square("Bubble", 0, 0, 640, 300)]),
        ("labels", [square("Tumor", 0, 0, 512, HEIGHT), square("Stroma", 512, 0, WIDTH, HEIGHT)]),
    ]:
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": regions}))
    more = [part for kind in ("include", "exclude", "labels") for part in (f"--{kind}-geojson", tmp_path / kind)]
    assert slides(tmp_path / "in", tmp_path / "out", *SMALL, *more, "--seed", 3) == 0
    index = Index.open(tmp_path / "out")
    of_slide: dict[str, list[dict[str, Any]]] = {}
    for about, _ in samples(tmp_path / "out"):
        of_slide.setdefault(about["slide"], []).append(about)
    few, many = sorted(of_slide.values(), key=len)
    assert {(about["x"], about["y"]) for about in few} == {(512, 384), (384, 384)} and index.label_names == [
        "Stroma",
        "Tumor",
    ]
    assert {about["x"]: about["label"] for about in few} == {384: "Tumor", 512: "Stroma"}
    assert len(many) > 10 and {about["label"] for about in many} == {None}


def test_regions_of_a_cropped_slide_are_moved(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QuPath counts from the corner of what was scanned."""
    bounds = {"x": "100", "y": "50", "width": "900", "height": "700"}
    properties = {**reading.open_slide(raw / "Müller Anna.tif").properties}
    properties |= {f"openslide.bounds-{name}": value for name, value in bounds.items()}
    monkeypatch.setattr(openslide.OpenSlide, "properties", property(lambda self: properties))
    plan, mask = plan_slide(
        SlideRow(raw / "Müller Anna.tif", "a", key="a"), Options(tile=64, stride=64, mask_mpp=4, min_tissue=0)
    )
    assert mask is not None and mask.origin == (100, 50) and mask.image.shape[:2] == (44, 56)
    assert min(plan.corners) == (100, 50) and max(plan.corners) == (868, 562)
    whole = section(HEIGHT, WIDTH, 0)[50:750, 100:1000].astype(float)
    assert abs(mask.image.mean() - whole.mean()) < 1
    from ssl_platform.data.slides.tiling import _geojson_origin

    row = SlideRow(raw / "Müller Anna.tif", "a", key="a")
    assert _geojson_origin(row, Options()) == (100, 50)
    assert _geojson_origin(row, Options(uncropped_geojson=True)) == (0, 0)


# -- tables ------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, *rows: dict[str, object]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def test_a_table_knows_what_metadata_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiff(tmp_path / "in" / "a.tif", [section(HEIGHT, WIDTH)], mpp=None)
    write_tiff(tmp_path / "in" / "b.tif", [section(HEIGHT, WIDTH, 1)])
    table = write_csv(
        tmp_path / "slides.csv",
        {"path": "in/a.tif", "mpp": "0.5", "label": "ill", "patient": "P1", "scanner": "x"},
        {"path": "in/b.tif", "mpp": "", "label": "well", "patient": "P1", "scanner": "y"},
    )
    assert slides(table, tmp_path / "out", *SMALL, "--keep-columns", "scanner") == 0
    index, packed = Index.open(tmp_path / "out"), samples(tmp_path / "out")
    assert len(index.group_names) == 1 and index.label_names == ["ill", "well"]
    sizes = {
        about["scanner"]: {a["x"] % 64 for a, _ in packed if a["scanner"] == about["scanner"]} for about, _ in packed
    }
    assert sizes.keys() == {"x", "y"}
    read = [
        about["read"]["size"] for about in json.loads((tmp_path / "out" / "slides.json").read_text())["slides"].values()
    ]
    assert sorted(read) == [[64, 64], [128, 128]]
    assert all("patient" not in about for about, _ in packed)
    assert slides(tmp_path / "in", tmp_path / "other", *SMALL) == 1
    assert (
        "a.tif: its metadata does not say how many microns a pixel is wide; give --override-mpp"
        in capsys.readouterr().err
    )
    assert slides(tmp_path / "in", tmp_path / "third", *SMALL, "--override-mpp", 0.5) == 0


def test_patients(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [("Müller Anna", "P1"), ("ασθενής/H-12 34.svs", "P2"), ("level0", "P1")]
    patients = write_csv(tmp_path / "patients.csv", *({"slide": slide, "patient": who} for slide, who in given))
    assert slides(raw, tmp_path / "out", *SMALL, "--patients", patients) == 0
    index = Index.open(tmp_path / "out")
    assert len(index.group_names) == 2
    groups = np.bincount(index.groups)
    assert sorted(groups / groups.sum()) == pytest.approx([1 / 3, 2 / 3], abs=0.05)
    write_csv(patients, *({"slide": slide, "patient": who} for slide, who in given[:2]))
    assert "1 of 3 slides have no patient in it, the first is series/level0.dcm" in refused(
        capsys, raw, tmp_path / "new", "--patients", patients
    )
    write_csv(patients, {"slide": "a", "patient": "1"}, {"slide": "a", "patient": "2"})
    assert "line 3: a has two patients" in refused(capsys, raw, tmp_path / "new", "--patients", patients)
    write_csv(patients, {"slide": "a", "person": "1"})
    assert "line 1: no column 'patient'; needed are slide, patient; the columns are slide, person" in refused(
        capsys, raw, tmp_path / "new", "--patients", patients
    )


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_slides_are_named_and_empty_ones_are_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiff(tmp_path / "in" / "good.tif", [section(HEIGHT, WIDTH)])
    write_tiff(tmp_path / "in" / "glass.tif", [np.full((HEIGHT, WIDTH, 3), 243, np.uint8)])
    write_tiff(tmp_path / "in" / "tiny.tif", [np.full((40, 40, 3), 243, np.uint8)])
    assert slides(tmp_path / "in", tmp_path / "out", *SMALL) == 0
    said = capsys.readouterr()
    assert "left out: glass.tif: no tile of 80 is kept: 80 too little tissue" in said.err
    assert "left out: tiny.tif: smaller than one tile of 64 pixels at 0.5 microns" in said.err
    assert "1 of 3 slides have tiles, 2 have none" in said.out
    (tmp_path / "in" / "bad.svs").write_bytes((tmp_path / "in" / "good.tif").read_bytes()[:100])
    (tmp_path / "in" / "coarse.tif").write_bytes(b"")
    assert slides(tmp_path / "in", tmp_path / "more", *SMALL) == 1
    said = capsys.readouterr()
    assert "left out: bad.svs: cannot be opened as a slide" in said.err and "2 cannot be used (named above)" in said.out
    assert slides(tmp_path / "in", tmp_path / "third", *SMALL, "--allow-bad") == 0
    assert slides(tmp_path / "in", tmp_path / "third", *SMALL, "--allow-bad") == 0, "the same again"


def test_a_damaged_block_costs_its_tiles_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_svs(tmp_path / "in" / "a.svs", pyramid(section(HEIGHT, WIDTH), (1, 4)))
    data = bytearray(path.read_bytes())
    blocks = [place for place in range(len(data) - 1) if data[place : place + 2] == b"\xff\xd8"]
    start = blocks[2 * 5 + 2]  # the block at x 512, y 512 of level 0: two by two tiles
    data[start : start + 400] = b"\0" * 400
    path.write_bytes(bytes(data))
    assert slides(path, tmp_path / "out", "--tile", 128, "--mpp", 0.25, "--min-tissue", 0.1) == 1
    said = capsys.readouterr()
    assert "level 0 cannot be read at" in said.err and "left out: 4 that cannot be" in said.out
    assert len(samples(tmp_path / "out")) > 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nowhere", "out"), "nowhere: no such file or folder"),
        (("empty", "out"), "empty: no slide in this folder or below it (looked for svs, tif,"),
        (("in", "out", "--mpp", "0.1"), "scanned at 0.25 microns per pixel, too coarse for --mpp 0.1"),
        (("in", "out", "--unread"), "--unread: only with --index-only"),
        (("in", "out", "--unread", "--index-only", "--min-sharpness", "5"), "--unread: --min-stained and --min-sharp"),
        (("in", "out", "--labels-geojson", "nowhere"), "nowhere: no such file or folder"),
        (("in", "out", "--labels-geojson", "empty"), "has the name of a slide, such as a.geojson"),
        (("in", "out", "--include-geojson", "bad.geojson"), "bad.geojson: cannot be read as GeoJSON"),
        (("taken.csv", "out"), "column 'level': every tile gets a column of this name; rename yours"),
        (("mpp.csv", "out"), "in/a.tif: mpp is '20x', expected microns per pixel such as 0.25, or nothing"),
        (("twice.csv", "out"), "in/a.tif is there twice; a slide has one row"),
        (("region.csv", "out"), "in/a.tif: no such file: gone.geojson"),
        (("in", "bad.geojson"), "bad.geojson: is a file; expected a folder for the shards"),
    ],
)
def test_what_a_user_can_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Any, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiff(tmp_path / "in" / "a.tif", [section(512, 512)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.geojson").write_text("{")
    write_csv(tmp_path / "taken.csv", {"path": "in/a.tif", "level": 1})
    write_csv(tmp_path / "mpp.csv", {"path": "in/a.tif", "mpp": "20x"})
    write_csv(tmp_path / "twice.csv", {"path": "in/a.tif"}, {"path": "in/a.tif"})
    write_csv(tmp_path / "region.csv", {"path": "in/a.tif", "include": "gone.geojson"})
    assert reason in refused(capsys, *arguments)


def test_no_slide_ends_the_run_and_no_size_takes_all_memory(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, options = SlideRow(raw / "Müller Anna.tif", "a", key="a"), Options(tile=64, stride=64)
    monkeypatch.setattr("ssl_platform.data.slides.tiling.MOST_MASK_PIXELS", 100)
    assert "its mask would have 0 million pixels; raise --mask-mpp (now 8)" in plan_slide(row, options)[0].failed

    def broken(*_: object) -> None:
        raise RuntimeError("a library's own")

    monkeypatch.setattr("ssl_platform.data.slides.tiling.read_mask", broken)
    assert plan_slide(row, options)[0].failed == "RuntimeError: a library's own"


def test_errors_that_reach_a_runs_log_do_not_name_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "Meier.svs"
    path.write_bytes(b"II*")

    def failing(given: Path) -> None:
        raise openslide.OpenSlideError(f"Can't read {given} or Meier.svs")

    monkeypatch.setattr(openslide, "OpenSlide", failing)
    with pytest.raises(ValueError, match="^cannot be opened as a slide: Can't read the slide or the slide$"):
        reading.open_slide(path)


@pytest.mark.parametrize("option", ["--mpp=0", "--mpp=x", "--saturation=40,10", "--closing=-1", "--min-tissue=2"])
def test_options_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit):
        slides(tmp_path, tmp_path / "out", option)
    assert f"argument {option.split('=')[0]}: '{option.split('=')[1]}': expected" in capsys.readouterr().err


# -- stain -------------------------------------------------------------------------------------------------------------


def test_stain_is_normalised_by_slide_and_what_cannot_be_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed, strength in [("a", 0, 1.0), ("b", 1, 0.8)]:
        image = (section(HEIGHT, WIDTH, seed).astype(float) * strength).astype(np.uint8)
        write_tiff(tmp_path / "in" / f"{name}.tif", [image])
    write_tiff(tmp_path / "in" / "c.tif", [np.full((HEIGHT, WIDTH, 3), (200, 120, 160), np.uint8)])
    more = (*SMALL, "--min-tissue", 0.95, "--max-tiles-per-slide", 8)
    assert slides(tmp_path / "in", tmp_path / "plain", *more) == 0
    with_salt_of(tmp_path / "plain", tmp_path / "out")
    assert slides(tmp_path / "in", tmp_path / "out", *more, "--normalize-stain", "macenko") == 0
    assert "c.tif: its stain is not normalised: the pixels show one colour only" in capsys.readouterr().err

    def means(folder: Path) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {}
        for about, pixels in samples(folder):
            found.setdefault(about["slide"], []).append(pixels.mean((1, 2)))
        return {slide: np.mean(values, axis=0) for slide, values in found.items()}

    before, after = means(tmp_path / "plain"), means(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "slides.json").read_text())["slides"]
    one, two = (slide for slide, about in report.items() if about["read"]["stain"] is not None)
    (left,) = report.keys() - {one, two}
    assert np.abs(after[one] - after[two]).max() < np.abs(before[one] - before[two]).max() / 3
    assert (before[left] == after[left]).all()


# -- from the slides while training ------------------------------------------------------------------------------------


def batches(folder: Path, workers: int = 0) -> list[Batch]:
    index = Index.open(folder)
    crops = {"global": {"size": 32}, "local": {"size": 16, "num": 2}}
    config = validate(pathology.Config, {"patch_size": 8, "crops": crops})
    return list(
        train_batches(
            index,
            config.build(index.statistics),
            {},
            workers=workers,
            prefetch=1,
            seed=1,
            batch_size=8,
            first_step=0,
            last_step=4,
            order=Order.of_shards(index.shard_counts, 1, 2),
            cache_shards=4,
        )
    )


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    for one, two in zip(left, right, strict=True):
        assert one.keys == two.keys and one.ids.tolist() == two.ids.tolist() and one.replaced == two.replaced
        for name, group in one.groups.items():
            assert torch.equal(group.views, two.groups[name].views)


def test_training_from_the_slides_equals_training_from_shards(raw: Path, tmp_path: Path) -> None:
    """Order, seeds, statistics and pixels; with checks that drop tiles, stains, and other workers."""
    more = (*SMALL, "--samples-per-shard", 15, "--min-sharpness", 1700, "--normalize-stain", "macenko")
    assert slides(raw, tmp_path / "shards", *more) == 0
    with_salt_of(tmp_path / "shards", tmp_path / "index")
    assert slides(raw, tmp_path / "index", *more, "--index-only") == 0
    packed, index = (Index.open(tmp_path / name) for name in ("shards", "index"))
    assert packed.shard_counts == index.shard_counts and packed.statistics == index.statistics
    assert json.loads((tmp_path / "index" / "index.json").read_text())["dropped"]["blurred"] > 2
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.tar")) for name in ("shards", "index")]
    assert sizes[1] < sizes[0] / 3
    expected = batches(tmp_path / "shards")
    assert_equal(batches(tmp_path / "index"), expected)
    assert_equal(batches(tmp_path / "index", workers=2), expected)
    assert len(reading._open) <= reading.MAX_OPEN


def test_unread_places_are_found_in_no_time_and_read_all_the_same(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slides(raw, tmp_path / "read", *SMALL, "--index-only") == 0
    with_salt_of(tmp_path / "read", tmp_path / "unread")
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "read_tile", None)
        assert slides(raw, tmp_path / "unread", *SMALL, "--index-only", "--unread") == 0
    assert Index.open(tmp_path / "unread").statistics is None and Index.open(tmp_path / "read").statistics is not None
    for one, two in zip(samples(tmp_path / "read"), samples(tmp_path / "unread"), strict=True):
        assert one[0] == two[0] and (one[1] == two[1]).all()


def test_a_slide_that_is_gone_is_a_bad_sample_without_a_name(tmp_path: Path) -> None:
    for name in ("Meier", "b", "c"):
        write_tiff(tmp_path / "in" / f"{name}.tif", [section(512, 512)])
    assert slides(tmp_path / "in", tmp_path / "index", *SMALL, "--min-tissue", 0.1, "--index-only") == 0
    assert not any(batch.replaced for batch in batches(tmp_path / "index"))
    (tmp_path / "in" / "Meier.tif").write_bytes(b"damaged")
    reading._forget_all()
    replaced = [line for batch in batches(tmp_path / "index") for line in batch.replaced]
    assert replaced and all(
        line.endswith("cannot be opened as a slide: openslide knows no such format") for line in replaced
    )
    (lookup_folder(tmp_path / "index") / "slides.json").unlink()
    with pytest.raises(ValueError, match="shards made with --index-only need it to find their slides"):
        ShardReader(Index.open(tmp_path / "index"), 1).read(0)


@pytest.mark.usefixtures("new_salts")
def test_commands_on_an_index_of_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """verify reads the slides; what merge and prune write finds them, from shards of splits and beside pixels too."""
    write_tiff(tmp_path / "one" / "a.tif", pyramid(section(HEIGHT, WIDTH, 0), (1, 4)))
    for name in ("b", "c"):
        write_tiff(tmp_path / "two" / f"{name}.tif", [section(512, 512)])
    split = ("--split", "train=0.5", "val=0.5")
    assert slides(tmp_path / "one", tmp_path / "index", *SMALL, "--index-only") == 0
    assert slides(tmp_path / "two", tmp_path / "more", *SMALL, "--index-only", "--min-tissue", 0.1, *split) == 0
    assert slides(tmp_path / "one", tmp_path / "pixels", *SMALL) == 0

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    num_tiles, whole = len(Index.open(tmp_path / "index")), tmp_path / "whole"
    assert f"{num_tiles} decoded: nothing wrong" in run("verify", tmp_path / "index")
    assert f"{num_tiles} read" in run("inspect", tmp_path / "index", "--out", tmp_path / "report")
    folders = [tmp_path / "index", tmp_path / "more" / "train", tmp_path / "more" / "val", tmp_path / "pixels"]
    for _ in range(2):  # again: goes on
        run("merge", *folders, whole)
    half = tmp_path / "half"
    said = run("prune", whole, half, "--keep", 0.5)
    assert "mean 0." in said, "measured in the slides"
    expected = {(str(about), pixels.tobytes()) for folder in folders for about, pixels in samples(folder)}
    for folder in (whole, half):
        found = samples(folder)
        assert {(str(about), pixels.tobytes()) for about, pixels in found} <= expected
        assert f"{len(found)} decoded: nothing wrong" in run("verify", folder)
    assert len(samples(whole)) == sum(len(samples(folder)) for folder in folders)
    assert str(tmp_path) not in (whole / "slides.json").read_text(), "paths are in the look-up folder alone"
    assert lookup_folder(whole).stat().st_mode & 0o77 == 0
    (lookup_folder(half) / "slides.json").unlink()
    assert main(["verify", str(half)]) == 1
    assert "need it to find their slides" in capsys.readouterr().out
    assert main(["merge", str(half), str(tmp_path / "pixels"), str(tmp_path / "out"), "--allow-duplicate-keys"]) == 2
    said = capsys.readouterr().err.strip()
    assert "half.lookup/slides.json: No such file" in said and "need it to find their slides" in said


def test_a_slide_read_in_two_ways_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiff(tmp_path / "in" / "a.tif", pyramid(section(HEIGHT, WIDTH, 0), (1, 4)))
    assert slides(tmp_path / "in", tmp_path / "near", *SMALL, "--index-only") == 0
    with_salt_of(tmp_path / "near", tmp_path / "far")
    assert slides(tmp_path / "in", tmp_path / "far", *SMALL, "--index-only", "--mpp", 1) == 0
    command = ["merge", str(tmp_path / "near"), str(tmp_path / "far"), str(tmp_path / "out"), "--allow-duplicate-keys"]
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "in another way or place" in said and "give data.shards the list" in said
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_page_is_true(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the program of docs/modalities/pathology.md, as written, on small slides."""
    from ssl_platform import export, train
    from ssl_platform.data import pack

    page = (ROOT / "docs/modalities/pathology.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").symlink_to(raw)
    shutil.copy(ROOT / "configs/smoke/pathology.yaml", "my.yaml")
    mains = {"ssl-pack": pack.main, "ssl-train": train.main, "ssl-export": export.main}
    lines = [line.split() for line in page.splitlines() if line.startswith("    ssl-")]
    assert [line[0] for line in lines] == ["ssl-pack", "ssl-train", "ssl-export", "ssl-pack"]
    smaller = {
        "ssl-pack": ["--tile", "64"],
        "ssl-train": ["steps=2", "optim.lr.warmup_steps=1", "data.window_shards=1"],
    }
    for program, *arguments in lines:
        small = ["1" if word == "16" else word for word in arguments]
        assert not mains[program]([*small, *smaller.get(program, [])]), program
    exec(page[page.index("```python") + 9 : page.rindex("```")], {})
    assert np.load("features.npy").shape == (len(Index.open(tmp_path / "shards")), 32)
    assert np.isfinite(np.load("features.npy")).all()


def test_parts_of_an_array_and_splits_by_patient(raw: Path, tmp_path: Path) -> None:
    """Each part begins at other slides; together they make what one run makes. Splits read their slides, too."""
    more = (*SMALL, "--samples-per-shard", 9, "--split", "train=0.6", "val=0.4", "--index-only")
    assert slides(raw, tmp_path / "whole", *more) == 0
    with_salt_of(tmp_path / "whole", tmp_path / "out")
    for part in range(3):
        assert slides(raw, tmp_path / "out", *more, "--part", f"{part}/3") == 0
    for split in ("train", "val"):
        assert bytes_of(tmp_path / "out" / split) == bytes_of(tmp_path / "whole" / split)
        assert {pixels.shape for _, pixels in samples(tmp_path / "out" / split)} == {(3, 64, 64)}
    slides_of = [{about["slide"] for about, _ in samples(tmp_path / "out" / split)} for split in ("train", "val")]
    assert not slides_of[0] & slides_of[1] and len(slides_of[0] | slides_of[1]) == 3
