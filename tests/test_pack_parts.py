"""Packing in parts, splits, shards of equal size, the room on the disk, and what is said meanwhile."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_platform.data import work_progress
from ssl_platform.data.identity import Numbered
from ssl_platform.data.index import Index
from ssl_platform.data.items import Item
from ssl_platform.data.pack import main
from ssl_platform.data.pack_state import Lock, Part
from ssl_platform.data.splits import assign_splits, parse_splits
from ssl_platform.data.work_progress import WorkProgress

SALT = (
    "--salt-file",
    str(Path(__file__).parents[1] / "LICENSE"),
)  # any file serves: the same for all shards that are compared
fork = multiprocessing.get_context("fork")


def save(path: Path, seed: int, *shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape or (6, 5, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """20 images in folders of 2, 3, 4, 5 and 6."""
    for number in range(20):
        folder = "abcde"[sum(number >= first for first in (2, 5, 9, 14))]
        save(tmp_path / "photos" / folder / f"{number}.png", number)
    return tmp_path / "photos"


def pack(*arguments: object) -> int:
    return main([str(argument) for argument in (*arguments, *SALT)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert pack(*arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err[captured.err.index("ssl-pack: ") :]


# -- parts -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(1, 70))
def test_parts_have_every_shard_once(num_shards: int, of: int) -> None:
    parts = [Part(number, of).shards(num_shards) for number in range(of)]
    assert [shard for part in parts for shard in part] == list(range(num_shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("order", [[0], [0, 1, 2], [2, 0, 1], [6, 5, 4, 3, 2, 1, 0]])
def test_parts_give_the_bytes_of_the_whole(
    photos: Path, tmp_path: Path, order: Sequence[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Five shards, in any order and number of parts; the last writes the index and tidies up."""
    options = ["--samples-per-shard", 4, "--labels", "folder"]
    pack(photos, tmp_path / "whole", *options)
    out = tmp_path / "out"
    for done, number in enumerate(order):
        begun, left = (
            any(Part(other, len(order)).shards(5) for other in others) for others in (order[:done], order[done + 1 :])
        )
        if begun and not (out / "index.json").exists():
            with pytest.raises(
                ValueError, match=r"packing was not finished; still missing: .* Run the ssl-pack command"
            ):
                Index.open(out)
        capsys.readouterr()
        assert pack(photos, out, *options, "--part", f"{number}/{len(order)}") == 0
        assert ("this part is done; still missing: " in capsys.readouterr().out) == left
        assert (out / "index.json").exists() != left
    assert contents(out) == contents(tmp_path / "whole")
    for number in order:
        assert pack(photos, out, *options, "--part", f"{number}/{len(order)}") == 0
        assert contents(out) == contents(tmp_path / "whole"), "a part that is done again changes nothing"


def test_an_unfinished_folder_says_what_is_missing(photos: Path, tmp_path: Path) -> None:
    options = ["--samples-per-shard", 2]
    for number in (0, 3, 4):
        pack(photos, tmp_path / "out", *options, "--part", f"{number}/5")
    with pytest.raises(ValueError, match=r"missing: 4 of 10 shards, of parts 1, 2 of 5 \(they count from 0\)\. Run"):
        Index.open(tmp_path / "out")
    pack(photos, tmp_path / "out", *options)
    assert len(Index.open(tmp_path / "out")) == 20


def test_parts_at_the_same_time(photos: Path, tmp_path: Path) -> None:
    """Whoever is last writes the index, also if several are last."""
    options = ["--samples-per-shard", 2, "--groups", "folder", "--split", "a=.7", "b=.3"]
    pack(photos, tmp_path / "whole", *options)
    for attempt in range(6):
        out = tmp_path / f"out{attempt}"
        processes = [
            fork.Process(target=_exit_with_pack, args=(photos, out, *options, "--part", f"{number}/4"))
            for number in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert contents(out) == contents(tmp_path / "whole")


def _exit_with_pack(*arguments: object) -> None:
    os._exit(pack(*arguments))


def test_the_same_part_twice_is_refused_and_others_are_not(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out", ["--samples-per-shard", 4]
    ready, go_on = fork.Event(), fork.Event()

    def hold() -> None:
        lock = Lock(out)
        lock.take(Part(1, 3).shards(5))
        ready.set()
        go_on.wait(60)
        os._exit(0)

    other = fork.Process(target=hold)
    other.start()
    assert ready.wait(60)
    assert "another ssl-pack is at work on the same shards" in refused(capsys, photos, out, *options, "--part", "1/3")
    assert "another ssl-pack is at work on the same shards" in refused(capsys, photos, out, *options)
    for number in (0, 2):
        assert pack(photos, out, *options, "--part", f"{number}/3") == 0
    go_on.set()
    other.join(60)
    assert pack(photos, out, *options, "--part", "1/3") == 0
    assert len(Index.open(out)) == 20


def test_a_killed_part_goes_on(photos: Path, tmp_path: Path) -> None:
    """kill -9 in its second shard; what it had finished is kept."""
    options = ["--samples-per-shard", "3"]
    pack(photos, tmp_path / "whole", *options)
    out = tmp_path / "out"
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
    command = [str(photos), str(out), *options, *SALT, "--part", "1/2"]
    assert pack(photos, out, *options, "--part", "0/2") == 0
    assert subprocess.run([sys.executable, "-c", program, *command], check=False).returncode == -signal.SIGKILL
    assert any(path.name.endswith(".part") for path in out.iterdir())
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert len(kept) == 4
    assert main(command) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}, "none was made again"


def test_a_part_whose_inputs_changed_makes_the_index_anew(photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--samples-per-shard", 4]
    for number in range(3):
        pack(photos, out, *options, "--part", f"{number}/3")
    before = Index.open(out).statistics
    for path in photos.rglob("*.png"):
        save(path, 99, 9, 9, 3)
    for number in range(3):
        pack(photos, out, *options, "--part", f"{number}/3")
    pack(photos, tmp_path / "whole", *options)
    assert contents(out) == contents(tmp_path / "whole") and Index.open(out).statistics != before


def test_what_parts_leave_out_is_listed_and_counted(photos: Path, tmp_path: Path) -> None:
    for folder in "ae":
        (photos / folder / "bad.png").write_text("no image")
    options = ["--samples-per-shard", 3]
    pack(photos, tmp_path / "whole", *options)
    out = tmp_path / "out"
    statuses = [pack(photos, out, *options, "--part", f"{number}/8") for number in range(8)]
    assert set(statuses) == {0, 1} and statuses[-1] == 1, "a part answers for its own, the last for all"
    assert contents(out) == contents(tmp_path / "whole")
    assert len((out / "left_out.tsv").read_text().splitlines()) == 3
    for folder in "ae":
        save(photos / folder / "bad.png", 1)
    for number in range(8):
        assert pack(photos, out, *options, "--part", f"{number}/8") in (0, 1)
    assert not (out / "left_out.tsv").exists() and len(Index.open(out)) == 22


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64/64", "'64/64': parts count from 0: of 64 the last is 63/64"),
        ("3", "'3': expected I/N, such as 3/64"),
        ("/64", "'/64': expected I/N, such as 3/64"),
        ("0/0", "'0/0': expected I/N"),
        ("-1/4", "expected one argument"),
    ],
)
def test_parts_that_are_none(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["in", "out", "--part", text])
    assert message in capsys.readouterr().err


def test_parts_delete_nothing(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, photos, tmp_path / "out", "--part", "0/2", "--overwrite")
    assert "--overwrite: parts would delete each other's shards" in message


# -- splits ------------------------------------------------------------------------------------------------------------


def some(groups: Sequence[int | None]) -> list[Numbered]:
    return [Numbered(str(place), Item(Path("x"), str(place), group=group), -1) for place, group in enumerate(groups)]


@given(
    st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_splits_divide_no_group_and_keep_their_shares(groups: list[int | None], weights: list[int], seed: int) -> None:
    samples = some(groups)
    sizes = Counter(place if group is None else f"g{group}" for place, group in enumerate(groups))
    splits = {f"s{number}": weight / sum(weights) for number, weight in enumerate(weights)}
    if len(sizes) < len(splits):
        with pytest.raises(ValueError, match=r"cannot fill \d splits, because a group is never divided; name fewer"):
            assign_splits(samples, splits, seed)
        return
    found = assign_splits(samples, splits, seed)
    assert list(found) == list(splits) and all(found.values())
    assert sorted(int(sample.key) for held in found.values() for sample in held) == list(range(len(samples)))
    of_group: dict[object, str] = {}
    for name, held in found.items():
        assert [int(sample.key) for sample in held] == sorted(int(sample.key) for sample in held)
        assert len(held) <= splits[name] * len(samples) + max(sizes.values()), "one group too many at most"
        for sample in held:
            if sample.item.group is not None:
                assert of_group.setdefault(sample.item.group, name) == name
    assert found == assign_splits(samples, splits, seed)


def test_shares_of_many_groups_are_close() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), rng.integers(1, 40, 300)).tolist()
    found = assign_splits(some(groups), {"train": 0.8, "val": 0.1, "test": 0.1}, seed=0)
    shares = [len(found[name]) / len(groups) for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.001)
    other = assign_splits(some(groups), {"train": 0.8, "val": 0.1, "test": 0.1}, seed=1)
    assert found != other, "equal groups are in an order of the seed"


def test_splits_are_folders_of_their_own(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--groups", "folder", "--labels", "folder", "--samples-per-shard", 3]
    assert pack(photos, out, *options, "--split", "train=0.7", "val=.3") == 0
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    train, val = Index.open(out / "train"), Index.open(out / "val")
    assert len(train) + len(val) == 20 and 12 <= len(train) <= 16
    assert not set(train.group_names) & set(val.group_names)
    for folder in ("train", "val"):  # the numbers that other tools read mean the same in every split
        urls = [str(tar) for tar in sorted((out / folder).glob("*.tar"))]
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            assert sample["cls"] == "abcde".index(sample["json"]["label"])
    with pytest.raises(
        ValueError, match=r"out: no tar shards in this folder \(it holds train, val: name one of them\)"
    ):
        Index.open(out)
    whole = contents(out)
    assert pack(photos, out, *options, "--split", "train=0.7", "val=.3") == 0
    assert contents(out) == whole
    assert "no sample has a group" not in capsys.readouterr().err
    assert pack(photos, tmp_path / "alone", "--split", "train=0.7", "val=.3") == 0
    assert "no sample has a group: whoever is in several samples may be in several splits" in capsys.readouterr().err


def test_other_splits_or_none_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--groups", "folder"]
    pack(photos, out, *options, "--split", "train=0.7", "val=.3")
    whole = contents(out)
    assert "holds val, which is none of the splits test, train" in refused(
        capsys, photos, out, *options, "--split", "train=.7", "test=.3"
    )
    assert "holds files that ssl-pack did not write (train, ...)" in refused(capsys, photos, out, *options)
    assert "differs in items (other files, labels or groups" in refused(
        capsys, photos, out, *options, "--split", "train=0.4", "val=.6"
    )
    assert contents(out) == whole


def test_a_column_says_the_split(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("photos/a/0.png", "p", "one"), ("photos/a/1.png", "p", "one"), ("photos/b/2.png", "q", "two")]
    table = tmp_path / "table.csv"

    def write(rows: Sequence[tuple[str, str, str]]) -> None:
        table.write_text("path,group,split\n" + "".join(",".join(row) + "\n" for row in rows))

    write(rows)
    assert pack(table, tmp_path / "out", "--split", "column") == 0
    assert [len(Index.open(tmp_path / "out" / name)) for name in ("one", "two")] == [2, 1]
    write([*rows, ("photos/b/3.png", "p", "two")])
    message = refused(capsys, table, tmp_path / "bad", "--split", "column")
    assert "the group of the sample with the key " in message and "a group must be in one split" in message
    write([*rows, ("photos/b/3.png", "p", "")])
    assert "line 5: split is '', expected a name such as train" in refused(
        capsys, table, tmp_path / "bad", "--split", "column"
    )
    table.write_text("path\nphotos/a/0.png\n")
    assert "line 1: no column 'split', which --split column reads" in refused(
        capsys, table, tmp_path / "bad", "--split", "column"
    )
    assert "--split column: only with a table" in refused(capsys, photos, tmp_path / "bad", "--split", "column")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train"], "'train': expected name=share, such as train=0.8 val=0.1 test=0.1, or column"),
        (["train=0.8", "in", "out"], "'in': expected name=share"),
        (["train=0.8", "val=0.1"], "the shares add up to 0.9, expected 1"),
        (["train=1", "val=0"], "expected 1, each above 0"),
        (["a=.5", "a=.5"], "a is there twice"),
        (["../x=1"], "'../x=1': expected name=share"),
    ],
)
def test_splits_that_are_none(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_splits(texts)
    assert message in str(raised.value)


# -- sizes and room ----------------------------------------------------------------------------------------------------


def test_shards_of_equal_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files from 1 to 60 kB: each shard is as large as the others, give or take one file."""
    rng = np.random.default_rng(0)
    for number, width in enumerate(rng.integers(5, 140, 80).tolist()):
        save(tmp_path / "in" / f"{number}.png", number, width, width, 3)
    assert pack(tmp_path / "in", tmp_path / "out", "--shard-megabytes", 0.2) == 0
    sizes = [tar.stat().st_size for tar in (tmp_path / "out").glob("*.tar")]
    total = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    largest = max(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert len(sizes) == -(-(total + 80 * 2000) // 200_000)
    assert all(abs(size - np.mean(sizes)) < largest + 12_000 for size in sizes), "a tar is padded to 10 kB"
    counts = Index.open(tmp_path / "out").shard_counts
    assert sum(counts) == 80 and len(set(counts)) > 1
    pack(tmp_path / "in", tmp_path / "again", "--shard-megabytes", 0.2, "--workers", 2)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    message = refused(capsys, tmp_path / "in", tmp_path / "out", "--shard-megabytes", 0.3)
    assert "differs in cuts" in message and "shard_megabytes (0.2, now 0.3)" in message
    one = pack(tmp_path / "in", tmp_path / "tiny", "--shard-megabytes", 0.000001)
    assert one == 0 and Index.open(tmp_path / "tiny").shard_counts == [1] * 80


def test_sizes_of_tiles_are_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = save(tmp_path / "slide.png", 0, 64, 64, 3)
    message = refused(capsys, slide, tmp_path / "out", "--tile", 8, "--shard-megabytes", 1)
    assert "--shard-megabytes: the sizes of tiles and other parts of files are not known before" in message
    with pytest.raises(SystemExit):
        pack(slide, tmp_path / "out", "--samples-per-shard", 3, "--shard-megabytes", 1)


@pytest.mark.parametrize("what", ["files", "tiles"])
def test_room_is_estimated_and_must_be_there(
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    if what == "files":
        for number in range(30):
            save(tmp_path / "in" / f"{number}.png", number, 30 + number, 40, 3)
        command: list[object] = [tmp_path / "in", tmp_path / "out", "--samples-per-shard", 8]
    else:
        slide = save(tmp_path / "slide.png", 0, 200, 200, 3)
        command = [slide, tmp_path / "out", "--tile", 40, "--stride", 20, "--samples-per-shard", 30]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 20_000))
    message = refused(capsys, *command)
    assert (
        f"{tmp_path / 'out'}: about " in message and "20.0 kB free: make room, or go on with --ignore-room" in message
    )
    said = float(message.split("about ")[1].split(" kB")[0]) * 1000
    assert pack(*command, "--ignore-room") == 0
    real = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert said == pytest.approx(real, rel=0.15), "a tar is padded to 10 kB"
    capsys.readouterr()
    assert pack(*command) == 0 and "about" not in capsys.readouterr().err, "nothing is left to be made"


# -- what is said ------------------------------------------------------------------------------------------------------


def test_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = WorkProgress(1000, "packing")
    assert progress.rate() == ""
    progress.advance(500, 10**9, is_new=False)
    assert progress.rate() == "" and progress.done == 500, "what was there before tells nothing of the speed"
    now[0] += 10
    progress.advance(100, 5 * 10**7)
    assert progress.rate() == "10 samples/s, 5.0 MB/s, 40 s left"


def test_the_log_has_a_line_from_time_to_time(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ssl_platform.data import tar_writing

    load = tar_writing._load
    seen = fork.Event()

    class Watching(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " of 20 samples" in record.getMessage():
                seen.set()

    def slow(*arguments: object) -> object:
        assert seen.wait(30)
        return load(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tar_writing, "_load", slow)
    monkeypatch.setattr(work_progress, "LOG_SECONDS", 0.01)
    watching = Watching()
    work_progress.logger.addHandler(watching)
    try:
        assert pack(photos, tmp_path / "out") == 0
    finally:
        work_progress.logger.removeHandler(watching)
    assert "INFO packing: 0 of 20 samples" in capsys.readouterr().err


def test_settings_hold_no_name_of_the_input(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "pack.json").read_text())["settings"]
    assert settings.keys() == {
        "tile", "labels", "groups", "min_tissue", "samples_per_shard", "seed", "num_shards", "items", "names",
    }  # fmt: skip


def test_a_split_of_bad_files_takes_nothing_from_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["path,split"]
    for number, split in enumerate(["train", "bad", "train", "test", "bad"]):
        save(tmp_path / f"{number}.png", number)
        if split == "bad":
            (tmp_path / f"{number}.png").write_bytes(b"no image")
        rows.append(f"{number}.png,{split}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    out = tmp_path / "out"
    assert main([str(tmp_path / "table.csv"), str(out), "--split", "column"]) == 2
    message = capsys.readouterr().err
    assert f"{out / 'bad'}: nothing to pack: of 2 inputs 2 cannot be used (named above)" in message
    assert message.splitlines()[-1].startswith("packed: ") and str(out / "train") in message.splitlines()[-1]
    assert (len(Index.open(out / "train")), len(Index.open(out / "test"))) == (2, 1)
