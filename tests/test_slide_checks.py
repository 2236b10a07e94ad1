"""What of a slide is kept: tissue, ink, blur, regions and stains, each against a written-out reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFilter

from ssl_platform.data.slides import regions, stain
from ssl_platform.data.slides.checks import ink_mask, otsu, shares, sharpness, tissue_mask
from tests.whole_slides import section

# -- tissue ------------------------------------------------------------------------------------------------------------


def plain(*colour: int, size: int = 12) -> np.ndarray:
    return np.full((size, size, 3), colour, np.uint8)


def no_ink(image: np.ndarray) -> np.ndarray:
    return np.zeros(image.shape[:2], bool)


def slow_otsu(values: np.ndarray) -> float:
    """Every threshold tried."""
    scores = []
    for threshold in range(256):
        low, high = values[values <= threshold].astype(float), values[values > threshold].astype(float)
        scores.append(len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0)
    best = np.flatnonzero(np.isclose(scores, max(scores), rtol=1e-12, atol=0))
    return float(best.mean()) if max(scores) > 0 else float(values.max(initial=0))


@given(arrays.arrays(np.uint8, st.integers(1, 40)))
@settings(max_examples=60, deadline=None)
def test_otsu_has_the_largest_variance_between_its_classes(values: np.ndarray) -> None:
    found, wanted = otsu(values), slow_otsu(values)
    low, high = values > found, values > wanted
    assert (low == high).all() or np.isclose(found, wanted), (found, wanted)


def test_tissue_of_a_section_is_its_disk() -> None:
    image = section(200, 240)
    y, x = np.mgrid[:200, :240]
    disk = np.hypot(y - 100, x - 120) < 50
    mask, threshold = tissue_mask(image, ink_mask(image), (10, 40), closing=3)
    assert 10 <= threshold <= 40
    assert (mask & disk).sum() / (mask | disk).sum() > 0.97


def test_an_empty_slide_has_no_tissue_and_a_full_one_is_all_tissue() -> None:
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal(243, 1.5, (60, 60, 3)), 0, 255).astype(np.uint8)
    assert not tissue_mask(glass, no_ink(glass), (10, 40), closing=0)[0].any()
    pink = np.clip(rng.normal((200, 120, 160), 8, (60, 60, 3)), 0, 255).astype(np.uint8)
    mask, threshold = tissue_mask(pink, no_ink(pink), (10, 40), closing=0)
    assert mask.all() and threshold == 40


@pytest.mark.parametrize("glass", [(245, 235, 240), (236, 228, 205), (230, 236, 240), (200, 200, 205)])
def test_tinted_glass_is_no_tissue_and_hides_none(glass: tuple[int, int, int]) -> None:
    """Old mounting medium is yellow, lamps are blue or pink; noise and shading split the saturation of one colour."""
    rng, none = np.random.default_rng(0), np.zeros((200, 240), bool)
    shading = np.linspace(0.97, 1.03, 240)[None, :, None]
    empty = np.array(glass) * shading + rng.normal(0, 1.5, (200, 240, 3))
    tissue, _ = tissue_mask(np.clip(empty, 0, 255).astype(np.uint8), none, (10, 40), 0)
    assert tissue.mean() < 0.01, "but for single pixels"
    disk = np.hypot(*np.ogrid[-100:100, -120:120]) < 12  # one per cent of the slide
    empty[disk] = np.array((220, 150, 190)) + rng.normal(0, 8, (disk.sum(), 3))
    tissue, _ = tissue_mask(np.clip(empty, 0, 255).astype(np.uint8), none, (10, 40), 0)
    assert tissue[disk].mean() > 0.95 and tissue[~disk].mean() < 0.01


def test_closing_fills_gaps_and_keeps_the_border() -> None:
    image = plain(200, 120, 160, size=21)
    image[10, 10] = image[0:2, 5] = 244
    for closing, holes in [(0, 3), (3, 0)]:
        mask, _ = tissue_mask(image, no_ink(image), (10, 40), closing)
        assert (~mask).sum() == holes


@pytest.mark.parametrize(
    ("name", "colour", "is_ink"),
    [
        ("blue pen", (30, 70, 190), True),
        ("light blue pen", (90, 150, 220), True),
        ("green pen", (20, 130, 70), True),
        ("black pen", (35, 32, 40), True),
        ("border of the scanner", (0, 0, 0), True),
        ("glass", (243, 243, 244), False),
        ("bluish glass", (215, 225, 240), False),
        ("eosin", (225, 130, 175), False),
        ("nuclei", (80, 50, 130), False),
        ("dense nuclei", (62, 40, 100), False),
        ("blue haematoxylin", (90, 95, 170), False),
        ("red cells", (200, 60, 70), False),
        ("brown DAB", (110, 70, 40), False),
    ],
)
def test_ink(name: str, colour: tuple[int, int, int], is_ink: bool) -> None:
    assert (ink_mask(plain(*colour)) == is_ink).all(), name


def test_a_speck_is_no_stroke_and_a_stroke_has_a_rim() -> None:
    image = plain(225, 130, 175, size=30)
    image[3:5, 3:5] = image[10:13, 10:20] = 30, 70, 190
    found = ink_mask(image)
    assert found[8:15, 8:22].all() and found.sum() == 7 * 14


def test_ink_is_not_tissue_and_does_not_move_the_threshold() -> None:
    image = section(200, 200)
    before, threshold = tissue_mask(image, ink_mask(image), (0, 255), closing=0)
    image[:40] = 30, 70, 190
    ink = ink_mask(image)
    mask, moved = tissue_mask(image, ink, (0, 255), closing=0)
    assert ink[:42].all() and not ink[42:].any() and not mask[:42].any()
    assert (mask[42:] == before[42:]).mean() > 0.999
    assert abs(moved - threshold) <= 2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_shares_count_pixels_and_fractions_of_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 12)) < 0.5
    x0, x1 = np.sort(rng.uniform(0, 12, (2, 5)), axis=0)
    y0, y1 = np.sort(rng.uniform(0, 9, (2, 5)), axis=0)
    boxes = np.stack([x0, y0, x1 + 0.01, y1 + 0.01], 1).clip(0, [12, 9, 12, 9])
    wide = [np.clip(np.minimum(b[2], np.arange(1, 13)) - np.maximum(b[0], np.arange(12)), 0, None) for b in boxes]
    high = [np.clip(np.minimum(b[3], np.arange(1, 10)) - np.maximum(b[1], np.arange(9)), 0, None) for b in boxes]
    wanted = [(mask * h[:, None] * w).sum() / (h.sum() * w.sum()) for w, h in zip(wide, high, strict=True)]
    np.testing.assert_allclose(shares(mask, boxes), wanted, atol=1e-6)


# -- blur --------------------------------------------------------------------------------------------------------------


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (3, 9, 7), dtype=np.uint8)
    grey = 0.2989 * tile[0].astype(float) + 0.587 * tile[1] + 0.114 * tile[2]
    values = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, 8)
        for x in range(1, 6)
    ]
    assert sharpness(tile) == pytest.approx(np.var(values), rel=1e-12)
    assert sharpness(np.full((3, 8, 8), 77, np.uint8)) == pytest.approx(0, abs=1e-18)


def test_blur_lowers_sharpness() -> None:
    image = Image.fromarray(section(256, 256)[64:192, 64:192])
    found = [sharpness(np.moveaxis(np.asarray(image.filter(ImageFilter.GaussianBlur(r))), -1, 0)) for r in (0, 1, 2, 4)]
    assert found == sorted(found, reverse=True) and found[0] > 10 * found[2]


# -- regions -----------------------------------------------------------------------------------------------------------


def ring(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(geometry: dict[str, Any], name: object = None) -> dict[str, Any]:
    """As QuPath writes it."""
    properties: dict[str, Any] = {"objectType": "annotation"}
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "id": "1f2a", "geometry": geometry, "properties": properties}


def polygon(*rings: list[list[float]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


def written(path: Path, contents: object) -> Path:
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")
    return path


BOXES = np.array([[0, 0, 10, 10], [45, 45, 55, 55], [30, 0, 50, 10], [90, 90, 110, 110]], float)


def test_a_polygon_with_a_hole(tmp_path: Path) -> None:
    """A square 0 ... 100 with the hole 40 ... 60."""
    shape = polygon(ring(0, 0, 100, 100), ring(40, 40, 60, 60))
    for contents in (
        {"type": "FeatureCollection", "features": [feature(shape, "Tumor")]},
        [feature(shape, "Tumor")],
        feature(shape, "Tumor"),
        feature({"type": "MultiPolygon", "coordinates": [shape["coordinates"]]}, "Tumor"),
        {"type": "Feature", "geometry": shape, "properties": {"classification": "Tumor"}},
    ):
        areas = regions.read_regions(written(tmp_path / "a.geojson", contents))
        assert list(areas) == ["Tumor"] and areas["Tumor"].area == pytest.approx(9600)
        found = regions.region_shares(areas["Tumor"], BOXES)
        np.testing.assert_allclose(found, [1, 0, 1, 0.25], atol=1e-12)


def test_regions_of_one_class_are_joined_and_the_origin_is_added(tmp_path: Path) -> None:
    features = [
        feature(polygon(ring(0, 0, 6, 10)), "A"),
        feature(polygon(ring(4, 0, 10, 10)), "A"),
        feature({"type": "Point", "coordinates": [1, 2]}, "A"),
        feature(polygon(ring(0, 0, 5, 5))),
    ]
    path = written(tmp_path / "a.geojson", features)
    areas = regions.read_regions(path)
    assert {name: area.area for name, area in areas.items()} == {"A": 100, "": 25}
    assert regions.read_regions(path, (1000, 500))["A"].bounds == (1000, 500, 1010, 510)


@pytest.mark.parametrize(
    "features",
    [
        [],
        [
            feature({"type": "Point", "coordinates": [1, 2]}),
            feature({"type": "LineString", "coordinates": [[0, 0], [1, 1]]}),
        ],
        [{"type": "Feature", "geometry": None, "properties": {}}],
        [feature({"type": "Polygon", "coordinates": []}, "A")],
    ],
)
def test_a_file_in_which_no_area_is_drawn_has_no_region(tmp_path: Path, features: list[Any]) -> None:
    """QuPath exports such a file for every slide that nobody has drawn in."""
    assert regions.read_regions(written(tmp_path / "a.geojson", features), (5, 5)) == {}
    assert regions.labels({}, BOXES, 0.5) == [None] * 4
    assert not regions.region_shares(regions.union({}), BOXES).any()


def test_areas_of_collections_in_collections(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "type": "MultiPolygon",
        "coordinates": [[ring(0, 0, 10, 10), ring(4, 4, 6, 6)], [ring(20, 0, 30, 10)]],
    }
    for _ in range(4):
        geometries = [shape, {"type": "Point", "coordinates": [1, 1]}]
        shape = {"type": "GeometryCollection", "geometries": geometries}
        areas = regions.read_regions(written(tmp_path / "a.geojson", [feature(shape, "A")]))
        assert areas["A"].area == pytest.approx(196)


def test_the_share_of_regions_beyond_the_slide() -> None:
    areas = {"A": shapely.box(-50, 0, 50, 10), "B": shapely.box(0, 0, 50, 10)}
    assert regions.share_beyond(areas, (100, 100)) == pytest.approx(0.5)
    assert regions.share_beyond(areas, (10, 10)) == pytest.approx(0.9)
    assert regions.share_beyond({}, (10, 10)) == 0


def test_a_bow_tie_is_mended(tmp_path: Path) -> None:
    bow = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    areas = regions.read_regions(written(tmp_path / "a.geojson", [feature(polygon(bow), "A")]))
    assert areas["A"].area == pytest.approx(50)


def test_labels_go_by_the_largest_share(tmp_path: Path) -> None:
    areas = {
        "Tumor": shapely.box(0, 0, 6, 10),
        "Stroma": shapely.box(6, 0, 30, 10),
        "Ignore*": shapely.box(0, 0, 100, 100),
        "": shapely.box(0, 0, 100, 100),
    }
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [28, 0, 38, 10], [50, 50, 60, 60]], float)
    assert regions.labels(areas, boxes, 0.5) == ["Tumor", "Stroma", None, None]
    assert regions.labels(areas, boxes, 0.1) == ["Tumor", "Stroma", "Stroma", None]
    assert regions.labels(areas, boxes, 0.0)[3] is None
    assert regions.labels({"": areas[""]}, boxes, 0.5) == [None] * 4


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ("{not json", "cannot be read as GeoJSON (Expecting property name"),
        ([{"no": "geometry"}], "feature 0 is not a GeoJSON feature with a geometry"),
        ([feature(polygon([[0, 0], [1, 1]]))], "feature 0 is not a GeoJSON feature with a geometry"),
        ('"text"', "feature 0 is not a GeoJSON feature"),
        ([feature(polygon([[0, 0], [np.nan, 1], [1, 1], [0, 0]]))], "a coordinate is not a finite number"),
        ('[{"geometry": {"type": "Point", "coordinates": [1e999, 0]}}]', "a coordinate is not a finite number"),
    ],
)
def test_what_is_no_geojson(tmp_path: Path, contents: object, reason: str) -> None:
    path = written(tmp_path / "a.geojson", contents)
    with pytest.raises(ValueError) as error:
        regions.read_regions(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)


# -- stain normalisation -----------------------------------------------------------------------------------------------

HAEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


def stained(seed: int, tint: float = 0.0, strength: float = 1.0, num: int = 4000) -> np.ndarray:
    """(N, 3): pixels of a section by Beer and Lambert, the stains turned by `tint` and stronger by `strength`."""
    rng = np.random.default_rng(seed)
    stains = np.stack([HAEMATOXYLIN + tint * np.array([0, -0.1, 0.1]), EOSIN + tint * np.array([0.1, 0, 0.05])])
    amounts = rng.gamma(2, 0.3, (num, 2)) * strength * np.where(rng.random((num, 1)) < 0.5, [1, 0.1], [0.1, 1])
    return np.clip(240 * np.exp(-amounts @ stains), 1, 255).round().astype(np.uint8)


def reference_macenko(pixels: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The steps of Macenko et al. 2009 one after the other, pixel by pixel, in float64."""
    density = np.array([[-np.log(max(float(value), 1) / 240) for value in pixel] for pixel in sample])
    kept = density[[all(value > 0.15 for value in pixel) for pixel in density]]
    centred = kept - kept.mean(0)
    values, vectors = np.linalg.eig(centred.T @ centred / (len(kept) - 1))
    first, second = vectors[:, np.argsort(values)[2]], vectors[:, np.argsort(values)[1]]
    first, second = (-v if v.sum() < 0 else v for v in (first, second))
    angles = np.array([np.arctan2(pixel @ second, pixel @ first) for pixel in kept])
    low, high = np.percentile(angles, 1), np.percentile(angles, 99)
    one, two = (first * np.cos(angle) + second * np.sin(angle) for angle in (low, high))
    stains = np.stack([one, two] if one[0] > two[0] else [two, one], 1)
    amounts = np.array([np.linalg.lstsq(stains, pixel, rcond=None)[0] for pixel in density])
    largest = np.percentile(amounts, 99, axis=0)
    target = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
    found = []
    for pixel in pixels:
        own = np.linalg.lstsq(stains, -np.log(np.maximum(pixel.astype(float), 1) / 240), rcond=None)[0]
        found.append(240 * np.exp(-(target @ (own / largest * [1.9705, 1.0308]))))
    return np.clip(np.rint(found), 0, 255)


def lab(pixels: np.ndarray) -> np.ndarray:
    """Ruderman's l, alpha, beta, as Reinhard et al. 2001 write them out."""
    rows = []
    for red, green, blue in np.maximum(pixels.astype(float), 1):
        long = np.log(0.3811 * red + 0.5783 * green + 0.0402 * blue)
        medium = np.log(0.1967 * red + 0.7244 * green + 0.0782 * blue)
        short = np.log(0.0241 * red + 0.1288 * green + 0.8444 * blue)
        rows.append(
            [
                (long + medium + short) / 3**0.5,
                (long + medium - 2 * short) / 6**0.5,
                (long - medium) / 2**0.5,
            ]
        )
    return np.array(rows)


def test_macenko_is_the_published_algorithm() -> None:
    sample = stained(0, tint=1.0)
    pixels = stained(1, tint=1.0, num=300)
    found = stain.normalized(pixels[None], stain.measure(sample, "macenko"))[0]
    assert np.abs(found.astype(float) - reference_macenko(pixels, sample)).max() <= 1


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_slides_of_two_laboratories_look_alike_afterwards(method: str) -> None:
    slides = [stained(0), stained(0, tint=1.0, strength=1.4)]
    both = np.logical_and(*((slide < 240 * np.exp(-0.15)).all(1) for slide in slides))  # the others are glass
    slides = [slide[both] for slide in slides]
    after = [stain.normalized(slide[None], stain.measure(slide, method))[0] for slide in slides]
    before = np.abs(slides[0].mean(0) - slides[1].mean(0)).max()
    assert np.abs(after[0].mean(0) - after[1].mean(0)).max() < before / 3 and before > 10
    again = stain.measure(slides[0], method)
    assert stain.Transform(*json.loads(json.dumps(again))[:1], *map(tuple, json.loads(json.dumps(again))[1:])) == again


def test_reinhard_gives_the_tissue_the_references_mean_and_deviation() -> None:
    sample = stained(0, num=3000)
    kept = sample[(sample < 240 * np.exp(-0.15)).all(1)]
    found = lab(stain.normalized(kept[None], stain.measure(sample, "reinhard"))[0])
    np.testing.assert_allclose(found.mean(0), [8.7411, -0.1244, 0.0445], atol=0.02)
    np.testing.assert_allclose(found.std(0), [0.6135, 0.1099, 0.0286], rtol=0.1)


def test_macenko_leaves_glass_white() -> None:
    glass = np.full((1, 1, 3), 240, np.uint8)
    assert np.abs(stain.normalized(glass, stain.measure(stained(0), "macenko")).astype(int) - 240).max() <= 1


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((2000, 3), 243, np.uint8), "0 stained pixels in the sample, at least 500 are needed"),
        (np.full((2000, 3), (200, 120, 160), np.uint8), "one colour only"),
        (np.zeros((2000, 3), np.uint8), "one colour only"),
    ],
)
def test_a_sample_that_cannot_tell(method: str, pixels: np.ndarray, reason: str) -> None:
    with np.errstate(all="raise"), pytest.raises(ValueError, match=reason):
        stain.measure(pixels, method)


def test_no_colour_of_ink_is_a_colour_of_the_reference_stains() -> None:
    """The references of the stain normalisation, at every mixture, are never taken for ink."""
    amounts = np.stack(np.meshgrid(np.linspace(0, 2, 30), np.linspace(0, 1.1, 30)), -1).reshape(-1, 2)
    colours = 240 * np.exp(-amounts @ stain._REFERENCE_STAINS.T)
    image = np.clip(colours, 0, 255).astype(np.uint8)[None]
    large = image.repeat(3, 0).repeat(3, 1)  # a colour is a speck no more
    assert not ink_mask(large).any()
