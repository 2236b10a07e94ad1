"""The blocks of networks, one by one: found, recomputed in the backward pass, compiled. Names of parameters stay."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ssl_platform.config import ConfigError

VARIANTS = 64
"""Compiled versions of a block's code that are kept: trained or not, each rate of drop path, each width. torch's 8 are
few for that, and beyond them it runs uncompiled."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The members of every list called `blocks`, the outermost if they are nested; none for a network without.

    They must be used through their `forward` alone: they are sharded, recomputed and compiled one by one.
    """
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        is_list = name.rpartition(".")[2] == "blocks" and isinstance(module, nn.ModuleList | nn.Sequential)
        if is_list and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return [block for blocks in found.values() for block in blocks.children()]


def recompute_blocks(networks: dict[str, nn.Module]) -> None:
    """Lets blocks keep only their input in the forward pass, and run again in the backward pass (activation checkpointing).

    To be given trained networks, before `compile_blocks` and before they are wrapped. Raises ConfigError for a network
    without blocks, or with batch norm in them, whose running statistics would be updated twice.
    """
    for name, network in networks.items():
        blocks = blocks_of(network)
        if not blocks:
            raise ConfigError([f"recompute: networks.{name} has no `blocks` that could run one by one; leave it out"])
        if any(isinstance(module, _BatchNorm) for block in blocks for module in block.modules()):
            raise ConfigError(
                [
                    f"recompute: networks.{name} has batch norm in its blocks, which would see batches twice; leave it out"
                ]
            )
        for block in blocks:
            block.forward = MethodType(_recomputed, block)


def _recomputed(block: nn.Module, *arguments: Any) -> Any:
    return checkpoint(type(block).forward, block, *arguments, use_reentrant=False)


def compile_blocks(networks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compiles the blocks of the networks that have some, when they first run; raises ConfigError if none has.

    Blocks of the same code and shapes share what was compiled; sizes that change are compiled once more, for any size.
    What `recompute_blocks` did is compiled with them: were it around them, a block might run again as another version.
    """
    blocks = [block for network in networks for block in blocks_of(network)]
    if not blocks:
        raise ConfigError(["compile: no network has `blocks` that could be compiled one by one; leave it out"])
    from torch._dynamo import config  # takes seconds

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)
