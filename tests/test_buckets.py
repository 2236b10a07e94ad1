"""Shards in buckets: S3 against moto's server, Google's storage against a stand-in of its JSON API, both on loopback."""

import http.server
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

from ssl_platform.data import transfer
from ssl_platform.data.index import Index
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.remote import RemoteSettings
from ssl_platform.data.transfer import RemoteError

SKIN = Path(__file__).parents[1] / "tests/data/skin_tiles"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.02)


def settings(tmp_path: Path) -> RemoteSettings:
    return RemoteSettings(cache_dir=tmp_path / "cache", timeout_seconds=10, retries=1)


def check_all(index: Index) -> None:
    reader, expected = ShardReader(index, 4), ShardReader(Index.open(SKIN), 4)
    assert len(index) == len(expected.index)
    assert all(reader.read(sample) == expected.read(sample) for sample in range(len(index)))


# -- S3 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A client of a real server that holds the skin tiles under s3://tissue/a b/skin."""
    pytest.importorskip("s3fs", reason="s3:// needs s3fs (pip install 'ssl-platform[s3]')")
    server_of = pytest.importorskip("moto.server", reason="the S3 server of the tests is moto[server]'s")
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="tissue")
        for file in SKIN.iterdir():
            client.upload_file(str(file), "tissue", f"a b/skin/{file.name}", {"ACL": "public-read"})
        yield client
        server.stop()


@pytest.mark.parametrize("url", ["skin/", "sk?n/*[0-2].tar"])
def test_s3(bucket: Any, tmp_path: Path, url: str) -> None:
    check_all(Index.open(f"s3://tissue/a b/{url}", settings(tmp_path)))
    assert sorted(path.name for path in (tmp_path / "cache").glob("*/*.tar")) == [
        f"shard-00000{i}.tar" for i in range(3)
    ]


def test_s3_objects_that_change_are_fetched_again(bucket: Any, tmp_path: Path) -> None:
    def fetched() -> bytes:
        ShardReader(Index.open("s3://tissue/a b/skin/shard-000000.tar", settings(tmp_path)), 4).read(0)
        return next((tmp_path / "cache").glob("*/shard-000000.tar")).read_bytes()

    body = bytearray(fetched())
    body[-1] = 1  # of the same size, with another etag
    bucket.put_object(Bucket="tissue", Key="a b/skin/shard-000000.tar", Body=bytes(body), ACL="public-read")
    assert fetched() == body
    bucket.upload_file(str(SKIN / "shard-000000.tar"), "tissue", "a b/skin/shard-000000.tar", {"ACL": "public-read"})


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (
            "s3://tissue/none",
            r"^s3://tissue/none/index.json: there is no such file \(404\) \(1 try\).*ssl-pack --index",
        ),
        ("s3://nobucket/x", r"^s3://nobucket/x/index.json: there is no such file \(404\) \(1 try\)"),
        ("s3://tissue/a b/skin/*.tgz", "no tar matches"),
    ],
)
def test_s3_refusals(bucket: Any, tmp_path: Path, url: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Index.open(url, settings(tmp_path))


def test_s3_out_of_reach(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(RemoteError, match=r"^s3://tissue/x/index.json: .*\(2 tries\). Check the network") as caught:
        Index.open("s3://tissue/x", settings(tmp_path))
    assert "hunter2" not in str(caught.value)


def test_s3_without_credentials(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RemoteError, match="no credentials were found.*1 try.*Check the credentials"):
        Index.open("s3://tissue/a b/skin", settings(tmp_path))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})  # for objects that all may read
    assert len(Index.open("s3://tissue/a b/skin", settings(tmp_path))) == 100


# -- Google ------------------------------------------------------------------------------------------------------------


class Storage(http.server.BaseHTTPRequestHandler):
    """As much of Google's JSON API as reading takes, over the bucket "tissue": no authentication, no faults."""

    folder: Path
    asked: Counter[str]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        path = parts.path.removeprefix("/download").removeprefix("/storage/v1/b/tissue/o")
        if not path.strip("/"):
            names = [str(file.relative_to(self.folder)) for file in sorted(self.folder.rglob("*")) if file.is_file()]
            prefix = query.get("prefix", "")
            items = [self._about(name) for name in names if name.startswith(prefix)]
            self._answer(200, json.dumps({"kind": "storage#objects", "items": items} if items else {}).encode())
            return
        name = unquote(path[1:])
        if not (self.folder / name).is_file():
            self._answer(404, json.dumps({"error": {"code": 404, "message": f"No such object: {name}"}}).encode())
        elif query.get("alt") == "media":
            self.asked[name] += 1
            self._answer(200, (self.folder / name).read_bytes())
        else:
            self._answer(200, json.dumps(self._about(name)).encode())

    def _about(self, name: str) -> dict[str, str]:
        found = (self.folder / name).stat()
        times = dict.fromkeys(("updated", "timeCreated"), "2026-01-01T00:00:00.000Z")
        return {
            "name": name,
            "bucket": "tissue",
            "size": str(found.st_size),
            "generation": str(found.st_mtime_ns),
            **times,
        }

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    pytest.importorskip("gcsfs", reason="gs:// needs gcsfs (pip install 'ssl-platform[gs]')")
    shutil.copytree(SKIN, tmp_path / "objects/a/skin")
    handler = type("Handler", (Storage,), {"folder": tmp_path / "objects", "asked": Counter()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    yield handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("url", ["gs://tissue/a/skin/*.tar", "gcs://tissue/a/skin/"])
def test_google(storage: Counter[str], tmp_path: Path, url: str) -> None:
    check_all(Index.open(url, settings(tmp_path)))
    check_all(Index.open(url, settings(tmp_path)))
    assert [storage[f"a/skin/shard-00000{i}.tar"] for i in range(3)] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"^gs://tissue/none/index.json: there is no such file \(404\)"):
        Index.open("gs://tissue/none", settings(tmp_path))
