"""What must hold across the sections of a recipe, one readable line for each problem."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ssl_platform.batch_norm import has_batch_norm
from ssl_platform.config import Config, ConfigError
from ssl_platform.modalities import GroupSpec
from ssl_platform.objectives import Objective
from ssl_platform.optim import Cosine

if TYPE_CHECKING:
    from ssl_platform.recipe import NetworkConfig, Recipe


def check_sizes(recipe: "Recipe", world_size: int) -> list[str]:
    """Numbers that cannot work together, one line each."""
    lines = []
    if recipe.batch_size < world_size:
        lines.append(f"batch_size: {recipe.batch_size} is smaller than the number of ranks, {world_size}")
    elif recipe.batch_size % (world_size * recipe.accumulate):
        lines.append(
            f"batch_size: {recipe.batch_size} cannot be split over {world_size} ranks x accumulate {recipe.accumulate}; "
            f"use a multiple of {world_size * recipe.accumulate}"
        )
    lines += recipe.parallel.problems(world_size)
    total = sum(stage.steps * stage.repeat for stage in recipe.stages.values())
    if recipe.stages and total != recipe.steps:
        lines.append(f"steps: {recipe.steps}, but the stages add up to {total} (steps x repeat)")
    if (interval := recipe.signal_interval) % recipe.log_every:
        below = interval // recipe.log_every * recipe.log_every
        near = " or ".join(str(number) for number in (below, below + recipe.log_every) if number)
        lines.append(f"monitor_every: {interval} is not a multiple of log_every {recipe.log_every}; use {near}")
    modality = recipe.modality.build(None)
    groups, variants = modality.groups, [variant.modality for variant in getattr(modality, "variants", ())]
    for name, masks in recipe.masks.items():
        if masks.group not in groups:
            lines.append(f"masks.{name}.group: '{masks.group}' is no group of views; there are {', '.join(groups)}")
        else:
            grids = dict.fromkeys(one.groups[masks.group].grid for one in variants or [modality])
            lines += [f"masks.{name}.{problem}" for grid in grids for problem in masks.problems(grid)]
    return lines


def doubtful(recipe: "Recipe") -> list[str]:
    """Settings that work but hardly do what was meant, one line each."""
    sections: dict[str, Config] = {"optim": recipe.optim}
    sections |= {f"networks.{name}": network for name, network in recipe.networks.items()}
    sections |= {f"objectives.{name}": objective for name, objective in recipe.objectives.items()}
    lines = [
        f"networks.{name}.init.freeze_steps: {network.init.freeze_steps}, the whole run of {recipe.steps} steps"
        for name, network in recipe.networks.items()
        if network.init is not None and network.init.freeze_steps >= recipe.steps
    ]
    started = [  # our folders and timm's names say it themselves
        name
        for name, one in recipe.networks.items()
        if one.init is not None and one.init.mean is None and one.init.path is not None and not one.init.path.is_dir()
    ]
    by_statistics = not getattr(recipe.modality, "normalize_per_sample", False)
    if started and by_statistics and getattr(recipe.modality, "mean", ()) is None:
        lines.append(
            f"networks.{started[0]}.init: views are normalised by the shards' own mean and std; if those weights learned "
            "with others (public ones: mostly ImageNet's), set modality.mean and modality.std, or init.mean and init.std"
        )
    released = [name for name, one in recipe.networks.items() if getattr(one.backbone, "pretrained", False)]
    if released and getattr(recipe.modality, "mean", ()) is None:
        lines.append(
            f"networks.{released[0]}.backbone.pretrained: its weights see views normalised otherwise than theirs; "
            f"set networks.{released[0]}.init.timm instead, which fits the first layer to them, or modality.mean and std"
        )
    return lines + [
        f"{key}.{name}.warmup_steps: {value.warmup_steps}, so the run of {recipe.steps} steps ends inside its warm-up"
        for key, section in sections.items()
        for name, value in section
        if isinstance(value, Cosine) and value.warmup_steps >= recipe.steps
    ]


SAMPLED_STEPS = 1024
"""Of each stage, at which objectives are asked what they need: one that begins late, or in turns, must be seen."""


def unseen(recipe: "Recipe", groups: Mapping[str, GroupSpec], objectives: Mapping[str, Objective]) -> list[str]:
    """Groups of views that are made in every step and that no objective ever asks for, one line each."""
    seen, begin = {"global"}, 0  # which every modality makes
    for stage in recipe.stages.values() or [None]:
        active = list(objectives) if stage is None or stage.objectives is None else stage.objectives
        end = begin + (recipe.steps if stage is None else stage.steps * stage.repeat)
        steps = {*range(begin, end, max((end - begin) // SAMPLED_STEPS, 1)), end - 1}
        seen |= {request.group for name in active for step in steps for request in objectives[name].requests(step)}
        for section in (recipe.objectives[name] for name in active):  # one may look at a group without a forward pass
            seen |= {value for _, value in section if isinstance(value, str)}
        begin = end
    seen |= {shown for name in seen & groups.keys() if (shown := groups[name].shows) is not None}
    return [_wasted(recipe.modality, name, groups[name]) for name in groups if name not in seen]


def _wasted(modality: Any, name: str, group: GroupSpec) -> str:
    """Names the key that describes the group where the modality has one section for each, such as `crops` of images."""
    key = next((key for key, value in modality if isinstance(value, dict) and isinstance(value.get(name), Config)), "")
    where = f"modality.{key}.{name}" if key else "modality"
    remedy = f"set {where}.num: 0" if key and hasattr(getattr(modality, key)[name], "num") else "leave it out"
    return (
        f"{where}: no objective sees the group '{name}', {group.num_views} views of every sample that are made in vain; "
        f"{remedy}, or name the group in an objective"
    )


def check_names(recipe: "Recipe") -> list[str]:
    """References to networks, heads, groups, masks and objectives that do not exist, one line each."""
    lines = []
    for name, network in recipe.networks.items():
        where = f"networks.{name}"
        if network.update in ("ema", "snapshot") and network.of is None:
            lines.append(f"{where}.of: missing; update: {network.update} needs the network it follows")
        if network.of is not None and network.of not in recipe.networks:
            lines.append(f"{where}.of: '{network.of}' is no network; there are {', '.join(recipe.networks)}")
        if network.inputs not in (groups := recipe.modality.build(None).groups):
            lines.append(f"{where}.inputs: '{network.inputs}' is no group of views; there are {', '.join(groups)}")
        if network.of is None and network.backbone is None and network.update in ("grad", "frozen"):
            lines.append(f"{where}.backbone: missing")
        if network.init is not None and (network.update in ("ema", "snapshot") or network.backbone is None):
            lines.append(
                f"{where}.init: '{name}' starts as a copy of '{network.of}'; give the init to that network"
                if network.of is not None
                else f"{where}.init: needs a backbone"
            )
        if network.init is not None and network.init.freeze_steps and network.update == "frozen":
            lines.append(f"{where}.init.freeze_steps: update: frozen is never trained; leave it out")
    needed = getattr(recipe.modality, "needs_companions", "")
    if needed and recipe.data.companions is None:
        lines.append(
            f"data.companions: missing; modality.{needed} needs other samples, such as data.companions: {{name: random}}"
        )
    if not any(network.update == "grad" for network in recipe.networks.values()):
        lines.append("networks: none has update: grad, so nothing would be trained")
    for name, head in recipe.heads.items():
        if head.network not in recipe.networks:
            lines.append(f"heads.{name}.network: '{head.network}' is no network")
    for name, stage in recipe.stages.items():
        if stage.objectives == []:
            lines.append(f"stages.{name}.objectives: empty, so nothing would be trained; leave the key out for all")
        for objective in stage.objectives or ():
            if objective not in recipe.objectives:
                lines.append(f"stages.{name}.objectives: '{objective}' is no objective")
        for used in [*stage.init, *stage.init.values()]:
            if used not in recipe.networks:
                lines.append(f"stages.{name}.init: '{used}' is no network")
    return lines + _check_requests(recipe)


def _check_requests(recipe: "Recipe") -> list[str]:
    """Every name in an objective's section that refers to another section."""
    groups = recipe.modality.build(None).groups
    kinds: dict[str, Any] = {
        "head": recipe.heads,
        "teacher": recipe.networks,
        "teachers": recipe.networks,
        "student": recipe.networks,
        "group": groups,
        "teacher_group": groups,
        "student_groups": groups,
        "masks": recipe.masks,
    }
    lines = []
    for name, objective in recipe.objectives.items():
        for key, known in kinds.items():
            value = getattr(objective, key, None)
            if isinstance(value, dict):
                used = list(value if key == "teachers" else value.values())
            else:
                used = [value] if isinstance(value, str) else list(value or ())
            lines += [
                f"objectives.{name}.{key}: '{item}' does not exist; there are: {', '.join(known) or 'none'}"
                for item in used
                if item not in known
            ]
        if not lines:
            lines += _check_uses(recipe, name, objective)
            lines += [f"objectives.{name}.{problem}" for problem in objective.problems(recipe.networks, groups)]
            lines += _check_teachers(recipe, name, objective)
    return lines


def _check_teachers(recipe: "Recipe", name: str, objective: Any) -> list[str]:
    """Frozen teachers that are still random when the objective first needs them."""
    random = {
        network
        for network, section in recipe.networks.items()
        if section.update == "frozen" and not _has_weights(network, recipe.networks)
    }
    for stage in recipe.stages.values():
        random -= stage.init.keys()
        if stage.objectives is None or name in stage.objectives:
            break
    return [
        f"objectives.{name}.{key}: is frozen and random, and teaches nothing; say where its weights are: "
        f"networks.{teacher}.init, or the init of a stage that begins no later"
        for key, teacher in objective.taught_by().items()
        if teacher in random
    ]


def _has_weights(name: str, networks: Mapping[str, Any]) -> bool:
    """Whether a network, or the one that it is a copy of, starts from weights that are not random.

    A backbone from outside this package may bring weights of its own.
    """
    seen: set[str] = set()
    while name in networks and name not in seen:
        seen.add(name)
        network = networks[name]
        foreign = network.backbone is not None and not type(network.backbone).__module__.startswith("ssl_platform.")
        if network.init is not None or getattr(network.backbone, "pretrained", foreign):
            return True
        name = network.of if network.backbone is None else ""
    return False


def _check_uses(recipe: "Recipe", name: str, objective: Any) -> list[str]:
    """What an objective asks of masks and heads that are there but not such as it needs."""
    lines = []
    masks, where = getattr(objective, "masks", None), f"objectives.{name}"
    by_group = masks if isinstance(masks, dict) else {getattr(objective, "group", None): masks} if masks else {}
    for group, used in by_group.items():
        if group is not None and recipe.masks[used].group != group:
            lines.append(f"{where}.masks: '{used}' hides tokens of '{recipe.masks[used].group}', not of '{group}'")
        if getattr(objective, "mode", "token") == "drop" and not recipe.masks[used].same_count():
            lines.append(
                f"{where}.mode: drop needs masks that hide the same number of tokens in every view, which '{used}' does "
                "not; use random masks with one ratio and probability 1"
            )
    head, teacher = getattr(objective, "head", None), getattr(objective, "teacher", None)
    if isinstance(head, str) and isinstance(teacher, str):
        owner: str = recipe.heads[head].network
        network = recipe.networks[teacher]
        follows = network.update == "ema" and network.of in (owner, None)  # a missing `of` has a line of its own
        if teacher != owner and not follows:
            lines.append(
                f"{where}.teacher: '{teacher}' has no copy of the head '{head}', which only '{owner}' and the networks with "
                f"update: ema, of: {owner} have"
            )
    return lines


# -- of what was built -----------------------------------------------------------------------------------------------


def check_follower(name: str, config: "NetworkConfig", follower: nn.Module, followed: nn.Module) -> None:
    """Raises ConfigError if a network cannot follow another one, or would quietly keep statistics of noise."""
    mine, theirs = ({key: value.shape for key, value in one.state_dict().items()} for one in (follower, followed))
    if mine != theirs:
        different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        raise ConfigError(
            [
                f"networks.{name}.backbone: update: {config.update} needs the architecture of '{config.of}', but "
                f"{', '.join(different[:3])}{' ...' if len(different) > 3 else ''} differ; leave the backbone out"
            ]
        )
    if has_batch_norm(follower):
        check_statistics(name, config, f"'{config.of}' has batch norm, whose running statistics this network")


def check_statistics(name: str, config: "NetworkConfig", what: str) -> None:
    """Raises ConfigError if a network that follows another one has batch norm, `what`, and no statistics for it."""
    if config.mode == "eval" and config.buffers == "own":
        raise ConfigError(
            [
                f"networks.{name}: {what} would never learn; set mode: train (it uses each batch's own, as DINO does), or "
                "buffers: copy (it takes over the student's)"
            ]
        )
