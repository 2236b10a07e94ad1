"""Noise at exact ratios and rooms that neither delay nor amplify; folders that cannot be used are told before a run."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import convolve

from ssl_platform.config import ConfigError, validate
from ssl_platform.modalities._noise_and_reverb import (
    NEGLIGIBLE,
    NoiseConfig,
    ReverbConfig,
    peak_normalized,
    power,
    read_response,
    reverberated,
    with_noise,
)
from ssl_platform.modalities._sound_folder import SoundFolder, random_segment

RATE = 16_000


def write(path: Path, samples: Any, rate: int = RATE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(samples), rate, **options)
    return path


def white(seconds: float = 1.0, seed: int = 0, scale: float = 0.1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=int(seconds * RATE)) * scale


def speech_like(num_samples: int = RATE, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(white(num_samples / RATE, seed)).float()


# -- ratios ------------------------------------------------------------------------------------------------------------


@given(st.floats(-20, 60), st.floats(1e-3, 1.0), st.floats(1e-3, 1.0), st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_the_ratio_is_exact_in_double_precision(snr: float, loud: float, noisy: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples, noise = (torch.from_numpy(rng.normal(size=4000) * scale) for scale in (loud, noisy))
    added = with_noise(samples, noise, snr) - samples
    assert 10 * math.log10(power(samples) / power(added)) == pytest.approx(snr, abs=1e-6)


@pytest.mark.parametrize("snr", [0.0, 15.0, 30.0])
def test_the_ratio_of_what_training_adds(tmp_path: Path, snr: float) -> None:
    write(tmp_path / "noise/a.wav", white(0.3, scale=0.02), subtype="FLOAT")
    write(tmp_path / "noise/deep/b.flac", white(5, seed=2, scale=0.2))
    write(tmp_path / "noise/c.wav", np.stack([white(5, seed=3), white(5, seed=4)], axis=1), rate=44_100)
    noise = opened(tmp_path, {"noise": [snr, snr], "speech": None, "music": None})
    samples = speech_like()
    for seed in range(6):
        added = (noise(samples, np.random.default_rng(seed)) - samples).double()
        assert 10 * math.log10(power(samples) / power(added)) == pytest.approx(snr, abs=1e-3)  # float32 samples


def test_ratios_are_spread_over_the_interval_and_babble_is_a_sum(tmp_path: Path) -> None:
    for i in range(8):
        write(tmp_path / f"speech/{i}.wav", np.sin(2 * np.pi * (500 + 500 * i) * np.arange(RATE) / RATE) * 0.1)
    noise = opened(tmp_path, {"noise": None, "music": None, "speech": {"snr": [13, 20], "num": [3, 7]}})
    samples, ratios, tones = speech_like(), [], set()
    for seed in range(40):
        added = noise(samples, np.random.default_rng(seed)) - samples
        ratios.append(10 * math.log10(power(samples) / power(added)))
        lines = torch.fft.rfft(added).abs()
        tones.add(int((lines > 0.2 * lines.max()).sum()))  # one file drawn twice is louder
    assert 13 <= min(ratios) < 14 and 19 < max(ratios) <= 20 + 1e-4
    assert tones <= set(range(1, 8)) and len(tones) > 3


def opened(root: Path, kinds: dict[str, Any] | None = None) -> Any:
    section: dict[str, Any] = {"root": str(root)} | ({} if kinds is None else {"kinds": kinds})
    return validate(NoiseConfig, section).open(RATE)


def test_noise_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"noise/{i}.wav", white(3, seed=i))
    noise = opened(tmp_path, {"speech": None, "music": None})
    samples = speech_like()
    first, again, other = (noise(samples, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_segments_are_read_where_they_lie(tmp_path: Path) -> None:
    """A ramp tells from where; the whole file is never decoded."""
    path = write(tmp_path / "ramp.wav", np.linspace(0, 1, 100 * RATE), subtype="FLOAT")
    starts = []
    for seed in range(20):
        segment = random_segment(path, RATE, RATE, np.random.default_rng(seed))
        assert segment.shape == (RATE,)
        starts.append(float(segment[0]) * 100)
        np.testing.assert_allclose(segment.diff().numpy(), 1 / (100 * RATE), atol=1e-6)
    assert min(starts) < 20 and max(starts) > 80


@given(st.integers(400, 3000), st.integers(1, 8000))
@settings(deadline=None, max_examples=30)
def test_a_noise_shorter_than_a_chunk_is_repeated(length: int, wanted: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "short.wav"), white()[:length], subtype="FLOAT")
        whole = soundfile.read(path, dtype="float32")[0]
        segment = random_segment(path, wanted, RATE, np.random.default_rng(0)).numpy()
    if wanted > length:
        np.testing.assert_array_equal(segment, np.resize(whole, wanted))
    else:
        assert any(np.array_equal(segment, whole[i : i + wanted]) for i in range(length - wanted + 1))


# -- rooms -------------------------------------------------------------------------------------------------------------


def room(seconds: float = 0.3, delay: int = 80, seed: int = 0) -> torch.Tensor:
    count = int(seconds * RATE)
    response = np.random.default_rng(seed).normal(size=count) * np.exp(-np.arange(count) / RATE * 6.9 / 0.2) * 0.1
    response[:delay], response[delay] = 0, 1.0
    return torch.from_numpy(response)


@given(st.integers(1, 5000), st.integers(0, 500), st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_reverberation_is_the_convolution_from_the_direct_path_on(length: int, delay: int, seed: int) -> None:
    samples, response = torch.from_numpy(white(seed=seed)[:length]), room(delay=delay, seed=seed)
    normalized = (response / response.square().sum().sqrt()).numpy()
    expected = convolve(samples.numpy(), normalized)[delay : delay + length]
    found = reverberated(samples, response)
    assert found.shape == samples.shape
    # What is left out of the tail has this share of the energy.
    error = float(np.square(found.numpy() - expected).sum())
    assert error <= 4 * NEGLIGIBLE * float(samples.square().sum()) * max(1, math.log(length + 1))


def test_a_delayed_pulse_changes_nothing() -> None:
    samples = speech_like()
    for delay in (0, 1, 999, 20_000):
        response = torch.zeros(delay + 1)
        response[delay] = -0.3
        torch.testing.assert_close(reverberated(samples, response), -samples, atol=1e-6, rtol=1e-5)


def test_a_room_longer_than_the_chunk() -> None:
    assert reverberated(speech_like(100), room(2.0).float()).shape == (100,)


def test_energy_of_noise_is_kept() -> None:
    samples = speech_like(5 * RATE)
    found = [power(reverberated(samples, room(seed=seed).float())) / power(samples) for seed in range(8)]
    assert all(0.8 < one < 1.25 for one in found)


def test_peaks_and_silence() -> None:
    assert float(peak_normalized(speech_like()).abs().max()) == pytest.approx(1.0)
    silence = torch.zeros(1000)
    for found in (
        peak_normalized(silence),
        with_noise(silence, speech_like(1000), 10.0),
        reverberated(silence, room()),
    ):
        assert torch.equal(found.float(), silence)


# -- files that cannot be used -----------------------------------------------------------------------------------------


def bad_noises(folder: Path) -> dict[str, str]:
    """{file: what is said of it}"""
    write(folder / "one.wav", [0.5])
    write(folder / "silent.wav", np.zeros(RATE))
    write(folder / "opposite.wav", np.stack([white(), -white()], axis=1), rate=48_000, subtype="FLOAT")
    write(folder / "nan.wav", np.full(RATE, np.nan), subtype="FLOAT")
    soundfile.write(folder / "none.wav", np.zeros(0), RATE)
    whole = write(folder / "whole.flac", white(2)).read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (folder / "whole.flac").unlink()
    (folder / "text.wav").write_text("not a sound")
    (folder / "empty.wav").touch()
    return {
        "one.wav": "1 samples at 16000 Hz are shorter than 25 ms",
        "silent.wav": "silent",
        "opposite.wav": "silent",
        "nan.wav": "holds NaN or infinite samples",
        "none.wav": "holds no samples",
        "cut.flac": "",
        "text.wav": "",
        "empty.wav": "",
    }


def test_bad_noises_are_named_once_and_others_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "noise").mkdir()
    said = bad_noises(tmp_path / "noise")
    for i in range(2):
        write(tmp_path / f"noise/good{i}.wav", white(2, seed=i))
    noise = opened(tmp_path, {"speech": None, "music": None})
    samples = speech_like(RATE)
    with caplog.at_level(logging.WARNING):
        found = [noise(samples, np.random.default_rng(seed)) for seed in range(80)]
    assert all(bool(one.isfinite().all()) and not torch.equal(one, samples) for one in found)
    messages = [record.getMessage() for record in caplog.records]
    for name, words in said.items():
        [message] = [text for text in messages if f"/{name}: " in text]
        assert message.startswith("noise.kinds.noise: ") and f"{name}: {words}" in message
        assert message.endswith("; another file is drawn in its place")
    assert torch.equal(noise(samples, np.random.default_rng(7)), found[7])


def test_bad_responses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "zeros.wav", np.zeros(RATE))
    write(tmp_path / "long.wav", white(11))
    for name, words in (("zeros", "all zeros"), ("long", "11.0 s: no impulse response is longer than 10 s")):
        with pytest.raises(ValueError, match=words):
            read_response(tmp_path / f"{name}.wav", RATE)
    write(tmp_path / "room.wav", room().numpy())
    reverb = validate(ReverbConfig, {"root": str(tmp_path)}).open(RATE)
    samples = speech_like(2000)
    assert all(bool(reverb(samples, np.random.default_rng(seed)).isfinite().all()) for seed in range(20))
    assert sorted(record.getMessage().rpartition("/")[2].partition(":")[0] for record in caplog.records) == [
        "long.wav", "zeros.wav",
    ]  # fmt: skip


def test_a_response_of_many_channels_is_its_first_one(tmp_path: Path) -> None:
    one = room().numpy()
    several = write(tmp_path / "four.wav", np.stack([one, -one, one[::-1], one], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(read_response(several, RATE), one, atol=1e-6)


def test_only_bad_files_are_an_error_of_the_sample(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.wav", np.zeros(RATE))
    folder = SoundFolder(tmp_path, "noise.kinds.noise")
    with pytest.raises(ValueError, match="noise.kinds.noise: 3 files were drawn and none can be used, .*wav: silent"):
        folder.draw(np.random.default_rng(0), lambda path: random_segment(path, 100, RATE, np.random.default_rng(0)))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="noise.root: .*/gone: no such folder"):
        opened(tmp_path / "gone")
    file = write(tmp_path / "file.wav", white())
    with pytest.raises(ValueError, match="noise.root: .*file.wav: not a folder"):
        opened(file)
    (tmp_path / "noise").mkdir()
    with pytest.raises(ValueError, match="noise.kinds.noise: .*/noise: holds no sound files \\(wav, flac"):
        opened(tmp_path)
    (tmp_path / "noise/a.wav").write_text("text")
    with pytest.raises(ValueError, match="noise.kinds.noise: .*: none of 1 of its 1 sound files .* can be read"):
        opened(tmp_path)
    write(tmp_path / "noise/b.wav", white())
    with pytest.raises(
        ValueError, match="noise.kinds.speech: .*/speech: no such folder; leave .* out with speech: null"
    ):
        opened(tmp_path)
    with pytest.raises(ValueError, match="reverb.root: .*gone: no such folder"):
        validate(ReverbConfig, {"root": str(tmp_path / "gone")}).open(RATE)


def test_settings_that_have_no_meaning() -> None:
    for section, words in (
        ({}, "root: missing; give the folder of noise/, speech/ and music/ as modality.noise.root=FOLDER"),
        ({"root": "x", "kinds": {"noise": [15, 0]}}, "kinds.noise.snr: [15.0, 0.0]: expected [low, high]"),
        ({"root": "x", "kinds": {"noise": {"snr": [0, 1], "num": [0, 3]}}}, "kinds.noise.num.0"),
        ({"root": "x", "kinds": {"noise": {"snr": [0, 1], "num": [3, 2]}}}, "kinds.noise.num: [3, 2]"),
        ({"root": "x", "kinds": dict.fromkeys(("noise", "speech", "music"))}, "kinds: every kind is left out"),
        ({"root": "x", "kind": {}}, "kind: unknown key; did you mean 'kinds'?"),
    ):
        with pytest.raises(ConfigError) as error:
            validate(NoiseConfig, section)
        assert words in str(error.value), error.value
    with pytest.raises(
        ConfigError, match="root: missing; give the folder of impulse responses as modality.reverb.root"
    ):
        validate(ReverbConfig, {})
