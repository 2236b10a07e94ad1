"""Who is in train, val and test: splits of given shares that never divide a group."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from ssl_platform.data.identity import Numbered
from ssl_platform.data.order import generator

Splits = Mapping[str, float] | str | None
"""{name: share}, "column" for what the items say themselves, or None for no splits."""


def parse_splits(texts: Sequence[str]) -> Mapping[str, float] | str:
    """["train=0.8", "test=0.2"] or ["column"]; raises ValueError for anything else."""
    if list(texts) == ["column"]:
        return "column"
    splits: dict[str, float] = {}
    for text in texts:
        found = re.fullmatch(r"([A-Za-z0-9_-]+)=(\d*\.?\d+)", text)
        if found is None:
            raise ValueError(
                f"--split: '{text}': expected name=share, such as train=0.8 val=0.1 test=0.1, or column; "
                "INPUT and OUT stand before it"
            )
        if found[1] in splits:
            raise ValueError(f"--split: {found[1]} is there twice")
        splits[found[1]] = float(found[2])
    if abs(sum(splits.values()) - 1) > 1e-6 or min(splits.values()) <= 0:
        raise ValueError(f"--split: the shares add up to {sum(splits.values()):g}, expected 1, each above 0")
    return splits


def assign_splits(samples: Sequence[Numbered], splits: Splits, seed: int) -> dict[str, list[Numbered]]:
    """The samples of each split, in their order; {"": all} without splits. Raises ValueError if one would be empty.

    Groups are taken from the largest to the smallest, equal ones in an order of the seed, and each goes to the split
    that lacks most samples: shares come out close even with few large groups, where a hash of the group would leave
    them to chance. Samples without a group are groups of their own.
    """
    if splits is None:
        return {"": list(samples)}
    if isinstance(splits, str):
        return _as_they_say(samples)
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        group = sample.item.group
        groups.setdefault(f"alone {place}" if group is None else f"group {group}", []).append(place)
    if len(groups) < len(splits):
        raise ValueError(
            f"--split: {len(groups)} group{'s' * (len(groups) > 1)} cannot fill {len(splits)} splits, because a group "
            "is never divided; name fewer splits, or check the groups"
        )
    names = list(splits)
    missing = np.array([splits[name] * len(samples) for name in names])
    members = list(groups.values())
    order = generator("split", seed).permutation(len(members))
    found: list[list[int]] = [[] for _ in names]
    num_empty = len(names)
    for done, group_number in enumerate(sorted(order.tolist(), key=lambda one: -len(members[one]))):
        choice = missing.copy()
        if len(members) - done == num_empty:  # the last groups go where there is nothing yet
            choice[[bool(places) for places in found]] = -np.inf
        split = int(choice.argmax())
        num_empty -= not found[split]
        found[split] += members[group_number]
        missing[split] -= len(members[group_number])
    return {name: [samples[place] for place in sorted(places)] for name, places in zip(names, found, strict=True)}


def _as_they_say(samples: Sequence[Numbered]) -> dict[str, list[Numbered]]:
    splits: dict[str, list[Numbered]] = {}
    of_group: dict[int | str, str] = {}
    for sample in samples:
        split, group = sample.item.split, sample.item.group
        assert split is not None, "the source gives every item its split"
        if group is not None and of_group.setdefault(group, split) != split:
            raise ValueError(
                f"--split column: the group of the sample with the key {sample.key} is in {of_group[group]} and in {split}; "
                "a group must be in one split, or a test would see what was trained on"
            )
        splits.setdefault(split, []).append(sample)
    return splits
