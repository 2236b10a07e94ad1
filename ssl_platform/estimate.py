"""`ssl-train CONFIG --estimate`: what a run will take, measured by its first steps on random views.

With `gpus=64` it is calculated for other hardware instead, without the memory that the run will need.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ssl_platform import costs, distributed
from ssl_platform.data.mixture import summary
from ssl_platform.dry_run import StepFacts, dry_step
from ssl_platform.masks import Masks
from ssl_platform.modalities import Modality
from ssl_platform.progress import duration, peak_memory
from ssl_platform.recipe import Recipe, build_modality, open_index, open_order
from ssl_platform.stages._plan import stage_plan
from ssl_platform.step import build, train_step
from ssl_platform.views import Batch, ViewGroup

MEASURED_STEPS = 3
MEMORY_ERROR = (
    "the calculation was 1 to 11 % below the measured peak in fp32 on a CPU; not measured on CUDA (docs/scaling.md)"
)
"""`python benchmarks/scaling.py --memory`, docs/scaling.md."""


def estimate(recipe: Recipe, device: torch.device) -> str:
    """A short report: memory, samples seen, time. Reads the shards' index, no sample; writes nothing."""
    index = open_index(recipe)
    order = open_order(recipe, index)
    modality = build_modality(recipe, index.statistics)
    masks = {name: config.build() for name, config in recipe.masks.items()}
    parts = build(recipe, modality, len(index), device)
    size = recipe.batch_size // (recipe.accumulate * distributed.world_size())
    batch = random_batch(modality, masks, size)
    active = stage_plan(recipe)[0].config.objectives or list(recipe.objectives)
    times = []
    for step in range(1 + MEASURED_STEPS):
        begun = time.perf_counter()
        train_step(parts, iter([batch] * recipe.accumulate), step, active)
        times.append(time.perf_counter() - begun)
    seconds = min(times[1:])
    trained = sum(p.numel() for ps in parts.trained.values() for p in ps)
    held = sum(tensor.numel() for tensor in parts.student_teacher.state_dict().values())
    samples = recipe.steps * recipe.batch_size
    lines = {
        "trained parameters": f"{trained / 1e6:.1f} M, {held / 1e6:.1f} M with averages and objective state",
        "peak memory": f"{peak_memory(device) / 1e9:.2f} GB {'on' if device.type == 'cuda' else 'of'} this process "
        f"(measured), without {recipe.data.workers} data workers",
        "checkpoint": f"{4 * (held + 2 * trained) / 1e9:.2f} GB each, {recipe.keep_last} kept",
        "samples seen": f"{samples:,} = {recipe.steps:,} steps x {recipe.batch_size}"
        + (f", {samples / len(index):.1f} epochs of {len(index):,}" if not recipe.data.sources else ""),
        "time": f"{duration(seconds * recipe.steps)} = {recipe.steps:,} steps x {seconds:.2f} s (measured on {device}, "
        f"{distributed.world_size()} ranks), if data keeps up",
    }
    width = max(map(len, lines))
    mixture = summary(recipe.data.sources, order, samples) if recipe.data.sources else []
    return "".join([f"{name:<{width}}  {text}\n" for name, text in lines.items()] + [f"{line}\n" for line in mixture])


# -- calculated --------------------------------------------------------------------------------------------------------


def calculated(recipe: Recipe, assumed: costs.Assumptions) -> str:
    """A report for hardware that need not be here. Reads the shards' index, no sample; writes and allocates nothing."""
    index = open_index(recipe)
    facts = calculate(recipe, build_modality(recipe, index.statistics), assumed.gpus)
    sample_bytes = float((index.stops - index.starts).mean())
    return costs_report(recipe, assumed, facts, sample_bytes)


def calculate(recipe: Recipe, modality: Modality, gpus: int) -> StepFacts:
    """One micro-batch of one of `gpus` processes."""
    masks = {name: config.build() for name, config in recipe.masks.items()}
    size = recipe.batch_size // (gpus * recipe.accumulate)
    batch = random_batch(modality, masks, size, partial(torch.empty, device="meta"))
    return dry_step(recipe, modality, batch)


def memories(facts: StepFacts, gpus: int) -> dict[str, costs.Memory]:
    """{way to distribute: bytes on each GPU}."""
    return {
        f"{way}{suffix}": costs.memory(
            trained=facts.trained_bytes,
            moments=facts.moments_bytes,
            followers=facts.followers_bytes,
            state=facts.state_bytes,
            batch=facts.batch_bytes,
            activations=activations,
            largest_unit=facts.largest_unit_bytes,
            shards=shards,
        )
        for way, shards in {"one copy a GPU": 1, **({"FSDP2": gpus} if gpus > 1 else {})}.items()
        for suffix, activations in (
            ("", facts.activations_bytes),
            (", blocks recomputed", facts.recomputed_activations_bytes),
        )
    }


def traffics(recipe: Recipe, facts: StepFacts, gpus: int) -> dict[str, costs.Traffic]:
    """{way to distribute: bytes that each GPU sends in a step}."""
    shared = {
        "trained": facts.trained_bytes,
        "reduced": facts.reduced_bytes,
        "gathered": facts.gathered_bytes,
        "accumulate": recipe.accumulate,
        "gpus": gpus,
    }
    share = 0.5 if recipe.precision == "bf16" else 1.0
    return {
        "DDP": costs.ddp_traffic(**shared),
        "FSDP2": costs.fsdp_traffic(**shared, followers=facts.followers_bytes, gather_share=share),
    }


def costs_report(recipe: Recipe, assumed: costs.Assumptions, facts: StepFacts, sample_bytes: float) -> str:
    """The report's text: what is exact, what is calculated, what is assumed."""
    gpu, size = costs.GPUS[assumed.gpu], recipe.batch_size // (assumed.gpus * recipe.accumulate)
    flops = facts.flops * recipe.accumulate
    peak = gpu.bf16 if recipe.precision == "bf16" else gpu.fp32
    sent = traffics(recipe, facts, assumed.gpus)
    times = {
        way: costs.step_time(flops=flops, peak=peak, mfu=assumed.mfu, sent=each.total, link=assumed.link)
        for way, each in sent.items()
    }
    seconds = times["DDP"].computing
    samples = recipe.batch_size / seconds
    run = seconds * recipe.steps
    lines = {
        "hardware": f"{assumed.gpus:,} x {assumed.gpu}, {size} samples each x accumulate {recipe.accumulate}, "
        f"{recipe.precision}",
        "parameters": f"{facts.trained:,} trained",
        "FLOPs": f"{readable(flops * assumed.gpus, 'FLOP')} a step, {readable(facts.flops / size, 'FLOP')} a sample "
        "(matrix products, forward and backward)",
    }
    lines |= {f"  {part}": f"{readable(value / size, 'FLOP')} a sample" for part, value in facts.flops_by_part.items()}
    for way, each in memories(facts, assumed.gpus).items():
        fits = "fits" if each.total < gpu.memory else "DOES NOT FIT"
        parts = ", ".join(f"{name} {readable(value, 'B')}" for name, value in each._asdict().items() if value)
        lines[f"memory, {way}"] = f"{readable(each.total, 'B')} of {readable(gpu.memory, 'B')}: {fits} ({parts})"
    lines["memory's error"] = MEMORY_ERROR
    for way, traffic in sent.items() if assumed.gpus > 1 else ():
        lines[f"sent, {way}"] = (
            f"{readable(traffic.total, 'B')} a step and GPU (gradients {readable(traffic.gradients, 'B')}, weights "
            f"{readable(traffic.weights, 'B')}, objectives {readable(traffic.objectives, 'B')}): "
            f"{times[way].share:.0%} of a step at {assumed.link / 1e9:.0f} GB/s if nothing overlaps"
        )
    lines |= {
        "checkpoint": f"{readable(facts.checkpoint_bytes, 'B')} each, {facts.checkpoint_bytes / assumed.disk / 1e9:.0f} s "
        f"at {assumed.disk:g} GB/s (assumed), {recipe.keep_last} kept",
        "data": f"{samples:,.0f} samples/s, {readable(samples * sample_bytes, 'B')}/s at {readable(sample_bytes, 'B')} a "
        f"sample; {samples / assumed.gpus / assumed.loader:.1f} workers a GPU at {assumed.loader:g} samples/s each",
        "time": f"{duration(run)} = {recipe.steps:,} steps x {seconds:.3g} s, {run * assumed.gpus / 3600:,.1f} GPU hours, "
        f"if {assumed.mfu:.0%} of the peak ({peak / 1e12:.0f} TFLOP/s) are reached (assumed) and sending is hidden",
    }
    width = max(map(len, lines))
    return "".join(f"{name:<{width}}  {text}\n" for name, text in lines.items())


def readable(number: float, unit: str) -> str:
    """With the prefix that leaves one to four digits: "3.05 GB", "12.4 TFLOP"."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor and not (prefix == "P" and unit == "B"):
            return f"{number / factor:,.4g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def random_batch(
    modality: Modality, masks: dict[str, Masks], size: int, make: Callable[..., Tensor] = torch.randn
) -> Batch:
    """Noise of the shapes that the modality promises, with masks drawn as in a run; `make` makes the views."""
    groups, first_source = {}, 0
    for name, spec in modality.groups.items():
        drawn = {
            key: rule.draw(spec.num_views, spec.grid, seed=0, step=0, batch_size=size, first=0, count=size)
            for key, rule in masks.items()
            if rule.group == name
        }
        source = torch.arange(first_source, first_source + spec.num_views)
        groups[name] = ViewGroup(make(spec.num_views, size, *spec.shape), source, drawn)
        first_source += spec.num_views
    ids = torch.arange(size)
    return Batch(groups, [str(i) for i in range(size)], ids, ids, 0)
