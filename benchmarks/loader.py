"""`python benchmarks/loader.py image|pathology`: samples/s of one core from a shard to a collated batch with masks.

JPEG tiles are read, decoded, augmented (2x224 + 8x96 crops) and collated by the pipeline that training uses, and by a
plain one of torchvision's transforms on PIL images with DINOv2's augmentations. Both take turns batch by batch, so that
the ratio holds on a busy machine; times are processor time of one thread. `shares` say where the time goes.

`python benchmarks/loader.py speaker|spectrogram`: sound, see benchmarks/sound_loader.py.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ssl_platform.config import plugin_class
from ssl_platform.data.index import Index
from ssl_platform.data.order import Order
from ssl_platform.data.reading import ShardReader
from ssl_platform.data.shards import MicroBatches
from ssl_platform.masks.block import Config as BlockMasks
from ssl_platform.modalities._images import IMAGENET_MEAN, IMAGENET_STD

BATCH = 16


def write_tiles(path: Path, count: int, size: int) -> None:
    """A shard of JPEG tiles with detail at every scale, about as hard to compress as stained tissue."""
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as tar:
        for number in range(count):
            pixels = np.zeros((size, size, 3))
            for octave in (8, 32, 128, size):
                noise = Image.fromarray(rng.integers(0, 256, (octave, octave, 3), dtype=np.uint8))
                pixels += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 4
            encoded = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(encoded, "JPEG", quality=90)
            tar.write({"__key__": f"{number:06d}", "jpg": encoded.getvalue()})


class Clock:
    """Processor time spent inside the functions that it wraps."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self.spent[name] = 0.0

        def timed(*arguments: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[name] += time.process_time() - begun

        return timed


class Plain:
    """DINOv2's augmentations with torchvision's transforms on PIL images (`dinov2/data/augmentations.py`)."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        # What DINOv2 says, which its inverted RandomApply does not do: see the docstring of modalities/image.py.
        self.views = [self._transform(224, (0.32, 1.0), 1.0, 0.0), self._transform(224, (0.32, 1.0), 0.1, 0.2)]
        self.views += [self._transform(96, (0.05, 0.32), 0.5, 0.0)] * 8

    def _transform(self, size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, interpolation=bicubic, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur),
                v2.RandomSolarize(128, solarize),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def decode(self, data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def augment(self, image: Image.Image) -> list[Tensor]:
        return [transform(image) for transform in self.views]

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        views = [self.augment(self.decode(self.reader.read(sample).members["jpg"])) for sample in samples]
        return (
            torch.stack([torch.stack(view) for view in zip(*(v[:2] for v in views), strict=True)]),
            torch.stack([torch.stack(view) for view in zip(*(v[2:] for v in views), strict=True)]),
        )


def measure(modality_name: str, size: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A line for each pipeline, and their ratio."""
    write_tiles(folder / "tiles.tar", BATCH * 8, size)
    index = Index.open(folder)
    modality = plugin_class("ssl_platform.modalities", modality_name)().build(None)  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"seed": 0, "batch_size": BATCH, "first_step": 0, "last_step": rounds + 1}
    masks, order = {"block": BlockMasks().build()}, Order.of_shards(index.shard_counts, seed=0, window_shards=1)
    ours = MicroBatches(index, modality, masks, order=order, cache_shards=1, **settings)
    plain = Plain(ShardReader(index, 1))
    ours[0], plain.batch(range(BATCH))  # imports and caches
    clocks = {"ssl_platform": Clock(), "torchvision, PIL": Clock()}
    for clock, reader, stages in zip(clocks.values(), (ours.reader, plain.reader), (modality, plain), strict=True):
        reader.read = clock.wrap("read", reader.read)  # type: ignore[method-assign]
        for name in ("decode", "augment"):
            setattr(stages, name, clock.wrap(name, getattr(stages, name)))
    totals: dict[str, list[float]] = {name: [] for name in clocks}
    for step in range(1, rounds + 1):
        for name, work in (
            ("ssl_platform", lambda step=step: ours[step]),
            ("torchvision, PIL", lambda step=step: plain.batch(range(step % 8 * BATCH, (step % 8 + 1) * BATCH))),
        ):
            begun = time.process_time()
            work()
            totals[name].append(time.process_time() - begun)
    lines: list[dict[str, Any]] = []
    for name, clock in clocks.items():
        total = sum(totals[name])
        shares = {stage: round(spent / total, 3) for stage, spent in clock.spent.items()}
        shares["collate and masks" if name == "ssl_platform" else "collate"] = round(1 - sum(shares.values()), 3)
        rate = BATCH / statistics.median(totals[name])
        lines.append({"pipeline": name, "samples_per_second_per_core": round(rate, 1), "shares": shares})
    ratios = [theirs / mine for mine, theirs in zip(*totals.values(), strict=True)]
    lines.append(
        {
            "ratio": round(statistics.median(ratios), 2),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
            "rounds": rounds,
            "batch": BATCH,
            "kilobytes_per_tile": round((folder / "tiles.tar").stat().st_size / len(index) / 1000, 1),
        }
    )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["image", "pathology", "speaker", "spectrogram"]
    parser.add_argument("modality", choices=kinds, help="pathology adds stain jitter and rotations")
    parser.add_argument("--size", type=int, default=256, help="width and height of the tiles in pixels")
    parser.add_argument("--rounds", type=int, default=10, help="batches of each pipeline")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.modality in ("speaker", "spectrogram"):
            import sound_loader  # beside this file; it needs the extra audio

            lines = sound_loader.measure(arguments.modality, arguments.rounds, Path(folder), Clock())
        else:
            lines = measure(arguments.modality, arguments.size, arguments.rounds, Path(folder))
        for line in lines:
            sys.stdout.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
