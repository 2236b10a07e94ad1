"""Folders of sound that augmentations draw from, such as MUSAN's noises: listed once, read where they are needed."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ssl_platform.modalities._audio import MAX_CHANNELS, MAX_SAMPLE_RATE, Sound, package, resample

logger = logging.getLogger(__name__)

Drawn = TypeVar("Drawn")

EXTENSIONS = ("wav", "flac", "ogg", "oga", "aif", "aiff", "au")
"""What can be read from the middle on."""
MAX_UNUSABLE = 20
"""So many different unusable files are not chance."""
NUM_PROBED = 10
"""Files that are opened, if need be, until one can be read, before a run begins."""
MIN_SECONDS = 0.025
"""Shorter than a frame of speech: repeated, such a sound is a hum."""
INAUDIBLE = 1e-7
"""Samples that are all smaller than this, below 24 bits, hold no sound that could be scaled."""


class SoundFolder:
    """The sound files below a folder, in the order of their names; picklable, so that workers need not list it again.

    Raises ValueError that begins with `key`, the setting that names the folder, if it is missing, cannot be listed,
    holds no sound, or none that can be read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.files = _listed(folder, key)
        self._reported: set[str] = set()
        self._probe()

    def __len__(self) -> int:
        return len(self.files)

    def draw(self, rng: np.random.Generator, read: Callable[[Path], Drawn]) -> Drawn:
        """What `read` makes of a random file; one that it refuses is named once, and another is drawn.

        So the result is a function of `rng` and the files. Raises ValueError if MAX_UNUSABLE, or all, are refused.
        """
        tried: set[int] = set()
        while len(tried) < min(MAX_UNUSABLE, len(self.files)):
            place = int(rng.integers(len(self.files)))
            while place in tried:
                place = (place + 1) % len(self.files)
            name = self.files[place]
            try:
                return read(self.folder / name)
            except (OSError, ValueError, RuntimeError) as error:  # soundfile's error is a RuntimeError
                tried.add(place)
                last = f"{self.folder / name}: {_words(error)}"
                if name not in self._reported:
                    self._reported.add(name)
                    logger.warning("%s: %s; another file is drawn in its place", self.key, last)
        raise ValueError(f"{self.key}: {len(tried)} files were drawn and none can be used, the last one {last}")

    def _probe(self) -> None:
        places = np.linspace(0, len(self.files) - 1, min(NUM_PROBED, len(self.files))).astype(int)
        for place in places:
            try:
                read_part(self.folder / self.files[place], lambda frames, _: (0, min(frames, 16)))
                return
            except (OSError, ValueError, RuntimeError) as error:
                reason = f"{self.files[place]}: {_words(error)}"
        raise ValueError(
            f"{self.key}: {self.folder}: none of {len(places)} of its {len(self.files)} sound files that were tried can "
            f"be read, the last one {reason}"
        )


def read_part(path: Path, part: Callable[[int, int], tuple[int, int]]) -> Sound:
    """(channels, samples) of a file from `first` on, `count` of them: what `part(num_samples, sample_rate)` returns.

    Nothing else is decoded. Raises ValueError with the reason, or soundfile's errors.
    """
    with package("soundfile").SoundFile(str(path)) as file:
        if not (0 < file.samplerate <= MAX_SAMPLE_RATE and 0 < file.channels <= MAX_CHANNELS):
            raise ValueError(f"the header says {file.channels} channels at {file.samplerate} Hz")
        if file.frames < 1:
            raise ValueError("holds no samples")
        first, count = part(file.frames, file.samplerate)
        file.seek(first)
        samples = file.read(count, dtype="float32", always_2d=True)
        if len(samples) < count:
            raise ValueError(f"truncated: the header says {file.frames} samples, there are {first + len(samples)}")
        if not np.isfinite(samples).all():
            raise ValueError("holds NaN or infinite samples")
        return Sound(samples.T, file.samplerate)


def random_segment(path: Path, num_samples: int, sample_rate: int, rng: np.random.Generator) -> Tensor:
    """(num_samples,) float32 from a random place of a file, the mean of its channels; a shorter one is repeated.

    Raises ValueError with the reason if the file is damaged, shorter than MIN_SECONDS, or silent there.
    """

    def part(length: int, rate: int) -> tuple[int, int]:
        if length < MIN_SECONDS * rate:
            raise ValueError(f"{length} samples at {rate} Hz are shorter than {1000 * MIN_SECONDS:.0f} ms")
        count = min(-(-num_samples * rate // sample_rate), length)
        return int(rng.integers(length - count + 1)), count

    sound = read_part(path, part)
    mono = sound.samples.mean(axis=0, dtype=np.float32)
    mono = resample(Sound(mono[None], sound.sample_rate), sample_rate).samples[0]
    if not len(mono) or np.abs(mono).max() < INAUDIBLE:
        raise ValueError("silent")
    return torch.from_numpy(np.resize(mono, num_samples))


def _listed(folder: Path, key: str) -> Sequence[str]:
    if not folder.is_dir():
        raise ValueError(f"{key}: {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    files = []

    def refuse(error: OSError) -> Any:
        raise ValueError(f"{key}: {error.filename}: cannot be listed ({error.strerror})") from error

    for place, _, names in os.walk(folder, onerror=refuse):
        inside = os.path.relpath(place, folder)
        files += [
            os.path.normpath(f"{inside}/{name}")
            for name in names
            if name.rpartition(".")[2].lower() in EXTENSIONS and not name.startswith(".")
        ]
    if not files:
        raise ValueError(f"{key}: {folder}: holds no sound files ({', '.join(EXTENSIONS)})")
    return sorted(files)


def _words(error: Exception) -> str:
    text = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    return str(text).strip().rstrip(".") or type(error).__name__
