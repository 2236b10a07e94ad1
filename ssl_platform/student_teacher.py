"""The networks and their losses: a batch -> forward passes -> terms; and how networks that are not trained follow."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssl_platform.backbones import Features, Input
from ssl_platform.objectives import Forward, Loss, Objective, Outputs
from ssl_platform.optim import ParameterRule, Schedule, parameter_rule
from ssl_platform.views import Batch, ViewGroup


class Role(NamedTuple):
    """How a network gets its weights."""

    update: Literal["grad", "ema", "snapshot", "frozen"]
    of: str | None = None
    """The network that ema and snapshot follow."""
    momentum: Schedule = lambda step: 0.996
    """Of ema: new = momentum * old + (1 - momentum) * followed."""
    first_step: int = 0
    """Of snapshot: the step after which it is first taken, then every `every` steps."""
    every: int = 1
    max_updates: int | None = None
    """Of snapshot: so many are taken at most."""
    mode: Literal["eval", "train"] = "eval"
    """Of networks that are not trained: whether drop path and batch norm behave as in training."""
    buffers: Literal["own", "copy"] = "own"
    """Whether ema and snapshot also copy the followed network's buffers (running statistics)."""
    freeze_steps: int = 0
    """Of trained networks: first steps in which the learning rate of the network, not of its heads, is 0."""


class StepOutput(NamedTuple):
    """What one micro-batch gives; a tuple of dicts, so that DDP finds the tensors in it."""

    loss: Tensor
    terms: dict[str, Tensor]
    """Unweighted; the key is the objective's name, with `_<term>` behind it unless the term is called loss."""
    metrics: dict[str, Tensor]
    pending: dict[str, dict[str, Tensor]]
    """By objective."""
    features: Tensor
    """The sum of all class tokens: not finite if something is wrong with these samples, and not with those of another
    rank, whose losses they may have spoilt (Sinkhorn, KoLeo over all ranks)."""


class StudentTeacher(nn.Module):
    """Networks, heads and objectives of a run. `forward` is the whole loss of a micro-batch, so DDP can wrap it."""

    def __init__(
        self,
        networks: dict[str, nn.Module],
        roles: dict[str, Role],
        heads: dict[str, dict[str, nn.Module]],
        objectives: Mapping[str, Objective],
        weights: dict[str, Schedule],
    ) -> None:
        """`heads[name]` has a copy for its trained network and for each ema network of it."""
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.heads = nn.ModuleDict({name: nn.ModuleDict(copies) for name, copies in heads.items()})
        self.objectives = nn.ModuleDict(objectives)
        self.roles, self.weights = roles, weights
        self.overdue: set[str] = set()
        """Networks whose snapshot was due in a step that was skipped: it is taken after the next one that is not."""
        for name, role in roles.items():
            if role.update != "grad":
                for module in self._of_network(name):
                    module.requires_grad_(False)
        self.train()

    def forward(self, batch: Batch, step: int, active: Sequence[str]) -> StepOutput:
        """The loss of one micro-batch under the objectives named in `active`."""
        objectives = {name: self.objective(name) for name in active}
        requests = dict.fromkeys(request for one in objectives.values() for request in one.requests(step))
        outputs = Outputs(self._features(list(requests), batch), self.heads)  # type: ignore[arg-type]
        losses = {name: objective.loss(outputs, batch, step) for name, objective in objectives.items()}
        total = torch.stack(
            [self.weights[name](step) * term for name, loss in losses.items() for term in loss.terms.values()]
        ).sum()
        return StepOutput(
            total,
            _named(losses, "terms"),
            _named(losses, "metrics"),
            {name: {key: value.detach() for key, value in loss.pending.items()} for name, loss in losses.items()},
            torch.stack([total.new_zeros(()), *(one.cls.detach().sum() for one in outputs.features.values())]).sum(),
        )

    def _features(self, requests: Sequence[Forward], batch: Batch) -> dict[Forward, Features]:
        """Runs each network once, over all that is asked of it."""
        features: dict[Forward, Features] = {}
        for network in dict.fromkeys(request.network for request in requests):
            mine = [request for request in requests if request.network == network]
            inputs = [_input(request, batch.groups[request.group]) for request in mine]
            with torch.set_grad_enabled(self.roles[network].update == "grad" and torch.is_grad_enabled()):
                features.update(zip(mine, self.networks[network](inputs), strict=True))
        return features

    def objective(self, name: str) -> Objective:
        """The objective of that name."""
        found = self.objectives[name]
        assert isinstance(found, Objective)
        return found

    # -- once per optimiser step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the networks that follow others; called once, right after the optimiser's step `step`."""
        for name, role in self.roles.items():
            if role.update == "ema":
                for follower, followed in self._pairs(name, role):
                    follow(follower, followed, role.momentum(step), role.buffers)
            elif role.update == "snapshot" and (name in self.overdue or _is_taken(role, step)):
                for follower, followed in self._pairs(name, role):
                    follow(follower, followed, 0.0, role.buffers)
        self.overdue.clear()

    def skip(self, step: int) -> None:
        """Remembers which snapshots step `step` would have taken; called instead of `update` if it was not finite."""
        self.overdue |= {
            name for name, role in self.roles.items() if role.update == "snapshot" and _is_taken(role, step)
        }

    @torch.no_grad()
    def commit(self, step: int, pending: Sequence[dict[str, dict[str, Tensor]]]) -> None:
        """Lets objectives change their state, with what they left pending in each micro-batch of the step."""
        for name in pending[0]:
            self.objective(name).commit(step, [item[name] for item in pending])

    # -- what is trained ---------------------------------------------------------------------------------------------

    def trained_modules(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by module: each network, head and objective; gradients are clipped by module."""
        modules: dict[str, nn.Module] = {
            name: module for name, module in self.networks.items() if self.roles[name].update == "grad"
        }
        for head, copies in self.heads.items():
            assert isinstance(copies, nn.ModuleDict)
            for network, module in copies.items():
                if self.roles[network].update == "grad":
                    modules[f"{head}_head" if f"{head}_head" not in modules else f"{head}_head_{network}"] = module
        modules |= {f"{name}_objective": module for name, module in self.objectives.items()}
        parameters = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
        return {name: found for name, found in parameters.items() if found}

    def trained_parameters(
        self, layer_decay: float, patch_embed_lr: float
    ) -> Iterator[tuple[str, nn.Parameter, ParameterRule]]:
        """Each trained parameter with its full name and its rule for learning rate and weight decay."""
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            part, owner, *rest = name.split(".")
            if part != "networks":
                yield name, parameter, parameter_rule(name)
                continue
            inner, network = ".".join(rest), self.networks[owner]
            rule = parameter_rule(
                inner,
                layer=network.layer_of(inner),  # type: ignore[operator]
                num_layers=network.num_layers,  # type: ignore[arg-type]
                layer_decay=layer_decay,
                patch_embed_lr=patch_embed_lr,
            )
            yield name, parameter, rule._replace(freeze_steps=self.roles[owner].freeze_steps)

    def train(self, mode: bool = True) -> "StudentTeacher":
        """Training mode for what is trained; networks that are not stay in the mode their role says."""
        super().train(mode)
        for name, role in self.roles.items():
            if role.update != "grad":
                for module in self._of_network(name):
                    module.train(mode and role.mode == "train")
        return self

    def _of_network(self, name: str) -> list[nn.Module]:
        copies = [heads[name] for heads in self.heads.values() if name in heads]  # type: ignore[operator, index]
        return [self.networks[name], *copies]

    def _pairs(self, name: str, role: Role) -> list[tuple[nn.Module, nn.Module]]:
        """(follower, followed) of a network and of its heads."""
        assert role.of is not None
        heads = [(copies[name], copies[role.of]) for copies in self.heads.values() if name in copies]  # type: ignore[index, operator]
        return [(self.networks[name], self.networks[role.of]), *heads]

    def mix_precision(self, device: str, dtype: torch.dtype, in_shards: bool = False) -> None:
        """Runs networks, heads and the modules inside objectives under autocast; the losses' own arithmetic is float32.

        Networks and heads that will be `in_shards` are left alone: their weights are gathered in `dtype`.
        """
        inside = [child for objective in self.objectives.values() for child in objective.children()]
        heads = [module for copies in self.heads.values() for module in copies.children()]
        for module in inside if in_shards else [*self.networks.values(), *heads, *inside]:
            module.forward = torch.autocast(device, dtype)(module.forward)


def _is_taken(role: Role, step: int) -> bool:
    """Whether a snapshot is taken after `step`."""
    number, rest = divmod(step - role.first_step, role.every)
    return number >= 0 and rest == 0 and (role.max_updates is None or number < role.max_updates)


@torch.no_grad()
def follow(follower: nn.Module, followed: nn.Module, momentum: float, buffers: str = "own") -> None:
    """follower = momentum * follower + (1 - momentum) * followed, over the parameters that both have, in their dtype."""
    theirs = dict(followed.named_parameters())
    mine = {name: parameter for name, parameter in follower.named_parameters() if name in theirs}
    torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1 - momentum)
    if buffers == "copy":
        found = dict(followed.named_buffers())
        for name, buffer in follower.named_buffers():
            buffer.copy_(found[name])


def _input(request: Forward, group: ViewGroup) -> Input:
    masks = group.masks[request.masks] if request.masks is not None else None
    return Input(group.views, masks, request.mode, request.layers, request.arch, request.group)


def _named(losses: dict[str, Loss], field: str) -> dict[str, Tensor]:
    """{objective or objective_term: detached scalar}."""
    return {
        objective if term == "loss" else f"{objective}_{term}": value.detach()
        for objective, loss in losses.items()
        for term, value in getattr(loss, field).items()
    }
