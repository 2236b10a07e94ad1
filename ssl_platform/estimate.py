"""`ssl-train CONFIG --estimate`: what a run will take, measured by its first steps on random views.

With `gpus=64` it is calculated for other hardware instead, without the memory that the run will need.
"""

import math
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ssl_platform import costs, distributed, optim
from ssl_platform.data.mixture import summary
from ssl_platform.dry_run import StepFacts, dry_step, shapes
from ssl_platform.initialise import Initialiser
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
    """A short report: memory, samples seen, time. Reads the shards' index and `init`, no sample; writes nothing."""
    index = open_index(recipe)
    order = open_order(recipe, index)
    modality = build_modality(recipe, index.statistics)
    masks = {name: config.build() for name, config in recipe.masks.items()}
    parts = build(
        recipe, modality, len(index), device, fill=Initialiser(recipe.networks, recipe.heads, modality.description())
    )
    size = recipe.batch_size // (recipe.accumulate * distributed.world_size())
    batch = random_batch(modality, masks, size)
    first = stage_plan(recipe)[0]
    active = first.config.objectives or list(recipe.objectives)
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
    if resolutions := getattr(modality, "variants", ()):
        lines["resolutions"] = f"memory and time are of the largest of {len(resolutions)}: the mean is less"
    if {*active} < {*recipe.objectives}:
        lines["stages"] = f"memory and time are of stage {first.name} ({', '.join(active)}): later ones may need more"
    width = max(map(len, lines))
    notes = optim.peak_rates(parts.optimizer, parts.lr, recipe.steps, parts.freeze_last_layer_steps)
    notes += summary(recipe.data.sources, order, samples) if recipe.data.sources else []
    return "".join([f"{name:<{width}}  {text}\n" for name, text in lines.items()] + [f"{line}\n" for line in notes])


# -- calculated --------------------------------------------------------------------------------------------------------


def calculated(recipe: Recipe, assumed: costs.Assumptions) -> str:
    """A report for hardware that need not be here. Reads the shards' index and `init`, no sample; writes nothing."""
    index = open_index(recipe)
    modality = build_modality(recipe, index.statistics)
    rates = check_start(recipe, modality)
    facts = calculate(recipe, modality, assumed.gpus)
    sample_bytes = float((index.stops - index.starts).mean())
    if resolutions := getattr(modality, "variants", ()):
        rates = [
            f"FLOPs, memory and time are of the largest of {len(resolutions)} resolutions: the mean is less",
            *rates,
        ]
    if any({*(stage.objectives or recipe.objectives)} < {*recipe.objectives} for stage in recipe.stages.values()):
        rates = ["FLOPs, memory and time are of all objectives together: stages with some of them need less", *rates]
    return costs_report(recipe, assumed, facts, sample_bytes) + "".join(f"{line}\n" for line in rates)


def check_start(recipe: Recipe, modality: Modality) -> list[str]:
    """The peak learning rates in words; ConfigError where an `init` does not fit, whose report is logged, as in a run."""
    model, settings, fill = (
        shapes(recipe, modality),
        recipe.optim,
        Initialiser(recipe.networks, recipe.heads, modality.description()),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no-op")  # there is no memory to copy into
        fill.networks(dict(model.networks.items()))
        fill.heads({name: model.heads[name][head.network] for name, head in recipe.heads.items()})  # type: ignore[index]
    # Of any kind, for its groups: SGD takes parameters without memory.
    optimizer = optim.build_optimizer(
        model.trained_parameters(settings.layer_decay, settings.patch_embed_lr),
        name="sgd", betas=settings.betas, eps=settings.eps,
    )  # fmt: skip
    factor, lr = settings.lr_factor(recipe.batch_size), optim.build_schedule(settings.lr, recipe.steps)
    return optim.peak_rates(optimizer, lambda step: factor * lr(step), recipe.steps, settings.freeze_last_layer_steps)


def calculate(recipe: Recipe, modality: Modality, gpus: int) -> StepFacts:
    """One micro-batch of one of `gpus` processes."""
    masks = {name: config.build() for name, config in recipe.masks.items()}
    size = recipe.batch_size // (gpus * recipe.accumulate)
    batch = random_batch(modality, masks, size, partial(torch.empty, device="meta"))
    return dry_step(recipe, modality, batch)


COPIES, SHARDS, RECOMPUTED = "one copy a GPU", "FSDP2", ", blocks recomputed"


def way_of(recipe: Recipe, gpus: int) -> str:
    """The row of `memories` that is this recipe's own."""
    sharded = recipe.parallel.method == "fsdp" and gpus > 1
    return (SHARDS if sharded else COPIES) + RECOMPUTED * recipe.recompute


def memories(facts: StepFacts, gpus: int, replicas: int = 1, accumulate: int = 1) -> dict[str, costs.Memory]:
    """{way to distribute: bytes on each GPU}; `replicas` is how many whole copies FSDP2 keeps (HSDP)."""
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
            accumulate=accumulate,
        )
        for way, shards in {COPIES: 1, **({SHARDS: gpus // replicas} if gpus > 1 else {})}.items()
        for suffix, activations in (("", facts.activations_bytes), (RECOMPUTED, facts.recomputed_activations_bytes))
    }


def traffics(recipe: Recipe, facts: StepFacts, gpus: int, replicas: int = 1) -> dict[str, costs.Traffic]:
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
        SHARDS: costs.fsdp_traffic(
            **shared,
            followers=facts.followers_bytes,
            regathered=facts.regathered_bytes,
            gather_share=share,
            replicas=replicas,
        ),
    }


def costs_report(recipe: Recipe, assumed: costs.Assumptions, facts: StepFacts, sample_bytes: float) -> str:
    """The report's text: what is exact, what is calculated, what is assumed."""
    gpu, size = costs.GPUS[assumed.gpu], recipe.batch_size // (assumed.gpus * recipe.accumulate)
    flops, again = facts.flops * recipe.accumulate, facts.recomputed_flops * recipe.accumulate
    peak = gpu.bf16 if recipe.precision == "bf16" else gpu.fp32
    sent = traffics(recipe, facts, assumed.gpus, recipe.parallel.replicas)
    times = {
        way: costs.step_time(flops=flops + again, peak=peak, mfu=assumed.mfu, sent=each.total, link=assumed.link)
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
    if again:
        lines["  recomputed"] = (
            f"{again / flops:.0%} more, for blocks that run twice: in the time below, not in these FLOPs"
        )
    lines |= {f"  {part}": f"{readable(value / size, 'FLOP')} a sample" for part, value in facts.flops_by_part.items()}
    own = way_of(recipe, assumed.gpus)
    for way, each in memories(facts, assumed.gpus, recipe.parallel.replicas, recipe.accumulate).items():
        fits = "fits" if each.total < gpu.memory else "DOES NOT FIT"
        parts = ", ".join(f"{name} {readable(value, 'B')}" for name, value in each._asdict().items() if value)
        lines[f"memory, {way}{' (this recipe)' * (way == own)}"] = (
            f"{readable(each.total, 'B')} of {readable(gpu.memory, 'B')}: {fits} ({parts})"
        )
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
    """Noise of the shapes that the modality promises, with masks drawn as in a run; `make` makes the views.

    Where views change their size from step to step they are of the largest sizes.
    """
    modality = max(
        (variant.modality for variant in getattr(modality, "variants", ())),
        key=lambda one: sum(spec.num_views * math.prod(spec.shape) for spec in one.groups.values()),
        default=modality,
    )
    groups: dict[str, ViewGroup] = {}
    first_source = 0
    for name, spec in modality.groups.items():
        drawn = {
            key: rule.draw(spec.num_views, spec.grid, seed=0, step=0, batch_size=size, first=0, count=size)
            for key, rule in masks.items()
            if rule.group == name
        }
        source = torch.arange(first_source, first_source + spec.num_views)
        source = groups[spec.shows].source if spec.shows is not None else source
        groups[name] = ViewGroup(make(spec.num_views, size, *spec.shape), source, drawn)
        first_source += spec.num_views
    ids = torch.arange(size)
    return Batch(groups, [str(i) for i in range(size)], ids, ids, 0)
