"""Where the training samples come from: one set of shards, or a mixture of sources that are weighted and balanced."""

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ssl_platform.config import Config, ConfigError
from ssl_platform.data.index import Index
from ssl_platform.data.index_rows import smallest_type
from ssl_platform.data.order import Cap, Order, Pool, Source
from ssl_platform.data.remote import RemoteSettings
from ssl_platform.data.transfer import RemoteError
from ssl_platform.location import Location, Url

_MAX_WEIGHT_RATIO = 1_000_000


class SourceConfig(Config):
    """One source of a mixture."""

    shards: Location | list[Location]
    """As data.shards."""
    weight: float = Field(default=1.0, gt=0)
    """Of two sources, that with twice the weight gives twice the samples, whatever their sizes."""
    balance: str | None = Field(default=None, min_length=1)
    """A column of the index (label, group, or a key of the samples' `json`) whose values are drawn equally often.

    Samples without a value are a class of their own. Each class goes through its own passes.
    """
    max_per_group: int | None = Field(default=None, ge=1)
    """At most so many samples of each group (patient, slide, ...) a pass of the source, or of each of its classes.

    The next pass takes the next ones, so all get their turn; samples without a group are all in every pass.
    """


def mixture_problems(sources: Mapping[str, SourceConfig]) -> list[str]:
    """What is wrong with the sources taken together, one line each, to follow "data."."""
    lines = [
        f"sources: '{name}' is no name for a source: use letters, digits, _ and - (metrics are named drawn_{name})"
        for name in sources
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name)
    ]
    weights = [source.weight for source in sources.values()]
    if weights and sum(weights) > _MAX_WEIGHT_RATIO * min(weights):
        lines.append(f"sources: a weight of {min(weights):g} is less than a millionth of the sum, {sum(weights):g}")
    return lines


def open_shards(
    shards: Path | Url | list[Path | Url] | None,
    sources: Mapping[str, SourceConfig],
    remote: RemoteSettings | None = None,
) -> Index:
    """The index of `data.shards`, or of all `data.sources` joined; raises ConfigError with every problem found.

    Here and below sources are in the order of their names, so the order of a file's lines does not matter.
    """
    if shards is not None:
        try:
            return Index.open(shards, remote)
        except (ValueError, RemoteError) as error:
            raise ConfigError([f"data.shards: {error}"]) from error
    opened: dict[str, Index] = {}
    lines = []
    for name, source in sorted(sources.items()):
        try:
            opened[name] = Index.open(source.shards, remote)
        except (ValueError, RemoteError) as error:
            lines.append(f"data.sources.{name}.shards: {error}")
            continue
        lines += [f"data.sources.{name}.{problem}" for problem in _column_problems(opened[name], source)]
    if lines:
        raise ConfigError(lines)
    try:
        return Index.joined(opened)
    except ValueError as error:
        raise ConfigError([f"data.sources: {error}"]) from error


def _column_problems(index: Index, source: SourceConfig) -> list[str]:
    lines = []
    for key, column in (("balance", source.balance), ("max_per_group", source.max_per_group and "group")):
        try:
            if column and not (index.column(column)[0] >= 0).any():
                lines.append(f"{key}: none of its {len(index)} samples has a {column}")
        except ValueError as error:
            lines.append(f"{key}: {error}")
    return lines


def build_order(index: Index, sources: Mapping[str, SourceConfig], seed: int, window_shards: int) -> Order:
    """The order of the samples of an index that `open_shards` opened."""
    if not sources:
        return Order.of_shards(index.shard_counts, seed, window_shards)
    columns = {name: index.column(name) for source in sources.values() for name in _columns_used(source)}
    return Order(
        [
            Source(name, Fraction(repr(source.weight)), _pools(index, name, source, columns, seed, window_shards))
            for name, source in sorted(sources.items())
        ],
        seed,
    )


def _columns_used(source: SourceConfig) -> list[str]:
    balance = [] if source.balance is None else [source.balance]
    return balance + ["group"] * (source.max_per_group is not None)


def _pools(
    index: Index,
    name: str,
    source: SourceConfig,
    columns: Mapping[str, tuple[NDArray[np.int64], list[str]]],
    seed: int,
    window_shards: int,
) -> list[Pool]:
    """One pool, or one for each class in the order of their codes."""
    shards = index.sources[name]
    ranges = index.shard_ranges[shards.start : shards.stop]  # (shards, 2)
    first, last = int(ranges[0, 0]), int(ranges[-1, 1])
    if source.balance is None and source.max_per_group is None:
        return [Pool(ranges[:, 0], ranges[:, 1] - ranges[:, 0], seed, window_shards, name=[name])]
    if source.balance is None:
        classes: list[tuple[list[str], NDArray[np.int64]]] = [([name], np.arange(last - first))]
    else:
        codes, names = columns[source.balance]
        classes = [([name, _class_name(code, names)], members) for code, members in _by_code(codes[first:last])]
    pools = []
    for names_, members in classes:
        starts, counts = _in_shards(members, ranges - first)
        cap = None
        if source.max_per_group is not None:
            cap = Cap(columns["group"][0][first:last][members], source.max_per_group, seed, *names_)
        held = (members + first).astype(smallest_type(last))
        pools.append(Pool(starts, counts, seed, window_shards, name=names_, members=held, cap=cap))
    return pools


def _in_shards(members: NDArray[np.int64], ranges: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the members of each shard that has some begin, and how many these are."""
    if len(members) > len(ranges):
        bounds = np.searchsorted(members, ranges)  # (shards, 2)
        return bounds[:, 0], bounds[:, 1] - bounds[:, 0]
    shards = np.searchsorted(ranges[:, 0], members, side="right")  # few members of many shards: each class is one
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    return starts, np.diff(starts, append=len(members))


def _by_code(codes: NDArray[np.integer[Any]]) -> list[tuple[int, NDArray[np.int64]]]:
    """Each code that occurs, with the places where it does, ascending."""
    codes = codes.astype(smallest_type(int(codes.max())))  # few bits are sorted in a twentieth of the time
    places = np.argsort(codes, kind="stable")
    codes = codes[places]
    begins = np.flatnonzero(codes[1:] != codes[:-1]) + 1
    return list(zip(codes[[0, *begins]].tolist(), np.split(places, begins), strict=True))


def _class_name(code: int, names: list[str]) -> str:
    return "" if code < 0 else names[code] if names else str(code)


def described(sources: Mapping[str, SourceConfig], index: Index) -> str:
    """What, with the index, seed and window, decides the order of a mixture; empty without one."""
    texts = []
    for name, source in sorted(sources.items()):
        text = f"; {name}: {len(index.sources[name])} shards, weight {_exact(source.weight)}"
        if source.balance is not None:
            text += f", balance {source.balance} ({index.column_digest(source.balance)})"
        if source.max_per_group is not None:
            text += f", max_per_group {source.max_per_group} ({index.column_digest('group')})"
        texts.append(text)
    return "".join(texts)


def _exact(weight: float) -> str:
    """All digits that count: another weight is another order."""
    return f"{weight:g}" if float(f"{weight:g}") == weight else repr(weight)


def summary(sources: Mapping[str, SourceConfig], order: Order, num_positions: int) -> list[str]:
    """A line for each source of a mixture: its size, weight, and how often a run of so many samples goes through it."""
    drawn, total = order.drawn(num_positions), sum(source.weight for source in sources.values())
    lines = []
    for part in order.sources:
        source = sources[part.name]
        sizes = sorted(pool.num_samples for pool in part.pools)
        passes = sorted(drawn[part.name] / len(sizes) / pool.pass_size for pool in part.pools)
        line = f"source {part.name}: {sum(sizes)} samples"
        if source.balance is not None:
            line += f" in {len(sizes)} classes of {source.balance} ({_span(sizes, '.0f')} samples each"
            line += f", {unknown[0].num_samples} without)" if (unknown := _without_value(part)) else ")"
        if source.max_per_group is not None:
            line += (
                f", at most {source.max_per_group} of a group, so {sum(pool.pass_size for pool in part.pools)} a pass"
            )
        line += f"; weight {source.weight:g} ({100 * source.weight / total:.1f} %), "
        lines.append(line + f"{drawn[part.name]} drawn in all, {_span(passes, '.1f')} passes")
    return lines


def check_room(index: Index, order: Order, window_shards: int) -> None:
    """Raises ConfigError if the cache of remote shards cannot hold what the order reads and fetches at a time."""
    if index.remote is None:
        return
    pools = [pool for source in order.sources for pool in source.pools]
    shards = [np.searchsorted(index.shard_ranges[:, 1], pool.first_samples, side="right").tolist() for pool in pools]
    try:
        index.remote.check_room([[index.shards[shard] for shard in numbers] for numbers in shards], window_shards)
    except ValueError as error:
        raise ConfigError([f"data.{error}"]) from error


def doubtful_cache(cache_shards: int, window_shards: int, index: Index, order: Order) -> list[str]:
    """A line if the windows in use need more shards at a time than are kept open."""
    num_windows = sum(len(source.pools) for source in order.sources)
    needed = 0
    for source in order.sources:
        shards = sum(min(window_shards, pool.num_shards) for pool in source.pools)
        needed += min(shards, len(index.sources.get(source.name, index.shards)))
    if num_windows == 1 or needed <= cache_shards:
        return []
    return [
        f"data.cache_shards: {cache_shards}, but the windows of all sources and classes ({num_windows}) have up to {needed} "
        f"shards together, so shards are closed and opened again; set it to {needed}, or data.window_shards lower"
    ]


def _without_value(source: Source) -> list[Pool]:
    return [pool for pool in source.pools if pool.name[1:] == ("",)]


def _span(values: list[int] | list[float], digits: str) -> str:
    low, high = format(values[0], digits), format(values[-1], digits)
    return low if low == high else f"{low} to {high}"
