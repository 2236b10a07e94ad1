"""ssl-pack inspect: its numbers against what was put in, and a page that needs nothing but itself."""

import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_platform.config import plugin_names
from ssl_platform.data.pack import main
from tests.packed import image_bytes, pattern, sample, ssl_pack, write_tar

VOID = {"meta", "img", "rect", "line", "br", "link"}


class Page(HTMLParser):
    """What a page holds; raises if its tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tars: 12 samples of two labels and three groups, a copy, a copy as JPEG, a damaged image, one without label."""
    first = [(f"a{number}", sample(number, ["<b>cat", "dog"][number % 2], f"p{number % 3}")) for number in range(12)]
    jpeg = {"jpg": image_bytes(pattern(1), "jpg", quality=50), "json": b'{"label": "dog", "mpp": "0.5"}'}
    second = [
        ("copy", {"png": sample(0)["png"]}),
        ("recoded", jpeg),
        ("damaged", {"png": sample(5)["png"][:60], "json": b'{"label": "dog", "mpp": 0.25}'}),
    ]
    write_tar(tmp_path / "in/train-0.tar", first)
    write_tar(tmp_path / "in/test-0.tar", second)
    return tmp_path / "in"


def inspect(out: Path, *arguments: object, status: int = 0) -> tuple[dict[str, Any], str]:
    assert ssl_pack("inspect", *arguments, "--out", out) == status
    return json.loads((out / "inspect.json").read_text()), (out / "inspect.html").read_text()


def test_numbers(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = inspect(tmp_path / "out", shards, status=1)  # a sample is bad
    assert (report["samples"], report["shards"], report["examined"]) == (15, 2, 15)
    assert report["labels"] == {"<b>cat": 6, "dog": 8} and report["unlabelled"] == 1
    assert report["groups"] == {"number": 3, "without": 3, "smallest": 4, "median": 4.0, "largest": 4}
    assert report["splits"] == {"test": 3, "train": 12}
    assert report["sources"] == [{"path": "in", "shards": 2, "samples": 15}]
    (bad,) = report["bad"]["listed"]
    assert (bad["key"], bad["shard"], bad["sample"]) == ("damaged", "test-0.tar", 2)
    assert bad["reason"].startswith("cannot be decoded as png")
    assert report["duplicates"]["redundant"] == 1 and report["duplicates"]["listed"] == [["copy", "a0"]]
    near = report["near_duplicates"]
    assert (near["compared"], near["redundant"], near["groups"]) == (14, 2, 2)
    assert [[member["key"] for member in group] for group in near["listed"]] == [["copy", "a0"], ["recoded", "a1"]]
    assert near["listed"][0][1]["cosine"] == 1 and 0.95 <= near["listed"][1][1]["cosine"] < 1
    plots = report["histograms"]
    assert plots["width"]["values"] == [32] and plots["width"]["counts"] == [14]
    assert plots["column mpp"]["values"] == [0.25, 0.5]
    assert sum(plots["bytes"]["counts"]) == 15
    sizes = [len(sample(number)["png"]) for number in range(12)]
    assert report["members"]["png"]["bytes"] == sum(sizes) + sizes[0] + 60
    assert report["members"]["jpg"]["number"] == 1
    said = capsys.readouterr().out
    assert "15 samples in 2 shards" in said and "bad samples: 1" in said


def test_the_page_needs_nothing_but_itself_and_can_be_read(shards: Path, tmp_path: Path) -> None:
    report, text = inspect(tmp_path / "out", shards, status=1)
    page = Page(text)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", text)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(link and (link.startswith("data:image/jpeg;base64,") or link[0] == "#") for link in links)
    named = {attributes.get("id") for _, attributes in page.tags}
    assert all(link and link[1:] in named for link in links if link and link[0] == "#")
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all(head["scope"] == "col" for head in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in page.all("svg"))
    shown = {place["key"] for group in report["pictures"] for place in group["samples"]}
    assert shown <= {(image["alt"] or "").rpartition(": ")[2] for image in page.all("img")}
    assert "<b>cat" in page.texts["td"] and "<b>cat" not in text, "labels are text, not markup"
    assert "damaged" in page.texts["td"]


def test_the_same_whatever_the_workers_and_each_time(shards: Path, tmp_path: Path) -> None:
    for count in range(40):
        write_tar(shards / f"more-{count:02d}.tar", [(f"m{count}", sample(100 + count))])
    once = inspect(tmp_path / "one", shards, status=1)
    assert inspect(tmp_path / "two", shards, "--workers", 3, status=1) == once
    assert once[0]["unlabelled"] == 41


def test_a_sample_is_drawn_by_seed_and_the_page_says_so(shards: Path, tmp_path: Path) -> None:
    reports, text = [], ""
    for seed in (1, 1, 2):
        ssl_pack("inspect", shards, "--sample", 5, "--seed", seed, "--out", tmp_path / "out")
        text = (tmp_path / "out/inspect.html").read_text()
        reports.append(json.loads((tmp_path / "out/inspect.json").read_text()))
    assert reports[0] == reports[1]
    assert reports[0]["histograms"] != reports[2]["histograms"]
    assert [report["examined"] for report in reports] == [5, 5, 5] and reports[0]["samples"] == 15
    assert reports[0]["labels"] == {"<b>cat": 6, "dog": 8}, "counts are of all samples"
    assert "drawn by seed 2" in text and "duplicates outside these were not seen" in text


def test_sources_and_splits(shards: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "b/x.tar", [(f"b{number}", sample(50 + number, 3, split="val")) for number in range(4)])
    write_tar(tmp_path / "c/y.tar", [(f"c{number}", sample(60 + number, 4)) for number in range(2)])
    report, _ = inspect(tmp_path / "out", tmp_path / "b", tmp_path / "c/y.tar")
    assert report["sources"] == [
        {"path": "b", "shards": 1, "samples": 4},
        {"path": "y.tar", "shards": 1, "samples": 2},
    ]
    assert report["splits"] == {"(none)": 2, "val": 4} and report["labels"] == {"3": 4, "4": 2}
    assert report["groups"] == {"number": 0, "without": 6}


def test_data_that_is_no_image_is_counted(tmp_path: Path) -> None:
    samples = [
        (f"s{number}", {"dat": bytes([number % 3]) * (100 + number), "json": b'{"who": "voice-7", "hz": 16000}'})
        for number in range(4)
    ]
    write_tar(tmp_path / "in/x.tar", [*samples, ("again", samples[0][1])])
    report, text = inspect(tmp_path / "out", tmp_path / "in")
    assert report["members"]["dat"] == {"number": 5, "bytes": 506, "smallest": 100, "largest": 103}
    assert report["near_duplicates"]["compared"] == 0 and report["duplicates"]["redundant"] == 1
    assert "column who" not in report["histograms"] and report["histograms"]["column hz"]["values"] == [16000]
    Page(text)
    assert "can be shown as a picture" in text and "voice-7" not in text


def test_features_from_elsewhere(shards: Path, tmp_path: Path) -> None:
    features = np.eye(15, dtype=np.float32)
    features[9] = features[4] * 2
    np.save(tmp_path / "features.npy", features)
    report, _ = inspect(tmp_path / "out", shards, "--features", tmp_path / "features.npy", status=1)
    assert report["near_duplicates"]["features"] == "given"
    assert [[member["sample"] for member in group] for group in report["near_duplicates"]["listed"]] == [[4, 9]]


def test_paths_and_columns_stay_inside_the_shards(tmp_path: Path) -> None:
    secret = {"path": "/home/DOE_JANE/x.png", "patient": "DOE_JANE", "born": "1.1.1950"}
    write_tar(tmp_path / "in/x.tar", [(f"k{number}", sample(number, "a", "DOE_JANE", **secret)) for number in range(3)])
    report, text = inspect(tmp_path / "out", tmp_path / "in")
    for written in (json.dumps(report), text):
        assert "DOE_JANE" not in written and "1950" not in written and str(tmp_path) not in written


def test_refusals(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    np.save(tmp_path / "short.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "nan.npy", np.full((15, 4), np.nan, np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((15, 4), np.int64))
    for arguments, message in (
        ([tmp_path / "empty"], "empty: no tar shards in this folder"),
        ([tmp_path / "nowhere"], "nowhere: no such file or folder"),
        ([shards, "--out", tmp_path / "file"], "file: is a file; expected a folder"),
        ([shards, "--features", tmp_path / "short.npy"], "short.npy: has 3 rows, and there are 15 samples"),
        ([shards, "--features", tmp_path / "nan.npy"], "nan.npy: row 0 holds nan or infinity"),
        (
            [shards, "--features", tmp_path / "whole.npy"],
            "expected a row of floats for each sample, (N, D), found int64",
        ),
        ([shards, "--features", tmp_path / "file"], "file: cannot be read as a NumPy array"),
    ):
        assert ssl_pack("inspect", "--out", tmp_path / "out", *arguments) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    for option in (["--near", "1.2"], ["--near", "x"], ["--sample", "0"], ["--workers", "-1"]):
        with pytest.raises(SystemExit):
            main(["inspect", str(shards), *option])
        assert option[0] in capsys.readouterr().err


# -- commands --------------------------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    names = plugin_names("ssl_platform.data.commands")
    assert {"inspect", "verify", "merge", "prune"} <= set(names)
    for name in names:
        assert f"\n  {name}" in text
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"ssl-pack {name}" in (told := capsys.readouterr().out) and "examples:" in told


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """As old tools write them: every command escapes what it cannot write."""
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/x.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for number in range(4):
            data = sample(number)["png"] if number else b"bad"
            info = tarfile.TarInfo(f"Gr\xf6\xdfe{number}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    write_tar(tmp_path / "other/y.tar", [("k", sample(9))])
    report, _ = inspect(tmp_path / "out", tmp_path / "in", status=1)
    assert report["bad"]["listed"][0]["key"] == "Gr\\xf6\\xdfe0"
    assert ssl_pack("verify", tmp_path / "in", "--json", tmp_path / "problems.json") == 1
    assert json.loads((tmp_path / "problems.json").read_text())["problems"][0]["key"] == "Gr\\xf6\\xdfe0"
    assert ssl_pack("merge", tmp_path / "in", tmp_path / "other", tmp_path / "all") == 0
    assert ssl_pack("prune", tmp_path / "all", tmp_path / "less", "--near-duplicates", 0.9, "--drop-bad") == 0
    assert "Gr\\xf6\\xdfe0,0,bad" in (tmp_path / "less/dropped.csv").read_text()


def test_a_folder_called_like_a_command_can_be_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inspect").mkdir()
    (tmp_path / "inspect/a.png").write_bytes(sample(0)["png"])
    monkeypatch.chdir(tmp_path)
    assert main(["./inspect", "out"]) == 0
    assert "out: 1 samples in 1 shard" in capsys.readouterr().out


def test_percentiles_are_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(sample(number)["png"])
    assert ssl_pack(tmp_path / "photos", tmp_path / "packed") == 0
    report, text = inspect(tmp_path / "out", tmp_path / "packed")
    percentiles = report["statistics"]["percentiles"]
    page = Page(text)
    assert {"0.1 %", "50 %", "99.9 %"} <= set(page.texts["th"])
    assert all(str(round(value, 4)) in page.texts["td"] for values in percentiles.values() for value in values)
