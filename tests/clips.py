"""Tiny videos for tests, with names in their metadata that shards must not hold."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = (b"Jane Doe", b"of Jane", b"Dr Smith", b"Lead One")


def frames(number: int = 20, seed: int = 0, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), np.uint8)


def write_clip(path: Path, pictures: NDArray[np.uint8], codec: str = "mjpeg", sound: bool = False) -> Path:
    """Encodes (N, H, W, 3) RGB at 25 frames a second; title, comment, artist and the stream's title name people."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update(title="Jane Doe", comment="of Jane", artist="Dr Smith")
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = pictures.shape[2], pictures.shape[1]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.metadata["title"] = "Lead One"
        noise = container.add_stream("pcm_s16le", rate=8000) if sound else None
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if noise is not None:
            samples = np.zeros((1, 800), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8000, 0
            container.mux(noise.encode(frame))
            container.mux(noise.encode())
    return path


def decoded(data: bytes) -> NDArray[np.uint8]:
    """(N, H, W, 3): every frame, by PyAV directly."""
    import io

    import av

    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


TEXT = b"Sonja Wanderer"
"""Written among the pictures by `with_texts`."""


def with_texts(path: Path, codec: str) -> Path:
    """The clip with names inside each packet, as encoders, cameras and captions write them; the pictures are the same."""
    import av

    whole = path.with_name(f"texts-{path.name}")
    with av.open(str(path)) as source, av.open(str(whole), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream, opaque=True)
        header = stream.codec_context.extradata or b""
        for packet in source.demux(stream):
            if packet.size:
                clean = av.Packet(_texted(bytes(packet), codec, has_lengths=header[:1] == b"\1"))
                for name in ("pts", "dts", "time_base", "duration", "is_keyframe"):
                    setattr(clean, name, getattr(packet, name))
                clean.stream = copy
                target.mux(clean)
    return whole


def _texted(data: bytes, codec: str, has_lengths: bool) -> bytes:
    if codec == "mjpeg":
        segments = b"".join(
            b"\xff" + marker + (len(body) + 2).to_bytes(2, "big") + body
            for marker, body in ((b"\xfe", TEXT), (b"\xe1", b"Exif\0\0" + TEXT), (b"\xec", TEXT))
        )
        return data[:2] + segments + data[2:] + TEXT
    if codec in ("mpeg4", "mpeg2video"):
        first = data.index(b"\0\0\1\xb6" if codec == "mpeg4" else b"\0\0\1\1")
        return data[:first] + b"\0\0\1\xb2" + TEXT + data[first:]
    if codec == "libsvtav1":
        body = b"\4" + TEXT + b"\x80"  # ITU-T T.35
        return bytes([5 << 3 | 2, len(body)]) + body + data
    messages = b"".join(bytes([kind, 16 + len(TEXT)]) + b"\xb5" * 16 + TEXT for kind in (4, 5)) + b"\x80"
    units = [b"\6" + messages, b"\x1f" + TEXT] if codec == "libx264" else [b"\x4e\1" + messages, b"\x7e\1" + TEXT]
    if has_lengths:
        return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units) + data
    return b"".join(b"\0\0\0\1" + unit for unit in units) + data
