"""`python benchmarks/profile_step.py`: where the time of a training step goes, and what mfu could be reached at most.

The step is that of `benchmarks/step.py`. Shares are of torch's profiler (self time of operators, by name and shapes); the
floor supposes that matrix products (and those inside attention) run at the machine's peak, and that every other operator
takes the time in which a copy moves as many bytes as it reads and writes.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from step import BATCH, prepare, synchronise
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_platform.flops import Counted, matmul_rate
from ssl_platform.step import train_step

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mv", "aten::linear", "aten::matmul")
KINDS = {
    "attention": ("scaled_dot_product",),
    "layer norms": ("layer_norm",),
    "GELU": ("gelu",),
    "drop path: gather and scatter": ("index_select", "index_add"),
    "patch embedding": ("conv",),
    "optimiser": ("_fused_adamw_",),
    "EMA": ("_foreach_lerp_",),
    "clipping": ("_foreach_norm", "linalg_vector_norm", "_foreach_mul_"),
}


def kind_of(name: str, shapes: Sequence[Any], prototypes: int) -> str:
    """What an operator's time counts for."""
    dims = [dim for shape in shapes if isinstance(shape, list) for dim in shape if isinstance(dim, int)]
    if name.startswith(PRODUCTS):
        return "matrix products"
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    if prototypes in dims:
        return "prototypes' rows: targets, cross-entropy, entropy, centre"
    if not name.startswith("aten::"):
        return "Python and autograd"
    return "other: sums, copies, fills, slices"


class Moved(TorchDispatchMode):
    """Adds up the bytes that operators other than matrix products read and write, each tensor once an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in PRODUCTS:
            return result
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        written = {id(t): t for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        places = {t.untyped_storage().data_ptr() for t in read.values()}
        is_view = not func._schema.is_mutable and all(
            t.untyped_storage().data_ptr() in places for t in written.values()
        )
        if not is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in (*read.values(), *written.values()))
        return result


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MB, the best of ten."""
    source = torch.ones(1 << 26, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        synchronise(device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * source.nbytes / min(seconds)


def table(prototypes: int, batch_size: int, steps: int, overrides: Sequence[str], details: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts, batch, active = prepare("fp32", prototypes, batch_size, device, overrides=overrides)
    train_step(parts, iter([batch]), 0, active)  # makes the optimiser's state
    with Counted(parts.student_teacher) as counted, Moved() as moved:
        train_step(parts, iter([batch]), 0, active)
    times: dict[str, float] = {}
    rows = []
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    peak = matmul_rate(torch.float32, device, 2048)
    with profile(activities=activities, record_shapes=True) as recorded:
        begun = time.perf_counter()
        for step in range(1, steps + 1):
            train_step(parts, iter([batch]), step, active)
        wall = time.perf_counter() - begun
    peak = (peak + matmul_rate(torch.float32, device, 2048)) / 2
    for event in recorded.key_averages(group_by_input_shape=True):
        spent = (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e6
        kind = kind_of(event.key, event.input_shapes, prototypes)
        times[kind] = times.get(kind, 0.0) + spent
        rows.append((spent / steps * 1e3, kind, event.key, event.count // steps, event.input_shapes))
    total = sum(times.values())
    ideal = counted.total / peak * steps
    sys.stdout.write(
        f"\n{prototypes:,} prototypes: {wall / steps:.3f} s a step ({total / steps:.3f} s in operators), "
        f"{counted.total / 1e12:.3f} model TFLOP = {ideal / steps:.3f} s at {peak / 1e9:.0f} GFLOP/s\n\n"
        "| part | share |\n|---|---|\n"
    )
    least = counted.total / peak + moved.bytes / (rate := copy_rate(device))
    for kind, spent in sorted(times.items(), key=lambda item: -item[1]):
        sys.stdout.write(f"| {kind} | {spent / total:.1%} |\n")
    sys.stdout.write(
        f"\nfloor: {counted.total / peak:.3f} s of products and {moved.bytes / 1e9:.1f} GB at {rate / 1e9:.1f} GB/s: "
        f"mfu {counted.total / peak / least:.3f}\n"
    )
    for row in sorted((row for row in rows if row[1] != "matrix products"), key=lambda row: -row[0])[:details]:
        sys.stdout.write(f"{row[0]:9.2f} ms {row[1]:.20} {row[2]} x{row[3]} {str(row[4])[:150]}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototypes", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--details", type=int, default=0, help="so many of the costliest operators, each with its shapes"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    for prototypes in arguments.prototypes:
        table(prototypes, arguments.batch_size, arguments.steps, arguments.overrides, arguments.details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
