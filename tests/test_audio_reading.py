"""Sound from bytes: what is read, what is refused and in which words; and Kaldi's filter banks."""

import errno
import io
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from typing import Any

import av
import kaldi_native_fbank
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssl_platform.modalities import _audio
from ssl_platform.modalities._audio import Sound, decode_audio, read_info, resample
from ssl_platform.modalities._fbank import Fbank, _triangles

RATE = 16_000


def tone(seconds: float = 0.5, channels: int = 2, rate: int = RATE) -> np.ndarray:
    """(samples, channels) of a tone in noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((len(time), channels))
    return (0.3 * np.sin(2 * np.pi * 440 * time)[:, None] + 0.05 * noise).astype(np.float32)


def written(kind: str, subtype: str | None = None, samples: np.ndarray | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(rate=rate) if samples is None else samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def aac(kind: str = "ipod", samples: np.ndarray | None = None, rate: int = RATE, **tags: str) -> bytes:
    """An m4a file, or a bare stream (adts), made by FFmpeg."""
    samples = tone(rate=rate) if samples is None else samples
    file = io.BytesIO()
    layout = "stereo" if samples.shape[1] == 2 else "mono"
    with av.open(file, "w", format=kind) as container:
        container.metadata.update(tags)
        stream: Any = container.add_stream("aac", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "subtype", "name", "bits"),
    [
        ("WAV", "PCM_16", "wav", 16), ("WAV", "PCM_U8", "wav", 16), ("WAV", "FLOAT", "wav", 32),
        ("WAVEX", "PCM_24", "wav", 24), ("RF64", "PCM_16", "wav", 16), ("FLAC", "PCM_24", "flac", 24),
        ("AIFF", "PCM_16", "aiff", 16), ("AU", "PCM_16", "au", 16), ("CAF", "PCM_16", "caf", 16),
    ],
)  # fmt: skip
def test_lossless_files_are_read_exactly(kind: str, subtype: str, name: str, bits: int) -> None:
    data = written(kind, subtype)
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0].T
    sound = decode_audio(data)
    assert sound.sample_rate == RATE and sound.samples.dtype == np.float32
    np.testing.assert_array_equal(sound.samples, expected)
    np.testing.assert_array_equal(decode_audio(data, 0.1, 0.25).samples, expected[:, 1600:4000])
    assert read_info(data) == (name, RATE, 2, 8000, bits, False)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (written("OGG", "VORBIS"), "ogg"),
        (written("OGG", "OPUS"), "opus"),
        (written("MP3"), "mp3"),
        (aac(), "m4a"),
        (aac("adts"), "aac"),
    ],
    ids=["vorbis", "opus", "mp3", "m4a", "aac"],
)
def test_lossy_files_are_read(data: bytes, kind: str) -> None:
    info, sound = read_info(data), decode_audio(data)
    assert info.kind == kind and info.is_lossy and (info.sample_rate, info.num_channels, info.bits) == (RATE, 2, 16)
    assert 8000 <= sound.samples.shape[1] <= 8000 + 2048
    delay = 1024 if kind == "aac" else 0  # a bare stream does not say what to drop
    heard = sound.samples[:, delay : delay + 8000]
    assert np.corrcoef(heard[0], tone()[:, 0])[0, 1] > 0.9, "the same sound at the same time"
    np.testing.assert_array_equal(decode_audio(data, 0.1, 0.25).samples.shape, (2, 2400))
    if kind != "opus":  # its decoder needs some time to agree with itself after a jump
        np.testing.assert_allclose(decode_audio(data, 0.1, 0.25).samples, sound.samples[:, 1600:4000], atol=1e-5)


def test_a_streamed_wav_is_read_to_its_end() -> None:
    data = written("WAV", "PCM_16")
    place = data.index(b"data") + 4
    for riff, size in ((0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0xFFFFFFFF, 0)):
        streamed = data[:4] + struct.pack("<I", riff) + data[8:place] + struct.pack("<I", size) + data[place + 4 :]
        np.testing.assert_array_equal(decode_audio(streamed).samples, decode_audio(data).samples)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file has zero bytes"),
        (b"no sound at all", "not a sound file: no known format begins with b'no sound'"),
        (written("WAV", "PCM_16")[:9000], "truncated: the header says 32000 bytes of samples, there are 8956"),
        (written("FLAC")[:9000], "cannot be decoded as flac: "),
        (written("MP3")[:2000], "mp3|truncated"),
        (written("WAV", "PCM_16")[:30], "truncated|damaged"),
        (aac()[:3000], "cannot be decoded as m4a: Invalid data"),
        (written("FLAC")[:20], "cannot be decoded as flac: damaged, or cut off within its header"),
        (written("WAV", "FLOAT", np.array([[0.0], [np.nan]], np.float32)), "holds NaN or infinite samples"),
        (written("WAV", "PCM_16", np.zeros((0, 1), np.float32)), "holds no samples"),
    ],
)
def test_bad_files_are_refused_in_words(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_audio(data)


def sound(kind: str, subtype: str = "PCM_16", endian: str = "FILE") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(), RATE, format=kind, subtype=subtype, endian=endian)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "subtype", "endian", "size"),
    [
        ("AIFF", "PCM_16", "FILE", 32_008), ("AIFF", "FLOAT", "FILE", 64_008), ("AIFF", "PCM_16", "LITTLE", 32_008),
        ("AU", "PCM_16", "FILE", 32_000), ("RF64", "PCM_24", "FILE", 48_000), ("WAV", "PCM_16", "BIG", 32_000),
        ("CAF", "PCM_16", "FILE", 32_004),
    ],
)  # fmt: skip
def test_cut_off_files_without_compression_are_refused(kind: str, subtype: str, endian: str, size: int) -> None:
    data = sound(kind, subtype, endian)
    assert decode_audio(data).samples.shape == decode_audio(data + bytes(999)).samples.shape == (2, 8000)
    for length in (len(data) - 1, len(data) // 2, len(data) // 4, 5000):
        there = length - (len(data) - size)
        with pytest.raises(ValueError, match=f"truncated: the header says {size} bytes of samples, there are {there}"):
            decode_audio(data[:length])
    for length in range(12, 100, 3):
        with pytest.raises(ValueError, match="truncated|cut off within its header|holds no samples"):
            decode_audio(data[:length])


def test_streamed_au_and_rf64_are_read_to_their_end() -> None:
    au = bytearray(sound("AU"))
    au[8:12] = b"\xff" * 4
    np.testing.assert_array_equal(decode_audio(bytes(au)).samples, decode_audio(sound("AU")).samples)
    assert decode_audio(bytes(au[:16_024])).samples.shape == (2, 4000), "nobody can tell"


def test_a_flac_file_that_was_cut_off_and_filled_with_zeros_is_refused() -> None:
    data = written("FLAC")
    frames = [found for found in range(90, len(data)) if data[found : found + 2] == b"\xff\xf8"]
    assert len(frames) == 1, "the second of two"
    for length in (len(data) // 2, len(data) - 1, len(data) - 100, *frames):
        for zeros in (0, 3, len(data) - length, 5000):
            with pytest.raises(ValueError, match="cannot be decoded as flac|holds no samples|truncated"):
                decode_audio(data[:length] + bytes(zeros))


def test_damaged_mp3_writes_nothing_and_others_are_heard() -> None:
    code = """
import os, sys
from ssl_platform.modalities._audio import decode_audio, read_info
from ssl_platform.modalities._quiet import without_decoder_notes
data = open(sys.argv[1], "rb").read()
cut, junk, hole = data[:3000] + bytes(3000), data[:300] + b"junk" * 50 + data[300:], data[:2000] + bytes(200) + data[2200:]
for damaged in (cut, junk, hole):
    for function in (read_info, decode_audio):
        try:
            function(damaged)
        except ValueError:
            pass
with without_decoder_notes():
    os.write(2, b"Note: Trying to resync...\\nsomebody else\\n")
os.write(2, b"the end")
"""
    with tempfile.NamedTemporaryFile(suffix=".mp3") as file:
        file.write(written("MP3"))
        file.flush()
        command = [sys.executable, "-c", code, file.name]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert found.stderr == "somebody else\nthe end"


def test_without_room_for_held_lines_sound_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    assert decode_audio(written("MP3")).sample_rate == RATE


def test_a_segment_beyond_the_end_is_refused() -> None:
    assert decode_audio(written("FLAC"), 0.4, 9.0).samples.shape == (2, 1600)
    with pytest.raises(ValueError, match=r"holds no samples from 2.0 seconds on"):
        decode_audio(written("FLAC"), 2.0, 3.0)
    with pytest.raises(ValueError, match=r"expected 0 <= start < stop"):
        decode_audio(written("FLAC"), 3.0, 3.0)


def test_memory_is_taken_for_what_is_there_and_not_for_what_a_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    flac = bytearray(written("FLAC"))
    place = 4 + 4 + 10  # mark, block header; then rate, channels, bits (28 bits) and the number of samples (36 bits)
    packed = int.from_bytes(flac[place : place + 8], "big")
    flac[place : place + 8] = (packed >> 36 << 36 | 10**6 * RATE).to_bytes(8, "big")  # a million seconds
    assert read_info(bytes(flac)).num_samples == 10**6 * RATE
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"truncated: the header says 16000000000 samples|cannot be decoded as flac"):
        decode_audio(bytes(flac))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    monkeypatch.setattr(_audio, "MAX_VALUES", 10_000)
    with pytest.raises(ValueError, match=r"too long: more than 0 s of 2 channels at 16000 Hz"):
        decode_audio(written("FLAC"))


def test_other_rates_by_soxr() -> None:
    sound = decode_audio(written("FLAC", rate=44_100))
    found = resample(sound, RATE)
    assert found.samples.shape == (2, 8000) and found.sample_rate == RATE
    clean = Sound(
        tone(channels=1, rate=44_100).T * 0 + np.sin(np.arange(22_050) / 44_100 * 2 * np.pi * 440)[None], 44_100
    )
    expected = np.sin(np.arange(8000) / RATE * 2 * np.pi * 440)
    np.testing.assert_allclose(resample(clean, RATE).samples[0, 500:-500], expected[500:-500], atol=1e-3)
    assert resample(sound, 44_100) is sound


def test_without_the_packages_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["soundfile"] = None
from ssl_platform.modalities._audio import decode_audio
try:
    decode_audio(b"fLaC" + bytes(60))
except ValueError as error:
    sys.stdout.write(str(error))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "sound needs the package soundfile: pip install 'ssl-platform[audio]'"


# -- filter banks ------------------------------------------------------------------------------------------------------


def kaldi(samples: np.ndarray, fbank: Fbank) -> np.ndarray:
    options = kaldi_native_fbank.FbankOptions()
    frame, mel = options.frame_opts, options.mel_opts
    frame.samp_freq, frame.dither, frame.preemph_coeff = fbank.sample_rate, 0, fbank.preemphasis
    frame.frame_length_ms, frame.frame_shift_ms = fbank.frame_ms, fbank.shift_ms
    frame.window_type, frame.snip_edges, frame.remove_dc_offset = fbank.window, fbank.snip_edges, fbank.remove_mean
    mel.num_bins, mel.low_freq, mel.high_freq = fbank.num_bins, fbank.low_hz, fbank.high_hz
    options.use_power, options.use_log_fbank, options.use_energy = fbank.power, fbank.log, False
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(fbank.sample_rate, (samples * fbank.scale).tolist())
    computer.input_finished()
    return np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])


@pytest.mark.parametrize(
    "fbank",
    [
        Fbank(num_bins=80),
        Fbank(frame_ms=40),
        Fbank(num_bins=80, window="hamming", scale=32768),
        Fbank(num_bins=80, window="hanning", snip_edges=False, low_hz=50, high_hz=-200),
        Fbank(sample_rate=8000, num_bins=23, window="rectangular", power=False, remove_mean=False),
        Fbank(sample_rate=44_100, num_bins=64, window="blackman", preemphasis=0.0, shift_ms=20, frame_ms=32),
        Fbank(sample_rate=32_000, num_bins=40, high_hz=14_000, log=False, scale=100),
        Fbank(sample_rate=22_050, num_bins=128, snip_edges=False, shift_ms=11.5),
    ],
    ids=lambda fbank: f"{fbank.sample_rate}-{fbank.window}-{fbank.num_bins}",
)
def test_fbank_is_kaldis(fbank: Fbank) -> None:
    samples = tone(0.7, 1, fbank.sample_rate)[:, 0]
    expected = kaldi(samples, fbank)
    found = fbank(torch.from_numpy(samples))
    assert found.shape == expected.shape == (fbank.num_frames(len(samples)), fbank.num_bins)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3, rtol=0 if fbank.log else 1e-3)


@pytest.mark.parametrize("num_bins", [80, 128])
@pytest.mark.parametrize("rate", [8000, 16_000, 32_000, 44_100])
@settings(max_examples=15, deadline=None)
@given(
    window=st.sampled_from(["povey", "hanning", "hamming", "blackman", "rectangular"]),
    frame_ms=st.sampled_from([20.0, 25.0, 32.0, 50.0, 64.0]),
    shift_ms=st.sampled_from([5.0, 10.0, 12.5, 20.0]),
    low_hz=st.sampled_from([0.0, 20.0, 50.0, 125.0]),
    high_hz=st.sampled_from([0.0, -100.0, 3700.0]),
    preemphasis=st.sampled_from([0.0, 0.9, 0.97]),
    scale=st.sampled_from([1.0, 32768.0]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seconds=st.floats(0.08, 0.4),
)
def test_fbank_is_kaldis_over_a_grid_of_settings(
    rate: int, num_bins: int, flags: tuple[bool, ...], seconds: float, **others: Any
) -> None:
    snip_edges, remove_mean, power, log = flags
    fbank = Fbank(rate, num_bins, snip_edges=snip_edges, remove_mean=remove_mean, power=power, log=log, **others)
    padded = 1 << (fbank.frame_length - 1).bit_length()
    triangles = _triangles(rate, padded, num_bins, fbank.low_hz, fbank.last_hz)
    assume(bool((triangles.max(dim=0).values > 0).all()))  # Kaldi refuses bins that lie between two lines
    samples = tone(seconds, 1, rate)[:, 0]
    expected = kaldi(samples, fbank)
    found = fbank(torch.from_numpy(samples)).numpy()
    assert found.shape == expected.shape == (fbank.num_frames(len(samples)), num_bins)
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0 if log else 1e-3)


def test_the_default_of_128_bins_is_what_the_definition_says() -> None:
    """kaldi-native-fbank refuses so many bins of 257 lines, torchaudio and AST do not: here written out, in loops."""
    samples = tone(0.2, 1)[:, 0].astype(np.float64)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    mel = lambda hz: 1127 * np.log(1 + hz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 130)
    found = Fbank()(torch.from_numpy(samples)).numpy()
    num_empty = 0
    for frame in range(18):
        part = samples[frame * 160 : frame * 160 + 400]
        part = part - part.mean()
        part = (part - 0.97 * np.concatenate([part[:1], part[:-1]])) * window
        power = np.abs(np.fft.rfft(part, 512)) ** 2
        for place in range(128):
            left, centre, right = edges[place : place + 3]
            lines = [(line, mel(line * 31.25)) for line in range(256)]
            weights = {
                i: min((m - left) / (centre - left), (right - m) / (right - centre))
                for i, m in lines
                if left < m < right
            }
            num_empty += not weights and frame == 0
            energy = sum(weight * power[line] for line, weight in weights.items())
            assert found[frame, place] == pytest.approx(np.log(max(energy, 2**-23)), abs=1e-3)
    assert found.shape == (18, 128) and num_empty == int((found == found.min()).all(axis=0).sum()), num_empty
    assert num_empty == 1


def test_fbank_takes_batches_and_short_and_silent_sounds() -> None:
    samples = torch.from_numpy(tone().T.copy())
    both = Fbank()(samples)
    assert both.shape == (2, 48, 128)
    torch.testing.assert_close(both[1], Fbank()(samples[1]))
    assert Fbank()(samples[:, :399]).shape == (2, 0, 128)
    assert Fbank()(torch.zeros(400)).unique().tolist() == [pytest.approx(np.log(1.1920929e-07))]
    dithered = [Fbank(dither=0.1)(samples, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(dithered[0], dithered[1]) and not torch.equal(dithered[0], dithered[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": "hann"}, "window 'hann': expected one of povey, hanning"),
        ({"high_hz": 9000.0}, "bins from 20.0 to 9000.0 Hz: expected 0 <= low < high <= 8000.0"),
        ({"num_bins": 0}, "expected bins, frames of 2 samples or more, and a floor above 0"),
    ],
)
def test_fbank_refuses_settings_without_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fbank(**settings)
