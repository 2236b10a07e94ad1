"""ShapeNetCore v1 or v2, or the points of ShapeNet55 and ShapeNet34 as Point-BERT distributes them.

    DIR/02691156/10155655850468db78d106ce0a280f87/models/model_normalized.obj      v2
    DIR/02691156/10155655850468db78d106ce0a280f87/model.obj                        v1
    DIR/taxonomy.json      DIR/all.csv (id, synsetId, subSynsetId, modelId, split)
or
    DIR/shapenet_pc/02691156-1a04e3eab45ca15dd86060f189eb133.npy      8,192 points each
    DIR/ShapeNet-55/train.txt, test.txt      or DIR/ShapeNet-34/..., chosen by --list

The label is the synset's first name in taxonomy.json ("airplane"), else its number; the column synset is the number. Splits
are those of all.csv or of the list; without all.csv there are none. Of a mesh --points are drawn from its surface, by area,
the same for the same file; materials and textures are not read.

    pip install 'ssl-platform[points]'
    ssl-pack shapenet ShapeNetCore.v2 shards --workers 16
    ssl-pack shapenet ShapeNet55-34 shards --list ShapeNet-55
"""

import argparse
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ssl_platform.data.items import Item
from ssl_platform.data.layouts import MAX_NAMED, add_num_points, missing
from ssl_platform.data.media import points
from ssl_platform.data.tables import read_table

logger = logging.getLogger(__name__)

COLUMNS = ("synset",)
_MODELS = ("models/model_normalized.obj", "model.obj")
_DEFAULT_LIST = "ShapeNet-55"


def add_arguments(parser: Any) -> None:
    add_num_points(parser)
    parser.add_argument(
        "--list", metavar="NAME", help=f"folder with train.txt and test.txt; default {_DEFAULT_LIST}, or the only one"
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"points": arguments.points, "list": arguments.list}


def items(folder: Path, arguments: argparse.Namespace) -> list[Item]:
    """The shapes; raises ValueError if neither layout is there, or a table or list cannot be used."""
    if (folder / "shapenet_pc").is_dir():
        return _labelled(_clouds(folder, arguments.list), folder / "taxonomy.json")
    if arguments.list is not None:
        raise ValueError("--list: only where DIR has shapenet_pc/, as Point-BERT distributes it")
    found = []
    for synset in sorted(path for path in folder.iterdir() if re.fullmatch(r"\d{8}", path.name) and path.is_dir()):
        for model in sorted(path for path in synset.iterdir() if path.is_dir()):
            file = next((model / name for name in _MODELS if (model / name).is_file()), model / _MODELS[0])
            found.append(_item(folder, file, synset.name)._replace(part=(arguments.points,)))
    if not found:
        raise missing(folder, ["SYNSET/MODEL/models/model_normalized.obj", "shapenet_pc/"], "shapenet")
    points.import_trimesh()
    found = _labelled(found, folder / "taxonomy.json")
    wants_splits = not arguments.without_splits and arguments.split in (None, ["column"])
    return _with_splits(found, folder / "all.csv") if wants_splits and (folder / "all.csv").is_file() else found


def _item(folder: Path, path: Path, synset: str) -> Item:
    return Item(path, path.relative_to(folder).as_posix(), label=synset, columns=(("synset", synset),), medium="points")


def _clouds(folder: Path, chosen: str | None) -> list[Item]:
    """The clouds that the train.txt and test.txt of one list name."""
    there = sorted(path.parent.name for path in folder.glob("*/train.txt"))
    if chosen is None:
        chosen = there[0] if len(there) == 1 else _DEFAULT_LIST
    if chosen not in there:
        if not there:
            raise missing(folder, [f"{_DEFAULT_LIST}/train.txt"], "shapenet")
        raise ValueError(f"{folder}: no list {chosen}; give --list, one of {', '.join(there)}")
    found = []
    for split in ("train", "test"):
        path = folder / chosen / f"{split}.txt"
        for line, file in enumerate(path.read_text(encoding="utf-8").split() if path.is_file() else (), 1):
            if not re.fullmatch(r"\d{8}-[\w.-]+\.npy", file, re.ASCII):
                raise ValueError(f"{path}: line {line}: '{file[:80]}', expected SYNSET-MODEL.npy")
            found.append(_item(folder, folder / "shapenet_pc" / file, file[:8])._replace(split=split))
    if not found:
        raise ValueError(f"{folder / chosen}: train.txt and test.txt name no cloud")
    return found


def _with_splits(found: list[Item], table: Path) -> list[Item]:
    """The models that all.csv names, in its splits; those that it does not name are left out."""
    rows = read_table(table, ("synsetId", "modelId", "split"))
    splits = {f"{row['synsetId'].zfill(8)}/{row['modelId']}": row["split"] for _, row in rows}
    keys = ["/".join(item.name.split("/")[:2]) for item in found]
    if unknown := [key for key in keys if not splits.get(key)]:
        logger.warning(
            "%d models are not in %s and are left out (--without-splits packs them): %s%s",
            len(unknown), table, ", ".join(unknown[:MAX_NAMED]), ", ..." * (len(unknown) > MAX_NAMED),
        )  # fmt: skip
    if absent := sorted(splits.keys() - set(keys)):
        logger.warning(
            "%d models of %s are not in the folder: %s%s",
            len(absent), table, ", ".join(absent[:MAX_NAMED]), ", ..." * (len(absent) > MAX_NAMED),
        )  # fmt: skip
    packed = [item._replace(split=splits[key]) for item, key in zip(found, keys, strict=True) if splits.get(key)]
    if not packed:
        raise ValueError(f"{table}: names none of the {len(found)} models in the folder; --without-splits packs them")
    return packed


def _labelled(found: list[Item], taxonomy: Path) -> list[Item]:
    """The items by the names of their synsets, with the number behind a name that two of them have."""
    if not taxonomy.is_file():
        return found
    try:
        entries = json.loads(taxonomy.read_text(encoding="utf-8"))
        names = {entry["synsetId"]: entry["name"].split(",")[0].strip() for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{taxonomy}: expected a list of entries with synsetId and name ({error!r})") from error
    used = Counter(names[synset] for synset in {str(item.label) for item in found} & names.keys())

    def label(synset: str) -> str:
        name = names.get(synset, synset)
        return f"{name}_{synset}" if used[name] > 1 else name

    return [item._replace(label=label(str(item.label))) for item in found]
