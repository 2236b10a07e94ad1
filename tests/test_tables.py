"""Tables that people and data sets bring: what is no table is told by file, line and reason, whoever reads it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_platform.data.pack import main
from ssl_platform.data.tables import read_rows, read_table

OPEN_QUOTE = b'"' + b"a,b\n" * 40_000
LATIN_1 = "a,b\ncaf\xe9,1\n".encode("latin-1")


def test_rows_and_their_lines(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes('\ufeffa, b\n1,"x\ny"\n\n2,z\n'.encode())
    assert read_rows(table) == [(1, ["a", " b"]), (3, ["1", "x\ny"]), (5, ["2", "z"])]
    assert read_table(table, ["b"]) == [(3, {"a": "1", "b": "x\ny"}), (5, {"a": "2", "b": "z"})]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "line 1: no column 'b'; needed are b; the columns are none"),
        (b"a\n1\n", "line 1: no column 'b'; needed are b; the columns are a"),
        (b"b,b\n1,2\n", "line 1: column 'b' is there twice"),
        (b"b\n", "no row below the header"),
        (b"b\n1\n1,2\n", "line 3: 2 columns, but the header has 1; a cell that holds a comma or a tab must be quoted"),
        (b"a,b\n1\n", "line 2: 1 columns, but the header has 2"),
        (b'b\n"1\n', "cannot be read as a table (line 2: unexpected end of data)"),
        (b'b\n"1"x\n', "cannot be read as a table (line 2: ',' expected after '\"')"),
        (OPEN_QUOTE, "field larger than field limit (131072); a cell has more than 131,072 characters)"),
        (LATIN_1, "cannot be read as a table ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_what_is_no_table(contents: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(contents)
    with pytest.raises(ValueError) as raised:
        read_table(tmp_path / "t.csv", ["b"])
    assert str(raised.value).startswith(f"{tmp_path / 't.csv'}: ") and message in str(raised.value)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t.csv: cannot be read as a table \(No such file or directory\)"):
        read_rows(tmp_path / "t.csv")


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def _audioset(folder: Path) -> Path:
    (folder / "eval_segments.csv").write_text('eeeeeeeeeee, 0, 9, "/m/0k4j"\n')
    _touch(folder / "eeeeeeeeeee.wav")
    return folder / "class_labels_indices.csv"


def _named(table: str, *files: str) -> Callable[[Path], Path]:
    """A tree with these files, of which a layout reads this table."""

    def make(folder: Path) -> Path:
        for file in files:
            _touch(folder / file)
        _touch(folder / table)
        return folder / table

    return make


LAYOUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "esc50": ("esc50", _named("meta/esc50.csv", "audio/a.wav")),
    "audioset": ("audioset", _named("eval_segments.csv")),
    "audioset's classes": ("audioset", _audioset),
    "imagenet": ("imagenet", _named("LOC_val_solution.csv", "val/v.JPEG")),
    "voxceleb": ("voxceleb", _named("vox1_meta.csv", "wav/id10001/v/1.wav")),
    "shapenet": ("shapenet", _named("all.csv", "02691156/m/model.obj")),
    "echonet-dynamic": ("echonet-dynamic", _named("FileList.csv", "Videos/a.avi")),
    "camelyon17-wilds": ("camelyon17-wilds", _named("metadata.csv", "patches/a.png")),
}


@pytest.mark.parametrize("contents", [OPEN_QUOTE, LATIN_1], ids=["open quote", "Latin-1"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_name_their_table(
    case: str, contents: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, make = LAYOUTS[case]
    table = make(tmp_path)
    table.write_bytes(contents)
    assert main([name, str(tmp_path), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"ssl-pack {name}: {table}: cannot be read as a table ("), line
    assert not (tmp_path / "out").exists()
