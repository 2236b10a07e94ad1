"""What belongs to which slide: patients and files of regions by name, and what is said of those that do not fit."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ssl_platform.data.pack import main
from ssl_platform.data.slides.listing import SlideRow, folder_slides, with_patients, with_regions
from ssl_platform.data.slides.tiling import Options, plan_slide
from tests.whole_slides import pyramid, section, write_dicom, write_tiff

HEIGHT, WIDTH = 512, 640


def rows(*names: str, folder: str = "raw") -> list[SlideRow]:
    return [SlideRow(Path(folder, name), name, key=str(number)) for number, name in enumerate(names)]


def area(x0: float, y0: float, x1: float, y1: float, name: str = "Tumor") -> dict[str, Any]:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": name}},
    }


def geojson(path: Path, *features: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


# -- slides of a folder ------------------------------------------------------------------------------------------------


def test_dicom_as_archives_name_it(tmp_path: Path) -> None:
    """No ending, or a number that is none; one slide for each series; the index of the disk is no slide."""
    for number in range(2):
        folder = write_dicom(tmp_path / "in" / str(number), pyramid(section(HEIGHT, WIDTH, number), (1, 4)))
        (folder / "level0.dcm").rename(folder / "IM0001")
        (folder / "level1.dcm").rename(folder / "1.2.840.10008.7")
    (tmp_path / "in" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "in" / "LICENSE").write_text("no slide")
    found = folder_slides(tmp_path / "in")
    assert [row.name for row in found] == ["0/1.2.840.10008.7", "1/1.2.840.10008.7"]
    plan, _ = plan_slide(found[0]._replace(key="k"), Options(tile=64, stride=64, mask_mpp=4, min_tissue=0.1))
    assert plan.mpp == pytest.approx((0.25, 0.25)) and len(plan.corners) > 3


# -- patients ----------------------------------------------------------------------------------------------------------


def test_an_entry_that_fits_two_slides_is_refused(tmp_path: Path) -> None:
    """Two hospitals have a slide 1: their patients are not the same person."""
    patients = table(tmp_path / "p.csv", "slide,patient", "1,P1")
    with pytest.raises(ValueError, match="p.csv: '1' fits x/1.svs and y/1.svs; use longer names there, or a table"):
        with_patients(rows("x/1.svs", "y/1.svs"), patients)
    table(patients, "slide,patient", "x/1.svs,P1", "y/1.svs,P2", "1,P3")
    assert [row.group for row in with_patients(rows("x/1.svs", "y/1.svs"), patients)] == ["P1", "P2"]


def test_slides_that_are_not_given_are_counted_and_a_line_twice_is_fine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = table(tmp_path / "p.csv", "slide,patient", "a,P1", "gone,P9", "b.svs,P1", "a,P1")
    monkeypatch.setattr(logging.getLogger("ssl_platform"), "propagate", True)
    with caplog.at_level(logging.INFO, "ssl_platform"):
        assert [row.group for row in with_patients(rows("a.svs", "b.svs"), patients)] == ["P1", "P1"]
    assert "p.csv: 1 of its slides are not among those given, the first is gone" in caplog.text


# -- regions -----------------------------------------------------------------------------------------------------------


def test_files_of_regions_are_told_that_fit_no_slide_and_slides_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b.svs", "misspelt"):
        geojson(tmp_path / "regions" / f"{name}.geojson", area(0, 0, 9, 9))
    monkeypatch.setattr(logging.getLogger("ssl_platform"), "propagate", True)
    for kind, what in (
        ("include", "all of their tissue is kept"),
        ("exclude", "nothing of them is excluded"),
        ("labels", "their tiles have no label"),
    ):
        caplog.clear()
        found = with_regions(rows("a.svs", "b.svs", "c.svs"), {kind: tmp_path / "regions"})
        assert [[path.name for _, path in row.regions] for row in found] == [["a.geojson"], ["b.svs.geojson"], []]
        assert f"regions: 1 of 3 slides have no file in it, the first is c.svs: {what}" in caplog.text
        assert "regions: 1 files are of no slide, the first is misspelt.geojson" in caplog.text


def test_files_that_could_be_of_another_slide_are_refused(tmp_path: Path) -> None:
    folder = geojson(tmp_path / "regions" / "1.geojson", area(0, 0, 9, 9)).parent
    with pytest.raises(ValueError, match="regions: '1' fits x/1.svs and y/1.svs"):
        with_regions(rows("x/1.svs", "y/1.svs"), {"labels": folder})
    own = [row._replace(regions=(("labels", Path("own.geojson")),)) for row in rows("1.svs")]
    with pytest.raises(ValueError, match=r"1.svs has its own file of regions \(labels\); leave out one or the other"):
        with_regions(own, {"labels": folder})
    geojson(folder / "1.json", area(0, 0, 9, 9))
    with pytest.raises(ValueError, match="regions: 1.geojson and 1.json are of the same slide; move one away"):
        with_regions(rows("1.svs"), {"labels": folder})


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiff(tmp_path_factory.mktemp("slide") / "Meier.tif", pyramid(section(HEIGHT, WIDTH), (1, 4)))


def notes(slide: Path, kind: str, path: Path) -> tuple[list[str], str, int]:
    plan, _ = plan_slide(
        SlideRow(slide, slide.name, key="k", regions=((kind, path),)),
        Options(tile=64, stride=64, mask_mpp=4, min_tissue=0.1),
    )
    assert not plan.failed and "Meier" not in str(plan.notes), "notes go into slides.json"
    return plan.notes, plan.left_out, len(plan.corners)


def test_a_slide_in_which_nothing_is_drawn_is_no_error(slide: Path, tmp_path: Path) -> None:
    empty = geojson(tmp_path / "Meier.geojson")
    for kind, verb in (("exclude", "exclude"), ("labels", "label")):
        said, _, num_tiles = notes(slide, kind, empty)
        assert said == [f"the file of its regions to {verb} has no Polygon or MultiPolygon, so there is none"]
        assert num_tiles > 3
    _, left_out, num_tiles = notes(slide, "include", empty)
    assert num_tiles == 0 and "outside the included regions" in left_out


def test_regions_outside_of_the_slide_are_noted(slide: Path, tmp_path: Path) -> None:
    path = geojson(tmp_path / "Meier.geojson", area(5000, 5000, 6000, 6000), area(0, 0, 100, 100))
    assert notes(slide, "labels", path)[0] == [
        f"99 % of its regions to label lie outside of its {WIDTH} x {HEIGHT} pixels: were they drawn on another slide, "
        "or in other units than pixels of level 0?"
    ]
    assert notes(slide, "labels", geojson(path, area(-9, 0, WIDTH + 9, HEIGHT)))[0] == [], "a hand slipped"


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_shows_the_options_of_the_latest_command(slide: Path, tmp_path: Path) -> None:
    """There and back again: the slide is remembered, its picture has been overwritten."""
    looks, seen = tmp_path / "looks", []
    for share in ("0.1", "0.9", "0.1"):
        common = [
            "slides",
            str(slide),
            str(tmp_path / "out"),
            "--tile",
            "64",
            "--mask-mpp",
            "4",
            "--preview",
            str(looks),
        ]
        main([*common, "--min-tissue", share])
        (picture,) = looks.iterdir()
        seen.append(picture.read_bytes())
    assert seen[0] == seen[2] != seen[1]
