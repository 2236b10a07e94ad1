"""Nothing in shards, index, plans, logs or runs tells a name; who has the look-up folder can tell them all."""

import csv
import json
import logging
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_platform.data.identity import PLAIN, Names, lookup_folder, numbered, own_salt, salted
from ssl_platform.data.index import Index
from ssl_platform.data.items import Item
from ssl_platform.data.pack import main
from ssl_platform.data.reading import ShardReader
from ssl_platform.train import main as train
from tests import test_image_metadata as files
from tests.clips import frames

ROOT = Path(__file__).parents[1]
NAMES = [
    "Abendroth", "Birnbaumer", "Jürgen Lüdenscheidt", "王小明", "Ωμέγα", "Quastenflosser" * 12, files.NAME,
    "Clinicwest", "Doktorvater", "Elbefeldt", "Zweitname",
]  # fmt: skip


def save(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Images of every kind, whose folders, names, tags and comments are people's; two of them damaged."""
    top = tmp_path / NAMES[7]
    for place, (data, extension) in enumerate(files.FILES.values()):
        if not extension.startswith("tif"):
            save(top / NAMES[place % 3] / f"{NAMES[3 + place % 3]}_{place}.{extension}", data)
    for place in range(6):
        pixels = np.random.default_rng(place).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        save(top / NAMES[0] / f"{NAMES[1]} {place}.tif", files.tiff(pixels))
        save(top / NAMES[1] / f"{NAMES[2]} {place}.dcm", files.dicom(pixels, PatientID=NAMES[place % 2]))
    save(top / NAMES[2] / f"{NAMES[1]} broken.png", f"{NAMES[0]} wrote this".encode())
    save(top / NAMES[2] / f"{NAMES[1]} broken.jpg", files.jpeg(6)[:400])
    return top


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, every member of tars, and whatever in them zlib has compressed."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        yield f"{path} (its name)", str(path.relative_to(folder)).encode(errors="surrogateescape")
        data = path.read_bytes()
        yield str(path), data
        parts = [(str(path), data)]
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                parts = [(f"{path}: {member.name}", tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        for name, part in parts:
            for found in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", part):
                inflater = zlib.decompressobj()
                try:
                    yield f"{name}, inflated from {found.start()}", inflater.decompress(part[found.start() :])
                except zlib.error:
                    continue


def names_in(data: bytes) -> list[str]:
    """Whole or in words, as UTF-8, UTF-16, JSON escapes, upper or lower case."""
    words = {word for name in NAMES for word in [name, *name.split(), name[:14]] if len(word) > 2}
    forms = {
        form: word
        for word in words
        for text in (word, word.lower(), word.upper())
        for form in (
            text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be"), json.dumps(text)[1:-1].encode(),
            text.encode("latin-1", errors="replace"),
        )
        if form.strip(b"?") == form
    }  # fmt: skip
    return [word for form, word in forms.items() if form in data]


def assert_no_name(folder: Path) -> int:
    looked_at = 0
    for place, data in written(folder):
        assert names_in(data) == [], place
        looked_at += 1
    return looked_at


def pack(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_search_finds_what_it_looks_for(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", "--plain-names", "--labels", "folder")
    found = {word for _, data in written(tmp_path / "out") for word in names_in(data)}
    assert {"Abendroth", "Birnbaumer", "Lüdenscheidt", "王小明", "Ωμέγα", files.NAME} <= found


def test_no_name_is_in_what_is_packed_nor_in_a_run_over_it(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "shards"
    assert pack(tree, out, "--workers", 2, "--samples-per-shard", 8, "--groups", "folder") == 1
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2 and f"{NAMES[2]}/{NAMES[1]} broken.png" in said, "who packs is told the path"
    names = {path.name for path in out.iterdir()}
    assert names == {"index.json", "index.npy", "pack.json", "left_out.tsv", *(path.name for path in out.glob("*.tar"))}
    assert assert_no_name(out) > 30, "files, and what is compressed in them"
    _spoil_a_sample(out)
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    config = ["steps=8", "save_every=8", f"data.shards={out}", f"run_dir={run}", "modality.channels=3"]
    assert train([str(ROOT / "configs" / "smoke" / "image.yaml"), *config]) == 0
    events = (run / "events.jsonl").read_text()
    assert "replaced" in events and re.search(r"shard-\d+\.tar: [0-9a-f]{20}: ", events)
    assert assert_no_name(run) > 5
    said = capsys.readouterr()
    assert "8 samples" not in said.out and names_in((said.err + said.out + caplog.text).encode()) == []


def _spoil_a_sample(out: Path) -> None:
    """Every second image of a shard becomes one that cannot be decoded, at the same place."""
    shard = out / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        images = [member for member in tar if not member.name.endswith((".json", ".cls"))]
    for member in images[::2]:
        data[member.offset_data : member.offset_data + 8] = b"\0" * 8
    shard.write_bytes(data)


def test_no_name_is_in_an_unfinished_pack(tree: Path, tmp_path: Path) -> None:
    """The plan and the account of one part of two."""
    assert pack(tree, tmp_path / "out", "--part", "0/2", "--samples-per-shard", 8, "--allow-bad") == 0
    assert {"pack.json", "part-00000-of-00002.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert_no_name(tmp_path / "out")


def _clip(path: Path) -> None:
    """Names in the container's and the stream's tags, and among the pictures."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update(title=NAMES[0], comment=NAMES[1], artist=NAMES[2])
        stream = container.add_stream("mjpeg" if path.suffix == ".avi" else "mpeg4", rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if path.suffix == ".avi" else "yuv420p"
        stream.metadata["title"] = NAMES[7]
        for picture in frames(3):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(_with_comment(packet, path.suffix))
        container.mux(stream.encode())


def _with_comment(packet: Any, extension: str) -> Any:
    import av

    data, name = bytes(packet), NAMES[8].encode()
    if extension == ".avi":
        data = data[:2] + b"\xff\xfe" + (len(name) + 2).to_bytes(2, "big") + name + data[2:]
    else:
        data = b"\0\0\1\xb2" + name + data
    texted = av.Packet(data)
    for name in ("pts", "dts", "time_base", "duration", "is_keyframe", "stream"):
        setattr(texted, name, getattr(packet, name))
    return texted


def _recording(path: Path) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(path, "w", 16000, 1, format=path.suffix[1:].upper()) as file:
        file.title, file.artist, file.comment = NAMES[0], NAMES[1], NAMES[7]
        file.write(np.random.default_rng(0).normal(0, 0.1, 16000))


def _shapes(folder: Path) -> None:
    """A mesh and clouds with names in comments, in names of objects and materials."""
    square = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n"
    ply = f"ply\nformat ascii 1.0\ncomment {NAMES[0]}\nelement vertex 4\n"
    ply += "property float x\nproperty float y\nproperty float z\nend_header\n"
    vertices = "".join(f"v {line}\n" for line in square.splitlines())
    for name, text in {
        "off": f"OFF\n# {NAMES[0]}\n4 1 0\n{square}4 0 1 2 3\n",
        "obj": f"# {NAMES[1]}\nmtllib {NAMES[7]}.mtl\no {NAMES[7]}\n{vertices}f 1 2 3\n",
        "ply": ply + square,
        "xyz": f"# {NAMES[8]}\n{square}",
        "stl": f"solid {NAMES[9]}\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 1 1 0\nendloop\n"
        f"endfacet\nendsolid {NAMES[9]}\n",
    }.items():
        save(folder / NAMES[0] / f"{NAMES[1]}.{name}", text.encode())


@pytest.mark.parametrize("medium", ["audio", "points", "video"])
def test_no_name_is_in_other_media_nor_in_what_commands_write_of_them(medium: str, tmp_path: Path) -> None:
    top = tmp_path / NAMES[7]
    if medium == "points":
        _shapes(top)
    for extension in {"audio": ("wav", "flac", "ogg", "mp3", "aiff"), "video": ("avi", "mp4", "mkv")}.get(medium, ()):
        (_recording if medium == "audio" else _clip)(top / NAMES[0] / f"{NAMES[1]}.{extension}")
    bad = {"audio": "flac", "points": "ply", "video": "mp4"}[medium]
    save(top / NAMES[1] / f"{NAMES[2]}.{bad}", NAMES[0].encode())
    out, made = tmp_path / "shards", tmp_path / "made"
    made.mkdir()
    assert pack(top, out, "--groups", "folder", "--allow-bad") == 0
    assert any(names_in(file.read_bytes()) for file in top.rglob("*.*")), "the files do name people"
    assert pack("verify", out, "--json", made / "verify.json") == 0
    assert pack("inspect", out, "--out", made / "report") == 0
    assert pack("prune", out, made / "pruned", "--keep", "0.7") == 0
    assert pack("merge", out, made / "pruned", made / "merged", "--allow-duplicate-keys") == 0
    assert assert_no_name(out) > 5 and assert_no_name(made) > 10


def test_a_table_keeps_the_columns_that_are_named(tree: Path, tmp_path: Path) -> None:
    paths = [path for path in sorted(tree.rglob("*.*")) if "broken" not in path.name]
    table = tmp_path / f"{NAMES[9]}.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "group", "site", NAMES[10], "scanner"])
        for place, path in enumerate(paths):
            rows.writerow([path, "ab"[place % 2], NAMES[place % 5], f"site {place % 3}", NAMES[8], "x"])
    assert pack(table, tmp_path / "out", "--keep-columns", "site, scanner") == 0
    assert_no_name(tmp_path / "out")
    index = Index.open(tmp_path / "out")
    assert index.label_names == ["a", "b"] and len(index.group_names) == 5
    assert all(re.fullmatch(r"[0-9a-f]{20}", name) for name in index.group_names)
    for about in samples(tmp_path / "out").values():
        kept = {"site", "scanner", "label", "group"}
        assert kept <= about.keys() and not {"path", NAMES[10]} & about.keys()


def test_tiles_and_their_blocks_have_no_name(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    slide = save(tmp_path / f"{NAMES[0]}.tif", files.tiff(pixels))
    assert pack(slide, tmp_path / "out", "--tile", 16) == 0
    assert_no_name(tmp_path / "out")
    assert {(about["x"], about["y"]) for about in samples(tmp_path / "out").values()} == {
        (x, y) for x in range(0, 64, 16) for y in range(0, 64, 16)
    }


def samples(folder: Path) -> dict[str, dict[str, object]]:
    reader = ShardReader(Index.open(folder), cache_shards=4)
    records = [reader.read(sample) for sample in range(len(reader.index))]
    return {key: json.loads(members["json"]) for key, members in records}


# -- the look-up folder ------------------------------------------------------------------------------------------------


def test_the_table_tells_what_the_shards_do_not(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert pack(tree, out, "--allow-bad") == 0
    folder = tmp_path / "out.lookup"
    assert lookup_folder(out) == lookup_folder(tmp_path / "x" / ".." / "out") == folder
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "salt": 0o600, "lookup.csv": 0o600,
    }  # fmt: skip
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len((folder / "salt").read_bytes()) == 32
    with (folder / "lookup.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    packed = samples(out)
    left_out = dict(line.split("\t") for line in (out / "left_out.tsv").read_text().splitlines()[1:])
    assert rows.keys() == packed.keys() | left_out.keys() and set(left_out.values()) == {"unusable"}
    for key, row in rows.items():
        assert (tree / row["path"]).is_file()
        assert key in left_out or packed[key]["group"] == (row["group"] or None)
        if row["path"].endswith(".dcm"):
            assert row["group_name"] in NAMES[:2] and row["group"], "a DICOM file's group is its PatientID"
    groups = {row["group"]: row["group_name"] for row in rows.values() if row["group"]}
    assert len(set(groups.values())) == len(groups) == 2


@pytest.mark.usefixtures("new_salts")
def test_a_salt_that_is_shared_gives_the_same_names(tree: Path, tmp_path: Path) -> None:
    """A person in two data sets has one group; with salts of their own nobody can tell."""
    salt = save(tmp_path / "salt", os.urandom(32))
    salt.chmod(0o600)
    for name, more in [("a", ["--salt-file", salt]), ("b", ["--salt-file", salt]), ("c", []), ("d", [])]:
        pack(tree, tmp_path / name, *more, "--allow-bad")
    bytes_of = {name: [(p.name, p.read_bytes()) for p in sorted((tmp_path / name).iterdir())] for name in "abcd"}
    assert bytes_of["a"] == bytes_of["b"]
    keys = {name: set(samples(tmp_path / name)) for name in "acd"}
    assert not keys["a"] & keys["c"] and not keys["c"] & keys["d"]
    pack(tree, tmp_path / "d", "--allow-bad", "--overwrite")
    assert bytes_of["d"] == [(p.name, p.read_bytes()) for p in sorted((tmp_path / "d").iterdir())], "the salt stays"


def test_several_that_begin_at_once_have_one_salt(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(own_salt, [tmp_path / "out"] * 64))) == 1
    assert [path.name for path in (tmp_path / "out.lookup").iterdir()] == ["salt"]


def test_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)  # noqa: PTH102 (a Path takes no bytes)
    try:
        with open(folder + b"/\xff\xfe.png", "wb") as file:  # noqa: PTH123
            file.write(files.png(1))
    except OSError:
        pytest.skip("this file system has no such names")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert b"\xff\xfe.png" in (tmp_path / "out.lookup" / "lookup.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--salt-file", "missing"],
            "missing: No such file or directory; make a salt with `head -c 32 /dev/urandom > ",
        ),
        (["--salt-file", "short"], "short: 3 bytes, but a salt has 32 random ones"),
        (["--salt-file", "out/salt"], "--salt-file out/salt: is in out, and would travel with the shards"),
        (["--plain-names", "--salt-file", "salt"], "--plain-names: nothing is hidden"),
        (["--keep-columns", "site"], "--keep-columns site: no such column; there are none"),
        (["--keep-columns", "path"], "--keep-columns path: a path is never kept in shards"),
    ],
)
def test_options_that_are_refused(
    arguments: Sequence[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in" / "a.png", files.png(1))
    save(tmp_path / "short", b"abc")
    save(tmp_path / "salt", b"x" * 32)
    assert pack("in", "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("new_salts")
def test_another_salt_is_another_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "a.png", files.png(1))
    pack(tmp_path / "in", tmp_path / "out")
    for path in (tmp_path / "out.lookup").iterdir():
        path.unlink()
    assert pack(tmp_path / "in", tmp_path / "out") == 2
    assert "holds shards of another plan, which differs in items (other files" in capsys.readouterr().err


# -- properties --------------------------------------------------------------------------------------------------------

texts = st.text(max_size=30)
items = st.lists(
    st.builds(
        Item,
        path=st.just(Path("x")),
        name=texts,
        label=st.none() | st.sampled_from(["a", "b"]),
        group=st.none() | texts.filter(bool) | st.integers(0, 99),
        columns=texts.map(lambda text: (("secret", text), ("site", "north"))),
        corner=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    ),
    max_size=12,
)


@given(items, st.binary(min_size=32, max_size=32), st.randoms(use_true_random=False))
def test_keys_are_hashes_that_depend_on_nothing_else(given_items: list[Item], salt: bytes, random: object) -> None:
    names = Names(salt)
    keep = ["site"] if given_items else []
    samples = numbered(given_items, names, keep)
    assert len({sample.key for sample in samples}) == len(given_items)
    assert [sample.key for sample in samples] == sorted(sample.key for sample in samples)
    for sample in samples:
        assert re.fullmatch(r"[0-9a-f]{20}", sample.key) and sample.item.columns == (("site", "north"),)
        assert sample.item.group is None or re.fullmatch(r"[0-9a-f]{20}", str(sample.item.group))
    shuffled = sorted(given_items, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert {sample.key for sample in numbered(shuffled, names, keep)} == {sample.key for sample in samples}
    fewer = numbered(given_items[:-1], names, keep) if len(given_items) > 1 else []
    assert {sample.key for sample in fewer} <= {sample.key for sample in samples}
    other = {sample.key for sample in numbered(given_items, Names(salt[::-1] + b"1"), keep)}
    assert not other & {sample.key for sample in samples}
    groups = {str(item.group) for item in given_items if item.group is not None}
    assert len({sample.item.group for sample in samples if sample.item.group is not None}) == len(groups)


def test_plain_names_are_in_the_order_of_the_input() -> None:
    given_items = [Item(Path("x"), f"{name}.png", group=name) for name in "cab"]
    assert [sample.key for sample in numbered(given_items, PLAIN, [])] == ["000000_c", "000001_a", "000002_b"]
    hidden = numbered(given_items, Names(b"s" * 32), [])
    assert {sample.item.name for sample in hidden} == {"a.png", "b.png", "c.png"}


def test_a_salt_of_any_length_is_a_key(tmp_path: Path) -> None:
    assert salted(save(tmp_path / "salt", b"x" * 1000)).salt != salted(save(tmp_path / "salt", b"x" * 1001)).salt
