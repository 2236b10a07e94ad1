"""Label-free figures of a run's health: collapse signals of class tokens and prototypes, speed and memory.

Forward hooks listen to what passes through networks, heads and targets anyway: no objective and no modality knows of it,
nothing is computed twice, and nothing that training reads is changed. `health.py` says in words what the figures mean.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_platform import distributed, flops
from ssl_platform.health import Health
from ssl_platform.health_facts import facts_of
from ssl_platform.log import logger, read_lines
from ssl_platform.objectives._targets import Centering, Sinkhorn
from ssl_platform.progress import peak_memory
from ssl_platform.recipe import Recipe
from ssl_platform.step import Parts

POOL = 512
"""Samples whose class tokens are pooled, over ranks and the latest steps. RankMe is at most the smaller of this and the
width; a larger pool would tell little more of a collapse, and its cost grows with the square."""
USED_SHARE = 0.1
"""A prototype counts as used from this share of what it would get if all were used equally."""
POOLED = ("feature_std", "rankme", "rank_share", "cosine", "prototype_usage", "prototype_perplexity", "pooled_samples")
"""Ends of the names of figures over several steps: after a resume the first ones are over fewer."""
OF_THE_MACHINE = (
    "samples_per_second", "data_wait_share", "mfu", "memory_gb", "gpu_memory_gb",
    "slowest_rank", "slowest_rank_ratio",
)  # fmt: skip
"""Names of figures that differ between two runs of the same configuration."""


class Monitor:
    """Watches the steps that the next figures need; one for each process of a run. It holds no state of training."""

    def __init__(self, recipe: Recipe, parts: Parts) -> None:
        """Measures a matrix product, the peak that mfu is relative to, where there is a formula for the model's FLOPs.

        Reads `metrics.jsonl`, which must be cut back to the step that the run goes on from.
        """
        self.parts, self.batch_size, self.every = parts, recipe.batch_size, recipe.signal_interval
        self.last_step = recipe.steps
        self.window = min(-(-POOL // recipe.batch_size), self.every)
        self.flops: dict[tuple[str, ...], int] = {}
        """Of one optimiser step on this rank, by the active objectives; a mean where views change their size."""
        self._counted: dict[tuple[str, ...], list[int]] = defaultdict(list)
        """Of each step since the last figures, where views change their size."""
        self._mixed = bool(getattr(recipe.modality.build(None), "variants", ()))
        self.peak: float | None = None
        self._tokens: dict[str, deque[Tensor]] = defaultdict(deque)
        self._masses: dict[str, tuple[Tensor, int]] = {}
        self._new_tokens: list[tuple[str, Tensor]] = []
        self._new_masses: list[tuple[str, Tensor, int]] = []
        self.health = Health(facts_of(recipe))
        if distributed.rank() == 0:  # a resumed run knows what it has said
            for line in read_lines(recipe.run_dir / "metrics.jsonl"):
                self.health.judge(line)
        if flops.countable(parts.student_teacher):
            dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
            self.peak = flops.matmul_rate(dtype, parts.device)
            logger.info(
                "mfu is relative to %.3g TFLOP/s, a large matrix product in %s on %s, measured now",
                self.peak / 1e12, recipe.precision, parts.device,
            )  # fmt: skip

    def due(self, step: int) -> bool:
        """Whether there are collapse signals after `step` finished steps."""
        return bool(self.every) and (step % self.every == 0 or step == self.last_step)

    @contextmanager
    def watching(self, step: int, active: Sequence[str]) -> Iterator[None]:
        """Around the optimiser step `step`, counted from 0; call `keep` afterwards."""
        with ExitStack() as stack:
            counted = None
            if self.peak is not None and (self._mixed or tuple(active) not in self.flops):
                counted = stack.enter_context(flops.Counted(self.parts.student_teacher))
            if any(self.due(later) for later in range(step + 1, step + 1 + self.window)):
                for hook in self._hooks():
                    stack.callback(hook.remove)
            yield
            if counted is not None:
                counts = self._counted[tuple(active)]
                counts.append(counted.total)
                self.flops[tuple(active)] = round(sum(counts) / len(counts))

    def keep(self, skipped: bool) -> None:
        """Takes what the step showed into the pool, or forgets it: the numbers of a skipped step are no numbers."""
        if not skipped:
            for network, tokens in self._new_tokens:
                pool = self._tokens[network]
                if pool and pool[0].shape[1] != tokens.shape[1]:  # a sub-network of another width
                    pool.clear()
                pool.append(tokens)
                while sum(map(len, pool)) - len(pool[0]) >= POOL / distributed.world_size():
                    pool.popleft()
            for objective, mass, rows in self._new_masses:
                before, count = self._masses.get(objective, (0, 0))
                self._masses[objective] = (before + mass, count + rows)
        self._new_tokens, self._new_masses = [], []

    def signals(self) -> dict[str, float | int]:
        """The collapse signals of the pooled steps of all ranks; every rank must ask, and gets the same."""
        figures: dict[str, float | int] = {}
        for network, pool in self._tokens.items():
            tokens = distributed.gather(torch.cat(list(pool)))  # (N, D)
            figures |= {f"{network}_{name}": value for name, value in token_figures(tokens).items()}
            figures["pooled_samples"] = len(tokens)
        kept: dict[str, tuple[Tensor, int]] = {}
        for objective, (mass, rows) in self._masses.items():
            count = distributed.total(torch.tensor(float(rows), dtype=torch.float64)).item()
            named = prototype_figures(distributed.total(mass), round(count)).items()
            figures |= {f"{objective}_{name}": value for name, value in named}
            if count < POOL:  # too few to start again from none
                kept[objective] = (mass, rows)
        self._masses = kept
        return figures

    def speed(self, active: Sequence[str], samples_per_second: float) -> dict[str, float | int]:
        """mfu where it is known, and the largest memory so far, in GB."""
        figures: dict[str, float | int] = {}
        self._counted.clear()
        if (count := self.flops.get(tuple(active))) and self.peak is not None:
            figures["mfu"] = count * samples_per_second / self.batch_size / self.peak
        figures["memory_gb"] = peak_memory(torch.device("cpu")) / 1e9
        if self.parts.device.type == "cuda":
            figures["gpu_memory_gb"] = peak_memory(self.parts.device) / 1e9
        return figures

    def _hooks(self) -> Iterator[Any]:
        model = self.parts.student_teacher
        for name, role in model.roles.items():
            if role.update in ("grad", "ema"):
                yield model.networks[name].register_forward_hook(self._network_hook(name))
        for name, objective in model.objectives.items():
            targets = [module for module in objective.modules() if isinstance(module, Centering | Sinkhorn)]
            if targets:
                yield targets[0].register_forward_hook(self._targets_hook(name))

    def _network_hook(self, network: str) -> Any:
        def take(_: object, arguments: object, outputs: Any) -> None:
            view = outputs[0].cls.detach().flatten(0, -3)[0]  # one view of each sample: two would look alike
            self._new_tokens.append((network, view.float().clone()))  # (B, D); a slice would hold on to all tokens

        return take

    def _targets_hook(self, objective: str) -> Any:
        def take(_: object, arguments: object, targets: Tensor) -> None:
            rows = targets.detach().flatten(0, -2)  # (rows, K)
            self._new_masses.append((objective, rows.sum(0, dtype=torch.float32), len(rows)))

        return take


# -- figures -----------------------------------------------------------------------------------------------------------


def token_figures(tokens: Tensor) -> dict[str, float | int]:
    """What class tokens (N, D) of different samples tell about collapse.

    `feature_std`: mean over dimensions of the standard deviation after L2 normalisation, times sqrt(D): 1 = spread over
    the sphere, 0 = all alike. `cosine`: mean over pairs. `rankme` and its share of min(N, D).
    """
    num, dim = tokens.shape
    unit = F.normalize(tokens.double(), dim=1)
    std = unit.std(0, correction=0).mean() * math.sqrt(dim)
    cosine = (unit.sum(0).square().sum() - num) / max(num * (num - 1), 1)
    rank = rankme(tokens)
    std_value, cosine_value, rank_value = torch.stack([std, cosine, rank]).tolist()
    return {
        "feature_std": std_value,
        "cosine": cosine_value,
        "rankme": rank_value,
        "rank_share": rank_value / min(num, dim),
    }


def rankme(tokens: Tensor) -> Tensor:
    """exp of the entropy of the singular values as shares of their sum, not centred (Garrido et al. 2023), of (N, D).

    The singular values are roots of the eigenvalues of the smaller Gram matrix, in float64.
    """
    rows = tokens.double()
    rows = rows / rows.abs().max().clamp_min(1e-300)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    values = values * (values > values.max() * 1e-7)  # rounding in Gram: what is below is noise
    shares = values / values.sum().clamp_min(1e-300)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def prototype_figures(mass: Tensor, rows: int) -> dict[str, float | int]:
    """How the teacher's assignments spread over prototypes; mass (K,) sums the probabilities of `rows` rows.

    `prototype_usage`: used prototypes, a share of the min(rows, K) that could be. `prototype_perplexity`: exp of the
    entropy of the mean assignment; K = all alike, 1 = one prototype takes all.
    """
    shares = mass.double() / mass.sum().clamp_min(1e-30)
    used = (shares > USED_SHARE / len(shares)).sum()
    perplexity = torch.special.entr(shares).sum().exp()
    used_value, perplexity_value = torch.stack([used.double(), perplexity]).tolist()
    return {
        "prototype_usage": min(used_value / max(min(rows, len(shares)), 1), 1.0),
        "prototype_perplexity": perplexity_value,
    }
