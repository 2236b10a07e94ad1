"""A few training steps of the tiny student and teacher on any number of ranks, and all that can be compared of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssl_platform import distributed
from ssl_platform.step import train_step
from ssl_platform.views import Batch
from tests import engine

OBJECTIVES = {
    "dino": engine.DINO,  # centering, and a head that both share: it is called twice in a step
    "ibot": engine.IBOT | {"targets": "sinkhorn"},
    "koleo": engine.KOLEO | {"scope": "global"},
}
VIT = engine.VIT | {"layer_scale": 0.1, "num_registers": 1}
NETWORKS = {
    "student": {"backbone": VIT},
    "teacher": {"update": "ema", "of": "student", "momentum": 0.9},
    "old": {"update": "snapshot", "of": "student", "first_step": 1, "every": 2},
    "fixed": {"update": "frozen", "of": "student"},
}
ANCHOR = {"name": "anchor", "teacher": "fixed", "masks": "block"}
ACTIVE: Sequence[Sequence[str]] = (
    ("dino", "ibot", "koleo", "anchor"),
    ("koleo", "anchor"),  # the heads get no gradient
    ("dino", "ibot", "koleo", "anchor"),
)


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together of its shards; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "batch_size": 8,
        "networks": NETWORKS,
        "objectives": OBJECTIVES | {"anchor": ANCHOR},
        "optim": {"lr": 0.1, "name": "sgd", "clip_grad": 0.3},  # Adam divides tiny gradients by themselves
    } | changes


def batch(step: int) -> Batch:
    """Eight samples, the first two without and the others with 1 to 3 masked tokens of 4."""
    made = engine.batch(step, size=8)
    scores = torch.rand(2, 1, 8, 4, generator=torch.Generator().manual_seed(100 + step))
    counts = torch.tensor([0, 0, 1, 2, 3, 1, 2, 3])[None, None, :, None]
    made.groups["global"].masks["block"] = scores.argsort(-1).argsort(-1) < counts
    return made


def course(
    changes: dict[str, Any], active: Sequence[Sequence[str]] = ACTIVE, make: Callable[[int], Batch] = batch
) -> dict[str, Any]:
    """What each step reports, the gradients of step 0 as they were before clipping's factor, and all state at the end."""
    parts = engine.parts(**settings(**changes))
    model, size = parts.student_teacher, distributed.world_size()
    gradients: dict[str, Tensor] = {}
    step_of_optimizer = parts.optimizer.step

    def keep() -> None:
        if not gradients:
            gradients.update({n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None})
        step_of_optimizer()

    parts.optimizer.step = keep  # type: ignore[method-assign, assignment]
    losses, norms = [], []
    for step, names in enumerate(active):
        mine = engine.split(make(step), size)[distributed.rank()]
        result = train_step(parts, iter(engine.split(mine, parts.accumulate)), step, names)
        assert not result.skipped
        terms = torch.stack([result.loss, *result.terms.values()])
        losses.append(dict(zip(["loss", *result.terms], distributed.mean(terms).tolist(), strict=True)))
        norms.append({name: norm.item() for name, norm in result.grad_norms.items()})
    state = {name: whole(value).clone() for name, value in model.state_dict().items()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": state}


def assert_equal(found: dict[str, Any], expected: dict[str, Any], state: float = 1e-5, of_largest: float = 0.0) -> None:
    """Losses to 1e-5, gradients and norms to 1e-4: the tolerances of float32 that the documentation promises.

    With `of_largest` also elements of a gradient that differ by that share of its largest one: batch norm takes most of a
    sum away again, and leaves its rounding.
    """
    assert found["state"].keys() == expected["state"].keys()
    for kind, tolerance in (("losses", 1e-5), ("norms", 1e-4)):
        for step, (ours, theirs) in enumerate(zip(found[kind], expected[kind], strict=True)):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                difference = abs(ours[name] - value)
                assert difference <= tolerance * max(abs(value), 1), (kind, step, name, ours[name], value)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        least = max(1e-6, of_largest * gradient.abs().max().item())
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=least, msg=name)
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=state, atol=state, msg=name)
