"""The modality `spectrogram`: its augmentations against written-out references, what exports carry, bad input."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_platform.backbones import Input
from ssl_platform.backbones._positions import interpolate_positions
from ssl_platform.backbones.vit import Config as Vit
from ssl_platform.config import ConfigError, validate
from ssl_platform.encoder import Encoder
from ssl_platform.export import main as ssl_export
from ssl_platform.modalities import _sound_augmentations as augmentations
from ssl_platform.modalities._audio import Sound, decode_audio, resample
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._sounds import Recording, decode_recording
from ssl_platform.modalities.spectrogram import Config, Spectrogram
from ssl_platform.train import main as ssl_train
from tests.sounds import encoded, record, tone

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke"


def built(**options: Any) -> Spectrogram:
    small = {"crops": {"global": {"num_frames": 32}, "local": {"num": 2, "num_frames": 16}}, **options}
    return validate(Config, {"name": "spectrogram", **small}).build(None)


def recording(seconds: float = 1.0, **changes: Any) -> Recording:
    return decode_recording(record(seconds, **changes))


# -- augmentations -----------------------------------------------------------------------------------------------------


@given(total=st.integers(2, 300), num_samples=st.integers(1, 300), seed=st.integers(0, 50))
def test_a_rolled_chunk_is_a_chunk_of_the_rolled_recording(total: int, num_samples: int, seed: int) -> None:
    samples = np.arange(1, total + 1)[:, None] / 1000
    found = decode_recording({"wav": encoded(samples, 16_000, subtype="FLOAT")})
    chunk = augmentations.random_rolled_chunk(found, num_samples, 16_000, np.random.default_rng(seed), "repeat")
    start = round(float(chunk[0]) * 1000) - 1
    rolled = torch.from_numpy(np.roll(samples[:, 0], -start)).float()
    assert torch.equal(chunk, rolled.repeat(num_samples)[:num_samples])


def test_rolled_chunks_begin_everywhere() -> None:
    samples = np.arange(1, 11)[:, None] / 1000
    found = decode_recording({"wav": encoded(samples, 16_000, subtype="FLOAT")})
    rng = np.random.default_rng(0)
    starts = [augmentations.random_rolled_chunk(found, 8, 16_000, rng, "repeat")[0].item() for _ in range(300)]
    assert {round(start * 1000) for start in starts} == set(range(1, 11))


def test_mixing_logarithms_mixes_energies() -> None:
    one, other = torch.randn(2, 20, 8)
    for share in (0.0, 0.1, 0.4):
        expected = torch.log((1 - share) * one.exp() + share * other.exp())
        assert torch.allclose(augmentations.log_mix_exp(one, other, share), expected, atol=1e-6)
    quiet = torch.full((1, 1), -90.0)
    assert torch.isfinite(augmentations.log_mix_exp(quiet, quiet, 0.3)).all()


def test_a_resized_crop_of_everything_is_everything() -> None:
    bins = torch.randn(20, 8)
    assert torch.equal(augmentations.random_resized_crop(bins, (1.0, 1.0), (1.0, 1.0), np.random.default_rng(0)), bins)


@given(time=st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)), mel=st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
       seed=st.integers(0, 99))  # fmt: skip
def test_resized_crops_keep_the_size_and_show_part_of_the_view(
    time: tuple[float, float], mel: tuple[float, float], seed: int
) -> None:
    shares = tuple(sorted(time)), tuple(sorted(mel))
    bins = torch.ones(30, 12)
    found = augmentations.random_resized_crop(bins, *shares, np.random.default_rng(seed))  # type: ignore[arg-type]
    assert found.shape == bins.shape
    if shares[0][1] <= 1 and shares[1][1] <= 1:
        assert torch.allclose(found, bins, atol=1e-5), "nothing from beyond the view"
    # Of what reaches beyond, all of the view is there: ones take the share that the view has of the part.
    covered = 1 / (max(shares[0][1], 1) * max(shares[1][1], 1))
    assert found.mean() > 0.5 * covered


@given(axis=st.sampled_from([0, 1]), num=st.integers(0, 3), share=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_bands_lie_across_the_other_axis(axis: int, num: int, share: float, seed: int) -> None:
    hidden = augmentations.random_bands(torch.ones(30, 20), axis, num, share, np.random.default_rng(seed)) == 0
    lines = hidden.any(1 - axis)
    assert torch.equal(lines, hidden.all(1 - axis)), "whole lines"
    assert int(lines.sum()) <= num * int(hidden.shape[axis] * share)
    assert int(lines.int().diff().clamp(min=0).sum() + lines[0].int()) <= num


@settings(max_examples=50)
@given(share=st.floats(0.05, 0.9), block=st.floats(0.05, 1), seed=st.integers(0, 999), aligned=st.booleans())
def test_blocks_cover_what_was_asked_for(share: float, block: float, seed: int, aligned: bool) -> None:
    unit = (4, 8) if aligned else (1, 1)
    blocks = augmentations.random_blocks((40, 32), share, block, unit, np.random.default_rng(seed))
    assert blocks.shape == (40, 32)
    units = (40 // unit[0], 32 // unit[1])
    one_more = max(int(units[0] * block), 1) * max(int(units[1] * block), 1) / (units[0] * units[1])
    assert share - 1e-9 <= blocks.mean() <= share + one_more + 1 / (units[0] * units[1])
    if aligned:
        by_patch = blocks.reshape(10, 4, 4, 8)
        assert (by_patch.all((1, 3)) == by_patch.any((1, 3))).all()


# -- views -------------------------------------------------------------------------------------------------------------


def test_a_view_is_the_filter_banks_of_its_crop() -> None:
    """Of a recording that is exactly as long as a crop, without augmentations: all of it."""
    normalization = {"mean": -4.0, "std": 4.0, "std_factor": 2.0}
    modality = built(normalization=normalization, roll={"global": [0.0]})
    samples = tone(5360 / 16_000, 16_000)
    views = modality.augment((decode_recording({"wav": encoded(samples, 16_000, subtype="FLOAT")}),), _rng())["global"]
    expected = (Fbank()(torch.from_numpy(samples[:, 0]).float()) + 4) / 8
    assert torch.allclose(views.views, expected.expand(2, 1, -1, -1), atol=1e-4)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_groups_sizes_and_sources() -> None:
    modality = built(patch_size=[8, 128], corrupted={"corrupted": {"of": "global", "replace": 0.0}})
    assert {name: (spec.shape, spec.grid, spec.shows) for name, spec in modality.groups.items()} == {
        "global": ((1, 32, 128), (4, 1), None),
        "local": ((1, 16, 128), (2, 1), None),
        "corrupted": ((1, 32, 128), (4, 1), "global"),
    }
    made = modality.augment((recording(),), _rng())
    assert {name: views.source.tolist() for name, views in made.items()} == {
        "global": [0, 1], "local": [2, 3], "corrupted": [0, 1]
    }  # fmt: skip
    assert "local" not in built(crops={"global": {"num_frames": 32}, "local": {"num": 0}}).groups


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("replace", [0.0, 1.0])
def test_corrupted_views_are_clean_but_for_their_blocks(replace: float, align: bool) -> None:
    corrupted = {"corrupted": {"of": "global", "replace": replace, "align": align}}
    modality = built(corrupted=corrupted, patch_size=8)
    for seed in range(5):
        made = modality.augment((recording(), recording(hertz=3000.0, seed=1)), _rng(seed))
        clean, views, where = made["global"].views, made["corrupted"].views, made["corrupted"].extra["corrupted"]
        assert where.shape == (2, 32, 128) and where.dtype == torch.bool
        where = where[:, None]
        assert torch.equal(views[~where], clean[~where])
        share = where.float().mean((1, 2, 3))
        if replace:
            assert not torch.equal(views[where], clean[where]) and views[where].all()
            assert ((share >= 0.3) & (share < 0.3 + 0.1)).all()
        else:
            assert not views[where].any() and ((share >= 0.5) & (share < 0.7 + 0.1)).all()


def test_what_is_replaced_comes_from_the_companion() -> None:
    silence = decode_recording({"wav": encoded(np.zeros((16_000, 1)), 16_000)})
    modality = built(corrupted={"corrupted": {"of": "global", "replace": 1.0}})
    made = modality.augment((recording(), silence), _rng())["corrupted"]
    floor = modality.normalization(torch.full((1, 1), float(np.log(Fbank().energy_floor))))
    assert torch.allclose(made.views[made.extra["corrupted"][:, None]], floor.squeeze(), atol=1e-4)


def test_probabilities_are_per_view() -> None:
    modality = built(mixup={"global": [0.0, 1.0]}, roll={"global": [0.0]}, crops={"global": {"num_frames": 96}})
    loud = decode_recording({"wav": encoded(np.random.default_rng(0).uniform(-1, 1, (16_000, 1)), 16_000)})
    silence = decode_recording({"wav": encoded(np.zeros((16_000, 1)), 16_000)})
    first, second = modality.augment((silence, loud), _rng())["global"].views
    assert first.std() < 1e-3 < 0.1 < second.std()


def test_without_another_sample_mixing_is_refused_in_words() -> None:
    for options in ({"mixup": {"global": [1.0]}}, {"corrupted": {"corrupted": {"replace": 1.0}}}):
        with pytest.raises(ValueError, match=r"need another sample; set data.companions: \{name: random\}"):
            built(**options).augment((recording(),), _rng())


@pytest.mark.parametrize(
    ("override", "key"),
    [("modality.corrupted={}", "mixup"), ("modality.mixup.global=[0.0]", "corrupted.corrupted.replace")],
)
def test_a_run_without_companions_ends_before_it_begins(
    override: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [override, "data.companions=null", "objectives.dino.student_groups=[global]", f"run_dir={tmp_path / 'run'}"]
    assert ssl_train([str(SMOKE / "spectrogram.yaml"), *given]) == 1
    assert f"data.companions: missing; modality.{key} needs other samples" in capsys.readouterr().err


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", ["repeat", "zeros"])
@pytest.mark.parametrize("seconds", [0.0005, 0.02, 0.3])
def test_short_and_silent_recordings_have_views(seconds: float, short: str) -> None:
    """One of a few samples, one shorter than a frame, one shorter than a crop: loud ones and silence."""
    everything = {"gain": {"global": [1.0]}, "mixup": {"global": [1.0]}, "resized_crop": {"global": [1.0]},
                  "bands": {"global": [1.0]}, "corrupted": {"corrupted": {}}}  # fmt: skip
    modality = built(short=short, normalization={"mean": -4.0, "std": 4.0, "subtract_time_mean": True}, **everything)
    silence = decode_recording({"wav": encoded(np.zeros((max(int(seconds * 16_000), 1), 1)), 16_000)})
    for example in (recording(seconds), silence):
        assert all(views.views.isfinite().all() for views in modality.augment((example, silence), _rng()).values())
        assert modality.preprocess(example).isfinite().all()


def test_every_error_of_a_configuration_at_once() -> None:
    given = {
        "patch_size": [10, 48],
        "crops": {"global": {"num": 0}, "local": {"num": 1, "num_frames": 96}},
        "fbank": {"high_hz": 9000.0},
        "mixup": {"globl": [0.5]},
        "gain_db": [3.0, -3.0],
        "corrupted": {"local": {"of": "global", "covered": [0.0, 1.5]}},
        "resized_crop_shares": {"time": [0.0, 1.0]},
        "evaluation_frames": 1001,
    }
    with pytest.raises(ConfigError) as error:
        validate(Config, {"name": "spectrogram", **given})
    assert error.value.lines == [
        "fbank: bins from 20.0 to 9000.0 Hz: expected 0 <= low < high <= 8000.0",
        "crops.local.num_frames: 96 is not a multiple of patch_size 10; use 90 or 100",
        "evaluation_frames: 1001 is not a multiple of patch_size 10; use 1000 or 1010",
        "fbank.num_bins: 128 is not a multiple of patch_size 48; use 96 or 144",
        "crops.global.num: at least 1, the teacher needs a view",
        "mixup.globl: no group of crops has this name; did you mean 'global'?",
        "corrupted.local: there is a group of crops of this name; choose another",
        "corrupted.local.of: no group of crops 'global'; there are local",
        "corrupted.local.covered: [0, 1.5] must be [min, max] with 0 < min <= max <= 0.95",
        "gain_db: [3, -3] must be [min, max]",
        "resized_crop_shares.time: [0, 1] must be [min, max] with 0 < min <= max <= 4",
    ]


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["dinov2", "timm"])
def test_positions_stretch_in_time_and_stay_as_they_are_along_the_bands(convention: Any) -> None:
    """592 -> 1024 frames: 37 x 8 -> 64 x 8 is the interpolation in time of each band by itself."""
    positions = torch.randn(1, 37 * 8, 6)
    found = interpolate_positions(positions, (37, 8), (64, 8), convention).reshape(64, 8, 6)
    for band in range(8):
        line = positions.reshape(37, 8, 6)[:, band].T[None, :, None]  # (1, 6, 1, 37)
        scaled: dict[str, Any] = (
            {"scale_factor": (1.0, 64.1 / 37)} if convention == "dinov2" else {"size": (1, 64), "antialias": True}
        )
        expected = F.interpolate(line, mode="bicubic", **scaled)[0, :, 0].T
        assert torch.allclose(found[:, band], expected, atol=1e-5)


def test_an_encoder_of_592_frames_runs_on_1024() -> None:
    modality = validate(Config, {"name": "spectrogram", "evaluation_frames": 1024}).build(None)
    vit = Vit(name="vit", embed_dim=32, depth=1, num_heads=2).build(modality, "global").eval()
    view = modality.preprocess(recording(11.0))
    assert view.shape == (1, 1024, 128) and modality.groups["global"].grid == (37, 8)
    with torch.no_grad():
        (features,) = vit([Input(view[None, None])])
    assert features.grid == (64, 8) and features.patches.shape[-2:] == (512, 32)


# -- exports, other weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"
    options = ["modality.normalization.std_factor=2.0", "modality.evaluation_frames=48", "modality.short=zeros"]
    assert ssl_train([str(SMOKE / "spectrogram.yaml"), f"run_dir={folder}", "steps=1", *options]) == 0
    return folder


def preprocessed_by(facts: dict[str, Any], data: bytes) -> Tensor:
    """What `preprocessing` in an export's config.json says, done by hand."""
    sound = decode_audio(data)
    mono = Sound(sound.samples.mean(axis=0, keepdims=True), sound.sample_rate)
    samples = torch.from_numpy(resample(mono, facts["sample_rate"]).samples[0])
    assert facts["channels"] == "mean" and facts["chunk"] == "center" and facts["short"] == "zeros"
    start = max(len(samples) - facts["num_samples"], 0) // 2
    chunk = torch.zeros(facts["num_samples"])
    held = samples[start : start + facts["num_samples"]]
    chunk[: len(held)] = held
    bins = Fbank(**facts["fbank"])(chunk)
    normal = facts["normalization"]
    assert not normal["subtract_time_mean"]
    return ((bins - normal["mean"]) / (normal["std_factor"] * normal["std"]))[None]


def test_an_export_says_every_step_of_preprocessing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ssl_export([str(run), "--format", "timm", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "timm has no transform for sound" in printed and "create_transform" not in printed
    written = json.loads((tmp_path / "out/config.json").read_text())
    facts = written["ssl_platform"]["preprocessing"]
    modality: Any = Encoder.load(run).modality
    again: Any = Encoder.load(tmp_path / "out").modality
    for seconds in (2.0, 0.2):
        data = encoded(tone(seconds, 44_100, channels=2), 44_100)
        view = modality.preprocess(modality.decode({"wav": data}))
        assert list(view.shape) == facts["input_size"] == [1, 48, 128]
        assert torch.equal(preprocessed_by(facts, data), view)
        assert torch.equal(again.preprocess(again.decode({"wav": data})), view)
    assert facts["normalization"]["std_factor"] == 2.0
    assert written["pretrained_cfg"]["std"] == [2 * facts["normalization"]["std"]]


def test_weights_of_images_start_a_run_on_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three channels are added up, positions of 4 x 4 are read at 4 x 16, and pixels' mean and std are left alone."""
    assert ssl_train([str(SMOKE / "pathology.yaml"), f"run_dir={tmp_path / 'image'}", "steps=1"]) == 0
    options = ["steps=1", f"run_dir={tmp_path / 'sound'}", "modality.patch_size=8", "optim.lr=0.0"]
    options += [f"networks.student.init.path={tmp_path / 'image'}"]
    assert ssl_train([str(SMOKE / "spectrogram.yaml"), *options]) == 0
    log = capsys.readouterr().err
    assert "channels 3 -> 1" in log and "grid 4 x 4 -> 4 x 16" in log
    assert "learned with pixels, these views are fbank" in log
    image, sound = (Encoder.load(tmp_path / name).network.state_dict() for name in ("image", "sound"))
    key = "patch_embed.proj.weight"
    assert torch.allclose(sound[key], image[key].sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(sound["patch_embed.proj.bias"], image["patch_embed.proj.bias"])


# -- the page ----------------------------------------------------------------------------------------------------------


def test_python_of_the_page_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/modalities/spectrogram.md").read_text()
    embed, measure = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "bell.wav").write_bytes(encoded(tone(0.5, 44_100), 44_100))
    names: dict[str, Any] = {}
    exec(embed.replace("bell.wav", f"{tmp_path}/bell.wav").replace('Path("model")', f'Path("{run}")'), names)
    assert names["features"].cls.shape == (1, 32)
    exec(measure.replace("shards/train", str(ROOT / "tests/data/sonic_pi")), {})
    mean, std = json.loads(capsys.readouterr().out.splitlines()[-1].replace("(", "[").replace(")", "]"))
    assert -12 < mean < -8 and 4 < std < 7


def test_the_page_names_every_key() -> None:
    table = (ROOT / "docs/modalities/spectrogram.md").read_text()
    assert [key for key in Config.model_fields if f"`{key}" not in table and key != "name"] == []
