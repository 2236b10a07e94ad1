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
