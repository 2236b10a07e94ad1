"""The numbers of `ssl-pack inspect`, from the index and from the samples that are read."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.commands._examine import Examined, examine
from ssl_platform.data.commands._near_duplicates import Twins, near_duplicates, read_features, thumbnail_features
from ssl_platform.data.index import Index
from ssl_platform.data.order import generator
from ssl_platform.data.remote import RemoteSettings
from ssl_platform.data.work_progress import WorkProgress
from ssl_platform.location import Url

MAX_LISTED = 200
"""Bad samples and groups of duplicates that a report names; all are counted."""
MAX_LABELS = 30
"""With pictures."""
_SHOWN_GROUPS = 24
_BINS = 30
_SPLITS = re.compile(r"(?<![a-z])(train|training|val|valid|validation|dev|test)(?![a-z])")


def survey(
    paths: Sequence[Path | Url],
    *,
    sample: int | None,
    seed: int,
    threshold: float,
    features: Path | None,
    pictures_a_label: int,
    workers: int,
    remote: RemoteSettings | None = None,
) -> tuple[dict[str, Any], dict[int, bytes]]:
    """The report, as `inspect.json` holds it, and {sample: JPEG}; the arguments are the command's options."""
    index = Index.open(paths, remote)
    given = None if features is None else read_features(features, len(index))
    samples = np.arange(len(index))
    if sample is not None and sample < len(index):
        samples = np.sort(generator("inspect", seed).choice(len(index), sample, replace=False))
    chosen = _chosen(index, samples, pictures_a_label, seed)
    pictured = [picture for _, group in chosen for picture in group]
    found = examine(index, samples, pictures=pictured, workers=workers)
    comparable = np.flatnonzero(found.has_thumbnail if given is None else [bool(hash_) for hash_ in found.hashes])
    with WorkProgress(len(comparable), "near-duplicates") as progress:
        if given is None:
            rows = thumbnail_features(found.thumbnails)
        else:
            rows = given if len(samples) == len(index) else given[samples]
        twins = near_duplicates(rows, threshold, order=comparable, advance=progress.advance)
    near = _near_groups(found, twins)
    extra = [member for group in near[:_SHOWN_GROUPS] for member, _ in group[:4]]
    missing = np.array(sorted({int(samples[place]) for place in extra} - found.pictures.keys()), dtype=np.int64)
    if len(missing):
        found.pictures |= examine(index, missing, pictures=missing.tolist(), workers=1).pictures
    report = {
        "samples": len(index),
        "shards": index.num_shards,
        "bytes": int((index.stops - index.starts).sum()),
        "examined": len(samples),
        "seed": seed,
        "statistics": index.statistics,
        "sources": _sources(paths, remote),
        "labels": _labels(index),
        "unlabelled": int((index.labels < 0).sum()),
        "groups": _groups(index),
        "splits": _splits(index, found),
        "bad": {
            "samples": len(found.bad),
            "listed": [_named(index, found, number) | {"reason": found.bad[number]} for number in _first(found.bad)],
        },
        "duplicates": _duplicates(found),
        "near_duplicates": {
            "compared": len(comparable),
            "features": "thumbnails" if given is None else "given",
            "threshold": threshold,
            "redundant": int((twins.of >= 0).sum()),
            "groups": len(near),
            "listed": [
                [
                    {"sample": int(samples[place]), "key": found.keys[place], "cosine": round(cosine, 4)}
                    for place, cosine in group[:20]
                ]
                for group in near[:MAX_LISTED]
            ],
            "sizes": [len(group) for group in near[:MAX_LISTED]],
        },
        "members": {
            extension: dict(zip(("number", "bytes", "smallest", "largest"), totals, strict=True))
            for extension, totals in sorted(found.members.items())
        },
        "histograms": _histograms(found.numbers),
        "pictures": [
            {"label": label, "samples": [_named(index, found, number) for number in group if number in found.pictures]}
            for label, group in chosen
        ],
    }
    return report, found.pictures


def _chosen(index: Index, samples: NDArray[np.int64], number: int, seed: int) -> list[tuple[str, list[int]]]:
    """(label, samples to show): a seeded choice for each label, the largest labels first."""
    labels = index.labels[samples]
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_LABELS]
    random = generator("inspect pictures", seed)
    return [
        (label_name(index, value), np.sort(random.permutation(samples[labels == value])[:number]).tolist())
        for value in values[order].tolist()
    ]


def label_name(index: Index, label: int) -> str:
    return "(none)" if label < 0 else index.label_names[label] if index.label_names else str(label)


def _named(index: Index, found: Examined, sample: int) -> dict[str, Any]:
    place = int(np.searchsorted(found.samples, sample))
    shard = index.shards[int(index.shard_of[sample])].name
    return {"sample": sample, "key": found.keys[place], "shard": shard}


def _first(bad: dict[int, str]) -> list[int]:
    return sorted(bad)[:MAX_LISTED]


def _sources(paths: Sequence[Path | Url], remote: RemoteSettings | None) -> list[dict[str, Any]]:
    sources = []
    for path in paths:
        part = Index.open(path, remote)
        sources.append({"path": path.name or path.resolve().name, "shards": part.num_shards, "samples": len(part)})
    return sources


def _labels(index: Index) -> dict[str, int]:
    values, counts = np.unique(index.labels[index.labels >= 0], return_counts=True)
    return {label_name(index, value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def _groups(index: Index) -> dict[str, Any]:
    """Sizes only: a group may be a patient."""
    _, counts = np.unique(index.groups[index.groups >= 0], return_counts=True)
    if not len(counts):
        return {"number": 0, "without": len(index)}
    return {
        "number": len(counts),
        "without": int((index.groups < 0).sum()),
        "smallest": int(counts.min()),
        "median": float(np.median(counts)),
        "largest": int(counts.max()),
    }


def _splits(index: Index, found: Examined) -> dict[str, int]:
    """By the `split` of a sample's JSON among those read, else by a word such as "train" in the path of the shards."""
    if any(found.splits):
        return dict(sorted(Counter(split or "(none)" for split in found.splits).items()))
    by_path = Counter[str]()
    for shard, count in zip(index.shards, index.shard_counts, strict=True):
        word = _SPLITS.search(shard.name.lower()) or _SPLITS.search(shard.parent.name.lower())
        by_path[word[1] if word else "(none)"] += count
    return {} if set(by_path) == {"(none)"} else dict(sorted(by_path.items()))


def _duplicates(found: Examined) -> dict[str, Any]:
    places = defaultdict[bytes, list[int]](list)
    for place, data_hash in enumerate(found.hashes):
        if data_hash:
            places[data_hash].append(place)
    groups = sorted((group for group in places.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))
    by_key = Counter(found.keys)
    return {
        "redundant": sum(len(group) - 1 for group in groups),
        "groups": len(groups),
        "listed": [[found.keys[place] for place in group[:20]] for group in groups[:MAX_LISTED]],
        "sizes": [len(group) for group in groups[:MAX_LISTED]],
        "keys_used_twice": sum(1 for times in by_key.values() if times > 1),
    }


def _near_groups(found: Examined, twins: Twins) -> list[list[tuple[int, float]]]:
    """Groups of (place in `found`, cosine with the first), the largest groups first; the kept sample is the first."""
    groups = defaultdict[int, list[tuple[int, float]]](list)
    for place in np.flatnonzero(twins.of >= 0).tolist():
        groups[int(twins.of[place])].append((place, float(twins.similarity[place])))
    whole = [[(kept, 1.0), *others] for kept, others in groups.items()]
    return sorted(whole, key=lambda group: (-len(group), group[0][0]))


def _histograms(numbers: Sequence[dict[str, float]]) -> dict[str, Any]:
    """{quantity: counts, edges (one more) and a few percentiles}; columns that are not all numbers are left out."""
    values = defaultdict[str, list[float]](list)
    for sample in numbers:
        for name, value in sample.items():
            values[name].append(value)
    histograms = {}
    for name, given in values.items():
        array = np.array(given, dtype=np.float64)
        if not np.isfinite(array).all() or abs(array).max() > 1e300:
            continue
        distinct, times = np.unique(array, return_counts=True)
        low, *middle, high = np.percentile(array, [0, 5, 50, 95, 100]).tolist()
        summary = {
            "samples": len(array),
            "min": low,
            "p5": middle[0],
            "median": middle[1],
            "p95": middle[2],
            "max": high,
        }
        if len(distinct) <= _BINS:
            histograms[name] = summary | {"values": distinct.tolist(), "counts": times.tolist()}
        else:
            counts, edges = np.histogram(array, bins=_BINS)
            histograms[name] = summary | {"edges": edges.tolist(), "counts": counts.tolist()}
    return histograms
