"""Trials of speaker verification: pairs of utterances, drawn from the labels or read from a list."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval_protocols.metrics import Integers

_ANSWERS = {"1": True, "target": True, "0": False, "nontarget": False}


class Trials(NamedTuple):
    """Pairs of samples."""

    pairs: Integers
    """(N, 2): rows of the features."""
    is_target: NDArray[np.bool_]
    """(N,) whether both are of one speaker."""


def draw_trials(speakers: Integers, per_speaker: int = 500, seed: int = 0) -> Trials:
    """Trials of samples (N,) whose speakers are given, -1 = none.

    Of each speaker up to `per_speaker` pairs of its own samples, and as many of one of its samples and one of another
    speaker's, who is drawn first; a pair is there once. Raises ValueError if there are none of either kind.
    """
    rng = np.random.default_rng(seed)
    own = {int(speaker): np.flatnonzero(speakers == speaker) for speaker in np.unique(speakers[speakers >= 0])}
    if len(own) < 2 or max(map(len, own.values())) < 2:
        raise ValueError(
            f"trials need two speakers, and one with two samples: the labels name {len(own)} speakers, with "
            f"{max(map(len, own.values()), default=0)} samples at most"
        )
    names = np.array(list(own))
    targets, others = [], []
    for place, samples in enumerate(own.values()):
        num_pairs = len(samples) * (len(samples) - 1) // 2
        drawn = np.arange(num_pairs)
        if num_pairs > per_speaker:
            drawn = np.sort(rng.choice(num_pairs, per_speaker, replace=False))
        second = np.floor((1 + np.sqrt(1 + 8 * drawn.astype(np.float64))) / 2).astype(np.int64)  # the triangle's row
        first = drawn - second * (second - 1) // 2
        targets.append(np.stack([samples[first], samples[second]], 1))
        strangers = names[(place + 1 + rng.integers(len(names) - 1, size=len(drawn))) % len(names)]
        one = samples[rng.integers(len(samples), size=len(drawn))]
        other = [own[int(stranger)][rng.integers(len(own[int(stranger)]))] for stranger in strangers]
        others.append(np.sort(np.stack([one, np.array(other, np.int64)], 1), axis=1))
    different = np.unique(np.concatenate(others), axis=0)
    pairs = np.concatenate([*targets, different])
    return Trials(pairs, np.arange(len(pairs)) < len(pairs) - len(different))


def read_trials(file: Path, keys: Mapping[str, int]) -> Trials:
    """The trials of a file, with rows of `keys`; raises ValueError that names the line."""
    pairs, is_target = [], []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--trials {file}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not (words := line.split()):
            continue
        if len(words) == 3 and words[0] in _ANSWERS and words[2] not in _ANSWERS:
            words = [*words[1:], words[0]]
        if len(words) != 3 or words[2] not in _ANSWERS:
            raise ValueError(
                f"{file}: line {number}: expected `1 a b`, `0 a b`, `a b target` or `a b nontarget`: {line}"
            )
        rows = [keys.get(name, keys.get(name.rpartition(".")[0], -1)) for name in words[:2]]
        if -1 in rows:
            raise ValueError(
                f"{file}: line {number}: no sample with the key '{words[rows.index(-1)]}' in the shards, whose keys are "
                f"such as '{next(iter(keys))}'; ssl-pack --plain-names keeps the names of files"
            )
        pairs.append(rows)
        is_target.append(_ANSWERS[words[2]])
    if len({*is_target}) < 2:
        raise ValueError(f"{file}: expected target trials and others; there are {len(pairs)} trials, all of one kind")
    return Trials(np.array(pairs, np.int64), np.array(is_target))


def check_speakers(trials: Trials, speakers: Integers, file: Path) -> None:
    """Raises ValueError if a trial is not what the labels of its samples say."""
    sides = speakers[trials.pairs]  # (N, 2)
    wrong = ((sides[:, 0] == sides[:, 1]) != trials.is_target) & (sides >= 0).all(1)
    if wrong.any():
        raise ValueError(
            f"--trials {file}: {int(wrong.sum())} trials, the first is number {int(wrong.argmax()) + 1}, are not what the "
            "labels of the shards say; labels must be speakers"
        )
