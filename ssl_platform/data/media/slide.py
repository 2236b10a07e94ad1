"""Tiles of whole slides: stored without loss as PNG, or as the place where they lie."""

from ssl_platform.data.items import Item
from ssl_platform.data.media import Content, Options
from ssl_platform.data.media.image import encode
from ssl_platform.data.slides import tiles


def load(item: Item, options: Options) -> Content:
    """One tile; raises Unwanted with the check that it fails, which is no fault of the slide."""
    slide, corner = item.slide, item.corner
    assert slide is not None and corner is not None
    pixels = None if slide.unread else tiles.wanted_tile(item.path, corner, slide)
    if slide.index_only:
        return Content(tiles.reference(corner, slide), tiles.REFERENCE, pixels, tiles.about(slide))
    assert pixels is not None
    return Content(*encode(pixels), pixels, tiles.about(slide))
