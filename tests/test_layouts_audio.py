"""ssl-pack esc50, voxceleb and audioset on tiny trees in the layouts that those data sets have when they are unpacked."""

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ssl_platform.data.index import Index
from ssl_platform.data.pack import main
from ssl_platform.modalities._audio import decode_audio
from tests.test_audio_reading import RATE, aac, tone, written


def sound(path: Path, seconds: float = 0.1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = tone(seconds, 1) * (1 - 0.01 * seed)
    kinds = {".wav": lambda: written("WAV", samples=samples), ".flac": lambda: written("FLAC", samples=samples)}
    path.write_bytes(kinds.get(path.suffix, lambda: aac(samples=samples))())


def samples(folder: Path) -> list[dict[str, Any]]:
    """The `json` of every sample with its key, and what else it has by extension."""
    found: dict[str, dict[str, Any]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                file = tar.extractfile(member)
                assert file is not None
                sample = found.setdefault(key, {"key": key})
                sample |= json.loads(file.read()) if extension == "json" else {extension: file.read()}
    return list(found.values())


def lookup(out: Path) -> dict[str, str]:
    """{key: path}"""
    with (out.parent / f"{out.name}.lookup" / "lookup.csv").open(newline="") as file:
        return {row["key"]: row["path"] for row in csv.DictReader(file)}


# -- ESC-50 ------------------------------------------------------------------------------------------------------------


def esc50(folder: Path) -> Path:
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold, source, take, target, category in (
        (1, 100032, "A", 0, "dog"), (1, 100032, "B", 0, "dog"), (2, 17124, "A", 43, "car_horn"),
    ):  # fmt: skip
        name = f"{fold}-{source}-{take}-{target}.wav"
        rows.append(f"{name},{fold},{target},{category},{target == 0},{source},{take}")
        sound(folder / "audio" / name, seed=len(rows))
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("inside", ["", "ESC-50-master"])
def test_esc50(inside: str, tmp_path: Path) -> None:
    esc50(tmp_path / "data" / inside)
    out = tmp_path / "out"
    assert main(["esc50", str(tmp_path / "data"), str(out)]) == 0
    found = {lookup(out)[sample["key"]]: sample for sample in samples(out)}
    first, second, other = (found[name] for name in ("1-100032-A-0.wav", "1-100032-B-0.wav", "2-17124-A-43.wav"))
    assert (first["label"], first["fold"], first["esc10"]) == ("dog", "1", "True")
    assert (other["label"], other["fold"], other["esc10"]) == ("car_horn", "2", "False")
    assert first["group"] == second["group"] != other["group"], "clips of one recording"
    assert not any(b"100032" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert first["sample_rate"] == RATE and first["num_samples"] == 1600 and first["num_channels"] == 1
    assert len(Index.open(out).statistics["mean"]) == 128  # type: ignore[index]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "filename,fold,target\n1.wav,1,0\n",
            "esc50.csv: line 1: no column 'category'; needed are filename, fold, category",
        ),
        ("filename,fold,category,src_file\n", "esc50.csv: no row below the header"),
        ("filename,fold,category,src_file\na.wav,1,,7\n", "esc50.csv: line 2: category is empty"),
        ("filename,fold,category,src_file\na.wav,1,dog,7\n", "not the layout of esc50: missing audio/a.wav; there is"),
    ],
)
def test_esc50_refuses_a_wrong_table(
    table: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = esc50(tmp_path / "data")
    (data / "meta" / "esc50.csv").write_text(table)
    assert main(["esc50", str(data), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


# -- VoxCeleb ----------------------------------------------------------------------------------------------------------

_UTTERANCES = ("id10001/aaa/00001", "id10001/aaa/00002", "id10001/bbb/00001", "id10270/ccc/00001")


def voxceleb(folder: Path, names: dict[str, str]) -> Path:
    for number, (name, file) in enumerate(names.items()):
        sound(folder / file.format(name), seed=number)
    return folder


@pytest.mark.parametrize(
    ("dev", "test"),
    [
        ("dev/wav/{}.wav", "test/wav/{}.wav"),
        ("vox1_dev_wav/wav/{}.wav", "vox1_test_wav/wav/{}.wav"),
        ("dev/aac/{}.m4a", "test/aac/{}.m4a"),
        ("dev/mp4/{}.mp4", "test/mp4/{}.mp4"),
    ],
)
def test_voxceleb_with_splits(dev: str, test: str, tmp_path: Path) -> None:
    data = voxceleb(tmp_path / "data", {name: test if "id10270" in name else dev for name in _UTTERANCES})
    out = tmp_path / "out"
    assert main(["voxceleb", str(data), str(out)]) == 0
    assert (len(Index.open(out / "dev")), len(Index.open(out / "test"))) == (3, 1)
    found = {lookup(out)[sample["key"]]: sample for sample in samples(out / "dev") + samples(out / "test")}
    first, second, third = (found[dev.format(name)[:]] for name in _UTTERANCES[:3])
    assert first["label"] == second["label"] == third["label"] == first["group"] == third["group"]
    assert first["session"] == second["session"] != third["session"]
    for path in out.rglob("*"):
        if path.is_file() and path.name != "index.npy":
            text = path.read_bytes()
            assert not any(name in text for name in (b"id10001", b"id10270", b"aaa/", b"bbb/")), path


def test_voxceleb_in_one_folder_with_its_table(tmp_path: Path) -> None:
    data = voxceleb(tmp_path / "data", dict.fromkeys(_UTTERANCES, "wav/{}.wav"))
    assert main(["voxceleb", str(data), str(tmp_path / "all"), "--group", "session"]) == 0
    found = samples(tmp_path / "all")
    assert len({sample["label"] for sample in found}) == 2 and len({sample["group"] for sample in found}) == 3
    (data / "vox1_meta.csv").write_text(
        "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
        "id10001\tA.J._Buckley\tm\tIreland\tdev\nid10270\tEartha_Kitt\tf\tUSA\ttest\n"
    )
    out = tmp_path / "out"
    assert main(["voxceleb", str(data), str(out), "--keep-columns", "gender"]) == 0
    assert [sample["gender"] for sample in samples(out / "test")] == ["f"]
    assert all("nationality" not in sample for sample in samples(out / "dev"))
    plain = tmp_path / "plain"
    assert main(["voxceleb", str(data), str(plain), "--plain-names"]) == 0
    (sample,) = samples(plain / "test")
    assert (sample["label"], sample["group"], sample["session"]) == ("id10270", "id10270", "id10270/ccc")
    assert not any(b"Buckley" in path.read_bytes() for path in plain.rglob("*") if path.is_file())


def test_voxceleb_refuses_a_wrong_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = voxceleb(tmp_path / "data", dict.fromkeys(_UTTERANCES, "wav/{}.wav"))
    (data / "vox1_meta.csv").write_text("who,what\nid10001,m\n")
    assert main(["voxceleb", str(data), str(tmp_path / "out")]) == 2
    assert "vox1_meta.csv: expected the columns VoxCeleb1 ID, ..., Gender" in capsys.readouterr().err
    (data / "vox1_meta.csv").write_text("VoxCeleb1 ID,Gender,Set\nid10001,m\n")
    assert main(["voxceleb", str(data), str(tmp_path / "out")]) == 2
    assert "vox1_meta.csv: line 2: 2 columns, but the header has 3" in capsys.readouterr().err


def test_voxceleb_says_why_there_are_no_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("dev/wav/{}.wav", "dev/wav/{}.wav", "extra/{}.wav", "test/wav/{}.wav")
    data = voxceleb(tmp_path / "data", dict(zip(_UTTERANCES, places, strict=True)))
    assert main(["voxceleb", str(data), str(tmp_path / "out")]) == 0
    assert "no splits, because 1 of 4 utterances are in none, such as extra/id10001/bbb/00001.wav" in (
        capsys.readouterr().err.replace("\n", "")
    )
    assert len(Index.open(tmp_path / "out")) == 4


# -- AudioSet ----------------------------------------------------------------------------------------------------------


def audioset(folder: Path) -> Path:
    folder.mkdir()
    head = (
        "# Segments csv created Sun Mar  5 2017\n# num_ytids=3\n# YTID, start_seconds, end_seconds, positive_labels\n"
    )
    (folder / "balanced_train_segments.csv").write_text(
        head + '-0RWZT-miFs, 1.000, 11.000, "/m/03v3yw,/m/0k4j"\n'
        '--aaaaaaaa_, 30.000, 40.000, "/m/09x0r"\nYbcdefghijk, 0.000, 10.000, "/m/09x0r"\n'
        'missing____, 0.000, 10.000, "/m/09x0r"\n'
    )
    (folder / "eval_segments.csv").write_text(head + 'eeeeeeeeeee, 2.500, 12.500, "/m/0k4j"\n')
    (folder / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/0k4j,"Car, motor; vehicle"\n'
    )
    sound(folder / "balanced_train_segments" / "Y-0RWZT-miFs.wav", 12.0)
    sound(folder / "balanced_train_segments" / "--aaaaaaaa__30.flac", 0.5)
    sound(folder / "YYbcdefghijk.m4a", 0.5)
    sound(folder / "eval_segments" / "eeeeeeeeeee_2500_12500.flac", 10.0)
    sound(folder / "unrelated.wav")
    return folder


def test_audioset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["audioset", str(audioset(tmp_path / "data")), str(out)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 5 segments have no file (20.0 %)" in said
    found = {lookup(out)[sample["key"]]: sample for sample in samples(out / "balanced_train")}
    cut = found["balanced_train_segments/Y-0RWZT-miFs.wav#1-11"]
    assert cut["num_samples"] == 10 * RATE and cut["labels"] == "/m/03v3yw;Car, motor, vehicle"
    whole = decode_audio(written("WAV", samples=tone(12.0, 1))).samples
    assert (decode_audio(cut["flac"]).samples == whole[:, RATE : 11 * RATE]).all()
    assert found["balanced_train_segments/--aaaaaaaa__30.flac"]["labels"] == "Speech"
    assert set(found["YYbcdefghijk.m4a"]) >= {"m4a", "labels"} and found["YYbcdefghijk.m4a"]["label"] is None
    (sample,) = samples(out / "eval")
    assert sample["labels"] == "Car, motor, vehicle" and sample["num_samples"] == 10 * RATE
    assert not any(b"-0RWZT" in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_audioset_names_of_files(tmp_path: Path) -> None:
    data = audioset(tmp_path / "data")
    (data / "eval_segments" / "eeeeeeeeeee_2500_12500.flac").rename(data / "eeeeeeeeeee_99.flac")
    assert main(["audioset", str(data), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "eval").exists(), "a file of another part of the video"
    (data / "eeeeeeeeeee_99.flac").rename(data / "eeeeeeeeeee_2.5.flac")
    assert main(["audioset", str(data), str(tmp_path / "other")]) == 0
    assert len(Index.open(tmp_path / "other" / "eval")) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("eval_segments.csv", "eeeeeeeeeee, 2.5\n", "eval_segments.csv: line 1: expected YTID, start, stop in seconds"),
        (
            "eval_segments.csv",
            'eeeeeeeeeee, 9, 2, "/m/0k4j"\n',
            "eval_segments.csv: line 1: a segment from 9 to 2 seconds",
        ),
        ("eval_segments.csv", 'eeeeeeeeeee, 2, inf, "/m/0k4j"\n', "line 1: a segment from 2 to inf seconds"),
        (
            "class_labels_indices.csv",
            "a,b\n1,2\n",
            "csv: line 1: no column 'mid'; needed are mid, display_name; the columns are a, b",
        ),
    ],
)
def test_audioset_refuses_wrong_tables(
    file: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = audioset(tmp_path / "data")
    (data / file).write_text(text)
    assert main(["audioset", str(data), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_audioset_without_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval_segments.csv").write_text('eeeeeeeeeee, 2.5, 12.5, "/m/0k4j"\n')
    assert main(["audioset", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "none of the 1 segments of its tables has a file named YTID.wav or alike" in capsys.readouterr().err
