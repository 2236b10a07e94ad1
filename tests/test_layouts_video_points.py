"""ssl-pack echonet-dynamic, modelnet40 and shapenet on tiny trees in their layouts, through inspect and verify."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_platform.data.pack import main
from tests.clips import NAMES, TEXT, frames, with_texts, write_clip

OFF = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
OBJ = "mtllib model.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
HEADER = "FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def index(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return about


def samples(folder: Path) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """What the `json` of each sample says, and its other member."""
    for shard in sorted(folder.glob("*.tar")):
        about: dict[str, dict[str, Any]] = {}
        data: dict[str, tuple[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                if extension == "json":
                    about[key] = json.loads(file.read())
                elif extension != "cls":
                    data[key] = extension, file.read()
        for key, found in about.items():
            yield found, *data[key]


def echonet(folder: Path) -> Path:
    for number, name in enumerate(("0X1A", "0X2B", "0X3C")):
        write_clip(folder / "Videos" / f"{name}.avi", frames(6, seed=number, height=112, width=112))
    rows = [
        "0X1A,55.5,20,45,112,112,50,6,TRAIN",
        "0X2B.avi,60,21,52,112,112,50,6,VAL",
        "0X3C,30,80,114,112,112,50,6,TEST",
    ]
    write(folder / "FileList.csv", HEADER + "\n".join(rows) + "\n")
    traces = [f"{name}.avi,1,2,3,4,{frame}" for name in ("0X1A", "0X2B", "0X9Z") for frame in (4, 4, 1, 1)]
    write(folder / "VolumeTracings.csv", "FileName,X1,Y1,X2,Y2,Frame\n" + "\n".join(traces) + "\n")
    return folder


def test_echonet_dynamic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = echonet(tmp_path / "data"), tmp_path / "out"
    assert main(["echonet-dynamic", str(data), str(out)]) == 0
    assert "1 names of VolumeTracings.csv are not in FileList.csv: 0X9Z.avi" in capsys.readouterr().err
    found = {split: list(samples(out / split)) for split in ("train", "val", "test")}
    assert [len(rows) for rows in found.values()] == [1, 1, 1]
    about, extension, clip = found["train"][0]
    wanted = {
        "EF": "55.5",
        "ESV": "20",
        "EDV": "45",
        "FPS": "50",
        "traced_frames": "4;1",
        "num_frames": 6,
        "height": 112,
    }
    assert wanted.items() <= about.items() and about["label"] is None and about["codec"] == "mjpeg"
    assert found["test"][0][0]["traced_frames"] == "" and extension == "avi" and clip[:4] == b"RIFF"
    assert index(out / "train")["statistics"] is not None
    for path in out.rglob("*"):
        if path.is_file():
            contents = path.read_bytes()
            assert not [name for name in (*NAMES, b"0X1A", b"0X2B", b"0X3C") if name in contents], path


def test_echonet_keeps_going_without_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = echonet(tmp_path / "data")
    (data / "Videos" / "0X3C.avi").unlink()
    write_clip(data / "Videos" / "0X4D.avi", frames(2))
    with (data / "FileList.csv").open("a") as table:
        table.write("0X4D,30,80,114,112,112,50,6,TEST\n")
    assert main(["echonet-dynamic", str(data), str(tmp_path / "out")]) == 1
    assert "1 clips of FileList.csv are not in Videos/: 0X3C.avi" in capsys.readouterr().err
    assert index(tmp_path / "out" / "test")["unreadable"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0X1A,55.5,20,45,112,112,50,6,DEV", "line 2: Split is 'DEV', expected TRAIN, VAL or TEST"),
        ("0X1A,high,20,45,112,112,50,6,VAL", "line 2: EF is 'high', expected a number"),
        ("../0X1A,55,20,45,112,112,50,6,VAL", "line 2: FileName '../0X1A' is no file name"),
        ("0X1A,55", "line 2: 2 columns, but the header has 9"),
        ("0X1A,55,20,45,112,112,50,6,", "line 2: Split is '', expected"),
        ("0X1A,nan,20,45,112,112,50,6,VAL", "line 2: EF is 'nan', expected a number"),
        ("0X1A,55,inf,45,112,112,50,6,VAL", "line 2: ESV is 'inf', expected a number"),
        ("", "no row below the header"),
    ],
)
def test_echonet_bad_tables(row: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = echonet(tmp_path / "data")
    write(data / "FileList.csv", HEADER + row + "\n")
    assert main(["echonet-dynamic", str(data), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    write(data / "FileList.csv", "FileName,EF\n0X1A,5\n")
    assert main(["echonet-dynamic", str(data), str(tmp_path / "out")]) == 2
    assert "FileList.csv: line 1: no column 'ESV'" in capsys.readouterr().err


def test_modelnet40_meshes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "test"):
        write(data / f"night_stand/{split}/night_stand_0001.off", OFF.replace("OFF\n", "OFF"))
        write(data / f"sofa/{split}/sofa_0001.off", OFF)
    assert main(["modelnet40", str(data), str(out), "--points", "64"]) == 0
    assert index(out / "train")["label_counts"] == {"night_stand": 1, "sofa": 1} == index(out / "test")["label_counts"]
    assert all(about["num_points"] == 64 and kind == "npy" for about, kind, _ in samples(out / "train"))
    assert len(index(out / "train")["statistics"]["mean"]) == 3
    assert main(["modelnet40", str(data), str(out), "--points", "65"]) == 2
    assert "points" in capsys.readouterr().err, "another number of points is another plan"
    write(data / "sofa/train/sofa_0002.off", "OFF\n1 0 0\n")
    assert main(["modelnet40", str(data), str(tmp_path / "bad"), "--points", "64"]) == 1


def test_modelnet40_resampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("tv_stand_0001", "tv_stand_0002", "bowl_0001"):
        write(data / name.rpartition("_")[0] / f"{name}.txt", "0,0,0,0,0,1\n1,1,1,0,1,0\n")
    write(data / "modelnet40_shape_names.txt", "bowl\ntv_stand\n")
    write(data / "modelnet40_train.txt", "tv_stand_0001\nbowl_0001\n")
    write(data / "modelnet40_test.txt", "tv_stand_0002\n")
    assert main(["modelnet40", str(data), str(out)]) == 0
    assert index(out / "train")["label_counts"] == {"bowl": 1, "tv_stand": 1}
    assert index(out / "test")["label_counts"] == {"tv_stand": 1}
    assert len(index(out / "train")["statistics"]["mean"]) == 6
    write(data / "modelnet40_test.txt", "cup_0002\n")
    assert main(["modelnet40", str(data), str(out)]) == 2
    assert "modelnet40_test.txt: 'cup_0002' is no class of modelnet40_shape_names.txt" in capsys.readouterr().err
    (data / "modelnet40_test.txt").unlink()
    assert main(["modelnet40", str(data), str(out)]) == 2
    assert "modelnet40_test.txt: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["models/model_normalized.obj", "model.obj"])
def test_shapenet_core(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for name in ("02691156/a1", "02691156/a2", "03001627/c1", "03001627/c2"):
        write(data / name / model, OBJ)
    command = ["shapenet", str(data), "--points", "32"]
    assert main([*command[:2], str(tmp_path / "plain"), *command[2:]]) == 0
    assert index(tmp_path / "plain")["label_counts"] == {"02691156": 2, "03001627": 2}
    names = [{"synsetId": "02691156", "name": "airplane,aeroplane"}, {"synsetId": "03001627", "name": "chair"}]
    write(data / "taxonomy.json", json.dumps(names))
    rows = ["1,02691156,1,a1,train", "2,2691156,1,a2,val", "3,03001627,1,c1,train", "4,03001627,1,c9,test"]
    write(data / "all.csv", "id,synsetId,subSynsetId,modelId,split\n" + "\n".join(rows) + "\n")
    assert main([*command[:2], str(tmp_path / "out"), *command[2:]]) == 0
    warnings = capsys.readouterr().err
    assert "all.csv and are left out (--without-splits packs them): 03001627/c2" in warnings
    assert "1 models of" in warnings and "are not in the folder: 03001627/c9" in warnings
    assert index(tmp_path / "out" / "train")["label_counts"] == {"airplane": 1, "chair": 1}
    assert index(tmp_path / "out" / "val")["label_counts"] == {"airplane": 1}
    assert {about["synset"] for about, _, _ in samples(tmp_path / "out" / "train")} == {"02691156", "03001627"}
    assert main([*command[:2], str(tmp_path / "all"), *command[2:], "--without-splits"]) == 0
    assert index(tmp_path / "all")["label_counts"] == {"airplane": 2, "chair": 2}


def test_shapenet_bad_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, command = tmp_path / "data", ["shapenet", str(tmp_path / "data"), str(tmp_path / "out")]
    write(data / "02691156/a1/model.obj", OBJ)
    write(data / "all.csv", "id,split\n")
    assert main(command) == 2
    assert "all.csv: line 1: no column 'synsetId'" in capsys.readouterr().err
    write(data / "all.csv", "synsetId,modelId,split\n1,2,train\n")
    assert main(command) == 2
    assert "all.csv: names none of the 1 models in the folder" in capsys.readouterr().err
    write(data / "taxonomy.json", "[1]")
    assert main(command) == 2
    assert "taxonomy.json: expected a list of entries with synsetId and name" in capsys.readouterr().err


def test_shapenet_as_point_bert_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    (data / "shapenet_pc").mkdir(parents=True)
    for number, name in enumerate(("02691156-a", "02691156-b", "03001627-c")):
        np.save(data / "shapenet_pc" / f"{name}.npy", np.random.default_rng(number).random((50, 3), np.float32))
    for name, train in (("ShapeNet-34", "03001627-c.npy\n"), ("ShapeNet-55", "02691156-a.npy\n03001627-c.npy\n")):
        write(data / name / "train.txt", train)
        write(data / name / "test.txt", "02691156-b.npy\n")
    assert main(["shapenet", str(data), str(tmp_path / "55")]) == 0
    assert index(tmp_path / "55" / "train")["label_counts"] == {"02691156": 1, "03001627": 1}
    assert main(["shapenet", str(data), str(tmp_path / "34"), "--list", "ShapeNet-34"]) == 0
    assert index(tmp_path / "34" / "train")["label_counts"] == {"03001627": 1}
    assert main(["shapenet", str(data), str(tmp_path / "35"), "--list", "ShapeNet-35"]) == 2
    assert "no list ShapeNet-35; give --list, one of ShapeNet-34, ShapeNet-55" in capsys.readouterr().err
    write(data / "ShapeNet-55" / "test.txt", "../secret.npy\n")
    assert main(["shapenet", str(data), str(tmp_path / "55"), "--overwrite"]) == 2
    assert "test.txt: line 1: '../secret.npy', expected SYNSET-MODEL.npy" in capsys.readouterr().err


def test_verify_and_inspect_decode_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, clouds = tmp_path / "clips", tmp_path / "clouds"
    assert main(["echonet-dynamic", str(echonet(tmp_path / "echo")), str(clips), "--without-splits"]) == 0
    for number in range(3):
        write(tmp_path / "net" / "sofa" / "train" / f"sofa_000{number}.off", OFF.replace("1", str(number + 1)))
    write(tmp_path / "net" / "sofa" / "train" / "sofa_0001.off", OFF)
    assert main(["modelnet40", str(tmp_path / "net"), str(clouds), "--without-splits", "--points", "256"]) == 0
    for folder in (clips, clouds):
        assert main(["verify", str(folder)]) == 0, capsys.readouterr()
        assert main(["inspect", str(folder), "--out", str(folder / "page")]) == 0
        page = (folder / "page" / "inspect.html").read_text()
        report = json.loads((folder / "page" / "inspect.json").read_text())
        assert "num_frames" in page if folder == clips else "points" in page
        assert page.count("data:image/") >= min(report["samples"], 3), "a picture of each"
        assert report["bad"]["samples"] == 0
    shard = next(clips.glob("*.tar"))
    damaged = bytearray(shard.read_bytes())
    place = damaged.index(b"movi") + 2000
    damaged[place : place + 2000] = bytes(2000)
    shard.write_bytes(damaged)
    capsys.readouterr()
    assert main(["verify", str(clips)]) == 1
    assert "cannot be decoded" in capsys.readouterr().out


def test_names_are_nowhere_but_in_the_look_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths and metadata full of names: neither shards, index, plan, log, report nor what is drawn holds one."""
    clips = tmp_path / "JaneDoe" / "clips"
    write(
        clips / "FileList.csv",
        HEADER + "JaneDoe1,55.5,20,45,112,112,50,6,TRAIN\nJaneDoe2,50,20,45,112,112,50,6,TRAIN\n",
    )
    write(clips / "VolumeTracings.csv", "FileName,X1,Y1,X2,Y2,Frame\nJaneDoe1.avi,1,2,3,4,1\n")
    for number in (1, 2):
        plain = write_clip(clips / "Videos" / f"JaneDoe{number}.avi", frames(4, number))
        with_texts(plain, "mjpeg").replace(plain)
    clouds = tmp_path / "JaneDoe" / "clouds"
    for number in (1, 2):
        comment = "OFF\n# scanned from Jane Doe by Dr Smith"
        write(clouds / "sofa" / "train" / f"JaneDoe{number}.off", OFF.replace("OFF", comment))
    names = (*NAMES, TEXT, b"JaneDoe", b"Jane")
    for command, folder in (("echonet-dynamic", clips), ("modelnet40", clouds)):
        out, report = tmp_path / f"out-{command}", tmp_path / f"report-{command}"
        capsys.readouterr()
        assert main([command, str(folder), str(out), "--without-splits"]) == 0
        assert main(["verify", str(out)]) == 0
        assert main(["inspect", str(out), "--out", str(report)]) == 0
        said = "".join(capsys.readouterr()).replace("\n", "").encode()
        assert not [name for name in names if name in said]
        files = [path for place in (out, report) for path in place.rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {"shard-000000.tar", "index.json", "pack.json", "inspect.html"}
        assert not [(path.name, name) for path in files for name in names if name in path.read_bytes()]
        assert b"JaneDoe1" in (tmp_path / f"out-{command}.lookup" / "lookup.csv").read_bytes()
