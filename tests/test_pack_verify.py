"""ssl-pack verify: silent about what is well, and each kind of damage named by shard, key and reason."""

import gzip
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_platform.data.commands._checks import check
from ssl_platform.data.index import Index
from ssl_platform.data.index_rows import ROW
from tests.packed import image_bytes, pattern, sample, ssl_pack, write_tar

Found = list[tuple[str, str, str]]
SHARD = "shard-000001.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of three labels in 3 shards, from a table with groups."""
    folder = tmp_path_factory.mktemp("packed")
    rows = ["path,label,group"]
    for number in range(24):
        (folder / f"{number:02d}.png").write_bytes(image_bytes(pattern(number)))
        rows.append(f"{number:02d}.png,{['cat', 'dog', ''][number % 3]},p{number % 4}")
    (folder / "table.csv").write_text("\n".join(rows))
    assert ssl_pack(folder / "table.csv", folder / "shards", "--samples-per-shard", 8) == 0
    return folder / "shards"


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def verify(*arguments: object, status: int = 1) -> tuple[Found, dict[str, Any]]:
    """What is found wrong, and the whole JSON."""
    file = Path(str(arguments[0])).parent / "problems.json"
    assert ssl_pack("verify", *arguments, "--json", file) == status
    about = json.loads(file.read_text())
    return [(problem["shard"], problem["key"], problem["reason"]) for problem in about["problems"]], about


def test_nothing_wrong(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(shards, status=0)[1] == {"shards": 3, "samples": 24, "decoded": 24, "problems": []}
    assert "24 samples in 3 shards, 24 decoded: nothing wrong" in capsys.readouterr().out
    assert verify(shards, "--quick", "--workers", 2, status=0)[1]["decoded"] == 0
    assert verify(shards / "shard-000001.tar", status=0)[1]["samples"] == 8
    assert verify(str(shards / "shard-00000[01].tar"), status=0)[1]["samples"] == 16


def test_it_writes_no_index(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/a.tar", [("x", sample(0)), ("y", sample(1))])
    assert verify(tmp_path / "tars", status=0)[1]["samples"] == 2
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["a.tar"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_survived_and_headers_are_checked(data: st.DataObject, packed: Path) -> None:
    """One byte of a shard or of the index becomes another; in a header (its checksum apart) that never goes unseen."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(shutil.copytree(packed, Path(folder) / "shards"))
        file = shards / data.draw(st.sampled_from([SHARD, "index.json", "index.npy"]))
        contents = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(contents) - 1))
        contents[place] ^= data.draw(st.integers(1, 255))
        file.write_bytes(contents)
        try:
            found = check([shards], decode=True, unique_keys=True, workers=1)
        except ValueError as error:
            assert str(folder) in str(error)
            return
        with tarfile.open(packed / SHARD) as archive:
            headers = [member.offset for member in archive]
        in_header = any(0 <= place - start < 512 and not 148 <= place - start < 156 for start in headers)
        if file.name == SHARD and in_header:
            assert found.problems


# -- damage ----------------------------------------------------------------------------------------------------------


def edit_index(shards: Path, change: Callable[[Any], None]) -> None:
    rows = np.load(shards / "index.npy")
    change(rows)
    np.save(shards / "index.npy", rows)


def edit_json(shards: Path, **changes: Any) -> None:
    about = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(about | changes))


def overwrite(shard: Path, place: int, data: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(place)
        file.write(data)


def truncated(shards: Path) -> None:
    shard = shards / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[: Index.open(shards).stops[12] - 700])


def missing(shards: Path) -> None:
    (shards / "shard-000001.tar").unlink()


def more(shards: Path) -> None:
    write_tar(shards / "zebra.tar", [("z", sample(99))])


def compressed(shards: Path) -> None:
    shard = shards / "shard-000001.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))


def damaged_header(shards: Path) -> None:
    overwrite(shards / "shard-000001.tar", int(Index.open(shards).starts[10]), b"\xff" * 300)


def damaged_pixels(shards: Path) -> None:
    shard = shards / "shard-000001.tar"
    overwrite(shard, shard.read_bytes().index(b"\x89PNG", int(Index.open(shards).starts[10])), b"\0" * 64)


def shifted(shards: Path) -> None:
    def change(rows: Any) -> None:
        rows["stop"][10] += 512

    edit_index(shards, change)


def shortened(shards: Path) -> None:
    """The last member of the sample is not in its range."""

    def change(rows: Any) -> None:
        rows["stop"][10] -= 1024

    edit_index(shards, change)


def relabelled(shards: Path) -> None:
    def change(rows: Any) -> None:
        rows["label"][10] = (rows["label"][10] + 2) % 3 - 1

    edit_index(shards, change)


def regrouped(shards: Path) -> None:
    def change(rows: Any) -> None:
        rows["group"][10] = 77

    edit_index(shards, change)


def renumbered(shards: Path) -> None:
    edit_json(shards, label_names=["dog", "cat"])


def wrong_count(shards: Path) -> None:
    edit_json(shards, samples=25)


def other_index(shards: Path) -> None:
    np.save(shards / "index.npy", np.zeros(3, ROW))


def unfinished(shards: Path) -> None:
    (shards / "index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "shard", "key", "why"),
    [
        (truncated, SHARD, "", "when it was indexed"),
        (truncated, SHARD, "sample 4", "inside this sample"),
        (missing, SHARD, "", "listed in index.json, but there is no such file"),
        (more, "zebra.tar", "", "not in the index.json beside it"),
        (compressed, SHARD, "", "a compressed tar has no byte ranges to read samples from; decompress it"),
        (damaged_header, SHARD, "", "damaged at byte"),
        (damaged_header, SHARD, "sample 2", "bytes "),
        (damaged_pixels, SHARD, "KEY", "png: not an image"),
        (shifted, SHARD, "sample 2", "but the sample there ends at"),
        (shifted, SHARD, "sample 2", "is cut off"),
        (shortened, SHARD, "sample 2", "but the sample there ends at"),
        (relabelled, SHARD, "KEY", "label "),
        (regrouped, SHARD, "KEY", "in the sample, 'number 77, which has no name' in the index"),
        (renumbered, SHARD, "KEY", "label 'cat' in the sample, 'dog' in the index"),
        (wrong_count, "index.json", "", "25 samples, but its shards have 24"),
        (other_index, "index.json", "", "index.npy: does not belong to the index.json beside it"),
        (unfinished, "pack.json", "", "packing was not finished"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], None],
    shard: str,
    key: str,
    why: str,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(shards)
    problems, _ = verify(shards)
    assert any(
        name == shard and why in reason and (key == found or (key == "KEY" and found and "sample " not in found))
        for name, found, reason in problems
    ), problems
    captured = capsys.readouterr()
    assert why in captured.out and "Traceback" not in captured.err


def test_one_damaged_image_is_one_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged_pixels(shards)
    ((shard, _, reason),), _ = verify(shards)
    assert shard == SHARD and reason.startswith("png: not an image")
    assert verify(shards, "--quick", status=0)[0] == [], "which decodes nothing"
    assert "24 samples in 3 shards, 24 decoded: 1 wrong" not in capsys.readouterr().out


def test_keys_used_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "t/a.tar", [("x", sample(0)), ("y", sample(1)), ("x", sample(2))])
    write_tar(tmp_path / "t/b.tar", [("y", sample(3))])
    problems, _ = verify(tmp_path / "t")
    assert problems == [
        ("a.tar", "x", "the key is used twice in this shard"),
        ("b.tar", "y", "the key is also used in a.tar"),
    ]
    verify(tmp_path / "t", "--allow-duplicate-keys", status=0)


def special(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (special("/etc/x.png"), "absolute name"),
        (special("../../x.png"), "name with '..'"),
        (special("a/../x.png"), "name with '..'"),
        (special("x.png", tarfile.SYMTYPE, "/etc/passwd"), "a link to /etc/passwd, which is not read"),
        (special("x.png", tarfile.LNKTYPE, "a.png"), "a link to a.png, which is not read"),
        (special("x.png", tarfile.CHRTYPE), "neither a file nor a folder"),
        (special("x.png.gz"), "compressed member, which is not decompressed when read"),
    ],
)
def test_members_that_no_sample_should_have(member: tarfile.TarInfo, why: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "t/a.tar", [("a", sample(0))])
    with tarfile.open(tmp_path / "t/a.tar", "a") as archive:
        data = sample(1)["png"] if member.isreg() else b""
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    problems, _ = verify(tmp_path / "t")
    assert ("a.tar", member.name, why) in problems


def test_sparse_members(tmp_path: Path) -> None:
    """As GNU tar 1.0 writes them: a map of the parts with data goes before these."""
    data = sample(0)["png"]
    head = f"1\n0\n{len(data)}\n".encode()
    body = head.ljust(512, b"\0") + data
    info = tarfile.TarInfo("GNUSparseFile.0/x.png")
    info.size = len(body)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "x.png",
        "GNU.sparse.realsize": str(len(data)),
    }
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t/a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(body))
    problems, _ = verify(tmp_path / "t")
    why = "sparse at byte 0: sparse members have no byte range of their own; write the tar without --sparse"
    assert problems == [("a.tar", "", why)]


def test_a_sample_without_data_and_a_tar_without_an_end(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t/a.tar", [("a", sample(0)), ("b", {"json": b"{}"})])
    whole = shard.read_bytes()
    shard.write_bytes(whole[: whole.rindex(b"{}") + 512])
    problems, _ = verify(tmp_path / "t")
    assert ("a.tar", "b", "no data: the only members are json") in problems
    assert ("a.tar", "", "the end-of-archive mark is missing: is the file complete?") in problems


def test_class_numbers_that_json_contradicts(tmp_path: Path) -> None:
    samples = [(key, {**sample(seed, key), "cls": b"1"}) for seed, key in enumerate(("ant", "bee"))]
    write_tar(tmp_path / "t/a.tar", samples)
    Index.open(tmp_path / "t")
    problems, _ = verify(tmp_path / "t")
    assert problems == [("a.tar", "ant", "cls says 1, which is bee in the index, and json says 'ant'")]


def test_several_folders_and_refusals(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = Path(shutil.copytree(shards, tmp_path / "twin"))
    problems, about = verify(shards, twin, "--quick")
    assert about["samples"] == 48 and len(problems) == 24
    assert problems[0][0] == "twin/shard-000000.tar"
    assert problems[0][2] == "the key is also used in shards/shard-000000.tar"
    assert "(--json FILE has all)" not in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "empty: no tar shards"), (tmp_path / "none", "none: no such file")):
        assert ssl_pack("verify", path) == 2
        assert message in capsys.readouterr().err
