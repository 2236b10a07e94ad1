"""The features of every sample, for `ssl-pack inspect --features`, `ssl-pack prune --features` and your own tools.

What comes out: FILE.npy, float32 (N, D): the CLS features of the N samples of the shards, in the order of their index
(the shards as given, in a folder by name; the samples as they lie in them). No labels are needed. A sample that cannot
be read is an error that names it: `ssl-pack prune --drop-bad` leaves such samples out.

examples:
  ssl-eval extract --checkpoint runs/skin --shards shards --out features.npy
  ssl-pack prune shards distinct --near-duplicates 0.95 --features features.npy
"""

import argparse
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from eval_protocols.features import choose_device, first_bad, positive, progress, sample_name
from ssl_platform.data.index import Index
from ssl_platform.data.remote import RemoteSettings, add_cache_arguments
from ssl_platform.data.shards import preprocessed
from ssl_platform.data.tars import atomic_file
from ssl_platform.encoder import Encoder
from ssl_platform.location import location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the protocol."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="run folder, checkpoint or export"
    )
    parser.add_argument(
        "--shards", type=location, nargs="+", required=True, metavar="SHARDS", help="folders, tars, patterns, URLs"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="the file to write")
    parser.add_argument("--network", default="teacher", metavar="NAME", help="which network (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="samples at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read (%(default)s)")
    add_cache_arguments(parser)
    parser.add_argument("--device", help="such as cpu or cuda:1 (a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0."""
    out: Path = arguments.out
    if out.suffix != ".npy" or not out.parent.is_dir():
        raise ValueError(f"--out {out}: expected a name that ends in .npy, in a folder that exists")
    device = choose_device(arguments.device)
    index = Index.open(arguments.shards, RemoteSettings.of_arguments(arguments))
    encoder = Encoder.load(arguments.checkpoint, network=arguments.network).to(device)
    features = np.empty((len(index), encoder.embed_dim), np.float32)
    batches = preprocessed(index, encoder.modality, batch_size=arguments.batch_size, workers=arguments.workers)
    with torch.inference_mode(), closing(batches), progress(len(index), "features") as advance:
        for views, numbers in batches:
            rows = encoder(views.to(device, non_blocking=True)).cls.float().cpu().numpy()  # (B, D)
            if (bad := first_bad(rows)) is not None:
                raise ValueError(f"the features of {sample_name(index, int(numbers[bad]))} are not all finite numbers")
            features[numbers.numpy()] = rows
            advance(len(rows))
    with atomic_file(out) as file:
        np.save(file, features)
    sys.stdout.write(f"{out}: {len(features)} samples, {features.shape[1]} features each\n")
    return 0
