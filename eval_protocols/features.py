"""From shards to features: what an encoder, and the baselines that it must beat, make of two labelled splits."""

import argparse
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from eval_protocols.metrics import Integers
from eval_protocols.splits import Samples, match
from ssl_platform.data.index import Index
from ssl_platform.data.remote import RemoteSettings, add_cache_arguments
from ssl_platform.data.shards import preprocessed
from ssl_platform.encoder import Encoder
from ssl_platform.location import location

PIXEL_LIMIT = 3 * 64 * 64
"""Numbers per sample that the pixel baseline keeps; larger views are averaged over squares first."""


@dataclass(frozen=True)
class FeatureSet:
    """One feature vector per sample, with what scores it."""

    features: NDArray[np.floating]
    """(N, D) float32"""
    labels: Integers
    """(N,) positions in `label_names`."""
    groups: Integers
    """(N,) -1 = none."""
    ids: Integers
    """(N,) unique; the same number is the same sample, in the other split too."""
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.features.ndim == 2
        assert len(self.features) == len(self.labels) == len(self.groups) == len(self.ids)


def extract(
    batches: Iterable[tuple[Tensor, Tensor]],
    index: Index,
    samples: Samples,
    networks: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    device: torch.device,
    description: str,
) -> dict[str, FeatureSet]:
    """The features that each network makes of `samples`, in one pass over the data.

    batches: (views (B, *shape), numbers in `index` (B,)), in the order of `samples`.
    networks: {name: views on `device` -> features (B, D)}.
    Raises ValueError naming the sample if a feature is not a finite number.
    """
    collected: dict[str, NDArray[np.float32]] = {}
    done = 0
    with torch.inference_mode(), progress(len(samples), description) as advance:
        for views, numbers in batches:
            place = slice(done, done + len(numbers))
            assert (np.asarray(numbers) == samples.numbers[place]).all(), "every sample once, in order"
            views = views.to(device, non_blocking=True)
            for name, network in networks.items():
                rows = network(views).float().cpu().numpy()  # (B, D)
                if (bad := first_bad(rows)) is not None:
                    raise ValueError(
                        f"{description}, {name}: the features of {sample_name(index, int(numbers[bad]))} are not all "
                        "finite numbers; the network has diverged, or its input holds nan or infinity"
                    )
                if name not in collected:
                    collected[name] = np.empty((len(samples), rows.shape[1]), np.float32)
                collected[name][place] = rows
            done = place.stop
            advance(len(numbers))
    assert done == len(samples)
    return {
        name: FeatureSet(rows, samples.labels, samples.groups, samples.ids, samples.label_names)
        for name, rows in collected.items()
    }


def sample_name(index: Index, number: int) -> str:
    """Where to find a sample: "sample 12 of shards/train-0003.tar" (counted from 0 in its shard)."""
    shard = int(index.shard_of[number])
    return f"sample {number - int(index.shard_ranges[shard, 0])} of {index.shards[shard]}"


def first_bad(features: NDArray[np.floating]) -> int | None:
    """The first row (N, D) with a number that is nan or infinite."""
    bad = ~np.isfinite(features).all(1)
    return int(bad.argmax()) if bad.any() else None


def pixels(views: Tensor) -> Tensor:
    """The baseline that knows nothing: the preprocessed values of a view as its features, (B, C, *spatial) -> (B, D).

    Where D would exceed PIXEL_LIMIT, areas are averaged: n values along an axis become ceil(n / f), with the smallest
    whole number f that suffices.
    """
    channels, spatial = views.shape[1], views.shape[2:]
    if not 1 <= len(spatial) <= 3:
        return views.flatten(1)
    factor, size = 1, list(spatial)
    while channels * math.prod(size) > PIXEL_LIMIT and max(size) > 1:
        factor += 1
        size = [-(-length // factor) for length in spatial]
    return (views if factor == 1 else functional.interpolate(views.float(), size, mode="area")).flatten(1)


# -- for every protocol that scores frozen features ------------------------------------------------------------------


@dataclass(frozen=True)
class Extracted:
    """The features of a checkpoint and of its baselines, on the same samples."""

    networks: dict[str, tuple[FeatureSet, FeatureSet]]
    """{name: (train, test)}, the checkpoint's network first."""
    facts: dict[str, Any]
    """`checkpoint` and `data`, as the result states them."""
    notes: list[str]
    """What was left out."""


def positive(text: str) -> int:
    """An option's whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got '{text}'")
    return int(text)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is scored on what, the same for each protocol."""
    group = parser.add_argument_group("what is scored")
    group.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="run folder (its latest), checkpoint or export"
    )
    shards = "labelled shards: folders, tars or quoted patterns such as 'shards/train-*.tar'; URLs too"
    group.add_argument("--train", type=location, nargs="+", required=True, metavar="SHARDS", help=shards)
    group.add_argument(
        "--test", type=location, nargs="+", required=True, metavar="SHARDS", help="the same, to be predicted"
    )
    group.add_argument(
        "--network", default="teacher", metavar="NAME", help="which network of the checkpoint (%(default)s)"
    )
    group.add_argument(
        "--baselines",
        nargs="*",
        choices=("random", "pixels"),
        default=["random", "pixels"],
        help="scored beside it: the network as it was before the first step, the preprocessed pixels (both)",
    )
    group.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="samples per forward pass (%(default)s)"
    )
    group.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that read and preprocess (%(default)s)"
    )
    add_cache_arguments(group)
    group.add_argument("--device", help="such as cpu or cuda:1 (a GPU if there is one)")
    group.add_argument("--seed", type=int, default=0, help="of the resampling (%(default)s)")


def scored_networks(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[Encoder, dict[str, Callable[[Tensor], Tensor]]]:
    """The encoder, and {name: views -> features} of it and of the baselines that are scored beside it."""
    encoder = Encoder.load(arguments.checkpoint, network=arguments.network).to(device)
    networks: dict[str, Callable[[Tensor], Tensor]] = {arguments.network: lambda views: encoder(views).cls}
    if "random" in arguments.baselines:
        random = Encoder.load(arguments.checkpoint, network=arguments.network, random_init=True).to(device)
        networks["random"] = lambda views: random(views).cls
    if "pixels" in arguments.baselines:
        networks["pixels"] = pixels
    return encoder, networks


def read_features(arguments: argparse.Namespace) -> Extracted:
    """Extracts what `add_input_arguments` asks for; raises ValueError if that cannot be scored."""
    device = choose_device(arguments.device)
    remote = RemoteSettings.of_arguments(arguments)
    indexes = Index.open(arguments.train, remote), Index.open(arguments.test, remote)
    match(*indexes)  # complains before anything slow
    encoder, networks = scored_networks(arguments, device)

    def read(index: Index, numbers: list[int]) -> Generator[tuple[Tensor, Tensor], None, None]:
        sizes = {"batch_size": arguments.batch_size, "workers": arguments.workers}
        return preprocessed(index, encoder.modality, ids=numbers, **sizes)

    extracted = extract_splits(*indexes, read, networks, device)
    checkpoint = {
        "path": str(arguments.checkpoint),
        "network": arguments.network,
        "step": encoder.config.step,
        "embed_dim": encoder.embed_dim,
        "preprocessing": encoder.modality.description(),
    }
    notes = extracted.notes
    if "random" in networks and any(
        getattr(each.backbone, "pretrained", False) for each in encoder.config.networks.values()
    ):
        notes = [*notes, "The run began with released weights: its baseline at step 0 is those, not random ones."]
    return replace(extracted, facts={"checkpoint": checkpoint, **extracted.facts}, notes=notes)


def extract_splits(
    train_index: Index,
    test_index: Index,
    read: Callable[[Index, list[int]], Generator[tuple[Tensor, Tensor], None, None]],
    networks: Mapping[str, Callable[[Tensor], Tensor]],
    device: torch.device,
) -> Extracted:
    """The features that each network makes of the samples of both splits that can be scored; `facts` hold `data`.

    `read(index, numbers)` gives their views in batches, as `extract` takes them.
    """
    train, test, counts = match(train_index, test_index)
    found: list[dict[str, FeatureSet]] = []
    for name, index, samples in (("train", train_index, train), ("test", test_index, test)):
        if found and index.shards == train_index.shards and np.array_equal(samples.numbers, train.numbers):
            found.append(found[0])  # the same split again
            continue
        with closing(read(index, samples.numbers.tolist())) as batches:  # or workers would outlive an error
            found.append(extract(batches, index, samples, networks, device=device, description=f"{name} features"))
    per_class = [np.bincount(samples.labels, minlength=len(train.label_names)).tolist() for samples in (train, test)]
    data = {
        "train": [str(shard) for shard in train_index.shards],
        "test": [str(shard) for shard in test_index.shards],
        "counts": counts,
        "label_names": train.label_names,
        "train_per_class": per_class[0],
        "test_per_class": per_class[1],
    }
    notes = [
        f"{counts[key]} {split} samples {reason} and are left out."
        for key, split, reason in (
            ("train_without_label", "train", "have no label"),
            ("test_without_label", "test", "have no label"),
            ("test_label_not_in_train", "test", "have a label that no train sample has"),
        )
        if counts[key]
    ]
    return Extracted({name: (found[0][name], found[1][name]) for name in networks}, {"data": data}, notes)


def choose_device(name: str | None) -> torch.device:
    """The device of that name, a GPU if there is one for None; raises ValueError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); use cpu, cuda or cuda:0") from error
    return device


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal and nothing elsewhere; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
