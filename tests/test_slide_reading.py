"""Reading whole slides: which level, which microns, and that every tile shows the place it says, within a pixel."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from ssl_platform.data.slides import reading
from ssl_platform.data.slides.reading import choose_level, microns_per_pixel, open_slide, read_area
from tests.whole_slides import coordinates, pyramid, write_dicom, write_svs, write_tiff

HEIGHT, WIDTH = 1536, 2048


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same slide in three formats; blue tells the levels apart."""
    folder = tmp_path_factory.mktemp("slides")
    levels = pyramid(coordinates(HEIGHT, WIDTH), (1, 4))
    levels[1][..., 2] = 100
    return {
        "generic-tiff": write_tiff(folder / "a.tif", levels),
        "aperio": write_svs(folder / "b.svs", levels),
        "dicom": write_dicom(folder / "c", levels) / "level1.dcm",
    }


@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio", "dicom"])
def test_openslide_takes_what_the_tests_make(slides: dict[str, Path], vendor: str) -> None:
    slide = open_slide(slides[vendor])
    assert slide.properties["openslide.vendor"] == vendor
    assert slide.dimensions == (WIDTH, HEIGHT) and slide.level_downsamples == (1.0, 4.0)
    assert microns_per_pixel(slide.properties) == pytest.approx((0.25, 0.25))
    assert open_slide(slides[vendor]) is slide


# -- geometry ----------------------------------------------------------------------------------------------------------


def expected(first: float, size: float, pixels: int) -> np.ndarray:
    """The coordinate of level 0 at the middle of each pixel of a tile."""
    return first + (np.arange(pixels) + 0.5) * size / pixels - 0.5


def assert_shows(tile: np.ndarray, corner: tuple[float, float], size: tuple[float, float], tolerance: float) -> None:
    """Red and green are the coordinates; where they jump from 255 to 0, resampling mixes both."""
    for axis in (0, 1):
        pixels = tile.shape[1 - axis]
        wanted = expected(corner[axis], size[axis], pixels)
        far = np.abs((wanted + 128) % 256 - 128) > 4 * max(size[axis] / pixels, 4)
        assert far.sum() > pixels // 3
        shown = tile[..., axis].astype(float)
        found = shown.mean(axis)  # the other axis does not change it
        assert np.abs(found - wanted % 256)[far].max() <= tolerance, (axis, corner, size)


@pytest.mark.parametrize("vendor", ["generic-tiff", "aperio", "dicom"])
@pytest.mark.parametrize("mpp", [0.25, 0.37, 0.5, 0.9, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("corner", [(0, 0), (513, 301), (1023, 511)])
def test_a_tile_shows_its_place_at_its_scale(
    slides: dict[str, Path], vendor: str, mpp: float, corner: tuple[int, int]
) -> None:
    pixels = 64
    size = (pixels * mpp / 0.25,) * 2
    level = choose_level((1.0, 4.0), (0.25, 0.25), mpp)
    tile = read_area(slides[vendor], corner, size, (pixels, pixels), level)
    assert tile.shape == (pixels, pixels, 3) and tile.dtype == np.uint8
    assert_shows(tile, corner, size, tolerance=1.0 if vendor == "generic-tiff" else 3.0)  # JPEG
    assert abs(float(tile[..., 2].mean()) - (100 if mpp >= 1 else 200)) < 3, "read from another level"


def test_pixels_that_need_no_resampling_are_the_slides_own(slides: dict[str, Path]) -> None:
    whole = coordinates(HEIGHT, WIDTH)
    tile = read_area(slides["generic-tiff"], (515, 301), (64, 48), (64, 48), 0)
    assert (tile == whole[301:349, 515:579]).all()
    tile = read_area(slides["generic-tiff"], (512, 300), (256, 192), (64, 48), 1)
    assert (tile[..., :2] == pyramid(whole, (4,))[0][75:123, 128:192, :2]).all()


def test_neighbours_fit_together(slides: dict[str, Path]) -> None:
    """Two tiles are the halves of one large tile: resampling sees across their border."""
    path = slides["generic-tiff"]
    both = read_area(path, (100, 200), (320, 160), (128, 64), 0)
    halves = [read_area(path, (x, 200), (160, 160), (64, 64), 0) for x in (100, 260)]
    assert (np.concatenate(halves, axis=1) == both).all()


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [coordinates(1024, 1024)], mpp=(0.25, 0.5))
    mpp = microns_per_pixel(open_slide(path).properties)
    assert mpp == pytest.approx((0.25, 0.5))
    size = 64 * 0.5 / mpp[0], 64 * 0.5 / mpp[1]
    assert size == pytest.approx((128, 64))
    assert_shows(read_area(path, (300, 300), size, (64, 64), 0), (300, 300), size, tolerance=1.0)


def test_antialiased(tmp_path: Path) -> None:
    """Stripes finer than a pixel of the tile become grey, not coarser stripes."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    path = write_tiff(tmp_path / "a.tif", [stripes])
    tile = read_area(path, (40, 40), (300, 300), (100, 100), 0)
    assert np.abs(tile.astype(int) - 127).max() < 20


def test_beyond_the_edge_is_never_asked_of_openslide_and_holes_are_white(slides: dict[str, Path]) -> None:
    tile = read_area(slides["generic-tiff"], (WIDTH - 128, HEIGHT - 128), (128, 128), (64, 64), 0)
    assert_shows(tile[:60, :60], (WIDTH - 128, HEIGHT - 128), (120, 120), tolerance=1.0)
    assert tile[..., 2].min() > 190, "no black border is mixed in"


# -- levels and microns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("downsamples", "mpp", "wanted", "level"),
    [
        ((1, 4, 16), (0.25, 0.25), 0.25, 0),
        ((1, 4, 16), (0.25, 0.25), 0.99, 0),
        ((1, 4, 16), (0.25, 0.25), 1.0, 1),
        ((1, 4, 16), (0.2527, 0.2527), 1.01, 1),
        ((1, 4, 16), (0.2527, 0.2527), 1.005, 1),  # 0.6 % coarser: counts as 1.005
        ((1, 4, 16), (0.27, 0.27), 1.0, 0),  # 8 % coarser: does not
        ((1, 4, 16), (0.25, 0.5), 1.0, 0),  # the coarser axis decides
        ((1, 4, 16), (0.25, 0.25), 100.0, 2),
        ((1, 2), (0.5, 0.5), 0.48, 0),  # a little coarser is better than nothing
    ],
)
def test_level(downsamples: tuple[float, ...], mpp: tuple[float, float], wanted: float, level: int) -> None:
    assert choose_level(downsamples, mpp, wanted, max_upsampling=1.1) == level


def test_a_coarse_scan_is_refused() -> None:
    with pytest.raises(
        ValueError, match="scanned at 0.5 microns per pixel, too coarse for --mpp 0.25: .* 2 times; raise"
    ):
        choose_level((1.0, 4.0), (0.5, 0.5), 0.25, max_upsampling=1.1)


def test_where_microns_come_from() -> None:
    slide = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}
    tags = {"tiff.XResolution": "50800", "tiff.YResolution": "25400", "tiff.ResolutionUnit": "inch"}
    objective = {"openslide.objective-power": "20"}
    assert microns_per_pixel(slide | tags | objective) == (0.25, 0.26)
    assert microns_per_pixel(slide, override=0.5) == (0.5, 0.5)
    assert microns_per_pixel(tags) == (0.5, 1.0)
    assert microns_per_pixel(objective, from_objective=True) == (0.5, 0.5)
    for metadata in (
        {},
        objective,
        {"openslide.mpp-x": "nan", "openslide.mpp-y": "1"},
        tags | {"tiff.ResolutionUnit": "none"},
    ):
        with pytest.raises(ValueError, match="does not say how many microns .*; give --override-mpp, or a column mpp"):
            microns_per_pixel(metadata)
    with pytest.raises(ValueError, match="or --mpp-from-objective to trust its objective power 20"):
        microns_per_pixel(objective)
    dpi = {"tiff.XResolution": "72", "tiff.YResolution": "72", "tiff.ResolutionUnit": "inch"}
    with pytest.raises(ValueError, match="says 352.8 microns per pixel, which no scanner makes; give --override-mpp"):
        microns_per_pixel(dpi)
    with pytest.raises(ValueError, match="which no scanner makes; .*, or --mpp-from-objective to trust"):
        microns_per_pixel(dpi | objective)
    assert microns_per_pixel(dpi | objective, from_objective=True) == (0.5, 0.5), "the advice helps"
    assert microns_per_pixel(slide | objective, from_objective=True) == (0.25, 0.26), "it is asked last"


# -- handles -----------------------------------------------------------------------------------------------------------


def test_a_bounded_number_of_slides_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_OPEN", 2)
    reading._forget_all()
    paths = [write_tiff(tmp_path / f"{number}.tif", [coordinates(256, 256)]) for number in range(4)]
    for path in [*paths, paths[0]]:
        assert (read_area(path, (0, 0), (8, 8), (8, 8), 0) == coordinates(8, 8)).all()
        assert len(reading._open) <= 2
    assert list(reading._open) == [paths[3], paths[0]]


def test_what_is_no_slide(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"not a slide")
    with pytest.raises(ValueError, match="^cannot be opened as a slide: openslide knows no such format$"):
        open_slide(tmp_path / "a.svs")
    with pytest.raises(ValueError, match="^no such file$"):
        open_slide(tmp_path / "b.svs")


def test_a_damaged_block_is_an_error_of_its_tile_alone(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", pyramid(coordinates(1024, 1024), (1, 4)))
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8")  # the first block
    data[start : start + 600] = b"\0" * 600
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="level 0 cannot be read at x 0, y 0: "):
        read_area(path, (0, 0), (64, 64), (64, 64), 0)
    tile = read_area(path, (600, 600), (64, 64), (64, 64), 0)
    assert_shows(tile, (600, 600), (64, 64), tolerance=3.0)


def test_associated_images_exist_to_be_avoided(slides: dict[str, Path]) -> None:
    """The poison that the tests of packing look for is really there."""
    with openslide.OpenSlide(slides["aperio"]) as slide:
        assert {"label", "macro"} <= set(slide.associated_images)
