"""Distributions of channel values against NumPy on the values themselves: percentiles, sums, joins, and damaged texts."""

import base64
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy
from numpy.typing import NDArray

from ssl_platform.data.channel_statistics import PERCENTILES, Tally, channel_line, describe_distribution, joined, used
from ssl_platform.data.distribution import (
    LARGEST,
    MAX_COUNTED_APART,
    RELATIVE_ERROR,
    SMALLEST,
    Distribution,
    merged,
    sums,
)

SHARES = (0, 0.1, 1, 5, 25, 50, 75, 95, 99, 99.9, 100)
Values = NDArray[Any]


def arrays(dtype: Any, elements: Any = None) -> st.SearchStrategy[Values]:
    shapes = st.tuples(st.integers(1, 3), st.integers(1, 40))
    return of_numpy.arrays(dtype, shapes, elements=elements, fill=st.nothing())


def exact(values: Values) -> Values:
    """(shares, C) of the values themselves."""
    return np.percentile(values.reshape(len(values), -1), SHARES, axis=1, method="inverted_cdf")


magnitudes = st.floats(SMALLEST, LARGEST)
floats = st.one_of(magnitudes, magnitudes.map(lambda value: -value), st.just(0.0))
anything = st.one_of(arrays(np.uint8), arrays(np.uint16), arrays(np.float64, floats), arrays(np.int16))


@given(arrays(np.uint8))
def test_eight_bits_are_exact(values: Values) -> None:
    np.testing.assert_array_equal(Distribution.of(values).percentiles(SHARES), exact(values) / 255)


@given(arrays(np.uint16))
@example(np.array([[0, 1, 1023, 1024, 1025, 2047, 2048, 65534, 65535]], np.uint16))
def test_sixteen_bits_are_exact_below_1024_and_within_their_bins_above(values: Values) -> None:
    found, expected = Distribution.of(values).percentiles(SHARES) * 65535, exact(values)
    is_small = expected < 1024
    np.testing.assert_allclose(found[is_small], expected[is_small], rtol=1e-14)
    assert (np.abs(found - expected) <= expected / 1024).all()


def test_every_number_of_sixteen_bits_has_one_of_4096_bins() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)[None]
    counts = Distribution.of(every).counts[0]
    assert counts.shape == (4096,) and counts.sum() == 1 << 16 and set(counts.tolist()) == {1, 2, 4, 8, 16, 32, 64}


@given(arrays(np.float64, floats))
@example(np.array([[SMALLEST, -SMALLEST, LARGEST, -LARGEST, 0.0]]))
def test_floats_keep_their_relative_error(values: Values) -> None:
    found, expected = Distribution.of(values).percentiles(SHARES), exact(values)
    assert (np.abs(found - expected) <= RELATIVE_ERROR * (1 + 1e-9) * np.abs(expected)).all()
    assert (found[expected == 0] == 0).all()


def test_floats_beyond_the_range_are_zero_or_the_end_of_it() -> None:
    values = np.array([[1e-12, -1e-300, 5e-324], [1e30, -1e30, 1e150]])
    found = Distribution.of(values).percentiles([0, 50, 100])
    assert found[:, 0].tolist() == [0, 0, 0]
    assert found[0, 1] == -found[1, 1] == -found[2, 1] and LARGEST < found[2, 1] < 2 * LARGEST


@given(anything)
def test_sums_are_those_of_the_values(values: Values) -> None:
    numbers = values.astype(np.float64) / (np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1)
    added, squares = sums(values)
    np.testing.assert_allclose(added, numbers.sum(axis=1), rtol=1e-12, atol=1e-12 * np.abs(numbers).sum())
    np.testing.assert_allclose(squares, np.square(numbers).sum(axis=1), rtol=1e-12)
    assert (Distribution.of(values).totals == values.shape[1]).all()


@given(st.lists(anything.map(lambda values: values[:1]), min_size=1, max_size=5))
@settings(max_examples=40)
def test_a_tally_is_the_sum_of_its_samples(several: list[Values]) -> None:
    tally = Tally()
    for values in several:
        tally.add(values)
    assert tally.num_values == {"1": sum(values.size for values in several)}
    expected = [sums(values) for values in several]
    np.testing.assert_allclose(tally.sums["1"], sum(added for added, _ in expected), rtol=1e-12)
    np.testing.assert_allclose(tally.squares["1"], sum(squares for _, squares in expected), rtol=1e-12)
    assert tally.distributions["1"].totals == tally.num_values["1"]
    if len({values.dtype for values in several}) == 1:
        assert (tally.distributions["1"].counts == merged([Distribution.of(values) for values in several]).counts).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_layout_and_number_of_axes(dtype: Any) -> None:
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (5, 4, 6, 3), dtype=dtype)
    moved = np.moveaxis(values, -1, 0)
    flat = Distribution.of(np.ascontiguousarray(moved).reshape(3, -1))
    assert (Distribution.of(moved).counts == flat.counts).all()


@given(st.lists(arrays(np.uint16).filter(lambda values: len(values) == 2), min_size=1, max_size=4))
@settings(max_examples=30)
def test_a_join_is_the_distribution_of_the_union(several: list[Values]) -> None:
    union = Distribution.of(np.concatenate(several, axis=1))
    every = [Distribution.of(values) for values in several]
    for joined_one in (merged(every), merged(every[::-1]), merged([merged(every[:1]), *every[1:]])):
        assert joined_one.bins == union.bins and (joined_one.counts == union.counts).all()


@given(st.tuples(arrays(np.uint8), arrays(np.uint16), arrays(np.float64, floats)))
@settings(max_examples=40)
def test_a_join_of_other_types_is_in_the_coarser_bins(several: tuple[Values, ...]) -> None:
    shares = [values[:1] / (np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1) for values in several]
    for number, error in ((2, 1 / 1024), (3, RELATIVE_ERROR + 1 / 1024)):
        found = merged([Distribution.of(values[:1]) for values in several[:number]])
        expected = exact(np.concatenate(shares[:number], axis=1))
        assert found.bins == ("uint16", "float")[number - 2]
        assert (np.abs(found.percentiles(SHARES) - expected) <= (error + 1e-4) * np.abs(expected) + 1e-12).all()


def test_channels_that_differ_have_no_sum() -> None:
    one, two = Distribution.of(np.zeros((1, 2))), Distribution.of(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"distributions of \[1, 2\] channels have no sum"):
        merged([one, two])


# -- texts -------------------------------------------------------------------------------------------------------------


@given(anything)
@settings(max_examples=40)
def test_texts_give_the_same_counts_again(values: Values) -> None:
    written = Distribution.of(values)
    text = json.loads(json.dumps(written.to_json()))
    found = Distribution.from_json(text, len(values))
    assert found.bins == written.bins and found.counts.dtype == np.int64 and (found.counts == written.counts).all()


def test_large_counts_and_small_texts() -> None:
    counts = np.zeros((3, 256), np.int64)
    counts[:, 7] = [1, 1 << 40, 1 << 61]
    found = Distribution.from_json(Distribution("uint8", counts).to_json(), 3)
    assert (found.counts == counts).all() and found.percentiles([50]).tolist() == [[7 / 255] * 3]
    rng = np.random.default_rng(0)
    photo = Distribution.of(rng.integers(0, 256, (3, 224, 224), dtype=np.uint8)).to_json()
    assert len(photo["counts"]) < 2000
    sound = Distribution.of(rng.normal(-4, 4, (128, 1000))).to_json()
    assert len(sound["counts"]) < 128 * 1000


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


BAD = {
    "no bins": ({"counts": packed(bytes(256))}, "a distribution has bins (uint8, uint16, float) and counts"),
    "other bins": ({"bins": "uint4", "counts": ""}, "a distribution has bins (uint8, uint16, float) and counts"),
    "no counts": ({"bins": "uint8"}, "a distribution has bins"),
    "no text": ({"bins": "uint8", "counts": [1]}, "a distribution has bins"),
    "no base64": ({"bins": "uint8", "counts": "é!"}, "cannot be unpacked"),
    "no zlib": ({"bins": "uint8", "counts": base64.b64encode(b"abcdefgh").decode()}, "cannot be unpacked"),
    "cut off": ({"bins": "uint8", "counts": base64.b64encode(zlib.compress(bytes(256))[:-6]).decode()}, "256 counts"),
    "too few": ({"bins": "uint8", "counts": packed(bytes(255))}, "does not have 256 counts for 1 channels"),
    "empty": ({"bins": "uint8", "counts": packed(b"")}, "does not have 256 counts"),
    "too many": ({"bins": "uint8", "counts": packed(bytes(256 * 16))}, "does not have 256 counts"),
    "an odd width": ({"bins": "uint8", "counts": packed(bytes(256 * 3))}, "does not have 256 counts"),
    "a bomb": ({"bins": "uint8", "counts": packed(bytes(1 << 26))}, "does not have 256 counts"),
    "more behind it": (
        {"bins": "uint8", "counts": base64.b64encode(zlib.compress(bytes(256)) + b"more").decode()},
        "does not have 256 counts",
    ),
    "too large a count": (
        {"bins": "uint8", "counts": packed(b"\xff" * 8 * 256)},
        "counts more values than there can be",
    ),
    "too large a sum": (
        {"bins": "uint8", "counts": packed(np.full(256, 1 << 60, "<u8").tobytes())},
        "counts more values than there can be",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_text_is_refused(case: str) -> None:
    found, message = BAD[case]
    with pytest.raises(ValueError) as raised:
        Distribution.from_json(found, 1)
    assert message in str(raised.value)


@pytest.mark.parametrize("channels", [0, -1])
def test_absurd_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"a distribution of {channels} channels"):
        Distribution.from_json({"bins": "float", "counts": packed(bytes(256))}, channels)


@given(st.binary(max_size=300), st.sampled_from(["uint8", "uint16", "float"]))
def test_noise_is_refused_or_a_distribution(noise: bytes, bins: str) -> None:
    for data in (base64.b64encode(noise).decode(), packed(noise)):
        try:
            found = Distribution.from_json({"bins": bins, "counts": data}, 1)
        except ValueError:
            continue
        assert found.counts.min() >= 0 and np.isfinite(found.percentiles(SHARES)).all()


# -- statistics --------------------------------------------------------------------------------------------------------


def statistics_of(*samples: Values) -> dict[str, Any]:
    tally = Tally()
    for values in samples:
        tally.add(values)
    ((channels, pixels),) = tally.num_values.items()
    mean = tally.sums[channels] / pixels
    std = np.sqrt(tally.squares[channels] / pixels - mean**2)
    about = {"mean": mean.tolist(), "std": std.tolist(), "pixels": pixels}
    return about | describe_distribution(tally.distributions[channels])


def test_joined_statistics_are_those_of_all_values() -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, top, (2, 9, number), dtype=np.uint8) for top, number in ((99, 30), (256, 70)))
    found, expected = joined([statistics_of(first), statistics_of(second)]), statistics_of(first, second)
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-13)
    np.testing.assert_allclose(found["std"], expected["std"], rtol=1e-12)
    for key in ("pixels", "percentiles", "distribution"):
        assert found[key] == expected[key]
    assert list(found["percentiles"]) == ["0.1", "1", "5", "25", "50", "75", "95", "99", "99.9"]
    together = np.concatenate([first, second], axis=-1).reshape(2, -1)
    np.testing.assert_array_equal(
        list(found["percentiles"].values()), np.percentile(together, PERCENTILES, axis=1, method="inverted_cdf") / 255
    )


def test_a_channel_that_never_changes_has_a_std_to_divide_by(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(2)
    banks = rng.normal(-6, 3, (4, 100_000)).astype(np.float32)
    banks[1] = np.log(np.float32(2**-23))  # the floor
    measured = statistics_of(banks, banks[:, :777])
    assert 0 <= measured["std"][1] < 1e-5 and "never change" not in caplog.text
    found = used(measured)
    assert found["std"] == [measured["std"][0], 1.0, *measured["std"][2:]] and found["mean"] == measured["mean"]
    assert "1 of 4 channels never change: 1; their std counts as 1" in caplog.text
    dark = {"mean": [0.0, 1e-4, 0.0], "std": [0.0, 1e-6, 1e-4]}
    assert used(dark)["std"] == [1.0, 1e-6, 1e-4], "dark pixels of 16 bits are no constant"


def test_without_the_distribution_of_one_there_are_no_percentiles() -> None:
    new = statistics_of(np.arange(6, dtype=np.uint8).reshape(1, 6))
    old = {key: new[key] for key in ("mean", "std", "pixels")}
    found = joined([new, old])
    assert set(found) == {"mean", "std", "pixels"} and found["pixels"] == 12
    assert used(found) == {"mean": found["mean"], "std": found["std"]} and "percentile" not in channel_line(found)
    assert set(used(new)) == {"mean", "std", "percentiles"}
    assert channel_line(None) == "channels: mean and std are not known"
    assert channel_line(new) == (
        "channels: mean 0.0098; std 0.0067; percentile 1 0.0000; percentile 50 0.0078; percentile 99 0.0196"
    )
    many = statistics_of(np.zeros((12, 2), np.uint8))
    assert channel_line(many).endswith("(and 4 more channels)") and channel_line(many).count("0.0000") == 5 * 8


def test_many_channels_are_counted_together() -> None:
    """Mean and std stay apart; what is kept of a shard does not grow with them."""
    values = np.random.default_rng(2).normal(-4, 3, (MAX_COUNTED_APART + 1, 50)).astype(np.float32)
    tally, one = Tally(), Tally()
    for part in (values[:, :20], values[:, 20:]):
        tally.add(part)
    one.add(values.reshape(1, -1))
    channels = str(len(values))
    assert tally.distributions[channels].counts.shape[0] == 1
    assert (tally.distributions[channels].counts == one.distributions["1"].counts).all()
    np.testing.assert_allclose(tally.sums[channels], values.astype(np.float64).sum(axis=1), rtol=1e-12)
    about = statistics_of(values)
    assert len(about["mean"]) == len(values) and {len(row) for row in about["percentiles"].values()} == {1}
    together = joined([about, about])
    assert together["percentiles"] == about["percentiles"] and together["pixels"] == 2 * values.shape[1]


def test_shards_are_merged_one_by_one() -> None:
    """A generator is taken once, and what it gives is not kept or changed."""
    values = np.random.default_rng(3).integers(0, 256, (4, 3, 50), np.uint8)
    every = [Distribution.of(one) for one in values]
    before = [one.counts.copy() for one in every]
    assert (merged(one for one in every).counts == sum(before)).all()
    assert all((one.counts == was).all() for one, was in zip(every, before, strict=True))
