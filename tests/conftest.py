"""What every test gets."""

from collections.abc import Iterator

import pytest

from ssl_platform.log import logger


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """The commands set up the package's logger; later tests capture from it."""
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)
