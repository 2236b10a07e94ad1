"""ssl-pack: equal bytes for equal input, resumption, manifests, tiles, and the text of every refusal."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from ssl_platform.data import tar_writing
from ssl_platform.data.index import Index
from ssl_platform.data.media import Content
from ssl_platform.data.media.image import encode
from ssl_platform.data.pack import main
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.tars import atomic_file
from ssl_platform.modalities._images import decode_image

FILES = "index.json", "index.npy", "pack.json"
SALT = (
    "--salt-file",
    Path(__file__).parents[1] / "LICENSE",
)  # any file serves: the same for all shards that are compared


def save(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 5, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 images of three classes, one of them further down, and files that are no images."""
    for number in range(12):
        folder = tmp_path / "photos" / ["cat", "dog", "eel"][number % 3]
        save(folder / ("far/away" if number == 5 else ".") / f"im.age {number:02d}.PNG", pixels_of(number))
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    (tmp_path / "photos" / "cat" / "._im.png").write_text("left by another operating system")
    return tmp_path / "photos"


def pack(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def pack_plain(*arguments: object) -> int:
    """With readable keys and groups, and all columns: tests/test_identity.py has what shards hold without."""
    return pack(*arguments, "--plain-names")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert pack(*arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err[captured.err.index("ssl-pack: ") :]


def samples(folder: Path) -> list[tuple[dict[str, Any], bytes, str]]:
    """(json, image, key) of each sample, by key."""
    reader = ShardReader(Index.open(folder), cache_shards=4)
    found = []
    for sample in range(len(reader.index)):
        key, members = reader.read(sample)
        (image,) = (data for extension, data in members.items() if extension not in ("json", "cls"))
        found.append((json.loads(members["json"]), image, key))
    return sorted(found, key=lambda item: item[2])


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_shards(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack_plain(photos, tmp_path / "out", "--labels", "folder", "--samples-per-shard", 5) == 0
    assert "12 samples in 3 shards" in capsys.readouterr().out
    index = Index.open(tmp_path / "out")
    assert index.shard_counts == [4, 4, 4] and index.label_names == ["cat", "dog", "eel"]
    assert np.bincount(index.labels).tolist() == [4, 4, 4]
    assert len(set(index.shard_of[index.labels == 0].tolist())) > 1, "shards are mixtures"
    packed = samples(tmp_path / "out")
    paths = sorted(path for path in photos.rglob("*.PNG"))
    for (about, image, key), path in zip(packed, paths, strict=True):
        assert image == path.read_bytes() and about["path"] == path.relative_to(photos).as_posix()
        assert about["label"] == path.relative_to(photos).parts[0] and about["group"] is None
        assert key.endswith(path.stem.replace(".", "_").replace(" ", "_"))
    every = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in paths]) / 255
    assert index.statistics is not None
    np.testing.assert_allclose(index.statistics["mean"], every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(index.statistics["std"], every.std(0), rtol=1e-12)
    for share, values in index.statistics["percentiles"].items():
        np.testing.assert_array_equal(values, np.percentile(every, float(share), axis=0, method="inverted_cdf"))
    about = json.loads((tmp_path / "out" / "index.json").read_text())
    assert about["label_counts"] == {"cat": 4, "dog": 4, "eel": 4} and about["packed"]["seed"] == 0


def test_the_screen_has_mean_std_and_percentiles(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(photos, tmp_path / "out")
    said = capsys.readouterr().out
    for name in ("mean", "std", "percentile 1", "percentile 50", "percentile 99"):
        assert re.search(rf"[:;] {name} 0\.\d{{4}}, 0\.\d{{4}}, [01]\.\d{{4}}", said), said


@pytest.mark.parametrize("damage", ["other counts", "no text", "missing channels"])
def test_a_shard_whose_distribution_is_damaged_is_made_anew(photos: Path, tmp_path: Path, damage: str) -> None:
    pack(photos, tmp_path / "out", "--samples-per-shard", 5)
    before = contents(tmp_path / "out")
    state = json.loads(before["pack.json"])
    kept = state["shards"]["shard-000001.tar"]["distributions"]
    if damage == "other counts":
        kept["3"] = state["shards"]["shard-000000.tar"]["distributions"]["3"] | {"bins": "uint16"}
    elif damage == "no text":
        kept["3"]["counts"] = "!"
    else:
        kept["4"] = kept.pop("3")
    (tmp_path / "out" / "pack.json").write_text(json.dumps(state))
    (tmp_path / "out" / "index.json").unlink()
    pack(photos, tmp_path / "out", "--samples-per-shard", 5)
    assert contents(tmp_path / "out") == before


def test_shards_of_an_older_pack_stay_and_have_no_percentiles(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(photos, tmp_path / "out", "--samples-per-shard", 5)
    before = contents(tmp_path / "out")
    state = json.loads(before["pack.json"])
    del state["shards"]["shard-000001.tar"]["distributions"]
    (tmp_path / "out" / "pack.json").write_text(json.dumps(state))
    (tmp_path / "out" / "index.json").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    capsys.readouterr()
    assert pack(photos, tmp_path / "out", "--samples-per-shard", 5) == 0
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    captured = capsys.readouterr()
    assert "no percentiles: 1 shard" in captured.err and "percentile" not in captured.out
    statistics = Index.open(tmp_path / "out").statistics
    assert statistics is not None and set(statistics) == {"mean", "std"}
    assert pack(photos, tmp_path / "out", "--samples-per-shard", 5, "--overwrite") == 0
    assert contents(tmp_path / "out").keys() == before.keys()
    statistics = Index.open(tmp_path / "out").statistics
    assert (
        statistics is not None
        and statistics["percentiles"] == json.loads(before["index.json"])["statistics"]["percentiles"]
    )


def test_values_that_are_not_finite_are_left_out(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(item: Any, options: Any) -> Content:
        value = {"im_age 00": np.nan, "im_age 01": np.inf}.get(item.path.stem.replace(".", "_"), 0.25)
        return Content(item.path.read_bytes(), "png", np.array([[0.25, value]]))

    monkeypatch.setattr("ssl_platform.data.media.image.load", load)
    assert pack(photos, tmp_path / "out", "--allow-bad") == 0
    assert capsys.readouterr().err.count("has values that are no finite numbers (NaN, infinity, or so large") == 2
    index = Index.open(tmp_path / "out")
    assert len(index) == 10 and index.statistics is not None and index.statistics["mean"] == [0.25]
    assert index.statistics["percentiles"]["50"] == pytest.approx([0.25], rel=0.01)


def test_webdataset_reads_our_shards(photos: Path, tmp_path: Path) -> None:
    pack_plain(photos, tmp_path / "out", "--labels", "folder", "--samples-per-shard", 5)
    urls = [str(tar) for tar in sorted((tmp_path / "out").glob("*.tar"))]
    index = Index.open(tmp_path / "out")
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(read) == 12
    for sample, label in zip(read, index.labels.tolist(), strict=True):
        number = int(sample["__key__"][-2:])
        assert (sample["png"] == pixels_of(number)).all()
        assert sample["cls"] == label == ["cat", "dog", "eel"].index(sample["json"]["label"]) == number % 3


def test_a_pack_scanned_as_foreign_tars_gives_the_same_index(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", "--labels", "folder", "--samples-per-shard", 5)
    packed = Index.open(tmp_path / "out")
    for name in FILES:
        (tmp_path / "out" / name).unlink()
    assert pack("--index", tmp_path / "out") == 0
    scanned = Index.open(tmp_path / "out")
    assert scanned.label_names == packed.label_names and scanned.statistics is None
    for name in ("starts", "stops", "labels", "groups", "shard_of"):
        assert getattr(scanned, name).tolist() == getattr(packed, name).tolist()


def test_equal_bytes_for_any_number_of_workers_and_not_for_other_seeds(photos: Path, tmp_path: Path) -> None:
    for name, more in [("a", []), ("b", ["--workers", 2]), ("c", ["--seed", 1])]:
        assert pack(photos, tmp_path / name, "--samples-per-shard", 3, *SALT, *more) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["shard-000000.tar"] != contents(tmp_path / "c")["shard-000000.tar"]
    assert sorted(contents(tmp_path / "a")) == sorted([*FILES, *(f"shard-00000{shard}.tar" for shard in range(4))])


def test_integer_labels_stay_numbers(tmp_path: Path) -> None:
    for label in ("2", "10"):
        save(tmp_path / "in" / label / "a.png", pixels_of(0))
    pack(tmp_path / "in", tmp_path / "out", "--labels", "folder")
    index = Index.open(tmp_path / "out")
    assert index.label_names == [] and sorted(index.labels.tolist()) == [2, 10]


def test_depths_and_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000
    save(tmp_path / "deep" / "a.png", deep)
    pack(tmp_path / "deep", tmp_path / "out")
    statistics = Index.open(tmp_path / "out").statistics
    assert statistics is not None and statistics["mean"] == pytest.approx([(deep / 65535).mean()], rel=1e-12)
    assert statistics["percentiles"]["50"] == pytest.approx([14 * 2000 / 65535], rel=1 / 1024)
    save(tmp_path / "deep" / "b.png", pixels_of(1))
    pack(tmp_path / "deep", tmp_path / "mixed")
    assert Index.open(tmp_path / "mixed").statistics is None
    assert "1 and 3 channels, so there is no mean and std" in capsys.readouterr().err


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were really written, in this process."""
    names: list[str] = []

    def recording(path: Path) -> Any:
        names.append(path.name)
        return atomic_file(path)

    monkeypatch.setattr("ssl_platform.data.tar_writing.atomic_file", recording)
    return names


def test_only_what_is_missing_or_cut_off_is_made_again(photos: Path, tmp_path: Path, written: list[str]) -> None:
    out = tmp_path / "out"
    pack(photos, out, "--samples-per-shard", 3)
    whole = contents(out)
    assert len(written) == 4
    written.clear()
    pack(photos, out, "--samples-per-shard", 3)
    assert written == [] and contents(out) == whole
    (out / "shard-000001.tar").unlink()
    os.truncate(out / "shard-000003.tar", 1000)
    (out / "index.json").unlink()
    (out / ".shard-000002.tar.99.part").write_text("of a run that was killed")
    with pytest.raises(ValueError, match="packing was not finished; still missing: 1 of 4 shards. Run the ssl-pack"):
        Index.open(out)
    pack(photos, out, "--samples-per-shard", 3)
    assert written == ["shard-000001.tar", "shard-000003.tar"] and contents(out) == whole


def test_a_shard_is_older_than_its_inputs(photos: Path, tmp_path: Path, written: list[str]) -> None:
    out = tmp_path / "out"
    pack(photos, out, "--samples-per-shard", 3)
    (changed,) = photos.rglob("*04.PNG")
    save(changed, pixels_of(99))
    os.utime(changed, (time.time() + 5,) * 2)
    written.clear()
    pack(photos, out, "--samples-per-shard", 3)
    assert len(written) == 1
    assert any(image == changed.read_bytes() for _, image, _ in samples(out))


def test_a_killed_run_goes_on_to_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the second shard."""
    pack(photos, tmp_path / "whole", "--samples-per-shard", 3, *SALT)
    program = (
        "import os, signal, sys\n"
        "from ssl_platform.data import pack, tar_writing\n"
        "load, left = tar_writing._load, [5]\n"
        "def loading(*arguments):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return load(*arguments)\n"
        "tar_writing._load = loading\n"
        "pack.main(sys.argv[1:])\n"
    )
    command = [str(photos), str(tmp_path / "out"), "--samples-per-shard", "3", *map(str, SALT)]
    assert subprocess.run([sys.executable, "-c", program, *command], check=False).returncode == -signal.SIGKILL
    left = sorted(contents(tmp_path / "out"))
    assert left[-1] == "shard-000000.tar" and any(name.endswith(".part") for name in left) and "index.json" not in left
    assert main(command) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_plan_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    pack(photos, out)
    whole = contents(out)
    assert "holds shards of another plan, which differs in seed (0, now 1);" in refused(
        capsys, photos, out, "--seed", 1
    )
    save(photos / "new.png", pixels_of(7))
    message = refused(capsys, photos, out)
    assert "differs in items (other files, labels or groups, now" in message and "--overwrite" in message
    assert contents(out) == whole
    assert pack(photos, out, "--seed", 1, "--samples-per-shard", 4, "--overwrite") == 0
    assert len(Index.open(out)) == 13 and len(list(out.glob("*.tar"))) == 4
    (out / "pack.json").write_text("{")
    assert "pack.json: cannot be read" in refused(capsys, photos, out)


def test_a_folder_of_other_files_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"], ["--split", "a=.5", "thesis=.5"]):
        message = refused(capsys, photos, tmp_path / "out", *more)
        assert not (tmp_path / "out.lookup").exists()
        if "--split" in more:
            assert "holds thesis.tex, which is none of the splits a, thesis" in message
            continue
        assert "holds files that ssl-pack did not write (thesis.tex" in message
    (tmp_path / "out" / "thesis.tex").rename(tmp_path / "out" / "shard-000000.tar")
    assert "not empty, and without the pack.json" in refused(capsys, photos, tmp_path / "out")


def test_two_at_once_are_refused(photos: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ssl_platform.data.pack_state import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.take(range(9)); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        assert pack(photos, tmp_path / "out") == 2
        other.communicate("")
    assert pack(photos, tmp_path / "out") == 0


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_images_are_named_and_left_out(
    photos: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photos / "cat" / "im.age 00.PNG").read_bytes()
    (photos / "cat" / "im.age 00.PNG").write_bytes(whole[: len(whole) // 2])
    (photos / "dog" / "empty.jpg").write_bytes(b"")
    (photos / "dog" / "text.jpg").write_text("this is text")
    command = [photos, tmp_path / "out", "--samples-per-shard", 3, "--workers", workers]
    assert pack(*command) == 1
    said = capsys.readouterr()
    assert "left out: 3 that cannot be used" in said.out
    for line in ("left out: cat/im.age 00.PNG: ", "left out: dog/empty.jpg: the file has zero bytes", "dog/text.jpg: "):
        assert line in said.err
    assert len(Index.open(tmp_path / "out")) == 11
    assert pack(*command, "--allow-bad") == 0
    (photos / "cat" / "im.age 00.PNG").write_bytes(whole)
    assert pack(*command) == 1
    assert len(Index.open(tmp_path / "out")) == 12, "a shard from which something was left out is made again"


def test_nothing_to_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    message = refused(capsys, tmp_path / "empty", out)
    assert "empty: no images or point clouds or sound files or videos in this folder or below it" in message
    assert "missing: no such file or folder" in refused(capsys, tmp_path / "missing", out)
    assert not out.exists()
    (tmp_path / "empty" / "a.png").write_text("text")
    message = refused(capsys, tmp_path / "empty", out)
    assert "nothing to pack: of 1 inputs 1 cannot be used (named above)" in message and "min_tissue" not in message
    assert "INPUT and OUT are needed" in refused(capsys, tmp_path / "empty")
    assert "no tar in this folder" in refused(capsys, "--index", tmp_path / "empty")


def test_output_that_cannot_be_written(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    assert "file: is a file; expected a folder for the shards" in refused(capsys, photos, tmp_path / "file")
    assert "Not a directory" in refused(capsys, photos, tmp_path / "file" / "out")
    out, fsync, calls = tmp_path / "out", os.fsync, iter(range(1000))

    def full_disk(file: int) -> None:
        if next(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full_disk)
    message = refused(capsys, photos, out, "--samples-per-shard", 3)
    assert message.startswith(f"ssl-pack: {out}: No space left on device; make room and give the same command again")
    assert not any(name.endswith((".part", "index.json")) for name in contents(out))
    monkeypatch.setattr(os, "fsync", fsync)
    assert pack(photos, out, "--samples-per-shard", 3) == 0


def test_interrupted(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tar_writing, "_load", interrupt)
    assert pack(photos, tmp_path / "out") == 130
    assert sorted(contents(tmp_path / "out")) == ["pack.json"]


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_a_manifest(photos: Path, tmp_path: Path, suffix: str, delimiter: str) -> None:
    rows = [
        ["site", "label", "path", "group"],
        ["a, b", "dog", "photos/dog/im.age 01.PNG", "007"],
        ["c", "", "photos/eel/im.age 02.PNG", "7"],
        ["é", "cat", str(photos / "cat" / "im.age 03.PNG"), ""],
    ]
    quoted = [[f'"{cell}"' if "," in cell else cell for cell in row] for row in rows]
    table = tmp_path / f"table{suffix}"
    table.write_text("\ufeff" + "\r\n".join(delimiter.join(row) for row in quoted) + "\r\n\r\n", encoding="utf-8")
    assert pack_plain(table, tmp_path / "out") == 0
    index = Index.open(tmp_path / "out")
    assert index.label_names == ["cat", "dog"] and index.group_names == ["007", "7"]
    packed = [about for about, _, _ in samples(tmp_path / "out")]
    assert [about["site"] for about in packed] == ["a, b", "c", "é"]
    assert [about["label"] for about in packed] == ["dog", None, "cat"]
    assert [about["group"] for about in packed] == ["007", "7", None]
    assert sorted(zip(index.labels.tolist(), index.groups.tolist(), strict=True)) == [(-1, 1), (0, -1), (1, 0)]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["line 1: no column 'path'; the columns are none"]),
        ("file,label\na.png,1\n", ["line 1: no column 'path'; the columns are file, label; known are path, label"]),
        ("path,path\na,b\n", ["line 1: column 'path' is there twice"]),
        ("path,label\n", ["no row below the header"]),
        (
            'path,label\na.png,1\nb.png,2\na.png\na.png,1,2\n\n"a.png","one\nlabel"\n,1\n',
            ["4 lines cannot be used", "line 3: no such file: b.png (paths are relative to ", "line 5: 3 columns, but ",
             "line 4: 1 columns, but the header has 2", "line 9: the path is empty"],
        ),
        ("path\n" + "x.png\n" * 30, ["30 lines cannot be used", "line 11: no such file", "and 20 more"]),
        ('path\n"a.png"x\n', ["cannot be read as a table ("]),
    ],
)  # fmt: skip
def test_bad_manifests(tmp_path: Path, text: str, messages: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.png", pixels_of(0))
    (tmp_path / "table.csv").write_text(text)
    message = refused(capsys, tmp_path / "table.csv", tmp_path / "out")
    assert "table.csv: " in message and all(expected in message for expected in messages), message
    assert not (tmp_path / "out").exists()


# -- tiles -------------------------------------------------------------------------------------------------------------


def test_tiles_of_an_image(tmp_path: Path) -> None:
    """Every tile is where it says, groups are blocks, labels are the class of at least 90 % of the pixels."""
    pixels = pixels_of(0, 40, 64, 3)
    classes = np.zeros((40, 64), dtype=np.uint8)
    classes[:, 32:] = 1
    classes[:, 48:] = 255
    save(tmp_path / "slide.png", pixels)
    save(tmp_path / "classes.png", classes)
    command = [tmp_path / "slide.png", tmp_path / "out", "--tile", 8, "--stride", 4, "--group-block", 16]
    assert pack_plain(*command, "--labels-image", tmp_path / "classes.png", "--label-names", "fat,gland") == 0
    packed = samples(tmp_path / "out")
    assert [(about["x"], about["y"]) for about, _, _ in packed] == [
        (x, y) for y in range(0, 33, 4) for x in range(0, 57, 4)
    ]
    for about, image, key in packed:
        x, y = about["x"], about["y"]
        tile = decode_image(image, "png").numpy()
        assert (tile == pixels[y : y + 8, x : x + 8].transpose(2, 0, 1)).all() and key.endswith(f"_slide_x{x}_y{y}")
        counts = np.bincount(classes[y : y + 8, x : x + 8].ravel(), minlength=256)
        expected = [name for name, count in (("fat", counts[0]), ("gland", counts[1])) if count >= 0.9 * 64]
        assert about["label"] == (expected[0] if expected else None)
        assert about["group"] == f"slide_row{(y + 4) // 16}_column{(x + 4) // 16}"
    index = Index.open(tmp_path / "out")
    assert index.label_names == ["fat", "gland"] and set(index.labels.tolist()) == {-1, 0, 1}
    assert len(index.group_names) == 3 * 4


def test_a_region_and_unnamed_classes(tmp_path: Path) -> None:
    save(tmp_path / "slide.png", pixels_of(0, 40, 64, 3))
    palette = Image.fromarray(np.full((40, 64), 3, dtype=np.uint8), mode="P")
    palette.putpalette([7, 8, 9] * 256)
    palette.save(tmp_path / "classes.png")
    more = ["--region", "32,0,64,40", "--labels-image", tmp_path / "classes.png"]
    assert pack_plain(tmp_path / "slide.png", tmp_path / "out", "--tile", 16, *more) == 0
    assert sorted((about["x"], about["y"]) for about, _, _ in samples(tmp_path / "out")) == [
        (32, 0), (32, 16), (48, 0), (48, 16),
    ]  # fmt: skip
    assert Index.open(tmp_path / "out").labels.tolist() == [3] * 4


def test_tiles_of_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [pixels_of(number, 20, 20) for number in range(2)]
    for number, pixels in enumerate(images):
        save(tmp_path / f"{number}.png", pixels)
    (tmp_path / "table.csv").write_text(
        "path,x,y,label,by\n0.png,0,0,1,me\n1.png,12,10,0,me\n0.png,5,3,1,me\n1.png,13,0,,x\n"
    )
    assert pack_plain(tmp_path / "table.csv", tmp_path / "out", "--tile", 8) == 1
    assert "a tile of 8 pixels at x 13, y 0 is not inside the image, which has 20 x 20" in capsys.readouterr().err
    packed = samples(tmp_path / "out")
    assert [(about["path"], about["x"], about["y"], about["label"], about["by"]) for about, _, _ in packed] == [
        ("0.png", 0, 0, 1, "me"), ("1.png", 12, 10, 0, "me"), ("0.png", 5, 3, 1, "me"),
    ]  # fmt: skip
    for about, image, _ in packed:
        expected = images[int(about["path"][0])][about["y"] : about["y"] + 8, about["x"] : about["x"] + 8]
        assert (decode_image(image, "png")[0].numpy() == expected).all()


def test_the_tissue_filter(tmp_path: Path) -> None:
    slide = np.full((32, 32, 3), 200, dtype=np.uint8)
    slide[:, 16:, 1] = 150  # pink
    slide[16:, :16] = (200, 200, 150)  # yellow, which no stain is
    save(tmp_path / "slide.png", slide)
    assert pack(tmp_path / "slide.png", tmp_path / "out", "--tile", 16, "--stride", 8, "--min-tissue", 0.5) == 0
    assert {(about["x"], about["y"]) for about, _, _ in samples(tmp_path / "out")} == {
        (x, y) for x in (8, 16) for y in (0, 8, 16)
    }
    assert json.loads((tmp_path / "out" / "index.json").read_text())["without_tissue"] == 3
    assert (
        pack(tmp_path / "slide.png", tmp_path / "none", "--tile", 16, "--min-tissue", 1, "--region", "0,0,16,32") == 2
    )


@pytest.mark.parametrize(
    "pixels",
    [
        *(pixels_of(0, channels, 5, 4) for channels in (1, 2, 3, 4, 7)),
        pixels_of(0, 1, 5, 4).astype(np.uint16) * 257, pixels_of(0, 3, 5, 4).astype(np.uint16) * 200,
    ],
)  # fmt: skip
def test_tiles_are_stored_without_loss(pixels: np.ndarray[Any, Any]) -> None:
    data, extension = encode(pixels)
    decoded = decode_image(data, extension, channels=len(pixels))
    assert extension == ("npy" if len(pixels) > 4 or (len(pixels) > 1 and pixels.dtype == np.uint16) else "png")
    assert decoded.dtype == (torch.uint8 if pixels.dtype == np.uint8 else torch.uint16)
    assert (decoded.numpy() == pixels).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slide.png"], "slide.png: one file: give a folder or table to pack, or --tile"),
        (["slide.png", "--tile", "50"], "tiles of 50 pixels do not fit into 64 x 40 pixels"),
        (["slide.png", "--tile", "8", "--region", "0,0,65,40"], "region 0,0,65,40: expected x0 < x1 <= 64"),
        (
            ["slide.png", "--tile", "8", "--labels-image", "small.png"],
            "has 3 x 2 pixels, but the image that it labels has",
        ),
        (["slide.png", "--tile", "8", "--labels-image", "slide.png"], "expected one channel that holds the number of"),
        (["slide.png", "--tile", "8", "--labels-image", "text.csv"], "cannot be read as an image"),
        (["slide.png", "--tile", "8", "--label-names", "a,b"], "--label-names: needs --labels-image"),
        (["slide.png", "--tile", "8", "--labels", "folder"], "--labels folder: only with a folder"),
        (["text.csv", "--tile", "8"], "no column 'x' (with --tile each row is one tile"),
        (["text.csv", "--group-block", "8"], "--group-block: only where INPUT is an image"),
        ([".", "--tile", "8"], "--tile: needs an image, or a table"),
        (["bad.png", "--tile", "8"], "bad.png: "),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "slide.png", pixels_of(0, 40, 64, 3))
    save(tmp_path / "small.png", pixels_of(0, 2, 3))
    (tmp_path / "text.csv").write_text("path\nslide.png\n")
    (tmp_path / "bad.png").write_text("no image")
    assert message in refused(capsys, arguments[0], "out", *arguments[1:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--tile", "0"], "'0': expected a whole number of at least 1"),
        (["--min-tissue", "2"], "'2': expected a number from 0 to 1"),
        (["--region", "1,2,3"], "'1,2,3': expected X0,Y0,X1,Y1 in pixels"),
        (["--stide", "3"], "unrecognized arguments: --stide"),
    ],
)
def test_options_that_cannot_be_read(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["in", "out", *option])
    assert message in capsys.readouterr().err


def test_help_teaches_and_does_not_load_torch() -> None:
    program = (
        "import sys; from ssl_platform.data.pack import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.count("ssl-pack ") >= 4 and "examples:" in shown and "--min-tissue" in shown
