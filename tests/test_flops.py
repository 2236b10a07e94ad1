"""The formula behind the MFU figures against torch's own counter, under the attention kernel that it can see into."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_platform import flops
from ssl_platform.estimate import random_batch
from ssl_platform.step import build
from tests import engine


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_formula_equals_the_counter(drop_path: float) -> None:
    backbone = {"name": "vit", "embed_dim": 48, "depth": 3, "num_heads": 3, "drop_path": drop_path, "num_registers": 2}
    recipe = engine.recipe(
        modality={
            "name": "image",
            "patch_size": 8,
            "crops": {"global": {"size": 32}, "local": {"num": 3, "size": 16}},
        },
        networks={"student": {"backbone": backbone}, "teacher": {"update": "ema", "of": "student"}},
        heads={"dino": engine.HEAD | {"num_layers": 3}},
        masks={"block": {"name": "block"}},
    )
    modality = recipe.modality.build(None)
    model = build(recipe, modality, 1, torch.device("cpu")).student_teacher
    batch = random_batch(modality, {"block": recipe.masks["block"].build()}, 5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, flops.Counted(model) as counted:
        model(batch, 0, ["dino", "ibot"]).loss.backward()
    assert flops.countable(model)
    assert counter.get_total_flops() == counted.total > 0
    model(batch, 0, ["dino", "ibot"])
    assert counter.get_total_flops() == counted.total, "hooks must go with the context"


def test_masked_versions_and_left_out_tokens_are_counted() -> None:
    """Masks of several versions and mode drop, where fewer tokens pass than there are patches."""
    masks = {"block": {"name": "random", "ratio": [0.5, 0.5], "probability": 1.0, "num_masks": 2}}
    objectives = {"dino": engine.DINO | {"mode": "drop"}}
    recipe = engine.recipe(masks=masks, objectives=objectives)
    modality = recipe.modality.build(None)
    model = build(recipe, modality, 1, torch.device("cpu")).student_teacher
    batch = random_batch(modality, {"block": recipe.masks["block"].build()}, 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, flops.Counted(model) as counted:
        model(batch, 0, ["dino"]).loss.backward()
    assert counter.get_total_flops() == counted.total > 0


def test_models_without_a_formula_are_told_apart() -> None:
    recipe = engine.recipe(
        modality={"name": "image", "patch_size": 8, "crops": {"global": {"size": 32}, "local": {"num": 0}}},
        networks={"student": {"backbone": {"name": "timm_models", "model": "vit_tiny_patch16_224"}}},
        heads={},
        objectives={"koleo": {"name": "koleo"}},
    )
    model = build(recipe, recipe.modality.build(None), 1, torch.device("cpu")).student_teacher
    assert not flops.countable(model)


def test_the_peak_is_a_rate_of_the_precision() -> None:
    before = torch.get_rng_state()
    rates = [flops.matmul_rate(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)]
    assert all(1e7 < rate < 1e15 for rate in rates)
    assert torch.equal(torch.get_rng_state(), before), "measuring must not move a run's random numbers"
