"""ssl-pack kaldi on tiny data folders, and speakers' trees and tables with segments."""

import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_platform.data.index import Index
from ssl_platform.data.layouts.kaldi import _file_of_command
from ssl_platform.data.pack import main
from ssl_platform.modalities._audio import decode_audio
from tests.test_audio_reading import RATE, tone, written
from tests.test_layouts_audio import lookup, samples, sound


def kaldi(folder: Path, **tables: str) -> Path:
    """Four utterances of two speakers; `tables` replace files, or add some; an empty one is taken away."""
    for number, name in enumerate(("anna-1", "anna-2", "bert-1", "bert-2")):
        sound(folder / "wavs" / f"{name}.flac", seconds=0.2 + 0.1 * number, seed=number)
    files = {
        "wav.scp": "".join(f"{name} wavs/{name}.flac\n" for name in ("anna-1", "anna-2", "bert-1", "bert-2")),
        "utt2spk": "anna-1 anna\nanna-2 anna\nbert-1 bert\nbert-2 bert\n",
        "spk2utt": "anna anna-1 anna-2\nbert bert-1 bert-2\n",
        "spk2gender": "anna f\nbert m\n",
        "text": "anna-1 HELLO WORLD\n",
    }
    for name, text in (files | {name.replace("_", "."): text for name, text in tables.items()}).items():
        (folder / name).unlink(missing_ok=True)
        if text:
            (folder / name).write_text(text)
    return folder


def packed(folder: Path, out: Path, *options: str, status: int = 0) -> dict[str, dict[str, Any]]:
    """{utterance: its json and file}"""
    assert main(["kaldi", str(folder), str(out), *options]) == status
    names = lookup(out)
    return {names[sample["key"]]: sample for sample in samples(out)}


def test_utterances_and_speakers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = packed(kaldi(tmp_path / "data"), tmp_path / "out")
    assert list(found) != [] and sorted(found) == ["anna-1", "anna-2", "bert-1", "bert-2"]
    assert found["anna-1"]["label"] == found["anna-2"]["label"] == found["anna-1"]["group"]
    assert found["anna-1"]["label"] != found["bert-1"]["label"] and "session" not in found["anna-1"]
    assert [found[name]["num_samples"] for name in ("anna-1", "bert-2")] == [3200, 8000]
    assert "no utt2ses or alike, so no split divides a speaker" in " ".join(capsys.readouterr().err.split())
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or not any(name in path.read_bytes() for name in (b"anna", b"bert")), path
    plain = tmp_path / "plain"
    assert main(["kaldi", str(tmp_path / "data"), str(plain), "--plain-names"]) == 0
    assert {sample["label"] for sample in samples(plain)} == {"anna", "bert"}


@pytest.mark.parametrize("table", ["utt2ses", "utt2session", "utt2video", "reco2ses"])
def test_sessions_are_groups(table: str, tmp_path: Path) -> None:
    data = kaldi(tmp_path / "data", **{table: "anna-1 monday\nanna-2 tuesday\nbert-1 monday\nbert-2 tuesday\n"})
    found = packed(data, tmp_path / "out")
    assert found["anna-1"]["group"] == found["bert-1"]["group"] != found["anna-2"]["group"]
    assert found["anna-1"]["session"] == found["bert-1"]["session"] not in ("monday", found["anna-2"]["session"])
    split = tmp_path / "split"
    assert main(["kaldi", str(data), str(split), "--split", "train=0.5", "test=0.5"]) == 0
    groups = [{sample["group"] for sample in samples(split / part)} for part in ("train", "test")]
    assert len(groups[0]) == len(groups[1]) == 1 and not groups[0] & groups[1]
    assert {sample["label"] for sample in samples(split / "train")} == {s["label"] for s in samples(split / "test")}
    found = packed(data, tmp_path / "speakers", "--group", "speaker")
    assert found["anna-1"]["group"] == found["anna-2"]["group"] == found["anna-1"]["label"]


def test_segments_are_cut_out(tmp_path: Path) -> None:
    data = kaldi(
        tmp_path / "data",
        wav_scp="rec1 wavs/long.wav\nrec2 wavs/anna-1.flac\n",
        segments="anna-1 rec1 0.5 1.25\nbert-1 rec1 2.0 -1\nanna-2 rec2 0 -1\nbert-2 rec2 0.1 0.15 -1\n",
    )
    sound(data / "wavs" / "long.wav", 3.0)
    found = packed(data, tmp_path / "out")
    whole = decode_audio((data / "wavs" / "long.wav").read_bytes()).samples
    np.testing.assert_array_equal(decode_audio(found["anna-1"]["flac"]).samples, whole[:, 8000:20_000])
    np.testing.assert_array_equal(decode_audio(found["bert-1"]["flac"]).samples, whole[:, 32_000:])
    assert found["anna-2"]["num_samples"] == 3200 and found["bert-2"]["num_samples"] == 800
    assert found["anna-1"]["group"] == found["bert-1"]["group"] != found["anna-2"]["group"], "the recording"


def archive(folder: Path, utterances: dict[str, bytes]) -> str:
    """An archive as `wav-copy` writes it, and the wav.scp that it writes beside it."""
    data, lines = b"", []
    for name, wav in utterances.items():
        data += name.encode() + b" "
        lines.append(f"{name} {folder / 'wavs.ark'}:{len(data)}\n")
        data += wav
    (folder / "wavs.ark").write_bytes(data)
    return "".join(lines)


def test_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = kaldi(tmp_path / "data")
    wavs = {f"anna-{number}": written("WAV", "PCM_16", tone(0.2 * number, 1)) for number in (1, 2)}
    streamed = wavs["anna-1"][:4] + b"\xff" * 4 + wavs["anna-1"][8:]
    lines = archive(data, {**wavs, "bert-1": streamed, "bert-2": b"\0BFM matrix of features" + bytes(99)})
    (data / "wav.scp").write_text(lines)
    found = packed(data, tmp_path / "out", status=1)
    for name, wav in wavs.items():
        assert found[name]["wav"] == wav
    said = " ".join(capsys.readouterr().err.split())
    assert "left out: bert-2: at byte" in said and r"of wavs.ark begins no WAV, but b'\x00BFM mat'" in said
    assert "left out: bert-1: the WAV at byte" in said and "does not say where it ends" in said
    (data / "segments").write_text("anna-1 anna-2 0.1 0.2\n")
    cut = packed(data, tmp_path / "cut")
    whole = decode_audio(wavs["anna-2"]).samples
    np.testing.assert_array_equal(decode_audio(cut["anna-1"]["flac"]).samples, whole[:, 1600:3200])


def test_lines_that_cannot_be_used_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = kaldi(
        tmp_path / "data",
        wav_scp="rec1 wavs/long.wav\nrec2 wavs/gone.wav\nrec1 wavs/anna-1.flac\n",
        segments="a rec1 0 1\nb rec7 0 1\nc rec1 1 1\nd rec1 -2 1\ne rec1 x 1\nf rec1 nan 1\na rec1 1 2\n"
        "g rec1 9 10\nh rec2 0 1\ni rec1 0 1 1\nj rec1 2.5 99\n",
        utt2spk="a anna\nj anna\n",
    )
    sound(data / "wavs" / "long.wav", 3.0)
    found = packed(data, tmp_path / "out", status=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "data: 8 of 11 utterances have no speaker, so no label, such as b" in said
    assert sorted(found) == ["a", "j"] and found["a"]["num_samples"] == RATE and found["j"]["num_samples"] == 8000
    for reason in (
        "left out: b: segments, line 2: its recording rec7 is not in wav.scp",
        "left out: c: segments, line 3: from 1 to 1 seconds: expected 0 <= start < stop, or a stop of -1",
        "left out: d: segments, line 4: from -2 to 1 seconds",
        "left out: e: segments, line 5: from x to 1 seconds",
        "left out: f: segments, line 6: from nan to 1 seconds",
        "left out: a: segments has this utterance twice; the first counts",
        "left out: g: holds no samples from 9.0 seconds on",
        f"left out: h: No such file or directory ({data / 'wavs' / 'gone.wav'})",
        "left out: i: segments, line 10: channel 1 of a recording, which is not picked out",
    ):
        assert reason in said, reason
    assert len((tmp_path / "out" / "left_out.tsv").read_text().splitlines()) == 1 + 9
    assert packed(data, tmp_path / "allowed", "--allow-bad").keys() == found.keys()


def test_an_utterance_twice_in_wav_scp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = kaldi(tmp_path / "data", wav_scp="anna-1 wavs/anna-1.flac\nanna-1 wavs/anna-2.flac\n")
    assert packed(data, tmp_path / "out", status=1)["anna-1"]["num_samples"] == 3200
    assert "left out: anna-1: wav.scp has this utterance twice; the first counts" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("cat a.wav ", "a.wav"), ("cat 'my file.wav'", "my file.wav"), ("flac -c -d -s a.flac ", "a.flac"),
        ("flac -dc a.flac", "a.flac"), ("/usr/bin/flac --decode --stdout a.flac", "a.flac"),
        ("flac -c --decode --silent a.flac", "a.flac"), ("flac -d a.flac", None), ("flac -c a.flac", None),
        ("sox a.wav -r 8k -t wav - ", None), ("cat a.wav b.wav", None), ("cat a.wav | sox - -t wav -", None),
        ("cat -n a.wav", None), ("cat $HOME/a.wav", None), ("cat *.wav", None), ("cat 'a.wav", None), ("cat", None),
        ("sph2pipe -f wav -p -c 1 a.sph", None), ("flac -dc --skip=10 a.flac", None), ("flac -dc -", None),
        ("flac -dcz a.flac", None), ("flac -dc b.flac a.flac", None), ("rm a.wav", None),
        ("cat a.wav; rm a.wav", None), ("flac --decode-through-errors -c a.flac", None), ("", None),
    ],
)  # fmt: skip
def test_commands_that_only_print_a_file_are_read_without_them(command: str, file: str | None) -> None:
    assert _file_of_command(command) == file


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = kaldi(tmp_path / "data", wav_scp="anna-1 flac -c -d -s wavs/anna-1.flac |\nanna-2 cat wavs/anna-2.flac |\n")
    assert sorted(packed(data, tmp_path / "out")) == ["anna-1", "anna-2"]
    mark = tmp_path / "was_run"
    with (data / "wav.scp").open("a") as file:
        file.write(f"bert-1 touch {mark} |\n")
    capsys.readouterr()
    assert main(["kaldi", str(data), str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert f"wav.scp: line 3: 'touch {mark} |' is a command, as 1 of 3 lines hold, and none is run; write the" in said
    assert not mark.exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"wav_scp": "anna-1\n"}, "wav.scp: line 1: 'anna-1' stands alone, expected a name and its value"),
        ({"wav_scp": "\n"}, "wav.scp: no line in it"),
        ({"wav_scp": ""}, "not the layout of kaldi: missing wav.scp; there is"),
        ({"utt2spk": "anna-1 anna\nanna-1 bert\n"}, "utt2spk: line 2: anna-1 is bert, but anna further above"),
        ({"segments": "a anna-1 0\n"}, "segments: line 1: 3 words, expected UTTERANCE RECORDING START STOP"),
        ({"segments": "a anna-1 0 1 0 x\n"}, "segments: line 1: 6 words, expected UTTERANCE RECORDING START STOP"),
        ({"wav_scp": "a elsewhere/a.wav\nb elsewhere/b.wav\n"}, "wav.scp: none of its first 2 files is there, such as"),
    ],
)
def test_wrong_tables_are_refused(
    tables: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kaldi", str(kaldi(tmp_path / "data", **tables)), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = kaldi(tmp_path / "data")
    (data / "utt2spk").write_bytes("anna-1 änna\n".encode("latin-1"))
    assert main(["kaldi", str(data), str(tmp_path / "out")]) == 2
    assert "utt2spk: cannot be read as a table ('utf-8' codec" in capsys.readouterr().err


def test_relative_files_begin_at_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = kaldi(tmp_path / "data")
    (tmp_path / "corpora").mkdir()
    shutil.move(data / "wavs", tmp_path / "corpora" / "wavs")
    assert main(["kaldi", str(data), str(tmp_path / "out")]) == 2
    assert f"relative ones begin at {data}, give another --root" in capsys.readouterr().err
    assert len(packed(data, tmp_path / "out", "--root", str(tmp_path / "corpora"))) == 4


def test_labels_from_spk2utt_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = packed(kaldi(tmp_path / "data", utt2spk=""), tmp_path / "out")
    assert found["anna-1"]["label"] == found["anna-2"]["label"] != found["bert-1"]["label"]
    found = packed(kaldi(tmp_path / "none", utt2spk="", spk2utt=""), tmp_path / "unlabelled")
    assert found["anna-1"]["label"] is None and found["anna-1"]["group"] is None
    assert "neither utt2spk nor spk2utt: no labels" in " ".join(capsys.readouterr().err.split())


# -- trees and tables --------------------------------------------------------------------------------------------------


def test_a_tree_of_speakers_and_sessions(tmp_path: Path) -> None:
    for number, name in enumerate(("anna/monday/1", "anna/monday/2", "anna/tuesday/1", "bert/monday/1", "bert/2")):
        sound(tmp_path / "tree" / f"{name}.wav", seed=number)
    out = tmp_path / "out"
    assert main([str(tmp_path / "tree"), str(out), "--labels", "folder", "--groups", "subfolder"]) == 0
    found = {lookup(out)[sample["key"]]: sample for sample in samples(out)}
    groups = {name: sample["group"] for name, sample in found.items()}
    assert {name: sample["label"] for name, sample in found.items()} == {name: name.split("/")[0] for name in found}
    assert groups["anna/monday/1.wav"] == groups["anna/monday/2.wav"] and len({*groups.values()}) == 4
    first = tmp_path / "first"
    assert main([str(tmp_path / "tree"), str(first), "--groups", "folder", "--split", "a=0.5", "b=0.5"]) == 0
    assert {len({s["group"] for s in samples(first / part)}) for part in "ab"} == {1}
    assert len(Index.open(first / "a")) + len(Index.open(first / "b")) == 5


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_segments_of_a_table(suffix: str, separator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound(tmp_path / "long.wav", 2.0)
    rows = ["path,label,group,start,stop", "long.wav,a,s1,0.5,1", "long.wav,b,s1,1.25,", "long.wav,c,s2,,0.25",
            "long.wav,d,s2,,"]  # fmt: skip
    table = tmp_path / f"table{suffix}"
    table.write_text("\n".join(rows).replace(",", separator) + "\n")
    out = tmp_path / "out"
    assert main([str(table), str(out), "--keep-columns", "start"]) == 0
    found = {sample["label"]: sample for sample in samples(out)}
    whole = decode_audio((tmp_path / "long.wav").read_bytes()).samples
    for label, part in (("a", slice(8000, 16_000)), ("b", slice(20_000, None)), ("c", slice(4000))):
        np.testing.assert_array_equal(decode_audio(found[label]["flac"]).samples, whole[:, part])
    assert found["d"]["wav"] == (tmp_path / "long.wav").read_bytes() and found["a"]["start"] == "0.5"
    assert found["a"]["group"] == found["b"]["group"] != found["c"]["group"]
    assert "repeat a path" not in capsys.readouterr().err, "other segments are no repetition"
    table.write_text("path,start,stop\nlong.wav,1,0.5\nlong.wav,x,\nlong.wav,-1,2\n".replace(",", separator))
    assert main([str(table), str(tmp_path / "bad")]) == 2
    said = capsys.readouterr().err
    assert f"{table}: 3 lines cannot be used\n  line 2: from '1' to '0.5': start and stop are seconds" in said
    assert not (tmp_path / "bad").exists()


def test_wav_that_sox_wrote_into_a_pipe(tmp_path: Path) -> None:
    """It puts 2^31 - 4096 where it does not know the length."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(bytes(2000))
    data = (tmp_path / "a.wav").read_bytes()
    data = data[:4] + (0x7FFFF024).to_bytes(4, "little") + data[8:40] + (0x7FFFF000).to_bytes(4, "little") + data[44:]
    assert decode_audio(data).samples.shape == (1, 1000)
