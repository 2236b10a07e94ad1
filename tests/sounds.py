"""Tiny sounds for tests."""

import io
import struct

import numpy as np
import soundfile
from numpy.typing import NDArray


def tone(seconds: float, rate: int, hertz: float = 440.0, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    """(samples, channels): a tone that slides up, in noise."""
    times = np.arange(int(seconds * rate)) / rate
    slide = np.sin(2 * np.pi * hertz * (times + 0.1 * times**2))
    noise = np.random.default_rng(seed).normal(size=(len(times), channels))
    return 0.4 * slide[:, None] + 0.02 * noise  # type: ignore[no-any-return]


def encoded(samples: NDArray[np.float64], rate: int, kind: str = "wav", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def record(seconds: float = 1.0, rate: int = 16_000, kind: str = "wav", **settings: float) -> dict[str, bytes]:
    return {kind: encoded(tone(seconds, rate, **settings), rate, kind)}  # type: ignore[arg-type]


def wav_that_claims(num_samples: int, held: int, rate: int = 16_000) -> bytes:
    """A WAV file whose header says more samples than there are."""
    data = struct.pack(f"<{held}h", *([1000] * held))
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + 2 * num_samples, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate,
                       2, 16, b"data", 2 * num_samples)  # fmt: skip
    return head + data
