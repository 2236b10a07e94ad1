"""Where speech begins and ends in a recording: silence and room noise before and after it are left out."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_platform.modalities._sounds import Recording
from ssl_platform.optional import optional_package

Detector = Literal["silero", "energy"]

SAMPLE_RATE = 16_000
WINDOW = 512
"""Samples that one decision is about, 32 ms."""
MIN_WINDOWS = 4
"""So many in a row are speech: a click is none."""
MARGIN = 0.1
"""Seconds that are kept before and behind."""
PROBABILITY = 0.5
"""From which silero's network takes a window for speech."""
DECIBELS = 35.0
"""Below a recording's loudest window, what is fainter is not speech to `energy`."""
_BLOCK = 16 * SAMPLE_RATE // WINDOW * WINDOW


@dataclass
class Trimmed:
    """The part of a recording from `start` to `stop` seconds, to be cut as a whole one is."""

    recording: Recording
    start: float
    stop: float

    def num_samples(self, sample_rate: int) -> int:
        return max(int((self.stop - self.start) * sample_rate), 1)

    def read(self, start: float, num_samples: int, sample_rate: int) -> Tensor:
        return self.recording.read(self.start + start, num_samples, sample_rate)


def check_detector(detector: Detector) -> None:
    """Raises ValueError if its package is missing."""
    if detector == "silero":
        _silero()


def trimmed(recording: Recording, detector: Detector) -> Trimmed | None:
    """From MARGIN before the first speech to MARGIN behind the last; None if there is none.

    `silero` reads blocks of 16 s from both ends until each has met speech, `energy` the whole recording. What lies between
    stays, pauses included.
    """
    num_blocks = -(-recording.num_samples(SAMPLE_RATE) // _BLOCK)
    if detector == "silero":
        first = next(
            (place for i in range(num_blocks) if (place := _first(_is_voice(recording, i), i)) is not None), None
        )
        if first is None:
            return None
        last = next(
            place for i in reversed(range(num_blocks)) if (place := _last(_is_voice(recording, i), i)) is not None
        )
    else:
        loudness = torch.cat([_loudness(recording, i) for i in range(num_blocks)])
        loud = (loudness > loudness.max() - DECIBELS) & loudness.isfinite()
        first, last = _first(loud, 0), _last(loud, 0)
        if first is None or last is None:
            return None
    seconds = WINDOW / SAMPLE_RATE
    return Trimmed(recording, max(first * seconds - MARGIN, 0.0), min(last * seconds + MARGIN, recording.duration))


def _block(recording: Recording, number: int) -> Tensor:
    """(windows, WINDOW) of one block; the last one ends with zeros."""
    first = number * _BLOCK
    count = min(recording.num_samples(SAMPLE_RATE) - first, _BLOCK)
    return recording.read(first / SAMPLE_RATE, -(-count // WINDOW) * WINDOW, SAMPLE_RATE).reshape(-1, WINDOW)


def _is_voice(recording: Recording, number: int) -> Tensor:
    """(windows,) bool"""
    with torch.inference_mode():
        probabilities = _silero().audio_forward(_block(recording, number).reshape(1, -1), SAMPLE_RATE)[0]
    return probabilities > PROBABILITY  # type: ignore[no-any-return]


def _loudness(recording: Recording, number: int) -> Tensor:
    """(windows,) in dB; minus infinity for zeros"""
    return 10 * _block(recording, number).double().square().mean(dim=1).log10()


def _first(speech: Tensor, block: int) -> int | None:
    """The first of MIN_WINDOWS in a row, or of all if there are fewer, counted from the recording's beginning."""
    length = min(MIN_WINDOWS, len(speech))
    runs = speech.unfold(0, length, 1).all(dim=1).nonzero()
    return int(runs[0]) + block * (_BLOCK // WINDOW) if len(runs) else None


def _last(speech: Tensor, block: int) -> int | None:
    """Likewise where the last such row ends."""
    length = min(MIN_WINDOWS, len(speech))
    runs = speech.unfold(0, length, 1).all(dim=1).nonzero()
    return int(runs[-1]) + length + block * (_BLOCK // WINDOW) if len(runs) else None


@cache
def _silero() -> Any:
    """The network that the package silero-vad brings, on the CPU; its import sets torch's number of threads, to our loss."""
    num_threads = torch.get_num_threads()
    try:
        package = optional_package("silero_vad", "vad: silero needs the package silero-vad", "vad")
        return package.load_silero_vad()
    finally:
        torch.set_num_threads(num_threads)
