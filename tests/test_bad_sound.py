"""Sound that is damaged, hostile or merely unexpected, in ssl-pack and in training: the message of each.

Read the tables: a case and what the user is told.
"""

import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_platform.data.index import Index
from ssl_platform.data.media.audio import FBANK, measured, notes
from ssl_platform.data.order import Order
from ssl_platform.data.pack import main
from ssl_platform.data.reading import BadSampleError, ShardReader, decoded
from ssl_platform.data.shards import MicroBatches
from ssl_platform.modalities._audio import MAX_SECONDS, Sound, SoundFile, decode_audio, read_info, resample
from ssl_platform.modalities._wav import FLOAT, PCM, Wav
from ssl_platform.views import SampleViews
from tests.bad_shards import limit_memory
from tests.test_audio_reading import RATE, aac, tone, written

MEMORY = 256
"""MiB that refusing any of these may take on top of Python, PyTorch and FFmpeg."""
MILLION_SECONDS = 1_000_000 * RATE


def wav(
    rate: int = RATE, channels: int = 1, values: Any = (0.0, 0.5, -0.5), code: int = FLOAT, bits: int = 32
) -> bytes:
    data = np.asarray(values, {(FLOAT, 32): "<f4", (FLOAT, 64): "<f8", (PCM, 16): "<i2", (PCM, 8): "u1"}[code, bits])
    return Wav(code, channels, rate, bits, bits, 0, False, memoryview(data.tobytes())).encode()


def flac_of_a_million_seconds() -> bytes:
    flac = bytearray(written("FLAC"))
    place = 4 + 4 + 10  # mark, block header; then rate, channels, bits (28 bits) and the number of samples (36 bits)
    packed = int.from_bytes(flac[place : place + 8], "big")
    flac[place : place + 8] = (packed >> 36 << 36 | MILLION_SECONDS).to_bytes(8, "big")
    return bytes(flac)


def rf64_of_a_million_seconds() -> bytes:
    data = bytearray(written("RF64", "PCM_16"))
    place = data.index(b"ds64") + 8
    struct.pack_into("<QQQ", data, place, 4 * MILLION_SECONDS + 100, 4 * MILLION_SECONDS, MILLION_SECONDS)
    return bytes(data)


def mp3_of_a_million_seconds() -> bytes:
    data = bytearray(written("MP3"))
    place = next(found for mark in (b"Xing", b"Info") if (found := data.find(mark)) > 0)
    assert data[place + 7] & 1, "the number of frames is in the header"
    struct.pack_into(">I", data, place + 8, MILLION_SECONDS // 576)
    return bytes(data)


def m4a_of_many_seconds() -> bytes:
    """Of 250,000 s by all of its boxes but the list of its packets, which FFmpeg believes."""
    data = bytearray(aac(samples=tone(1.0)))
    for box, place in ((b"mdhd", 20), (b"elst", 12)):
        struct.pack_into(">I", data, data.index(box) + place, 4_000_000_000)
    return bytes(data)


def m4a_of_long_packets() -> bytes:
    data = bytearray(aac(samples=tone(1.0)))
    struct.pack_into(">I", data, data.index(b"stts") + 16, MILLION_SECONDS // 16)
    return bytes(data)


def cut_m4a() -> bytes:
    """Its packets begin behind the header, and the last ones are not there."""
    data = aac(samples=tone(2.0))
    header, packets = data.index(b"moov") - 4, data.index(b"mdat") - 4
    assert packets < header
    return data[: packets + (header - packets) // 2] + data[header:]


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "the file has zero bytes"),
    "no samples": (lambda: wav(values=[]), "holds no samples"),
    "a header alone": (lambda: written("FLAC")[:60], "cannot be decoded as flac|holds no samples|truncated"),
    "NaN": (lambda: wav(values=[0, np.nan, 0.5]), "holds NaN or infinite samples"),
    "infinity": (lambda: wav(values=[0, -np.inf, np.nan]), "holds NaN or infinite samples"),
    "too loud": (lambda: wav(values=[0, 1e30]), r"holds samples of 1e\+30, expected about -1 to 1"),
    "too loud, 64 bits": (lambda: wav(values=[0, 1e300], bits=64), "holds NaN or infinite samples"),
    "1 Hz": (lambda: wav(rate=1), "the header says 1 Hz, expected 1000 to 768000"),
    "999 Hz": (lambda: wav(rate=999), "the header says 999 Hz, expected 1000 to 768000"),
    "1 MHz": (lambda: wav(rate=1_000_000), "the header says 1000000 Hz, expected 1000 to 768000"),
    "4 GHz": (lambda: wav(rate=4_000_000_000), "the header says 4000000000 Hz, expected 1000 to 768000"),
    "1 Hz, AU": (lambda: written("AU", "PCM_16", rate=1), "the header says 1 Hz, expected 1000 to 768000"),
    "300 channels": (lambda: wav(channels=300, values=np.zeros(600)), "the header says 300 channels, expected 1 to 256"),
    "65535 channels": (lambda: wav(channels=65_535, bits=8, code=PCM, values=[0]), "the header says 65535 channels"),
    "0 channels": (lambda: wav(channels=0), "a WAV file of 0 channels, 16000 Hz"),
    "0 Hz": (lambda: wav(rate=0), "a WAV file of 1 channels, 0 Hz"),
    "cut off": (lambda: written("WAV", "PCM_16")[:9000], "truncated: the header says 32000 bytes of samples, there are"),
    "cut off FLAC": (lambda: written("FLAC")[:9000], "cannot be decoded as flac: "),
    "cut off MP3": (lambda: written("MP3")[:2000], "truncated: the header says"),
    "cut off m4a": (lambda: aac()[:3000], "cannot be decoded as m4a: Invalid data"),
    "half of an m4a": (cut_m4a, "truncated|cannot be decoded as m4a"),
    "zeros in an m4a": (lambda: aac()[:-4000] + bytes(4000), "cannot be decoded as m4a|holds no samples|no sound"),
    "a text": (lambda: b"path,label\na.wav,1\n", r"not a sound file: no known format begins with b'path,lab'"),
    "an image": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), r"not a sound file: no known format begins with b'\\x89PNG"),
    "a play list": (lambda: b"#EXTM3U\nhttp://localhost/a.mp3\n", "not a sound file: no known format begins with"),
    "1,000,000 s of FLAC": (flac_of_a_million_seconds, "truncated: the header says 16000000000|cannot be decoded as flac"),
    "1,000,000 s of WAV": (rf64_of_a_million_seconds, "truncated: the header says 64000000000 bytes of samples, there are"),
    "1,000,000 s in 16 packets": (m4a_of_long_packets, "truncated: the header says 16000 samples, there are 0"),
    "1,000,000 s of MP3": (mp3_of_a_million_seconds, "truncated: the header says|cannot be decoded as mp3"),
}  # fmt: skip

READ: dict[str, tuple[Callable[[], bytes], dict[str, Any], tuple[str, ...]]] = {
    "silence": (lambda: written("WAV", "PCM_16", np.zeros((RATE, 1))), {"num_samples": RATE}, ("silent",)),
    "silence beside zero": (lambda: written("FLAC", "PCM_24", np.full((RATE, 2), 0.25)), {"num_channels": 2}, ("silent",)),
    "clipping": (lambda: written("WAV", "PCM_16", 20 * tone()), {}, ("clipped",)),
    "clipping of 8 bits": (lambda: written("WAV", "PCM_U8", 20 * tone()), {}, ("clipped",)),
    "clipping in Vorbis": (lambda: written("OGG", "VORBIS", (20 * tone()).clip(-1, 1)), {}, ("clipped",)),
    "8 bits": (lambda: written("WAV", "PCM_U8"), {"num_samples": 8000, "num_channels": 2}, ()),
    "32 channels": (lambda: written("WAV", "PCM_16", tone(channels=32)), {"num_channels": 32}, ()),
    "256 channels": (lambda: wav(channels=256, values=0.1 * np.arange(512) / 512), {"num_channels": 256}, ()),
    "a single sample": (lambda: wav(values=[0.5]), {"num_samples": 1}, ("silent",)),
    "1 kHz": (lambda: written("WAV", "PCM_16", rate=1000), {"sample_rate": 1000}, ()),
    "hearts at 4 kHz": (lambda: written("WAV", "PCM_16", rate=4000), {"sample_rate": 4000}, ()),
    "telephone": (lambda: written("WAV", "ULAW", rate=8000), {"sample_rate": 8000}, ()),
    "bats at 384 kHz": (lambda: written("FLAC", "PCM_16", rate=384_000), {"sample_rate": 384_000}, ()),
    "768 kHz": (lambda: written("WAV", "PCM_16", rate=768_000), {"sample_rate": 768_000}, ()),
    "integers as floats": (lambda: wav(values=[0, 2.0**31, -(2.0**31)]), {"num_samples": 3}, ("clipped",)),
    "250,000 s of m4a": (m4a_of_many_seconds, {"num_samples": 16_384}, ()),
    "a tag that is not UTF-8": (lambda: aac(title="caf\xe9").replace(b"caf\xc3\xa9", b"caf\xe9\xe9"), {}, ()),
}  # fmt: skip


@cache
def made(case: str) -> bytes:
    return (REFUSED[case] if case in REFUSED else READ[case])[0]()


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[case][1]) as raised:
        decode_audio(made(case))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", READ)
def test_read(case: str) -> None:
    _, expected, noted = READ[case]
    sound = decode_audio(made(case))
    facts = {
        "sample_rate": sound.sample_rate,
        "num_samples": sound.samples.shape[1],
        "num_channels": len(sound.samples),
    }
    assert expected.items() <= facts.items() and notes(sound.samples) == noted
    bins = measured(sound)
    assert bins is None or np.isfinite(bins).all()


def folder_of_all(folder: Path) -> Path:
    """Every case under a name that says nothing of its content, or something wrong."""
    folder.mkdir()
    for number, case in enumerate([*REFUSED, *READ]):
        (folder / f"{number:02d}.{('wav', 'mp3', 'flac', 'm4a')[number % 4]}").write_bytes(made(case))
    return folder


def test_ssl_pack_names_leaves_out_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = folder_of_all(tmp_path / "in"), tmp_path / "out"
    assert main([str(data), str(out), "--plain-names"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    for number in range(len(REFUSED)):
        assert said.count(f"left out: {number:02d}.") == 1, number
    for number in range(len(REFUSED), len(REFUSED) + len(READ)):
        assert f"left out: {number:02d}." not in said, number
    index = Index.open(out)
    assert len(index) == len(READ) and len((out / "left_out.tsv").read_text().splitlines()) == 1 + len(REFUSED)
    kinds = [noted for _, _, noted in READ.values()]
    assert f"of {len(READ)} samples, {kinds.count(('clipped',))} clipped, {kinds.count(('silent',))} silent" in said
    assert main([str(data), str(out), "--plain-names"]) == 1, "the same when it goes on"
    assert "clipped" in capsys.readouterr().err
    assert not list(out.glob(".*.part"))
    for path in sorted(data.iterdir())[len(REFUSED) :]:
        path.unlink()
    assert main([str(data), str(tmp_path / "nothing"), "--plain-names"]) == 2
    assert f"nothing to pack: of {len(REFUSED)} inputs {len(REFUSED)} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "nothing" / "index.json").exists()


class Chunks:
    """A modality of a tenth of a second, read where it lies; just what `MicroBatches` needs."""

    groups: dict[str, Any] = {}

    def decode(self, record: dict[str, bytes]) -> SoundFile:
        return SoundFile(next(data for extension, data in record.items() if extension not in ("json", "cls")))

    def augment(self, examples: tuple[SoundFile, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        info = examples[0].info
        start = rng.uniform(0, max(info.num_samples / info.sample_rate - 0.1, 0))
        chunk = resample(examples[0].read(start, start + 0.1), RATE).samples.mean(axis=0)
        views = torch.from_numpy(np.resize(chunk, 1600))[None]
        return {"global": SampleViews(views, torch.zeros(1, dtype=torch.int64))}


def test_training_replaces_what_it_cannot_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, case in enumerate([*REFUSED, *READ]):
            info = tarfile.TarInfo(f"{number:02d}.wav")
            info.size = len(made(case))
            tar.addfile(info, io.BytesIO(made(case)))
    index, num_samples = Index.open(tmp_path), len(REFUSED) + len(READ)
    reader = ShardReader(index, 1)
    for number, case in enumerate(REFUSED):
        with pytest.raises(BadSampleError, match=rf"a.tar: {number:02d}: .*({REFUSED[case][1]})"):
            _, sound = decoded(reader, Chunks(), number)  # type: ignore[arg-type]
            try:
                sound.read()
            except ValueError as error:
                raise BadSampleError(f"a.tar: {number:02d}: {error}") from error
    order = Order.of_shards([num_samples], 0, 1)
    batches = MicroBatches(
        index, Chunks(), {}, order=order, seed=0, batch_size=4, first_step=0, last_step=num_samples // 4, cache_shards=1
    )  # type: ignore[arg-type]
    replaced = []
    for number in range(len(batches)):
        batch = batches[number]
        assert torch.isfinite(batch.groups["global"].views).all()
        replaced += batch.replaced
    assert replaced and all(line.startswith("a.tar: ") and "\n" not in line for line in replaced)


def check_memory() -> None:
    """Run in a process of its own: refusing takes little memory, whatever a header claims."""
    for case in READ:
        decode_audio(made(case))
    for case in REFUSED:
        made(case)
    limit_memory(MEMORY)
    for case, (_, message) in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            decode_audio(made(case))
    sys.stdout.write(f"{len(REFUSED)} refused")


def test_no_header_makes_a_reader_take_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_bad_sound import check_memory; check_memory()"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == f"{len(REFUSED)} refused", done.stderr


def test_a_million_seconds_in_training() -> None:
    """Where a modality looks for a part that is not there, it hears of it."""
    sound = SoundFile(m4a_of_many_seconds())
    assert sound.info.num_samples < 2 * RATE
    with pytest.raises(ValueError, match="holds no samples from 5000.0 seconds on"):
        sound.read(5000.0, 5003.0)
    assert read_info(flac_of_a_million_seconds()).num_samples == MILLION_SECONDS
    with pytest.raises(ValueError, match="cannot be decoded as flac|truncated|holds no samples"):
        SoundFile(flac_of_a_million_seconds()).read(5000.0, 5003.0)


def test_a_low_rate_does_not_become_an_endless_sound() -> None:
    """2^28 samples at 1 kHz would be 2^32 at 16 kHz."""
    rate = 1000
    data = wav(rate=rate, code=PCM, bits=8, values=np.full(MAX_SECONDS * rate + 1, 128))
    with pytest.raises(ValueError, match="too long: more than 16800 s of 1 channels at 1000 Hz; cut it into pieces"):
        decode_audio(data)
    assert decode_audio(data, 16_000, 16_001).samples.shape == (1, 1000)


def test_filter_banks_of_long_sounds_take_little_memory() -> None:
    """And are those of the whole, to rounding."""
    samples = np.resize(tone(10.0, 1)[:, 0], 200 * RATE)[None]
    tracemalloc.start()
    found = measured(Sound(samples, RATE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None and found.shape == (128, FBANK.num_frames(200 * RATE))
    np.testing.assert_allclose(found, FBANK(torch.from_numpy(samples[0])).numpy().T, atol=1e-4)
    assert peak < 64 << 20


# -- damage at random --------------------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[], bytes]] = {
    "wav": lambda: written("WAV", "PCM_16"),
    "flac": lambda: written("FLAC"),
    "ogg": lambda: written("OGG", "VORBIS"),
    "opus": lambda: written("OGG", "OPUS"),
    "mp3": lambda: written("MP3"),
    "m4a": lambda: aac(),
    "aiff": lambda: written("AIFF", "PCM_16"),
    "caf": lambda: written("CAF", "PCM_16"),
}


@cache
def whole(kind: str) -> bytes:
    return WHOLE[kind]()


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_headers_are_refused_in_words_or_read(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(whole(kind))
    header = damaged.index(b"moov") if kind == "m4a" else 0
    size = min(600, len(damaged) - header)
    for place, values in data.draw(
        st.lists(
            st.tuples(st.integers(0, size - 1), st.sampled_from([b"\0", b"\xff", b"\x7f\xff", b"\xff" * 4, b"\0" * 4])
                      | st.binary(min_size=1, max_size=4)),
            min_size=1, max_size=5,
        )
    ):  # fmt: skip
        damaged[header + place : header + place + len(values)] = values
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(1, len(damaged))) :]
    try:
        sound = SoundFile(bytes(damaged))
        samples = sound.read().samples
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert samples.ndim == 2 and samples.shape[1] > 0 and np.isfinite(samples).all()
    assert len(samples) == sound.info.num_channels and 1000 <= sound.info.sample_rate <= 768_000
