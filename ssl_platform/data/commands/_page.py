"""The report of `ssl-pack inspect` as one HTML page that needs nothing but itself."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 25%, transparent); --bar: #3b82c4; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; font-weight: 600; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
caption { text-align: left; padding-bottom: .25rem; white-space: nowrap; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } th { font-weight: 600; }
td { overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; padding: 0; list-style: none; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.2; font-weight: 600; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; } figure { margin: 0; }
.pictures img { display: block; min-width: 64px; image-rendering: auto; border: 1px solid var(--line); }
figcaption { font-size: 11px; max-width: 112px; overflow-wrap: anywhere; line-height: 1.25; opacity: .75; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem 2rem; }
svg { width: 100%; height: auto; } svg rect { fill: var(--bar); } svg text { fill: currentColor; font-size: 11px; }
svg line { stroke: var(--line); } summary { cursor: pointer; } .groups { gap: .5rem 2rem; }
nav { margin: .5rem 0; } nav a { margin-right: 1rem; color: inherit; }
"""


def page(report: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    """The whole page; `pictures` {sample: JPEG}."""
    sections = {
        "Sources": _sources(report),
        "Labels": _labels(report),
        "Pictures": _pictures(report, pictures),
        "Sizes and columns": _histograms(report["histograms"]),
        "Members": _members(report["members"]),
        "Duplicates": _duplicates(report["duplicates"]),
        "Near-duplicates": _near_duplicates(report["near_duplicates"], pictures),
        "Bad samples": _bad(report["bad"]),
    }
    links = "".join(f'<a href="#s{place}">{escape(title)}</a>' for place, title in enumerate(sections))
    body = "".join(
        f'<section aria-labelledby="s{place}"><h2 id="s{place}">{escape(title)}</h2>{text}</section>'
        for place, (title, text) in enumerate(sections.items())
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Shards inspected</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><header><h1>Shards inspected</h1>{_summary(report)}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main></body></html>\n'
    )


def _summary(report: Mapping[str, Any]) -> str:
    part = report["examined"] < report["samples"]
    figures = {
        "samples": f"{report['samples']:,}",
        "shards": f"{report['shards']:,}",
        "size": _bytes(report["bytes"]),
        f"read{' (drawn by seed ' + str(report['seed']) + ')' if part else ''}": f"{report['examined']:,}",
        "labels": f"{len(report['labels']):,}",
        "groups": f"{report['groups']['number']:,}",
        "duplicates to spare": f"{report['duplicates']['redundant']:,}",
        "near-duplicates to spare": f"{report['near_duplicates']['redundant']:,}",
        "bad samples": f"{report['bad']['samples']:,}",
    }
    items = "".join(f"<li><b>{value}</b>{escape(name)}</li>" for name, value in figures.items())
    note = ""
    if part:
        note = (
            f"<p>Counts of samples, labels and groups are of all; what follows from reading (sizes, duplicates, bad "
            f"samples) is of {report['examined']:,}, and duplicates outside these were not seen.</p>"
        )
    return f'<ul class="figures">{items}</ul>{note}'


def _sources(report: Mapping[str, Any]) -> str:
    rows = [[source["path"], source["shards"], source["samples"]] for source in report["sources"]]
    text = _table("Samples of each path that was given", ["path", "shards", "samples"], rows)
    if report["splits"]:
        part = sum(report["splits"].values()) < report["samples"]
        text += _table(
            f"Splits, in samples{' that were read' * part}", ["split", "samples"], list(report["splits"].items())
        )
    groups = report["groups"]
    if groups["number"]:
        names = ["number", "smallest", "median", "largest", "without"]
        text += _table("Groups, in samples", names, [[groups[name] for name in names]])
    if report["statistics"]:
        statistics = report["statistics"]
        percentiles = {f"{share} %": values for share, values in (statistics.get("percentiles") or {}).items()}
        num_channels = len(statistics["mean"])
        apart = {name: values * (num_channels // len(values)) for name, values in percentiles.items()}
        columns = {"mean": statistics["mean"], "std": statistics["std"], **apart}
        rows = [
            [place, *(round(value, 4) for value in values)]
            for place, values in enumerate(zip(*columns.values(), strict=True))
        ]
        text += _table(
            "Channels: integers as shares of their largest value; of more than 16, percentiles are of all",
            ["channel", *columns],
            rows,
        )
    return text


def _labels(report: Mapping[str, Any]) -> str:
    if not report["labels"]:
        return "<p>No sample has a label.</p>"
    labels = sorted(report["labels"].items(), key=lambda item: (-item[1], item[0]))
    rows = [[name, number, f"{number / report['samples']:.1%}"] for name, number in labels]
    if report["unlabelled"]:
        rows.append(["(none)", report["unlabelled"], f"{report['unlabelled'] / report['samples']:.1%}"])
    return _table(f"{len(labels)} labels", ["label", "samples", "share"], rows)


def _pictures(report: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    parts = []
    for group in report["pictures"]:
        shown = "".join(
            _figure(pictures[sample["sample"]], f"{group['label']}: {sample['key']}", sample["key"])
            for sample in group["samples"]
        )
        if shown:
            parts.append(f'<h3>{escape(group["label"])}</h3><div class="pictures">{shown}</div>')
    return "".join(parts) or "<p>No sample that was read can be shown as a picture.</p>"


def _figure(jpeg: bytes, alternative: str, caption: str) -> str:
    source = base64.b64encode(jpeg).decode()
    image = f'<img src="data:image/jpeg;base64,{source}" alt="{escape(alternative)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _members(members: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [name, found["number"], *(_bytes(found[size]) for size in ("bytes", "smallest", "largest"))]
        for name, found in members.items()
    ]
    return _table(
        "Members of the samples that were read", ["extension", "number", "bytes", "smallest", "largest"], rows
    )


def _histograms(histograms: Mapping[str, Mapping[str, Any]]) -> str:
    if not histograms:
        return "<p>Nothing was measured.</p>"
    return f'<div class="plots">{"".join(_histogram(name, plot) for name, plot in histograms.items())}</div>'


def _histogram(name: str, plot: Mapping[str, Any]) -> str:
    counts = plot["counts"]
    if "values" in plot:
        bins = [_short(value) for value in plot["values"]]
    else:
        edges = plot["edges"]
        bins = [f"{_short(low)} to {_short(high)}" for low, high in pairwise(edges)]
    step, top = 340 / len(counts), max(counts)
    width = min(step * 0.9, 40)
    bars = "".join(
        f'<rect x="{place * step + (step - width) / 2:.1f}" y="{100 - 90 * number / top:.1f}" width="{width:.1f}" '
        f'height="{90 * number / top:.1f}"><title>{escape(label)}: {number}</title></rect>'
        for place, (label, number) in enumerate(zip(bins, counts, strict=True))
    )
    title = f"{name} of {plot['samples']} samples"
    middle = f"median {_short(plot['median'])}, 5 to 95 %: {_short(plot['p5'])} to {_short(plot['p95'])}"
    ends = (
        f'<text x="0" y="114">{_short(plot["min"])}</text>'
        f'<text x="340" y="114" text-anchor="end">{_short(plot["max"])}</text>'
    )
    if len(counts) == 1:
        ends = f'<text x="170" y="114" text-anchor="middle">{_short(plot["min"])}</text>'
    drawing = (
        f'<svg viewBox="0 0 340 118" role="img" aria-label="{escape(title)}: {escape(middle)}">{bars}'
        f'<line x1="0" y1="100" x2="340" y2="100"/>{ends}</svg>'
    )
    table = _table(title, [name, "samples"], list(zip(bins, counts, strict=True)))
    return (
        f"<div><h3>{escape(name)}</h3>{drawing}<div>{escape(middle)}</div>"
        f"<details><summary>as a table</summary>{table}</details></div>"
    )


def _duplicates(duplicates: Mapping[str, Any]) -> str:
    text = (
        f"<p>Samples to spare, which hold the same bytes as another one: {duplicates['redundant']:,}, "
        f"in {duplicates['groups']:,} groups. Keys of more than one sample: {duplicates['keys_used_twice']:,}.</p>"
    )
    rows = [
        [size, ", ".join(keys) + (", ..." if size > len(keys) else "")]
        for size, keys in zip(duplicates["sizes"], duplicates["listed"], strict=True)
    ]
    return text + (_table("Samples with the same bytes", ["samples", "keys"], rows) if rows else "")


def _near_duplicates(near: Mapping[str, Any], pictures: Mapping[int, bytes]) -> str:
    what = "16 x 16 grey thumbnails" if near["features"] == "thumbnails" else "the features given"
    text = [
        f"<p>Of {near['compared']:,} samples compared, {near['redundant']:,} are near-duplicates (cosine of at least "
        f"{near['threshold']} between {what}) of one of {near['groups']:,} that would be kept. In brackets: the cosine "
        "with the first of the group, which is the one kept.</p>"
    ]
    shown_groups, rest = [], []
    for size, group in zip(near["sizes"], near["listed"], strict=True):
        shown = [sample for sample in group if sample["sample"] in pictures][:4]
        if len(shown) < 2:
            rest.append([size, ", ".join(f"{sample['key']} ({sample['cosine']:.3f})" for sample in group[:6])])
            continue
        figures = "".join(
            _figure(pictures[sample["sample"]], sample["key"], f"{sample['key']} ({sample['cosine']:.3f})")
            for sample in shown
        )
        shown_groups.append(f'<div class="group">{size} samples<div class="pictures">{figures}</div></div>')
    text.append(f'<div class="pictures groups">{"".join(shown_groups)}</div>')
    if rest:
        text.append(_table("More groups: keys (cosine with the first)", ["samples", "keys"], rest))
    return "".join(text)


def _bad(bad: Mapping[str, Any]) -> str:
    if not bad["samples"]:
        return "<p>None of the samples that were read.</p>"
    rows = [[sample["shard"], sample["key"], sample["reason"]] for sample in bad["listed"]]
    more = f"<p>The first {len(rows)} of {bad['samples']:,}.</p>" if len(rows) < bad["samples"] else ""
    return more + _table("Samples that cannot be used", ["shard", "key", "reason"], rows)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    first = rows[0] if rows else heads
    head = "".join(
        f'<th scope="col"{_align(cell)}>{escape(name)}</th>' for name, cell in zip(heads, first, strict=True)
    )
    body = "".join("<tr>" + "".join(f"<td{_align(cell)}>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _align(cell: Any) -> str:
    is_number = isinstance(cell, int | float) or re.fullmatch(r"[\d.,]+( [kMG]?B|%)", cell) is not None
    return ' class="n"' if is_number else ""


def _cell(cell: Any) -> str:
    return f"{cell:,}" if isinstance(cell, int) else escape(str(cell))


def _short(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:,.4g}"


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
