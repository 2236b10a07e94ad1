"""Regions of a slide as QuPath (GeoJSON) or ASAP (XML) writes them, and how much of each tile lies in them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.slides import asap
from ssl_platform.optional import optional_package

UNNAMED = ""
"""The class of a region that QuPath gave none."""


def read_regions(path: Path, origin: tuple[float, float] = (0, 0)) -> dict[str, Any]:
    """{class: shapely geometry} of the areas in a GeoJSON file, in pixels of level 0; `origin` is added to them.

    A FeatureCollection, a bare list of features, or one feature; Polygon and MultiPolygon (with holes) are areas, of a
    GeometryCollection its areas; points, lines and features without a geometry are passed over, and where nothing is
    left there is no region. ASAP's XML counts from the corner of the whole slide, and knows no origin: see `asap`. Raises
    ValueError that names the file.
    """
    shapely = _shapely()
    if path.suffix.lower() == ".xml":
        return asap.read_xml(path, shapely)
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read as GeoJSON ({reason})") from error
    features = contents.get("features", [contents]) if isinstance(contents, dict) else contents
    areas: dict[str, list[Any]] = {}
    for number, feature in enumerate(features if isinstance(features, list) else [None]):
        try:
            if feature["geometry"] is None:
                continue
            with np.errstate(invalid="ignore"):  # said below
                shape = shapely.geometry.shape(feature["geometry"])
            if not np.isfinite(shapely.get_coordinates(shape)).all():
                raise ValueError("a coordinate is not a finite number")
            parts = asap.polygons(shapely.make_valid(shape), shapely)
            name = _class_name(feature.get("properties") or {})
        except Exception as error:  # shapely raises whatever a wrong nesting makes NumPy raise
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: feature {number} is not a GeoJSON feature with a geometry ({what})") from error
        areas.setdefault(name, []).extend(parts)
    found = {name: shapely.union_all(parts) for name, parts in areas.items() if parts}
    if tuple(origin) != (0, 0):
        found = {name: shapely.affinity.translate(area, *origin) for name, area in found.items()}
    return found


def _class_name(properties: Mapping[str, Any]) -> str:
    """QuPath's classification, an object with a name, or the name alone in older exports."""
    classification = properties.get("classification")
    name = classification.get("name") if isinstance(classification, dict) else classification
    if name is None and isinstance(classification, dict) and isinstance(classification.get("names"), list):
        name = ": ".join(map(str, classification["names"]))
    return str(name) if name is not None else UNNAMED


def union(areas: Mapping[str, Any]) -> Any:
    """All that any class covers."""
    return _shapely().union_all(list(areas.values()))


def share_beyond(areas: Mapping[str, Any], size: tuple[int, int]) -> float:
    """The share of what any class covers that lies outside a slide of this width and height."""
    whole = union(areas)
    inside = _shapely().intersection(whole, _shapely().box(0, 0, *size))
    return 1 - float(inside.area / whole.area) if whole.area else 0.0


def outside(areas: Mapping[str, Any], boxes: NDArray[np.float64]) -> Any:
    """What no class covers of the rectangle around the boxes (N, 4)."""
    return _shapely().box(*boxes[:, :2].min(0), *boxes[:, 2:].max(0)).difference(union(areas))


def region_shares(area: Any, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,): the share of each box (N, 4) x0, y0, x1, y1 that lies in a geometry."""
    shapely = _shapely()
    tiles = shapely.box(*boxes.T)
    found = np.zeros(len(tiles))
    shapely.prepare(area)
    inside = shapely.contains_properly(area, tiles)
    found[inside] = 1.0
    partly = np.flatnonzero(shapely.intersects(area, tiles) & ~inside)
    found[partly] = shapely.area(shapely.intersection(area, tiles[partly])) / shapely.area(tiles[partly])
    return np.clip(found, 0, 1)


def labels(areas: Mapping[str, Any], boxes: NDArray[np.float64], min_share: float) -> Sequence[str | None]:
    """For each box the class of which it holds the largest share, if that is at least `min_share`, else None.

    Regions without a class, and QuPath's classes to be ignored (`Ignore*`), label nothing. Of equal shares, the first
    class by name.
    """
    names = sorted(name for name in areas if name != UNNAMED and not name.endswith("*"))
    if not names:
        return [None] * len(boxes)
    every = np.stack([region_shares(areas[name], boxes) for name in names])  # (classes, N)
    best = every.argmax(0)
    enough = every.max(0) >= max(min_share, 1e-9)
    return [names[place] if share else None for place, share in zip(best.tolist(), enough.tolist(), strict=True)]


def _shapely() -> Any:
    for name in ("shapely.affinity", "shapely.geometry"):
        optional_package(name, "GeoJSON regions need shapely", "slides")
    return optional_package("shapely", "GeoJSON regions need shapely", "slides")
