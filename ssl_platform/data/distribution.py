"""How the values of each channel are distributed: counts in fixed bins, which add up exactly, and percentiles of them.

Values have the unit of mean and std: integers are shares of the largest value of their type, floats are as they are.

  uint8   256 bins: exact
  uint16  4,096 bins: exact below 1,024, above within 1/1,024 of the value (512 bins for each power of two, as in an HDR
          histogram), because data of 10 or 12 bits fills the lower end of the range only
  float   64 bins for each power of two and sign, 2^-30 to 2^30, and one of zero: within 1 % of the value for
          1e-9 <= |x| <= 1e9; what is smaller counts as 0, what is larger as 1.07e9. Bins whose width grows with the
          value are the idea of DDSketch (Masson, Rim and Lee, 2019, https://arxiv.org/abs/1908.10693); here a bin is
          the upper bits of a float32, which costs no logarithm. Other integers are counted here too, as shares.
"""

import base64
import binascii
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_COUNTED_APART = 16
"""More channels, such as the bins of a filter bank, are counted together: apart they would outweigh all else that is kept
of a shard."""
MAX_COUNT = 1 << 62
"""Of one channel: a text that counts more is damaged."""
RELATIVE_ERROR = 0.01
"""Of a float's percentile, at most."""
SMALLEST, LARGEST = 1e-9, 1e9
"""Magnitudes of floats for which it holds."""
_PER_OCTAVE_OF_INTEGERS, _PER_OCTAVE_OF_FLOATS = 512, 64
_OCTAVES = 30
"""Of floats, to either side of 1."""
_NUM_MAGNITUDES = 2 * _OCTAVES * _PER_OCTAVE_OF_FLOATS


@dataclass(eq=False)
class Distribution:
    """Counts of each channel."""

    bins: str
    """"uint8", "uint16" or "float"."""
    counts: NDArray[np.int64]
    """(R, bins): a row for each channel, or one for all of them."""

    @classmethod
    def empty(cls, bins: str, num_channels: int) -> "Distribution":
        return cls(bins, np.zeros((num_rows(num_channels), len(_VALUES[bins])), np.int64))

    @classmethod
    def of(cls, values: NDArray[Any]) -> "Distribution":
        """Of (C, ...); floats must be finite."""
        made = cls.empty(bins_of(values), len(values))
        made.add(values)
        return made

    def add(self, values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Counts (C, ...) of a type that has these bins; returns their `sums`, which for uint8 take no further look."""
        assert bins_of(values) == self.bins and num_rows(len(values)) == len(self.counts)
        if len(values) > len(self.counts):
            self.add(values.reshape(1, -1))
            return sums(values)
        num_bins = self.counts.shape[1]
        if self.bins == "uint8":
            counts = np.stack([np.bincount(channel.ravel(), minlength=num_bins) for channel in values])
            self.counts += counts
            numbers = np.arange(num_bins)
            return (counts @ numbers) / 255, (counts @ numbers**2) / 255**2
        if self.bins == "uint16":
            for row, channel in zip(self.counts, values, strict=True):
                row += np.bincount(_BIN_OF[channel].ravel(), minlength=num_bins)
        else:
            places = _places("float", _as_shares(values))
            places += np.arange(len(places))[:, None] * num_bins
            np.add.at(self.counts.reshape(-1), places.ravel(), 1)
        return sums(values)

    @property
    def totals(self) -> NDArray[np.int64]:
        """(R,): how many values each row counts."""
        totals: NDArray[np.int64] = self.counts.sum(axis=1)
        return totals

    def percentiles(self, shares: Sequence[float]) -> NDArray[np.float64]:
        """(len(shares), R): for each share in percent the smallest value that so many percent do not exceed.

        That is NumPy's method "inverted_cdf"; the error is that of the bins.
        """
        cumulative, totals = self.counts.cumsum(axis=1), self.totals
        ranks = np.ceil(np.multiply.outer(np.asarray(shares, np.float64), totals) / 100)  # (shares, R)
        ranks = np.clip(ranks, 1, np.maximum(totals, 1)).astype(np.int64)
        places = [np.searchsorted(row, wanted) for row, wanted in zip(cumulative, ranks.T, strict=True)]  # (R, shares)
        found: NDArray[np.float64] = _VALUES[self.bins][np.stack(places, axis=1).clip(max=self.counts.shape[1] - 1)]
        return found

    def converted(self, bins: str) -> "Distribution":
        """The same counts in coarser bins: the error of the value is that of both at most."""
        if bins == self.bins:
            return self
        places = _places(bins, _VALUES[self.bins])
        counts = np.zeros((len(self.counts), len(_VALUES[bins])), np.int64)
        np.add.at(counts.T, places, self.counts.T)
        return Distribution(bins, counts)

    def to_json(self) -> dict[str, str]:
        """`counts` is base64 of zlib of little-endian unsigned integers of 1, 2, 4 or 8 bytes, whichever hold them."""
        width = next(width for width in (1, 2, 4, 8) if int(self.counts.max(initial=0)) >> (8 * width) == 0)
        data = zlib.compress(self.counts.astype(f"<u{width}").tobytes(), 6)
        return {"bins": self.bins, "counts": base64.b64encode(data).decode("ascii")}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], num_channels: int) -> "Distribution":
        """The inverse of `to_json`; raises ValueError if it is anything else, before it takes memory for it."""
        bins, text = found.get("bins"), found.get("counts")
        if not isinstance(bins, str) or bins not in _VALUES or not isinstance(text, str):
            raise ValueError(f"a distribution has bins ({', '.join(_VALUES)}) and counts (a text)")
        if num_channels < 1:
            raise ValueError(f"a distribution of {num_channels} channels")
        num_counts = num_rows(num_channels) * len(_VALUES[bins])
        try:
            stream = zlib.decompressobj()
            data = stream.decompress(base64.b64decode(text, validate=True), 8 * num_counts + 1)
        except (binascii.Error, ValueError, zlib.error) as error:
            raise ValueError(f"the counts of a distribution cannot be unpacked ({error})") from None
        width, rest = divmod(len(data), num_counts)
        if rest or width not in (1, 2, 4, 8) or not stream.eof or stream.unused_data:
            raise ValueError(f"a distribution does not have {num_counts} counts for {num_channels} channels")
        unsigned = np.frombuffer(data, f"<u{width}").reshape(num_rows(num_channels), -1)
        if (unsigned > MAX_COUNT).any() or unsigned.sum(axis=1, dtype=np.float64).max() > MAX_COUNT:
            raise ValueError("a distribution counts more values than there can be")
        return cls(bins, unsigned.astype(np.int64))


def num_rows(num_channels: int) -> int:
    """Of the distribution of so many channels."""
    return num_channels if num_channels <= MAX_COUNTED_APART else 1


def merged(several: Iterable[Distribution]) -> Distribution:
    """Of all values together, in the coarsest bins of any; raises ValueError if the numbers of rows differ.

    Takes one after the other: those of a million shards need not be in memory together.
    """
    totals: dict[str, NDArray[np.int64]] = {}
    for one in several:
        if len(numbers := {len(one.counts), *map(len, totals.values())}) != 1:
            raise ValueError(f"distributions of {sorted(numbers)} channels have no sum")
        totals[one.bins] = totals[one.bins] + one.counts if one.bins in totals else one.counts
    coarsest = max(totals, key=list(_VALUES).index)
    counts = [Distribution(bins, total).converted(coarsest).counts for bins, total in totals.items()]
    return Distribution(coarsest, np.sum(counts, axis=0))


def bins_of(values: NDArray[Any]) -> str:
    """The bins for values of this type."""
    return values.dtype.name if values.dtype in (np.uint8, np.uint16) else "float"


def sums(values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The channels' sums of values and of their squares, each (C,): of uint8 and uint16 exact before rounding."""
    if bins_of(values) == "float":
        shares = _as_shares(values).astype(np.float64)
        return shares.sum(axis=1), np.square(shares).sum(axis=1)
    largest = int(np.iinfo(values.dtype).max)
    integers = values.reshape(len(values), -1).astype(np.int64)
    return integers.sum(axis=1) / largest, np.einsum("cn,cn->c", integers, integers) / largest**2


def _as_shares(values: NDArray[Any]) -> NDArray[Any]:
    """(C, n) floats in the unit of mean and std."""
    numbers = values.reshape(len(values), -1)
    return numbers / np.iinfo(values.dtype).max if values.dtype.kind in "iu" else numbers


# -- bins --------------------------------------------------------------------------------------------------------------


def _bins_of_uint16() -> NDArray[np.int16]:
    """(65536,): the bin of each number. Those of one power of two share a width."""
    numbers = np.arange(1 << 16, dtype=np.int64)
    shift = np.maximum(np.frexp(numbers)[1] - 10, 0)  # numbers below 1,024 have 10 bits
    bins: NDArray[np.int16] = ((numbers >> shift) + _PER_OCTAVE_OF_INTEGERS * shift).astype(np.int16)
    return bins


def _places(bins: str, shares: NDArray[Any]) -> NDArray[np.int64]:
    """The bin of each value, which is a share or a float."""
    if bins == "uint16":
        integers: NDArray[np.int64] = np.rint(shares * 65535).astype(np.int64)
        return _BIN_OF[integers].astype(np.int64)
    with np.errstate(over="ignore", under="ignore"):
        bits = shares.astype(np.float32).view(np.int32)  # sign, 8 bits of exponent, 23 of fraction: 6 of these are kept
    steps = ((bits & 0x7FFFFFFF) >> 17) - (127 - _OCTAVES) * _PER_OCTAVE_OF_FLOATS + 1
    np.clip(steps, 0, _NUM_MAGNITUDES, out=steps)
    minus_one_if_negative = bits >> 31
    steps = (steps ^ minus_one_if_negative) - minus_one_if_negative  # -steps, without a branch for each value
    places: NDArray[np.int64] = steps.astype(np.int64) + _NUM_MAGNITUDES
    return places


def _values_of_float() -> NDArray[np.float64]:
    """In ascending order: of each bin the value whose relative distance to both edges is the same."""
    steps = np.arange(_NUM_MAGNITUDES + 1)
    edges = np.ldexp(
        1 + steps % _PER_OCTAVE_OF_FLOATS / _PER_OCTAVE_OF_FLOATS, steps // _PER_OCTAVE_OF_FLOATS - _OCTAVES
    )
    magnitudes = 2 * edges[1:] * edges[:-1] / (edges[1:] + edges[:-1])
    return np.concatenate([-magnitudes[::-1], [0.0], magnitudes])


_BIN_OF = _bins_of_uint16()
_FIRST_OF_BIN = np.flatnonzero(np.diff(_BIN_OF, prepend=-1))
_VALUES: dict[str, NDArray[np.float64]] = {
    "uint8": np.arange(256) / 255,
    "uint16": (_FIRST_OF_BIN + np.append(_FIRST_OF_BIN[1:], 1 << 16) - 1) / 2 / 65535,
    "float": _values_of_float(),
}
"""The value that stands for each bin; the coarser ones last."""
