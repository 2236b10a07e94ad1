"""DINOv3's last layer, a plain linear one: nothing bounds its logits, and nothing may overflow."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_platform.config import validate
from ssl_platform.heads.projection import Config, ProjectionHead
from ssl_platform.objectives._cross_entropy import cross_entropy, entropy
from ssl_platform.objectives._targets import Centering, Sinkhorn
from ssl_platform.optim import parameter_rule
from tests.test_targets import log_domain_sinkhorn


def head(scale: float = 1.0) -> ProjectionHead:
    """A small head whose prototypes are `scale` times as long as they start."""
    torch.manual_seed(0)
    config = {"num_prototypes": 24, "hidden_dim": 16, "bottleneck_dim": 8, "last_layer": "linear"}
    made = validate(Config, config).build(12)
    made.last_layer.weight.data.mul_(scale)
    return made


def embeddings(rows: int = 40) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(1))


def test_logits_are_the_normalised_bottleneck_times_the_weights() -> None:
    made = head().double()
    x = embeddings().double()
    expected = torch.empty(40, 24, dtype=torch.float64)
    first, second, third = (made.mlp[i] for i in (0, 2, 4))  # type: ignore[index]
    for row in range(40):
        hidden = x[row]
        for layer in (first, second):
            hidden = layer.weight @ hidden + layer.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        bottleneck = third.weight @ hidden + third.bias
        for k in range(24):
            expected[row, k] = (made.last_layer.weight[k] * bottleneck / bottleneck.norm()).sum()
    torch.testing.assert_close(made(x), expected)


def test_it_has_one_weight_that_decays_and_is_frozen_at_first() -> None:
    made = head()
    assert [name for name, _ in made.named_parameters() if "last_layer" in name] == ["last_layer.weight"]
    weight = head().last_layer.weight
    assert abs(weight.std().item() - 0.02) < 0.004 and weight.abs().max().item() <= 2  # truncated normal
    rule = parameter_rule("heads.dino.student.last_layer.weight")
    assert rule.is_last_layer and rule.weight_decay_multiplier == 1.0


@pytest.mark.parametrize("scale", [1.0, 50.0, 5e3, 1e6])
def test_targets_and_losses_stay_finite_however_long_the_prototypes_grow(scale: float) -> None:
    """At scale 1e6 logits / 0.04 reach 1e6, exp of which overflows from 88.7 on in float32."""
    logits = head(scale)(embeddings()).detach()
    assert scale < 5e3 or (logits / 0.04).max() > 89
    targets = Sinkhorn(3)(logits.clone(), 0.04)
    assert targets.isfinite().all() and (targets.sum(1) - 1).abs().max() < 1e-4
    expected = log_domain_sinkhorn(logits.double().numpy(), 0.04, 3)
    if scale <= 50:  # beyond, float32's own rounding of the logits decides between near ties
        np.testing.assert_allclose(targets.numpy(), expected, rtol=2e-3, atol=1e-6)
    centered = Centering(24)(logits.clone(), 0.04)
    assert centered.isfinite().all() and entropy(centered).isfinite() and entropy(targets).isfinite()
    student = (head(scale)(embeddings() + 0.1)).detach().requires_grad_()
    loss = cross_entropy(student, targets, 0.1).mean()
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()
    exact = -(targets.double() * (student.detach().double() / 0.1).log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
