"""Input that is damaged, hostile or merely unexpected, beyond what the tests of each reader have: the message of each.

Read the tables: a case and what the user is told. tests/test_image_decoding.py, test_index.py, test_pack.py and
test_shards.py hold the commoner cases.
"""

import base64
import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl_platform.data.index import Index
from ssl_platform.data.pack import main as pack
from ssl_platform.data.reading import BadSampleError, ShardReader, decoded
from ssl_platform.data.shards import preprocessed
from ssl_platform.data.tar_headers import shown
from ssl_platform.modalities._images import decode_image
from tests.bad_shards import (
    END,
    base256,
    bmp,
    chunk,
    deflated_zeros,
    gif,
    limit_memory,
    long_name,
    member,
    npy,
    npy_of,
    npz,
    pax,
    png,
    tiff,
    tiff_of_empty_pages,
    webp,
    with_checksum,
)  # fmt: skip

MEMORY = 256
"""MiB that reading any of these may take."""

# -- tars --------------------------------------------------------------------------------------------------------------

REFUSED_TARS = {
    "8 EiB": (member(b"a.bin", size=base256(1 << 63)) + END, "damaged at byte 0: the size of a member is 9223372036854"),
    "8 GiB": (member(b"a.bin", size=b"77777777777\0") + END, "unexpected end of data: 'a.bin' is cut off"),
    "1 GiB of json": (member(b"a.json", b"{}", size=b"%011o\0" % (1 << 30)) + END, "'a.json' is cut off"),
    "a negative size": (member(b"a.bin", size=base256(-512)) + END, "damaged at byte 0: the size of a member is -512"),
    "a negative octal size": (member(b"a.bin", size=b"-0000001000\0") + END, "damaged at byte 0: a member of -512 bytes"),
    "a negative size by PAX": (pax(size="-1536") + member(b"a.bin") + END, "damaged at byte 0: a member of -1536 bytes"),
    "8 EiB by PAX": (pax(size=str(1 << 63)) + member(b"a.bin") + END, "'a.bin' is cut off"),
    "a size of letters": (member(b"a.bin", size=b"zzzzzzzzzzz\0") + END, "invalid header"),
    "a name of 4 GiB": (long_name(base256(1 << 32)) + END, "a header of 4294967296 bytes at byte 0, for one name; the"),
    "a name of 5 MB": (long_name(data=b"n" * 5_000_000) + member(b"a.bin") + END, "a header of 5000000 bytes at byte 0"),
    "a name of negative length": (long_name(base256(-512)) + END, "the size of a member is -512"),
    "PAX of 5 MB": (pax(comment="c" * 5_000_000) + member(b"a.bin") + END, "bytes at byte 0, for one name; the limit is"),
    "2,000 names for a member": (long_name() * 2000 + member(b"a") + END, "more than 8 headers for one member"),
    "a sparse member": (member(b"a.bin", kind=b"S", magic=b"ustar  \0") + END, "sparse members have no byte range"),
    "a sparse member by PAX": (pax(GNU__sparse__major="1", GNU__sparse__minor="0") + member(b"a.bin", b"9999999\n")
                               + END, "sparse members have no byte range of their own; write the tar without --sparse"),
    "two tars joined by cat": ((member(b"a.bin") + END) * 2, "goes on after its end-of-archive mark at byte 1024"),
    "zeros, then something": (bytes(512) + b"x" * 512, "goes on after its end-of-archive mark at byte 0"),
    "zero bytes": (b"", "empty file"),
    "one byte": (b"x", "truncated header"),
    "only zeros": (bytes(10240), "there is no sample in it"),
    "a web page": (b"<!DOCTYPE html><html>404</html>" * 50, "invalid header"),
    **{f"{name}, named .tar": (magic + bytes(2000), "a compressed tar has no byte ranges") for name, magic in {
        "zip": b"PK\3\4", "zstd": b"\x28\xb5\x2f\xfd", "lz4": b"\x04\x22\x4d\x18", "xz": b"\xfd7zXZ\0", "bzip2": b"BZh9",
    }.items()},
}  # fmt: skip


def tar_in(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.tar").write_bytes(data)
    return folder


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 1000, text
    return text


@pytest.mark.parametrize("case", REFUSED_TARS)
def test_tars_that_are_refused(tmp_path: Path, case: str) -> None:
    data, message = REFUSED_TARS[case]
    with pytest.raises(ValueError) as raised:
        Index.open(tar_in(tmp_path, data))
    assert str(tmp_path) in one_line(raised.value) and message in one_line(raised.value)


READ_TARS = {
    "absolute and .. names": (member(b"/etc/a.bin") + member(b"../../b.bin"), ["/etc/a", "../../b"], ""),
    "a link": (member(b"a.bin", b"", kind=b"2") + member(b"b.bin"), ["b"],
               "links, devices and pipes are not read, pack the files themselves by tar --dereference (1, the"),
    "a name without an extension": (member(b"README") + member(b"b.bin"), ["b"], "and not read (1, the first 'README')"),
    "a key twice, apart": (member(b"a.bin") + member(b"b.bin") + member(b"a.json"), ["a", "b", "a"],
                           "keys occur again, apart: each is a sample of its own; members of one sample must lie"),
    "names that differ by case only": (member(b"a.bin") + member(b"A.bin"), ["a", "A"], ""),
    "NFC beside NFD": (member("é.bin".encode()) + member("e\u0301.bin".encode()), ["é", "e\u0301"], ""),
    "emoji and right-to-left": (member("🦠\u202e.bin".encode()), ["🦠\u202e"], ""),
    "a name that is no UTF-8": (member(b"\xff\xfe.bin"), ["\\xff\\xfe"], ""),
    "control characters": (member(b"a\n\x1b[31m.bin"), ["a\n\x1b[31m"], ""),
    "a name of 5,000 bytes": (long_name(data=b"n" * 5000 + b".bin\0") + member(b"x"), ["n" * 5000], ""),
    "a global PAX header": (member(b"pax", b"13 comment=x\n", kind=b"g") + member(b"a.bin"), ["a"], ""),
    "json of brackets": (member(b"a.json", b"[" * 60_000), ["a"], ""),
    "a label of 30 digits": (member(b"a.cls", b"9" * 30), ["a"], ""),
    "a label that is half a character": (member(b"a.json", b'{"label": "\\ud800"}'), ["a"], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", READ_TARS)
def test_tars_that_are_read(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """None is refused; what is passed over is said. Twice: by a scan, and by the index that it leaves."""
    data, keys, message = READ_TARS[case]
    tar_in(tmp_path, data + END)
    for _ in range(2):
        index = Index.open(tmp_path)
        reader = ShardReader(index, cache_shards=1)
        assert [reader.read(sample).key for sample in range(len(index))] == keys
        assert len(index.labels) == len(keys)
        "".join(index.label_names).encode()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [warning.startswith(str(tmp_path / "a.tar")) for warning in warnings] == [True] * bool(message)
    assert message in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index.json", "index.npy"]


class Refusing:
    """A modality that decodes nothing."""

    def decode(self, record: dict[str, bytes]) -> Any:
        raise ValueError("not wanted")


@pytest.mark.parametrize(
    ("name", "as_shown"),
    [(b"a\n\x1b[31m.bin", "a\\n\\x1b[31m"), ("\u202eb.bin".encode(), "\\u202eb"), ("é.bin".encode(), "é")],
)
def test_keys_in_messages_are_one_line(tmp_path: Path, name: bytes, as_shown: str) -> None:
    reader = ShardReader(Index.open(tar_in(tmp_path, member(name) + END)), cache_shards=1)
    with pytest.raises(BadSampleError) as raised:
        decoded(reader, Refusing(), 0)  # type: ignore[arg-type]
    assert one_line(raised.value) == f"a.tar: {as_shown}: not wanted"
    assert len(shown("n" * 10_000)) < 200


# -- images ------------------------------------------------------------------------------------------------------------


def huge_images() -> dict[str, tuple[bytes, str, str]]:
    """{case: (file, extension, message)}; made where they are needed, for some take a moment."""
    zeros = deflated_zeros(300)
    full, deep = zlib.compress(bytes(49 * 16)), zlib.compress(bytes(97 * 16))
    text = {kind: chunk(kind, body + zeros) for kind, body in (
        (b"iCCP", b"x\0\0"), (b"zTXt", b"x\0\0"), (b"iTXt", b"x\0\1\0\0\0"),
    )}  # fmt: skip
    bomb = "decompression bomb"
    return {
        "PNG, 4e18 pixels": (png(1 << 31, 1 << 31), "png", bomb),
        "PNG, 1e9 pixels of 16 bits": (png(40_000, 40_000, bits=16), "png", bomb),
        **{f"PNG, {kind.decode()} of 300 MiB": (png(16, 16, between=body, data=full), "png", "data too large")
           for kind, body in text.items()},
        **{f"deep PNG, {kind.decode()} of 300 MiB": (png(16, 16, bits=16, between=body, data=deep), "png", "data too large")
           for kind, body in text.items()},
        "PNG, a chunk of 4 GB": (png(16, 16, between=struct_of_chunk(0xFFFFFFF0)), "png", "Truncated File Read"),
        "TIFF, 1e10 pixels": (tiff(100_000, 100_000), "tif", bomb),
        "TIFF, 1e10 pixels of 32 bits": (tiff(100_000, 100_000, bits=32), "tif", bomb),
        "TIFF of 300,000 pages": (tiff_of_empty_pages(300_000), "tif", "more than 10,000 pages"),
        "WebP, 2.7e8 pixels": (webp(16383, 16383), "webp", bomb),
        "GIF, a frame of 4e9 pixels": (gif(65535, 65535), "png", bomb),
        "BMP, 1.6e9 pixels": (bmp(40_000, 40_000), "bmp", bomb),
        "npy of 1e12 bytes": (npy_of("(1000000, 1000000)"), "npy", "truncated: 0 bytes for an array of shape"),
        "npy of negative shape": (npy_of("(-1, -3, 3)", body=b"123456789"), "npy", "cannot be decoded as npy"),
        "npy, a header of 4 GB": (npy("{}", version=b"\2\0", size=0xFFFFFFFF), "npy", "EOF: reading array header"),
        "npy, a header of brackets": (npy("(" * 9000), "npy", "cannot be decoded as npy"),
        "npy, a header of minus signs": (npy("-" * 9000 + "1"), "npy", "cannot be decoded as npy"),
        "npy of objects": (npy_of("(2, 2)", "|O", b"\x80\x04N."), "npy", "dtype object is no image"),
        "npz, named npy": (npz(), "npy", "the magic string is not correct"),
        "EPS, named jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "jpg", "not an image"),
        "gzip, named png": (b"\x1f\x8b\x08\0" + bytes(50), "png", "not an image"),
    }  # fmt: skip


def struct_of_chunk(length: int) -> bytes:
    return length.to_bytes(4, "big") + b"tEXt" + bytes(100)


def huge_files() -> dict[str, tuple[Callable[[], object], str]]:
    """{case: (what reads it, message)} of everything that asks for more memory than it is worth."""
    folder = Path(os.environ["BAD_INPUT_FOLDER"])
    cases: dict[str, tuple[Callable[[], object], str]] = {
        case: (lambda data=data, kind=kind: decode_image(data, kind), message)
        for case, (data, kind, message) in huge_images().items()
    }
    for case, (data, message) in REFUSED_TARS.items():
        cases[f"tar: {case}"] = (lambda data=data: Index.open(tar_in(folder, data)), message)
    for case, (name, contents, message) in {
        "index.json of brackets": (
            "index.json",
            b"[" * 5_000_000,
            "index.json: cannot be read (brackets inside brackets",
        ),
        "index.npy of 1e12 rows": ("index.npy", index_header("(1000000000000,)"), "does not belong to the index.json"),
        "index.npy, header of 4 GB": (
            "index.npy",
            npy("{}", version=b"\2\0", size=2**32 - 1),
            "index.npy: cannot be read",
        ),
        "index.npy of minus signs": ("index.npy", npy("-" * 9000 + "1"), "index.npy: cannot be read"),
    }.items():
        cases[case] = (lambda name=name, contents=contents: open_damaged(folder, name, contents), message)
    return cases


def index_header(shape: str) -> bytes:
    dtype = [(name, "<i8") for name in ("start", "stop", "label", "group", "shard")]
    return npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n", bytes(40))


def open_damaged(folder: Path, name: str, contents: bytes) -> None:
    for path in folder.glob("index.*"):
        path.unlink()
    Index.open(tar_in(folder, member(b"a.bin") + END))
    (folder / name).write_bytes(contents)
    Index.open(folder)


def check_huge_files() -> None:
    """Run in a process of its own: no case may take more than MEMORY, whatever a header claims."""
    cases = huge_files()
    limit_memory(MEMORY)
    for case, (read, message) in cases.items():
        try:
            read()
        except ValueError as error:
            assert message in str(error), f"{case}: {error}"
        else:
            raise AssertionError(f"{case}: not refused")
    sys.stdout.write(f"{len(cases)} refused")


def test_no_header_makes_a_reader_take_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_bad_input import check_huge_files; check_huge_files()"],
        env={**os.environ, "BAD_INPUT_FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 50


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_of_an_animation_the_first_frame_is_taken(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.fromarray(np.full((20, 30, 3), 80 * shade, np.uint8)) for shade in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(file.getvalue(), "png", 3).numpy() == 0).all()


def test_libraries_say_nothing_beside_the_error() -> None:
    """Neither Pillow's warnings nor tifffile's log, which name no file."""
    program = (
        "import sys; from tests.bad_shards import *; from ssl_platform.modalities._images import decode_image\n"
        "for data in (tiff_of_empty_pages(50), tiff(13000, 13000, 16), png(13000, 13000)):\n"
        "    try: decode_image(data, 'tif')\n"
        "    except ValueError: continue\n"
        "    raise AssertionError"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- an index that is not its shards' ----------------------------------------------------------------------------------


def packed(folder: Path, names: bool = True) -> Path:
    """Two shards of three samples each, whose index says that ssl-pack made it, so that nothing is scanned again."""
    for left in folder.glob("index.*"):
        left.unlink()
    for shard in range(2):
        members = b""
        for sample in range(3):
            label = json.dumps({"label": f"class {sample}" if names else sample, "group": f"p{shard}"}).encode()
            name = f"{shard}{sample}".encode()
            members += member(name + b".bin", name * (50 + 300 * sample)) + member(name + b".json", label)
        folder.mkdir(exist_ok=True)
        (folder / f"{shard}.tar").write_bytes(members + END)
    Index.open(folder)
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | {"scanned": False}))
    return folder


BAD_INDEX_JSON = {
    "no map": ([1], "expected format"),
    "no shards": ({"shards": None}, "shards: Input should be a valid list"),
    "a sample too many": ({"samples": 7}, "7 samples, but its shards have 6"),
    "samples in words": ({"samples": "six"}, "samples: Input should be a valid integer"),
    "a negative number": ({"shards": [{"name": "0.tar", "bytes": 1, "samples": -3}]}, "shards.0.samples: Input should be"),
    "a shard outside": ({"shards": [{"name": "../0.tar", "bytes": 1, "samples": 6}]}, "'../0.tar' is no name of a shard"),
    "a shard twice": ({"shards": [{"name": "0.tar", "bytes": 1, "samples": 3}] * 2}, "a shard is listed twice"),
    "a column of objects": ({"columns": {"site": {"type": "|O", "names": []}}}, "columns.site.type: Input should be"),
    "names of no text": ({"label_names": [1, 2, 3]}, "label_names.0: Input should be a valid string"),
    "statistics of nothing": ({"statistics": {"mean": []}}, "statistics.mean: List should have at least 1 item"),
    "statistics of half": ({"statistics": {"mean": [0.5], "std": [], "pixels": 1}}, "1 means and 0 standard deviations"),
    "percentiles of half": (
        {"statistics": {"mean": [0.5], "std": [0.1], "pixels": 1, "percentiles": {"1": []}}},
        "1 means and 0 values of percentile '1'",
    ),
    "a distribution of nothing": (
        {"statistics": {"mean": [0.5], "std": [0.1], "pixels": 1, "distribution": {"bins": "uint8"}}},
        "statistics: a distribution has bins (uint8, uint16, float) and counts (a text)",
    ),
    "a distribution that is a bomb": (
        {"statistics": {"mean": [0.5], "std": [0.1], "pixels": 1, "distribution": {
            "bins": "uint8", "counts": base64.b64encode(zlib.compress(bytes(1 << 28))).decode()}}},
        "a distribution does not have 256 counts for 1 channels",
    ),
    "infinite statistics": ({"statistics": {"mean": [float("inf")], "std": [1], "pixels": 1}}, "should be a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEX_JSON)
def test_an_index_json_that_cannot_be(tmp_path: Path, case: str) -> None:
    change, message = BAD_INDEX_JSON[case]
    path = packed(tmp_path / "data") / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change} if isinstance(change, dict) else change))
    with pytest.raises(ValueError) as raised:
        Index.open(path.parent)
    assert one_line(raised.value).startswith(f"{path}: ") and message in str(raised.value), raised.value
    assert str(raised.value).endswith("; delete it and index.npy, or pack again")


BAD_ROWS: dict[str, tuple[list[tuple[int, str, int]], str, set[int]]] = {
    # {case: (cells (row, column, value) that are changed, message, samples that can still be read)}
    "a negative start of a shard": ([(0, "start", -512)], "does not belong to the index.json beside it", set()),
    "the wrong shard at an end": ([(2, "shard", 1)], "does not belong to the index.json beside it", set()),
    "behind the end of a shard": ([(5, "stop", 1 << 40)], "does not belong to the index.json beside it", set()),
    "a negative start": ([(1, "start", -512)], "the place of sample 1 is not between", {3, 4, 5}),
    "a huge stop": ([(1, "stop", 1 << 40)], "the place of sample 1 is not between", {0, 3, 4, 5}),
    "the wrong shard": ([(4, "shard", 0)], "the place of sample 4 is not between", {0, 1, 2}),
    "no bytes": ([(4, "stop", 0)], "the place of sample 4 is not between", {0, 1, 2}),
    "the next sample's bytes": ([(0, "start", 1024), (0, "stop", 3072)], "the place of sample 0 is not", {2, 3, 4, 5}),
    "half of it": ([(1, "start", 3000)], "sample 1: ", {0, 2, 3, 4, 5}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_lies_gives_no_other_samples_bytes(tmp_path: Path, case: str) -> None:
    folder = packed(tmp_path)
    before = read_all(folder)
    changes, message, readable = BAD_ROWS[case]
    rows = np.load(folder / "index.npy")
    for row, column, value in changes:
        rows[column][row] = value
    np.save(folder / "index.npy", rows)
    if not readable:
        with pytest.raises(ValueError, match=message) as raised:
            Index.open(folder)
        assert "index.npy: " in one_line(raised.value)
        return
    after = read_all(folder)
    assert {sample for sample, record in enumerate(after) if not isinstance(record, str)} == readable
    assert all(after[sample] == before[sample] for sample in readable)
    assert any(message in str(record) for record in after)


@pytest.mark.parametrize(("column", "value"), [("label", 3), ("label", -2), ("group", 2), ("group", 1 << 60)])
def test_a_class_that_does_not_exist(tmp_path: Path, column: str, value: int) -> None:
    rows = np.load(packed(tmp_path) / "index.npy")
    rows[column][1] = value
    np.save(tmp_path / "index.npy", rows)
    with pytest.raises(ValueError, match=f"index.npy: damaged, a {column} is out of range; delete it and index.json"):
        getattr(Index.open(tmp_path), f"{column}s")
    assert [sample for sample, record in enumerate(read_all(tmp_path)) if isinstance(record, str)] == [1]


def read_all(folder: Path) -> list[Any]:
    """Every record, or the text of its error."""
    reader = ShardReader(Index.open(folder), cache_shards=2)
    records: list[Any] = []
    for sample in range(len(reader.index)):
        try:
            records.append(decoded(reader, Reading(), sample))  # type: ignore[arg-type]
        except BadSampleError as error:
            records.append(one_line(error))
    return records


class Reading:
    """A modality that gives the bytes."""

    def decode(self, record: dict[str, bytes]) -> Any:
        return record


# -- what ssl-pack is given ---------------------------------------------------------------------------------------------

MANIFESTS = {
    "semicolons": ("table.csv", b"path;label\na.png;1\n", "its cells are separated by ';', ',' is expected in .csv"),
    "tabs in a csv": ("table.csv", b"path\tlabel\na.png\t1\n", "its cells are separated by '\\t', ',' is expected in .csv"),
    "commas in a tsv": ("table.tsv", b"path,label\na.png,1\n", "separated by ',', '\\t' is expected in .tsv"),
    "an unquoted comma": ("table.csv", b"path,label\na.png,one, two\n", "line 2: 3 columns, but the header has 2; a cell"),
    "an open quote": ("table.csv", b'path,label\n"a.png,1\n', "cannot be read as a table (line 2: unexpected end of data)"),
    "latin-1": ("table.csv", b"path,label\na.png,caf\xe9\n", "invalid continuation byte); save it as UTF-8"),
    "UTF-16": ("table.csv", "path\na.png\n".encode("utf-16"), "invalid start byte); save it as UTF-8"),
    "a cell of 1 MB": ("table.csv", b"path,label\na.png," + b"x" * 1_000_000, "line 2: field larger than field limit"),
    "a NUL": ("table.csv", b"path\na\0.png\n", "line 2: no such file: a\\x00.png (paths are relative to"),
    "a line break in a path": ("table.csv", b'path\n"a\nb.png"\n', "line 3: no such file: a\\nb.png (paths are relative to"),
    "a path of 5,000 bytes": ("table.csv", b"path\n" + b"n" * 5000, "n: File name too long"),
    "old Macintosh line ends": ("table.csv", b"path,label\ra.png,1\r", ""),
    "a path outside": ("table.csv", b"path\n../here/a.png\n", ""),
    "a path twice": ("table.csv", b"path\na.png\na.png\n", "1 rows repeat a path and are packed again; the first is line"),
    "labels of both kinds": ("table.csv", b"path,label\na.png,3\nb.png,cat\n", "labels: 3: 1, cat: 1"),
}  # fmt: skip


PACKED_MANIFESTS = {"old Macintosh line ends", "a path outside", "a path twice", "labels of both kinds"}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / f"{name}.png")
    name, contents, message = MANIFESTS[case]
    (folder / name).write_bytes(contents)
    status = pack([str(folder / name), str(tmp_path / "out")])
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert message in said and "Traceback" not in said and max(map(len, said.splitlines())) < 600, said
    assert status == (0 if (tmp_path / "out").exists() else 2)
    assert (status == 0) == (case in PACKED_MANIFESTS)


def test_names_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With plain names all are packed but the one that is no text; links back to folders above are not followed."""
    folder = tmp_path / "in"
    deep = folder / ("d" * 255)
    deep.mkdir(parents=True)
    (deep / "loop").symlink_to("..")
    (folder / "self").symlink_to(".")
    composed = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    names = [*composed, "a.png", "A.png", "🦠\u202e.png", "line\nbreak.png", "n" * 251 + ".png", "d" * 255 + "/b.png"]
    for name in [*names, os.fsdecode(b"\xff.png")]:
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / name)
    assert pack([str(folder), str(tmp_path / "hidden")]) == 0, "names that are in no shard need be no text"
    capsys.readouterr()
    assert pack([str(folder), str(tmp_path / "out"), "--plain-names"]) == 1
    said = capsys.readouterr().err
    assert said.count("not followed: a link to a folder that holds it") == 2
    assert "left out: \\udcff.png: its name is not valid UTF-8; rename it" in said
    reader = ShardReader(Index.open(tmp_path / "out"), cache_shards=1)
    packed_names = [json.loads(reader.read(sample).members["json"])["path"] for sample in range(len(reader.index))]
    assert sorted(packed_names) == sorted(names)


def test_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "secret").mkdir(parents=True)
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "in" / "a.png")
    listing = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
    assert pack([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "in/secret: this folder cannot be read (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_in_a_worker_is_one_line(tmp_path: Path, workers: int) -> None:
    """And not the traceback that a worker's errors arrive with."""
    index = Index.open(tar_in(tmp_path, member(b"a.bin") + END))
    with pytest.raises(BadSampleError) as raised:
        next(preprocessed(index, Refusing(), batch_size=1, workers=workers))  # type: ignore[arg-type]
    assert one_line(raised.value) == "a.tar: a: not wanted"


@pytest.mark.parametrize(
    ("row", "column", "by"), [(5, "stop", -1024), (2, "stop", -1024), (1, "start", 1536), (3, "start", 1024)]
)
def test_an_index_that_leaves_out_a_member(tmp_path: Path, row: int, column: str, by: int) -> None:
    """What is left is a whole sample by itself, but not the one that was packed."""
    rows = np.load(packed(tmp_path) / "index.npy")
    rows[column][row] += by
    np.save(tmp_path / "index.npy", rows)
    found = read_all(tmp_path)
    assert [isinstance(record, str) for record in found] == [number == row for number in range(6)]
    assert "the index leaves out some of its members" in found[row]


# -- fuzzing -----------------------------------------------------------------------------------------------------------


def damage(contents: bytes, data: st.DataObject) -> tuple[bytes, set[int]]:
    """The contents with some bytes changed, runs copied elsewhere, or the end cut off; and which bytes differ."""
    damaged = bytearray(contents)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        kind = data.draw(st.sampled_from(["byte", "bit", "copy", "text", "cut"]))
        if kind == "byte":
            damaged[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
        elif kind == "bit":
            damaged[place : place + 1] = bytes(
                [b ^ 1 << data.draw(st.integers(0, 7)) for b in damaged[place : place + 1]]
            )
        elif kind == "copy":
            source, length = data.draw(st.integers(0, len(damaged))), data.draw(st.integers(1, 600))
            damaged[place : place + length] = damaged[source : source + length][: len(damaged) - place]
        elif kind == "text":
            text = data.draw(
                st.sampled_from([b"-1", b"1e999", b"9" * 30, b"[" * 50, b"null", b"{}", b'"\\ud800"', b"\0"])
            )
            damaged[place : place + len(text)] = text
        else:
            del damaged[max(place, 1) :]
    return bytes(damaged), {i for i, byte in enumerate(contents) if damaged[i : i + 1] != bytes([byte])}


def fuzz_shard(folder: Path, data: st.DataObject) -> None:
    """Of a packed shard whose bytes are damaged, the samples that lie elsewhere are read as they were."""
    tar = packed(folder) / "0.tar"
    index, before = Index.open(folder), read_all(folder)
    damaged, differ = damage(tar.read_bytes(), data)
    tar.write_bytes(damaged)
    try:
        after = read_all(folder)
    except ValueError as error:
        assert str(tar) in one_line(error) and len(damaged) != index_size(folder, "0.tar")
        return
    for sample, (was, found) in enumerate(zip(before, after, strict=True)):
        place = index[sample]
        if place.shard == 1 or not differ & set(range(place.start, place.stop)):
            assert found == was


def fuzz_scan(folder: Path, data: st.DataObject) -> None:
    """A damaged tar without an index, its checksums right or not, is scanned or refused by name."""
    damaged, _ = damage((packed(folder) / "0.tar").read_bytes(), data)
    if data.draw(st.booleans()):
        blocks = [damaged[i : i + 512] for i in range(0, len(damaged), 512)]
        damaged = b"".join(with_checksum(block) if block[257:262] == b"ustar" else block for block in blocks)
    for path in [*folder.glob("index.*"), folder / "1.tar"]:
        path.unlink(missing_ok=True)
    (folder / "0.tar").write_bytes(damaged)
    try:
        read_all(folder)
    except ValueError as error:
        assert str(folder) in one_line(error)


def fuzz_index(folder: Path, data: st.DataObject) -> None:
    """With a damaged index, a sample is read as it was, or not at all; or the index is refused by name."""
    name = data.draw(st.sampled_from(["index.json", "index.npy"]))
    before = read_all(packed(folder))
    by_key = {key: members for key, members in before}
    damaged, _ = damage((folder / name).read_bytes(), data)
    (folder / name).write_bytes(damaged)
    try:
        after = read_all(folder)
        index = Index.open(folder)
        assert len(index.labels) == len(index.groups) == len(after)
        assert max(index.labels, default=-1) < max(len(index.label_names), 1) or not index.label_names
    except ValueError as error:
        assert str(folder) in one_line(error)
        return
    for record in after:
        assert isinstance(record, str) or by_key[record[0]] == record[1]


def fuzz_pack(folder: Path, data: st.DataObject) -> None:
    """With a damaged pack.json, the same command makes the same shards, or says that it cannot be read."""
    (folder / "in").mkdir(exist_ok=True)
    for number in range(2):
        Image.fromarray(np.full((3, 4), 90 * number, np.uint8)).save(folder / "in" / f"{number}.png")
    command = [str(folder / "in"), str(folder / "out"), "--samples-per-shard", "1"]
    assert pack([*command, "--overwrite"]) == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").glob("*.tar")}
    damaged, _ = damage((folder / "out" / "pack.json").read_bytes(), data)
    (folder / "out" / "pack.json").write_bytes(damaged)
    if pack(command) == 0:
        assert {path.name: path.read_bytes() for path in (folder / "out").glob("*.tar")} == before


def index_size(folder: Path, name: str) -> int:
    about = json.loads((folder / "index.json").read_text())
    return next(int(shard["bytes"]) for shard in about["shards"] if shard["name"] == name)


FUZZED = [fuzz_shard, fuzz_scan, fuzz_index, fuzz_pack]
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.parametrize("fuzz", FUZZED)
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_damaged_files(tmp_path: Path, fuzz: Callable[[Path, st.DataObject], None], data: st.DataObject) -> None:
    fuzz(tmp_path, data)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of 5,000 examples, some of which pack twice
@pytest.mark.parametrize("fuzz", FUZZED)
@settings(max_examples=5000, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_many_damaged_files(tmp_path: Path, fuzz: Callable[[Path, st.DataObject], None], data: st.DataObject) -> None:
    fuzz(tmp_path, data)
