"""Videos: the packets of the picture are stored as they are, in the same container, without sound, tags and chapters."""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_platform.data.items import Item
from ssl_platform.data.matroska import count_frames
from ssl_platform.data.media import Content, Look, Options
from ssl_platform.data.video_packets import cleaners
from ssl_platform.optional import optional_package

PLURAL = "videos"
EXTENSIONS = ("avi", "mp4", "mkv", "mov", "webm")
KEPT = EXTENSIONS
MAX_BYTES = 2**31
"""A sample is read whole; longer recordings are to be cut into clips first."""
MAX_PIXELS = 2**25
"""Of a frame: 8K has 33,177,600. Larger headers are refused before a frame is decoded."""
_FORMATS = {"avi": "avi", "mp4": "mp4", "mov": "mov", "mkv": "matroska", "webm": "webm"}
"""FFmpeg's names of the containers. They are said when a file is opened: others (playlists) read further files."""
_NUM_MEASURED_FRAMES = 16
_MEASURED_PIXELS = 2**18
"""Of each of those frames, at most: what has more is measured at every second, third, ... row and column."""
_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")

Frame = NDArray[np.uint8]


def load(item: Item, options: Options) -> Content:
    """A video of which every frame decodes; at no time are all of its frames in memory."""
    size = item.path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{size / 1e9:.1f} GB, at most {MAX_BYTES / 1e9:.1f}: cut it into clips")
    data = item.path.read_bytes()
    extension = container_of(data)
    about, frames_digest = _describe(data, extension)
    if not options.keep_metadata:
        cleaners(about["codec"], b"")  # of a codec that nobody can clean, nothing else is to be said
        data, extension = _clean(data, extension, frames_digest)
    return Content(data, extension, measured(data, extension, about["num_frames"]), about)


def recognises(data: bytes) -> bool:
    """Whether a WebM file, or its beginning, holds pictures."""
    av = import_av()
    try:
        with av.open(io.BytesIO(data), format="matroska", metadata_errors="replace") as container:
            return bool(container.streams.video)
    except (av.FFmpegError, ValueError, OSError):
        return False


def look(data: bytes, extension: str) -> Look:
    """Three frames side by side: the first, the middle one and the last."""
    about, frames = overview(data, extension, 3)
    sizes = {name: about[name] for name in ("num_frames", "height", "width", "fps") if about[name] is not None}
    picture = torch.from_numpy(np.concatenate(frames, axis=2))
    return Look(picture, sizes, lambda: measured(data, extension, about["num_frames"]))


def measured(data: bytes, extension: str, num_frames: int) -> NDArray[np.uint8]:
    """(3, frames, pixels): some of the pixels of some frames."""
    wanted = _spread(num_frames, _NUM_MEASURED_FRAMES)
    return np.stack([_thinned(frame) for frame in chosen_frames(data, extension, wanted)], axis=1)


def container_of(data: bytes) -> str:
    """The extension that the content asks for, whatever the file is called; raises ValueError if it is no video."""
    if not data:
        raise ValueError("the file has zero bytes")
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in data[:64] else "mkv"
    if data[4:8] in _ATOMS:
        return "mp4" if data[4:8] == b"ftyp" and data[8:12] != b"qt  " else "mov"
    raise ValueError(f"not a video: begins with {data[:8]!r}; read are {', '.join(EXTENSIONS)}")


def chosen_frames(data: bytes, extension: str, wanted: NDArray[np.int64]) -> Iterator[Frame]:
    """The frames (3, H, W) of some ascending numbers, RGB; raises ValueError if the video does not decode."""
    places = iter(wanted.tolist())
    following = next(places, None)
    for number, frame in enumerate(_decoded(data, extension)):
        if following is None:
            return
        if number == following:
            yield _rgb(frame)
            following = next(places, None)
    if following is not None:
        raise ValueError(f"has no frame {following}")


def overview(data: bytes, extension: str, most: int) -> tuple[dict[str, Any], list[Frame]]:
    """num_frames, height, width, codec, fps, and at most so many frames (3, H, W), spread evenly.

    Raises ValueError if not every frame decodes.
    """
    about, _ = _describe(data, extension)
    return about, list(chosen_frames(data, extension, _spread(about["num_frames"], most)))


def _spread(num_frames: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the frames, the first and the last among them."""
    return np.unique(np.linspace(0, num_frames - 1, min(most, num_frames)).round().astype(np.int64))


def _thinned(frame: Frame) -> Frame:
    """About `_MEASURED_PIXELS` of a frame's pixels, flat: (3, N)."""
    step = max(1, int(np.ceil(np.sqrt(frame[0].size / _MEASURED_PIXELS))))
    return frame[:, ::step, ::step].reshape(len(frame), -1)


def _rgb(frame: Any) -> Frame:
    array: Frame = frame.to_ndarray(format="rgb24")  # (H, W, 3)
    return np.moveaxis(array, -1, 0)


# -- decoding ----------------------------------------------------------------------------------------------------------


def _describe(data: bytes, extension: str) -> tuple[dict[str, Any], bytes]:
    """What a sample says of its video, and a digest of all its frames' pixels."""
    num_held = count_frames(data) if extension in ("mkv", "webm") else 0
    with _opened(data, extension) as container:
        stream = container.streams.video[0]
        promised, codec = max(stream.frames, num_held), stream.codec_context.codec.canonical_name
        rate = stream.average_rate or stream.guessed_rate
        num_packets = sum(packet.size > 0 for packet in container.demux(stream)) if promised else 0
    if num_packets < num_held:
        raise ValueError(f"is damaged: {num_packets} of the {num_held} frames that it holds can be read")
    digest, num_frames, size = hashlib.blake2b(digest_size=16), 0, None
    for frame in _decoded(data, extension):
        if size not in (None, (frame.height, frame.width)):
            raise ValueError(f"frame {num_frames} has another size than those before")
        size = frame.height, frame.width
        digest.update(np.ascontiguousarray(frame.to_ndarray(format="rgb24")).data)  # narrow frames come with gaps
        num_frames += 1
    if size is None:
        raise ValueError("has no frame that can be decoded")
    if max(num_packets, num_frames) < promised:
        raise ValueError(f"is truncated: {num_frames} of the {promised} frames that its header names")
    about = {"num_frames": num_frames, "height": size[0], "width": size[1], "codec": codec}
    return about | {"fps": float(rate) if rate else None}, digest.digest()


def _opened(data: bytes, extension: str) -> Any:
    """The container, with its one stream of pictures checked."""
    av = import_av()
    try:
        container = av.open(io.BytesIO(data), format=_FORMATS[extension], metadata_errors="replace")
    except (av.FFmpegError, ValueError, OSError) as error:
        raise ValueError(f"cannot be read as {extension}: {_reason(error)}") from error
    if not container.streams.video:
        container.close()
        raise ValueError("has no stream of pictures")
    context = container.streams.video[0].codec_context
    if context is None:
        container.close()
        raise ValueError("has a codec that PyAV does not know")
    if context.width * context.height > MAX_PIXELS:
        size = f"{context.width} x {context.height}"
        container.close()
        raise ValueError(f"its header claims frames of {size} pixels; at most {MAX_PIXELS:,} are read")
    context.options = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}  # later headers, and no patched damage
    return container


def _decoded(data: bytes, extension: str) -> Iterator[Any]:
    """PyAV's frames, one after the other; raises ValueError where one is damaged."""
    av = import_av()
    number = 0
    with _opened(data, extension) as container:
        try:
            for frame in container.decode(container.streams.video[0]):
                if frame.is_corrupt:
                    raise ValueError(f"frame {number} is damaged")
                yield frame
                number += 1
        except av.FFmpegError as error:
            raise ValueError(f"frame {number} cannot be decoded: {_reason(error)}") from error


# -- storing -----------------------------------------------------------------------------------------------------------


def _clean(data: bytes, extension: str, frames_digest: bytes) -> tuple[bytes, str]:
    """The pictures' packets in a new file of the same container, or of Matroska where that does not take them."""
    reasons = []
    for kind in dict.fromkeys((extension, "mkv")):
        try:
            clean = _remuxed(data, extension, kind)
            if _describe(clean, kind)[1] == frames_digest:
                return clean, kind
            reasons.append(f"{kind}: gives other frames")
        except ValueError as error:
            reasons.append(f"{kind}: {error}")
    raise ValueError(f"cannot be stored without its metadata ({'; '.join(reasons)})")


def _remuxed(data: bytes, extension: str, kind: str) -> bytes:
    av = import_av()
    file = io.BytesIO()
    with _opened(data, extension) as source:
        stream = source.streams.video[0]
        header = stream.codec_context.extradata or b""
        cleaner = cleaners(stream.codec_context.codec.canonical_name, header)
        try:  # bitexact: no time, no random identifier, no version of the library
            with av.open(file, "w", format=_FORMATS[kind], options={"fflags": "+bitexact"}) as clean:
                copy = clean.add_stream_from_template(stream, opaque=True)  # by its parameters: no encoder is needed
                if cleaner is not None and header:
                    copy.codec_context.extradata = cleaner[1](header) or None
                for packet in source.demux(stream):
                    if packet.size and (packet := _without_texts(packet, cleaner)).size:
                        packet.stream = copy
                        clean.mux(packet)
        except (av.FFmpegError, ValueError, OSError, IndexError) as error:
            raise ValueError(_reason(error)) from error
    return file.getvalue()


def _without_texts(packet: Any, cleaner: Any) -> Any:
    if cleaner is None:
        return packet
    clean = import_av().Packet(cleaner[0](bytes(packet)))
    for name in ("pts", "dts", "time_base", "duration", "is_keyframe"):
        setattr(clean, name, getattr(packet, name))
    return clean


def check_packages() -> None:
    import_av()


def import_av() -> Any:
    """PyAV; raises ValueError with the fix if it is not installed."""
    av = optional_package("av", "videos need PyAV", "video")
    av.logging.set_level(None)  # damage is told by what is raised, not by lines that name no file
    return av


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
