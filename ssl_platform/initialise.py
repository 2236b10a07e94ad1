"""Starting a network from other weights: strict, with a report of what matched, was resized, left fresh or unused."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ssl_platform import distributed
from ssl_platform.backbones._conversion import dinov2_names, timm_names
from ssl_platform.backbones._eva import dinov3_names
from ssl_platform.backbones._normalization import Normalization, change_of
from ssl_platform.backbones._positions import interpolate_positions
from ssl_platform.backbones._resizing import adapt_channels, resize_patches
from ssl_platform.backbones.timm_models import TimmBackbone
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.config import ConfigError, PluginConfig
from ssl_platform.init_report import Report, misfit, size_text
from ssl_platform.log import logger
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.recipe import InitConfig, NetworkConfig
from ssl_platform.weights import Weights, read

_HEADS = ("head.", "head_dist.", "fc_norm.", "fc.", "dino_head.", "ibot_head.")


class Initialiser:
    """Fills networks and heads from the `init` of networks; raises ConfigError on every rank if it is on one.

    `views` is the modality's description: weights that learned with another mean and std are changed to fit it.
    Random generators are left as they were, so heads start alike with and without `init`.
    """

    def __init__(
        self,
        configs: Mapping[str, NetworkConfig],
        heads: Mapping[str, PluginConfig],
        views: Mapping[str, Any] | None = None,
    ) -> None:
        self.reports: list[Report] = []
        """One for each network that was filled."""
        self._configs = {name: config.init for name, config in configs.items() if config.init is not None}
        self._owners: dict[str, str] = {name: head.network for name, head in heads.items()}  # type: ignore[attr-defined]
        self._views = views
        self._heads: dict[str, dict[str, dict[str, Tensor]]] = {}

    def networks(self, networks: dict[str, nn.Module]) -> None:
        """Fills those with an `init` and says in the log what became of every key."""
        for name, config in self._configs.items():
            if distributed.rank() == 0:  # first, so that what timm fetches is there for the others
                found = self._attempt(name, config, networks[name])
            problem = distributed.from_rank_zero(found if distributed.rank() == 0 and isinstance(found, str) else None)
            if problem is None:
                if distributed.rank() > 0:
                    found = self._attempt(name, config, networks[name])
                reports = distributed.gather_objects(found if isinstance(found, str) else None)
                problem = next((item for item in reports if item), None)
            if problem is not None:
                raise ConfigError(problem.split("\n"))
            assert isinstance(found, Report)
            self.reports.append(found)
            for line in found.lines():
                logger.info("%s", line)

    def heads(self, heads: dict[str, nn.Module]) -> None:
        """Fills the heads of networks with `init.heads`, after `networks`."""
        for name, head in heads.items():
            if (tensors := self._heads.get(self._owners[name], {}).get(name)) is None:
                continue
            expected = head.state_dict()
            differing = [
                f"{key} {_shape(tensors.get(key))} instead of {_shape(expected.get(key))}"
                for key in sorted(expected.keys() | tensors.keys())
                if _shape(tensors.get(key)) != _shape(expected.get(key))
            ]
            if differing:
                raise ConfigError(
                    [f"networks.{self._owners[name]}.init.heads: the source's head '{name}' is another one: "
                     f"{', '.join(differing)}. Make heads.{name} what it was, or leave init.heads out for fresh heads"]
                )  # fmt: skip
            head.load_state_dict(tensors)
        self._heads.clear()

    def _take_heads(self, network: str, weights: Weights, report: Report) -> None:
        """Keeps the heads that `heads` will need; raises ConfigError if the source lacks one."""
        wanted = [head for head, owner in self._owners.items() if owner == network]
        missing = [head for head in wanted if head not in weights.heads]
        if missing or not wanted:
            there = f"only {', '.join(weights.heads)}" if weights.heads else "none (public files and exports hold none)"
            raise ConfigError(
                [f"{weights.origin} has no head {', '.join(missing)}, but {there}; leave init.heads out for fresh heads"
                 if missing else f"heads: true, but no head of this configuration reads the network '{network}'"]
            )  # fmt: skip
        self._heads[network] = {head: weights.heads[head] for head in wanted}
        report.heads_taken_over = wanted
        report.heads_left_out = [
            key
            for key in report.heads_left_out
            if key.removeprefix("heads.") not in wanted and key.partition("_head.")[0] not in wanted
        ]

    def _attempt(self, name: str, config: InitConfig, network: nn.Module) -> "Report | str":
        """Reads and fills one network; what went wrong as text, so that it can reach every rank."""
        where = f"networks.{name}.init"
        try:
            with torch.random.fork_rng(devices=[]):
                weights = read(config)
            report, state = fit(weights, network, config, name, self._views)
            network.load_state_dict(state)
            if config.heads:
                self._take_heads(name, weights, report)
        except ConfigError as error:
            return "\n".join([f"{where}: {error.lines[0]}", *error.lines[1:]])
        except (ValueError, OSError) as error:
            return f"{where}: {error}"
        for pattern in (*config.allow_missing, *config.allow_unused):
            if not any(fnmatchcase(key, pattern) for key in (*report.fresh, *report.unused)):
                logger.warning("%s: the pattern '%s' allows nothing that there is to allow", where, pattern)
        return report


def fit(
    weights: Weights, network: nn.Module, config: InitConfig, name: str, views: Mapping[str, Any] | None = None
) -> tuple[Report, dict[str, Tensor]]:
    """(report, state dict for `network`); raises ConfigError that lists every key which does not fit and is not allowed."""
    if isinstance(network, VisionTransformer):
        _refuse_other_families(weights, network, config)
    found = _renamed(weights, network)
    if isinstance(network, VisionTransformer) and network.mask_k_bias and network.rope is not None:
        biases = [value for key, value in found.items() if key.endswith("attn.qkv.bias")]
        if any(bool(bias.chunk(3)[1].any()) for bias in biases):
            raise ConfigError(
                [f"{weights.origin}: its keys have biases, which matter with RoPE; set mask_k_bias: false"]
            )
    said = Normalization(tuple(config.mean), tuple(config.std)) if config.mean and config.std else None
    change = change_of(network, found, said, weights.normalization, views, f"networks.{name}.init")
    found = change.undone(found) if change is not None else found
    expected = network.state_dict()
    report = Report(name, weights.origin, weights.layout, weights.sha256, freeze_steps=config.freeze_steps)
    report.heads_left_out = [
        key for key in weights.tensors if key.startswith(_HEADS) and not {key, f"model.{key}"} & expected.keys()
    ]
    if weights.layout == "ssl_platform":
        report.heads_left_out = [f"heads.{head}" for head in weights.heads]
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
    if change is not None and {*change.layer} <= {*report.matched, *report.resized}:
        change.apply(state, report.resized)
        report.matched = [key for key in report.matched if key not in change.layer]
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
        if isinstance(network, VisionTransformer)
        and getattr(network, fact) != value
        # Positions that one of both does not have are a matter of `allow_unused` and `allow_missing`.
        and (fact != "rope_base" or (value is not None and network.rope is not None))
    ]
    if any(problems.values()) or differing or not (report.matched or report.resized):
        raise ConfigError(misfit(weights, network, report, problems, differing, found))
    if isinstance(network, VisionTransformer) and not weights.facts and network.embed_dim // network.num_heads != 64:
        logger.warning(
            "networks.%s.init: a file does not say its num_heads, and with a wrong number the features are wrong; public "
            "ViTs have embed_dim / 64, the backbone has %d for %d", name, network.num_heads, network.embed_dim
        )  # fmt: skip
    return report, state


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


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
    if without and vit.pos_embed is not None and not _allowed("pos_embed", config.allow_missing):
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
            raise ConfigError(
                [f"init.grid: {size_text(grid)} does not fit pos_embed, which has {rows} places in the file"]
            )
        patches = interpolate_positions(
            value[:, 1:], grid, native, network.interpolation, network.offset, network.antialias
        )
        how = f"grid {size_text(grid)} -> {size_text(native)}, bicubic by the convention of {network.interpolation}"
        return torch.cat([value[:, :1], patches.to(value.dtype)], dim=1), how
    if key == "patch_embed.proj.weight" and isinstance(embed, GridPatchEmbed):
        size, steps = tuple(value.shape[2:]), []
        if len(size) != len(embed.patch_size) or value.shape[0] != network.embed_dim:
            return value, ""
        if value.shape[1] != embed.in_chans:
            steps.append(f"channels {value.shape[1]} -> {embed.in_chans}, with the same sum over channels")
            value = adapt_channels(value, embed.in_chans)
        if size != embed.patch_size:
            steps.append(
                f"patches {size_text(size)} -> {size_text(embed.patch_size)}, pseudo-inverse resize (FlexiViT)"
            )
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
