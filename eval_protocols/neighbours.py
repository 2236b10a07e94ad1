"""The most similar train samples of each test sample: exact, with ties settled and chosen samples left out."""

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from eval_protocols.metrics import Floats, Integers

MARGIN = 64  # neighbours fetched beyond k, so that float32 rounding cannot hide one of the first k
MAX_WIDTH = 2048  # candidates per test sample beyond which one float64 pass over all train samples is cheaper
BLOCK_ELEMENTS = 1 << 23  # of a float64 array, 64 MB
SEARCHED_AT_ONCE = 1024  # test samples in one call of faiss, which is slow for a few


class Neighbours(NamedTuple):
    """The most similar train samples of each test sample, the nearest first."""

    similarities: Floats
    """(M, K) cosines"""
    rows: Integers
    """(M, K) rows of the train features."""


def nearest(
    train: NDArray[np.floating],
    test: NDArray[np.floating],
    k: int,
    *,
    train_keys: Integers | None = None,
    test_keys: Integers | None = None,
) -> Neighbours:
    """The k train rows (N, D) with the largest cosine to each test row (M, D); exact, with ties settled.

    Ordered by similarity, then by row: similarities closer than 1e-12 are equal. Rows of `train` whose key (>= 0) is
    that of the test row are never its neighbours. faiss proposes candidates in float32; they are scored again in
    float64, and where rounding could have hidden a neighbour (a collapsed encoder), all train rows are.
    """
    if train_keys is None or test_keys is None:
        train_keys, test_keys = np.full(len(train), -1), np.full(len(test), -1)
    spare = most_excluded(train_keys, test_keys)
    assert 1 <= k <= len(train) - spare
    norms = _norms(train)
    found = Neighbours(np.empty((len(test), k)), np.empty((len(test), k), np.int64))
    undecided = np.ones(len(test), bool)
    width = min(len(train), k + spare + MARGIN)
    if width <= MAX_WIDTH:
        index = faiss.IndexFlatIP(train.shape[1])
        index.add(_unit_rows(train, norms))
        rounding = (train.shape[1] + 4) * 2.0**-24  # bounds the error of a float32 inner product of unit vectors
        for rows in _blocks(np.arange(len(test)), SEARCHED_AT_ONCE):
            coarse, candidates = index.search(_unit_rows(test[rows], _norms(test[rows])), width)  # (b, width)
            queries = test[rows].astype(np.float64)
            pairs = zip(queries, candidates, strict=True)  # one by one: a gathered block would not fit into the cache
            exact = np.stack([train[near].astype(np.float64) @ query for query, near in pairs])
            exact /= _norms(test[rows])[:, None] * norms[candidates]
            _keep_first(found, rows, exact, candidates, (train_keys[candidates], test_keys[rows]))
            undecided[rows] = (found.similarities[rows, -1] <= coarse[:, -1] + rounding) & (width < len(train))
    for rows in _blocks(np.flatnonzero(undecided), BLOCK_ELEMENTS // len(train)):
        exact = _cosines(test[rows].astype(np.float64), train) / (_norms(test[rows])[:, None] * norms)
        everything = np.broadcast_to(np.arange(len(train)), exact.shape)
        _keep_first(found, rows, exact, everything, (train_keys[None], test_keys[rows]))
    return found


def _keep_first(
    found: Neighbours, rows: Integers, exact: Floats, candidates: Integers, keys: tuple[Integers, Integers]
) -> None:
    """Writes the first neighbours of test `rows` among `candidates` (b, width) into `found`."""
    train_keys, test_keys = keys[0], keys[1][:, None]
    exact = np.where((train_keys == test_keys) & (test_keys >= 0), -np.inf, exact)
    order = np.lexsort((candidates, -exact.round(12)), axis=-1)[:, : found.rows.shape[1]]
    found.similarities[rows] = np.take_along_axis(exact, order, -1)
    found.rows[rows] = np.take_along_axis(candidates, order, -1)


def most_excluded(train_keys: Integers, test_keys: Integers) -> int:
    """How many train rows a test row may not use, at most."""
    ordered, wanted = np.sort(train_keys), test_keys[test_keys >= 0]
    count = np.searchsorted(ordered, wanted, "right") - np.searchsorted(ordered, wanted, "left")
    return int(count.max(initial=0))


def _norms(features: NDArray[np.floating]) -> Floats:
    """The lengths of rows (N,); a row of zeros has length 1, so that its cosine with everything is 0."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
    return np.where(lengths > 0, lengths, 1.0)


def _unit_rows(features: NDArray[np.floating], norms: Floats) -> NDArray[np.float32]:
    return np.ascontiguousarray(features / norms[:, None].astype(features.dtype), np.float32)


def _cosines(test: Floats, train: NDArray[np.floating]) -> Floats:
    """Inner products (b, N) in float64, a block of train rows at a time."""
    blocks = _blocks(np.arange(len(train)), BLOCK_ELEMENTS // train.shape[1])
    return np.concatenate([test @ train[rows].astype(np.float64).T for rows in blocks], axis=1)


def _blocks(rows: Integers, size: int) -> Iterator[Integers]:
    size = max(1, size)
    return (rows[first : first + size] for first in range(0, len(rows), size))
