"""The shards that paths and URLs stand for, each with what the index beside it declares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ssl_platform.data.index_files import read_description, read_rows
from ssl_platform.data.reading import reason
from ssl_platform.data.remote import Remote
from ssl_platform.location import Url

Value = int | str | None


class Problem(NamedTuple):
    """One thing that is wrong."""

    shard: str
    key: str
    """Of a sample, or the name of a member; empty for the whole shard."""
    reason: str


class Declared(NamedTuple):
    """What an index says of one shard."""

    size: int
    rows: NDArray[Any]
    about: Mapping[str, Any]

    def value(self, row: NDArray[Any], what: str) -> Value:
        """The "label" or "group" of a row, as the sample should give it."""
        number, names = int(row[what]), self.about[f"{what}_names"]
        if number < 0:
            return None
        if not names:
            return number
        return names[number] if number < len(names) else f"number {number}, which has no name"


class Job(NamedTuple):
    path: Path | Url
    name: str
    """For the report."""
    declared: Declared | None


def folders(path: Path) -> list[tuple[Path, list[str] | None]]:
    """The (folder, names of tars) that a path or pattern stands for; None = all of the folder, missing ones too."""
    if path.is_dir():
        return [(path, None)]
    if path.is_file():
        return [(path.parent, [path.name])]
    found = sorted(path.parent.glob(path.name)) if any(character in path.name for character in "*?[") else []
    tars = [tar.name for tar in found if tar.is_file() and tar.suffix == ".tar"]
    folders: list[tuple[Path, list[str] | None]] = [(folder, None) for folder in found if folder.is_dir()]
    if not tars and not folders:
        raise ValueError(f"{path}: no such file or folder, and no pattern that a tar matches")
    return [*folders, *([(path.parent, tars)] if tars else [])]


def num_rows(job: Job) -> int:
    return 0 if job.declared is None else len(job.declared.rows)


def folder_jobs(folder: Path, names: list[str] | None, problems: list[Problem], with_folder: bool) -> list[Job]:
    """The shards of a folder, with what its index says of them; what is wrong with the index is added to `problems`."""
    prefix = f"{folder.name}/" if with_folder else ""
    about, rows = None, None
    try:
        about = read_description(folder)
        if about is not None:
            rows = read_rows(folder, about)
    except ValueError as error:
        about = None
        problems.append(Problem(f"{prefix}index.json", "", without(reason(error), folder)))
    present = {path.name for path in folder.glob("*.tar")}
    if about is None and (folder / "pack.json").exists() and not (folder / "index.json").exists():
        problems.append(Problem(f"{prefix}pack.json", "", "packing was not finished; give the same command again"))
    declared = dict[str, Declared]()
    if about is not None and rows is not None:
        declared = _declared(about, rows)
        unknown = sorted((present if names is None else set(names)) - declared.keys())
        problems += [Problem(f"{prefix}{name}", "", "not in the index.json beside it") for name in unknown]
    wanted = sorted(present | declared.keys()) if names is None else names
    return [Job(folder / name, prefix + name, declared.get(name)) for name in wanted]


def remote_jobs(remote: Remote, folder: Url, names: list[str] | None, with_folder: bool) -> list[Job]:
    """The same of a folder behind a URL, which is what its index says; raises ValueError if that is of no use."""
    about, rows, wanted = remote.open_folder(folder, names)
    shards = [about["shards"][number]["name"] for number in wanted]
    declared, prefix = _declared(about, rows), f"{folder.name}/" if with_folder else ""
    return [Job(folder / name, prefix + name, declared[name]) for name in shards]


def _declared(about: Mapping[str, Any], rows: NDArray[Any]) -> dict[str, Declared]:
    declared, first = {}, 0
    for shard in about["shards"]:
        declared[shard["name"]] = Declared(shard["bytes"], rows[first : first + shard["samples"]], about)
        first += shard["samples"]
    return declared


def without(text: str, path: Path | Url) -> str:
    """The reason alone, where a message begins with the file that the report names anyway."""
    return text.removeprefix(f"{path}: ").replace(f"{path}/", "")
