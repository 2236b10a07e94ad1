"""`python benchmarks/scaling.py --write`: docs/scaling.md, calculated for ViT-S/16 to ViT-g/14 on 1 to 1,024 GPUs.

`--memory` measures the calculation's error: the peak of real steps on this CPU, each in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ssl_platform import costs
from ssl_platform.config import validate
from ssl_platform.dry_run import StepFacts
from ssl_platform.estimate import calculate, memories, random_batch, readable, traffics
from ssl_platform.recipe import Recipe
from ssl_platform.step import build, train_step

PAGE = Path(__file__).parents[1] / "docs/scaling.md"
MODELS = {
    "ViT-S/16": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "ViT-B/16": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "ViT-L/16": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "ViT-g/14": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn": "swiglu"},
}
GPU_COUNTS = (1, 8, 64, 256, 1024)
BATCH = 32
SAMPLE_BYTES = 41_000
"""A 256-pixel JPEG tile (docs/benchmarks.md)."""
MEASURED = [("ViT-Ti/16", 4), ("ViT-Ti/16", 8), ("ViT-Ti/16", 16), ("ViT-S/16", 4), ("ViT-S/16", 8), ("ViT-S/16", 16)]


def recipe(name: str, batch_size: int, *, precision: str = "bf16", prototypes: int = 65536) -> Recipe:
    """DINO + iBOT (one head) + KoLeo, 2x224 + 8x96 crops (98 where a patch is 14); its data section is never read."""
    small = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    patch = int(name.partition("/")[2])
    data = {
        "run_dir": "unused",
        "steps": 125_000,
        "batch_size": batch_size,
        "precision": precision,
        "modality": {"name": "image", "patch_size": patch, "crops": {"local": {"size": 96 if patch == 16 else 98}}},
        "data": {"shards": "unused"},
        "networks": {
            "student": {"backbone": {"name": "vit", "drop_path": 0.3} | MODELS.get(name, small)},
            "teacher": {"update": "ema", "of": "student", "momentum": 0.992},
        },
        "heads": {"dino": {"name": "projection", "num_prototypes": prototypes}},
        "masks": {"block": {"name": "block"}},
        "objectives": {
            "dino": {"name": "dino", "masks": {"global": "block"}},
            "ibot": {"name": "ibot", "masks": "block"},
            "koleo": {"name": "koleo", "masks": "block"},
        },
    }
    return validate(Recipe, data)


def facts(name: str) -> StepFacts:
    """A step of one GPU."""
    made = recipe(name, BATCH)
    return calculate(made, made.modality.build(None), 1)


# -- the page ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def flops_row(name: str, step: StepFacts) -> list[str]:
    parts = [readable(value / BATCH, "FLOP") for value in step.flops_by_part.values()]
    return [name, f"{step.trained / 1e6:,.1f} M", readable(step.flops / BATCH, "FLOP"), *parts]


def memory_rows(name: str, step: StepFacts) -> list[list[str]]:
    alone = memories(step, 1)
    rows = [
        [
            name,
            "one copy a GPU",
            *[f"{alone[key].total / 1e9:.1f} GB" for key in alone],
            parts(next(iter(alone.values()))),
        ]
    ]
    for gpus in GPU_COUNTS[1:]:
        sharded = [value for key, value in memories(step, gpus).items() if key.startswith("FSDP2")]
        rows.append(
            [name, f"FSDP2, {gpus:,}", *[f"{value.total / 1e9:.1f} GB" for value in sharded], parts(sharded[0])]
        )
    return rows


def parts(memory: costs.Memory) -> str:
    named = memory._asdict() | {"weights": memory.weights + memory.gradients + memory.optimizer}
    return ", ".join(f"{named[key] / 1e9:.2f}" for key in ("weights", "followers", "activations", "gathered"))


def traffic_rows(name: str, step: StepFacts) -> list[list[str]]:
    made, rows = recipe(name, BATCH), []
    for gpus in GPU_COUNTS[1:]:
        row = [name, f"{gpus:,}"]
        for each in traffics(made, step, gpus).values():
            assumed = costs.Assumptions(gpus=gpus)
            time = costs.step_time(
                flops=step.flops, peak=costs.GPUS[assumed.gpu].bf16, mfu=assumed.mfu, sent=each.total, link=assumed.link
            )
            row += [readable(each.total, "B"), f"{time.share:.0%}"]
        rows.append([*row, readable(each.objectives, "B")])
    return rows


def run_rows(name: str, step: StepFacts) -> list[list[str]]:
    assumed, steps, rows = costs.Assumptions(gpus=1), 125_000, []
    seconds = step.flops / (costs.GPUS[assumed.gpu].bf16 * assumed.mfu)
    for gpus in GPU_COUNTS:
        rate = BATCH * gpus / seconds
        rows.append(
            [name, f"{gpus:,}", f"{BATCH * gpus:,}", f"{rate:,.0f}", readable(rate * SAMPLE_BYTES, "B") + "/s",
             f"{rate / gpus / assumed.loader:.1f}", f"{seconds * 1e3:.0f} ms", f"{steps * seconds / 3600:,.1f} h",
             f"{steps * seconds * gpus / 3600:,.0f}"]
        )  # fmt: skip
    return rows


def page(measured: str) -> str:
    """The whole document; `measured` is the table of `--memory`, kept from when it was measured."""
    steps = {name: facts(name) for name in MODELS}
    mfu = f"{costs.Assumptions(gpus=1).mfu:.0%} MFU (assumed)"
    flops = table(
        ["model", "trained", "a sample", *steps["ViT-S/16"].flops_by_part],
        [flops_row(name, step) for name, step in steps.items()],
    )
    memory = table(
        ["model", "GPUs", "total", "recomputed", "parts of the total"],
        [row for name, step in steps.items() for row in memory_rows(name, step)],
    )
    traffic = table(
        ["model", "GPUs", "DDP", "share", "FSDP2", "share", "objectives"],
        [row for name, step in steps.items() for row in traffic_rows(name, step)],
    )
    checkpoints = table(["model", "size", "time"], [checkpoint_row(name, step) for name, step in steps.items()])
    runs = table(
        ["model", "GPUs", "batch", "samples/s", "from shards", "workers a GPU", "step", "time", "GPU hours"],
        [row for name, step in steps.items() for row in run_rows(name, step)],
    )
    return f"""# Scaling

Written by `python benchmarks/scaling.py --write` (`tests/test_costs.py` tells when it is out of date). For your own run:
`ssl-train CONFIG --estimate gpus=64 gpu=h100_sxm mfu=.4`. Here: {BATCH} samples a GPU, 2x224 + 8x96 crops (98 for patch 14),
bf16, DINO + iBOT + KoLeo with one head of 65,536 prototypes, drop path .3, AdamW, H100 SXM. **Calculated with the run's
own code on tensors without memory. Nothing on this page was measured on a GPU**: no memory, time or share.

## FLOPs

Matrix products of a sample, forward and backward, equal to torch's own counter (`tests/test_costs.py`). Rows that drop
path leaves out do not count. Recomputing blocks would add up to a third of the student's. The rest is KoLeo.

{flops}
## Memory of a GPU

The parts, in GB: weights with gradients and AdamW's moments; teacher; activations; blocks gathered from shards.
"Recomputed": blocks keep their input only. Attention is torch's fused kernel, which keeps no N x N matrix.

{memory}
The calculation against the peak of real steps on the CPU (`python benchmarks/scaling.py --memory`; fp32, 8,192
prototypes; the process's peak over what it held before the model was built). The errors in bf16 and on CUDA are not known:
the allocator's fragmentation and the buffers of cuBLAS and NCCL come on top.

{measured}
## Traffic

Bytes that a GPU sends in a step, on a ring, and their share of a step in which nothing overlaps with computing: 450 GB/s
inside a machine of 8, 50 GB/s between machines (400 Gbit/s InfiniBand for each GPU), {mfu}. FSDP2 gathers in
bf16 and scatters gradients in float32 over all GPUs, and gathers the head for
each of its two calls. The last column is what the objectives' centers take of either. Peak rates,
memory and links of GPUs are those of NVIDIA's data sheets, cited in `ssl_platform/costs.py`.

{traffic}
## Checkpoints

`model.safetensors` and `optimizer.safetensors`, without the few kB beside them; the time is for 1 GB/s (assumed).

{checkpoints}
## Data and time

125,000 steps at {mfu} with all sending hidden. The shards must deliver {SAMPLE_BYTES // 1000} kB a sample; a worker makes
80 samples/s (measured, [benchmarks.md](benchmarks.md#loader), image). Blocks are not recomputed here; for a recipe with
`recompute: true` `--estimate gpus=N` counts what runs twice, and adds it to the time.

{runs}"""


def checkpoint_row(name: str, step: StepFacts) -> list[str]:
    return [name, readable(step.checkpoint_bytes, "B"), f"{step.checkpoint_bytes / 1e9:.1f} s"]


# -- the calculation's error -------------------------------------------------------------------------------------------


def calculated_bytes(name: str, batch_size: int) -> float:
    made = recipe(name, batch_size, precision="fp32", prototypes=8192)
    step = calculate(made, made.modality.build(None), 1)
    return memories(step, 1)["one copy a GPU"].total


def measured_bytes(name: str, batch_size: int) -> float:
    """The peak of this process over what it held before, in three steps; run it in a fresh process."""
    made = recipe(name, batch_size, precision="fp32", prototypes=8192)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    modality = made.modality.build(None)
    built = build(made, modality, 1, torch.device("cpu"))
    batch = random_batch(modality, {key: config.build() for key, config in made.masks.items()}, batch_size)
    for step in range(3):
        train_step(built, iter([batch]), step, list(made.objectives))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def memory_table(lines: Sequence[tuple[str, int]] = MEASURED) -> str:
    """Calculated, measured and error of each (model, samples)."""
    rows = []
    for name, size in lines:
        command = [sys.executable, __file__, "--one", name, str(size)]
        measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        expected = calculated_bytes(name, size)
        error = f"{expected / measured - 1:+.1%}"
        rows.append([name, str(size), f"{expected / 1e9:.2f} GB", f"{measured / 1e9:.2f} GB", error])
    return table(["model", "samples", "calculated", "measured", "error"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md instead of printing it")
    parser.add_argument("--memory", action="store_true", help="measure the error of the memory, print its table")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SAMPLES"), help="measure one line in this process")
    arguments = parser.parse_args()
    if arguments.one:
        sys.stdout.write(json.dumps(measured_bytes(arguments.one[0], int(arguments.one[1]))))
    elif arguments.memory:
        sys.stdout.write(memory_table())
    else:
        text = page(kept_memory_table())
        sys.stdout.write("" if arguments.write else text)
        if arguments.write:
            PAGE.write_text(text, encoding="utf-8")
    return 0


def kept_memory_table() -> str:
    """The table of `--memory` in the page as it is."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.startswith("| model | samples |"))
    return "".join(line for line in lines[first : first + 2 + len(MEASURED)])


if __name__ == "__main__":
    sys.exit(main())
