"""What became of every tensor when a network was started from other weights, and what is said of weights that do not fit."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.weights import Weights

NUM_SHOWN = 20


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
    heads_taken_over: list[str] = field(default_factory=list)
    """Names of the run's heads that start from the source's (`init.heads`)."""
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
        if self.heads_taken_over:
            lines.append(f"  heads that start from the source's: {', '.join(self.heads_taken_over)} (init.heads)")
        elif any(key.startswith("heads.") for key in self.heads_left_out):
            lines.append("  its heads start fresh; init.heads: true takes over those of the same names")
        if self.freeze_steps:
            lines.append(f"  learning rate 0 for its first {self.freeze_steps} steps (init.freeze_steps)")
        return lines


def write_reports(run_dir: Path, reports: list[Report]) -> None:
    """Writes `run_dir/init.json`, {network: report}, all or nothing; nothing if no network has an `init`."""
    if not reports:
        return
    part = run_dir / ".init.json.part"
    part.write_text(json.dumps({one.network: asdict(one) for one in reports}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, run_dir / "init.json")


# -- words -------------------------------------------------------------------------------------------------------------


def misfit(
    weights: Weights,
    network: nn.Module,
    report: Report,
    problems: dict[str, list[str]],
    differing: list[str],
    found: dict[str, Tensor],
) -> list[str]:
    """The lines of the error: which keys do not fit, what the file holds, what the backbone is, what to do."""
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
        facts["patch_size"] = size_text(tuple(state["patch_embed.proj.weight"].shape[2:]))
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _shown(keys: list[str]) -> str:
    more = f" and {len(keys) - NUM_SHOWN} more" if len(keys) > NUM_SHOWN else ""
    return ", ".join(keys[:NUM_SHOWN]) + more


def size_text(size: tuple[int, ...]) -> str:
    """(14, 28) as 14 x 28."""
    return " x ".join(map(str, size))
