"""Videos in shards: every frame checked, the same pictures, and nobody's name."""

import io
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_platform.data.items import Item
from ssl_platform.data.matroska import count_frames
from ssl_platform.data.media import Content, Options, video
from ssl_platform.data.video_packets import cleaners
from tests.clips import NAMES, TEXT, decoded, frames, with_texts, write_clip

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


def packets(data: bytes) -> list[tuple[int | None, bytes]]:
    import av

    with av.open(io.BytesIO(data)) as container:
        return [(packet.pts, bytes(packet)) for packet in container.demux(video=0) if packet.size]


TEXTED = [
    ("avi", "mjpeg"), ("mov", "mjpeg"), ("mp4", "libx264"), ("mkv", "libx264"), ("avi", "libx264"), ("mp4", "libx265"),
    ("mkv", "libx265"), ("mp4", "libsvtav1"), ("webm", "libsvtav1"), ("avi", "mpeg4"), ("mp4", "mpeg4"),
    ("mkv", "mpeg2video"),
]  # fmt: skip


@pytest.mark.parametrize(("extension", "codec"), TEXTED)
def test_texts_among_the_pictures_are_not_stored(extension: str, codec: str, tmp_path: Path) -> None:
    plain = write_clip(tmp_path / f"clip.{extension}", frames(6, height=128, width=128), codec)
    path = with_texts(plain, codec)
    data = path.read_bytes()
    assert data.count(TEXT) >= 5, "the test's clip names people inside its packets"
    content = load(path)
    assert content.extension == extension and TEXT not in content.data
    assert not re.search(rb"x264\.html|x265|options:", content.data)
    np.testing.assert_array_equal(decoded(content.data), decoded(data))
    assert packets(content.data) == packets(load(plain).data), "all that was added is gone, and nothing else"
    path.write_bytes(content.data)
    assert packets(load(path).data) == packets(content.data), "what is clean stays as it is, to the byte"


def test_pictures_may_begin_anywhere_and_come_in_fields(tmp_path: Path) -> None:
    """What FFmpeg decodes by stays: points to begin at, x264's number; interlaced pictures."""
    import av

    path = tmp_path / "clip.mkv"
    for options in ({"intra-refresh": "1", "g": "5"}, {"x264-params": "interlaced=1"}, {"x264-params": "lossless=1"}):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={**options, "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = (
                128,
                128,
                "yuv444p" if "lossless" in str(options) else "yuv420p",
            )
            for picture in frames(20, height=128, width=128):
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            container.mux(stream.encode())
        content = load(path)
        np.testing.assert_array_equal(decoded(content.data), decoded(path.read_bytes()))
        assert b"x264 - core" in content.data and b"options:" not in content.data


def test_messages_of_h264_are_an_allow_list() -> None:
    found = cleaners("h264", b"")
    assert found is not None
    point, x264 = b"\6\1\x80", b"\5\x20" + bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")
    unit = b"\6" + point + b"\4\6Jane\0\0" + x264 + b"x264 - core 148" + b"\0" + b"\x80"
    picture = b"\x65\x88\x84\0\x21"
    clean = found[0](b"\0\0\1" + unit + b"\0\0\1" + picture + b"\0\0\1\x0c\xff\x80")
    kept = b"\6" + point + x264 + b"x264 - core 148\0\x80"
    assert clean == b"\0\0\0\1" + kept + b"\0\0\0\1" + picture, "filler and what is not known go"
    with_lengths = cleaners("h264", b"\1\x64\0\x28\xff")
    assert with_lengths is not None
    with pytest.raises(ValueError, match="not made of whole units"):
        with_lengths[0](b"\0\0\0\x09\x65\x88")


def test_two_fields_of_mjpeg_stay_and_a_thumbnail_goes() -> None:
    found = cleaners("mjpeg", b"")
    assert found is not None

    def jpeg(height: int, seed: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(frames(1, seed, height, 32)[0]).save(file, format="JPEG", comment=TEXT)
        data = file.getvalue()
        return data[:2] + b"\xff\xe0\0\x10AVI1\1\0" + bytes(8) + data[2:]

    first, second, thumbnail = jpeg(16, 0), jpeg(16, 1), jpeg(8, 2)
    cleaned = [found[0](field) for field in (first, second)]
    assert all(TEXT not in field and b"AVI1\1" in field for field in cleaned)
    assert found[0](first + bytes(3) + second + thumbnail + TEXT) == b"".join(cleaned)
    assert found[0](first + thumbnail) == cleaned[0]
    assert found[0](first[:-2]) == cleaned[0], "a frame without its end mark is given one"
    with pytest.raises(ValueError, match="ends within a header"):
        found[0](first[:30])


def test_a_codec_that_may_hold_anything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its codec theora may hold texts .* \(ffmpeg -i IN -c:v ffv1 OUT.mkv\)"):
        cleaners("theora", b"")
    assert cleaners("vp9", b"") is None


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


@pytest.mark.parametrize(("extension", "codec"), [("mkv", "mjpeg"), ("mkv", "mpeg4"), ("webm", "libvpx-vp9")])
def test_damage_never_loses_frames_of_matroska(extension: str, codec: str, tmp_path: Path) -> None:
    """Where blocks and clusters say what they are, FFmpeg goes on behind damage, with fewer frames."""
    path = write_clip(tmp_path / f"clip.{extension}", frames(12), codec)
    data, rng, num_refused = path.read_bytes(), np.random.default_rng(5), 0
    heads = [found.start() for found in re.finditer(rb"\xa3[\x40-\x7f].\x81|\x1f\x43\xb6\x75", data, re.DOTALL)]
    assert len(heads) >= 12
    for number in range(60):
        place = int(rng.choice(heads)) + number % 4
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            about = load(path, keep_metadata=True).about
        except ValueError as error:
            assert re.search("damaged|truncated|cannot be", str(error))
            num_refused += 1
        else:
            assert about["num_frames"] == 12, place
    assert num_refused >= 40


@pytest.mark.parametrize(
    "options", [{"live": "1"}, {"cluster_time_limit": "40"}, {"write_crc32": "0"}], ids=["live", "clusters", "no sums"]
)
def test_matroska_of_any_writer_is_read(options: dict[str, str], tmp_path: Path) -> None:
    """Live recordings of unknown length; many clusters; no check sums; sound between; uneven times."""
    import av

    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w", options=options) as container:
        stream, noise = container.add_stream("mjpeg", rate=25), container.add_stream("pcm_s16le", rate=8000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, picture in enumerate(frames(9)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number**2
            container.mux(stream.encode(frame))
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 80), np.int16), format="s16", layout="mono")
            sound.sample_rate, sound.pts = 8000, 80 * number
            container.mux(noise.encode(sound))
    data = bytearray(path.read_bytes())
    assert count_frames(bytes(data)) == 9 and load(path).about["num_frames"] == 9
    for found in re.finditer(b"\x1f\x43\xb6\x75", bytes(data)):  # clusters of unknown length, as browsers record them
        width = 9 - data[found.end()].bit_length()
        data[found.end() : found.end() + width] = ((1 << (7 * width + 1)) - 1).to_bytes(width)
    path.write_bytes(data)
    assert count_frames(bytes(data)) == 9 and load(path).about["num_frames"] == 9


def test_gaps_of_matroska_may_hold_anything_but_not_among_frames(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "clip.webm", frames(3), "libvpx-vp9").read_bytes()
    gap, start, cluster = b"\xec\x84left", data.index(b"\x18\x53\x80\x67") + 4, data.index(b"\x1f\x43\xb6\x75")
    assert data[start] == 1, "eight bytes of length"
    data = data[:start] + b"\x01" + b"\xff" * 7 + data[start + 8 :]
    assert count_frames(data[:cluster] + gap + data[cluster:]) == 3
    open_end = data[:cluster] + b"\x1f\x43\xb6\x75\xff" + data[cluster + 4 + 9 - data[cluster + 4].bit_length() :]
    assert count_frames(open_end) == 3
    time = cluster + 5
    assert count_frames(open_end[:time] + b"\xec\x84" + bytes(4) + open_end[time:]) == 3
    with pytest.raises(ValueError, match="a gap among the frames that is not empty"):
        count_frames(open_end[:time] + gap + open_end[time:])
    with pytest.raises(ValueError, match=r"a frame of track 5, and there are \[1\]"):
        count_frames(open_end[:time] + b"\xa3\x85\x85\0\0\0x" + open_end[time:])
    empty = b"\xa3\x84\x81\0\0\0"
    assert count_frames(open_end[:time] + empty + open_end[time:]) == 3, "some muxers say so that a frame stays"


def test_check_sums_of_matroska_are_checked(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mkv", frames(3))
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xda") + 40] ^= 1  # a pixel, which no decoder would miss
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"is damaged at byte \d+: element 1F43B675 has another check sum than it says"
    ):
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
        "from ssl_platform.data.media import Options, video; from ssl_platform.data.items import Item\n"
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
