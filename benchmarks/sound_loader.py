"""What `benchmarks/loader.py speaker|spectrogram` measures: seconds of sound that one core makes views of in a second.

FLAC files go from a shard to a collated batch by the pipeline that training uses. For `speaker`, chunks get noise and
reverberation from folders laid out as MUSAN and OpenSLR 28 are, and a plain pipeline takes turns with it: soundfile, numpy,
scipy's fftconvolve and kaldi-native-fbank, chunk by chunk, as wespeaker's loader works. Times are processor time of one
thread.

`views` are seconds of views made for each second of one core (a sample of 8 s gives 2 x 3 + 4 x 2 = 14 s of them), `source`
are seconds of recordings that went in: hours of audio per core-hour.
"""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kaldi_native_fbank
import numpy as np
import scipy.signal
import soundfile
import torch
import webdataset
from torch import Tensor

from ssl_platform.config import plugin_class, validate
from ssl_platform.data.companions.random import Config as RandomCompanions
from ssl_platform.data.index import Index
from ssl_platform.data.order import Order
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.shards import MicroBatches
from ssl_platform.modalities import _fbank, _noise_and_reverb, _sounds

BATCH, SAMPLES = 8, 64
RATES = {"speaker": 16_000, "spectrogram": 44_100}
SECONDS = {"speaker": 8.0, "spectrogram": 10.0}
SNR = {"noise": (0.0, 15.0), "speech": (10.0, 30.0), "music": (5.0, 15.0)}


def sound(seconds: float, rate: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Noise with the spectrum and the syllables of speech, so that FLAC has about as much to do."""
    lines = np.fft.rfft(rng.normal(size=int(seconds * rate)))
    hertz = np.fft.rfftfreq(int(seconds * rate), 1 / rate)
    samples = np.fft.irfft(lines / (1 + (hertz / 500) ** 2), n=int(seconds * rate))
    samples *= np.abs(np.sin(2 * np.pi * 2 * np.arange(len(samples)) / rate + rng.uniform(0, 6))) + 0.02
    return samples / np.abs(samples).max() * 0.5


def write_shard(path: Path, seconds: float, rate: int) -> None:
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as tar:
        for number in range(SAMPLES):
            file = io.BytesIO()
            soundfile.write(file, sound(seconds, rate, rng), rate, format="FLAC")
            tar.write({"__key__": f"{number:06d}", "flac": file.getvalue()})


def write_noises(folder: Path) -> None:
    """Noises of 10 s, speech and music of 2 minutes, and rooms of half a second of reverberation."""
    rng = np.random.default_rng(1)
    for kind, number, seconds in (("noise", 24, 10.0), ("speech", 4, 120.0), ("music", 4, 120.0)):
        (folder / kind).mkdir(parents=True)
        for i in range(number):
            soundfile.write(folder / kind / f"{i}.wav", sound(seconds, 16_000, rng), 16_000)
    (folder / "rooms").mkdir()
    for i in range(24):
        times = np.arange(16_000) / 16_000
        response = rng.normal(size=16_000) * np.exp(-6.9 * times / 0.5) * 0.1 * (times > 0.005)
        response[80] = 0.9
        soundfile.write(folder / f"rooms/{i}.wav", response, 16_000)


class PlainVoices:
    """Chunk by chunk with what the field uses (`wespeaker/dataset/processor.py` and its DINO recipe)."""

    def __init__(self, reader: ShardReader, folder: Path) -> None:
        self.reader, self.rng = reader, np.random.default_rng(0)
        self.noises = {kind: sorted((folder / kind).glob("*.wav")) for kind in SNR}
        self.rooms = sorted((folder / "rooms").glob("*.wav"))

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        views = []
        for sample in samples:
            samples_, _ = soundfile.read(io.BytesIO(self.reader.read(sample).members["flac"]), dtype="float32")
            views.append([self.view(samples_, frames) for frames in (300, 300, 200, 200, 200, 200)])
        return torch.stack([torch.stack(one[:2]) for one in views]), torch.stack(
            [torch.stack(one[2:]) for one in views]
        )

    def view(self, whole: np.ndarray[Any, Any], frames: int) -> Tensor:
        length = (frames - 1) * 160 + 400
        first = int(self.rng.integers(len(whole) - length + 1))
        chunk = self.augmented(whole[first : first + length])
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.window_type, options.frame_opts.dither, options.mel_opts.num_bins = "hamming", 1.0, 80
        fbank = kaldi_native_fbank.OnlineFbank(options)
        fbank.accept_waveform(16_000, chunk * 32768)
        bins = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
        return torch.from_numpy(bins - bins.mean(axis=0))

    def augmented(self, chunk: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.rng.random() < 0.5:
            room, _ = soundfile.read(self.rng.choice(self.rooms), dtype="float32")
            made = scipy.signal.fftconvolve(chunk, room / np.sqrt((room**2).sum()))[: len(chunk)]
        else:
            kind = str(self.rng.choice(list(SNR)))
            noise, _ = soundfile.read(self.rng.choice(self.noises[kind]), dtype="float32")
            first = int(self.rng.integers(max(len(noise) - len(chunk), 0) + 1))
            noise = np.resize(noise[first : first + len(chunk)], len(chunk))
            ratio = (chunk**2).mean() / (noise**2).mean() / 10 ** (self.rng.uniform(*SNR[kind]) / 10)
            made = chunk + np.sqrt(ratio) * noise
        return (made / (np.abs(made).max() + 1e-4)).astype(np.float32)  # type: ignore[no-any-return]


def measure(modality_name: str, rounds: int, folder: Path, clock: Any) -> list[dict[str, Any]]:
    """A line for each pipeline, and for `speaker` their ratio."""
    rate, seconds = RATES[modality_name], SECONDS[modality_name]
    write_shard(folder / "sounds.tar", seconds, rate)
    section: dict[str, Any] = {"name": modality_name}
    if modality_name == "speaker":
        write_noises(folder / "noises")
        section |= {"noise": {"root": str(folder / "noises")}, "reverb": {"root": str(folder / "noises/rooms")}}
    config = validate(plugin_class("ssl_platform.modalities", modality_name), section)
    modality = config.build(None)  # type: ignore[attr-defined]
    if hasattr(modality, "prepare"):
        modality.prepare()
    index = Index.open(folder / "sounds.tar")
    companions = RandomCompanions().build(index, {}) if getattr(config, "needs_companions", "") else None
    ours = MicroBatches(
        index, modality, {}, order=Order.of_shards(index.shard_counts, seed=0, window_shards=1), seed=0, batch_size=BATCH,
        first_step=0, last_step=rounds + 1, cache_shards=1, companions=companions,
    )  # fmt: skip
    plain = PlainVoices(ShardReader(index, 1), folder / "noises") if modality_name == "speaker" else None
    _ = ours[0]  # imports, windows and caches
    if plain:
        plain.batch(range(BATCH))
    _wrap(clock, ours)
    totals: dict[str, list[float]] = {"ssl_platform": []} | ({"plain": []} if plain else {})
    for step in range(1, rounds + 1):
        work: dict[str, Callable[[], Any]] = {"ssl_platform": lambda step=step: ours[step]}  # type: ignore[misc]
        if plain:
            first = step % (SAMPLES // BATCH) * BATCH
            work["plain"] = lambda first=first: plain.batch(range(first, first + BATCH))  # type: ignore[misc]
        for name, function in work.items():
            begun = time.process_time()
            function()
            totals[name].append(time.process_time() - begun)
    shown = sum(spec.num_views * spec.shape[1] for spec in modality.groups.values()) * 0.01
    lines = []
    for name, spent in totals.items():
        each = statistics.median(spent) / BATCH
        line = {"pipeline": name, "views": round(shown / each), "source": round(seconds / each)}
        lines.append(line | ({"shares": _shares(clock, sum(spent))} if name == "ssl_platform" else {}))
    if plain:
        ratios = [theirs / mine for mine, theirs in zip(*totals.values(), strict=True)]
        lines.append(
            {"ratio": round(statistics.median(ratios), 2), "range": [round(min(ratios), 2), round(max(ratios), 2)]}
        )
    about = {"rounds": rounds, "batch": BATCH, "seconds": seconds, "sample_rate": rate, "seconds_of_views": shown}
    return [*lines, about]


def _wrap(clock: Any, ours: MicroBatches) -> None:
    ours.reader.read = clock.wrap("read", ours.reader.read)  # type: ignore[method-assign]
    _sounds.decode_audio = clock.wrap("decode", _sounds.decode_audio)
    _sounds.resample = clock.wrap("resample", _sounds.resample)
    _fbank.Fbank.__call__ = clock.wrap("fbank", _fbank.Fbank.__call__)  # type: ignore[method-assign]
    for kind in (_noise_and_reverb.Noise, _noise_and_reverb.Reverb):
        kind.__call__ = clock.wrap(kind.__name__.lower(), kind.__call__)  # type: ignore[method-assign]


def _shares(clock: Any, total: float) -> dict[str, float]:
    shares = {stage: round(spent / total, 3) for stage, spent in clock.spent.items() if spent}
    return shares | {"the rest": round(1 - sum(shares.values()), 3)}
