"""Voices: chunks of one utterance, each augmented by itself, and the one view that evaluation and exports agree on."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import kaldi_native_fbank
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_platform.config import ConfigError, validate
from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader
from ssl_platform.encoder import Encoder
from ssl_platform.modalities import Filtered
from ssl_platform.modalities._sounds import Recording, decode_recording
from ssl_platform.modalities._speech import MARGIN, WINDOW, trimmed
from ssl_platform.modalities.speaker import Config, Speaker
from ssl_platform.train import main

DATA = Path(__file__).parent / "data"
SMOKE = Path(__file__).parents[1] / "configs/smoke/speaker.yaml"
RATE = 16_000


def speaker(**settings: Any) -> Speaker:
    return validate(Config, {"name": "speaker", **settings}).build(None)


def voice(number: int = 0) -> Recording:
    return decode_recording(ShardReader(Index.open(DATA / "voices"), 2).read(number).members)


def recording(samples: Any, rate: int = RATE, **options: Any) -> Recording:
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples), rate, format="WAV", **options)
    return decode_recording({"wav": file.getvalue()})


def tone(seconds: float, hertz: float = 440.0) -> np.ndarray[Any, Any]:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE) * 0.3


def views(modality: Speaker, *examples: Recording, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: one.views for name, one in modality.augment(examples, np.random.default_rng(seed)).items()}


# -- views -------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_wespeakers_dino() -> None:
    config = Config()
    assert {name: (one.num, one.num_frames, one.augment) for name, one in config.chunks.items()} == {
        "global": (2, 300, 1.0),
        "local": (4, 200, 1.0),
    }
    noise = validate(Config, {"name": "speaker", "noise": {"root": "MUSAN"}}).noise
    assert noise is not None
    assert {name: kind.snr for name, kind in noise.kinds.items() if kind} == {
        "noise": (0, 15), "speech": (10, 30), "music": (5, 15),
    }  # fmt: skip
    fbank = config.fbank
    assert (fbank.num_bins, fbank.window, fbank.dither, fbank.scale) == (80, "hamming", 1.0, 32768.0)
    assert config.normalization.subtract_time_mean and config.speed == () and config.vad is None


def test_filter_banks_are_kaldis_less_their_mean_over_time() -> None:
    modality = speaker(chunks={"global": {"num_frames": 100}}, patch_size=[4, 80])
    found = modality.preprocess(voice())[0].numpy()
    whole = voice().read(0.0, voice().num_samples(RATE), RATE).numpy() * 32768
    length = 99 * 160 + 400
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.window_type, options.frame_opts.dither, options.mel_opts.num_bins = "hamming", 0, 80
    kaldi = kaldi_native_fbank.OnlineFbank(options)
    first = (len(whole) - length) // 2
    kaldi.accept_waveform(RATE, whole[first : first + length].tolist())
    bins = np.stack([kaldi.get_frame(i) for i in range(kaldi.num_frames_ready)])
    np.testing.assert_allclose(found, bins - bins.mean(0), atol=2e-3)


def test_every_chunk_has_its_place_and_its_own_noise() -> None:
    root = {"noise": {"root": str(DATA / "noise"), "kinds": {"speech": None, "music": None}}}
    quiet = {"fbank": {"dither": 0.0}}
    modality, clean = speaker(**root, **quiet), speaker(**quiet)
    made, bare = views(modality, voice()), views(clean, voice())
    assert made["global"].shape == (2, 1, 300, 80) and made["local"].shape == (4, 1, 200, 80)
    for group in ("global", "local"):
        flat = made[group].flatten(1)
        assert len(torch.unique(flat, dim=0)) == len(flat)
        torch.testing.assert_close(
            made[group].mean(dim=2), torch.zeros_like(made[group].mean(dim=2)), atol=1e-4, rtol=0
        )
        assert (made[group] - bare[group]).abs().mean() > 0.1


def test_groups_may_stay_clean() -> None:
    """What SDPN shows its teacher."""
    root = {"noise": {"root": str(DATA / "noise"), "kinds": {"speech": None, "music": None}}}
    modality = speaker(**root, fbank={"dither": 0.0}, chunks={"global": {"num": 1, "augment": 0.0}})
    modality_clean = speaker(fbank={"dither": 0.0}, chunks={"global": {"num": 1}})
    assert torch.equal(views(modality, voice())["global"], views(modality_clean, voice())["global"])


def test_rooms_and_noises_are_equally_likely() -> None:
    modality = speaker(
        noise={"root": str(DATA / "noise"), "kinds": {"speech": None, "music": None}},
        reverb={"root": str(DATA / "noise/rooms")},
    )
    modality.prepare()
    assert modality._augmentations is not None
    calls: list[str] = []

    def counted(name: str) -> Any:
        return lambda chunk, rng: calls.append(name) or chunk

    modality._augmentations = [counted(type(one).__name__) for one in modality._augmentations]
    for seed in range(40):
        views(modality, voice(), seed=seed)
    assert len(calls) == 40 * 6 and 0.4 < calls.count("Reverb") / len(calls) < 0.6


def test_companions_take_turns() -> None:
    low, high = recording(tone(4, 300)), recording(tone(4, 3000))
    modality = speaker(fbank={"dither": 0.0}, normalization={"subtract_time_mean": False})
    loudest = views(modality, low, high)["global"].mean(dim=2).argmax(dim=-1).flatten().tolist()
    assert loudest[0] < 20 < loudest[1]


def test_speed_moves_the_pitch_of_all_views_together() -> None:
    modality = speaker(speed=[0.5, 2.0], fbank={"dither": 0.0}, normalization={"subtract_time_mean": False})
    found = set()
    for seed in range(8):
        made = views(modality, recording(tone(12, 1000)), seed=seed)
        peaks = {int(place) for one in made.values() for place in one.mean(dim=2).argmax(dim=-1).flatten()}
        assert max(peaks) - min(peaks) <= 1
        found.add(round(sum(peaks) / len(peaks)))
    assert len(found) == 2


@given(st.integers(1, 50_000), st.sampled_from(["repeat", "zeros"]), st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_any_length_makes_finite_views(length: int, short: str, seed: int) -> None:
    """Shorter than a frame and than a chunk included."""
    modality = speaker(short=short, chunks={"global": {"num_frames": 40}, "local": {"num": 2, "num_frames": 20}})
    samples = np.random.default_rng(seed).normal(size=length) * 0.1 + 1e-3
    for one in views(modality, recording(samples), seed=seed).values():
        assert bool(one.isfinite().all())
    assert bool(modality.preprocess(recording(samples)).isfinite().all())


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_silence() -> None:
    modality = speaker(noise={"root": str(DATA / "noise"), "kinds": {"speech": None, "music": None}})
    with pytest.raises(ValueError, match="silent: every sample of its chunks is 0"):
        views(modality, recording(np.zeros(4 * RATE)))
    assert torch.equal(modality.preprocess(recording(np.zeros(4 * RATE))), torch.zeros(1, 300, 80))
    half = np.concatenate([np.zeros(4 * RATE), tone(0.5)])
    assert all(bool(one.isfinite().all()) for one in views(modality, recording(half)).values())


def test_samples_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="holds NaN or infinite samples"):
        views(speaker(), recording(np.where(np.arange(RATE) == 500, np.nan, tone(1)), subtype="FLOAT"))


def test_records_without_sound() -> None:
    for data, words in (
        (b"", "the file has zero bytes"),
        (b"text", "not a sound file"),
        (None, "no sound in the record"),
    ):
        with pytest.raises(ValueError, match=words):
            speaker().decode({"wav": data} if data is not None else {"jpg": b"x"})
    file = io.BytesIO()
    soundfile.write(file, np.zeros(0), RATE, format="WAV")
    with pytest.raises(ValueError, match="holds no samples"):
        speaker().decode({"wav": file.getvalue()})


def test_settings_that_do_not_fit() -> None:
    for section, words in (
        ({"chunks": {"local": {"num_frames": 150}}}, "chunks.local.num_frames: 150 is not a multiple of patch_size[0] 4"),
        ({"chunks": {"local": {"num_frames": 150}}}, "use 148 or 152, or another patch_size"),
        ({"fbank": {"num_bins": 64}}, "fbank.num_bins: 64 is not a multiple of patch_size[1] 80; use 80"),
        ({"chunks": {"global": {"num": 0}}}, "chunks.global.num: at least 1"),
        ({"patch_size": [0, 80]}, "patch_size: [0, 80]: expected"),
        ({"evaluation": {"num_frames": 401}}, "evaluation.num_frames: 401 is not a multiple"),
        ({"sample_rate": 8000, "fbank": {"high_hz": 7600.0}}, "fbank: bins from 20.0 to 7600.0 Hz"),
        ({"vad": "webrtc"}, "vad: "),
        ({"speed": [0.1]}, "speed.0: "),
        ({"reverb": {}}, "reverb.root: missing"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            validate(Config, {"name": "speaker", **section})
        assert words in str(error.value), error.value


# -- a run -------------------------------------------------------------------------------------------------------------


def train(*overrides: str) -> int:
    return main([str(SMOKE), "steps=2", "save_every=2", "log_every=1", "tensorboard=false", *overrides])


def test_a_missing_folder_ends_a_run_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, words in (
        (f"modality.noise.root={tmp_path}/no", f"modality.noise.root: {tmp_path}/no: no such folder"),
        (f"modality.noise.root={tmp_path}", f"modality.noise.kinds.noise: {tmp_path}/noise: no such folder"),
        (f"modality.reverb.root={tmp_path}", f"modality.reverb.root: {tmp_path}: holds no sound files"),
    ):
        assert train(f"run_dir={tmp_path / 'run'}", override) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run/checkpoints").exists()


def test_encoders_need_no_noise_and_see_what_the_run_showed(tmp_path: Path) -> None:
    (tmp_path / "noise/noise").mkdir(parents=True)
    soundfile.write(tmp_path / "noise/noise/a.wav", tone(2), RATE)
    options = [
        f"modality.noise.root={tmp_path / 'noise'}",
        "modality.reverb=null",
        "modality.evaluation.num_frames=150",
    ]
    assert train(f"run_dir={tmp_path / 'run'}", *options) == 0
    (tmp_path / "noise").rename(tmp_path / "gone")
    encoder = Encoder.load(tmp_path / "run")
    assert str(tmp_path) not in json.dumps(encoder.config.model_dump(mode="json"))
    again = validate(type(encoder.config), encoder.config.model_dump(mode="json")).modality.build(None)
    view = encoder.modality.preprocess(voice(3))
    assert view.shape == (1, 150, 80) and torch.equal(view, again.preprocess(voice(3)))
    assert encoder.modality.description() == again.description() and again.description()["input_size"] == [1, 150, 80]
    assert encoder(view[None]).cls.isfinite().all()


def test_a_damaged_noise_is_told_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise").mkdir()
    for i in range(4):
        soundfile.write(tmp_path / f"noise/{i}.wav", tone(1, 100 * i + 100), RATE)
    (tmp_path / "noise/bad.wav").write_bytes(b"RIFF")
    assert train(f"run_dir={tmp_path / 'run'}", f"modality.noise.root={tmp_path}", "modality.reverb=null") == 0
    assert capsys.readouterr().err.count("WARNING noise.kinds.noise: ") == 1


# -- voice activity ----------------------------------------------------------------------------------------------------


def padded(before: float, behind: float) -> Recording:
    speech = voice().read(0.0, voice().num_samples(RATE), RATE).numpy()
    hiss = np.random.default_rng(0).normal(size=round((before + behind) * RATE)) * 1e-3
    return recording(np.concatenate([hiss[: round(before * RATE)], speech, hiss[round(before * RATE) :]]))


@pytest.mark.parametrize("detector", ["silero", "energy"])
@pytest.mark.parametrize(("before", "behind"), [(2.0, 1.0), (0.0, 0.0), (17.0, 33.0)])
def test_what_is_not_speech_is_cut_off(detector: Any, before: float, behind: float) -> None:
    if detector == "silero":
        pytest.importorskip("silero_vad")
    found = trimmed(padded(before, behind), detector)
    assert found is not None
    length, tolerance = voice().duration, 0.25 + MARGIN + 2 * WINDOW / RATE  # the utterance has some silence of its own
    assert found.start == pytest.approx(before, abs=tolerance) and found.stop == pytest.approx(
        before + length, abs=tolerance
    )
    assert found.num_samples(RATE) == pytest.approx((found.stop - found.start) * RATE, abs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modality = speaker(vad=detector)
        assert all(bool(one.isfinite().all()) for one in views(modality, padded(before, behind)).values())
        assert bool(modality.preprocess(padded(before, behind)).isfinite().all())


@pytest.mark.parametrize("detector", ["silero", "energy"])
def test_a_recording_without_speech_is_passed_over(detector: Any) -> None:
    if detector == "silero":
        pytest.importorskip("silero_vad")
    modality, silence = speaker(vad=detector), recording(np.zeros(3 * RATE))
    with pytest.raises(Filtered, match=f"no speech found \\(vad: {detector}\\)"):
        views(modality, silence)
    assert modality.preprocess(silence).shape == (1, 300, 80)
    assert modality.description()["vad"] == detector


def test_silero_leaves_the_number_of_threads_alone() -> None:
    pytest.importorskip("silero_vad")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        speaker(vad="silero").prepare()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert trimmed(recording(tone(0.01)), "silero") is None


def test_without_silero_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_platform.modalities import _speech

    def missing(name: str, why: str, extra: str) -> Any:
        raise ValueError(f"{why}: pip install 'ssl-platform[{extra}]'")

    _speech._silero.cache_clear()
    monkeypatch.setattr(_speech, "optional_package", missing)
    with pytest.raises(
        ValueError, match="vad: silero needs the package silero-vad: pip install 'ssl-platform\\[vad\\]'"
    ):
        speaker(vad="silero").prepare()


def test_a_picture_has_the_axes_of_the_tokens() -> None:
    modality = speaker()
    shown = modality.picture(views(modality, voice())["global"][0])
    assert shown.shape == (300, 80, 3) and shown.dtype == np.uint8 and shown.std() > 20
