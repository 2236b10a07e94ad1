"""Point clouds as they are, meshes as a sample of their surface: npy, float32 (N, 3), or (N, 6) with normals."""

import hashlib
import io
import json
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_platform.data.items import Item
from ssl_platform.data.media import Content, Look, Options
from ssl_platform.optional import optional_package

PLURAL = "point clouds"
MESHES = ("off", "obj", "ply", "stl", "glb")
CLOUDS = ("txt", "xyz", "pts", "npy")
EXTENSIONS = (*MESHES, "xyz", "pts", "npy")
ONLY_IF_ASKED = ("txt",)
STORED = ("npy",)
NUM_POINTS = 8192
"""Of a mesh whose item does not say."""
MAX_BYTES = 2**30
MAX_FACES = 50_000_000
"""Of the whole scene: a glb may show one mesh thousands of times."""
_MAX_ROUNDING = 1e-4
"""Of the shape's largest extent. Coordinates of maps, millions of metres, leave no shape in float32."""
_UNIT_SHARE = 0.9
"""Columns 4 to 6 are normals if so many of them have length 1 (within 5 %); else they are colours, and stay out."""

STATISTICS_OF = {"values": "coordinates"}

Points = NDArray[np.float32]


def load(item: Item, options: Options) -> Content:
    """A cloud, or `item.part[0]` points of a mesh, drawn by area: the same file gives the same points.

    Nothing else of the file is stored. A ply or obj without faces is a cloud.
    """
    size = item.path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{size / 1e9:.1f} GB, at most {MAX_BYTES / 1e9:.1f}")
    data, extension = item.path.read_bytes(), item.extension
    if not data:
        raise ValueError("the file has zero bytes")
    if extension in MESHES:
        num_points = int(item.part[0]) if item.part else NUM_POINTS
        points, about = _from_mesh(data, extension, num_points)
    elif extension in CLOUDS:
        points, about = _with_normals(_array(data) if extension == "npy" else _table(data)), {}
    else:
        raise ValueError(f"'.{extension}' is no point cloud or mesh; read are {', '.join((*MESHES, *CLOUDS))}")
    file = io.BytesIO()
    np.save(file, points)
    return Content(file.getvalue(), "npy", points.T, {"num_points": len(points), **about})


def decode_points(data: bytes) -> Points:
    """The stored cloud (N, 3) or (N, 6); raises ValueError with the reason if it is bad."""
    return _with_normals(_array(data))


def recognises(data: bytes) -> bool:
    """Whether an npy file holds floats in rows of 3 or 6, which no image does."""
    try:
        shape, _, dtype = _header(io.BytesIO(data))
    except ValueError:
        return False
    return dtype.kind == "f" and len(shape) == 2 and shape[1] in (3, 6)


def look(data: bytes, extension: str) -> Look:
    """Three projections side by side."""
    cloud = decode_points(data)
    return Look(torch.from_numpy(picture(cloud)), {"points": len(cloud)}, lambda: cloud.T)


def with_num_points(items: Sequence[Item], num_points: int) -> list[Item]:
    """The items, with so many points to be drawn of each mesh."""
    return [item._replace(part=(num_points,)) if item.extension in MESHES else item for item in items]


def picture(points: Points, side: int = 112) -> NDArray[np.uint8]:
    """(1, side, 3 * side): the cloud from the front (x, y), the side (z, y) and above (x, z), the denser the brighter."""
    xyz = points[:, :3].astype(np.float64)
    low, high = xyz.min(axis=0), xyz.max(axis=0)
    scaled = ((xyz - (low + high) / 2) / ((high - low).max() or 1.0) + 0.5) * (side - 1)  # a cube, its centre kept
    places = scaled.round().astype(np.int64)
    views = []
    for across, up in ((0, 1), (2, 1), (0, 2)):
        counts = np.bincount((side - 1 - places[:, up]) * side + places[:, across], minlength=side * side)
        views.append(np.sqrt(counts / counts.max()).reshape(side, side))
    return np.ascontiguousarray((np.concatenate(views, axis=1)[None] * 255).round().astype(np.uint8))


# -- clouds ------------------------------------------------------------------------------------------------------------


def _header(file: io.BytesIO) -> Any:
    try:
        version = np.lib.format.read_magic(file)
        newer = np.lib.format.read_array_header_2_0
        return (np.lib.format.read_array_header_1_0 if version == (1, 0) else newer)(file)
    except ValueError:
        raise
    except Exception as error:  # NumPy evaluates the header as Python: damage raises SyntaxError, TokenError, TypeError
        reason = str(error) or type(error).__name__
        raise ValueError(f"the header of the array cannot be read: {reason}") from error


def _array(data: bytes) -> NDArray[Any]:
    file = io.BytesIO(data)
    shape, fortran_order, dtype = _header(file)
    if len(shape) != 2 or dtype.kind not in "fiu":
        raise ValueError(
            f"an array of shape {shape} and dtype {dtype} is no point cloud: expected numbers (N, 3 or more)"
        )
    body = data[file.tell() :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"truncated: {len(body)} bytes for an array of shape {shape} and dtype {dtype}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran_order else "C")


def _table(data: bytes) -> NDArray[np.float64]:
    """Rows of numbers between commas, semicolons or spaces; # begins a comment; a first row of one number is the count."""
    lines = re.sub(rb"#[^\n]*", b"", data).replace(b",", b" ").replace(b";", b" ").splitlines()
    rows = [line for line in lines if line.strip()]
    promised = None
    if len(rows) > 1 and len(rows[0].split()) == 1 and len(rows[1].split()) > 1:
        promised, rows = rows[0].strip(), rows[1:]
    if not rows:
        raise ValueError("holds no point")
    try:
        table = np.loadtxt(rows, dtype=np.float64, ndmin=2, encoding="latin-1")
    except ValueError as error:
        raise ValueError(f"not rows of numbers: {str(error).splitlines()[0]}") from None
    if promised is not None and promised != str(len(table)).encode():
        raise ValueError(f"{len(table)} points, but its first line says {promised[:20].decode('latin-1')}")
    return table


def _with_normals(table: NDArray[Any]) -> Points:
    """Coordinates, and normals where the table has them; further columns stay out."""
    if len(table) == 0:
        raise ValueError("holds no point")
    if table.shape[1] < 3:
        raise ValueError(f"rows of {table.shape[1]} numbers; expected x, y, z and perhaps a normal")
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(table[:, 3:6].astype(np.float64), axis=1) if table.shape[1] >= 6 else np.zeros(1)
        has_normals = (np.abs(lengths - 1) < 0.05).mean() >= _UNIT_SHARE
    return _as_stored(table[:, : 6 if has_normals else 3])


def _as_stored(table: NDArray[Any]) -> Points:
    """float32; raises ValueError if that cannot hold the points, or not tell apart what makes their shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        points = np.ascontiguousarray(table, dtype=np.float32)
    if bad := int((~np.isfinite(points).all(axis=1)).sum()):
        raise ValueError(f"{bad} of {len(points)} points are not finite (nan, inf, or above 3.4e38)")
    coordinates = table[:, :3].astype(np.float64)
    largest, extent = float(np.abs(coordinates).max()), float(np.ptp(coordinates, axis=0).max())
    if extent > 0 and largest * 2.0**-24 > _MAX_ROUNDING * extent:
        raise ValueError(
            f"coordinates up to {largest:g} of a shape of {extent:g}: float32 would round its points by more than "
            f"{_MAX_ROUNDING:g} of it; subtract the same offset from all points first"
        )
    return points


# -- meshes ------------------------------------------------------------------------------------------------------------


def _from_mesh(data: bytes, extension: str, num_points: int) -> tuple[Points, dict[str, int]]:
    _check_counts(data, extension)
    vertices, faces = _triangles(data, extension)
    if not len(vertices):
        raise ValueError("holds no point")
    if not len(faces):
        if extension in ("ply", "obj"):
            return _with_normals(vertices), {}
        raise ValueError("has no face, so no surface to sample")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"a face names point {int(faces.max())} of {len(vertices)}")
    corners = vertices[faces]  # (F, 3, 3)
    if not np.isfinite(corners).all():
        raise ValueError("a corner of a face is not finite (nan or inf)")
    seed = int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "little")
    with np.errstate(over="ignore"):
        points = sample_surface(corners, num_points, np.random.default_rng(seed))
    return _as_stored(points), {"num_faces": len(faces)}


def sample_surface(corners: NDArray[np.float64], num_points: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(num_points, 3), uniform over the area of triangles (F, 3, 3); raises ValueError if they have none."""
    size = np.abs(corners - corners[0, 0]).max()
    scaled = (corners - corners[0, 0]) / (size or 1.0)  # areas of very small or large shapes would under- or overflow
    a, b = scaled[:, 1] - scaled[:, 0], scaled[:, 2] - scaled[:, 0]
    ends = np.cumsum(np.linalg.norm(np.cross(a, b), axis=1))
    if not ends[-1] > 0:
        raise ValueError("its faces have no area")
    chosen = np.searchsorted(ends, rng.random(num_points) * ends[-1], side="right").clip(max=len(ends) - 1)
    u, v = rng.random((2, num_points, 1))
    outside = u + v > 1  # the other half of the parallelogram is folded back
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    drawn: NDArray[np.float64] = corners[0, 0] + size * (scaled[chosen, 0] + u * a[chosen] + v * b[chosen])
    return drawn


def _triangles(data: bytes, extension: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Vertices (V, 3), with normals (V, 6) where there are no faces, and faces (F, 3). No other file is read."""
    trimesh = import_trimesh()
    if extension == "off":  # files of ModelNet40 begin with "OFF490 518 0", which some versions do not read
        data = re.sub(rb"\A\s*OFF(?=[\d ])", b"OFF\n", data)
    elif extension == "obj":  # materials name other files; the shape does not need them
        data = re.sub(rb"(?m)^[ \t]*(mtllib|usemtl)\b[^\n]*", b"", data)
    try:
        scene = trimesh.load_scene(io.BytesIO(data), file_type=extension, process=False, skip_materials=True)
        shown = [scene.graph[node][1] for node in scene.graph.nodes_geometry]
        if sum(len(getattr(scene.geometry[name], "faces", ())) for name in shown) > MAX_FACES:
            raise ValueError(f"more than {MAX_FACES:,} faces")
        parts = scene.dump()
    except Exception as error:  # damaged bytes make the parsers raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot be read as {extension}: {reason[:200]}") from error
    meshes = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not meshes:
        clouds = [np.asarray(part.vertices) for part in parts if hasattr(part, "vertices")]
        return np.concatenate(clouds or [np.zeros((0, 3))]), np.zeros((0, 3), np.int64)
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [np.asarray(mesh.faces) + start for mesh, start in zip(meshes, starts, strict=False)]
    return np.concatenate([np.asarray(mesh.vertices, np.float64) for mesh in meshes]), np.concatenate(faces)


def import_trimesh() -> Any:
    """trimesh; raises ValueError with the fix if it is not installed."""
    return optional_package("trimesh", "meshes need trimesh", "points")


def _check_counts(data: bytes, extension: str) -> None:
    """Raises ValueError if a header claims more than the file's bytes can hold, before memory is taken for it."""
    counts: list[int] = []
    if extension == "off":
        header = re.sub(rb"#[^\n]*", b"", data[:4096])
        found = re.match(rb"\s*C?OFF\s*(\d+)\s+(\d+)", header)
        if found is None:
            raise ValueError(f"cannot be read as off: expected OFF and the counts, not {data[:20]!r}")
        counts = [int(number) for number in found.groups()]
        if sum(counts) > len(data.splitlines()):
            raise ValueError(f"truncated: its header claims {sum(counts):,} points and faces, a line each")
    elif extension == "ply":
        header = data[: data.find(b"end_header") + 1][:65536]
        counts = [int(number) for number in re.findall(rb"(?m)^\s*element\s+\S+\s+(\d+)", header)]
    elif extension == "stl" and len(data) >= 84 and not data.lstrip().startswith(b"solid"):
        counts = [50 * struct.unpack("<I", data[80:84])[0]]
    elif extension == "glb":
        counts = _glb_counts(data)
    if counts and max(counts) > len(data):
        raise ValueError(f"truncated, or a false header: it claims {max(counts):,} elements in {len(data):,} bytes")


def _glb_counts(data: bytes) -> list[int]:
    try:
        magic, _, _, length, kind = struct.unpack("<4sIII4s", data[:20])
        tree = json.loads(data[20 : 20 + length])
        assert magic == b"glTF" and kind == b"JSON"
        if any("uri" in entry for entry in [*tree.get("buffers", []), *tree.get("images", [])]):
            raise ValueError("names other files; only a glb that holds everything is read")
        return [int(accessor["count"]) for accessor in tree.get("accessors", [])] + [len(tree.get("nodes", []))]
    except (
        struct.error,
        AssertionError,
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        RecursionError,
    ) as error:
        raise ValueError(f"cannot be read as glb: {str(error) or type(error).__name__}") from error
