"""docs/results.md: sections between markers, each replaced alone; tables of figures with their intervals."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval_protocols.metrics import Difference, Interval
from eval_protocols.report import interval_text

HEAD = """# Results on real data

Each section is what its command found: real recordings out of public packages, one pretraining of minutes on two cores,
and three encoders under one protocol. They show what such a run learns, not what a long one could. Intervals are 95 %.
"""


def replace_section(page: Path, name: str, text: str) -> None:
    """Puts `text` between the markers of `name`, at the end of the page if they are not there yet."""
    before = page.read_text(encoding="utf-8") if page.exists() else HEAD
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    added = f"{before.rstrip()}\n\n{section}\n"
    after = pattern.sub(lambda _: section, before) if pattern.search(before) else added
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(after, encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def percent(interval: Interval) -> str:
    """`71.2 [65.3, 76.8]`, of shares."""
    return interval_text(Interval(*(100 * value for value in interval)), 1)


def sentence(name: str, other: str, what: str, difference: Difference, lower_is_better: bool = False) -> str:
    """Whether `name` is better than `other`, in points of percent."""
    low, high = 100 * difference.low, 100 * difference.high
    if not difference.excludes_zero:
        found = f"does not differ from {other} beyond the interval"
    else:
        found = f"is {'better' if (low > 0) != lower_is_better else 'WORSE'} than {other} beyond the interval"
    return f"- {what}: {name} {found}: {100 * difference.estimate:+.1f} points [{low:+.1f}, {high:+.1f}]."


def three(results: Mapping[str, Mapping[str, Interval]], metrics: Sequence[str]) -> list[list[str]]:
    """A row for each encoder."""
    return [[name, *(percent(found[metric]) for metric in metrics)] for name, found in results.items()]
