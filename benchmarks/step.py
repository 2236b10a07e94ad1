"""`python benchmarks/step.py`: how much of the machine's matrix-product peak a whole training step reaches.

A step is ViT-S/16, 2x224 + 8x96 crops, 8 samples, drop path .3, DINO + iBOT (one shared head) + KoLeo, AdamW, EMA: the
`train_step` that `ssl-train` runs, on random views. One line per precision and prototype count; `mfu` is model FLOPs by
formula (ssl_platform/flops.py) / time / peak. The peak (a large matrix product in the same precision) is measured
before and after every step, and the figure is the median of ten ratios, so a machine that slows down changes it little.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from ssl_platform.estimate import random_batch
from ssl_platform.flops import Counted, matmul_rate
from ssl_platform.progress import peak_memory
from ssl_platform.recipe import Recipe, load_recipe
from ssl_platform.step import Parts, build, train_step
from ssl_platform.views import Batch

BATCH = 8
MODELS = {
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def recipe(precision: str, prototypes: int, batch_size: int, model: str, overrides: Sequence[str]) -> Recipe:
    """The benchmark's run, with `key=value` overrides; its data section is never read."""
    data = {
        "run_dir": "unused",
        "steps": 1000,
        "batch_size": batch_size,
        "precision": precision,
        "modality": {"name": "image"},
        "data": {"shards": "unused"},
        "networks": {
            "student": {"backbone": {"name": "vit", "drop_path": 0.3, **MODELS[model]}},
            "teacher": {"update": "ema", "of": "student", "momentum": 0.992},
        },
        "heads": {"dino": {"name": "projection", "num_prototypes": prototypes}},
        "masks": {"block": {"name": "block"}},
        "objectives": {
            "dino": {"name": "dino", "masks": {"global": "block"}},
            "ibot": {"name": "ibot", "masks": "block"},
            "koleo": {"name": "koleo", "masks": "block"},
        },
        "optim": {"lr": 1e-4, "layer_decay": 0.9, "patch_embed_lr": 0.2},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.yaml"
        path.write_text(json.dumps(data))  # which is YAML, too
        return load_recipe(path, overrides)


def prepare(
    precision: str,
    prototypes: int,
    batch_size: int,
    device: torch.device,
    model: str = "small",
    overrides: Sequence[str] = (),
) -> tuple[Parts, Batch, list[str]]:
    """What `train_step` is called with."""
    settings = recipe(precision, prototypes, batch_size, model, overrides)
    torch.manual_seed(0)
    parts = build(settings, settings.modality.build(None), 1, device)
    masks = {name: config.build() for name, config in settings.masks.items()}
    batch = random_batch(settings.modality.build(None), masks, settings.batch_size // settings.accumulate).to(device)
    return parts, batch, list(settings.objectives)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(precision: str, prototypes: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """One line: samples/s, mfu and peak memory."""
    batch_size, repeats = arguments.batch_size, arguments.repeats
    parts, batch, active = prepare(precision, prototypes, batch_size, device, arguments.model, arguments.overrides)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 4096 if device.type == "cuda" else 2048
    with Counted(parts.student_teacher) as counted:
        train_step(parts, iter([batch]), 0, active)
    flops = counted.total
    ratios, times, peaks = [], [], [matmul_rate(dtype, device, size)]
    for step in range(1, repeats + 1):
        synchronise(device)
        begun = time.perf_counter()
        train_step(parts, iter([batch]), step, active)
        synchronise(device)
        times.append(time.perf_counter() - begun)
        peaks.append(matmul_rate(dtype, device, size))
        ratios.append(flops / times[-1] / (sum(peaks[-2:]) / 2))
    return {
        "precision": precision,
        "prototypes": prototypes,
        "samples_per_second": round(batch_size / median(times), 3),
        "mfu": round(median(ratios), 3),
        "mfu_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "model_tflop": round(flops / 1e12, 3),
        "matmul_gflops": round(median(peaks) / 1e9, 1),
        "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--prototypes", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--model", default="small", choices=MODELS, help="width and depth of the vision transformer")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides", help="of the run's keys")
    parser.add_argument("--one", action="store_true", help="measure the first combination only, in this process")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.one:
        line = measure(arguments.precision[0], arguments.prototypes[0], arguments, device)
        sys.stdout.write(json.dumps(line) + "\n")
        return 0
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    sys.stdout.write(json.dumps({"device": name, "torch": torch.__version__}) + "\n")
    for precision in arguments.precision:
        if precision == "bf16" and (slow := bf16_is_emulated(device)):
            sys.stdout.write(json.dumps({"precision": "bf16", "skipped": slow}) + "\n")
            continue
        for prototypes in arguments.prototypes:  # a process each, so that peak memory is its own
            command = [sys.executable, __file__, "--one", "--precision", precision, "--prototypes", str(prototypes)]
            command += ["--batch-size", str(arguments.batch_size), "--repeats", str(arguments.repeats)]
            command += ["--model", arguments.model, "--device", arguments.device, "--set", *arguments.overrides]
            subprocess.run(command, check=True)
    return 0


def bf16_is_emulated(device: torch.device) -> str:
    """Why bf16 cannot be measured here: without the processor's instructions a product is 100 times slower than fp32."""
    if device.type == "cuda":
        return ""
    fp32, bf16 = (matmul_rate(dtype, device, 256) for dtype in (torch.float32, torch.bfloat16))
    if bf16 > fp32 / 4:
        return ""
    return f"no bf16 matrix instructions on this processor: {bf16 / 1e9:.1f} GFLOP/s against {fp32 / 1e9:.1f} in fp32"


if __name__ == "__main__":
    sys.exit(main())
