"""Tables that people and data sets bring, CSV or TSV: read whole, with errors that name the file, the line and the fix."""

import csv
from collections.abc import Sequence
from pathlib import Path

from ssl_platform.data.tar_headers import shown

Rows = list[tuple[int, list[str]]]
"""(line at which the row ends, cells)"""


def read_rows(path: Path, delimiter: str = ",", skip_initial_space: bool = False) -> Rows:
    """The rows that are not empty, the header among them; raises ValueError if the file is no table in UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=skip_initial_space, strict=True)
            return [(reader.line_num, row) for row in reader if row]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as a table ({error}); save it as UTF-8") from error
    except csv.Error as error:
        fix = f"; a cell has more than {csv.field_size_limit():,} characters" if "limit" in str(error) else ""
        raise ValueError(f"{path}: cannot be read as a table (line {reader.line_num}: {error}{fix})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a table ({error.strerror})") from error


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[tuple[int, dict[str, str]]]:
    """(line, {column: cell without spaces around it}) of the rows below a header that has these columns, and others.

    Raises ValueError if a column is missing or twice there, a row has another number of cells, or there is none.
    """
    rows = read_rows(path, delimiter)
    header = [name.strip() for name in rows[0][1]] if rows else []
    if absent := [name for name in columns if name not in header]:
        there = shown(", ".join(header)) or "none"
        raise ValueError(
            f"{path}: line 1: no column '{absent[0]}'; needed are {', '.join(columns)}; the columns are {there}"
        )
    if twice := [name for name in columns if header.count(name) > 1]:
        raise ValueError(f"{path}: line 1: column '{twice[0]}' is there twice")
    if len(rows) < 2:
        raise ValueError(f"{path}: no row below the header")
    for line, row in rows[1:]:
        check_width(path, line, row, header)
    return [(line, dict(zip(header, map(str.strip, row), strict=True))) for line, row in rows[1:]]


def check_width(path: Path, line: int, row: Sequence[str], header: Sequence[str]) -> None:
    """Raises ValueError if the row has another number of cells than the header."""
    if len(row) != len(header):
        raise ValueError(f"{path}: line {line}: {width_problem(row, header)}")


def width_problem(row: Sequence[str], header: Sequence[str]) -> str:
    fix = "; a cell that holds a comma or a tab must be quoted" if len(row) > len(header) else ""
    return f"{len(row)} columns, but the header has {len(header)}{fix}"
