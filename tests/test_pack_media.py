"""A folder or table of any medium: what is found in it, what it is taken for, and what is in the shards afterwards."""

import io
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_platform.data.index import Index
from ssl_platform.data.media import extensions_of, file_media, medium_of
from ssl_platform.data.media.points import recognises
from ssl_platform.data.pack import main
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.sources import folder_items
from ssl_platform.modalities._audio import decode_audio
from tests.clips import frames, write_clip
from tests.packed import write_tar
from tests.test_image_metadata import STORED, dicom
from tests.test_media_audio import wav
from tests.test_media_points import off


def pack(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def members(shards: Path) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(Index.open(shards), cache_shards=1)
    return dict(reader.read(sample) for sample in range(len(reader.index)))


def stored_json(shards: Path) -> list[dict[str, Any]]:
    return [json.loads(found["json"]) for found in members(shards).values()]


def cloud(number: int = 20) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).normal(size=(number, 3)).astype(np.float32))
    return file.getvalue()


def webm(path: Path, *, has_pictures: bool) -> Path:
    import av

    if has_pictures:
        return write_clip(path, frames(4), "libvpx")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_folder_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sick/1.avi", "sick/2.avi", "well/3.avi"):
        write_clip(tmp_path / "clips" / name, frames(5, seed=int(name[5])))
    (tmp_path / "clips/notes.txt").write_text("seen by Dr Smith")
    assert pack(tmp_path / "clips", tmp_path / "out", "--labels", "folder") == 0
    assert "labels: sick: 2, well: 1" in capsys.readouterr().out
    assert sorted(about["num_frames"] for about in stored_json(tmp_path / "out")) == [5, 5, 5]
    assert pack("verify", tmp_path / "out") == 0
    assert pack("inspect", tmp_path / "out", "--out", tmp_path / "report") == 0
    assert "num_frames" in (tmp_path / "report/inspect.html").read_text()


def test_a_folder_of_meshes_and_clouds(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "a.off").write_text(off())
    (folder / "b.npy").write_bytes(cloud(20))
    (folder / "split.txt").write_text("a.off\n")
    assert pack(folder, tmp_path / "out", "--points", 300) == 0
    assert sorted(about["num_points"] for about in stored_json(tmp_path / "out")) == [20, 300]
    assert Index.open(tmp_path / "out").statistics is not None
    assert pack(folder, tmp_path / "default") == 0
    assert sorted(about["num_points"] for about in stored_json(tmp_path / "default")) == [20, 8192]


def test_another_number_of_points_is_another_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/a.off").write_text(off())
    assert pack(tmp_path / "shapes", tmp_path / "out", "--points", 300) == 0
    assert pack(tmp_path / "shapes", tmp_path / "out", "--points", 300) == 0
    capsys.readouterr()
    assert pack(tmp_path / "shapes", tmp_path / "out", "--points", 301) == 2
    assert "points" in capsys.readouterr().err


def test_text_is_a_cloud_only_if_one_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clouds").mkdir()
    (tmp_path / "clouds/a.txt").write_text("0 0 0\n1 0 0\n0 1 0\n")
    assert pack(tmp_path / "clouds", tmp_path / "out") == 2
    assert "no images or point clouds or sound files or videos" in capsys.readouterr().err
    assert pack(tmp_path / "clouds", tmp_path / "out", "--medium", "points") == 0
    (tmp_path / "table.csv").write_text("path,label\nclouds/a.txt,flat\n")  # a table names files: there is no doubt
    assert pack(tmp_path / "table.csv", tmp_path / "listed") == 0
    assert [about["num_points"] for about in stored_json(tmp_path / "listed")] == [3]


def test_arrays_are_images_or_clouds_by_their_content(tmp_path: Path) -> None:
    for name, data in (("clouds", cloud()), ("images", None)):
        (tmp_path / name).mkdir()
        if data is None:
            np.save(tmp_path / name / "a.npy", np.zeros((3, 8, 8), np.uint8))
        else:
            (tmp_path / name / "a.npy").write_bytes(data)
    assert [item.medium for item in folder_items(tmp_path / "clouds", labels=False)] == ["points"]
    assert [item.medium for item in folder_items(tmp_path / "images", labels=False)] == ["image"]


@pytest.mark.parametrize(("has_pictures", "medium"), [(True, "video"), (False, "audio")])
def test_webm_is_video_or_sound_by_its_content(has_pictures: bool, medium: str, tmp_path: Path) -> None:
    path = webm(tmp_path / "a.webm", has_pictures=has_pictures)
    assert [item.medium for item in folder_items(tmp_path, labels=False)] == [medium]
    assert medium_of("webm", path.read_bytes, stored=True) == medium
    assert pack(tmp_path, tmp_path / "out") == 0
    assert pack("verify", tmp_path / "out") == 0


def test_the_sound_of_videos(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips/a.mp4", frames(4), "mpeg4")
    write_clip(tmp_path / "clips/b.mp4", frames(4), "mpeg4", sound=True).rename(tmp_path / "clips/c.mp4")
    assert [item.medium for item in folder_items(tmp_path / "clips", labels=False, medium="audio")] == ["audio"] * 2
    assert pack(tmp_path / "clips", tmp_path / "out", "--medium", "audio", "--allow-bad") == 0
    (found,) = members(tmp_path / "out").values()
    assert json.loads(found["json"])["num_samples"] == decode_audio(found["flac"]).samples.shape[1] == 800


def test_of_a_mixed_folder_one_medium_is_packed_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixed"
    write_clip(folder / "a.avi", frames(3))
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    (folder / "c.wav").write_bytes(wav())
    assert pack(folder, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "holds sound files (c.wav) and images (b.png) and videos (a.avi); pack them apart" in message
    assert "give --medium audio or --medium image or --medium video" in message
    for medium, extension in (("audio", "wav"), ("image", "png"), ("video", "avi")):
        assert pack(folder, tmp_path / medium, "--medium", medium) == 0
        (found,) = members(tmp_path / medium).values()
        assert extension in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "{out}", "--medium", "smell"], "--medium smell: unknown; there are audio, image, points, video"),
        (["{folder}", "{out}", "--medium", "video"], "no videos in this folder or below it (looked for avi, mkv, mov,"),
        (["{folder}", "{out}", "--points", "100"], "--points: is for point clouds, and {folder} holds images"),
        (["{folder}/b.png", "{out}", "--tile", "4", "--medium", "image"], "--medium: only with a folder or table"),
        (["{shapes}", "{out}", "--points", "9", "--shard-megabytes", "1"], "--shard-megabytes: the sizes of tiles and"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: str(tmp_path / name) for name in ("folder", "shapes", "out")}
    for name in ("folder", "shapes"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "folder/b.png")
    (tmp_path / "shapes/a.off").write_text(off())
    assert pack(*[argument.format(**places) for argument in arguments]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dicom_without_an_ending(tmp_path: Path) -> None:
    """As scanners and archives write it: names without an ending, or identifiers, beside a DICOMDIR and other files."""
    folder = tmp_path / "study"
    folder.mkdir()
    for name in ("IM000001", "1.2.840.113619.2.5", "DICOMDIR"):
        (folder / name).write_bytes(dicom(STORED, PatientID="17"))
    (folder / "LICENSE").write_text("no image " * 100)
    (folder / "empty").touch()
    found = folder_items(folder, labels=False)
    assert [(item.name, item.group) for item in found] == [("1.2.840.113619.2.5", "17"), ("IM000001", "17")]
    assert pack(folder, tmp_path / "out") == 0
    assert len(Index.open(tmp_path / "out")) == 2


def test_every_medium_is_told_from_the_others() -> None:
    assert file_media() == ("points", "video", "audio", "image")
    asked = [extension for name in file_media() for extension in extensions_of(name, asked=False)]
    shared = {extension for extension in asked if asked.count(extension) > 1}
    assert shared == {"npy", "webm"}, "others are told by their content, which a test shows"
    assert medium_of("exe", bytes) is None


def _with_much_sound(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = container.add_stream("pcm_s16le", rate=48000)
        for picture in frames(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 96000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(noise.encode(frame))
        container.mux(noise.encode())


@pytest.mark.parametrize("medium", ["image", "video", "points", "audio"])
def test_the_room_that_is_said_is_the_room_that_is_taken(
    medium: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most bytes of these files are not stored: thumbnails, sound, pictures of an album; meshes become points."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        path = folder / f"{number:02d}"
        if medium == "image":
            exif = Image.Exif()
            exif[270] = "x" * 60_000
            Image.fromarray(frames(1, seed=number)[0]).save(path.with_suffix(".jpg"), exif=exif)
        elif medium == "video":
            if number < 4:
                _with_much_sound(path.with_suffix(".avi"))
        elif medium == "points":
            path.with_suffix(".off").write_text(off())
        else:
            path.with_suffix(".wav").write_bytes(wav() + b"LIST" + struct.pack("<I", 50_000) + b"INFO" + bytes(49_996))
    more = ["--points", "3000"] if medium == "points" else []
    assert pack(folder, tmp_path / "out", *more) == 0
    said = re.search(r"about ([\d.]+) (kB|MB) in 1 shard", capsys.readouterr().err)
    assert said is not None
    size = (tmp_path / "out/shard-000000.tar").stat().st_size
    assert size / 1.5 < float(said[1]) * {"kB": 1e3, "MB": 1e6}[said[2]] < size * 1.5


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<,4', 'f",
        "{'descr': (<f4}, 'f",
        "{'descr': '<f4', B'f",
        "t'descr':\n'<f4', 'f",
        "{'descr': '<04', 'f",
    ],
)
def test_an_array_with_a_damaged_header_is_left_out(
    header: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NumPy evaluates it as Python, whose errors are of many kinds; the first file of a folder is also asked what it is."""
    folder = tmp_path / "clouds"
    folder.mkdir()
    whole = cloud()
    end = whole.index(b"ortran_order")
    damaged = whole[:10] + header.encode() + whole[end:]
    (folder / "a.npy").write_bytes(damaged)
    (folder / "b.npy").write_bytes(whole)
    assert pack(folder, tmp_path / "out", "--medium", "points") == 1
    assert "left out: a.npy: " in capsys.readouterr().err
    assert len(Index.open(tmp_path / "out")) == 1
    assert not recognises(damaged)


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    assert [item.name for item in folder_items(tmp_path, labels=False)] == ["a.png"]


def test_members_of_no_medium_are_counted_and_not_called_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DICOM files are packed as PNG; in tars that others made they are members like others."""
    (tmp_path / "others").mkdir()
    write_tar(tmp_path / "others/a.tar", [(f"s{number}", {"dcm": dicom(STORED)}) for number in range(3)])
    assert pack("verify", tmp_path / "others") == 0
    assert pack("inspect", tmp_path / "others", "--out", tmp_path / "report") == 0
    assert "bad samples: 0" in capsys.readouterr().out
