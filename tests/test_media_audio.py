"""What of a sound file is stored: its sound, to the byte where that can be, and nobody's name."""

import io
import json
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_platform.data.commands._near_duplicates import thumbnail, thumbnail_features, unit_rows
from ssl_platform.data.index import Index
from ssl_platform.data.items import Item
from ssl_platform.data.media import Options
from ssl_platform.data.media.audio import FBANK, load, look, measured, spectrogram
from ssl_platform.data.pack import main
from ssl_platform.data.sound_files import clean_sound, suffix_crcs
from ssl_platform.modalities import image
from ssl_platform.modalities._audio import decode_audio, read_info, resample
from tests.test_audio_reading import RATE, aac, tone, written

NAME = b"JaneDoe"


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def wav(subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    """With INFO, bext, iXML and ID3 chunks before and behind the samples, and something appended."""
    plain = written(kind, subtype)
    body = plain[12:] + b"\0" * (len(plain) % 2)
    info = chunk(b"LIST", b"INFO" + chunk(b"IART", NAME) + chunk(b"ICMT", NAME))
    more = chunk(b"bext", NAME.ljust(602, b"\0")) + chunk(b"iXML", b"<SPEAKER>" + NAME)
    inside = b"WAVE" + info + body + more + chunk(b"id3 ", NAME)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside + NAME


def id3() -> bytes:
    text = b"TPE1" + struct.pack(">I", len(NAME) + 1) + b"\0\0\0" + NAME
    picture = b"APIC" + struct.pack(">I", 600) + b"\0\0" + b"\xff\xfb\x90\x00" + NAME.ljust(596, b"\xff")
    return b"ID3\3\0\0" + bytes([0, 0, (len(text + picture)) >> 7, len(text + picture) & 0x7F]) + text + picture


def by_soundfile(kind: str, subtype: str) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 2, subtype, format=kind) as sound:
        for tag in ("title", "artist", "comment", "copyright"):
            setattr(sound, tag, NAME.decode() * 50)
        sound.write(tone())
    return file.getvalue()


def flac() -> bytes:
    data = by_soundfile("FLAC", "PCM_24")
    place = 4 + 4 + 34  # behind STREAMINFO
    blocks = b""
    texts = [struct.pack(">I", len(text)) + text for text in (b"image/png", NAME)]
    picture = struct.pack(">I", 3) + b"".join(texts) + struct.pack(">IIIII", 1, 1, 24, 0, 70) + NAME * 10
    for kind, body in ((2, b"ABCD" + NAME * 20), (6, picture)):  # APPLICATION, PICTURE
        blocks += bytes([kind]) + len(body).to_bytes(3, "big") + body
    return data[:place] + blocks + data[place:]


def mp3() -> bytes:
    tail = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0) + bytes(8) + NAME + b"TAG" + NAME.ljust(125, b"\0")
    return id3() + by_soundfile("MP3", "MPEG_LAYER_III") + tail


def m4a(kind: str = "ipod") -> bytes:
    data = aac(kind, title=NAME.decode(), artist=NAME.decode(), comment=NAME.decode())
    return data + struct.pack(">I", 8 + len(NAME)) + b"free" + NAME


FILES: dict[str, Callable[[], bytes]] = {
    "a.wav": wav,
    "b.wav": lambda: wav("PCM_24", "WAVEX"),
    "c.wav": lambda: wav("FLOAT"),
    "d.wav": lambda: wav("PCM_U8"),
    "e.wav": lambda: wav("ULAW"),
    "f.flac": flac,
    "g.ogg": lambda: by_soundfile("OGG", "VORBIS"),
    "h.opus": lambda: by_soundfile("OGG", "OPUS"),
    "i.mp3": mp3,
    "j.m4a": m4a,
    "k.m4a": lambda: m4a("mp4"),
}


def loaded(path: Path, data: bytes, *part: float, keep: bool = False) -> Any:
    path.write_bytes(data)
    return load(Item(path, path.name, medium="audio", part=part), Options(keep_metadata=keep))


@pytest.mark.parametrize("name", FILES)
def test_the_sound_is_kept_and_no_name(name: str, tmp_path: Path) -> None:
    data = FILES[name]()
    assert NAME in data
    content = loaded(tmp_path / name, data)
    assert content.extension == name.split(".")[1]
    assert NAME not in content.data
    expected = decode_audio(data)
    np.testing.assert_array_equal(decode_audio(content.data).samples, expected.samples)
    assert content.about == {"sample_rate": RATE, "num_samples": expected.samples.shape[1], "num_channels": 2}
    again = loaded(tmp_path / name, content.data)
    assert again.data == content.data, "what is clean stays as it is, to the byte"
    assert loaded(tmp_path / name, data, keep=True).data == data


def test_frames_stay_byte_for_byte(tmp_path: Path) -> None:
    data = flac()
    stored = loaded(tmp_path / "a.flac", data).data
    frames = stored[stored.index(b"\xff\xf8") :]
    assert data.endswith(frames) and len(frames) > 20_000
    plain = written("MP3")
    assert loaded(tmp_path / "a.mp3", id3() + plain).data == plain
    vorbis = by_soundfile("OGG", "VORBIS")
    stored = loaded(tmp_path / "a.ogg", vorbis).data
    pages, kept = (one[one.rindex(b"OggS") + 27 :] for one in (vorbis, stored))
    assert pages == kept and len(kept) > 1000


@pytest.mark.parametrize(
    ("name", "data", "subtype"),
    [
        ("appended.flac", flac() + NAME, "PCM_24"),
        ("tagged.flac", id3() + written("FLAC"), "PCM_16"),
        ("a.aiff", by_soundfile("AIFF", "PCM_16"), "PCM_16"),
        ("a.wav", by_soundfile("RF64", "PCM_24"), "PCM_24"),
        ("a.caf", written("CAF", "ALAC_16"), "PCM_16"),
        ("chained.ogg", by_soundfile("OGG", "VORBIS") * 2, "PCM_16"),
    ],
)
def test_what_cannot_be_cleaned_becomes_flac(name: str, data: bytes, subtype: str, tmp_path: Path) -> None:
    content = loaded(tmp_path / name, data)
    assert content.extension == "flac" and NAME not in content.data
    assert soundfile.info(io.BytesIO(content.data)).subtype == subtype
    expected = decode_audio(data).samples
    if name == "chained.ogg":
        np.testing.assert_allclose(decode_audio(content.data).samples, expected.clip(-1, 1), atol=2**-15)
    else:
        np.testing.assert_array_equal(decode_audio(content.data).samples, expected)


def test_a_wrong_extension_is_mended(tmp_path: Path) -> None:
    assert loaded(tmp_path / "a.mp3", wav()).extension == "wav"
    assert loaded(tmp_path / "a.wav", m4a()).extension == "m4a"
    with pytest.raises(ValueError, match="not a sound file"):
        loaded(tmp_path / "a.wav", b"\x89PNG\r\n\x1a\n" + bytes(100))


@pytest.mark.parametrize(
    ("data", "subtype", "exact"),
    [(wav(), "PCM_16", True), (wav("PCM_24"), "PCM_24", True), (wav("FLOAT"), "FLOAT", True), (m4a(), "PCM_16", False)],
    ids=["16", "24", "float", "m4a"],
)
def test_a_segment_is_cut_out(data: bytes, subtype: str, exact: bool, tmp_path: Path) -> None:
    content = loaded(tmp_path / "a.wav", data, 0.1, 0.3)
    assert content.extension == ("wav" if subtype == "FLOAT" else "flac")
    assert soundfile.info(io.BytesIO(content.data)).subtype == subtype
    found, expected = decode_audio(content.data).samples, decode_audio(data, 0.1, 0.3).samples
    assert found.shape == (2, 3200) and content.about["num_samples"] == 3200 and NAME not in content.data
    np.testing.assert_allclose(found, expected, atol=0 if exact else 2**-15)
    with pytest.raises(ValueError, match="holds no samples from 7.0 seconds on"):
        loaded(tmp_path / "a.wav", data, 7.0, 8.0)


def test_statistics_are_of_the_fbank_that_the_index_names(tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    datas = [written("WAV", samples=tone(seconds, channels), rate=8000) for seconds, channels in ((0.5, 1), (1.0, 2))]
    datas.append(written("WAV", samples=tone(0.01, 1)))  # shorter than a frame
    for number, data in enumerate(datas):
        (sounds / f"{number}.wav").write_bytes(data)
    assert main([str(sounds), str(tmp_path / "out")]) == 0
    frames = torch.cat(
        [FBANK(torch.from_numpy(resample(decode_audio(data), 16_000).samples.mean(0))) for data in datas]
    )
    index = Index.open(tmp_path / "out")
    assert index.statistics is not None
    np.testing.assert_allclose(index.statistics["mean"], frames.mean(0), rtol=1e-5)
    std = frames.double().std(0, correction=0)
    assert std[3] < 1e-6 and std[2] > 0.1, "the fourth lies between two lines of the spectrum"
    std[std < 1e-6] = 1.0  # it, and those above 4 kHz, where these files hold nothing
    np.testing.assert_allclose(index.statistics["std"], std, rtol=1e-3, atol=1e-4)
    assert (
        index.statistics["of"] == {"values": "fbank", **FBANK.describe()} and index.statistics["of"]["num_bins"] == 128
    )
    with pytest.raises(ValueError, match="the shards' statistics are of fbank, not of pixels"):
        image.Config().build(index.statistics)


def test_a_folder_full_of_names_is_packed_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "JaneDoe"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / f"JaneDoe_{name}").write_bytes(data())
    (folder / "JaneDoe_cut.flac").write_bytes(flac()[:5000])
    out = tmp_path / "out"
    assert main([str(folder), str(out), "--groups", "folder"]) == 1
    assert "left out: JaneDoe_cut.flac: cannot be decoded as flac" in "".join(capsys.readouterr().err.split("\n"))
    for path in out.rglob("*"):
        assert path.is_dir() or NAME not in path.read_bytes(), path
    with tarfile.open(out / "shard-000000.tar") as tar:
        kinds = sorted({name.split(".")[1] for name in tar.getnames()})
    assert kinds == ["flac", "json", "m4a", "mp3", "ogg", "opus", "wav"]
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "inspect.json").read_text())
    assert "seconds" in json.dumps(report) and "sample rate" in json.dumps(report)
    assert NAME.decode() not in (tmp_path / "report" / "inspect.html").read_text().replace(str(tmp_path), "")


def test_images_and_sound_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.wav").write_bytes(written("WAV"))
    (tmp_path / "a.png").write_bytes(b"")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds sound files (a.wav) and images (a.png); pack them apart" in capsys.readouterr().err
    (tmp_path / "table.csv").write_text("path,label\na.wav,one\n")
    assert main([str(tmp_path / "table.csv"), str(tmp_path / "out"), "--min-tissue", "0.5"]) == 2
    assert f"--min-tissue: is for images, and {tmp_path / 'table.csv'} holds sound files" in capsys.readouterr().err
    assert main([str(tmp_path / "table.csv"), str(tmp_path / "out")]) == 0


def test_a_spectrogram_shows_low_tones_below() -> None:
    low = np.sin(2 * np.pi * 300 * np.arange(160_000) / RATE)[:, None].astype(np.float32)
    picture = spectrogram(measured(decode_audio(written("WAV", samples=low))))
    assert picture.shape == (1, 128, 256) and picture.dtype == torch.uint8
    assert 90 < int(picture[0, :, 100].argmax()) < 127
    assert spectrogram(measured(decode_audio(written("WAV", samples=low[:100])))).shape == (1, 128, 1)


def test_sounds_are_alike_if_they_are_copies_and_not_because_they_are_noise() -> None:
    rng = np.random.default_rng(0)
    seconds = np.arange(3 * RATE)[:, None] / RATE
    noises = [rng.normal(0, 0.1, (3 * RATE, 1)).astype(np.float32) for _ in range(4)]
    faint = rng.normal(0, 3e-4, (3 * RATE, 4))  # as in any recording, 60 dB below
    pitches = enumerate((220, 523, 1300, 3100))
    tones = [0.3 * np.sin(2 * np.pi * pitch * seconds) + faint[:, number, None] for number, pitch in pitches]

    def features(*files: bytes) -> np.ndarray[Any, Any]:
        looks = [look(data, "wav").likeness for data in files]
        return unit_rows(thumbnail_features(np.stack([thumbnail(found) for found in looks if found is not None])))

    originals = features(*(written("WAV", samples=samples) for samples in (*noises, *tones)))
    others = (originals @ originals.T)[~np.eye(8, dtype=bool)]
    assert others.max() < 0.6
    for kind, subtype, gain, least in (
        ("WAV", "PCM_16", 0.3, 0.95),
        ("FLAC", "PCM_24", 1.0, 0.95),
        ("OGG", "VORBIS", 1.0, 0.85),  # noise is what a codec changes most
    ):
        copies = features(*(written(kind, subtype, gain * samples) for samples in (*noises, *tones)))
        assert (copies * originals).sum(1).min() > least, kind


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, make in FILES.items():
        data = make()
        assert loaded(tmp_path / name, data).data == loaded(tmp_path / f"other_{name}", data).data
    assert read_info(tmp_path / "a.wav").num_samples == 8000


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_with_a_reason_or_read(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    data = np.frombuffer(FILES[name](), np.uint8)
    num_refused = 0
    for _ in range(30):
        damaged = data[: rng.integers(1, len(data) + 1)].copy()
        places = rng.integers(0, min(len(damaged), int(rng.choice([64, 400, len(damaged)]))), 8)
        damaged[places] = rng.integers(0, 256, 8)
        try:
            content = loaded(tmp_path / name, damaged.tobytes())
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            num_refused += 1
        else:
            assert decode_audio(content.data).samples.shape[1] == content.about["num_samples"]
    assert num_refused, "some of them cannot be read"


def test_zeros_behind_a_flac_are_not_stored(tmp_path: Path) -> None:
    """A check sum that has become 0 stays 0 over them."""
    data = written("FLAC")
    content = loaded(tmp_path / "a.flac", data + bytes(5000))
    assert content.extension == "flac" and len(content.data) < len(data) + 1000
    np.testing.assert_array_equal(decode_audio(content.data).samples, decode_audio(data).samples)


def test_without_the_packages_nothing_is_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(wav())
    monkeypatch.setitem(sys.modules, "av", None)
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "ssl-pack: sound needs the package av: pip install 'ssl-platform[audio]'\n"
    assert not (tmp_path / "out").exists()


def crc16(data: bytes) -> int:
    """As FLAC's format says it: polynomial 0x8005, highest bit first, begun with 0."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x18005 if crc & 0x8000 else crc << 1
    return crc


@given(st.binary(max_size=40))
def test_check_sums_of_all_that_follows(data: bytes) -> None:
    found = suffix_crcs(np.frombuffer(data, np.uint8))
    assert found.tolist() == [crc16(data[place:]) for place in range(len(data))]


def test_check_sums_far_from_the_end() -> None:
    """Powers of x come again after 32,767."""
    data = np.random.default_rng(0).integers(0, 256, 70_000, np.uint8)
    found = suffix_crcs(data)
    assert [int(found[place]) for place in (0, 1, 29_000, 65_000)] == [
        crc16(data[place:].tobytes()) for place in (0, 1, 29_000, 65_000)
    ]


@pytest.mark.parametrize(
    "junk", [b"TAG" + bytes(125), b"\xff\xf8" * 10_000, b"JaneDoe"], ids=["ID3v1", "sync codes", "name"]
)
def test_junk_behind_the_last_frame_of_a_flac_is_not_kept(junk: bytes, tmp_path: Path) -> None:
    data = flac()
    assert clean_sound(data + junk, "flac") is None and clean_sound(data, "flac") is not None
    content = loaded(tmp_path / "a.flac", data + junk)
    assert content.extension == "flac" and not content.data.endswith(junk)
    np.testing.assert_array_equal(decode_audio(content.data).samples, decode_audio(data).samples)
