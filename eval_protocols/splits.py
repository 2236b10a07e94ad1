"""Which samples of two splits can be scored together: labels, groups and the samples themselves matched across them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval_protocols.metrics import Integers
from ssl_platform.data.index import Index


@dataclass(frozen=True)
class Samples:
    """The samples of a split that can be scored."""

    numbers: Integers
    """(N,) ascending: their places in the index of the split."""
    ids: Integers
    """(N,) unique; the same number is the same sample of the same shard, in the other split too."""
    labels: Integers
    """(N,) positions in `label_names`."""
    groups: Integers
    """(N,) the same number is the same patient, slide or speaker, in the other split too; -1 = none."""
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Samples":
        numbers, ids, labels, groups = (part[chosen] for part in (self.numbers, self.ids, self.labels, self.groups))
        return Samples(numbers, ids, labels, groups, self.label_names)


def match(train: Index, test: Index) -> tuple[Samples, Samples, dict[str, int]]:
    """The samples of both splits that have a label, with labels and groups matched by NAME, and what was left out.

    Classes are those that train samples have. A test sample of another class cannot be predicted right by any
    classifier fitted on the train split, so it is left out and counted, not scored as an error.
    Raises ValueError if what is left cannot be scored.
    """
    for name, index in {"train": train, "test": test}.items():
        if not (index.labels >= 0).any():
            raise ValueError(f"--{name}: none of the {len(index)} samples has a label; pack the data with labels")
    label_names = tuple(_names(train.labels, train.label_names).values())
    if len(label_names) < 2:
        raise ValueError(f"--train: every labelled sample is '{label_names[0]}'; at least two classes are needed")
    of_label = {name: number for number, name in enumerate(label_names)}
    of_group: dict[str, int] = {}
    both = []
    for index, ids in ((train, np.arange(len(train))), (test, _shared_ids(train, test))):
        group_names = _names(index.groups, index.group_names)
        of_group |= {
            name: len(of_group) + place for place, name in enumerate(sorted({*group_names.values()} - {*of_group}))
        }
        labels = _renumber(
            index.labels, {old: of_label.get(name, -1) for old, name in _names(index.labels, index.label_names).items()}
        )
        groups = _renumber(index.groups, {old: of_group[name] for old, name in group_names.items()})
        both.append(Samples(np.arange(len(index)), ids, labels, groups, label_names)[labels >= 0])
    if len(both[1]) == 0:
        found = _names(test.labels, test.label_names).values()
        raise ValueError(
            f"no label of the test split ({_listing(found)}) occurs in the train split ({_listing(label_names)}); "
            "labels are matched by name"
        )
    if len(scored := np.unique(both[1].labels)) < 2:
        raise ValueError(f"--test: every sample to be scored is '{label_names[scored[0]]}'; two classes are needed")
    return both[0], both[1], _counts(train, test, *both)


def _counts(train: Index, test: Index, train_samples: Samples, test_samples: Samples) -> dict[str, int]:
    groups = [set(samples.groups.tolist()) - {-1} for samples in (train_samples, test_samples)]
    return {
        "train": len(train_samples),
        "test": len(test_samples),
        "train_groups": len(groups[0]),
        "test_groups": len(groups[1]),
        "train_without_label": int((train.labels < 0).sum()),
        "test_without_label": int((test.labels < 0).sum()),
        "test_label_not_in_train": int((test.labels >= 0).sum()) - len(test_samples),
        "samples_in_both": len(np.intersect1d(train_samples.ids, test_samples.ids)),
        "groups_in_both": len(groups[0] & groups[1]),
    }


def _names(numbers: Integers, names: Sequence[str]) -> dict[int, str]:
    """{number: name} of the labels or groups that occur; data that numbers them has no names but the numbers."""
    present = np.unique(numbers[numbers >= 0]).tolist()
    return {number: names[number] if names else str(number) for number in present}


def _renumber(numbers: Integers, new: Mapping[int, int]) -> Integers:
    old, place = np.unique(numbers, return_inverse=True)
    return np.array([new.get(number, -1) for number in old.tolist()], np.int64)[place.reshape(-1)]


def _shared_ids(train: Index, test: Index) -> Integers:
    """(N,) of the test samples: their number in `train` if its shard is one of `train`, else len(train) + their own."""
    first_in_train = {
        shard.resolve(): start for shard, start in zip(train.shards, train.shard_ranges[:, 0], strict=True)
    }
    ids = len(train) + np.arange(len(test))
    for shard, (start, stop) in zip(test.shards, test.shard_ranges, strict=True):
        if (first := first_in_train.get(shard.resolve())) is not None:
            ids[start:stop] = first + np.arange(stop - start)
    return ids


def _listing(names: Iterable[str], limit: int = 8) -> str:
    first = [f"'{name}'" for name in names]
    return ", ".join(first[:limit]) + ", ..." * (len(first) > limit)
