"""`python benchmarks/memory.py`: does the memory of a run stay flat however many samples it has seen?

Streams 100,000 samples (20 small shards of 500, so ten epochs) through the training pipeline, reading, order, views and
collating included, with views that cost nothing; first in this process, then with two workers. One line every 10,000
samples: the resident memory of this process and, each apart, of its workers.
"""

import argparse
import io
import multiprocessing
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_platform.data.index import Index
from ssl_platform.data.order import Order
from ssl_platform.data.shards import train_batches
from ssl_platform.modalities import GroupSpec
from ssl_platform.views import SampleViews

BATCH = 100


class Bytes:
    """A modality whose example is a sample's bytes and whose two views show it as it is."""

    groups = {"global": GroupSpec(2, (64,), (4,))}

    def decode(self, record: dict[str, bytes]) -> torch.Tensor:
        return torch.frombuffer(bytearray(record["bin"]), dtype=torch.uint8)

    def augment(self, examples: tuple[torch.Tensor, ...], rng: np.random.Generator) -> dict[str, SampleViews]:
        return {"global": SampleViews(examples[0].expand(2, -1), torch.tensor([0, 1]))}


def write_shards(folder: Path, num_shards: int, num_samples: int) -> None:
    """Shards of samples of 64 bytes."""
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for sample in range(num_samples):
                member = tarfile.TarInfo(f"{shard:02d}_{sample:03d}.bin")
                member.size = 64
                tar.addfile(member, io.BytesIO(bytes([sample % 256]) * 64))


def resident(process: int | str) -> float:
    """MB of a process in memory, its shared pages included."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1e3


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="default 100,000")
    num_steps = parser.parse_args().samples // BATCH
    modality: Any = Bytes()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), 20, 500)
        index = Index.open(Path(folder))
        for workers in (0, 2):
            order = Order.of_shards(index.shard_counts, 0, 4)
            batches = train_batches(
                index, modality, {}, order=order, seed=0, batch_size=BATCH, first_step=0, last_step=num_steps,
                cache_shards=4, workers=workers, prefetch=2,
            )  # fmt: skip
            with closing(batches):
                for batch in batches:
                    seen = (batch.step + 1) * BATCH
                    if seen % 10_000 == 0:
                        theirs = [resident(worker.pid) for worker in multiprocessing.active_children() if worker.pid]
                        figures = "".join(f"  {megabytes:6.1f} MB" for megabytes in [resident("self"), *theirs])
                        sys.stdout.write(f"{workers} workers  {seen:7,} samples{figures}\n")
                        sys.stdout.flush()


if __name__ == "__main__":
    main()
