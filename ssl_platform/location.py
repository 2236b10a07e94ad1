"""Where data lies: a path, or a URL that stays as it was written and is never shown with its credentials."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticSerializationUnexpectedValue, core_schema

HIDDEN = "***"
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|pipe:", re.IGNORECASE)
_URL_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]+://[^\s'\"<>()]+", re.IGNORECASE)
_SHOWN = {"download", "raw", "alt", "version", "versionid", "generation", "id", "ref", "format"}
"""Keys of a query whose values are no secrets; the others may sign it."""
_SIGNING = re.compile(
    r"x-(amz|goog|oss)-.*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|(access_)?token"
    r"|sv|ss|sr|srt|sp|spr|se|st|sig|skoid|sktid|skt|ske|sks|skv|sdd",
    re.IGNORECASE,
)
"""Keys of a query that change with every signing, and not with what the URL means."""
_SECRETS_OF_A_COMMAND = re.compile(
    r"(?i)(?<=://)[^\s/@]+@|(authorization|token|secret|passw\w*|key)[=: ]+((bearer|basic) )?[^\s'\"]+"
)


@dataclass(frozen=True)
class Url:
    """A URL that fsspec knows, or WebDataset's `pipe:COMMAND`. `str` is for people, `full` for the file system."""

    full: str = field(repr=False)

    def __str__(self) -> str:
        if self.protocol == "pipe":
            return _SECRETS_OF_A_COMMAND.sub(HIDDEN, self.full)
        parts = urlsplit(self.full)
        host = HIDDEN + "@" + parts.netloc.rpartition("@")[2] if "@" in parts.netloc else parts.netloc
        return urlunsplit(parts._replace(netloc=host, query=_query(parts.query, hide=True)))

    __repr__ = __str__

    @property
    def protocol(self) -> str:
        return self.full.partition(":")[0].lower()

    @property
    def name(self) -> str:
        """The last part of its path."""
        if self.protocol == "pipe":
            return f"{self.key}.tar"
        name = (
            urlsplit(self.full).path.rstrip("/").rpartition("/")[2] if self._has_query else self.full.rpartition("/")[2]
        )
        return unquote(name) if self._has_query else name

    @property
    def parent(self) -> "Url":
        """The folder that it is in, with its query (which may sign the whole folder)."""
        if self.protocol == "pipe":
            return self
        if not self._has_query:
            return Url(self.full.rpartition("/")[0])
        parts = urlsplit(self.full)
        return Url(urlunsplit(parts._replace(path=parts.path.rpartition("/")[0])))

    def __truediv__(self, name: str) -> "Url":
        if self.protocol == "pipe":  # its output is its one shard
            return self
        if not self._has_query:
            return Url(f"{self.full.rstrip('/')}/{name}")
        parts = urlsplit(self.full)
        return Url(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}")))

    @property
    def key(self) -> str:
        """16 letters that are the same for the same place, whoever signs it and whenever."""
        return hashlib.blake2b(self.resolve().full.encode(), digest_size=8).hexdigest()

    def resolve(self) -> "Url":
        """The same for the same place, as of paths: without what signs it."""
        if self.protocol == "pipe":
            return self
        parts = urlsplit(self.full)
        kept = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=_query(parts.query, hide=False))
        return Url(urlunsplit(kept).rstrip("/"))

    @property
    def server(self) -> str:
        """Its protocol and host or bucket, to be shown."""
        return "pipe:" if self.protocol == "pipe" else "/".join(str(self).split("/")[:3])

    @property
    def secrets(self) -> list[str]:
        """The parts of it that must not be shown."""
        if self.protocol == "pipe":
            return [found.group() for found in _SECRETS_OF_A_COMMAND.finditer(self.full)]
        parts = urlsplit(self.full)
        user = parts.netloc.rpartition("@")[0]
        values = [item.partition("=")[2] for item in parts.query.split("&") if not _is_shown(item)]
        texts = [user, *user.split(":", 1), *values]
        return sorted(
            {form for text in texts for form in (text, unquote(text)) if len(form) > 2}, key=len, reverse=True
        )

    def hide(self, text: str) -> str:
        """`text`, which somebody else wrote about this URL, without credentials: its own, or of where it was sent on to."""
        text = text.replace(self.full, str(self))
        text = _URL_IN_TEXT.sub(lambda found: _without_credentials(found.group()), text)
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return text

    @property
    def _has_query(self) -> bool:
        """Whether a question mark begins a query, as in the protocols of the web; in a bucket it is a letter."""
        return self.protocol in ("http", "https")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = core_schema.no_info_after_validator_function(_validated, core_schema.str_schema())
        return core_schema.json_or_python_schema(
            json_schema=text,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), text]),
            serialization=core_schema.plain_serializer_function_ser_schema(_shown),
        )


Location = Annotated[Url | Path, Field(union_mode="left_to_right")]
"""The type of a configuration's field that holds a path or a URL. Saved configurations hold no credentials of URLs."""


def is_url(text: str) -> bool:
    """Whether a text is a URL of something that is not on this machine's file system."""
    return _URL.match(text) is not None and local(text) == text


def local(text: str) -> str:
    """A path without `file://`."""
    return unquote(text[7:]) if text[:8].lower() == "file:///" else text


def location(text: "str | Path | Url") -> "Path | Url":
    """The path or URL that a text stands for."""
    if isinstance(text, Path | Url):
        return text
    return _validated(text) if is_url(text) else Path(local(text))


def expand_braces(text: str) -> Iterator[str]:
    """ "x-{000..002}.tar" or "x-{a,b}.tar" as the texts it stands for, in order; raises ValueError for a bad range."""
    pieces = re.split(r"\{([^{}]*)\}", text)
    choices = [list(_choices(piece)) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ("".join(chosen) for chosen in product(*choices))


def _choices(inside: str) -> Iterator[str]:
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if limits is None:
        if "," not in inside:
            raise ValueError(f"{{{inside}}}: expected a range such as {{000..099}} or a list such as {{a,b}}")
        yield from inside.split(",")
        return
    first, last = limits.groups()
    if int(last) < int(first):
        raise ValueError(f"{{{inside}}}: the range ends before it begins")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{width}d}"


def _validated(text: str) -> Url:
    if not is_url(text):
        raise ValueError("no URL")
    protocol, colon, rest = text.partition(":")
    return Url(protocol.lower() + colon + rest)


def _shown(value: Any) -> str:
    if not isinstance(value, Url):  # of a union's members, another one's
        raise PydanticSerializationUnexpectedValue("no URL")
    return str(value)


def _without_credentials(text: str) -> str:
    try:
        return str(Url(text))
    except ValueError:  # urlsplit's, for what only looks like a URL
        return HIDDEN


def _is_shown(item: str) -> bool:
    key, equals, _ = item.partition("=")
    return not equals or key.lower() in _SHOWN


def _query(query: str, *, hide: bool) -> str:
    """A query with its secret values hidden, or without the keys that sign it."""
    items = [item for item in query.split("&") if item]
    if hide:
        items = [item if _is_shown(item) else f"{item.partition('=')[0]}={HIDDEN}" for item in items]
    else:
        items = [item for item in items if not _SIGNING.fullmatch(item.partition("=")[0])]
    return "&".join(items)
