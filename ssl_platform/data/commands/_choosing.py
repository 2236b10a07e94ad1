"""Which samples `ssl-pack prune` keeps, and by which rule each other one goes."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_platform.data.commands._examine import examine
from ssl_platform.data.commands._jobs import read_keys
from ssl_platform.data.commands._near_duplicates import near_duplicates, read_features, thumbnail_features
from ssl_platform.data.index import Index
from ssl_platform.data.order import generator
from ssl_platform.data.work_progress import WorkProgress

_NAMED = 5


class Rules(NamedTuple):
    """The options of the command; None = no such rule."""

    keep: float | None = None
    seed: int = 0
    scores: Path | None = None
    keep_top: float | None = None
    min_score: float | None = None
    max_score: float | None = None
    near_duplicates: float | None = None
    features: Path | None = None
    drop_bad: bool = False


@dataclass
class Choice:
    """What stays of N samples, and why others go."""

    is_kept: NDArray[np.bool_]
    """(N,)"""
    keys: list[str]
    dropped: dict[int, tuple[str, str]] = field(default_factory=dict)
    """{sample: (rule, why)}"""

    @property
    def left(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.is_kept)

    def drop(self, sample: int, rule: str, why: str) -> None:
        self.is_kept[sample] = False
        self.dropped[sample] = rule, why


def choose(index: Index, rules: Rules, workers: int) -> Choice:
    """Applies the rules in their order; raises ValueError if a file of scores or features does not fit the index."""
    features = None if rules.features is None else read_features(rules.features, len(index))
    has_bad = rules.drop_bad or (rules.near_duplicates is not None and features is None)
    everything = np.arange(len(index))
    found = examine(index, everything, workers=workers) if has_bad else None
    choice = Choice(np.ones(len(index), bool), found.keys if found else read_keys(index, everything, workers))
    scores = None if rules.scores is None else read_scores(rules.scores, choice.keys)
    if rules.drop_bad:
        assert found is not None
        for sample, why in found.bad.items():
            choice.drop(sample, "bad", why)
    if scores is not None:
        _by_score(choice, scores, rules)
    if rules.near_duplicates is not None:
        rows, left = features, choice.left
        if rows is None:
            assert found is not None
            rows, left = thumbnail_features(found.thumbnails), left[np.array(found.has_thumbnail)[left]]
            if not any(found.has_thumbnail):
                raise ValueError("--near-duplicates: no sample could be decoded as an image; give --features")
        order = left if scores is None else left[np.argsort(-scores[left], kind="stable")]
        with WorkProgress(len(order), "near-duplicates") as progress:
            twins = near_duplicates(rows, rules.near_duplicates, order=order, advance=progress.advance)
        for sample in np.flatnonzero(twins.of >= 0).tolist():
            twin = choice.keys[twins.of[sample]]
            choice.drop(sample, "near-duplicate", f"of {twin}, cosine {twins.similarity[sample]:.4f}")
    if rules.keep is not None:
        drawn = generator("prune", rules.seed).permutation(choice.left)
        for sample in drawn[round(rules.keep * len(drawn)) :].tolist():
            choice.drop(sample, "random", f"seed {rules.seed}")
    return choice


def _by_score(choice: Choice, scores: NDArray[np.float64], rules: Rules) -> None:
    """Equal scores: the first sample stays."""
    for sample in choice.left.tolist():
        score = scores[sample]
        if rules.min_score is not None and score < rules.min_score:
            choice.drop(sample, "score", f"{score:.6g} is below {rules.min_score:.6g}")
        elif rules.max_score is not None and score > rules.max_score:
            choice.drop(sample, "score", f"{score:.6g} is above {rules.max_score:.6g}")
    if rules.keep_top is not None:
        left = choice.left
        ranked = left[np.argsort(-scores[left], kind="stable")]
        for sample in ranked[round(rules.keep_top * len(left)) :].tolist():
            choice.drop(sample, "score", f"{scores[sample]:.6g} is not among the highest {rules.keep_top:.6g}")


def read_scores(path: Path, keys: list[str]) -> NDArray[np.float64]:
    """(N,): the score of each sample; raises ValueError that names what is wrong with the file."""
    if path.suffix.lower() == ".npy":
        try:
            given = np.load(path)
        except Exception as error:  # a damaged header makes `np.load` raise almost anything
            raise ValueError(f"{path}: cannot be read as a NumPy array ({error})") from error
        if given.shape != (len(keys),) or given.dtype.kind not in "fiu":
            raise ValueError(f"{path}: expected {len(keys)} numbers, one a sample, found {given.dtype} {given.shape}")
        scores: NDArray[np.float64] = given.astype(np.float64)
    else:
        scores = _read_table(path, keys)
    if len(bad := np.flatnonzero(~np.isfinite(scores))):
        raise ValueError(f"{path}: the score of '{keys[bad[0]]}' (id {bad[0]}) is not a finite number")
    return scores


def _read_table(path: Path, keys: list[str]) -> NDArray[np.float64]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() in (".tsv", ".tab") else ",")
            columns, rows = list(reader.fieldnames or []), [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table ({getattr(error, 'strerror', None) or error})") from error
    name = "key" if "key" in columns else "id"
    if name not in columns or "score" not in columns:
        raise ValueError(f"{path}: expected the columns key (or id) and score, found {', '.join(columns) or 'nothing'}")
    places = {key: place for place, key in enumerate(keys)} if name == "key" else {str(i): i for i in range(len(keys))}
    if len(places) < len(keys):
        raise ValueError(f"{path}: some samples have the same key, so scores by key are not clear: give the column id")
    scores, is_given = np.full(len(keys), math.nan), np.zeros(len(keys), bool)
    for line, row in rows:
        place = places.get(row[name] or "")
        if place is None:
            raise ValueError(f"{path}: line {line}: no sample has the {name} '{row[name]}'")
        if is_given[place]:
            raise ValueError(f"{path}: line {line}: the {name} '{row[name]}' is there twice")
        try:
            scores[place], is_given[place] = float(row["score"] or ""), True
        except ValueError:
            raise ValueError(f"{path}: line {line}: the score is '{row['score']}', expected a number") from None
    if missing := np.flatnonzero(~is_given).tolist():
        named = ", ".join(f"'{keys[place]}' (id {place})" for place in missing[:_NAMED])
        raise ValueError(f"{path}: {len(missing)} samples have no score: {named}{', ...' * (len(missing) > _NAMED)}")
    return scores
