"""`python benchmarks/checkpoint.py`: how long a step waits for a checkpoint, written beside the training or before it.

A network of `--mb` megabytes with its two moments, as AdamW leaves them; a save that returns once the copy is made, and one
that is waited for, take turns in one process. One line for each pair, then the median of the ratios.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from ssl_platform.checkpoint import TrainState
from ssl_platform.saving import Saver

NUM_TENSORS = 50


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mb", type=int, default=100, help="of the network; twice as much for the moments (%(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=7, help="saves of each kind (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (the one for temporary files)")
    parser.add_argument("--device", default="cpu", help="where the network is (%(default)s)")
    arguments = parser.parse_args()
    shape = (NUM_TENSORS, arguments.mb * 250_000 // NUM_TENSORS)
    model = {str(i): row for i, row in enumerate(torch.randn(shape, device=arguments.device))}
    moments = {f"{key}/{name}": value.square() for key, value in model.items() for name in ("exp_avg", "exp_avg_sq")}
    size = 3 * arguments.mb
    sys.stdout.write(f"{size} MB a checkpoint\nthe step waits  until it is on the disk  ratio\n")
    ratios = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saver = Saver(Path(folder), 1, None, 600)
        for pair in range(arguments.pairs + 1):
            seconds = []
            for waited in (False, True):
                state = TrainState(step=2 * pair + waited, batch_size=1, accumulate=1, world_size=1, seed=0)
                began = time.perf_counter()
                saver.begin(state, "", model, moments)
                if waited:
                    saver.take()
                seconds.append(time.perf_counter() - began)
                saver.take()
            if pair:  # the first one makes the buffers
                ratios.append(seconds[1] / seconds[0])
                sys.stdout.write(f"{seconds[0]:12.3f} s  {seconds[1]:21.2f} s  {ratios[-1]:5.1f}\n")
            else:
                sys.stdout.write(f"{seconds[0]:12.3f} s  (the first, which also takes the memory)\n")
    low, high = min(ratios), max(ratios)
    sys.stdout.write(f"median ratio {statistics.median(ratios):.1f} (lowest {low:.1f}, highest {high:.1f})\n")


if __name__ == "__main__":
    main()
