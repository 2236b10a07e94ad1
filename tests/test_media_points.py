"""Point clouds in shards: clouds as they are, meshes as points drawn by area, bad files by their reason."""

import builtins
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ssl_platform.data.items import Item
from ssl_platform.data.media import Content, Options, points

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 2) for z in (0, 3)])
_SIDES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
TRIANGLES = np.array([corners for a, b, c, d in _SIDES for corners in ([a, b, c], [a, c, d])])  # a box of 1 x 2 x 3
PLY = "ply\nformat {}\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n"


def load(path: Path, num_points: int = 1000) -> Content:
    return points.load(Item(path, path.name, part=(num_points,)), Options())


def stored(content: Content) -> NDArray[np.float32]:
    assert content.extension == "npy"
    array: NDArray[np.float32] = np.load(io.BytesIO(content.data), allow_pickle=False)
    return array


def reason(folder: Path, name: str, data: str | bytes) -> str:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(ValueError) as error:
        load(folder / name)
    return str(error.value)


def off(glued: bool = False) -> str:
    rows = [f"{a} {b} {c}" for a, b, c in CORNERS] + [f"3 {a} {b} {c}" for a, b, c in TRIANGLES]
    return "\n".join(["OFF8 12 0" if glued else "OFF\n8 12 0", *rows, ""])


@pytest.mark.parametrize("extension", points.MESHES)
def test_a_mesh_becomes_points_of_its_surface(extension: str, tmp_path: Path) -> None:
    import trimesh

    path = tmp_path / f"box.{extension}"
    trimesh.Trimesh(CORNERS, TRIANGLES, process=False).export(path)
    content = load(path, 6000)
    cloud = stored(content)
    assert cloud.shape == (6000, 3) and cloud.dtype == np.float32
    assert content.about == {"num_points": 6000, "num_faces": 12} and content.data == load(path, 6000).data
    assert content.values is not None and content.values.shape == (3, 6000)
    on_side = np.isclose(cloud, 0, atol=1e-6) | np.isclose(cloud, [1, 2, 3], atol=1e-6)  # (N, 3)
    assert on_side.any(axis=1).all()
    areas = np.array([6, 3, 2]) / 11  # of the sides across x, y, z
    np.testing.assert_allclose(on_side.mean(axis=0), areas, atol=0.03)
    np.testing.assert_allclose(cloud.mean(axis=0), [0.5, 1, 1.5], atol=0.05)


def test_points_are_uniform_inside_a_triangle() -> None:
    corners = np.array([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    drawn = points.sample_surface(corners, 20_000, np.random.default_rng(0))
    inside = (drawn >= 0).all() and (drawn[:, 0] + drawn[:, 1] <= 1 + 1e-12).all()
    assert inside and np.allclose(drawn.mean(axis=0), [1 / 3, 1 / 3, 0], atol=0.01)
    assert abs((drawn[:, :2].sum(axis=1) < 0.5).mean() - 0.25) < 0.015, "a quarter of the area"


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30])
def test_no_scale_is_too_small_or_large(scale: float) -> None:
    drawn = points.sample_surface(CORNERS[TRIANGLES] * scale, 100, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.max(axis=0), np.array([1, 2, 3]) * scale, rtol=0.2)


def test_a_glued_first_line(tmp_path: Path) -> None:
    (tmp_path / "plain.off").write_text(off())
    (tmp_path / "glued.off").write_text(off(glued=True))
    assert load(tmp_path / "glued.off").about == load(tmp_path / "plain.off").about
    assert np.allclose(stored(load(tmp_path / "glued.off", 4000)).mean(axis=0), [0.5, 1, 1.5], atol=0.05)


def test_materials_are_not_followed(tmp_path: Path) -> None:
    shape = "v 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl a\nf 1 2 3\n"
    (tmp_path / "trap.mtl").write_text("newmtl a\nmap_Kd trap.png\n")
    (tmp_path / "a.obj").write_text("mtllib trap.mtl\n" + shape)
    opened, real = [], builtins.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            builtins, "open", lambda file, *rest, **more: opened.append(str(file)) or real(file, *rest, **more)
        )
        assert load(tmp_path / "a.obj").about["num_faces"] == 1
    assert not [name for name in opened if "trap" in name]


@pytest.mark.parametrize(
    ("name", "text", "shape"),
    [
        ("a.txt", "0,0,0,0,0,1\n1,1,1,0,1,0\n", (2, 6)),
        ("colours.txt", "0 0 0 255 0 0\n1 1 1 3 4 5\n", (2, 3)),
        ("a.xyz", "# x y z\n0 0 0\n\n1 1 1\n1 2 3\n", (3, 3)),
        ("counted.pts", "2\n0 0 0 9\n1 1 1 9\n", (2, 3)),
        ("a.ply", PLY.format("ascii 1.0", 2) + "end_header\n0 0 0\n1 1 1\n", (2, 3)),
        ("a.obj", "v 0 0 0\nv 1 1 1\n", (2, 3)),
    ],
)
def test_clouds_are_taken_as_they_are(name: str, text: str, shape: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    cloud = stored(load(tmp_path / name))
    assert cloud.shape == shape and cloud.dtype == np.float32
    np.testing.assert_array_equal(cloud[:2, :3], [[0, 0, 0], [1, 1, 1]])
    if shape[1] == 6:
        np.testing.assert_array_equal(cloud[:, 3:], [[0, 0, 1], [0, 1, 0]])


def test_an_offset_that_float32_holds_is_no_error(tmp_path: Path) -> None:
    for text in ("1000 0 0\n1001 0 0\n", "5 5 5\n", "7 7 7\n7 7 7\n"):
        (tmp_path / "a.xyz").write_text(text)
        assert stored(load(tmp_path / "a.xyz"))[0, 0] == float(text.split()[0])


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int32"])
def test_arrays(dtype: str, tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(12).reshape(4, 3).astype(dtype))
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(stored(load(tmp_path / "a.npy")), array.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.off", "", "the file has zero bytes"),
        ("a.off", "OFX\n1 2\n", "expected OFF and the counts"),
        ("a.off", "OFF\n999999999999 1 0\n0 0 0\n", "truncated: its header claims 1,000,000,000,000 points and faces"),
        ("a.off", off()[:-60], "truncated: its header claims 20 points and faces"),
        ("a.off", "OFF\n3 0 0\n0 0 0\n0 1 0\n1 0 0\n", "has no face, so no surface to sample"),
        ("a.off", "OFF\n3 1 0\nnan 0 0\n0 1 0\n1 0 0\n3 0 1 2\n", "a corner of a face is not finite"),
        ("a.off", "OFF\n3 1 0\n1e300 0 0\n0 1e300 0\n1 0 0\n3 0 1 2\n", "points are not finite"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n", "its faces have no area"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "cannot be read as off"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nf 1 2 9\n", "cannot be read as obj"),
        ("a.obj", "nothing here\n", "holds no point"),
        ("a.ply", PLY.format("binary_little_endian 1.0", 99_999_999_999) + "end_header\n0", "it claims 99,999,999,999"),
        ("a.ply", PLY.format("binary_little_endian 1.0", 9) + "end_header\n0", "cannot be read as ply"),
        ("a.stl", bytes(80) + struct.pack("<I", 2**31) + bytes(50), "or a false header: it claims"),
        ("a.glb", b"glTF", "cannot be read as glb"),
        ("a.xyz", "a b c\n", "not rows of numbers"),
        ("a.xyz", "0 0 0\n1 1\n", "not rows of numbers: the number of columns changed"),
        ("a.xyz", "0 0 nan\n1 1 1\n", "1 of 2 points are not finite"),
        ("a.xyz", "0 0\n", "rows of 2 numbers"),
        (
            "a.xyz",
            "5e6 5e6 0\n5000000.02 5e6 0.01\n",
            "coordinates up to 5e+06 of a shape of 0.02: float32 would round",
        ),
        (
            "a.off",
            "OFF\n3 1 0\n1e9 0 0\n1000000001 0 0\n1e9 1 0\n3 0 1 2\n",
            "subtract the same offset from all points",
        ),
        ("a.xyz", "# nothing\n", "holds no point"),
        ("a.pts", "3\n0 0 0\n1 1 1\n", "2 points, but its first line says 3"),
        ("a.npy", b"hello there", "magic string"),
        ("a.gltf", "{}", "'.gltf' is no point cloud or mesh; read are off, obj"),
    ],
)
def test_bad_files(name: str, text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert expected in reason(tmp_path, name, text)


def glb(tree: dict[str, Any]) -> bytes:
    text = json.dumps({"asset": {"version": "2.0"}, **tree}).encode()
    text += b" " * (-len(text) % 4)
    return struct.pack("<4sIII4s", b"glTF", 2, 20 + len(text), len(text), b"JSON") + text


def test_a_glb_that_claims_or_names_others(tmp_path: Path) -> None:
    accessors = [{"componentType": 5126, "count": 10**12, "type": "VEC3"}]
    mesh = {"accessors": accessors, "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}]}
    assert "it claims 1,000,000,000,000 elements" in reason(tmp_path, "a.glb", glb(mesh))
    outside = {"buffers": [{"byteLength": 4, "uri": "../secret.bin"}]}
    assert "names other files" in reason(tmp_path, "a.glb", glb(outside))


def test_bad_arrays(tmp_path: Path) -> None:
    def saved(array: NDArray[Any]) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    assert "truncated: 45 bytes" in reason(tmp_path, "a.npy", saved(np.zeros((4, 3), np.float32))[:-3])
    assert "is no point cloud" in reason(tmp_path, "a.npy", saved(np.array([{}], dtype=object)))
    assert "is no point cloud" in reason(tmp_path, "a.npy", saved(np.zeros((2, 3, 4))))
    assert "holds no point" in reason(tmp_path, "a.npy", saved(np.zeros((0, 3))))
    absurd = saved(np.zeros((4, 3), np.float32)).replace(b"(4, 3), }      ", b"(4000000000, 3)")
    assert "truncated" in reason(tmp_path, "a.npy", absurd.replace(b"(4000000000, 3)", b"(99999999, 3),}"))


def test_too_large_a_file_or_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "MAX_FACES", 11)
    assert "more than 11 faces" in reason(tmp_path, "a.off", off())
    monkeypatch.setattr(points, "MAX_BYTES", 10)
    assert "at most" in reason(tmp_path, "a.off", off())


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    assert "pip install 'ssl-platform[points]'" in reason(tmp_path, "a.off", off())


def test_a_picture_shows_three_sides() -> None:
    cloud = np.zeros((100, 3), np.float32)
    cloud[:, 1] = np.linspace(0, 1, 100)  # a line up
    drawn = points.picture(cloud, side=20)
    assert drawn.shape == (1, 20, 60) and drawn.dtype == np.uint8
    front, side, above = np.split(drawn[0], 3, axis=1)
    assert (front.any(axis=0).sum(), front.any(axis=1).sum()) == (1, 20)
    assert (side.any(axis=0).sum(), side.any(axis=1).sum()) == (1, 20)
    assert (above > 0).sum() == 1
    assert points.picture(np.zeros((1, 3), np.float32)).max() == 255, "a single point is drawn too"


def test_clouds_are_told_from_images() -> None:
    def is_cloud(shape: tuple[int, ...], dtype: str) -> bool:
        file = io.BytesIO()
        np.save(file, np.zeros(shape, dtype))
        return points.recognises(file.getvalue())

    assert is_cloud((5, 3), "float32") and is_cloud((5, 6), "float32")
    assert not is_cloud((5, 3), "uint8") and not is_cloud((3, 5, 5), "float32") and not is_cloud((5, 4), "float32")
    assert not points.recognises(b"nothing")
