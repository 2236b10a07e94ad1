"""`ssl-train CONFIG --estimate`: what a run will take, measured by its first steps on random views."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssl_platform import distributed
from ssl_platform.data.mixture import summary
from ssl_platform.masks import Masks
from ssl_platform.modalities import Modality
from ssl_platform.progress import duration, peak_memory
from ssl_platform.recipe import Recipe, build_modality, open_index, open_order
from ssl_platform.stages._plan import stage_plan
from ssl_platform.step import build, train_step
from ssl_platform.views import Batch, ViewGroup

MEASURED_STEPS = 3


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
