"""What every modality of the folder promises: walks `ssl_platform.modalities`."""

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from ssl_platform.config import plugin_class, plugin_names, to_yaml, validate
from ssl_platform.patch_embed import Tokens
from ssl_platform.views import collate

PACKAGE = "ssl_platform.modalities"


def image_record() -> dict[str, bytes]:
    file = io.BytesIO()
    coarse = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize((400, 400), Image.Resampling.BICUBIC).save(file, "png")
    return {"png": file.getvalue(), "json": b"{}"}


def sound_record() -> dict[str, bytes]:
    """1.2 s of a sliding tone in noise, stereo."""
    rate = 22_050
    times = np.arange(int(1.2 * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (300 * times + 900 * times**2))
    samples = tone[:, None] + 0.02 * np.random.default_rng(0).normal(size=(len(times), 2))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="wav")
    return {"wav": file.getvalue(), "json": b"{}"}


RECORDS = {"image": image_record, "pathology": image_record, "speaker": sound_record, "spectrogram": sound_record}
"""A record that the default configuration of each modality takes."""


@pytest.fixture(params=plugin_names(PACKAGE))
def name(request: pytest.FixtureRequest) -> str:
    assert request.param in RECORDS, f"add a record for the modality '{request.param}'"
    return str(request.param)


@pytest.fixture
def modality(name: str) -> Any:
    return plugin_class(PACKAGE, name)(name=name).build(None)  # type: ignore[attr-defined]


def test_augment_keeps_its_promises(name: str, modality: Any) -> None:
    example = modality.decode(RECORDS[name]())
    groups = modality.augment((example,), np.random.default_rng(0))
    assert list(groups) == list(modality.groups) and "global" in groups
    sources = torch.cat([views.source for views in groups.values()])
    assert len(sources.unique()) == len(sources)
    for group, spec in modality.groups.items():
        views = groups[group]
        assert views.views.shape == (spec.num_views, *spec.shape) and views.views.dtype == torch.float32
        assert views.source.shape == (spec.num_views,) and views.source.dtype == torch.int64
        assert views.views.isfinite().all() and 0.05 < views.views.std() < 20


def test_augment_is_a_function_of_the_seed(name: str, modality: Any) -> None:
    example = modality.decode(RECORDS[name]())

    def views(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return dict(modality.augment((example,), np.random.default_rng(seed)))

    first, again, other = views(3), views(3), views(4)
    for group in modality.groups:
        assert torch.equal(first[group].views, again[group].views)
        assert not torch.equal(first[group].views, other[group].views)


def test_samples_collate(name: str, modality: Any) -> None:
    example = modality.decode(RECORDS[name]())
    samples = [modality.augment((example,), np.random.default_rng(seed)) for seed in range(2)]
    batch = collate(samples, keys=["a", "b"], ids=torch.arange(2), labels=-torch.ones(2, dtype=torch.int64), step=0)
    for group, spec in modality.groups.items():
        assert batch.groups[group].views.shape == (spec.num_views, 2, *spec.shape)


def test_preprocess_and_description_agree(name: str, modality: Any) -> None:
    example = modality.decode(RECORDS[name]())
    view = modality.preprocess(example)
    assert view.dtype == torch.float32 and torch.equal(view, modality.preprocess(example))
    assert view.shape == modality.groups["global"].shape
    description = modality.description()
    assert description["input_size"] == list(view.shape)
    assert json.loads(json.dumps(description)) == description


def test_patch_embedding_has_the_grid_of_the_group(name: str, modality: Any) -> None:
    for group, spec in modality.groups.items():
        embed = modality.patch_embed(12, group)
        tokens = embed(torch.zeros(2, *spec.shape))
        assert isinstance(tokens, Tokens) and tokens.grid == spec.grid == embed.native_grid
        assert tokens.content.shape == (2, math.prod(spec.grid), 12)


def test_masks_fit_the_grid_of_every_group(name: str, modality: Any) -> None:
    for group, spec in modality.groups.items():
        masks = plugin_class("ssl_platform.masks", "random")(name="random", group=group).build()  # type: ignore[attr-defined]
        drawn = masks.draw(spec.num_views, spec.grid, seed=0, step=0, batch_size=2, first=0, count=2)  # (V, M, B, N)
        assert drawn.shape[0] == spec.num_views and drawn.shape[-1] == math.prod(spec.grid)


def test_bad_records_are_value_errors(name: str, modality: Any) -> None:
    record = RECORDS[name]()
    extension = next(iter(record))
    for data in (b"", b"not what it says", record[extension][: len(record[extension]) // 2]):
        with pytest.raises(ValueError, match=r"\w"):
            modality.decode({extension: data})
    with pytest.raises(ValueError, match="txt"):
        modality.decode({"txt": b"hello"})


def test_configuration_survives_yaml(name: str) -> None:
    import yaml

    config = plugin_class(PACKAGE, name)(name=name)
    assert validate(type(config), yaml.safe_load(to_yaml(config))) == config
