"""Regions of a slide as ASAP writes them (XML), with the names that Camelyon16 and Camelyon17 give their groups."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TUMOUR = "tumor"
"""The class of the groups that Camelyon draws around metastases."""
_TUMOUR_GROUPS = ("_0", "_1", "tumor", "metastases")
_HOLE_GROUPS = ("_2", "exclusion", "normal")
"""What these hold is no tumour although it lies inside of one."""


def read_xml(path: Path, shapely: Any) -> dict[str, Any]:
    """{class: shapely geometry} of the areas in an annotation file, in pixels of level 0.

    Camelyon's groups of metastases are the class "tumor", without what its groups of holes hold; other groups are
    classes of their own, and annotations in no group have the class "". Points and lines are passed over. Raises
    ValueError that names the file.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(
            f"{path}: cannot be read as ASAP's XML ({getattr(error, 'strerror', None) or error})"
        ) from error
    areas: dict[str, list[Any]] = {}
    holes: list[Any] = []
    for number, annotation in enumerate(root.iter("Annotation")):
        group = annotation.get("PartOfGroup", "None").strip()
        corners = _corners(path, number, annotation)
        if len(corners) < 3:
            continue
        parts = polygons(shapely.make_valid(shapely.Polygon(corners)), shapely)
        if group.lower() in _HOLE_GROUPS:
            holes += parts
        else:
            areas.setdefault(_class(group), []).extend(parts)
    found = {name: shapely.union_all(parts) for name, parts in areas.items() if parts}
    if not found:
        raise ValueError(
            f"{path}: no area in it: expected Annotation elements with at least three Coordinate elements (X, Y), of "
            "another group than holes; delete the file if nothing is drawn in this slide"
        )
    if TUMOUR in found and holes:
        found[TUMOUR] = shapely.difference(found[TUMOUR], shapely.union_all(holes))
    return found


def polygons(shape: Any, shapely: Any) -> list[Any]:
    """The polygons of any geometry, of collections in collections too; empty ones are left out."""
    parts = shapely.get_parts(shape)
    while any(hasattr(part, "geoms") for part in parts):
        parts = shapely.get_parts(parts)
    return [part for part in parts if part.geom_type == "Polygon" and not part.is_empty]


def _class(group: str) -> str:
    if group.lower() in _TUMOUR_GROUPS:
        return TUMOUR
    return "" if group == "None" else group


def _corners(path: Path, number: int, annotation: ElementTree.Element) -> list[tuple[float, float]]:
    found = [(place.get("Order", ""), place.get("X"), place.get("Y")) for place in annotation.iter("Coordinate")]
    try:
        if all(order.isdecimal() for order, _, _ in found):
            found.sort(key=lambda place: int(place[0]))
        corners = [(float(x or ""), float(y or "")) for _, x, y in found]
    except ValueError:
        corners = [(math.nan, math.nan)]
    if not all(math.isfinite(value) for corner in corners for value in corner):
        raise ValueError(f"{path}: annotation {number} has a Coordinate whose X or Y is no number; download it again")
    return corners
