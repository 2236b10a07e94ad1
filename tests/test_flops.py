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
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, 0, ["dino", "ibot"]).loss.backward()
    expected = flops.step_flops(model, batch, student=("global", "local"), teacher=("global",), masks="block")
    assert counter.get_total_flops() == expected
