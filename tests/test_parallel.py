"""DDP, FSDP2 and HSDP against one process; accumulation, bad numbers, stages and files of a run in shards."""

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from ssl_platform import distributed, stragglers
from ssl_platform.backbones import Input
from ssl_platform.config import ConfigError
from ssl_platform.recipe import load_recipe
from ssl_platform.sharding import local
from ssl_platform.step import train_step
from ssl_platform.train import train
from tests import engine
from tests.courses import ACTIVE, assert_equal, batch, course, settings, whole
from tests.ranks import run_ranks

FSDP: dict[str, Any] = {"parallel": {"method": "fsdp"}}
HSDP: dict[str, Any] = {"parallel": {"method": "fsdp", "replicas": 2}}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return course({})


@pytest.mark.parametrize("changes", [{}, FSDP, HSDP], ids=["ddp", "fsdp", "hsdp"])
def test_two_ranks_equal_one_process(changes: dict[str, Any], alone: dict[str, Any]) -> None:
    """Losses, norms, gradients, the student, its average, a snapshot and the center, over three steps."""
    first, second = run_ranks(2, course, changes, timeout=250)
    assert_equal(first, alone)
    assert_equal(second, alone)


def test_four_ranks_equal_one_process(alone: dict[str, Any]) -> None:
    for changes in (FSDP, HSDP, {}):
        for found in run_ranks(4, course, changes, timeout=250):
            assert_equal(found, alone)


def one_shard() -> tuple[dict[str, Any], list[str]]:
    try:
        parts = engine.parts(**settings(**FSDP))
        kinds = {type(p).__name__ for p in parts.student_teacher.parameters()}
        return course(FSDP), sorted(kinds)
    finally:
        distributed.stop()


def test_one_process_can_be_one_shard(alone: dict[str, Any]) -> None:
    found, kinds = one_shard()
    assert kinds == ["DTensor"] or kinds == ["Parameter"], kinds
    assert_equal(found, alone)
    assert distributed.world_size() == 1 and distributed.rank() == 0


def shards(changes: dict[str, Any]) -> dict[str, tuple[int, int, str]]:
    """(elements here, elements of all, placements) of each parameter and moment, after a step."""
    parts = engine.parts(**settings(**changes, optim={"lr": 0.01}))
    mine = engine.split(batch(0), distributed.world_size())[distributed.rank()]
    train_step(parts, iter([mine]), 0, ACTIVE[0])
    found = {}
    for name, parameter in parts.student_teacher.named_parameters():
        moment = parts.optimizer.state.get(parameter, {}).get("exp_avg", parameter)
        for kind, tensor in (("weight", parameter), ("moment", moment)):
            assert isinstance(tensor, DTensor), (name, kind)
            found[f"{name} {kind}"] = local(tensor).numel(), tensor.numel(), str(tensor.placements)
    return found


def test_what_each_rank_holds() -> None:
    """Weights, moments, averages and frozen networks: halves on two ranks, and with HSDP on four."""
    zero, one = run_ranks(2, shards, FSDP, timeout=250)
    for name, (here, total, placements) in zero.items():
        assert here + one[name][0] == total and placements == "(Shard(dim=0),)", name
    held = [sum(here for here, _, _ in each.values()) for each in (zero, one)]
    assert max(held) < 0.52 * sum(total for _, total, _ in zero.values()), "the engine's model splits evenly"
    for each in run_ranks(4, shards, HSDP, timeout=250):
        assert {placements for _, _, placements in each.values()} == {"(Replicate(), Shard(dim=0))"}
        assert sum(here for here, _, _ in each.values()) < 0.52 * sum(total for _, total, _ in each.values())


# -- accumulation ------------------------------------------------------------------------------------------------------

CENTERED = {"dino": engine.DINO, "ibot": engine.IBOT}
STEPS = (("dino", "ibot"),) * 2


def collectives(changes: dict[str, Any], accumulate: int) -> tuple[dict[str, Any], dict[str, int]]:
    """A course of centered objectives, and how often a step of it calls each collective."""
    changes = {**changes, "objectives": CENTERED, "accumulate": accumulate}
    found = course(changes, STEPS)
    parts = engine.parts(**settings(**changes))
    mine = engine.split(batch(0), distributed.world_size())[distributed.rank()]
    with CommDebugMode() as seen:
        train_step(parts, iter(engine.split(mine, accumulate)), 0, STEPS[0])
    return found, {str(operation).rpartition(".")[2]: count for operation, count in seen.get_comm_counts().items()}


@pytest.mark.parametrize("changes", [{}, FSDP, HSDP], ids=["ddp", "fsdp", "hsdp"])
def test_micro_batches_equal_the_batch_and_share_the_collectives_of_gradients(changes: dict[str, Any]) -> None:
    alone = course({"objectives": CENTERED}, STEPS)
    world_size = 4 if changes == HSDP else 2
    (once, at_once), *_ = run_ranks(world_size, collectives, changes, 1, timeout=250)
    (twice, in_two), *_ = run_ranks(world_size, collectives, changes, 2, timeout=250)
    assert_equal(once, alone)
    assert_equal(twice, alone)
    gathers, scatters = (
        [counts.pop(name, 0) for counts in (at_once, in_two)] for name in ("_allgather_base_", "_reduce_scatter_base_")
    )
    if changes:
        # Two blocks, the rest of the student, the head. The head runs twice, for DINO and for iBOT: what earlier
        # micro-batches left is sent when the first of its calls is done, the rest after the second.
        assert scatters == [4, 5]
        assert gathers[1] == 2 * gathers[0] > 0, "weights: in each micro-batch"
        at_once["allreduce_"] += (changes == HSDP) * 1
    assert at_once == in_two, "gradients and centers: once a step, however many micro-batches"


# -- what else touches parameters --------------------------------------------------------------------------------------


def bad_then_good() -> tuple[bool, bool, bool, list[str]]:
    parts = engine.parts(**settings(**FSDP))
    before = {name: whole(value).clone() for name, value in parts.student_teacher.state_dict().items()}
    mine = engine.split(batch(0), 2)[distributed.rank()]
    if distributed.rank() == 1:
        mine.groups["global"].views[0, 0] = torch.inf
    result = train_step(parts, iter([mine]), 0, ACTIVE[0])
    after = {name: whole(value) for name, value in parts.student_teacher.state_dict().items()}
    same = all(torch.equal(value, before[name]) for name, value in after.items())
    again = train_step(parts, iter([engine.split(batch(1), 2)[distributed.rank()]]), 1, ACTIVE[0])
    return result.skipped, same, again.skipped, result.keys


def test_a_step_that_is_not_finite_on_one_rank_changes_no_shard() -> None:
    found = run_ranks(2, bad_then_good)
    for skipped, same, again, _ in found:
        assert skipped and same and not again
    # Sinkhorn, and KoLeo over all ranks, have made the loss of rank 0 nan as well.
    assert [keys for *_, keys in found] == [[], [f"sample0-{number}" for number in range(4, 8)]]


def before_the_first_step() -> tuple[torch.Tensor, float]:
    """As a stage's `prepare` does, before a step has run."""
    parts = engine.parts(**settings(**FSDP))
    parts.student_teacher.eval()
    with torch.no_grad():
        tokens = parts.student_teacher.networks["teacher"]([Input(batch(0).groups["global"].views)])[0].cls
    parts.student_teacher.train()
    result = train_step(parts, iter([engine.split(batch(0), 2)[distributed.rank()]]), 0, ACTIVE[0])
    return tokens, distributed.mean(result.loss).item()


def test_a_network_can_run_by_itself_before_the_first_step(alone: dict[str, Any]) -> None:
    model = engine.parts(**settings()).student_teacher
    with torch.no_grad():
        expected = model.networks["teacher"]([Input(batch(0).groups["global"].views)])[0].cls
    for tokens, loss in run_ranks(2, before_the_first_step):
        torch.testing.assert_close(tokens, expected)
        assert loss == pytest.approx(alone["losses"][0]["loss"], rel=1e-5)


def start_apart() -> torch.Tensor:
    """The first weights of a rank that would have begun with others: rank 0's count, as with DDP."""
    made = engine.recipe(**settings(seed=distributed.rank(), **FSDP))
    from ssl_platform.step import build

    parts = build(made, made.modality.build(None), 8, torch.device("cpu"))
    return whole(parts.student_teacher.networks["student"].blocks[0].attn.qkv.weight).detach()  # type: ignore[index, union-attr, arg-type]


def test_all_ranks_start_from_rank_zeros_weights() -> None:
    expected = engine.model(**settings()).networks["student"].blocks[0].attn.qkv.weight  # type: ignore[index, union-attr]
    for found in run_ranks(2, start_apart):
        assert torch.equal(found, expected)


def said_by_ddp() -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine.parts(**settings())
    return [str(warning.message) for warning in told]


def test_users_are_not_told_of_what_they_cannot_change() -> None:
    assert run_ranks(2, said_by_ddp) == [[], []]


def agreed_that_a_save_has_ended(on: list[int]) -> bool:
    parts = engine.parts(**settings())
    mine = engine.split(batch(0), 2)[distributed.rank()]
    return train_step(parts, iter([mine]), 0, ACTIVE[0], saved=lambda: distributed.rank() in on).saved


def test_a_save_has_ended_when_it_has_on_every_rank() -> None:
    """Otherwise the step would wait for the ranks that do not know of it yet."""
    for on, expected in (([0], False), ([1], False), ([0, 1], True)):
        assert run_ranks(2, agreed_that_a_save_has_ended, on) == [expected] * 2, on


def slow_on_rank_one() -> dict[str, float | int]:
    parts = engine.parts(**settings(**FSDP))
    if distributed.rank() == 1:
        block = parts.student_teacher.networks["student"].blocks[0]  # type: ignore[index, union-attr]
        block.attn.register_forward_pre_hook(lambda *_: time.sleep(1))
    stragglers.figures(0.0, 0.0)  # forgets what other tests left
    for step in range(2):
        train_step(parts, iter([engine.split(batch(step), 2)[distributed.rank()]]), step, ACTIVE[0])
    return stragglers.figures(0.0, 0.0)


def test_waiting_for_weights_is_no_work_of_ones_own() -> None:
    """Rank 0 waits for the second block's weights as long as rank 1 sleeps before it gives its part."""
    for found in run_ranks(2, slow_on_rank_one, timeout=250):
        assert found["slowest_rank"] == 1 and found["slowest_rank_ratio"] > 1.3, found


# -- runs --------------------------------------------------------------------------------------------------------------


def trained(run_dir: str, *overrides: str) -> None:
    path = ROOT / "configs" / "smoke" / "image.yaml"
    given = ["steps=4", "log_every=1", "save_every=1", "tensorboard=false", "optim.name=sgd", f"run_dir={run_dir}"]
    # Draws of drop path differ between numbers of ranks, and so do neighbours of a rank's own samples.
    given += ["networks.student.backbone.drop_path=0", "objectives.koleo.scope=global", *overrides]
    train(load_recipe(path, given, distributed.world_size()), torch.device("cpu"))


def test_a_run_in_shards_is_saved_and_goes_on_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Saved on 4, resumed on 2 in two replicas, then by one process: as one process in one go."""
    one, two = tmp_path / "one", tmp_path / "two"
    trained(str(one))
    run_ranks(4, trained, str(two), "parallel.method=fsdp", timeout=250)
    for step in (3, 4):
        shutil.rmtree(two / f"checkpoints/step_{step:08d}")
    run_ranks(2, trained, str(two), "parallel.method=fsdp", "parallel.replicas=2", timeout=250)
    shutil.rmtree(two / "checkpoints/step_00000004")
    trained(str(two))
    ours, theirs = (
        [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] for run_dir in (two, one)
    )
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), step


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (
            {"replicas": 2},
            2,
            "parallel.replicas: 2 needs parallel.method: fsdp; with ddp every rank is a replica already",
        ),
        (
            {"method": "fsdp", "replicas": 3},
            4,
            "parallel.replicas: 3 does not divide the number of ranks, 4; use 1, 2, 4",
        ),
        ({"method": "fsdp", "replicas": 2}, 1, "parallel.replicas: 2 does not divide the number of ranks, 1; use 1"),
        ({"method": "zero"}, 1, "parallel.method: "),
        ({"method": "fsdp", "replicas": 0}, 1, "parallel.replicas: "),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], world_size: int, message: str) -> None:
    from ssl_platform.config import validate
    from ssl_platform.recipe import Recipe

    with pytest.raises(ConfigError, match="(?s)" + message.replace(".", r"\.")):
        validate(Recipe, settings_of(parallel=changes), world_size=world_size)


def settings_of(**changes: Any) -> dict[str, Any]:
    return engine.settings(**settings(**changes))
