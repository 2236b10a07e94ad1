"""Where speech begins and ends in a recording: silence and room noise before and after it are left out."""

import warnings
from collections.abc import Callable
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
_BLOCKS = {"silero": 2 * SAMPLE_RATE // WINDOW, "energy": 60 * SAMPLE_RATE // WINDOW}
"""Windows that are looked at at a time: few for silero, which stops where it has met speech."""


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

    `silero` reads blocks of 2 s from both ends until each has met speech, `energy` the whole recording. What lies between
    stays, pauses included.
    """
    length = _BLOCKS[detector]
    blocks = range(-(-recording.num_samples(SAMPLE_RATE) // (length * WINDOW)))
    if detector == "silero":
        found = _ends(lambda number: _is_voice(_block(recording, number, length)), blocks, length)
    else:
        loudness = [_loudness(_block(recording, number, length)) for number in blocks]
        loudest = max(float(block.max()) for block in loudness)
        loud = [(block > loudest - DECIBELS) & block.isfinite() for block in loudness]
        found = _ends(lambda number: loud[number], blocks, length)
    if found is None:
        return None
    start, stop = (place * WINDOW / SAMPLE_RATE for place in found)
    return Trimmed(recording, max(start - MARGIN, 0.0), min(stop + MARGIN, recording.duration))


def _block(recording: Recording, number: int, length: int) -> Tensor:
    """(windows, WINDOW): up to `length` windows; the last one of the recording ends with zeros."""
    first = number * length * WINDOW
    count = -(-min(recording.num_samples(SAMPLE_RATE) - first, length * WINDOW) // WINDOW)
    return recording.read(first / SAMPLE_RATE, count * WINDOW, SAMPLE_RATE).reshape(count, WINDOW)


def _is_voice(block: Tensor) -> Tensor:
    """(windows,) bool"""
    with torch.inference_mode():
        probabilities: Tensor = _silero().audio_forward(block.reshape(1, -1), SAMPLE_RATE)[0]
    return probabilities > PROBABILITY


def _loudness(block: Tensor) -> Tensor:
    """(windows,) in dB; minus infinity for zeros"""
    return 10 * block.double().square().mean(dim=1).log10()


def _ends(is_speech: Callable[[int], Tensor], blocks: range, length: int) -> tuple[int, int] | None:
    """The first window and the end of the last, from the recording's beginning, of MIN_WINDOWS in a row that are speech."""

    def runs(number: int) -> list[int]:
        speech = is_speech(number)
        return (_runs(speech) + number * length).tolist()

    first = next((found[0] for number in blocks if (found := runs(number))), None)
    if first is None:
        return None
    return first, next(found[-1] for number in reversed(blocks) if (found := runs(number))) + MIN_WINDOWS


def _runs(speech: Tensor) -> Tensor:
    """Where MIN_WINDOWS windows of speech in a row begin; a block with fewer windows is one row."""
    return speech.unfold(0, min(MIN_WINDOWS, len(speech)), 1).all(dim=1).nonzero().flatten()


@cache
def _silero() -> Any:
    """The network that the package silero-vad brings, on the CPU; its import sets torch's number of threads, to our loss."""
    num_threads = torch.get_num_threads()
    try:
        package = optional_package("silero_vad", "vad: silero needs the package silero-vad", "vad")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.jit.load, which is how the network comes
            return package.load_silero_vad()
    finally:
        torch.set_num_threads(num_threads)
