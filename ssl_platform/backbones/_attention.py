"""Attention over token groups of several lengths: one call for each group, or one over all of them packed."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_platform.optional import optional_package

Backend = Literal["auto", "sdpa", "varlen", "xformers"]


class Heads(NamedTuple):
    """Queries, keys and values of one group, (rows, N, heads, d) each; position rotations are applied before."""

    q: Tensor
    k: Tensor
    v: Tensor


class Lengths(NamedTuple):
    """What is packed: for each group its number of rows and their length."""

    groups: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        return max(length for _, length in self.groups)

    def boundaries(self, device: torch.device) -> Tensor:
        """(rows of all groups + 1,) int32: where each row begins, and the end; made on the device, so nothing waits."""
        parts, begin = [], 0
        for rows, length in self.groups:
            end = begin + rows * length
            parts.append(torch.arange(begin, end, length, dtype=torch.int32, device=device))
            begin = end
        return torch.cat([*parts, torch.full((1,), begin, dtype=torch.int32, device=device)])


def attention(groups: Sequence[Heads], backend: Backend = "auto") -> list[Tensor]:
    """softmax(q k^T / sqrt(d)) v of every row of every group, as (rows, N, heads d) each.

    `sdpa` runs anywhere, group by group; `auto` is `sdpa` until the others have been measured on a GPU (benchmarks/gpu.sh).
    The packed ones need CUDA, `varlen` in half precision (torch.nn.attention.varlen); ValueError elsewhere. A single group
    has nothing to pack, so whatever is trained with them is evaluated anywhere.
    """
    if backend in ("auto", "sdpa") or len(groups) == 1:
        return [_sdpa(group) for group in groups]
    check(backend, groups[0].q.device, groups[0].q.dtype)
    q, k, v = (torch.cat([group[i].flatten(0, 1) for group in groups]) for i in range(3))  # (tokens, heads, d)
    lengths = Lengths(tuple((group.q.shape[0], group.q.shape[1]) for group in groups))
    mixed = PACKED[backend](q, k, v, lengths).flatten(1)  # (tokens, heads d)
    parts = torch.split(mixed, [rows * length for rows, length in lengths.groups])
    return [part.reshape(*shape, -1) for part, shape in zip(parts, lengths.groups, strict=True)]


def check(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError, with what to change, where a packed backend cannot run."""
    instead = "; choose attention: sdpa for this backbone (networks.*.backbone.attention), which runs anywhere"
    if device.type != "cuda":
        raise ValueError(f"attention: {backend} runs on CUDA only, and this runs on {device.type}{instead}")
    if backend == "varlen" and dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention: varlen takes half precision only, not {dtype}: set precision: bf16{instead}")


def _sdpa(heads: Heads) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in heads)  # (rows, heads, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise ValueError(
            f"attention: varlen needs a torch with torch.nn.attention.varlen, this is {torch.__version__}; "
            "choose attention: sdpa (networks.*.backbone.attention)"
        ) from error
    boundaries = lengths.boundaries(q.device)
    mixed = varlen_attn(q, k, v, boundaries, boundaries, lengths.longest, lengths.longest)
    assert isinstance(mixed, Tensor)  # a pair only where its log-sum-exp is asked for
    return mixed


def _xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    operators = optional_package("xformers.ops", "attention: xformers needs xFormers", "xformers")
    mixed: Tensor = operators.memory_efficient_attention(
        q[None], k[None], v[None], attn_bias=_block_diagonal(lengths, q.device)
    )
    return mixed[0]


@lru_cache(maxsize=16)
def _block_diagonal(lengths: Lengths, device: torch.device) -> Any:
    """xFormers' mask; kept, because making it copies from the host."""
    bias = optional_package("xformers.ops.fmha.attn_bias", "attention: xformers needs xFormers", "xformers")
    each = [length for rows, length in lengths.groups for _ in range(rows)]
    return bias.BlockDiagonalMask.from_seqlens(each, device=device)


PACKED: dict[str, Callable[[Tensor, Tensor, Tensor, Lengths], Tensor]] = {"varlen": _varlen, "xformers": _xformers}
"""(tokens, heads, d) x 3 -> (tokens, heads, d), each row attending to itself only."""
