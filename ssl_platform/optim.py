"""Schedules as pure functions of the step, and the optimiser's parameter groups."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Discriminator, Field, Tag
from torch import Tensor, nn

from ssl_platform import sharding
from ssl_platform.config import Config

Schedule = Callable[[int], float]
"""The value at an optimiser step, counted from 0."""


class Cosine(Config):
    """Linear warm-up from `warmup_start` to `start`, then half a cosine to `end`."""

    schedule: Literal["cosine"]
    start: float
    end: float
    warmup_steps: int = Field(0, ge=0)
    warmup_start: float = 0.0
    period_steps: int | None = Field(None, ge=1)
    """Where the cosine ends; None = the run's last step. Longer than the run cuts it off before its end."""

    def values(self) -> dict[str, float]:
        """The values it runs between, by key."""
        return {"start": self.start, "end": self.end} | (
            {"warmup_start": self.warmup_start} if self.warmup_steps else {}
        )

    def build(self, steps: int) -> Schedule:
        period = self.period_steps or steps

        def value(step: int) -> float:
            if step < self.warmup_steps:
                # numpy.linspace(warmup_start, start, warmup_steps), which DINO's cosine_scheduler uses.
                return self.warmup_start + (self.start - self.warmup_start) * step / max(self.warmup_steps - 1, 1)
            progress = min((step - self.warmup_steps) / max(period - self.warmup_steps, 1), 1.0)
            return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * progress))

        return value


class Linear(Config):
    """A straight line from `start` to `end` over `over_steps` steps, constant afterwards."""

    schedule: Literal["linear"]
    start: float
    end: float
    over_steps: int = Field(ge=1)

    def values(self) -> dict[str, float]:
        """The values it runs between, by key."""
        return {"start": self.start, "end": self.end}

    def build(self, steps: int) -> Schedule:
        return lambda step: self.start + (self.end - self.start) * min(step / max(self.over_steps - 1, 1), 1.0)


class From(Config):
    """0 before step `begin`, then `value`: an objective that starts late."""

    schedule: Literal["from"]
    begin: int = Field(ge=0)
    value: float

    def values(self) -> dict[str, float]:
        """The values it takes, by key."""
        return {"value": self.value} | ({"0 before begin, and": 0.0} if self.begin else {})

    def build(self, steps: int) -> Schedule:
        return lambda step: self.value if step >= self.begin else 0.0


def _kind(value: Any) -> str:
    name = value.get("schedule", "?") if isinstance(value, dict) else getattr(value, "schedule", None)
    return f"<{name or 'number'}>"


ScheduleConfig = Annotated[
    Annotated[float, Tag("<number>")]
    | Annotated[Cosine, Tag("<cosine>")]
    | Annotated[Linear, Tag("<linear>")]
    | Annotated[From, Tag("<from>")],
    Discriminator(
        _kind,
        custom_error_type="not_a_schedule",
        custom_error_message="expected a number or a map with schedule: cosine, linear or from",
    ),
]
"""A value that may depend on the step."""


def within(low: float, high: float = math.inf, *, open_end: bool = False) -> AfterValidator:
    """Refuses schedules that leave [low, high], with `open_end` (low, high]."""

    def check(config: Any) -> Any:
        values = {"": float(config)} if isinstance(config, int | float) else config.values()
        for key, value in values.items():
            if not low <= value <= high or (open_end and value == low):
                end = f" and at most {high:g}" if high < math.inf else ""
                where = f"{key} " if key else ""
                raise ValueError(f"{where}{value:g}: must be {'above' if open_end else 'at least'} {low:g}{end}")
        return config

    return AfterValidator(check)


def build_schedule(config: float | Cosine | Linear | From, steps: int) -> Schedule:
    """A function of the step for a number or a schedule section; `steps` is the length of the run."""
    if isinstance(config, int | float):
        value = float(config)
        return lambda step: value
    return config.build(steps)


# -- the optimiser ---------------------------------------------------------------------------------------------------


class OptimConfig(Config):
    """How the trained parameters move."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[ScheduleConfig, within(0)] = 1e-3
    """The learning rate itself, unless `scale_lr` says otherwise."""
    scale_lr: Literal["none", "sqrt1024", "linear256"] = "none"
    """Multiplies lr by sqrt(batch_size / 1024) (DINOv2) or batch_size / 256 (DINO); the run logs what results."""
    weight_decay: Annotated[ScheduleConfig, within(0)] = 0.04
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW; SGD takes the first as its momentum."""
    eps: float = Field(1e-8, gt=0)
    clip_grad: float | None = Field(3.0, gt=0)
    """Largest gradient norm of each module (each network, head and objective by itself); None = no clipping."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """lr multiplier per layer below the last, in backbones."""
    patch_embed_lr: float = Field(1.0, ge=0)
    """A further lr multiplier of the patch embedding."""
    freeze_last_layer_steps: int = Field(0, ge=0)
    """lr of the heads' last layers is 0 for this many first steps; their Adam moments still build up, as in DINOv2."""

    def lr_factor(self, batch_size: int) -> float:
        """What `scale_lr` multiplies the learning rate by."""
        return {"none": 1.0, "sqrt1024": math.sqrt(batch_size / 1024), "linear256": batch_size / 256}[self.scale_lr]


class ParameterRule(NamedTuple):
    """How one parameter's learning rate and weight decay differ from the optimiser's."""

    lr_multiplier: float
    weight_decay_multiplier: float
    is_last_layer: bool
    freeze_steps: int = 0
    """First steps in which the learning rate is 0; the optimiser's moments build up."""


def parameter_rule(
    name: str, *, layer: int | None = None, num_layers: int = 0, layer_decay: float = 1.0, patch_embed_lr: float = 1.0
) -> ParameterRule:
    """DINOv2's rule for the parameter `name` of a module; `layer` is None outside of backbones.

    No weight decay for names that end in `bias` or hold `norm` or `gamma`; class, position, mask and register tokens
    and the last layer's `weight_g` decay like any weight (`dinov2/utils/param_groups.py`).
    """
    multiplier = 1.0 if layer is None else layer_decay ** (num_layers + 1 - layer)
    if layer is not None and "patch_embed" in name:
        multiplier *= patch_embed_lr
    decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
    return ParameterRule(multiplier, float(decays), "last_layer" in name)


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter, ParameterRule]],
    *,
    name: str,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """An optimiser with one group for each distinct rule; a group's "names" lists its parameters in order."""
    groups: dict[ParameterRule, dict[str, Any]] = {}
    for parameter_name, parameter, rule in parameters:
        group = groups.setdefault(rule, {"params": [], "names": [], "rule": rule})
        group["params"].append(parameter)
        group["names"].append(parameter_name)
    if name == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=0.0, momentum=betas[0])
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=betas, eps=eps, fused=True)


def set_step(
    optimizer: torch.optim.Optimizer, *, step: int, lr: float, weight_decay: float, freeze_last_layer: bool
) -> None:
    """Sets every group's learning rate and weight decay for the coming step `step`."""
    for group in optimizer.param_groups:
        rule: ParameterRule = group["rule"]
        frozen = step < rule.freeze_steps or (rule.is_last_layer and freeze_last_layer)
        group["lr"] = 0.0 if frozen else lr * rule.lr_multiplier
        group["weight_decay"] = weight_decay * rule.weight_decay_multiplier


def peak(schedule: Schedule, steps: int, first: int = 0) -> float:
    """The largest value from step `first` to the last, of a thousand steps among them; 0 if there are none."""
    return max(map(schedule, range(first, steps, max((steps - first) // 1000, 1))), default=0.0)


def peak_rates(optimizer: torch.optim.Optimizer, lr: Schedule, steps: int, freeze_last_layer_steps: int) -> list[str]:
    """The largest learning rates that are applied, one line for each network, head and objective, by parts of it.

    `lr` is the optimiser's with its scaling by batch size; multipliers of layers and first steps at 0 are counted in.
    """
    parts: dict[str, dict[str, list[float]]] = {}
    notes: dict[str, dict[str, None]] = {}
    peaks: dict[int, float] = {}
    for group in optimizer.param_groups:
        rule: ParameterRule = group["rule"]
        frozen = max(rule.freeze_steps, freeze_last_layer_steps if rule.is_last_layer else 0)
        if frozen not in peaks:
            peaks[frozen] = peak(lr, steps, frozen)
        for name in group["names"]:
            section, owner, *rest = name.split(".")
            family = rest[0] if section == "networks" and rest[0] != "model" else ".".join(rest[1:2]) or rest[0]
            title = f"{section.removesuffix('s')} {owner}"
            rates = parts.setdefault(title, {}).setdefault(family, [])
            rates.append(peaks[frozen] * rule.lr_multiplier)
            if frozen:
                note = f"{family} 0" if rule.is_last_layer else "0"
                notes.setdefault(title, {})[f"{note} in the first {frozen} steps"] = None
    lines = []
    for title, families in parts.items():
        shared: dict[tuple[float, float], list[str]] = {}
        for family, rates in families.items():
            shared.setdefault((min(rates), max(rates)), []).append(family)
        texts = [
            (f"{', '.join(names)} " if len(shared) > 1 else "")
            + (f"{low:.2e}" if low == high else f"{low:.2e} (lowest layer) to {high:.2e} (highest)")
            for (low, high), names in shared.items()
        ]
        lines.append(f"peak learning rate of {title}: {'; '.join([*texts, *notes.get(title, ())])}")
    return lines


def clip_gradients(modules: dict[str, list[nn.Parameter]], max_norm: float | None) -> dict[str, Tensor]:
    """Clips each module's gradients to `max_norm` by itself and returns the norms from before.

    Gradients in shards are measured with one collective for all modules; every rank must ask.
    """
    gradients = {name: [p.grad for p in parameters if p.grad is not None] for name, parameters in modules.items()}
    mine = {name: [sharding.local(gradient) for gradient in found] for name, found in gradients.items()}
    norms = {name: torch.nn.utils.get_total_norm(found, foreach=True) for name, found in mine.items()}
    first = next((gradient for found in gradients.values() for gradient in found), None)
    norms = dict(zip(norms, sharding.whole_norms(list(norms.values()), first), strict=True))
    for name, found in mine.items():
        if max_norm is not None and found:
            torch._foreach_mul_(found, (max_norm / (norms[name] + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_
    return norms
