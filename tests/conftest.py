"""What every test gets."""

import secrets
from collections.abc import Iterator

import pytest
from hypothesis import settings

from ssl_platform.data import identity
from ssl_platform.log import logger

settings.register_profile("any machine", deadline=None)  # a busy one is no failure
settings.load_profile("any machine")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: files made at collection may hold the time, and ids must agree in all processes."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="session")
def one_salt() -> Iterator[None]:
    """The order of a pack follows from its salt: with a new one each time, what lies in which shard would be chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "_new_salt", lambda: bytes(range(32)))
        yield


@pytest.fixture
def new_salts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: every data set has a salt of its own."""
    monkeypatch.setattr(identity, "_new_salt", lambda: secrets.token_bytes(32))


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """The commands set up the package's logger; later tests capture from it."""
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)
