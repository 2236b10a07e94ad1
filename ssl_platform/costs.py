"""What a run costs on other hardware, by arithmetic alone: memory, traffic, checkpoints, data, time.

Plain numbers in, plain numbers out; `dry_run.py` gives those of a step. Bytes and seconds unless a name says otherwise.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import Field, field_validator, model_validator

from ssl_platform import plain_yaml
from ssl_platform.config import Config, validate


class Gpu(NamedTuple):
    """What a data sheet promises."""

    bf16: float
    """FLOP/s of matrix products, without sparsity."""
    fp32: float
    memory: float
    link: float
    """Bytes/s in one direction to the other GPUs of the machine: half of what data sheets call the bandwidth."""


# From NVIDIA's data sheets, whose tensor core figures are with sparsity (halved here) and whose links count both directions.
# Memory is the sheet's too: what CUDA can use of it differs by a few per cent.
GPUS = {
    # "NVIDIA H100 Tensor Core GPU" data sheet: BFLOAT16 1,979 and 1,513 TFLOPS, FP32 67 and 51; NVLink 900, PCIe 5 128 GB/s.
    "h100_sxm": Gpu(989e12, 67e12, 80e9, 450e9),
    "h100_pcie": Gpu(756e12, 51e12, 80e9, 64e9),  # a bridge of NVLink joins pairs alone
    # "NVIDIA H200 Tensor Core GPU" data sheet, SXM: as H100 SXM, with 141 GB.
    "h200": Gpu(989e12, 67e12, 141e9, 450e9),
    # "NVIDIA A100 Tensor Core GPU" data sheet, 80 GB: BFLOAT16 624, FP32 19.5 TFLOPS; NVLink 600, PCIe 4 64 GB/s.
    "a100_sxm": Gpu(312e12, 19.5e12, 80e9, 300e9),
    "a100_pcie": Gpu(312e12, 19.5e12, 80e9, 32e9),
    # "NVIDIA L40S" data sheet: BFLOAT16 733, FP32 91.6 TFLOPS; PCIe 4 x16, 64 GB/s.
    "l40s": Gpu(362e12, 91.6e12, 48e9, 32e9),
    # "NVIDIA Ada GPU Architecture" white paper, appendix: BF16 with FP32 accumulate 330.4, FP32 82.6 TFLOPS; PCIe 4 x16,
    # without direct transfers between GPUs, so that less of the link is reached.
    "rtx4090": Gpu(165.2e12, 82.6e12, 24e9, 32e9),
}


class Assumptions(Config):
    """What a calculated estimate takes for granted: `ssl-train CONFIG --estimate gpus=64 gpu=h100_sxm mfu=.4`."""

    gpus: int = Field(ge=1, le=1_000_000)
    gpu: str = "h100_sxm"
    gpus_per_node: int = Field(8, ge=1)
    """Among which data flows at the GPU's own link; beyond, at `node_link`."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Share of the GPU's peak that matrix products reach over a whole step: an assumption, not a measurement."""
    node_link: float = Field(50.0, gt=0)
    """GB/s of each GPU to other machines, one direction: 400 Gbit/s InfiniBand for each GPU, as in a DGX H100."""
    disk: float = Field(1.0, gt=0)
    """GB/s at which a checkpoint is written."""
    loader: float = Field(80.0, gt=0)
    """Samples/s of one data worker; 80 are measured for 2x224 + 8x96 views of 256-pixel JPEG (docs/benchmarks.md)."""

    @field_validator("gpu")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in GPUS:
            raise ValueError(f"'{name}' is not known; there are {', '.join(GPUS)}")
        return name

    @model_validator(mode="after")
    def _whole_machines(self) -> "Assumptions":
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise ValueError(
                f"gpus: {self.gpus} is not a multiple of gpus_per_node {self.gpus_per_node}; use {below} or "
                f"{below + self.gpus_per_node}, or say the machine's gpus_per_node"
            )
        return self

    @property
    def link(self) -> float:
        """Bytes/s of the slowest link that collectives cross."""
        inside = GPUS[self.gpu].link
        return inside if self.gpus <= self.gpus_per_node else min(inside, self.node_link * 1e9)


def split_assumptions(overrides: Sequence[str]) -> tuple[Assumptions | None, list[str]]:
    """(those among `key=value` that are assumptions, the others); None without any. Raises ConfigError."""
    mine = [each for each in overrides if each.partition("=")[0] in Assumptions.model_fields]
    if not mine:
        return None, list(overrides)
    given = {key: plain_yaml.parse(value) for key, _, value in (each.partition("=") for each in mine)}
    return validate(Assumptions, given, "--estimate"), [each for each in overrides if each not in mine]


# -- memory ------------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on each GPU at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    followers: float
    """Networks that are not trained, such as the teacher."""
    state: float
    """Objective state and other buffers."""
    batch: float
    activations: float
    """What the forward pass keeps and the backward pass works with, prototype logits included."""
    gathered: float
    """Blocks put together from their shards; 0 without sharding."""

    @property
    def total(self) -> float:
        return float(sum(self))


def memory(
    *,
    trained: float,
    moments: float,
    followers: float,
    state: float,
    batch: float,
    activations: float,
    largest_unit: float = 0.0,
    shards: int = 1,
    accumulate: int = 1,
) -> Memory:
    """Weights, gradients, moments and followers are divided by `shards` (FSDP2), and two units are whole at a time.

    Gradients of several micro-batches stay whole, in float32, until the last one has them summed over GPUs.
    """
    return Memory(
        weights=trained / shards,
        gradients=trained / (shards if accumulate == 1 else 1),
        optimizer=moments / shards,
        followers=followers / shards,
        state=state,
        batch=batch,
        activations=activations,
        gathered=0.0 if shards == 1 else 3 * largest_unit,  # one in use, the next under way, one gradient
    )


# -- traffic -----------------------------------------------------------------------------------------------------------


def all_reduce(size: float, gpus: int) -> float:
    """Bytes that each GPU sends when `size` bytes are summed over all, along a ring."""
    return 2 * (gpus - 1) / gpus * size


def all_gather(size: float, gpus: int) -> float:
    """Bytes that each GPU sends when `size` bytes are put together of equal parts; a reduce-scatter sends as much."""
    return (gpus - 1) / gpus * size


class Traffic(NamedTuple):
    """Bytes that each GPU sends in a step."""

    gradients: float
    """DDP: all-reduce; FSDP2: reduce-scatter."""
    weights: float
    """FSDP2: all-gathers for forward and backward pass, and of the teacher."""
    objectives: float
    """Sums for centers or Sinkhorn, gathers for KoLeo."""

    @property
    def total(self) -> float:
        return float(sum(self))


def ddp_traffic(*, trained: float, reduced: float, gathered: float, accumulate: int, gpus: int) -> Traffic:
    """Gradients once a step; the objectives' collectives once a micro-batch."""
    return Traffic(all_reduce(trained, gpus), 0.0, _objectives(reduced, gathered, accumulate, gpus))


def fsdp_traffic(
    *,
    trained: float,
    followers: float,
    reduced: float,
    gathered: float,
    accumulate: int,
    gpus: int,
    gather_share: float,
    regathered: float = 0.0,
    replicas: int = 1,
) -> Traffic:
    """Weights gathered twice and followers once a micro-batch, at `gather_share` of their bytes (.5 for bf16 of fp32).

    `regathered` is gathered besides, for heads that are called more than once.

    Gradients are scattered in float32, once a step; with `replicas` (HSDP) among gpus / replicas, then summed over those.
    """
    shards = gpus // replicas
    weights = accumulate * gather_share * all_gather(2 * trained + followers + regathered, shards)
    gradients = all_gather(trained, shards) + all_reduce(trained / shards, replicas)
    return Traffic(gradients, weights, _objectives(reduced, gathered, accumulate, gpus))


def _objectives(reduced: float, gathered: float, accumulate: int, gpus: int) -> float:
    # `gathered` is one GPU's part; its gradient comes back as a sum of the whole.
    return accumulate * (
        all_reduce(reduced, gpus) + all_gather(gathered * gpus, gpus) + all_reduce(gathered * gpus, gpus)
    )


# -- checkpoints, time -------------------------------------------------------------------------------------------------


def safetensors_bytes(tensors: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> int:
    """The size of a file of float32 tensors, its header included."""
    header, begin = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, begin + size]}
        begin += size
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + begin


class Time(NamedTuple):
    """Of one step."""

    computing: float
    sending: float
    """If nothing of it were hidden behind computing."""

    @property
    def share(self) -> float:
        """Of sending in a step in which nothing overlaps."""
        return self.sending / (self.computing + self.sending)


def step_time(*, flops: float, peak: float, mfu: float, sent: float, link: float) -> Time:
    """`flops` operations of one GPU at `mfu` of its peak, `sent` bytes over its link."""
    return Time(flops / (peak * mfu), sent / link)
