"""The index: WebDataset's grouping rule, labels, byte ranges, and the errors of shards that are not what they were."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_platform.data.index import Index
from ssl_platform.data.index_rows import ROW, number
from ssl_platform.data.pack import main
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.tars import atomic_file, parse_record, scan_shard, split_name


def write_tar(path: Path, members: Mapping[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return path


def labelled_tar(path: Path, labels: list[object], **json_keys: object) -> Path:
    members = {}
    for sample, label in enumerate(labels):
        members[f"{path.stem}_{sample}.bin"] = bytes([sample])
        members[f"{path.stem}_{sample}.json"] = json.dumps({"label": label, **json_keys}).encode()
    return write_tar(path, members)


def records(index: Index) -> list[tuple[str, dict[str, bytes]]]:
    reader = ShardReader(index, cache_shards=2)
    return [tuple(reader.read(sample)) for sample in range(len(index))]  # type: ignore[misc]


# -- WebDataset's rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", ("a", "png")),
        ("a.seg.PNG", ("a", "seg.png")),
        ("x/y.z/a.b.c", ("x/y.z/a", "b.c")),
        ("./a.png", ("./a", "png")),
        ("noextension", None),
        ("x.y/noextension", None),
        (".hidden", None),
        ("x/._a.png", None),
        ("__meta__/a.json", None),
        ("__meta__", None),
    ],
)
def test_split_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


def test_foreign_tars_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    """Long names (GNU and PAX headers), folders, metadata, names without extension, same stem in other folders."""
    long = "long_" * 60
    for number_, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        members = {
            "__index__.json": b"{}",
            "readme": b"no sample's",
            "d/a.jpg": b"1" * 600,
            "d/a.seg.PNG": b"",
            "e/a.jpg": b"2" * 512,
            f"{long}é.jpg": b"3",
            "d/a.txt": b"not adjacent to the first d/a, so a sample of its own",
        }
        write_tar(tmp_path / f"{number_}.tar", members, format)
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        folder = tarfile.TarInfo("f")
        folder.type = tarfile.DIRTYPE
        for name in ("f/a.jpg", "f", "f/a.cls"):
            member = folder if name == "f" else tarfile.TarInfo(name)
            tar.addfile(member, io.BytesIO(b""))
    index = Index.open(tmp_path)
    urls = [str(shard) for shard in index.shards]
    expected = [
        (sample.pop("__key__"), {name: value for name, value in sample.items() if not name.startswith("__")})
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    assert records(index) == expected
    assert index.shard_of.tolist() == [0] * 5 + [1] * 5 + [2]
    assert index.shard_ranges.tolist() == [[0, 5], [5, 10], [10, 11]]


def test_shards_of_webdataset_shard_writer(tmp_path: Path) -> None:
    writer = webdataset.ShardWriter(str(tmp_path / "x-%03d.tar"), maxcount=4, verbose=0)
    for sample in range(10):
        writer.write({"__key__": f"{sample:03d}", "npy": np.full(3, sample), "cls": sample % 3})
    writer.close()
    index = Index.open(tmp_path)
    assert index.shard_counts == [4, 4, 2]
    assert index.labels.tolist() == [sample % 3 for sample in range(10)]
    assert index.label_names == [] and index.groups.tolist() == [-1] * 10
    assert [key for key, _ in records(index)] == [f"{sample:03d}" for sample in range(10)]
    assert index.statistics is None


# -- labels ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.integers(-1, 5), st.sampled_from(["a", "b", "c", "3"]))))
def test_numbers_stand_for_the_same_labels(values: list[int | str | None]) -> None:
    numbers, names = number(values)
    assert numbers.dtype == np.int64 and len(numbers) == len(values)
    assert names == sorted(set(names))
    for value, place in zip(values, numbers.tolist(), strict=True):
        if names:
            assert place == -1 if value is None else names[place] == str(value)
        else:
            assert place == (-1 if value is None else value)


def test_labels_and_groups_come_from_json_then_cls(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "0.cls": b"7\n", "0.json": b'{"label": "dog", "group": "p1"}',
            "1.json": b'{"label": "cat", "group": 5}', "1.cls": b"1",
            "2.cls": b"cat", "2.json": b"[1, 2]",
            "3.json": b"not json", "3.txt": b"",
            "4.json": b'{"label": true, "group": null}',
            "5.json": b'{"label": "", "group": 1.5}',
        },
    )  # fmt: skip
    index = Index.open(tmp_path / "a.tar")
    assert index.label_names == ["cat", "dog"] and index.labels.tolist() == [1, 0, 0, -1, -1, -1]
    assert index.group_names == ["5", "p1"] and index.groups.tolist() == [1, 0, -1, -1, -1, -1]
    assert [index[sample].label for sample in range(6)] == index.labels.tolist()


def test_several_folders_agree_on_names(tmp_path: Path) -> None:
    labelled_tar(tmp_path / "a" / "a.tar", ["cat", "eel", None])
    labelled_tar(tmp_path / "b" / "b.tar", ["dog", "cat"], group="p")
    write_tar(tmp_path / "c" / "c.tar", {"0.bin": b""})
    index = Index.open([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert index.label_names == ["cat", "dog", "eel"] and index.group_names == ["p"]
    assert index.labels.tolist() == [0, 2, -1, 1, 0, -1] == [index[sample].label for sample in range(6)]
    assert index.groups.tolist() == [-1, -1, -1, 0, 0, -1]
    assert [index[sample].shard for sample in range(6)] == index.shard_of.tolist() == [0, 0, 0, 1, 1, 2]
    assert [key for key, _ in records(index)] == ["a_0", "a_1", "a_2", "b_0", "b_1", "0"]


def test_numbered_and_named_labels_do_not_mix(tmp_path: Path) -> None:
    labelled_tar(tmp_path / "a" / "a.tar", ["cat"])
    labelled_tar(tmp_path / "b" / "b.tar", [3])
    with pytest.raises(ValueError, match=r"/b: its labels are numbers, other shards name theirs"):
        Index.open([tmp_path / "a", tmp_path / "b"])


# -- columns -----------------------------------------------------------------------------------------------------------


def tar_of(path: Path, samples: list[Any]) -> Path:
    """A tar whose samples have these `json` members."""
    return write_tar(path, {f"{path.stem}_{i}.json": json.dumps(about).encode() for i, about in enumerate(samples)})


def values(index: Index, name: str) -> list[int | str | None]:
    codes, names = index.column(name)
    assert codes.dtype == np.int64 and len(codes) == len(index) and names == sorted(set(names))
    return [None if code < 0 else names[code] if names else code for code in codes.tolist()]


def test_columns_are_the_scalar_keys_of_the_samples(tmp_path: Path) -> None:
    tar_of(
        tmp_path / "a.tar",
        [
            {"label": "x", "path": "p/q.png", "site": "B", "magnification": 20, "mpp": 0.5, "scanned": True, "t": -3},
            {"site": "A", "magnification": 40.0, "mpp": 0.25, "more": [1], "table": {"site": "C"}, "site2": ""},
            [1, 2],
            {"site": "B", "mpp": 1.0, "magnification": None, "scanned": False, "t": 4, "caption": "x" * 300},
            {"site": 7, "mpp": float("nan"), "label": 3, "t": 2**70},
        ],
    )
    tar_of(tmp_path / "b.tar", [{"magnification": 300, "start": 5}])
    for _ in range(2):  # scanned, and read from the files
        index = Index.open(tmp_path)
        assert index.columns == ["label", "group", "magnification", "mpp", "scanned", "site", "start", "t"]
        assert values(index, "site") == ["B", "A", None, "B", "7", None]
        assert values(index, "magnification") == [20, 40, None, None, None, 300]
        assert values(index, "mpp") == ["0.5", "0.25", None, "1", None, None]
        assert values(index, "scanned") == ["true", None, None, "false", None, None]
        assert values(index, "t") == ["-3", None, None, "4", str(2**70), None]
        assert values(index, "start") == [None] * 5 + [5]
        assert values(index, "label") == ["x", None, None, None, "3", None]
    part = index._parts[0][0]
    assert not part.rows.flags.owndata, "mapped, not read"
    types = {name: part.rows.dtype[f"column{place}"].itemsize for place, name in enumerate(part.columns)}
    assert types == {"magnification": 2, "mpp": 1, "scanned": 1, "site": 1, "start": 1, "t": 1}
    with pytest.raises(ValueError) as raised:
        index.column("sites")
    assert str(raised.value) == (
        "no column 'sites'; there are label, group, magnification, mpp, scanned, site, start, t"
    )


scalars = st.one_of(st.none(), st.integers(-2, 300), st.sampled_from(["a", "b", "7"]))


@settings(max_examples=40)
@given(st.lists(st.lists(scalars, max_size=4), min_size=1, max_size=3), st.lists(scalars, min_size=1, max_size=4))
def test_columns_of_folders_joined_are_the_columns_of_each(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[Any]], other: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("columns")
    for number_, column in enumerate(shards):
        tar_of(folder / "a" / f"{number_}.tar", [{"x": value} for value in column])
    tar_of(folder / "b" / "0.tar", [{"x": value} for value in other])
    tar_of(folder / "c" / "0.tar", [{"label": "y"}, {}])
    index = Index.open([folder / "a", folder / "b", folder / "c"])
    if "x" not in index.columns:
        assert not any(value is not None for column in [*shards, other] for value in column)
        return
    expected = [value for column in [*shards, other, [None, None]] for value in column]
    found = values(index, "x")
    if all(value is None or isinstance(value, int) for value in found):
        assert found == expected
    else:
        assert found == [None if value is None else str(value) for value in expected]


def test_a_column_that_grows_with_the_folder(tmp_path: Path) -> None:
    tar_of(tmp_path / "b.tar", [{"site": "B"}, {"site": "C"}, {}])
    assert values(Index.open(tmp_path), "site") == ["B", "C", None]
    tar_of(tmp_path / "a.tar", [{"site": "A", "magnification": 5}])
    index = Index.open(tmp_path)
    assert values(index, "site") == ["A", "B", "C", None] and values(index, "magnification") == [5, None, None, None]


def test_texts_that_always_differ_are_no_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_platform.data.index_rows.MAX_NAMES", 2)
    monkeypatch.setattr("ssl_platform.data.index_rows.MAX_COLUMNS", 2)
    tar_of(tmp_path / "a.tar", [{"file": f"f{i}", "a": i % 2, "b": i, "c": "x"} for i in range(3)])
    for _ in range(2):
        index = Index.open(tmp_path)
        assert index.columns == ["label", "group", "a", "b"] and values(index, "b") == [0, 1, 2]
        with pytest.raises(
            ValueError, match="no column 'file' in the index: it has too many different values .*; there"
        ):
            index.column("file")
    tar_of(tmp_path / "b.tar", [{"file": "f"}])
    assert Index.open(tmp_path).columns == ["label", "group", "a", "b"], "what was left out stays out"


def make_old(folder: Path) -> None:
    """The folder's index as it was before it had columns."""
    about = json.loads((folder / "index.json").read_text())
    del about["columns"], about["columns_left_out"]
    (folder / "index.json").write_text(json.dumps(about | {"format": 1}))
    rows = np.load(folder / "index.npy")
    np.save(folder / "index.npy", np.array([tuple(row)[:5] for row in rows], dtype=ROW))


def test_an_index_from_before_columns_is_read_and_says_so(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [{"site": "A", "label": 1}])
    Index.open(tmp_path)
    make_old(tmp_path)
    index = Index.open(tmp_path)
    assert index.labels.tolist() == [1] and index.columns == ["label", "group"]
    with pytest.raises(ValueError) as raised:
        index.column("site")
    assert str(raised.value) == (
        f"no column 'site'; there are label, group. The index of {tmp_path} is older than further columns: give its "
        f"ssl-pack command again, or `ssl-pack --index {tmp_path}` for tars made elsewhere; the tars stay as they are"
    )
    assert main(["--index", str(tmp_path)]) == 0
    assert values(Index.open(tmp_path), "site") == ["A"]

    make_old(tmp_path)
    tar_of(tmp_path / "b.tar", [{"site": "B"}])
    assert values(Index.open(tmp_path), "site") == ["A", "B"], "the old shards are scanned again, to have columns too"


def test_damaged_columns(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [{"site": "A"}, {"site": "B"}])
    Index.open(tmp_path)
    good = json.loads((tmp_path / "index.json").read_text())
    for columns, what in (
        ([], "columns: Input should be a valid dictionary"),
        ({"site": 3}, "columns.site: Input should be a valid dictionary"),
        ({"site": {"type": "O", "names": []}}, "columns.site.type: Input should be '|i1', '<i2', '<i4' or '<i8'"),
        ({"site": {"type": "|i1", "names": [1]}}, "columns.site.names.0: Input should be a valid string"),
    ):
        (tmp_path / "index.json").write_text(json.dumps(good | {"columns": columns}))
        with pytest.raises(ValueError) as raised:
            Index.open(tmp_path)
        path = tmp_path / "index.json"
        assert str(raised.value) == f"{path}: {what}; delete it and index.npy, or pack again"
    (tmp_path / "index.json").write_text(json.dumps(good | {"columns": {}}))
    with pytest.raises(ValueError, match=r"index\.npy: does not belong to the index\.json beside it"):
        Index.open(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(good | {"columns": {"site": {"type": "|i1", "names": ["A"]}}}))
    with pytest.raises(ValueError, match=r"index\.npy: damaged, a value of column 'site' is out of range"):
        Index.open(tmp_path).column("site")


def test_columns_of_a_manifest_are_packed(tmp_path: Path) -> None:
    for number_ in range(4):
        Image.new("L", (4, 4), number_).save(tmp_path / f"{number_}.png")
    rows = ["path,site,magnification", "0.png,A,20", "1.png,B,20", "2.png,,40", "3.png,A,5"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    for extra in ([], [], ["--overwrite"]):  # the second time finished shards are kept, and an old index is made anew
        options = ["--samples-per-shard", "3", "--keep-columns", "site,magnification", *extra]
        assert main([str(tmp_path / "table.csv"), str(tmp_path / "out"), *options]) == 0
        index = Index.open(tmp_path / "out")
        reader = ShardReader(index, cache_shards=1)
        abouts = [json.loads(reader.read(sample).members["json"]) for sample in range(4)]
        for name in ("site", "magnification"):
            assert values(index, name) == [about[name] or None for about in abouts]
        make_old(tmp_path / "out")
        with pytest.raises(ValueError, match="no column 'site'; there are label, group. The index of"):
            Index.open(tmp_path / "out").column("site")


# -- what can be opened ------------------------------------------------------------------------------------------------


def test_a_tar_a_pattern_and_the_whole_folder(tmp_path: Path) -> None:
    for shard in range(5):
        labelled_tar(tmp_path / f"s{shard}.tar", ["ab"[shard % 2]] * (shard + 1))
    whole = Index.open(tmp_path)
    assert whole.shard_counts == [1, 2, 3, 4, 5]
    part = Index.open(tmp_path / "s[134].tar")
    assert [shard.name for shard in part.shards] == ["s1.tar", "s3.tar", "s4.tar"]
    assert part.shard_of.tolist() == [0] * 2 + [1] * 4 + [2] * 5 == [part[sample].shard for sample in range(11)]
    assert records(part) == records(whole)[1:3] + records(whole)[6:]
    assert part.labels.tolist() == whole.labels.tolist()[1:3] + whole.labels.tolist()[6:]
    assert records(Index.open([tmp_path / "s4.tar", tmp_path / "s1.tar"])) == records(whole)[10:] + records(whole)[1:3]


def test_the_scan_is_kept_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []

    def counting_scan(path: Path) -> object:
        scanned.append(path.name)
        return scan_shard(path)

    monkeypatch.setattr("ssl_platform.data.index_files.scan_shard", counting_scan)
    labelled_tar(tmp_path / "b.tar", ["x", "y"])
    labelled_tar(tmp_path / "c.tar", ["y"])
    assert Index.open(tmp_path / "b.tar").labels.tolist() == [0, 1]
    assert Index.open(tmp_path).labels.tolist() == [0, 1, 1]
    assert Index.open(tmp_path).labels.tolist() == [0, 1, 1]
    labelled_tar(tmp_path / "a.tar", ["a"])
    grown = Index.open(tmp_path)
    assert scanned == ["b.tar", "c.tar", "a.tar"]
    assert grown.label_names == ["a", "x", "y"] and grown.labels.tolist() == [0, 1, 2, 2]
    rows = Index.open(tmp_path)._parts[0][0].rows
    assert not rows.flags.owndata and not rows.flags.writeable, "mapped, not read"


def test_a_folder_that_cannot_be_written_is_scanned_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ssl_platform.data.index_files.write_index", refuse)
    labelled_tar(tmp_path / "a.tar", ["x"])
    with caplog.at_level("WARNING"):
        assert len(Index.open(tmp_path)) == 1
    assert "the index cannot be kept (Permission denied)" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_nothing_to_open(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none" / "a.tar", {})
    for path, message in [
        (tmp_path / "missing", "no such file or folder; expected a folder of tars, a tar, or a pattern"),
        (tmp_path / "*.tar", "no tar and no folder matches this pattern"),
        (tmp_path / "empty", "no tar shards in this folder"),
        (tmp_path / "none", "there is no sample in it"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            Index.open(path)
        assert str(path) in str(raised.value)
    with pytest.raises(ValueError, match="the list of shards: there is no sample in it"):
        Index.open([])


def test_a_shard_given_twice(tmp_path: Path) -> None:
    tar = labelled_tar(tmp_path / "a.tar", ["x"])
    with pytest.raises(ValueError, match=r"a\.tar: this shard is given twice"):
        Index.open([tmp_path, tar])


@pytest.mark.parametrize("cut", [1700, 1024 + 5, 1024 + 700])
def test_truncated_tars_are_found(tmp_path: Path, cut: int) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.bin": b"x" * 500, "1.bin": b"y" * 900})
    os.truncate(tar, cut)
    with pytest.raises(ValueError, match=r"a\.tar: (unexpected end of data|damaged at byte 1024)"):
        Index.open(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_a_tar_without_its_end_mark_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = write_tar(tmp_path / "a.tar", {"0.bin": b"x" * 500})
    os.truncate(tar, 1024)
    assert len(Index.open(tmp_path)) == 1
    assert "the end-of-archive mark is missing" in caplog.text


def test_other_files_that_are_no_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"this is no tar at all" * 100)
    with pytest.raises(ValueError, match=r"a\.tar: "):
        Index.open(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.bin"), io.BytesIO())
    with pytest.raises(ValueError, match=r"a\.tar: a compressed tar has no byte ranges .*; decompress it"):
        Index.open(tmp_path)
    write_tar(tmp_path / "a.tar", {"0.bin": b""})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("0.bin"), io.BytesIO())
    with pytest.raises(ValueError, match=r"two members '0\.bin' in a row"):
        Index.open(tmp_path)


def test_a_tar_that_was_written_again_is_scanned_again(tmp_path: Path) -> None:
    tar = labelled_tar(tmp_path / "a.tar", ["x", "y"])
    labelled_tar(tmp_path / "b.tar", ["y"])
    size = tar.stat().st_size
    assert Index.open(tmp_path).labels.tolist() == [0, 1, 1]
    labelled_tar(tar, ["y", "x"])
    assert tar.stat().st_size == size  # tars are padded, so this alone would not tell
    assert Index.open(tar).labels.tolist() == [1, 0]
    assert Index.open(tmp_path).labels.tolist() == [1, 0, 1]
    os.truncate(tar, 700)
    with pytest.raises(ValueError, match=r"a\.tar: "):
        Index.open(tmp_path)
    assert len(Index.open(tmp_path / "b.tar")) == 1
    tar.unlink()
    with pytest.raises(ValueError, match=r"a\.tar: no such file"):
        Index.open(tar)
    assert len(Index.open(tmp_path)) == 1


def test_a_tar_that_was_put_into_a_packed_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labelled_tar(tmp_path / "a.tar", ["x"])
    Index.open(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"scanned": False}))  # as ssl-pack leaves it
    labelled_tar(tmp_path / "b.tar", ["x"])
    assert len(Index.open(tmp_path)) == 1
    assert "b.tar not in its index.json and not read" in caplog.text


def test_damaged_index_files(tmp_path: Path) -> None:
    labelled_tar(tmp_path / "a.tar", ["x"])
    Index.open(tmp_path)
    good = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(good[:50])
    with pytest.raises(ValueError, match=r"index\.json: cannot be read .*delete it and index\.npy"):
        Index.open(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"index\.json: expected format 2, found 99"):
        Index.open(tmp_path)
    (tmp_path / "index.json").write_text(good)
    os.truncate(tmp_path / "index.npy", 100)
    with pytest.raises(ValueError, match=r"index\.npy: cannot be read"):
        Index.open(tmp_path)
    np.save(tmp_path / "index.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"index\.npy: does not belong to the index\.json beside it"):
        Index.open(tmp_path)


def test_parse_record_refuses_what_is_not_one_sample(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", {"0.bin": b"x" * 500, "0.cls": b"1", "1.bin": b"y" * 900}).read_bytes()
    assert parse_record(data[:2048]) == ("0", {"bin": b"x" * 500, "cls": b"1"})
    for wrong, message in [
        (data, "expected the members of one sample, found '0' and '1'"),
        (data[:100], "truncated header"),
        (data[512:2048], "invalid header"),
        (data[:1024] + b"?" * 512, "damaged at byte 1024"),
        (b"\0" * 1024, "no tar members here"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_record(wrong)


def test_atomic_file_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_an_index_moves_with_its_folder(tmp_path: Path) -> None:
    labelled_tar(tmp_path / "a" / "a.tar", ["x", "y"])
    before = records(Index.open(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert records(Index.open(tmp_path / "b")) == before
