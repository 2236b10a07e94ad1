"""ssl-pack prune: which samples stay, byte for byte, what is said of those that go, and what is refused."""

import csv
import errno
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ssl_platform.data.commands import _thinning
from ssl_platform.data.index import Index
from tests.packed import Members, contents, image_bytes, pattern, records, sample, ssl_pack, write_tar

NUM = 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in two tars; sample 10 n + 1 is sample 10 n again, as JPEG."""
    folder = tmp_path_factory.mktemp("prune") / "in"
    samples: list[tuple[str, Members]] = []
    for number in range(NUM):
        members = dict(sample(number, ["cat", "dog"][number % 2], number // 6))
        if number % 10 == 1:
            del members["png"]
            members["jpg"] = image_bytes(pattern(number - 1), "jpg", quality=60)
        samples.append((f"k{number:02d}", members))
    write_tar(folder / "a.tar", samples[:25])
    write_tar(folder / "b.tar", samples[25:])
    Index.open(folder)
    return folder


def prune(*arguments: object) -> tuple[list[str], list[dict[str, str]]]:
    """The keys that stay, and the table of those that go; OUT is the second argument."""
    assert ssl_pack("prune", *arguments) == 0
    out = Path(str(arguments[1]))
    with (out / "dropped.csv").open(newline="") as file:
        return [record.key for record in records(out)], list(csv.DictReader(file))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert ssl_pack("prune", *arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err[captured.err.index("ssl-pack prune: ") :]


# -- at random ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.34, 0.999, 0.02])
def test_a_random_share(share: float, shards: Path, tmp_path: Path) -> None:
    kept, dropped = prune(shards, tmp_path / "out", "--keep", share, "--samples-per-shard", 7)
    assert len(kept) == round(share * NUM) and kept == sorted(kept)
    assert sorted(kept + [row["key"] for row in dropped]) == [f"k{number:02d}" for number in range(NUM)]
    assert all(row["rule"] == "random" and row["why"] == "seed 0" for row in dropped)
    assert all(row["key"] == f"k{int(row['id']):02d}" for row in dropped)
    everything = {record.key: record for record in records(shards)}
    assert records(tmp_path / "out") == [everything[key] for key in kept], "nothing is encoded again"
    index, before = Index.open(tmp_path / "out"), Index.open(shards)
    assert max(index.shard_counts) <= 7
    assert index.groups.tolist() == [before.groups[int(key[1:])] for key in kept]
    assert [index.label_names[label] for label in index.labels] == [["cat", "dog"][int(key[1:]) % 2] for key in kept]


def test_seeds_workers_and_repetition(shards: Path, tmp_path: Path) -> None:
    first = prune(shards, tmp_path / "1", "--keep", 0.5, "--seed", 3, "--samples-per-shard", 5)
    assert prune(shards, tmp_path / "2", "--keep", 0.5, "--seed", 3, "--samples-per-shard", 5, "--workers", 3) == first
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert prune(shards, tmp_path / "1", "--keep", 0.5, "--seed", 3, "--samples-per-shard", 5) == first
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert prune(shards, tmp_path / "3", "--keep", 0.5, "--seed", 4)[0] != first[0]


def test_statistics_are_measured_again_or_unknown(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_png = scores(tmp_path, ["png" in record.members for record in records(shards)])
    kept, _ = prune(shards, tmp_path / "png", "--scores", is_png, "--min-score", 1, "--keep", 0.5)
    pixels = np.concatenate([pattern(int(key[1:])).reshape(-1, 3) / 255 for key in kept])
    statistics = json.loads((tmp_path / "png/index.json").read_text())["statistics"]
    np.testing.assert_allclose(statistics["mean"], pixels.mean(0), rtol=1e-10)
    np.testing.assert_allclose(statistics["std"], pixels.std(0), rtol=1e-10)
    assert statistics["pixels"] == len(pixels)
    for share, values in statistics["percentiles"].items():
        np.testing.assert_array_equal(values, np.percentile(pixels, float(share), axis=0, method="inverted_cdf"))
    prune(shards, tmp_path / "fast", "--keep", 0.5, "--no-statistics")
    assert Index.open(tmp_path / "fast").statistics is None
    write_tar(tmp_path / "sound/x.tar", [(f"s{number}", {"dat": bytes(100)}) for number in range(6)])
    capsys.readouterr()
    prune(tmp_path / "sound", tmp_path / "less", "--keep", 0.5)
    captured = capsys.readouterr()
    assert Index.open(tmp_path / "less").statistics is None
    assert (
        "3 samples cannot be decoded, such as x.tar: s" in captured.err
        and "nothing that can be decoded among its members dat" in captured.err
    )
    assert "mean and std are not known" in captured.out


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_several_members_stay_whole(format: int, tmp_path: Path) -> None:
    samples = [
        (f"deep/{'x' * 140}/ß{number}", {**sample(number, "a"), "seg.png": sample(90 + number)["png"]})
        for number in range(9)
    ]
    write_tar(tmp_path / "in/x.tar", samples, format)
    kept, _ = prune(tmp_path / "in", tmp_path / "out", "--keep", 0.6)
    wanted = dict(samples)
    assert [record.members for record in records(tmp_path / "out")] == [wanted[key] for key in kept]
    with tarfile.open(tmp_path / "out/shard-000000.tar") as archive:
        assert len(archive.getnames()) == 3 * len(kept)
    assert (tmp_path / "out/shard-000000.tar").stat().st_size % tarfile.RECORDSIZE == 0
    assert ssl_pack("verify", tmp_path / "out") == 0


# -- by score ----------------------------------------------------------------------------------------------------------


def scores(folder: Path, values: Any) -> Path:
    np.save(folder / "scores.npy", np.asarray(values) * 1.0)
    return folder / "scores.npy"


def table(folder: Path, text: str) -> Path:
    (folder / "scores.csv").write_text(text)
    return folder / "scores.csv"


def test_the_highest_scores(shards: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).permutation(NUM) // 2  # in pairs
    by_rule = sorted(range(NUM), key=lambda number: (-values[number], number))
    kept, dropped = prune(shards, tmp_path / "1", "--scores", scores(tmp_path, values), "--keep-top", 0.35)
    assert kept == [f"k{number:02d}" for number in sorted(by_rule[:21])]
    assert {row["rule"] for row in dropped} == {"score"}
    assert dropped[0]["why"].endswith("is not among the highest 0.35")
    rows = [f"{number},{values[number]}" for number in by_rule]
    by_id = table(tmp_path, "\n".join(["id,score", *rows]))
    assert prune(shards, tmp_path / "2", "--scores", by_id, "--keep-top", 0.35) == (kept, dropped)
    by_key = table(tmp_path, "\n".join(["score,key", *(f"{values[n]},k{n:02d}" for n in by_rule)]))
    assert prune(shards, tmp_path / "3", "--scores", by_key, "--keep-top", 0.35) == (kept, dropped)


def test_limits(shards: Path, tmp_path: Path) -> None:
    given = scores(tmp_path, np.arange(NUM) / 10)
    kept, dropped = prune(shards, tmp_path / "out", "--scores", given, "--min-score", 1, "--max-score", 2)
    assert kept == [f"k{number:02d}" for number in range(10, 21)]
    assert dropped[0]["why"] == "0 is below 1" and dropped[-1]["why"] == "5.9 is above 2"


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def test_near_duplicates_by_thumbnail(shards: Path, tmp_path: Path) -> None:
    kept, dropped = prune(shards, tmp_path / "out", "--near-duplicates", 0.95)
    assert [row["key"] for row in dropped] == [f"k{number:02d}" for number in range(1, NUM, 10)]
    assert all(row["why"].startswith(f"of k{int(row['id']) - 1:02d}, cosine 0.9") for row in dropped)
    assert prune(tmp_path / "out", tmp_path / "again", "--near-duplicates", 0.95) == (kept, [])


def test_the_highest_score_of_near_duplicates_stays(shards: Path, tmp_path: Path) -> None:
    given = scores(tmp_path, np.arange(NUM))
    _, dropped = prune(shards, tmp_path / "out", "--near-duplicates", 0.95, "--scores", given)
    assert [row["key"] for row in dropped] == [f"k{number:02d}" for number in range(0, NUM, 10)]


def test_features_from_elsewhere_and_rules_one_after_the_other(shards: Path, tmp_path: Path) -> None:
    features = np.eye(NUM, dtype=np.float32)
    features[40:] = features[:20] + 0.1 * features[40:]
    np.save(tmp_path / "features.npy", features)
    kept, dropped = prune(
        shards, tmp_path / "out", "--near-duplicates", 0.9, "--features", tmp_path / "features.npy",
        "--scores", scores(tmp_path, -np.arange(NUM)), "--min-score", -49, "--keep", 0.5,
    )  # fmt: skip
    rules = {number: [row["rule"] for row in dropped if int(row["id"]) == number] for number in range(NUM)}
    assert all(rules[number] == ["score"] for number in range(50, 60))
    assert all(rules[number] == ["near-duplicate"] for number in range(40, 50))
    assert len(kept) == 20 and [row["rule"] for row in dropped].count("random") == 20
    about = json.loads((tmp_path / "out/index.json").read_text())
    assert about["dropped"] == {"score": 10, "near-duplicate": 10, "random": 20}


def test_bad_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [(f"k{number}", dict(sample(number))) for number in range(5)]
    samples[2][1]["png"] = samples[2][1]["png"][:50]
    write_tar(tmp_path / "in/x.tar", samples)
    kept, dropped = prune(tmp_path / "in", tmp_path / "out", "--drop-bad")
    assert kept == ["k0", "k1", "k3", "k4"]
    assert dropped[0]["rule"] == "bad" and dropped[0]["why"].startswith("cannot be decoded as png")
    assert Index.open(tmp_path / "out").statistics is not None
    kept, _ = prune(tmp_path / "in", tmp_path / "near", "--near-duplicates", 0.95)
    assert kept == ["k0", "k1", "k2", "k3", "k4"], "what cannot be compared is no near-duplicate"
    assert "1 sample cannot be decoded, such as x.tar: k2" in capsys.readouterr().err
    assert Index.open(tmp_path / "near").statistics is None


# -- refusals and interruptions ----------------------------------------------------------------------------------------


def test_refusals(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    some = ["--keep-top", 0.5, "--scores"]
    values = np.zeros(NUM)
    whole = [f"k{number:02d},1" for number in range(NUM)]
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    np.save(tmp_path / "short.npy", values[1:])
    np.save(tmp_path / "nan.npy", np.where(np.arange(NUM) == 7, np.nan, values))
    for arguments, message in (
        ([], "what to leave out? give --keep, --scores, --near-duplicates or --drop-bad"),
        (["--keep-top", 0.5], "--keep-top, --min-score, --max-score: need --scores FILE"),
        (["--features", tmp_path / "x.npy"], "--features: only with --near-duplicates"),
        (["--scores", tmp_path / "x.npy"], "--scores: say what to keep with --keep-top, --min-score or --max-score"),
        (["--keep", 0.001], "none of the 60 samples would be left; keep more"),
        ([*some, tmp_path / "none.npy"], "none.npy: cannot be read as a NumPy array"),
        ([*some, tmp_path / "none.csv"], "none.csv: cannot be read as a table (No such file or directory)"),
        ([*some, tmp_path / "short.npy"], "expected 60 numbers, one a sample, found float64 (59,)"),
        ([*some, tmp_path / "nan.npy"], "nan.npy: the score of 'k07' (id 7) is not a finite number"),
        (["--near-duplicates", 0.9, "--features", scores(tmp_path, values)], "expected a row of floats"),
    ):
        assert message in refused(capsys, shards, out, *arguments), arguments
    for text, message in (
        ("", "expected the columns key (or id) and score, found nothing"),
        ("key,value\n", "expected the columns key (or id) and score, found key, value"),
        ("\n".join(["key,score", *whole[:-2]]), "2 samples have no score: 'k58' (id 58), 'k59' (id 59)"),
        ("\n".join(["key,score", *whole, "k03,2"]), "line 62: the key 'k03' is there twice"),
        ("\n".join(["key,score", *whole, "k77,2"]), "line 62: no sample has the key 'k77'"),
        ("\n".join(["key,score", "k00,high"]), "line 2: the score is 'high', expected a number"),
    ):
        assert message in refused(capsys, shards, out, *some, table(tmp_path, text)), text
    assert not out.exists()
    for place, message in (
        (tmp_path / "file", "file: is a file; expected an empty or new folder"),
        (tmp_path / "full", "full: not empty (mine, ...)"),
        (shards, "is one of the inputs"),
    ):
        assert message in refused(capsys, shards, place, "--keep", 0.5)
    assert ssl_pack("prune", shards, tmp_path / "half", "--keep", 0.5) == 0
    said = refused(capsys, shards, tmp_path / "half", "--keep", 0.6)
    assert "holds the result of another command, which differs in kept: name an empty folder" in said


def test_scores_by_key_need_keys_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "in/a.tar", [("x", sample(0)), ("y", sample(1)), ("x", sample(2))])
    given = table(tmp_path, "key,score\nx,1\ny,2\n")
    said = refused(capsys, tmp_path / "in", tmp_path / "out", "--scores", given, "--keep-top", 0.5)
    assert "some samples have the same key, so scores by key are not clear: give the column id" in said


def test_a_full_disk_leaves_no_index_and_the_run_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--keep", 0.9, "--samples-per-shard", 10]
    prune(shards, tmp_path / "whole", *arguments)
    write_shard = _thinning._write_shard

    def full(index: Index, folder: Any, measure: bool, job: Any) -> Any:
        if job.out.name == "shard-000003.tar":
            raise OSError(errno.ENOSPC, "No space left on device", str(job.out))
        return write_shard(index, folder, measure, job)

    monkeypatch.setattr(_thinning, "_write_shard", full)
    assert "make room and give the same command again" in refused(capsys, shards, tmp_path / "out", *arguments)
    done = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert sorted(done) == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    with pytest.raises(ValueError, match="packing was not finished"):
        Index.open(tmp_path / "out")
    monkeypatch.undo()
    prune(shards, tmp_path / "out", *arguments)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in done} == done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_statistics_of_sound_are_those_of_packing(tmp_path: Path) -> None:
    """And not those of the picture that is shown of it."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).normal(0, 0.1, 8000)
        soundfile.write(tmp_path / "in" / f"{number}.wav", noise, 16000)
    assert ssl_pack(tmp_path / "in", tmp_path / "packed") == 0
    assert ssl_pack("prune", tmp_path / "packed", tmp_path / "same", "--keep", 1) == 0
    packed, same = (
        json.loads((tmp_path / name / "index.json").read_text())["statistics"] for name in ("packed", "same")
    )
    assert len(packed["mean"]) == 128 and packed["percentiles"] == same["percentiles"]
    assert packed["of"] == same["of"] and packed["of"]["values"] == "fbank"
    np.testing.assert_allclose(same["mean"], packed["mean"], rtol=1e-10)
    np.testing.assert_allclose(same["std"], packed["std"], rtol=1e-6, atol=1e-9)
