"""ssl-pack pcam, kather100k, camelyon17-wilds and camelyon: tiny trees in the layouts that are downloaded."""

import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ssl_platform.data.index import Index
from ssl_platform.data.layouts import kather100k
from ssl_platform.data.pack import main
from ssl_platform.data.slides.regions import read_regions
from tests.packed import packed_images
from tests.test_layouts import image, labels
from tests.whole_slides import pyramid, section, write_tiff


def pack(*arguments: object) -> int:
    return main([*map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert pack(*arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not Path(str(arguments[2]), "index.json").exists()
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -- PCam --------------------------------------------------------------------------------------------------------------


def pcam(folder: Path, split: str, num_tiles: int, meta: bool = True, **more: Any) -> np.ndarray:
    """Writes the files of a split; returns its tiles (N, 96, 96, 3), of which every second is tumour."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(split))
    tiles = rng.integers(0, 256, (num_tiles, 96, 96, 3), np.uint8)
    name = f"camelyonpatch_level_2_split_{split}"
    with h5py.File(folder / f"{name}_x.h5", "w") as file:
        file.create_dataset("x", data=tiles, **more)
    with h5py.File(folder / f"{name}_y.h5", "w") as file:
        file["y"] = (np.arange(num_tiles) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
    if meta:
        rows = [f"{i},{20 * i},{7 * i},True,camelyon16_{split}_{i // 4},{bool(i % 2)}" for i in range(num_tiles)]
        header = ",coord_x,coord_y,tumor_patch,wsi,center_tumor_patch"
        (folder / f"{name}_meta.csv").write_text("\n".join([header, *rows]) + "\n")
    return tiles


def test_pcam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    tiles = {split: pcam(data, split, count) for split, count in (("train", 12), ("valid", 4), ("test", 5))}
    assert pack("pcam", data, tmp_path / "out", "--samples-per-shard", 5) == 0
    assert labels(tmp_path / "out" / "train") == {"normal": 6, "tumor": 6}
    assert labels(tmp_path / "out" / "test") == {"normal": 3, "tumor": 2}
    assert len(Index.open(tmp_path / "out" / "train").group_names) == 3, "four tiles of each slide"
    for split, of_split in tiles.items():
        packed = packed_images(tmp_path / "out" / split)
        assert len(packed) == len(of_split)
        for about, pixels in packed:
            (row,) = np.flatnonzero((of_split.transpose(0, 3, 1, 2) == pixels).all((1, 2, 3)))
            assert about["label"] == ("normal", "tumor")[row % 2] and about["tumor_patch"] == "True"
            assert not {"path", "coord_x", "wsi"} & about.keys()
    index = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert index["statistics"]["mean"] == pytest.approx((tiles["train"] / 255).mean((0, 1, 2)))
    assert "no sample has a group" not in capsys.readouterr().err


def test_pcam_by_several_processes(tmp_path: Path) -> None:
    """The handle of the file that the first process measured tiles with is not theirs."""
    pcam(tmp_path / "data", "train", 40, chunks=(8, 96, 96, 3), compression="gzip")
    for out, workers in (("one", 1), ("three", 3)):
        options = ("--samples-per-shard", 5, "--workers", workers, "--plain-names")
        assert pack("pcam", tmp_path / "data", tmp_path / out, *options) == 0
    one, three = tmp_path / "one" / "train", tmp_path / "three" / "train"
    assert contents(one) == contents(three) and len(contents(one)) > 8
    paths = {about["path"] for about, _ in packed_images(one)}
    assert paths == {f"camelyonpatch_level_2_split_train_x.h5/x/{row}" for row in range(40)}
    assert {about["coord_x"] for about, _ in packed_images(one)} == {str(20 * row) for row in range(40)}


def test_pcam_without_meta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pcam(tmp_path / "data", "test", 4, meta=False)
    assert pack("pcam", tmp_path / "data", tmp_path / "out") == 0
    assert "camelyonpatch_level_2_split_test_meta.csv: not there, so tiles have no group" in capsys.readouterr().err
    assert Index.open(tmp_path / "out" / "test").group_names == []


def test_pcam_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    pcam(data, "train", 6)
    x, y, meta = (data / f"camelyonpatch_level_2_split_train_{kind}" for kind in ("x.h5", "y.h5", "meta.csv"))
    whole = {path: path.read_bytes() for path in (x, y, meta)}

    def after(change: object) -> str:
        message = refused(capsys, "pcam", data, tmp_path / "out")
        for path, content in whole.items():
            path.write_bytes(content)
        return message

    x.write_bytes(whole[x][: len(whole[x]) // 2])
    message = after("truncated")
    assert f"{x}: cannot be read as HDF5" in message and "download and unpack it again" in message
    x.write_bytes(b"<html>too many requests</html>")
    assert f"{x}: cannot be read as HDF5" in after("a page of the server")
    with h5py.File(x, "w") as file:
        file["x"] = np.zeros((6, 96, 96), np.uint8)
    assert "'x' has uint8 values of shape (6, 96, 96); expected uint8 (N, 96, 96, 3)" in after("grey")
    with h5py.File(x, "w") as file:
        file["x"] = np.zeros((5, 96, 96, 3), np.uint8)
    assert f"{x}: 5 tiles, but camelyonpatch_level_2_split_train_y.h5 has 6 labels" in after("fewer tiles")
    with h5py.File(x, "w") as file:
        file["images"] = np.zeros((6, 96, 96, 3), np.uint8)
    assert f"{x}: no data set 'x' in it; there is images" in after("another name")
    with h5py.File(y, "w") as file:
        file["y"] = np.zeros((6, 2), np.uint8)
    assert "'y' has uint8 values of shape (6, 2); expected uint8 (N, 1, 1, 1)" in after("two labels each")
    with h5py.File(y, "w") as file:
        file["y"] = np.arange(6, dtype=np.uint8).reshape(-1, 1, 1, 1)
    assert f"{y}: holds the label 2; expected 0 (normal) and 1 (tumor)" in after("six classes")
    meta.write_text("a,b\n")
    assert f"{meta}: no column wsi; the columns are a, b" in after("another table")
    meta.write_bytes(b"".join(whole[meta].splitlines(keepends=True)[:-1]))
    assert f"{meta}: 5 rows, but there are 6 tiles" in after("a row less")
    y.unlink()
    assert "not the layout of pcam: missing camelyonpatch_level_2_split_train_y.h5; there is" in after("no labels")
    x.unlink()
    (data / f"{x.name}.gz").write_bytes(gzip.compress(whole[x]))
    assert f"{x}.gz: is compressed; unpack it: gunzip --keep {x}.gz" in after("compressed")


def test_pcam_says_when_meta_and_labels_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pcam(tmp_path / "data", "train", 6)
    meta = tmp_path / "data" / "camelyonpatch_level_2_split_train_meta.csv"
    meta.write_text(meta.read_text().replace(",False", ",True"))
    assert pack("pcam", tmp_path / "data", tmp_path / "out") == 0
    assert "train: 3 of 6 rows have another label than y, which counts" in capsys.readouterr().err


def test_h5_files_need_h5py(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pcam(tmp_path / "data", "train", 2)
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = refused(capsys, "pcam", tmp_path / "data", tmp_path / "out")
    assert "HDF5 files need h5py" in message and "pip install 'ssl-platform[h5]'" in message


# -- Kather-100K -------------------------------------------------------------------------------------------------------


def kather(folder: Path, num_images: int = 1) -> None:
    for number, name in enumerate(kather100k.CLASSES):
        for place in range(num_images):
            image(folder / name / f"{name}-{place}.tif", 100 * number + place)


def test_kather100k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    kather(data / "NCT-CRC-HE-100K-NONORM", 2)
    kather(data / "CRC-VAL-HE-7K")
    image(data / "CRC-VAL-HE-7K" / "looks" / "page.png", 0)
    assert pack("kather100k", data, tmp_path / "out") == 0
    assert "1 images in no class's folder are passed over, as looks/page.png" in capsys.readouterr().err
    assert labels(tmp_path / "out" / "train") == dict.fromkeys(kather100k.CLASSES, 2)
    assert labels(tmp_path / "out" / "val") == dict.fromkeys(kather100k.CLASSES, 1)
    assert pack("kather100k", data / "CRC-VAL-HE-7K", tmp_path / "alone") == 0
    assert labels(tmp_path / "alone") == dict.fromkeys(kather100k.CLASSES, 1)
    shutil.rmtree(data / "CRC-VAL-HE-7K")
    assert pack("kather100k", data, tmp_path / "train") == 0
    assert "holds only NCT-CRC-HE-100K-NONORM, so there are no splits" in capsys.readouterr().err
    assert labels(tmp_path / "train") == dict.fromkeys(kather100k.CLASSES, 2)


def test_kather100k_that_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    kather(data / "NCT-CRC-HE-100K")
    (data / "NCT-CRC-HE-100K" / "STR" / "STR-0.tif").unlink()
    message = refused(capsys, "kather100k", data, tmp_path / "out")
    assert f"{data / 'NCT-CRC-HE-100K' / 'STR'}: no image in it; unpack the archive again" in message
    (data / "NCT-CRC-HE-100K" / "STR").rmdir()
    message = refused(capsys, "kather100k", data, tmp_path / "out")
    assert "NCT-CRC-HE-100K: not the layout of kather100k: missing STR/; there is ADI/" in message
    kather(data / "NCT-CRC-HE-100K")
    kather(data / "NCT-CRC-HE-100K-NONORM")
    message = refused(capsys, "kather100k", data, tmp_path / "out")
    assert "holds NCT-CRC-HE-100K and NCT-CRC-HE-100K-NONORM, the same tiles twice; give one of them" in message
    shutil.rmtree(data / "NCT-CRC-HE-100K-NONORM")
    (data / "NCT-CRC-HE-100K" / "TUM" / "TUM-0.tif").write_bytes(b"II*\0")
    assert pack("kather100k", data, tmp_path / "bad") == 1
    assert "left out: NCT-CRC-HE-100K/TUM/TUM-0.tif: " in capsys.readouterr().err


# -- Camelyon17-WILDS --------------------------------------------------------------------------------------------------


def wilds(folder: Path, rows: Sequence[tuple[str, int, int, int]], header: str = "") -> None:
    """(patient, tumor, center, split) of each tile, which lies at x 3328, y of its line."""
    lines = [header or ",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for number, (patient, tumor, center, split) in enumerate(rows):
        lines.append(f"{number},{patient},4,3328,{number},{tumor},0,{center},{split}")
        slide = f"patient_{patient.zfill(3)}_node_4"
        image(folder / "patches" / slide / f"patch_{slide}_x_3328_y_{number}.png", number)
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def test_camelyon17_wilds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Patients keep together although the data set holds back some of their tiles; a lost zero is found again."""
    data = tmp_path / "data"
    wilds(
        data, [("004", 1, 0, 0), ("004", 0, 0, 1), ("020", 1, 1, 0), ("9", 0, 0, 0), ("042", 0, 2, 0), ("042", 1, 2, 1)]
    )
    assert pack("camelyon17-wilds", data, tmp_path / "out") == 0
    found = {split: packed_images(tmp_path / "out" / split) for split in ("train", "val", "test")}
    assert {split: len(tiles) for split, tiles in found.items()} == {"train": 3, "val": 1, "test": 2}
    assert sorted((about["label"], about["center"], about["wilds_split"]) for about, _ in found["train"]) == [
        ("normal", "0", "0"), ("normal", "0", "1"), ("tumor", "0", "0"),
    ]  # fmt: skip
    assert len(Index.open(tmp_path / "out" / "train").group_names) == 2
    (data / "patches" / "patient_020_node_4" / "patch_patient_020_node_4_x_3328_y_2.png").unlink()
    assert pack("camelyon17-wilds", data, tmp_path / "all", "--without-splits") == 1
    assert "patch_patient_020_node_4_x_3328_y_2.png: No such file or directory" in capsys.readouterr().err
    assert len(Index.open(tmp_path / "all")) == 5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("x1", 0, 0, 0), "line 3 cannot be used (invalid literal for int()"),
        (("004", 2, 0, 0), "line 3 cannot be used (tumor is 2): expected whole numbers in patient, node"),
        (("004", 0, 7, 0), "line 3 cannot be used (7): expected whole numbers"),
    ],
)
def test_camelyon17_wilds_with_bad_lines(
    row: tuple[str, int, int, int], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wilds(tmp_path / "data", [("004", 1, 0, 0), row])
    message = refused(capsys, "camelyon17-wilds", tmp_path / "data", tmp_path / "out")
    assert f"{tmp_path / 'data' / 'metadata.csv'}: {reason}" in message


def test_camelyon17_wilds_with_another_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wilds(tmp_path / "data", [("004", 1, 0, 0)], header="patient,node")
    message = refused(capsys, "camelyon17-wilds", tmp_path / "data", tmp_path / "out")
    assert "metadata.csv: no column x_coord; the columns are patient, node" in message
    (tmp_path / "data" / "metadata.csv").write_text("patient,node,x_coord,y_coord,tumor,slide,center,split\n")
    assert "no row below the header" in refused(capsys, "camelyon17-wilds", tmp_path / "data", tmp_path / "out")
    shutil.rmtree(tmp_path / "data" / "patches")
    message = refused(capsys, "camelyon17-wilds", tmp_path / "data", tmp_path / "out")
    assert "not the layout of camelyon17-wilds: missing patches/; there is metadata.csv" in message


# -- Camelyon16 and Camelyon17 -----------------------------------------------------------------------------------------

SIZE = 768
TILES = ("--tile", 32, "--mask-mpp", 4)
SIDE = 64
"""Of a tile in pixels of level 0: its mpp is 0.5, the slide's 0.25."""


def slide(path: Path, seed: int) -> Path:
    return write_tiff(path, pyramid(section(SIZE, SIZE, seed), (1, 4)))


def square(x0: float, y0: float, x1: float, y1: float, group: str) -> str:
    """An annotation as ASAP writes it."""
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    places = "".join(f'<Coordinate Order="{number}" X="{x}" Y="{y}" />' for number, (x, y) in enumerate(corners))
    return annotation(group, places)


def annotation(group: str, coordinates: str) -> str:
    about = f'Name="A" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58"'
    return f"<Annotation {about}><Coordinates>{coordinates}</Coordinates></Annotation>"


def annotations(path: Path, *contents: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    group = '<Group Name="_0" PartOfGroup="None" Color="#00ff00"><Attributes /></Group>'
    text = f"<Annotations>{''.join(contents)}</Annotations><AnnotationGroups>{group}</AnnotationGroups>"
    path.write_text(f'<?xml version="1.0"?>\n<ASAP_Annotations>{text}</ASAP_Annotations>')
    return path


UPPER_HALF = (0, 0, SIZE, SIZE // 2)


@pytest.fixture(scope="module")
def camelyon16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides for training and two for testing; the upper half of those with a tumour is annotated."""
    data = tmp_path_factory.mktemp("camelyon16")
    slide(data / "training" / "normal" / "normal_001.tif", 0)
    slide(data / "training" / "tumor" / "tumor_001.tif", 1)
    slide(data / "testing" / "images" / "test_001.tif", 2)
    slide(data / "testing" / "images" / "test_003.tif", 3)
    annotations(data / "training" / "lesion_annotations" / "tumor_001.xml", square(*UPPER_HALF, "_0"))
    annotations(data / "testing" / "lesion_annotations" / "Test_001.xml", square(*UPPER_HALF, "Tumor"))
    (data / "testing" / "reference.csv").write_text("test_001,Tumor,IDC,Macro\ntest_003,Normal,None,None\n")
    (data / "training" / "lesion_annotations.zip").write_bytes(b"PK")
    return data


def by_slide_label(folder: Path) -> dict[str, set[str | None]]:
    """Which labels the tiles of slides with each label have."""
    found: dict[str, set[str | None]] = {}
    for about, _ in packed_images(folder):
        found.setdefault(about["slide_label"], set()).add(about["label"])
    return found


def test_camelyon16(camelyon16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("camelyon", camelyon16, tmp_path / "out", *TILES, "--workers", 2)
    assert pack(*command) == 0
    said = capsys.readouterr()
    assert "4 of 4 slides have tiles" in said.out
    assert "lesion_annotations.zip: an archive (of 1) that is not looked into; unpack it" in said.err
    for split in ("train", "test"):
        out = tmp_path / "out" / split
        assert by_slide_label(out) == {"normal": {"normal"}, "tumor": {"tumor", None}}
        for about, _ in packed_images(out):
            if about["slide_label"] == "tumor":
                assert about["label"] == ("tumor" if about["y"] + SIDE <= SIZE // 2 else None)
        assert len(Index.open(out).group_names) == 2, "a slide is a group"
        assert (out / "slides.json").exists()
    before = contents(tmp_path / "out" / "train")
    assert pack(*command) == 0 and contents(tmp_path / "out" / "train") == before


def test_camelyon16_by_other_labels(camelyon16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (*TILES, "--without-splits")
    out = tmp_path / "out"
    assert pack("camelyon", camelyon16, out, *options, "--normal-outside") == 0
    assert by_slide_label(out) == {"normal": {"normal"}, "tumor": {"tumor", "normal"}}
    assert pack("camelyon", camelyon16, tmp_path / "slide", *options, "--labels", "slide") == 0
    assert by_slide_label(tmp_path / "slide") == {"normal": {"normal"}, "tumor": {"tumor"}}
    assert pack("camelyon", camelyon16, out, *options) == 2
    message = capsys.readouterr().err
    assert "out: holds shards of another plan, which differs in " in message
    assert "camelyon.normal_outside (true, now false)" in message
    options = (*options, "--labels", "slide", "--normal-outside")
    assert "--normal-outside: says nothing with --labels slide" in refused(
        capsys, "camelyon", camelyon16, tmp_path / "bad", *options
    )
    options = (*TILES, "--without-splits", "--split", "a=.5", "b=.5")
    assert "--without-splits and --split: one or the other" in refused(
        capsys, "camelyon", camelyon16, tmp_path / "bad", *options
    )


def test_camelyon17(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slides in folders of centres, flat or by patient; a patient is a group, and the number says whose."""
    data = tmp_path / "data"
    slide(data / "training" / "center_0" / "patient_000_node_0.tif", 0)
    slide(data / "training" / "center_0" / "patient_000" / "patient_000_node_1.tif", 1)
    slide(data / "training" / "images" / "patient_021_node_3.tif", 2)
    slide(data / "testing" / "patient_100" / "patient_100_node_0.tif", 3)
    annotations(data / "training" / "lesion_annotations" / "patient_021_node_3.xml", square(*UPPER_HALF, "metastases"))
    table = data / "training" / "stage_labels.csv"
    rows = ["000.zip,pN0(i+)", "000_node_0.tif,negative", "000_node_1.tif,itc", "021.zip,pN1", "021_node_3.tif,macro"]
    table.write_text("patient,stage\n" + "".join(f"patient_{row}\n" for row in rows))
    assert pack("camelyon", data, tmp_path / "out", *TILES) == 0
    said = capsys.readouterr().err
    assert (
        "1 slides have no label, the first is patient_100_node_0: reference.csv (Camelyon16) and stage_labels.csv"
        in said
    )
    assert "1 of 2 slides with metastases have no annotation (lesion_annotations/patient_000_node_1.xml, ...)" in said
    assert by_slide_label(tmp_path / "out" / "train") == {
        "negative": {"normal"},
        "itc": {None},
        "macro": {"tumor", None},
    }
    train = packed_images(tmp_path / "out" / "train")
    assert {(about["slide_label"], about["center"]) for about, _ in train} == {
        ("negative", "0"), ("itc", "0"), ("macro", "1"),
    }  # fmt: skip
    assert len(Index.open(tmp_path / "out" / "train").group_names) == 2, "nodes of a patient"
    (about, _), *_ = packed_images(tmp_path / "out" / "test")
    assert about["label"] is None and "center" not in about
    table.write_text("patient,stage\npatient_000_node_0.tif,pN0\n")
    message = refused(capsys, "camelyon", data, tmp_path / "bad", *TILES)
    assert f"{table}: patient_000_node_0.tif: the label is 'pN0'; expected one of normal, tumor, negative" in message
    table.write_bytes(b"\xff\xfe\x00")
    assert f"{table}: cannot be read as a table" in refused(capsys, "camelyon", data, tmp_path / "bad", *TILES)
    slide(data / "patient_000_node_0.tif", 0)
    message = refused(capsys, "camelyon", data, tmp_path / "bad", *TILES)
    assert "patient_000_node_0.tif has the same name; a slide has one file: move one away" in message


def test_camelyon_with_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data" / "training"
    slide(data / "normal" / "normal_001.tif", 0)
    (data / "normal" / "normal_002.tif").write_bytes((data / "normal" / "normal_001.tif").read_bytes()[:3000])
    slide(data / "tumor" / "tumor_001.tif", 1)
    drawn = annotations(data / "lesion_annotations" / "tumor_001.xml", annotation("_0", ""))
    assert pack("camelyon", tmp_path / "data", tmp_path / "out", *TILES) == 1
    said = capsys.readouterr()
    assert "left out: training/normal/normal_002.tif: " in said.err
    assert f"left out: training/tumor/tumor_001.tif: {drawn}: no area in it: expected Annotation elements" in said.err
    assert "1 of 3 slides have tiles, 2 cannot be used (named above)" in said.out
    annotations(drawn, square(*UPPER_HALF, "_0"))
    assert pack("camelyon", tmp_path / "data", tmp_path / "again", *TILES, "--allow-bad") == 0
    assert labels(tmp_path / "again" / "train").keys() == {"normal", "tumor"}


# -- ASAP's regions ----------------------------------------------------------------------------------------------------


def test_asap_groups_and_holes(tmp_path: Path) -> None:
    """Order counts, not the place in the file; what lies in holes is no tumour."""
    corners = [(3, 0, 10), (0, 0, 0), (2, 10, 10), (1, 10, 0)]
    mixed = "".join(f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, x, y in corners)
    point = '<Coordinate Order="0" X="5" Y="5" />'
    path = annotations(
        tmp_path / "a.xml",
        annotation("_0", mixed),
        square(20.5, 0, 30.5, 10, "_1"),
        square(5, 5, 25.5, 10, "_2"),
        square(50, 50, 60, 60, "Stroma"),
        square(70, 70, 80, 80, "None"),
        annotation("Tumor", point),
    )
    areas = read_regions(path, (1000, 1000))
    assert areas.keys() == {"tumor", "Stroma", ""}
    assert areas["tumor"].area == pytest.approx(100 - 25 + 100 - 25)
    assert areas["tumor"].bounds == (0, 0, 30.5, 10), "ASAP counts from the corner of the whole slide"
    crossed = '<Coordinate X="0" Y="0" /><Coordinate X="4" Y="4" /><Coordinate X="4" Y="0" /><Coordinate X="0" Y="4" />'
    assert read_regions(annotations(tmp_path / "b.xml", annotation("Tumor", crossed)))["tumor"].area == pytest.approx(8)
    spiked = crossed + '<Coordinate X="0" Y="8" /><Coordinate X="0" Y="4" />'
    assert read_regions(annotations(tmp_path / "c.xml", annotation("Tumor", spiked)))["tumor"].area == pytest.approx(8)


def test_asap_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tumor_001.xml"

    def reason() -> str:
        with pytest.raises(ValueError) as raised:
            read_regions(path)
        return str(raised.value)

    assert reason() == f"{path}: cannot be read as ASAP's XML (No such file or directory)"
    path.write_text("<ASAP_Annotations><Annotations>")
    assert f"{path}: cannot be read as ASAP's XML (no element found: line 1" in reason()
    annotations(path)
    assert f"{path}: no area in it: expected Annotation elements with at least three Coordinate" in reason()
    annotations(path, square(0, 0, 9, 9, "_2"))
    assert "of another group than holes; delete the file if nothing is drawn" in reason()
    annotations(path, annotation("_0", '<Coordinate Order="0" X="1" />'))
    assert f"{path}: annotation 0 has a Coordinate whose X or Y is no number" in reason()
    annotations(path, square(0, 0, 9, 9, "_0"), square(0, float("inf"), 9, 9, "_0"))
    assert f"{path}: annotation 1 has a Coordinate whose X or Y is no number" in reason()
    bomb = "".join(f'<!ENTITY e{n} "{"".join(f"&e{n - 1};" for _ in range(10))}">' for n in range(1, 12))
    path.write_text(f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e0 "lol">{bomb}]><a>&e11;</a>')
    assert f"{path}: cannot be read as ASAP's XML (" in reason()


def test_a_table_of_slides_may_name_asap_files(tmp_path: Path) -> None:
    slide(tmp_path / "s.tif", 0)
    annotations(tmp_path / "s.xml", square(*UPPER_HALF, "_0"))
    (tmp_path / "slides.csv").write_text("path,labels\ns.tif,s.xml\n")
    assert pack("slides", tmp_path / "slides.csv", tmp_path / "out", *TILES) == 0
    assert labels(tmp_path / "out").keys() == {"tumor"}


def test_a_table_of_slides_may_say_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate("ab"):
        slide(tmp_path / f"{name}.tif", number)
    table, out = tmp_path / "slides.csv", tmp_path / "out"
    table.write_text("path,split\na.tif,train\nb.tif,held-out\n")
    assert pack("slides", table, out, *TILES, "--split", "column") == 0
    assert {path.parent.name for path in out.glob("*/index.json")} == {"train", "held-out"}
    message = refused(capsys, "slides", tmp_path / "a.tif", tmp_path / "bad", *TILES, "--split", "column")
    assert "--split column: only with a table, which has a column split" in message
