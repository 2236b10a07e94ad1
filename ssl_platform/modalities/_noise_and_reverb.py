"""Noise at a stated signal-to-noise ratio and reverberation by measured or simulated rooms, from folders of sound."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from scipy.fft import irfft, next_fast_len, rfft
from torch import Tensor

from ssl_platform.config import Config as Section
from ssl_platform.modalities._audio import Sound, resample
from ssl_platform.modalities._options import Interval, from_list, over_defaults, raise_if_any
from ssl_platform.modalities._sound_folder import INAUDIBLE, SoundFolder, random_segment, read_part

MAX_RESPONSE_SECONDS = 10.0
"""A longer sound is no room's response."""
NEGLIGIBLE = 1e-6
"""The tail of a response with this share of its energy, 60 dB below the whole, is not convolved."""

# -- configuration -----------------------------------------------------------------------------------------------------


class NoiseKindConfig(Section):
    """One kind of noise; `[low, high]` is short for `{snr: [low, high]}`."""

    snr: Interval
    """The ratio of speech to noise in dB is U(low, high)."""
    num: Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], from_list] = (1, 1)
    """[least, most] files that are added, each of the same power; [3, 7] of speech is babble, as Kaldi makes it."""

    @model_validator(mode="after")
    def _check(self) -> "NoiseKindConfig":
        pairs: list[tuple[str, tuple[float, float]]] = [("snr", self.snr), ("num", self.num)]
        raise_if_any([f"{key}: {list(pair)}: expected [low, high]" for key, pair in pairs if pair[0] > pair[1]])
        return self


Kind = Annotated[NoiseKindConfig, BeforeValidator(lambda value: {"snr": value} if isinstance(value, list) else value)]


def _root_missing(key: str, what: str) -> str:
    return f"root: missing; give {what} as modality.{key}.root=FOLDER, or do without: modality.{key}=null"


class NoiseConfig(Section):
    """Noise from the folders ROOT/KIND, as MUSAN has them; any sub-folders, wav, flac, ogg, aiff or au of any rate."""

    root: Path | None = None
    kinds: dict[str, Kind | None] = {
        "noise": NoiseKindConfig(snr=(0.0, 15.0)),
        "speech": NoiseKindConfig(snr=(10.0, 30.0)),
        "music": NoiseKindConfig(snr=(5.0, 15.0)),
    }
    """{folder: [low, high] dB or {snr: [low, high], num: [least, most]}}; null leaves a kind out. The kind is drawn first,
    then a file of it."""

    @field_validator("kinds", mode="before")
    @classmethod
    def _keep_defaults(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = {kind: {"snr": given} if isinstance(given, list) else given for kind, given in value.items()}
        return over_defaults(cls.model_fields["kinds"].default, value)

    @model_validator(mode="after")
    def _check(self) -> "NoiseConfig":
        lines = [] if self.root else [_root_missing("noise", "the folder of noise/, speech/ and music/")]
        if not any(self.kinds.values()):
            lines.append("kinds: every kind is left out; name one, or do without: modality.noise=null")
        raise_if_any(lines)
        return self

    def open(self, sample_rate: int) -> "Noise":
        """Lists the folders; raises ValueError with the key and the folder that cannot be used."""
        assert self.root is not None
        return Noise(self.root, {name: kind for name, kind in self.kinds.items() if kind is not None}, sample_rate)


class ReverbConfig(Section):
    """Room impulse responses: every sound file below ROOT, of which the first channel is taken.

    OpenSLR 28 keeps noise beside its rooms: give its folder simulated_rirs alone.
    """

    root: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> "ReverbConfig":
        raise_if_any([] if self.root else [_root_missing("reverb", "the folder of impulse responses")])
        return self

    def open(self, sample_rate: int) -> "Reverb":
        """Lists the folder; raises ValueError if it cannot be used."""
        assert self.root is not None
        return Reverb(SoundFolder(self.root, "reverb.root"), sample_rate)


# -- augmentation ------------------------------------------------------------------------------------------------------


class Noise:
    """Adds a random noise: (samples,) -> (samples,)."""

    def __init__(self, root: Path, kinds: dict[str, NoiseKindConfig], sample_rate: int) -> None:
        if not root.is_dir():
            raise ValueError(f"noise.root: {root}: {'not a folder' if root.exists() else 'no such folder'}")
        self.sample_rate, self.kinds = sample_rate, list(kinds.values())
        self.folders = []
        for name in kinds:
            if not (root / name).is_dir():
                raise ValueError(
                    f"noise.kinds.{name}: {root / name}: no such folder; leave the kind out with {name}: null"
                )
            self.folders.append(SoundFolder(root / name, f"noise.kinds.{name}"))

    def __call__(self, samples: Tensor, rng: np.random.Generator) -> Tensor:
        chosen = int(rng.integers(len(self.kinds)))
        kind, folder = self.kinds[chosen], self.folders[chosen]
        snr = rng.uniform(*kind.snr)
        noise = torch.zeros_like(samples)
        for _ in range(rng.integers(*kind.num, endpoint=True)):
            part = folder.draw(rng, lambda path: random_segment(path, len(samples), self.sample_rate, rng))
            noise += part / power(part) ** 0.5
        return with_noise(samples, noise, snr)


class Reverb:
    """Puts speech into a random room: (samples,) -> (samples,)."""

    def __init__(self, folder: SoundFolder, sample_rate: int) -> None:
        self.folder, self.sample_rate = folder, sample_rate

    def __call__(self, samples: Tensor, rng: np.random.Generator) -> Tensor:
        return reverberated(samples, self.folder.draw(rng, lambda path: read_response(path, self.sample_rate)))


def power(samples: Tensor) -> float:
    """The mean square, summed in double precision."""
    return float(samples.double().square().mean())


def with_noise(samples: Tensor, noise: Tensor, snr: float) -> Tensor:
    """`samples` plus `noise` (as many) scaled so that 10 log10 of their powers' ratio is `snr`; silence stays silence."""
    gain = (power(samples) / power(noise) * 10 ** (-snr / 10)) ** 0.5
    noisy: Tensor = samples + gain * noise
    return noisy


def read_response(path: Path, sample_rate: int) -> Tensor:
    """(taps,) float32: the first channel of a response; raises ValueError with the reason if it is none."""

    def part(length: int, rate: int) -> tuple[int, int]:
        if length > MAX_RESPONSE_SECONDS * rate:
            raise ValueError(f"{length / rate:.1f} s: no impulse response is longer than {MAX_RESPONSE_SECONDS:.0f} s")
        return 0, length

    sound = read_part(path, part)
    response = resample(Sound(sound.samples[:1], sound.sample_rate), sample_rate).samples[0]
    if not len(response) or np.abs(response).max() < INAUDIBLE:
        raise ValueError("all zeros")
    return torch.from_numpy(response)


def reverberated(samples: Tensor, response: Tensor) -> Tensor:
    """`samples` convolved with a response of energy 1, as long as before and not delayed: its largest value, the direct
    path, stays where it was. The response's tail with NEGLIGIBLE energy is left out.
    """
    energies = response.double().square()
    response = response / energies.sum().sqrt().to(response.dtype)
    rest = energies.flip(0).cumsum(0).flip(0)  # from each tap to the end
    direct = int(response.abs().argmax())
    taps = max(int((rest > NEGLIGIBLE * rest[0]).sum()), direct + 1)
    response = response[: min(taps, direct + len(samples))]
    length = next_fast_len(len(samples) + len(response) - 1, real=True)
    # scipy's transforms: of such lengths, and of single precision too, they take half the time of torch's.
    spectrum = rfft(samples.numpy(), n=length) * rfft(response.numpy(), n=length)
    return torch.from_numpy(irfft(spectrum, n=length)[direct : direct + len(samples)])


def peak_normalized(samples: Tensor) -> Tensor:
    """The same with a largest magnitude of 1; silence stays silence."""
    peak = samples.abs().max()
    return samples / peak if peak > INAUDIBLE else samples
