"""ssl-pack merge: the samples of all inputs, byte for byte, under one index; resumed, refused, and never half there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ssl_platform.data.commands import _joining, _out
from ssl_platform.data.index import Index
from tests.packed import contents, image_bytes, pattern, records, sample, ssl_pack, write_tar


def pack(folder: Path, labels: list[str], first: int, number: int, side: int = 16) -> Path:
    """A packed folder of `number` images in shards of 3, keys unlike those of other `first`."""
    folder.mkdir(parents=True)
    rows = ["path,label,group"]
    for place in range(number):
        (folder / f"im{first + place}.png").write_bytes(image_bytes(pattern(first + place, side)))
        rows.append(f"im{first + place}.png,{labels[place % len(labels)]},p{(first + place) % 5}")
    (folder / "table.csv").write_text("\n".join(rows))
    assert ssl_pack(folder / "table.csv", folder / "shards", "--samples-per-shard", 3) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two packed folders: cat and dog, 16 pixels wide; dog and eel, 24 pixels wide."""
    root = tmp_path_factory.mktemp("inputs")
    return pack(root / "a", ["cat", "dog"], 0, 8), pack(root / "b", ["dog", "eel"], 100, 7, side=24)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert ssl_pack("merge", *arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err[captured.err.index("ssl-pack merge: ") :]


def test_samples_labels_groups_and_statistics(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ssl_pack("merge", *inputs, tmp_path / "all") == 0
    captured = capsys.readouterr()
    assert "15 samples in 6 shards" in captured.out
    merged, a, b = Index.open(tmp_path / "all"), Index.open(inputs[0]), Index.open(inputs[1])
    tars = [path.read_bytes() for folder in inputs for path in sorted(folder.glob("*.tar"))]
    assert [path.read_bytes() for path in sorted((tmp_path / "all").glob("*.tar"))] == tars
    assert records(tmp_path / "all") == records(*inputs)
    assert merged.label_names == ["cat", "dog", "eel"]
    for what in ("label", "group"):
        names = getattr(merged, f"{what}_names")
        expected = [getattr(part, f"{what}_names")[i] for part in (a, b) for i in getattr(part, f"{what}s").tolist()]
        assert [names[i] for i in getattr(merged, f"{what}s").tolist()] == expected
    pixels = [pattern(i, 16).reshape(-1, 3) / 255 for i in range(8)]
    pixels += [pattern(100 + i, 24).reshape(-1, 3) / 255 for i in range(7)]
    together = np.concatenate(pixels)
    statistics = json.loads((tmp_path / "all/index.json").read_text())["statistics"]
    np.testing.assert_allclose(statistics["mean"], together.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics["std"], together.std(0), rtol=1e-12)
    assert statistics["pixels"] == len(together)
    for share, values in statistics["percentiles"].items():
        np.testing.assert_array_equal(values, np.percentile(together, float(share), axis=0, method="inverted_cdf"))
    both = Index.open(list(inputs)).statistics
    assert both is not None and both["percentiles"] == statistics["percentiles"], "opened together as joined"


def test_percentiles_need_those_of_every_input(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = shutil.copytree(inputs[1], tmp_path / "older")
    about = json.loads((older / "index.json").read_text())
    del about["statistics"]["percentiles"], about["statistics"]["distribution"]
    (older / "index.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert ssl_pack("merge", inputs[0], older, tmp_path / "all") == 0
    captured = capsys.readouterr()
    assert f"no percentiles of the channels: {older} was packed before these were kept" in captured.err
    assert "; std 0." in captured.out and "; percentile" not in captured.out
    statistics = Index.open(tmp_path / "all").statistics
    assert statistics is not None and set(statistics) == {"mean", "std"}


def test_class_numbers_that_no_longer_hold_are_said(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ssl_pack("merge", *inputs, tmp_path / "all") == 0
    assert "the number of class 'dog' is 0 in `cls` members of" in capsys.readouterr().err
    assert ssl_pack("verify", tmp_path / "all") == 0, "which knows, and goes by the names"
    fine = pack(tmp_path / "more", ["cat", "dog"], 200, 4)
    assert ssl_pack("merge", inputs[0], fine, tmp_path / "fine") == 0
    assert "the number of class" not in capsys.readouterr().err
    assert json.loads((tmp_path / "fine/index.json").read_text())["cls_differs"] is False
    other = pack(tmp_path / "other", ["cat", "dog"], 300, 4)
    assert ssl_pack("merge", other, tmp_path / "all", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again/index.json").read_text())["cls_differs"] is True


def test_the_same_inputs_give_the_same_bytes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    moved = [Path(shutil.copytree(path, tmp_path / name / "shards")) for path, name in zip(inputs, "xy", strict=True)]
    assert ssl_pack("merge", *inputs, tmp_path / "one") == 0
    assert ssl_pack("merge", *moved, tmp_path / "two", "--workers", 3) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    one.pop("pack.json"), two.pop("pack.json")  # says when the inputs were written
    assert one == two
    before = contents(tmp_path / "one")
    assert ssl_pack("merge", *inputs, tmp_path / "one") == 0
    assert contents(tmp_path / "one") == before


def test_foreign_tars_join_packed_ones(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "tars/x.tar", [("s1", sample(1, "eel")), ("s2", sample(2))])
    write_tar(tmp_path / "tars/y.tar", [("s3", sample(3, "fox"))])
    pattern_of_tars = f"{tmp_path}/tars/*.tar"
    assert ssl_pack("merge", inputs[0], pattern_of_tars, tmp_path / "all") == 0
    captured = capsys.readouterr()
    assert "no mean and std of the channels: not known for the whole of" in captured.err
    assert "channels: mean and std are not known" in captured.out
    index = Index.open(tmp_path / "all")
    assert index.statistics is None and len(index) == 11 and index.label_names == ["cat", "dog", "eel", "fox"]
    assert index.labels[-3:].tolist() == [2, -1, 3]
    assert [record.key for record in records(tmp_path / "all")[-3:]] == ["s1", "s2", "s3"]
    one_tar = [inputs[0] / "shard-000000.tar", inputs[1]]
    assert ssl_pack("merge", *one_tar, tmp_path / "part") == 0
    assert Index.open(tmp_path / "part").statistics is None, "those of a folder are not those of one of its tars"


def test_links_share_the_space(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    a = Path(shutil.copytree(inputs[0], tmp_path / "a"))
    for _ in range(2):
        assert ssl_pack("merge", "--link", a, inputs[1].absolute(), tmp_path / "all") == 0
        for link, shard in (("shard-000000.tar", "shard-000000.tar"), ("shard-000002.tar", "shard-000002.tar")):
            assert (tmp_path / "all" / link).samefile(a / shard)
    assert not list((tmp_path / "all").glob(".*"))
    assert records(tmp_path / "all") == records(*inputs)


def test_links_over_disks_are_refused(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def link(*arguments: object, **options: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    said = refused(capsys, "--link", *inputs, tmp_path / "all")
    assert "cannot be linked to" in said and "leave out --link" in said
    assert not (tmp_path / "all/index.json").exists()


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keys_used_twice_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_tar(tmp_path / "a/x.tar", [(f"k{number}", sample(number)) for number in range(9)]).parent
    b = write_tar(tmp_path / "b/y.tar", [(f"k{number}", sample(50 + number)) for number in range(2, 12)]).parent
    said = refused(capsys, a, b, tmp_path / "all")
    assert "7 keys are used twice; --allow-duplicate-keys keeps all these samples" in said
    assert "'k2': a/x.tar and b/y.tar" in said and "and 2 more" in said and "k8" not in said
    assert not (tmp_path / "all").exists()
    assert ssl_pack("merge", a, b, tmp_path / "all", "--allow-duplicate-keys") == 0
    assert len(Index.open(tmp_path / "all")) == 19
    assert ssl_pack("verify", tmp_path / "all", "--quick") == 1
    assert ssl_pack("verify", tmp_path / "all", "--quick", "--allow-duplicate-keys") == 0


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_goes_on(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ssl_pack("merge", *inputs, tmp_path / "whole") == 0
    place = _joining._place

    def full(folder: Any, link: bool, job: Any) -> Any:
        if job.out.name == "shard-000004.tar":
            raise OSError(errno.ENOSPC, "No space left on device", str(job.out))
        return place(folder, link, job)

    monkeypatch.setattr(_joining, "_place", full)
    said = refused(capsys, *inputs, tmp_path / "all")
    assert "No space left on device; make room and give the same command again" in said
    done = {path.name: path.stat().st_ino for path in (tmp_path / "all").glob("*.tar")}
    assert len(done) == 4
    with pytest.raises(ValueError, match="packing was not finished"):
        Index.open(tmp_path / "all")
    monkeypatch.undo()
    assert ssl_pack("merge", *inputs, tmp_path / "all") == 0
    assert {name: (tmp_path / "all" / name).stat().st_ino for name in done} == done, "finished shards are kept"
    assert contents(tmp_path / "all") == contents(tmp_path / "whole")


def test_kill_at_any_time(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert ssl_pack("merge", *inputs, tmp_path / "whole") == 0
    out = tmp_path / "all"
    slow = (
        "import shutil, sys, time\ncopy = shutil.copyfileobj\n"
        "def slowly(*arguments):\n    copy(*arguments)\n    time.sleep(.3)\n"
        "shutil.copyfileobj = slowly\nfrom ssl_platform.data.pack import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "merge", *map(str, inputs), str(out), "--workers", "2"]
    for shards in (0, 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(out.glob("shard-*.tar"))) <= shards and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert not (out / "index.json").exists()
    deadline = time.monotonic() + 60
    while ssl_pack("merge", *inputs, out) != 0:  # workers notice within a second that their parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert contents(out) == contents(tmp_path / "whole")


def broken_disk(*arguments: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_an_input_that_changed_is_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = [write_tar(tmp_path / f"{name}/x.tar", [(name, sample(seed))]) for seed, name in enumerate("ab")]
    assert ssl_pack("merge", *tars, tmp_path / "all") == 0
    write_tar(tars[1], [("b", sample(1))])
    os.utime(tars[1], ns=(1, 1))
    other = {**sample(1), "json": b'{"label": 7, "group": null}'.ljust(len(sample(1)["json"]))}
    write_tar(tars[1], [("b", other)])
    with monkeypatch.context() as patch:
        patch.setattr(_joining, "write_index", broken_disk)
        assert ssl_pack("merge", *tars, tmp_path / "all") == 2
        assert not (tmp_path / "all/index.json").exists(), "the old index is not that of the new shards"
    assert ssl_pack("merge", *tars, tmp_path / "all") == 0
    assert Index.open(tmp_path / "all").labels.tolist() == [-1, 7]


# -- refusals ----------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_refusals(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = inputs
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    numbers = write_tar(tmp_path / "numbers/x.tar", [("n", sample(1, 3))]).parent
    broken = write_tar(tmp_path / "broken/x.tar", [("n", sample(1)), ("m", sample(2))])
    broken.write_bytes(broken.read_bytes()[:1000])
    for arguments, message in (
        ([a, tmp_path / "out"], "expected two or more inputs and then the folder to write: merge A B OUT"),
        ([a, tmp_path / "empty", tmp_path / "out"], "empty: no tar shards in this folder"),
        ([a, tmp_path / "none", tmp_path / "out"], "none: no such file or folder"),
        ([a, a, tmp_path / "out"], "this shard is given twice"),
        ([a, numbers, tmp_path / "out"], "its labels are numbers, other shards name theirs"),
        ([a, broken, tmp_path / "out"], "x.tar: "),
        ([a, b, a], "is one of the inputs; name an empty or new folder"),
        ([a, b, tmp_path / "file"], "file: is a file; expected an empty or new folder"),
        ([a, b, tmp_path / "full"], "full: not empty (notes.txt, ...): name an empty or new folder"),
    ):
        assert message in refused(capsys, *arguments), arguments
    assert not (tmp_path / "out").exists() and (tmp_path / "full/notes.txt").read_text() == "mine"
    assert ssl_pack("merge", a, b, tmp_path / "ab") == 0
    assert "holds the result of another command, which differs in inputs" in refused(capsys, b, a, tmp_path / "ab")
    monkeypatch.setattr(_out.shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 5000, 5000))
    assert "bytes are needed and 5,000 are free on this disk" in refused(capsys, a, b, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_index_that_does_not_match_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = Path(shutil.copytree(inputs[0], tmp_path / "a"))
    rows = np.load(a / "index.npy")
    rows["start"][1] += 512
    np.save(a / "index.npy", rows)
    assert "expected the header of a member; `ssl-pack verify`" in refused(capsys, a, inputs[1], tmp_path / "all")
    rows["start"][1] += 512  # the second member of the sample
    np.save(a / "index.npy", rows)
    said = refused(capsys, a, inputs[1], tmp_path / "all")
    assert "shard-000000.tar: its samples do not lie where its index says; `ssl-pack verify`" in said
    assert not (tmp_path / "all/index.json").exists()
    (a / "shard-000001.tar").unlink()
    assert "shard-000001.tar: listed in index.json, but No such file" in refused(capsys, a, inputs[1], tmp_path / "all")


def test_statistics_of_different_things_are_not_joined(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both have three channels: colours, and coordinates."""
    for name, values in (("images", {"of": None}), ("clouds", {"of": {"values": "coordinates"}})):
        write_tar(tmp_path / f"in-{name}/x.tar", [(f"{name}{number}", sample(number)) for number in range(2)])
        assert ssl_pack("prune", tmp_path / f"in-{name}", tmp_path / name, "--keep", 1) == 0
        about = json.loads((tmp_path / name / "index.json").read_text())
        about["statistics"] |= values
        (tmp_path / name / "index.json").write_text(json.dumps(about))
    assert ssl_pack("merge", tmp_path / "images", tmp_path / "clouds", tmp_path / "all") == 0
    assert (
        "no mean and std of the channels: the inputs differ in their number of channels, or in what the values are"
        in (capfd.readouterr().err)
    )
    assert Index.open(tmp_path / "all").statistics is None
    assert Index.open([tmp_path / "images", tmp_path / "clouds"]).statistics is None
    alone = Index.open(tmp_path / "clouds").statistics
    assert alone is not None and alone["of"] == {"values": "coordinates"}
