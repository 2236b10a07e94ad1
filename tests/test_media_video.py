"""Videos in shards: every frame checked, the same pictures, and nobody's name."""

import io
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_platform.data.media import Content, Options, video
from ssl_platform.data.sources import Item
from tests.clips import NAMES, decoded, frames, write_clip

KINDS = [("avi", "mjpeg"), ("mp4", "libx264"), ("mkv", "mjpeg"), ("mov", "mjpeg"), ("webm", "libvpx-vp9")]


def load(path: Path, keep_metadata: bool = False) -> Content:
    return video.load(Item(path, path.name), Options(keep_metadata=keep_metadata))


@pytest.mark.parametrize(("extension", "codec"), KINDS)
def test_stored_are_the_same_frames_without_names(extension: str, codec: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"clip.{extension}", frames(), codec)
    original = path.read_bytes()
    assert all(name in original for name in NAMES[:3]), "the test's clip names people"
    content = load(path)
    assert content.extension == extension and content == content._replace(data=load(path).data), "the same bytes again"
    assert not [name for name in NAMES if name in content.data]
    expected = decoded(original)
    np.testing.assert_array_equal(decoded(content.data), expected)
    assert content.about["num_frames"] == 20 and content.about["fps"] == 25
    assert (content.about["height"], content.about["width"]) == (48, 64)
    chosen = expected[np.linspace(0, 19, 16).round().astype(int)]  # (16, H, W, 3)
    assert content.values is not None and content.values.dtype == np.uint8
    np.testing.assert_array_equal(content.values, np.moveaxis(chosen, -1, 0).reshape(3, 16, -1))
    assert load(path, keep_metadata=True).data == original


def test_sound_stays_out(tmp_path: Path) -> None:
    import av

    content = load(write_clip(tmp_path / "clip.avi", frames(5), sound=True))
    with av.open(io.BytesIO(content.data)) as container:
        assert [stream.type for stream in container.streams] == ["video"] and not container.metadata.get("title")


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", frames(3))
    assert load(path.rename(tmp_path / "clip.mp4")).extension == "avi"


def test_one_frame_and_few_pixels_are_enough(tmp_path: Path) -> None:
    content = load(write_clip(tmp_path / "clip.avi", frames(1, height=2, width=2)))
    assert content.values is not None and content.values.shape == (3, 1, 4) and content.about["num_frames"] == 1


def test_large_frames_are_measured_at_some_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_MEASURED_PIXELS", 48 * 64 // 4)
    content = load(write_clip(tmp_path / "clip.avi", frames(2)))
    assert content.values is not None and content.values.shape == (3, 2, 24 * 32)


@pytest.mark.parametrize(("extension", "codec"), KINDS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated(extension: str, codec: str, share: float, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"clip.{extension}", frames(), codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"truncated|cannot be (read|decoded)"):
        load(path)


def test_damage_inside_a_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", frames())
    data = bytearray(path.read_bytes())
    data[15_000:17_000] = bytes(2_000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"frame \d+ cannot be decoded"):
        load(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file has zero bytes"),
        (b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n", "not a video: begins with b'#EXTM3U"),
        (b"RIFF\x10\0\0\0AVI nothing", "has no stream of pictures"),
        (b"\x1a\x45\xdf\xa3", "is truncated in its header"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "cannot be read as mp4"),
    ],
)
def test_no_video(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        load(path)
    assert reason in str(error.value)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="has no stream of pictures"):
        load(path)


def test_absurd_headers_take_no_memory(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", frames(2))
    start = b"\xff\xc0\x00\x11\x08"  # of the header of each JPEG, before height and width
    data, size = path.read_bytes(), start + (48).to_bytes(2) + (64).to_bytes(2)
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, start + (16_000).to_bytes(2) * 2))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from ssl_platform.data.media import Options, video; from ssl_platform.data.sources import Item\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: video.load(Item(Path(sys.argv[1]), ''), Options())\n"
        "except ValueError as error: sys.stdout.write(str(error))\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert grown < 256 * 1024, grown\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "frame 0 cannot be decoded" in done.stdout, done.stdout


def test_a_header_of_large_frames_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(ValueError) as error:
        load(write_clip(tmp_path / "clip.mp4", frames(2), "libx264"))
    assert str(error.value) == "its header claims frames of 64 x 48 pixels; at most 3,071 are read"


@pytest.mark.parametrize("width", [50, 70, 98])
def test_widths_that_are_no_multiple(width: int, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames(3, height=34, width=width), "libx264")
    np.testing.assert_array_equal(decoded(load(path).data), decoded(path.read_bytes()))


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", np.zeros((50, 480, 640, 3), np.uint8))
    load(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    twice = write_clip(tmp_path / "long.avi", np.broadcast_to(np.zeros((), np.uint8), (200, 480, 640, 3)))
    assert load(twice).about["num_frames"] == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 60 * 1024  # of 184 MB of pixels


def test_too_long_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="cut it into clips"):
        load(write_clip(tmp_path / "clip.avi", frames(2)))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "clip.avi", frames(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError) as error:
        load(path)
    assert "pip install 'ssl-platform[video]'" in str(error.value)
