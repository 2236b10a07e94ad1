"""ESC-50: 2,000 sounds of 5 s in 50 classes, in 5 folds.

    DIR/audio/1-100032-A-0.wav      DIR/meta/esc50.csv

DIR may also hold the folder ESC-50-master of the archive. The label is the category. The group is the recording that the
clip was cut from (src_file), of which no fold and no split divides the clips. Kept columns: fold (1 to 5), esc10. The folds
are a column and not splits: published scores are means over five runs, each tested on one fold.

    ssl-pack esc50 ESC-50 shards
"""

import argparse
from pathlib import Path

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import missing
from ssl_platform.data.tables import read_table

COLUMNS = ("fold", "esc10")
_NEEDED = ("filename", "fold", "category", "src_file")


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The clips that meta/esc50.csv lists; raises ValueError if it is not there, or lists files that are not."""
    root = folder / "ESC-50-master" if (folder / "ESC-50-master").is_dir() else folder
    table = root / "meta" / "esc50.csv"
    if lacking := [name for name in ("audio", "meta/esc50.csv") if not (root / name).exists()]:
        raise missing(root, lacking, "esc50")
    rows = read_table(table, _NEEDED)
    for line, row in rows:
        if not all(row[name] for name in _NEEDED):
            raise ValueError(f"{table}: line {line}: {', '.join(name for name in _NEEDED if not row[name])} is empty")
    if absent := [f"audio/{row['filename']}" for _, row in rows if not (root / "audio" / row["filename"]).is_file()]:
        raise missing(root, absent, "esc50")
    return [
        Item(
            root / "audio" / row["filename"],
            row["filename"],
            label=row["category"],
            group=row["src_file"],
            columns=tuple((name, row[name]) for name in COLUMNS if row.get(name)),
            medium="audio",
        )
        for _, row in rows
    ]
