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
    blocks = range(-(-recording.num_samples(SAMPLE_RATE) // _BLOCK))
    if detector == "silero":
        found = _ends(lambda number: _is_voice(recording, number), blocks)
    else:
        loudness = [_loudness(recording, number) for number in blocks]
        loudest = max(float(block.max()) for block in loudness)
        found = _ends(lambda number: (loudness[number] > loudest - DECIBELS) & loudness[number].isfinite(), blocks)
    if found is None:
        return None
    start, stop = (place * WINDOW / SAMPLE_RATE for place in found)
    return Trimmed(recording, max(start - MARGIN, 0.0), min(stop + MARGIN, recording.duration))


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


def _ends(is_speech: Callable[[int], Tensor], blocks: range) -> tuple[int, int] | None:
    """The first and last window, counted from the recording's beginning, of MIN_WINDOWS in a row that are speech."""
    first = next((runs[0] for number in blocks if (runs := _runs(is_speech(number), number))), None)
    if first is None:
        return None
    last = next(runs[-1] for number in reversed(blocks) if (runs := _runs(is_speech(number), number)))
    return first[0], last[1]


def _runs(speech: Tensor, block: int) -> list[tuple[int, int]]:
    """(first, end) of every row of MIN_WINDOWS windows of speech, or of all if the block has fewer."""
    length = min(MIN_WINDOWS, len(speech))
    starts = speech.unfold(0, length, 1).all(dim=1).nonzero().flatten() + block * (_BLOCK // WINDOW)
    return [(start, start + length) for start in starts.tolist()]


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
