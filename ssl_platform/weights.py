"""Weights to start from: public files in the formats of DINOv2, DINOv3 and timm, timm's own, and our runs and exports.

Files of `torch.save` are read with `weights_only`, so that nothing in them runs; everything else is safetensors.
"""

import argparse  # for its Namespace in others' files; no arguments are read
import hashlib
import pickle  # the errors of torch's reader alone; nothing is read with it
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_platform import checkpoint
from ssl_platform.backbones._eva import is_dinov3
from ssl_platform.backbones._normalization import Normalization, normalization_of
from ssl_platform.backbones.timm_models import TimmBackbone
from ssl_platform.checkpoint import CheckpointError
from ssl_platform.encoder import Encoder
from ssl_platform.recipe import InitConfig

_WRAPPERS = ("model", "state_dict", "module")
"""Keys under which files of `torch.save` hold one network's weights, where they hold more than these."""
_PREFIXES = ("module.", "_orig_mod.", "model.")


class Weights(NamedTuple):
    """The tensors of one network as they were found, and what is known of it beyond them."""

    tensors: dict[str, Tensor]
    layout: Literal["dinov2", "dinov3", "timm", "ssl_platform"]
    origin: str
    """The file or timm's name, for people."""
    sha256: str | None
    """Of the file; None for what timm fetched."""
    grid: tuple[int, ...] | None = None
    """Of the position embedding, where it is known."""
    facts: dict[str, Any] = {}
    """What no tensor shows and a network must share: num_heads, norm_eps, rope_base."""
    heads: dict[str, dict[str, Tensor]] = {}
    """{name: tensors} of the heads that belong to the network: of a run or checkpoint of ours, or a DINOv2 training file."""
    normalization: Normalization | None = None
    """Of the views that they learned with, where it is known."""


def read(config: InitConfig) -> Weights:
    """The weights that `config` names, on the CPU; raises ValueError, ConfigError or OSError if it cannot."""
    if config.timm is not None:
        return _from_timm_hub(config.timm)
    assert config.path is not None
    path = config.path
    if path.is_dir():
        return _from_folder(path, config.network)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    return _from_file(path, config.network, config.grid)


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- our own -----------------------------------------------------------------------------------------------------------


def _from_folder(path: Path, network: str | None) -> Weights:
    """A run, a checkpoint or an export of ours, or a timm model's folder (config.json and model.safetensors)."""
    file = path / "model.safetensors"
    if (path / "config.json").is_file() and '"ssl_platform"' not in (path / "config.json").read_text(encoding="utf-8"):
        return _from_file(file, network, None)
    if not (path / "config.json").is_file() and not (path / "state.json").is_file():
        try:
            found = checkpoint.latest(path / "checkpoints")
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        if found is not None:
            path = found
    name, is_export = network or "teacher", (path / "config.json").is_file()
    encoder = Encoder.load(path, network=name)
    origin = f"{path} (network {name} after {encoder.config.step} steps)"
    weights = _of_module(encoder.network, origin, sha256(file) if is_export else checkpoint.digest(path))
    heads = {} if is_export else _heads_of(path, name)
    return weights._replace(heads=heads, normalization=normalization_of(encoder.modality.description()))


def _heads_of(path: Path, network: str) -> dict[str, dict[str, Tensor]]:
    """{head: tensors} of a network in a checkpoint, which names them heads.HEAD.NETWORK.KEY."""
    heads: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.read_tensors(path, "model", "heads.").items():
        _, head, owner, name = key.split(".", 3)
        if owner == network:
            heads.setdefault(head, {})[name] = tensor
    return heads


def _of_module(module: nn.Module, origin: str, digest: str | None) -> Weights:
    if isinstance(module, TimmBackbone):
        return _of_timm(module.model, origin, digest)
    facts = {key: getattr(module, key) for key in ("num_heads", "norm_eps", "rope_base") if hasattr(module, key)}
    return Weights(module.state_dict(), "ssl_platform", origin, digest, getattr(module, "native_grid", None), facts)


# -- timm --------------------------------------------------------------------------------------------------------------


def _from_timm_hub(name: str) -> Weights:
    import timm

    try:
        model = timm.create_model(name, pretrained=True)
    except (
        Exception
    ) as error:  # an unknown name, no network, no weights of that name: timm and its hub raise many kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"timm's '{name}': its weights cannot be had ({type(error).__name__}: {reason}). timm.list_pretrained() "
            "lists the names; without a network, fetch the file elsewhere and name it as `path`"
        ) from error
    facts: Any = model.pretrained_cfg
    return _of_timm(model, f"timm's {name}", None)._replace(normalization=normalization_of(facts))


def _of_timm(model: Any, origin: str, digest: str | None) -> Weights:
    facts: dict[str, Any] = {}
    blocks = getattr(model, "blocks", None)
    if blocks is not None and len(blocks) and hasattr(getattr(blocks[0], "attn", None), "num_heads"):
        facts["num_heads"] = blocks[0].attn.num_heads
    if isinstance(getattr(model, "norm", None), nn.LayerNorm):
        facts["norm_eps"] = model.norm.eps
    if (rope := getattr(model, "rope", None)) is not None:  # other kinds than DINOv3's are told by their name
        facts["rope_base"] = getattr(rope, "temperature", None) if hasattr(rope, "periods") else type(rope).__name__
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return Weights(model.state_dict(), "timm", origin, digest, tuple(grid) if grid else None, facts)


# -- files -------------------------------------------------------------------------------------------------------------


def _from_file(path: Path, network: str | None, grid: tuple[int, ...] | None) -> Weights:
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    tensors = _plain_names(_one_network(found, network, path), path)
    dinov2 = any(key in ("register_tokens", "mask_token") or ".mlp.w12." in key for key in tensors)
    heads = {
        name: {key.removeprefix(f"{name}_head."): v for key, v in tensors.items() if key.startswith(f"{name}_head.")}
        for name in ("dino", "ibot")
    }
    heads = {name: found for name, found in heads.items() if found}
    layout: Literal["dinov2", "dinov3", "timm"] = "dinov3" if is_dinov3(tensors) else "dinov2" if dinov2 else "timm"
    return Weights(tensors, layout, str(path), sha256(path), grid, heads=heads)


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read as safetensors ({error}): it was cut off or is of another kind"
        ) from error


def _torch_file(path: Path) -> Mapping[str, Any]:
    try:
        # Training files of DINO, iBOT and MAE hold their arguments too; a Namespace only takes attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects beside tensors, or is no file of torch.save; it was not read, because reading "
            "such objects can run code. Save its state dict alone, best with safetensors.torch.save_file"
        ) from error
    except Exception as error:  # damaged bytes make the reader raise almost anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path}: cannot be read ({reason}): it was cut off or is no file of torch.save") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds a {type(found).__name__}, where a state dict {{name: tensor}} is needed")
    return found


def _one_network(found: Mapping[str, Any], network: str | None, path: Path) -> dict[str, Tensor]:
    """The state dict in a file that may hold several, or other things too; a `network` that is named must be there."""
    for key in (network or "teacher", *_WRAPPERS):
        if isinstance(found.get(key), Mapping):
            return _one_network(found[key], None if key == network else network, path)
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if tensors and network is None:
        return tensors
    inner = [str(key) for key, value in found.items() if isinstance(value, Mapping)]
    hint = f"it has {', '.join(inner)}; set init.network to one of them" if inner else "it holds no tensors"
    hint = "it holds one network, without a name; leave init.network out" if tensors else hint
    raise ValueError(f"{path}: has no network '{network or 'teacher'}': {hint}")


def _plain_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without what wrappers put in front of every name; names beside `backbone.`, of heads, stay."""
    if any(key.startswith(("networks.", "objectives.")) for key in tensors):
        raise ValueError(f"{path}: is part of a checkpoint of ours; name its folder, {path.parent}")
    for prefix in _PREFIXES:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    tensors = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    if "masked_embed" in tensors:  # iBOT's mask token
        tensors["mask_token"] = tensors.pop("masked_embed")
    return tensors
