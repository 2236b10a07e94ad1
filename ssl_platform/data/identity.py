"""Names that identify nobody: keys and groups as salted hashes, and the look-up table that only its owner keeps.

Whoever has the salt or the table can tell which sample is whose; both lie beside the shards' folder, never in it.
"""

import csv
import hashlib
import io
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssl_platform.data.index_rows import number
from ssl_platform.data.items import Item
from ssl_platform.data.tars import atomic_file

_SALT_BYTES = 32
_RESERVED = ("path", "label", "group")


class Numbered(NamedTuple):
    """An item with what the whole plan decides. Its group and columns are those that the shards will hold."""

    key: str
    item: Item
    label: int


@dataclass(frozen=True)
class Names:
    """How keys and groups are written: as hashes with this salt; without one as they are, for data that is public."""

    salt: bytes | None

    @property
    def are_plain(self) -> bool:
        return self.salt is None

    def digest(self, what: str, *parts: object, size: int = 10) -> str:
        """`size` bytes in hex that tell nothing of `parts` to who has not the salt; 10 never meet by chance."""
        found = self.hash(size)
        found.update(json.dumps([what, *parts]).encode())
        return found.hexdigest()

    def hash(self, size: int) -> "hashlib.blake2b":
        """A hash of `size` bytes to be updated piece by piece."""
        return hashlib.blake2b(digest_size=size, key=self.salt or b"")

    @property
    def fingerprint(self) -> str:
        """Tells salts apart without telling them."""
        return "plain" if self.are_plain else self.digest("fingerprint", size=8)


PLAIN = Names(None)


def salted(salt_file: Path) -> Names:
    """Names with the salt in a file; raises ValueError if it is too short to keep a secret."""
    try:
        contents = salt_file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{salt_file}: {error.strerror}; make a salt with `head -c {_SALT_BYTES} /dev/urandom > {salt_file}`"
        ) from error
    if len(contents) < _SALT_BYTES // 2:
        raise ValueError(f"{salt_file}: {len(contents)} bytes, but a salt has {_SALT_BYTES} random ones")
    return Names(hashlib.blake2b(contents, digest_size=32).digest())


def lookup_folder(out: Path) -> Path:
    """Where the salt and the table of the shards in `out` are kept: `shards` -> `shards.lookup` beside it."""
    whole = out.resolve()
    return whole.with_name(whole.name + ".lookup")


def _new_salt() -> bytes:
    return secrets.token_bytes(_SALT_BYTES)


def own_salt(out: Path) -> Names:
    """Names with the salt of the look-up folder of `out`, made on first use. Several may do so at the same time."""
    folder = lookup_folder(out)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "salt"
    if not path.exists():
        temporary = folder / f".salt.{secrets.token_hex(8)}"
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(_new_salt())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, leaves alone what another process made meanwhile
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return salted(path)


def is_open_to_others(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def numbered(items: Sequence[Item], names: Names, keep_columns: Sequence[str]) -> list[Numbered]:
    """The items as the shards will name them; raises ValueError if a column to be kept is not there.

    Plain names stay in the order of the input, and so do all columns and the path. Others are in the order of their
    hashes, or the place of a sample would tell its rank in the alphabet.
    """
    if not names.are_plain:
        _check_columns(items, keep_columns)
        items = [_without_names(item, names) if item.hidden else item for item in items]
    labels = number([item.label for item in items])[0].tolist()
    if names.are_plain:
        digits = max(6, len(str(len(items))))
        return [
            Numbered(
                _readable_key(item, f"{i:0{digits}d}"),
                item._replace(columns=(("path", item.name), *item.columns)),
                label,
            )
            for i, (item, label) in enumerate(zip(items, labels, strict=True))
        ]
    groups = _hidden_groups(items, names)
    samples = []
    for key, item, label in zip(_hidden_keys(items, names), items, labels, strict=True):
        columns = tuple((name, text) for name, text in item.columns if name in keep_columns)
        group = None if item.group is None else groups[item.group]
        samples.append(Numbered(key, item._replace(group=group, columns=columns), label))
    return sorted(samples, key=lambda sample: sample.key)


def _without_names(item: Item, names: Names) -> Item:
    """With hashes in place of what the item says to hide; a label has the hash that a group of that name has."""
    label, columns = item.label, item.columns
    if "label" in item.hidden and label is not None:
        label = names.digest("group", str(label))
    columns = tuple((name, names.digest(name, text) if name in item.hidden else text) for name, text in columns)
    return item._replace(label=label, columns=columns)


def _hidden_groups(items: Sequence[Item], names: Names) -> dict[int | str, str]:
    given = {item.group for item in items if item.group is not None}
    return {group: names.digest("group", str(group)) for group in given}


def _hidden_keys(items: Sequence[Item], names: Names) -> Iterator[str]:
    """Hashes of path and corner, and of how often the same was there before: a table may list a file twice."""
    seen: Counter[tuple[str, tuple[int, int] | None]] = Counter()
    for item in items:
        seen[item.name, item.corner] += 1
        yield names.digest("key", item.name, item.corner, seen[item.name, item.corner])


def _readable_key(item: Item, number: str) -> str:
    """Sorted keys are in the order of the input; no dots, which would end the key."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(item.name).stem)[:60]
    return f"{number}_{stem}" + (f"_x{item.corner[0]}_y{item.corner[1]}" if item.corner else "")


def _check_columns(items: Sequence[Item], keep_columns: Sequence[str]) -> None:
    there = {name: None for item in items for name, _ in item.columns}
    for name in keep_columns:
        if name in _RESERVED:
            why = "a path is never kept in shards" if name == "path" else "kept already"
            raise ValueError(f"--keep-columns {name}: {why}")
        if name not in there:
            raise ValueError(f"--keep-columns {name}: no such column; there are {', '.join(there) or 'none'}")


def write_lookup(out: Path, items: Sequence[Item], names: Names, splits: Mapping[str, Sequence[Numbered]]) -> Path:
    """Writes `lookup.csv` (key, path, corner, group as hash and as name, split), readable by its owner alone.

    `splits` are the numbered items, by the name of their split.
    """
    folder = lookup_folder(out)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "lookup.csv"
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["key", "path", "x", "y", "group", "group_name", "split"])
    group_names = {hidden: group for group, hidden in _hidden_groups(items, names).items()}
    rows = sorted((sample.key, split, sample.item) for split, samples in splits.items() for sample in samples)
    for key, split, item in rows:
        table.writerow(
            [key, item.name, *(item.corner or ("", "")), item.group, group_names.get(str(item.group)), split]
        )
    contents = text.getvalue().encode(errors="surrogateescape")  # names of files need not be text
    if not path.exists() or path.read_bytes() != contents:
        with atomic_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(contents)
    return path
