"""Paths and URLs in configurations: kept as written, saved and read again, never shown with their credentials."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_platform.config import Config, ConfigError, load_config, to_yaml
from ssl_platform.location import Location, Url, expand_braces, location


class Section(Config):
    """Where things are."""

    place: Location
    places: Location | list[Location] = []
    folder: Path | None = None


def load(tmp_path: Path, text: str, *overrides: str) -> Section:
    (tmp_path / "a.yaml").write_text(text)
    return load_config(Section, tmp_path / "a.yaml", overrides)


@pytest.mark.parametrize(
    "url",
    [
        "https://host:8000/a%20b/shards/", "s3://bucket/x/shard-{000..012}.tar", "gs://b/*.tar", "hf://datasets/a/b@main/x",
        "pipe:cat x.tar", "https://host/x.tar?download=true",
    ],
)  # fmt: skip
def test_urls_stay_as_they_are(tmp_path: Path, url: str) -> None:
    found = load(tmp_path, f"place: '{url}'\nplaces: ['{url}', x]\n", f"folder={tmp_path}")
    assert found.place == Url(url)
    assert found.places == [Url(url), tmp_path / "x"]
    assert dict(load(tmp_path, to_yaml(found))) == dict(found)
    assert load(tmp_path, "place: x", f"place={url}").place == Url(url)
    assert location(url) == Url(url) and str(Url(url)) == url


@pytest.mark.parametrize(
    ("text", "expected"),
    [("x/../y", "y"), ("/abs/z", "/abs/z"), ("file:///abs/a%20b", "/abs/a b"), ("c:/x", "c:/x"), ("s3:/x", "s3:/x")],
)
def test_paths_are_as_before(tmp_path: Path, text: str, expected: str) -> None:
    found = load(tmp_path, f"place: {text}\nfolder: x\n")
    assert found.place == tmp_path.resolve() / expected
    assert found.folder == tmp_path.resolve() / "x"
    assert dict(load(tmp_path, to_yaml(found))) == dict(found)


def test_protocols_are_lower_case() -> None:
    assert location("S3://Bucket/X").full == "s3://Bucket/X"  # type: ignore[union-attr]


def test_other_values_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="place: .*got 3"):
        load(tmp_path, "place: 3")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:hunter2@host/x.tar", "https://***@host/x.tar"),
        ("https://host/x.tar?X-Amz-Signature=abc&versionId=7", "https://host/x.tar?X-Amz-Signature=***&versionId=7"),
        ("https://host/x?sv=1&sig=abc%2F", "https://host/x?sv=***&sig=***"),
        ("ftp://u@host/x", "ftp://***@host/x"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://u:p@h/x.tar", "pipe:curl -H '***' https://***h/x.tar"),
    ],
)
def test_credentials_are_never_shown(tmp_path: Path, url: str, shown: str) -> None:
    found = load(tmp_path, "place: x", f'place="{url}"')
    assert isinstance(found.place, Url) and found.place.full == url
    assert str(found.place) == shown
    for text in (repr(found), to_yaml(found), str(found.place.parent), f"{found.place!r}"):
        assert not any(secret in text for secret in ("hunter2", "abc", "u:p"))


words = st.text("abcdefgh0123456789-_.~%+", min_size=3, max_size=12)


@given(words, words, st.lists(st.tuples(words, words), max_size=3))
def test_no_secret_survives(user: str, password: str, query: list[tuple[str, str]]) -> None:
    url = Url(f"https://<{user}>:<{password}>@host/x.tar?" + "&".join(f"k{key}=<{value}>" for key, value in query))
    secrets = [f"<{text}>" for text in (user, password, *(value for _, value in query))]
    said = f"{url} {url!r} {url.parent} {url / 'y'} " + url.hide(
        f"cannot connect to {url.full}; asked {' '.join(secrets)}"
    )
    assert not any(secret in said for secret in secrets)
    plain = Url("https://host/x.tar?" + "&".join(f"k{key}=<{value}>" for key, value in query))
    assert url.key == plain.key, "credentials do not make it another file"


def test_parts_of_urls() -> None:
    web, bucket = Url("https://host/a/b%20c.tar?sig=1&id=2"), Url("s3://bucket/a/b?c#d.tar")
    assert (web.name, bucket.name) == ("b c.tar", "b?c#d.tar")
    assert web.parent.full == "https://host/a?sig=1&id=2" and bucket.parent.full == "s3://bucket/a"
    assert (web.parent / "d e.tar").full == "https://host/a/d%20e.tar?sig=1&id=2"
    assert (bucket.parent / "d e.tar").full == "s3://bucket/a/d e.tar"
    assert (Url("https://host/a/") / "x").full == "https://host/a/x"
    assert web.key == Url("https://host/a/b%20c.tar?sig=3&id=2").key != Url("https://host/a/b%20c.tar?sig=1&id=3").key


def test_braces() -> None:
    assert list(expand_braces("x-{08..11}.tar")) == ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]
    assert list(expand_braces("x-{8..11}")) == ["x-8", "x-9", "x-10", "x-11"]
    assert list(expand_braces("{a,b}/{0..1}")) == ["a/0", "a/1", "b/0", "b/1"]
    assert list(expand_braces("plain")) == ["plain"]
    for bad, problem in (("{3..1}", "ends before it begins"), ("{x}", "expected a range such as {000..099}")):
        with pytest.raises(ValueError, match=problem):
            list(expand_braces(bad))
