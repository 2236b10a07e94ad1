"""Segments of long sounds: the same samples as those of the whole, without decoding the whole."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_platform.modalities import _sound_decoders
from ssl_platform.modalities._audio import Samples, SoundFile, decode_audio, read_info
from ssl_platform.modalities._fbank import Fbank
from ssl_platform.modalities._sound_decoders import FFmpegDecoder, WavDecoder

SECONDS = 12.0


def sweep(rate: int, channels: int = 2) -> np.ndarray:
    """(samples, channels): tones that go up and down, in noise."""
    seconds = np.arange(round(SECONDS * rate)) / rate
    tones = 0.3 * np.sin(2 * np.pi * (300 * seconds + 100 * np.sin(2 * seconds)))
    noise = np.random.default_rng(0).standard_normal((len(seconds), channels))
    return (tones[:, None] * (1 + np.arange(channels)) / channels + 0.02 * noise).astype(np.float32)


def by_soundfile(kind: str, subtype: str, rate: int) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 2, subtype, format=kind) as sound:
        for block in np.array_split(sweep(rate), 20):  # libsndfile's Vorbis crashes on long ones
            sound.write(block)
    return file.getvalue()


def by_ffmpeg(codec: str, container: str, rate: int, noise: float = 0.0, bit_rate: int = 0, **options: str) -> bytes:
    """Stereo, encoded by FFmpeg; `options` are of the codec."""
    samples = sweep(rate)
    samples += noise * np.random.default_rng(1).standard_normal(samples.shape).astype(np.float32)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout="stereo", options=options)
        if bit_rate:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, 0
        convert = av.AudioResampler(format=stream.format.name, layout="stereo", rate=rate)
        for part in convert.resample(frame):
            for packet in stream.encode(part):
                output.mux(packet)
        for packet in stream.encode(None):
            output.mux(packet)
    return file.getvalue()


MADE: dict[str, Callable[[], bytes]] = {
    "wav, 8 bits": lambda: by_soundfile("WAV", "PCM_U8", 8000),
    "wav, 16 bits": lambda: by_soundfile("WAV", "PCM_16", 16_000),
    "wav, 24 bits": lambda: by_soundfile("WAVEX", "PCM_24", 44_100),
    "wav, floats": lambda: by_soundfile("WAV", "FLOAT", 16_000),
    "wav, mu-law": lambda: by_soundfile("WAV", "ULAW", 8000),
    "wav, ADPCM": lambda: by_soundfile("WAV", "MS_ADPCM", 8000),
    "aiff": lambda: by_soundfile("AIFF", "PCM_16", 16_000),
    "flac": lambda: by_soundfile("FLAC", "PCM_16", 16_000),
    "flac, 44.1 kHz": lambda: by_soundfile("FLAC", "PCM_24", 44_100),
    "vorbis": lambda: by_soundfile("OGG", "VORBIS", 16_000),
    "vorbis, 44.1 kHz": lambda: by_soundfile("OGG", "VORBIS", 44_100),
    "opus, 16 kHz": lambda: by_soundfile("OGG", "OPUS", 16_000),
    "opus, 48 kHz": lambda: by_soundfile("OGG", "OPUS", 48_000),
    "mp3": lambda: by_soundfile("MP3", "MPEG_LAYER_III", 16_000),
    "mp3, 44.1 kHz": lambda: by_soundfile("MP3", "MPEG_LAYER_III", 44_100),
    "m4a": lambda: by_ffmpeg("aac", "ipod", 16_000, aac_pns="0"),
    "m4a, 44.1 kHz": lambda: by_ffmpeg("aac", "ipod", 44_100, aac_pns="0"),
    "m4a, fragments": lambda: fragmented(),
    "m4a, ALAC": lambda: by_ffmpeg("alac", "ipod", 16_000),
    "aac": lambda: by_ffmpeg("aac", "adts", 16_000, aac_pns="0"),
    "webm": lambda: by_ffmpeg("libopus", "webm", 48_000),
}


def fragmented() -> bytes:
    file = io.BytesIO()
    whole = by_ffmpeg("aac", "ipod", 16_000, aac_pns="0")
    with (
        av.open(io.BytesIO(whole)) as source,
        av.open(file, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov", "frag_duration": "1000000"}) as to,
    ):  # fmt: skip
        stream = to.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                to.mux(packet)
    return file.getvalue()


@cache
def made(name: str) -> tuple[bytes, Samples]:
    data = MADE[name]()
    return data, decode_audio(data).samples


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999), length=st.integers(1, 60_000), is_read_twice=st.booleans())
def test_a_segment_is_that_part_of_the_whole(name: str, share: float, length: int, is_read_twice: bool) -> None:
    data, whole = made(name)
    rate = read_info(data).sample_rate
    first = int(share * whole.shape[1])
    sound = SoundFile(data)
    if is_read_twice:
        sound.read(SECONDS / 2, SECONDS / 2 + 0.5)
    found = sound.read(first / rate, (first + length) / rate)
    expected = whole[:, first : first + length]
    assert found.sample_rate == rate and found.samples.shape == expected.shape
    if "mp3" in name or "opus" in name:
        np.testing.assert_allclose(found.samples, expected, atol=1e-4)
    else:
        np.testing.assert_array_equal(found.samples, expected)


def test_noise_that_aac_only_describes_has_the_same_spectrum() -> None:
    """Perceptual noise substitution stores energies of bands; each decoding draws another noise of them."""
    data = by_ffmpeg("aac", "ipod", 44_100, noise=0.2, bit_rate=64_000, aac_pns="1")
    whole, sound = decode_audio(data).samples, SoundFile(data)
    found = sound.read(5.0, 7.0).samples
    expected = whole[:, 220_500:308_700]
    fbank = Fbank(sample_rate=44_100, num_bins=40)
    bins = [fbank(torch.from_numpy(samples.copy())).mean(dim=(0, 1)) for samples in (found, expected)]
    torch.testing.assert_close(bins[0], bins[1], atol=0.3, rtol=0)
    np.testing.assert_array_equal(found, sound.read(5.0, 7.0).samples)
    np.testing.assert_array_equal(found, decode_audio(data, 5.0, 7.0).samples)
    assert np.abs(found - expected).max() > 0.01, "or this file has no such noise and shows nothing"


@pytest.mark.parametrize("name", ["wav, 16 bits", "flac", "vorbis", "opus, 16 kHz", "mp3", "m4a"])
def test_no_more_is_decoded_than_has_to_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = made(name)
    sound = SoundFile(data)
    decoder = sound._decoder
    counted: list[int] = []
    if isinstance(decoder, FFmpegDecoder):
        frames = _sound_decoders._frames

        def counting(*arguments: Any, **options: Any) -> Any:
            for frame in frames(*arguments, **options):
                counted.append(frame.samples)
                yield frame

        monkeypatch.setattr(_sound_decoders, "_frames", counting)
    elif isinstance(decoder, WavDecoder):
        decoded = WavDecoder._decoded

        def slicing(self: WavDecoder, first: int, last: int) -> Any:
            counted.append(last - first)
            return decoded(self, first, last)

        monkeypatch.setattr(WavDecoder, "_decoded", slicing)
    else:
        read = soundfile.SoundFile.read

        def reading(self: Any, number: int, **how: Any) -> Any:
            counted.append(number)
            return read(self, number, **how)

        monkeypatch.setattr(soundfile.SoundFile, "read", reading)
    assert sound.read(10.0, 11.0).samples.shape == (2, 16_000)
    assert 16_000 <= sum(counted) <= 16_000 + 20 * 1024


def test_a_file_is_read_where_it_lies(tmp_path: Path) -> None:
    for name in ("wav, 16 bits", "flac", "m4a", "webm"):
        data, whole = made(name)
        path = tmp_path / name
        path.write_bytes(data)
        sound = SoundFile(path)
        rate = sound.info.sample_rate
        np.testing.assert_array_equal(sound.read(1.0, 2.0).samples, whole[:, rate : 2 * rate])
        np.testing.assert_array_equal(sound.read().samples, whole)
        assert sound.info == read_info(data) == read_info(path)
        sound.close()
    (tmp_path / "cut.wav").write_bytes(made("wav, 16 bits")[0][:5000])
    with pytest.raises(ValueError, match="truncated: the header says 768000 bytes of samples, there are 4956"):
        SoundFile(tmp_path / "cut.wav")
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="the file has zero bytes"):
        SoundFile(tmp_path / "empty.wav")


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (3.0, 3.0, "a segment from 3.0 to 3.0 seconds: expected 0 <= start < stop"),
        (-1.0, 3.0, "a segment from -1.0 to 3.0 seconds"),
        (float("nan"), 3.0, "a segment from nan to 3.0 seconds"),
        (float("inf"), None, "a segment from inf to None seconds"),
        (0.0, float("nan"), "a segment from 0.0 to nan seconds"),
        (12.0, 13.0, "holds no samples from 12.0 seconds on"),
        (1e12, 2e12, "holds no samples from 1000000000000.0 seconds on"),
    ],
)
@pytest.mark.parametrize("name", ["wav, 16 bits", "flac", "m4a", "mp3"])
def test_segments_that_are_none(name: str, start: float, stop: float, message: str) -> None:
    if name == "m4a" and start == 12.0:
        start, stop, message = 12.2, 13.0, "holds no samples from 12.2"  # its last frame is filled up
    with pytest.raises(ValueError, match=message):
        SoundFile(made(name)[0]).read(start, stop)


def test_a_segment_shorter_than_a_sample_is_one() -> None:
    assert SoundFile(made("flac")[0]).read(1.0, 1.0 + 1e-9).samples.shape == (2, 1)
