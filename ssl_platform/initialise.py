"""Starting a network from other weights: strict, with a report of what matched, was resized, left fresh or unused."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_platform import distributed
from ssl_platform.backbones._conversion import dinov2_names, timm_names
from ssl_platform.backbones._eva import dinov3_names
from ssl_platform.backbones._positions import interpolate_positions
from ssl_platform.backbones._resizing import adapt_channels, resize_patches
from ssl_platform.backbones.timm_models import TimmBackbone
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.config import ConfigError
from ssl_platform.log import logger
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.recipe import InitConfig, NetworkConfig
from ssl_platform.weights import Weights, read

NUM_SHOWN = 20
_HEADS = ("head.", "head_dist.", "fc_norm.", "fc.", "dino_head.", "ibot_head.")


@dataclass
class Report:
    """What became of every tensor of a network and of a file; `init.json` keeps it."""

    network: str
    source: str
    layout: str
    sha256: str | None
    matched: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    """{key: what was done}"""
    fresh: list[str] = field(default_factory=list)
    """Not in the file: they keep their random initialisation."""
    unused: list[str] = field(default_factory=list)
    """In the file but not in the network; `allow_unused` names them."""
    heads_left_out: list[str] = field(default_factory=list)
    freeze_steps: int = 0

    def lines(self) -> list[str]:
        """For the log."""
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        total = len(self.matched) + len(self.resized) + len(self.fresh)
        lines = [
            f"network {self.network} starts from {self.source} ({self.layout} format{digest}): {len(self.matched)} of "
            f"{total} keys matched, {len(self.resized)} resized, {len(self.fresh)} fresh; of the file "
            f"{len(self.unused)} unused, {len(self.heads_left_out)} of heads left out"
        ]
        lines += [f"  resized {key}: {how}" for key, how in self.resized.items()]
        for title, keys in (("fresh", self.fresh), ("unused", self.unused), ("heads", self.heads_left_out)):
            lines += [f"  {title}: {_shown(keys)}"] * bool(keys)
        if self.freeze_steps:
            lines.append(f"  learning rate 0 for its first {self.freeze_steps} steps (init.freeze_steps)")
        return lines


def initialise(configs: Mapping[str, NetworkConfig], reports: list[Report], networks: dict[str, nn.Module]) -> None:
    """Fills `networks` from their `init` and adds a report of each; raises ConfigError on every rank if it is on one.

    Random generators are left as they were, so heads start alike with and without `init`.
    """
    for name, config in configs.items():
        if config.init is None:
            continue
        if distributed.rank() == 0:  # first, so that what timm fetches is there for the others
            found = _attempt(name, config.init, networks[name])
        problem = distributed.from_rank_zero(found if distributed.rank() == 0 and isinstance(found, str) else None)
        if problem is None:
            if distributed.rank() > 0:
                found = _attempt(name, config.init, networks[name])
            problems = [item for item in distributed.gather_objects(found if isinstance(found, str) else None) if item]
            problem = problems[0] if problems else None
        if problem is not None:
            raise ConfigError(problem.split("\n"))
        assert isinstance(found, Report)
        reports.append(found)
        for line in found.lines():
            logger.info("%s", line)


def write_reports(run_dir: Path, reports: list[Report]) -> None:
    """Writes `run_dir/init.json`, {network: report}, all or nothing; nothing if no network has an `init`."""
    if not reports:
        return
    part = run_dir / ".init.json.part"
    part.write_text(json.dumps({one.network: asdict(one) for one in reports}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, run_dir / "init.json")


def _attempt(name: str, config: InitConfig, network: nn.Module) -> "Report | str":
    """Reads and fills; what went wrong as text, so that it can reach every rank."""
    where = f"networks.{name}.init"
    try:
        with torch.random.fork_rng(devices=[]):
            weights = read(config)
        report, state = fit(weights, network, config, name)
        network.load_state_dict(state)
    except ConfigError as error:
        return "\n".join([f"{where}: {error.lines[0]}", *error.lines[1:]])
    except (ValueError, OSError) as error:
        return f"{where}: {error}"
    for pattern in (*config.allow_missing, *config.allow_unused):
        if not any(fnmatchcase(key, pattern) for key in (*report.fresh, *report.unused)):
            logger.warning("%s: the pattern '%s' allows nothing that there is to allow", where, pattern)
    return report


def fit(weights: Weights, network: nn.Module, config: InitConfig, name: str) -> tuple[Report, dict[str, Tensor]]:
    """(report, state dict for `network`); raises ConfigError that lists every key which does not fit and is not allowed."""
    if isinstance(network, VisionTransformer):
        _refuse_other_families(weights, network, config)
    found = _renamed(weights, network)
    expected = network.state_dict()
    report = Report(name, weights.origin, weights.layout, weights.sha256, freeze_steps=config.freeze_steps)
    report.heads_left_out = [
        key for key in weights.tensors if key.startswith(_HEADS) and not {key, f"model.{key}"} & expected.keys()
    ]
    state, missing, shapes = dict(expected), [], []
    for key, target in expected.items():
        if key not in found:
            missing.append(key)
            continue
        value, how = _resized(key, found[key], network, config.grid or weights.grid)
        if value.shape != target.shape:
            shapes.append(f"{key} {tuple(value.shape)} instead of {tuple(target.shape)}")
            continue
        if not bool(torch.isfinite(value).all()):
            raise ConfigError([f"{weights.origin}: {key} has values that are not finite; the file is damaged"])
        state[key] = value.to(target.dtype)
        if how:
            report.resized[key] = how
        else:
            report.matched.append(key)
    unused = [key for key in found if key not in expected and key.removeprefix("model.") not in report.heads_left_out]
    by_format = {"mask_token"} if weights.layout == "timm" else set()  # timm's models hide no tokens
    report.fresh = [key for key in missing if key in by_format or _allowed(key, config.allow_missing)]
    report.fresh += [
        line.partition(" ")[0] for line in shapes if _allowed(line.partition(" ")[0], config.allow_missing)
    ]
    report.unused = [key for key in unused if _allowed(key, config.allow_unused)]
    problems = {
        "missing in the file": [key for key in missing if key not in report.fresh],
        "in the file, but not in the backbone": [key for key in unused if key not in report.unused],
        "other shapes": [line for line in shapes if line.partition(" ")[0] not in report.fresh],
    }
    differing = [
        f"{fact} {value}, but the backbone has {getattr(network, fact)}"
        for fact, value in weights.facts.items()
        if isinstance(network, VisionTransformer) and getattr(network, fact) != value
    ]
    if any(problems.values()) or differing or not (report.matched or report.resized):
        raise ConfigError(_misfit(weights, network, report, problems, differing, found))
    if isinstance(network, VisionTransformer) and not weights.facts and network.embed_dim // network.num_heads != 64:
        logger.warning(
            "networks.%s.init: a file does not say its num_heads, and with a wrong number the features are wrong; public "
            "ViTs have embed_dim / 64, the backbone has %d for %d", name, network.num_heads, network.embed_dim
        )  # fmt: skip
    return report, state


def _allowed(key: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _refuse_other_families(weights: Weights, vit: VisionTransformer, config: InitConfig) -> None:
    """Raises ConfigError for positions of another kind, and for well-known formats that `vit` cannot hold."""
    names = weights.tensors.keys()
    learned = "pos_embed" in names
    if learned and vit.rope is not None and not _allowed("pos_embed", config.allow_unused):
        raise ConfigError(
            [f"{weights.origin}: has a learned position embedding (pos_embed), but the backbone turns by position; set "
             "position.kind: learned, or give up its positions with init.allow_unused: [pos_embed]"]
        )  # fmt: skip
    without = not learned and any(key.startswith("blocks.") for key in names)
    if without and vit.rope is None and not _allowed("pos_embed", config.allow_missing):
        raise ConfigError(
            [f"{weights.origin}: has no pos_embed, as models of DINOv3 and EVA: rotary positions (RoPE) instead of a "
             "learned position embedding. For a DINOv3 model set networks.NAME.backbone.position: {kind: rope}"]
        )  # fmt: skip
    hugging_face = [key for key in names if ".encoder.layer." in f".{key}" or key.startswith("embeddings.")]
    if hugging_face:
        raise ConfigError(
            [f"{weights.origin}: is of transformers' format ({hugging_face[0]}); take the model's original file or timm's"]
        )  # fmt: skip


def _renamed(weights: Weights, network: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names of `network`."""
    if isinstance(network, TimmBackbone):
        ours = network.state_dict()
        named = {f"model.{key}": value for key, value in weights.tensors.items()}
        return {key: value for key, value in named.items() if key in ours or not key[6:].startswith(_HEADS)}
    if not isinstance(network, VisionTransformer) or weights.layout == "ssl_platform":
        return weights.tensors
    if weights.layout == "dinov2":
        return dinov2_names({key: value for key, value in weights.tensors.items() if not key.startswith(_HEADS)})
    if weights.layout == "dinov3":
        trunk = {key: value for key, value in weights.tensors.items() if not key.startswith(_HEADS)}
        try:
            return dinov3_names(trunk, network)
        except ValueError as error:
            raise ConfigError([f"{weights.origin}: {error}"]) from error
    try:
        return timm_names(weights.tensors, network.layer_scale is not None, weights.grid or network.native_grid)
    except ValueError as error:
        raise ConfigError([f"{error}; where they are no square, say their grid: init.grid: [height, width]"]) from error


def _resized(key: str, value: Tensor, network: nn.Module, grid: tuple[int, ...] | None) -> tuple[Tensor, str]:
    """(the tensor for `network`, what was done): positions and patch embeddings of `vit` are resized, nothing else."""
    if not isinstance(network, VisionTransformer):
        return value, ""
    embed, native = network.patch_embed, network.native_grid
    if key == "pos_embed" and native is not None and value.ndim == 3 and value.shape[2] == network.embed_dim:
        rows = value.shape[1] - 1
        grid = grid or _likely_grid(rows, native)
        if grid == native or grid is None:
            return value, ""
        if math.prod(grid) != rows or len(grid) != len(native):
            raise ConfigError([f"init.grid: {_size(grid)} does not fit pos_embed, which has {rows} places in the file"])
        patches = interpolate_positions(
            value[:, 1:], grid, native, network.interpolation, network.offset, network.antialias
        )
        how = f"grid {_size(grid)} -> {_size(native)}, bicubic by the convention of {network.interpolation}"
        return torch.cat([value[:, :1], patches.to(value.dtype)], dim=1), how
    if key == "patch_embed.proj.weight" and isinstance(embed, GridPatchEmbed):
        size, steps = tuple(value.shape[2:]), []
        if len(size) != len(embed.patch_size) or value.shape[0] != network.embed_dim:
            return value, ""
        if value.shape[1] != embed.in_chans:
            steps.append(f"channels {value.shape[1]} -> {embed.in_chans}, with the same sum over channels")
            value = adapt_channels(value, embed.in_chans)
        if size != embed.patch_size:
            steps.append(f"patches {_size(size)} -> {_size(embed.patch_size)}, pseudo-inverse resize (FlexiViT)")
            value = resize_patches(value, embed.patch_size)
        return value, "; ".join(steps)
    return value, ""


def _likely_grid(rows: int, native: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of a file that does not say it: a square, or a line; the backbone's own if neither can be."""
    side = math.isqrt(rows)
    if len(native) == 2 and side * side == rows:
        return (side, side)
    if len(native) == 1:
        return (rows,)
    if rows == math.prod(native):
        return native
    raise ConfigError(
        [f"pos_embed has {rows} places, which are no square: say its grid, such as init.grid: [{native[0]}, ...]"]
    )


# -- words -------------------------------------------------------------------------------------------------------------


def _misfit(
    weights: Weights,
    network: nn.Module,
    report: Report,
    problems: dict[str, list[str]],
    differing: list[str],
    found: dict[str, Tensor],
) -> list[str]:
    num_fitting, total = len(report.matched) + len(report.resized), len(network.state_dict())
    lines = [f"{weights.origin} does not fit the backbone: {num_fitting} of {total} keys fit"]
    if not num_fitting and report.heads_left_out:
        lines.append(f"  it holds only heads: {_shown(report.heads_left_out)}; name a file with the whole network")
    lines += [f"  {title} ({len(keys)}): {_shown(keys)}" for title, keys in problems.items() if keys]
    lines += [f"  {line}" for line in differing]
    if isinstance(network, VisionTransformer) and (described := describe(found)):
        lines.append(f"  the file holds {described}")
        lines.append(f"  the backbone is {describe(network.state_dict())}")
    lines.append(
        f"  make networks.{report.network}.backbone what the file holds, or name keys that may stay fresh in "
        "init.allow_missing and keys of the file to pass over in init.allow_unused (patterns such as blocks.*.ls1.gamma)"
    )
    return lines


def describe(state: Mapping[str, Tensor]) -> str:
    """The architecture that the shapes of a state dict of `vit` show, as settings; empty if it is of another kind."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if "cls_token" not in state or not depth:
        return ""
    first, second = (state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    facts: dict[str, Any] = {"embed_dim": state["cls_token"].shape[-1], "depth": depth}
    facts["num_registers"] = state["reg_token"].shape[1] if "reg_token" in state else 0
    facts["layer_scale"] = "on" if "blocks.0.ls1.gamma" in state else "null"
    if first is not None and second is not None:
        facts["ffn"] = "mlp" if first.shape[0] == second.shape[1] else "swiglu"
    facts["qkv_bias"] = str("blocks.0.attn.qkv.bias" in state).lower()
    facts["position.kind"] = "learned" if "pos_embed" in state else "rope"
    if "patch_embed.proj.weight" in state:
        facts["patch_size"] = _size(tuple(state["patch_embed.proj.weight"].shape[2:]))
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _shown(keys: list[str]) -> str:
    more = f" and {len(keys) - NUM_SHOWN} more" if len(keys) > NUM_SHOWN else ""
    return ", ".join(keys[:NUM_SHOWN]) + more


def _size(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
