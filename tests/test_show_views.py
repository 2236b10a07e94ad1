"""`ssl-train CONFIG --show-views FILE`: the views that training sees, made visible, with masks where they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_platform.config import ConfigError, plugin_class, plugin_names
from ssl_platform.modalities._images import Normalization
from ssl_platform.recipe import build_modality, load_recipe, open_index, open_order
from ssl_platform.show_views import contact_sheet, group_columns, scaled, with_mask
from ssl_platform.train import main, stage_batches, stage_plan
from tests import engine
from tests.probes.toy import Toy
from tests.test_modality_contract import RECORDS

SMOKE = Path(__file__).parents[1] / "configs" / "smoke"


def folder_of(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


@pytest.mark.parametrize("config", sorted(SMOKE.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sheet_of_every_smoke_configuration_and_nothing_else(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    assert main([str(config), f"run_dir={tmp_path / 'run'}", "--show-views", str(out)]) == 0
    assert folder_of(tmp_path) == ["views.png"]
    sheet = np.asarray(Image.open(out))
    assert sheet.ndim == 3 and min(sheet.shape[:2]) > 300
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 500, "tissue and tones have many colours"
    again = tmp_path / "again.png"
    assert main([str(config), f"run_dir={tmp_path / 'run'}", "--show-views", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes(), "a function of the configuration"


def test_the_views_and_masks_are_those_of_the_first_step() -> None:
    """Cut out of the global batch one by one they are the same as the batch that training gets."""
    recipe = load_recipe(SMOKE / "pathology.yaml")
    index = open_index(recipe)
    order, modality = open_order(recipe, index), build_modality(recipe, index.statistics)
    stage = stage_plan(recipe)[0]
    whole = next(stage_batches(stage, recipe, index, order, modality, 0, {}))
    single = recipe.model_copy(update={"accumulate": recipe.batch_size})
    batches = stage_batches(stage, single, index, order, modality, 0, {})
    samples = [next(batches) for _ in range(3)]
    for number, sample in enumerate(samples):
        for name, group in whole.groups.items():
            assert torch.equal(sample.groups[name].views[:, 0], group.views[:, number])
            for masks, drawn in group.masks.items():
                assert torch.equal(sample.groups[name].masks[masks][:, :, 0], drawn[:, :, number])
    columns = group_columns("global", modality, samples)
    assert [(column.title, column.subtitle) for column in columns] == [
        ("global 1", "32 x 32, crop 0"),
        ("global 1", "masks: block"),
        ("global 2", "32 x 32, crop 1"),
        ("global 2", "masks: block"),
    ]
    for view in range(2):
        for row in range(3):
            count = int(whole.groups["global"].masks["block"][view, 0, row].sum())
            plain, masked = columns[2 * view].cells[row], columns[2 * view + 1].cells[row]
            assert masked.caption == (f"{count} of 16 hidden" if count else "not masked")
            changed = (plain.picture != masked.picture).any(-1).mean()
            assert changed == pytest.approx(count / 16, abs=0.05)


def test_masks_lie_over_their_tokens() -> None:
    picture = np.full((8, 12, 3), 200, np.uint8)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 2] = True
    dark = (with_mask(picture, mask.flatten(), (2, 3)) < 100).all(-1)
    expected = np.zeros((8, 12), bool)
    expected[4:, 8:] = True
    assert np.array_equal(dark, expected)
    stripes = (with_mask(picture, torch.tensor([False, True, False]), (3,)) < 100).all(-1)
    assert stripes[:, 4:8].all() and stripes.sum() == 8 * 4, "one axis of tokens runs along the width"
    assert np.array_equal(with_mask(picture, torch.ones(8, dtype=torch.bool), (2, 2, 2)), picture)


@pytest.mark.parametrize("name", plugin_names("ssl_platform.modalities"))
def test_every_modality_has_pictures(name: str) -> None:
    modality: Any = plugin_class("ssl_platform.modalities", name)(name=name).build(None)  # type: ignore[attr-defined]
    example = modality.decode(RECORDS[name]())
    views = modality.augment((example,), np.random.default_rng(0))
    for group in modality.groups:
        picture = modality.picture(views[group].views[0])
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert picture.std() > 1


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pictures_of_images_undo_the_normalisation(channels: int) -> None:
    mean, std = [0.2 + 0.1 * c for c in range(channels)], [0.1 + 0.05 * c for c in range(channels)]
    config = plugin_class("ssl_platform.modalities", "image")(name="image", channels=channels, mean=mean, std=std)
    modality: Any = config.build(None)  # type: ignore[attr-defined]
    pixels = torch.randint(0, 256, (channels, 6, 4), dtype=torch.uint8)
    picture = modality.picture(modality.normalized(pixels))
    shown = pixels if channels == 3 else pixels[:1].expand(3, -1, -1)
    assert np.array_equal(picture, shown.permute(1, 2, 0).numpy())


def test_pixels_that_fill_little_of_their_range_are_seen() -> None:
    """A scan of 12 bits in 16: its views, not a black picture."""
    pixels = torch.linspace(0, 0.03, 64).repeat(64, 1)[None]
    dim = Normalization(1, [0.015], [0.009])
    shown = dim.visible(dim(pixels))
    assert shown.min() < 0.1 and shown.max() > 0.9
    photo = Normalization(1, [0.4], [0.2])
    assert torch.allclose(photo.visible(photo(pixels)), pixels, atol=1e-6), "as it is"


def test_views_normalised_one_by_one_are_stretched() -> None:
    normalization = Normalization(3)
    dim = 0.4 + 0.01 * torch.rand(3, 16, 16)
    visible = normalization.visible(normalization(dim))
    assert visible.min() >= 0 and visible.max() <= 1 and visible.std() > 0.2


@pytest.mark.parametrize(("longest", "shown"), [(16, 224), (100, 200), (224, 224), (300, 300), (1000, 224)])
def test_sizes_on_the_sheet_are_readable_and_keep_their_ratio(longest: int, shown: int) -> None:
    from ssl_platform.show_views import Cell, Column

    pictures = [np.zeros((longest, longest // 2, 3), np.uint8), np.zeros((longest // 2, longest // 4, 3), np.uint8)]
    columns = scaled([Column("g", "", "", [Cell(picture, "")]) for picture in pictures])
    assert columns[0].cells[0].picture.shape[0] == shown
    assert columns[1].cells[0].picture.shape[0] == pytest.approx(shown / 2, abs=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("views.gif", "views.gif: unknown kind of file; use .png, .jpg, .jpeg"),
        ("views", "views: unknown kind of file"),
        ("none/views.png", "none does not exist"),
    ],
)
def test_files_that_cannot_be_written_are_refused(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main([str(SMOKE / "pathology.yaml"), f"run_dir={tmp_path / 'run'}", "--show-views", str(tmp_path / name)]) == 1
    )
    assert message in capsys.readouterr().err
    assert folder_of(tmp_path) == []


def test_jpeg_is_written_and_replaces_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "views.JPG"
    out.write_bytes(b"before")
    assert main([str(SMOKE / "image.yaml"), "--show-views", str(out)]) == 0
    assert Image.open(out).format == "JPEG" and folder_of(tmp_path) == ["views.JPG"]


def test_a_modality_without_pictures_is_told() -> None:
    with pytest.raises(ConfigError, match=r"modality tests.probes.toy.Toy has no method `picture\(view\)`"):
        contact_sheet(Toy(("global",)), [engine.batch(size=1)])  # type: ignore[arg-type]
