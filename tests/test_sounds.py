"""Recordings read piece by piece, chunks of them, filter banks and their normalisation in a configuration."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_platform.config import ConfigError, validate
from ssl_platform.modalities import _sounds
from ssl_platform.modalities._audio import Sound
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._fbank_normalization import FbankConfig, NormalizationConfig
from ssl_platform.modalities._sounds import (
    Recording,
    center_chunk,
    decode_recording,
    first_chunk,
    measure_normalization,
    random_chunk,
    samples_of,
)
from tests.sounds import encoded, record, tone, wav_that_claims


def long_and_whole(monkeypatch: pytest.MonkeyPatch, found: dict[str, bytes]) -> tuple[Recording, Recording]:
    """The same sound, once decoded piece by piece and once as a whole."""
    monkeypatch.setattr(_sounds, "WHOLE_SECONDS", 0.5)
    by_pieces = decode_recording(found)
    monkeypatch.setattr(_sounds, "WHOLE_SECONDS", 100.0)
    return by_pieces, decode_recording(found)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 11_111, 16_000, 44_100])
def test_a_piece_equals_that_part_of_the_whole(rate: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by_pieces, whole = long_and_whole(monkeypatch, record(3.0, rate, kind, channels=2))
    assert not by_pieces._whole and whole._whole and by_pieces.duration == whole.duration == pytest.approx(3, abs=1e-3)
    for start, num_samples in ((0.0, 100), (1.2345, 4000), (2.9, 8000)):
        mine, theirs = (one.read(start, num_samples, 16_000) for one in (by_pieces, whole))
        assert mine.shape == (num_samples,)
        if not (kind == "ogg" and start > 2):  # libsndfile 1.2.2 seeks up to 128 samples too far in the last page
            assert torch.allclose(mine, theirs, atol=2e-5)
    assert not by_pieces.read(2.9, 8000, 16_000)[1700:].any(), "zeros after the end"


def test_a_piece_of_a_long_recording_costs_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    by_pieces, _ = long_and_whole(monkeypatch, record(10.0, 44_100))
    read, seen = by_pieces.file.read, []

    def counted(start: float = 0.0, stop: float | None = None) -> Sound:
        seen.append(read(start, stop))
        return seen[-1]

    monkeypatch.setattr(by_pieces.file, "read", counted)
    by_pieces.read(5.0, 16_000, 16_000)
    assert len(seen) == 1 and seen[0].samples.shape[1] < 1.1 * 44_100


def test_channels_become_their_mean() -> None:
    samples = np.stack([np.full(4000, 0.5), np.full(4000, -0.25)], axis=1)
    found = decode_recording({"wav": encoded(samples, 16_000)}).read(0.0, 4000, 16_000)
    assert torch.allclose(found, torch.tensor(0.125), atol=1e-4)


@given(total=st.integers(1, 400), num_samples=st.integers(1, 400), seed=st.integers(0, 99))
def test_chunks_are_parts_repetitions_or_padded(total: int, num_samples: int, seed: int) -> None:
    samples = np.arange(1, total + 1)[:, None] / 1000
    recording = decode_recording({"wav": encoded(samples, 16_000, subtype="FLOAT")})
    line = torch.from_numpy(samples[:, 0]).float()
    for short in ("repeat", "zeros"):
        chunk = random_chunk(recording, num_samples, 16_000, np.random.default_rng(seed), short)  # type: ignore[arg-type]
        first = first_chunk(recording, num_samples, 16_000, short)  # type: ignore[arg-type]
        middle = center_chunk(recording, num_samples, 16_000, short)  # type: ignore[arg-type]
        assert len(chunk) == len(first) == len(middle) == num_samples
        if total >= num_samples:
            start = round(float(chunk[0]) * 1000) - 1
            assert torch.equal(chunk, line[start : start + num_samples])
            assert torch.equal(first, line[:num_samples])
            assert torch.equal(middle, line[(total - num_samples) // 2 :][:num_samples])
        elif short == "repeat":
            assert torch.equal(first, line.repeat(num_samples)[:num_samples]) and torch.equal(middle, first)
            start = round(float(chunk[0]) * 1000) - 1
            assert torch.equal(chunk, line.roll(-start).repeat(num_samples)[:num_samples])
        else:
            assert torch.equal(first[:total], line) and not first[total:].any() and torch.equal(middle, first)
            start = int(chunk.nonzero()[0])
            assert torch.equal(chunk[start : start + total], line) and int(chunk.count_nonzero()) == total


@pytest.mark.parametrize("settings", [{}, {"snip_edges": False}, {"frame_ms": 32.0, "shift_ms": 7.0}])
def test_so_many_samples_make_so_many_frames(settings: dict[str, Any]) -> None:
    for num_frames in (1, 16, 592):
        fbank = Fbank(**settings)
        num_samples = samples_of(num_frames, fbank)
        assert fbank.num_frames(num_samples) == num_frames
        assert not fbank.snip_edges or fbank.num_frames(num_samples - 1) == num_frames - 1


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_files_are_named_when_they_are_decoded() -> None:
    nan = tone(0.1, 16_000)
    nan[50] = np.nan
    for data, message in (
        (b"", "zero bytes"),
        (encoded(np.zeros((0, 1)), 16_000), "holds no samples"),
        (encoded(nan, 16_000, subtype="FLOAT"), "NaN"),
        (encoded(tone(1.0, 1), 1), "1 Hz"),
        (wav_that_claims(16_000, 4000), "truncated"),
        (wav_that_claims(1_000_000_000, 16_000), "truncated"),  # a million seconds take no memory
        (b"no sound at all, but bytes", "not a sound file"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_recording({"wav": data})
    with pytest.raises(ValueError, match=r"no sound in the record: it has txt, not wav/"):
        decode_recording({"txt": b"hello"})


def test_of_long_files_the_part_that_is_read_is_checked() -> None:
    nan = tone(25.0, 8000)
    nan[80_000] = np.nan
    recording = decode_recording({"wav": encoded(nan, 8000, subtype="FLOAT")})
    assert recording.read(1.0, 8000, 8000).isfinite().all()
    with pytest.raises(ValueError, match="NaN"):
        recording.read(9.5, 8000, 8000)


# -- filter banks ------------------------------------------------------------------------------------------------------


def test_the_configuration_has_every_setting_of_the_filter_banks() -> None:
    assert FbankConfig().build(16_000) == Fbank()
    assert FbankConfig.model_fields.keys() == Fbank().describe().keys() - {"sample_rate"}
    assert FbankConfig(high_hz=8000).problems(16_000) == []
    [line] = FbankConfig(high_hz=8000).problems(8000)
    assert line == "fbank: bins from 20.0 to 8000.0 Hz: expected 0 <= low < high <= 4000.0"


def statistics(fbank: Fbank, **changes: Any) -> dict[str, Any]:
    of = {"values": "fbank", **fbank.describe()}
    return {"mean": [-8.0, -4.0, -6.0], "std": [1.0, 2.0, 3.0], "of": {**of, **changes}}


def test_mean_and_std_of_all_bands_follow_from_those_of_each() -> None:
    fbank, bins = Fbank(num_bins=3), torch.randn(50, 3) * torch.tensor([1.0, 2, 3]) - torch.tensor([8.0, 4, 6])
    std, mean = torch.std_mean(bins, dim=0, correction=0)
    measured = {**statistics(fbank), "mean": mean.tolist(), "std": std.tolist()}
    views = NormalizationConfig().build(measured, fbank)(bins)
    assert torch.allclose(views, (bins - bins.mean()) / bins.std(correction=0), atol=1e-5)
    twice = NormalizationConfig(std_factor=2.0).build(measured, fbank)(bins)
    assert torch.allclose(twice, views / 2, atol=1e-6)
    each = NormalizationConfig(per_bin=True).build(measured, fbank)(bins)
    assert torch.allclose(each, (bins - mean) / std, atol=1e-5)
    centered = NormalizationConfig(mean=5.0, std=2.0, subtract_time_mean=True).build(None, fbank)(bins)
    assert torch.allclose(centered, (bins - mean) / 2, atol=1e-5)


def test_views_are_not_changed_in_place() -> None:
    bins = torch.randn(4, 3)
    before = bins.clone()
    NormalizationConfig(mean=1.0, std=2.0).build(None, Fbank(num_bins=3))(bins)
    assert torch.equal(bins, before)


def test_a_band_that_never_changes_is_centred() -> None:
    fbank = Fbank(num_bins=3)
    constant = {**statistics(fbank), "std": [1.0, 0.0, 1.0]}
    views = NormalizationConfig(per_bin=True).build(constant, fbank)(torch.tensor([[-8.0, -4.0, -6.0]]))
    assert torch.equal(views, torch.zeros(1, 3))


def test_statistics_of_other_settings_are_refused_by_their_names() -> None:
    fbank = Fbank(num_bins=3, window="hanning")
    with pytest.raises(ValueError, match="fbank.window 'povey' there, 'hanning' here.*measure_normalization"):
        NormalizationConfig().build(statistics(Fbank(num_bins=3)), fbank)
    with pytest.raises(ValueError, match="sample_rate 8000 there, 16000 here"):
        NormalizationConfig().build(statistics(Fbank(num_bins=3), sample_rate=8000), Fbank(num_bins=3))
    with pytest.raises(ValueError, match="not of sound"):
        NormalizationConfig().build({"mean": [0.5] * 3, "std": [0.2] * 3}, fbank)
    given = NormalizationConfig(mean=-4.0, std=4.0).build(statistics(Fbank(num_bins=3)), fbank)
    assert given.description()["mean"] == -4.0, "numbers that are given need no statistics"
    assert NormalizationConfig().build(statistics(Fbank(num_bins=3), dither=1.0), Fbank(num_bins=3)) is not None


def test_numbers_for_other_settings_can_be_measured() -> None:
    fbank, recordings = Fbank(window="hanning"), [decode_recording(record(0.5)), decode_recording(record(0.3))]
    mean, std = measure_normalization(recordings, fbank)
    bins = torch.cat([fbank(one.read(0.0, one.num_samples(16_000), 16_000)) for one in recordings])
    assert (mean, std) == (pytest.approx(bins.mean().item(), rel=1e-5), pytest.approx(bins.std().item(), rel=1e-3))
    with pytest.raises(ValueError, match="as long as a frame"):
        measure_normalization([decode_recording(record(0.01))], fbank)


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({"mean": 1.0}, ["mean, std: give both or neither"]),
        (
            {"mean": 1.0, "std": 0.0, "per_bin": True},
            [
                "std: 0 must be above 0",
                "per_bin: takes the mean and std of each band from the shards; leave mean and std out",
            ],
        ),
    ],
)
def test_normalisation_that_cannot_be(given: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        validate(NormalizationConfig, given)
    assert error.value.lines == lines
