"""Checkpoints written beside the training, by one rank or by each its part, and read by any number of ranks."""

import gc
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ssl_platform import checkpoint, distributed, sharding, tensor_files
from ssl_platform.checkpoint import CheckpointError, TrainState
from ssl_platform.encoder import Encoder
from ssl_platform.optim import ParameterRule, build_optimizer
from ssl_platform.recipe import InitConfig
from ssl_platform.saving import Saver
from ssl_platform.train import main
from ssl_platform.weights import read, sha256
from tests.ranks import run_ranks
from tests.test_resume import SMOKE
from tests.test_resume import assert_equal as assert_equal_runs

SHAPES = {"even": (8, 3), "uneven": (7, 3), "few": (2, 5), "one": (1, 4), "vector": (5,), "empty_rank": (6,)}
"""Over four ranks of ceil(n / 4) rows each: 7 = 2 2 2 1, 2 = 1 1 0 0, 5 = 2 2 1 0, 6 = 2 2 2 0."""


def state(step: int) -> TrainState:
    size = distributed.world_size()
    return TrainState(step=step, batch_size=8, accumulate=1, world_size=size, seed=0)


class Toy(nn.Module):
    """Parameters sharded over a mesh of this shape, (1,) = plain; buffers and a parameter that every rank holds whole."""

    def __init__(self, mesh_shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(_laid_out(torch.randn(shape), mesh_shape)))
        self.temperature = nn.Parameter(torch.randn(()))
        self.register_buffer("center", torch.randn(1, 9))
        self.register_buffer("count", torch.tensor(seed))


def _laid_out(tensor: Tensor, mesh_shape: tuple[int, ...]) -> Tensor:
    if mesh_shape == (1,):
        return tensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", mesh_shape)
    return distribute_tensor(tensor, mesh, [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)])


def toy(mesh_shape: tuple[int, ...], seed: int) -> tuple[Toy, torch.optim.Optimizer]:
    """The module and AdamW after a step, with moments of its own at every element."""
    module = Toy(mesh_shape, seed)
    rule = ParameterRule(1.0, 1.0, False)
    named = [(name, parameter, rule) for name, parameter in module.named_parameters()]
    optimizer = build_optimizer(named, name="adamw", betas=(0.9, 0.999), eps=1e-8)
    for name, parameter in module.named_parameters():
        torch.manual_seed(seed + len(name))
        whole = torch.randn(parameter.shape)
        parameter.grad = _laid_out(whole, mesh_shape) if name in SHAPES else whole
    optimizer.step()
    return module, optimizer


def contents(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything, whole."""
    tensors = module.state_dict() | checkpoint.optimizer_tensors(optimizer)
    return {
        key: (value.full_tensor() if sharding.is_sharded(value) else value).detach().clone()  # type: ignore[attr-defined]
        for key, value in tensors.items()
    }


def write_sharded(folder: str, mesh_shape: tuple[int, ...], seed: int) -> tuple[dict[str, Tensor], str, float]:
    """(what was saved, what failed, whether a later change of the parameters reached the file is for the caller to see)."""
    module, optimizer = toy(mesh_shape, seed)
    expected = contents(module, optimizer)
    saver = Saver(Path(folder), 3, None, 60)
    saver.begin(state(seed), "steps: 1\n", module.state_dict(), checkpoint.optimizer_tensors(optimizer))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    outcome = saver.take()
    assert outcome is not None and saver.take() is None
    return expected, outcome.failure, optimizer.param_groups[0]["lr"]


def read_sharded(path: str, mesh_shape: tuple[int, ...]) -> dict[str, Tensor]:
    module, optimizer = toy(mesh_shape, 99)
    checkpoint.load_networks(module, Path(path))
    checkpoint.load_optimizer(optimizer, Path(path))
    for name, parameter in module.named_parameters():
        assert sharding.is_sharded(parameter) == (mesh_shape != (1,) and name in SHAPES)
        assert sharding.is_sharded(optimizer.state[parameter]["exp_avg"]) == sharding.is_sharded(parameter)
    return contents(module, optimizer)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not [key for key, value in expected.items() if found[key].dtype != value.dtype]


@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)], ids=["fsdp on 4", "hsdp 2 x 2"])
def test_saved_sharded_and_read_by_any_number_of_ranks(mesh_shape: tuple[int, ...], tmp_path: Path) -> None:
    (expected, failure, _), *others = run_ranks(4, write_sharded, str(tmp_path), mesh_shape, 7)
    assert not failure and not any(other[1] for other in others)
    path = tmp_path / "step_00000007"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    writers = 4 if mesh_shape == (4,) else 2
    parts = [f"{group}-rank-{rank:05d}.safetensors" for group in ("model", "optimizer") for rank in range(writers)]
    assert sorted(entry.name for entry in path.iterdir()) == sorted([*parts, "config.yaml", "index.json", "state.json"])
    checkpoint.verify(path)
    assert checkpoint.latest(tmp_path) == path and checkpoint.read_state(path).world_size == 4
    whole = checkpoint.read_tensors(path, "model") | checkpoint.read_tensors(path, "optimizer")
    assert_equal(whole, expected)
    assert checkpoint.read_tensors(path, "model", "e").keys() == {"even", "empty_rank"}
    written = [load_file(path / f"model-rank-{rank:05d}.safetensors") for rank in range(writers)]
    assert sum(part.numel() for tensors in written for part in tensors.values()) == sum(
        value.numel() for key, value in expected.items() if "/" not in key
    ), "every element once"
    assert_equal(read_sharded(str(path), (1,)), expected)
    for size, layouts in ((2, [(2,)]), (4, [(4,), (2, 2)])):
        for layout in layouts:
            for found in run_ranks(size, read_sharded, str(path), layout):
                assert_equal(found, expected)


def test_saved_by_one_process_and_read_sharded(tmp_path: Path) -> None:
    expected, failure, _ = write_sharded(str(tmp_path), (1,), 3)
    assert not failure
    path = tmp_path / "step_00000003"
    assert {entry.name for entry in path.iterdir()} == {
        "config.yaml", "model.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip
    assert json.loads((path / "state.json").read_text())["format"] == 1
    for found in run_ranks(4, read_sharded, str(path), (4,)):
        assert_equal(found, expected)


def test_the_file_is_the_same_as_the_synchronous_one(tmp_path: Path) -> None:
    module, optimizer = toy((1,), 5)
    moments = checkpoint.optimizer_tensors(optimizer)
    path = checkpoint.save(tmp_path / "a", state(5), "steps: 1\n", module.state_dict(), moments)
    saver = Saver(tmp_path / "b", 3, None, 60)
    saver.begin(state(5), "steps: 1\n", module.state_dict(), moments)
    assert saver.take() == (5, "")
    for name in ("model.safetensors", "optimizer.safetensors", "config.yaml", "state.json"):
        assert (path / name).read_bytes() == (tmp_path / "b" / path.name / name).read_bytes()
    assert (path / "model.safetensors").read_bytes() == save(dict(module.state_dict()))


@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
@pytest.mark.parametrize("name", ["model-rank-00002.safetensors", "optimizer-rank-00001.safetensors", "index.json"])
def test_a_damaged_part_is_named(name: str, damage: str, sharded: Path, tmp_path: Path) -> None:
    path = tmp_path / sharded.name
    path.mkdir()
    for file in sharded.iterdir():
        content = file.read_bytes()
        if file.name != name:
            (path / file.name).write_bytes(content)
        elif damage != "missing":
            (path / name).write_bytes(content[:-1] if damage == "cut off" else content[:-1] + b"?")
    expected = {"missing": "is missing", "cut off": "bytes instead of", "changed": "checksum"}[damage]
    with pytest.raises(CheckpointError, match=f"{name}.*{expected}") as caught:
        checkpoint.latest(tmp_path)
    if damage == "missing" and name != "index.json":
        assert f"the part of rank {int(name[-13])} is missing" in str(caught.value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(4, write_sharded, str(folder), (4,), 7)
    return folder / "step_00000007"


def test_another_shape_or_name_is_told_before_anything_is_loaded(sharded: Path) -> None:
    module, optimizer = toy((1,), 1)
    before = contents(module, optimizer)
    module.register_buffer("surplus", torch.zeros(1))
    module.even = nn.Parameter(torch.zeros(9, 3))
    with pytest.raises(CheckpointError, match=r"missing|unexpected") as caught:
        checkpoint.load_networks(module, sharded)
    assert "missing surplus" in str(caught.value) or "surplus" in str(caught.value)
    assert "even is (8, 3) instead of (9, 3)" in str(caught.value)
    assert torch.equal(module.uneven, before["uneven"])


def train_fsdp(folder: str, hybrid: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FSDP2's own sharding: a step, a save, a step; and the second step again from the checkpoint: both ends, whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def built(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        size = distributed.world_size()
        names = ("replicate", "shard") if hybrid else ("shard",)
        mesh = init_device_mesh("cpu", (size // 2, 2) if hybrid else (size,), mesh_dim_names=names)
        for layer in module:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        named = [(name, parameter, ParameterRule(1.0, 1.0, False)) for name, parameter in module.named_parameters()]
        optimizer = build_optimizer(named, name="adamw", betas=(0.9, 0.999), eps=1e-8)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        return module, optimizer

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        torch.manual_seed(100 * number + distributed.rank())
        module(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = built(0)
    step(module, optimizer, 1)
    saver = Saver(Path(folder), 3, None, 60)
    saver.begin(state(1), "", module.state_dict(), checkpoint.optimizer_tensors(optimizer))
    step(module, optimizer, 2)
    assert saver.take() == (1, "")
    again, its_optimizer = built(1)
    checkpoint.load_networks(again, Path(folder) / "step_00000001")
    checkpoint.load_optimizer(its_optimizer, Path(folder) / "step_00000001")
    step(again, its_optimizer, 2)
    return contents(module, optimizer), contents(again, its_optimizer)


@pytest.mark.parametrize("hybrid", [False, True], ids=["fsdp", "hsdp"])
def test_fsdp_goes_on_bit_for_bit(hybrid: bool, tmp_path: Path) -> None:
    for first, second in run_ranks(4, train_fsdp, str(tmp_path), hybrid):
        assert_equal(first, second)
    assert (tmp_path / "step_00000001/model-rank-00001.safetensors").is_file()
    assert (tmp_path / "step_00000001/model-rank-00002.safetensors").is_file() != hybrid


def layouts_that_are_refused() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    told = []
    for tensor in (
        distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0), Shard(1)]),
        DTensor.from_local(torch.zeros(4), init_device_mesh("cpu", (4,)), [Partial()]),
    ):
        try:
            tensor_files.own_part(tensor)
        except ValueError as error:
            told.append(str(error))
    return told


def test_layouts_that_cannot_be_saved() -> None:
    (told, *_) = run_ranks(4, layouts_that_are_refused)
    assert len(told) == 2 and all("expected one Shard, or none, and replicas" in text for text in told)


def reshard(source: str, folder: str) -> None:
    """Writes a checkpoint again as if its run were sharded over these ranks."""
    from dataclasses import replace

    path, size = Path(source), distributed.world_size()
    groups = []
    for group in ("model", "optimizer"):
        tensors = checkpoint.read_tensors(path, group)
        groups.append({key: _laid_out(value, (size,)) if value.ndim else value for key, value in tensors.items()})
    saver = Saver(Path(folder), 3, None, 60)
    saver.begin(replace(checkpoint.read_state(path), world_size=size), (path / "config.yaml").read_text(), *groups)
    outcome = saver.take()
    assert outcome is not None and not outcome.failure


def test_a_run_of_one_process_goes_on_from_sharded_files_and_encoders_read_them(tmp_path: Path) -> None:
    quiet = ["tensorboard=false", "monitor_every=0", "log_every=1", "save_every=1", "steps=3"]
    for name in ("whole", "again"):
        assert main([str(SMOKE), f"run_dir={tmp_path / name}", *quiet]) == 0
    checkpoints = tmp_path / "again/checkpoints"
    plain = tmp_path / "plain"
    (checkpoints / "step_00000001").rename(plain)
    for path in checkpoints.iterdir():
        shutil.rmtree(path)
    run_ranks(2, reshard, str(plain), str(checkpoints))
    one, two = (Encoder.load(path).network.state_dict() for path in (plain, checkpoints / "step_00000001"))
    assert_equal(one, two)
    found = read(InitConfig(path=tmp_path / "again"))
    assert_equal(found.tensors, one)
    assert found.sha256 != read(InitConfig(path=plain)).sha256 == sha256(plain / "model.safetensors")
    assert main([str(SMOKE), f"run_dir={tmp_path / 'again'}", *quiet]) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "again", 3)


# -- while the run goes on -------------------------------------------------------------------------------------------


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Writing waits until the test lets it go on."""
    let_go = threading.Event()
    original = tensor_files.write

    def wait(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert let_go.wait(60)
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write", wait)
    try:
        yield let_go.set
    finally:
        let_go.set()


def test_the_step_goes_on_while_it_is_written_and_changes_nothing_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, weight = Saver(tmp_path, 1, None, 60), torch.arange(100.0)
    for step in (1, 2):
        with held(monkeypatch) as let_go:
            saver.begin(state(step), "", {"a": weight}, {})
            weight += 1000
            assert not saver.has_ended()
            assert checkpoint.latest(tmp_path) == (None if step == 1 else tmp_path / "step_00000001")
            let_go()
            assert saver.take() == (step, "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"], "pruned after the rename"
    assert torch.equal(checkpoint.read_tensors(tmp_path / "step_00000002", "model")["a"], torch.arange(1000.0, 1100.0))


def test_the_copy_is_in_the_same_memory_each_time(tmp_path: Path) -> None:
    saver, weight = Saver(tmp_path, 1, None, 60), torch.arange(100.0)
    places = set()
    for step in (1, 2, 3):
        saver.begin(state(step), "", {"a": weight}, {})
        saver.take()
        places |= {buffer.data_ptr() for buffer in saver._buffers.values()}
    assert len(places) == 1


def test_a_save_starts_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, CPython's `Thread.start` may wait for ever for a thread that could not begin."""

    def refuse(self: threading.Thread) -> None:
        raise AssertionError("a save in which memory is short would hang here")

    saver = Saver(tmp_path, 1, None, 60)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for step in (1, 2):
        saver.begin(state(step), "", {"a": torch.ones(3)}, {})
        assert saver.take() == (step, "")


def test_the_thread_of_saves_ends_with_the_saver(tmp_path: Path) -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "saving"}
    saver = Saver(tmp_path, 1, None, 60)
    (own,) = {thread for thread in threading.enumerate() if thread.name == "saving"} - before
    saver.begin(state(1), "", {"a": torch.ones(3)}, {})
    assert saver.take() == (1, "")
    del saver
    gc.collect()
    own.join(20)
    assert not own.is_alive()


def test_an_error_of_the_run_waits_for_the_save_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, 1, None, 60)
    with held(monkeypatch) as let_go:
        saver.begin(state(1), "", {"a": torch.zeros(3)}, {})
        threading.Timer(0.2, let_go).start()
        with pytest.raises(ValueError, match="told to"), saver.finished():
            raise ValueError("told to")
        assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"
        with pytest.raises(KeyboardInterrupt), saver.finished():
            raise KeyboardInterrupt


def both_know(folder: str) -> bool:
    saver = Saver(Path(folder), 1, None, 60)
    saver.begin(state(1), "", {"a": torch.zeros(3)}, {})
    deadline = time.monotonic() + 60
    while not saver.has_ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = saver.has_ended()
    return saver.take() == (1, "") and ended and not saver.has_ended()


def test_every_rank_knows_when_a_save_has_ended(tmp_path: Path) -> None:
    assert run_ranks(2, both_know, str(tmp_path)) == [True, True]


def fail_on(folder: str, rank: int, name: str) -> tuple[Any, list[str], int]:
    """One save that one rank cannot write, and one that all can."""
    saver = Saver(Path(folder), 3, None, 20)
    model = {name: _laid_out(torch.arange(8.0), (distributed.world_size(),))}
    original = tensor_files.save_file

    def broken(tensors: dict[str, Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    if distributed.rank() == rank:
        tensor_files.save_file = broken
    try:
        saver.begin(state(1), "", model, {})
        first = saver.take()
    finally:
        tensor_files.save_file = original
    left = sorted(entry.name for entry in Path(folder).iterdir()) if distributed.rank() == 0 else []
    failed = saver.in_a_row
    distributed.barrier()
    saver.begin(state(2), "", model, {})
    assert saver.take() == (2, "") and saver.in_a_row == 0
    return first, left, failed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_is_told_to_all_and_nothing_appears(rank: int, tmp_path: Path) -> None:
    found = run_ranks(2, fail_on, str(tmp_path), rank, "a")
    file = tmp_path / f".step_00000001.part/model-rank-{rank:05d}.safetensors"
    assert [outcome for outcome, _, _ in found] == [(1, f"rank {rank}: {file}: No space left on device")] * 2
    assert found[0][1] == [] and [failed for _, _, failed in found] == [1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]


def late(folder: str) -> tuple[Any, bool]:
    """Rank 1 takes longer to write than it may."""
    saver = Saver(Path(folder), 3, None, 1.0)
    original, let_go = tensor_files.save_file, threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path) -> None:
        let_go.wait(30)
        original(tensors, path)

    if distributed.rank() == 1:
        tensor_files.save_file = slow
    try:
        saver.begin(state(1), "", {"a": _laid_out(torch.arange(8.0), (2,))}, {})
        if distributed.rank() == 1:
            threading.Timer(2.0, let_go.set).start()
        outcome = saver.take()
    finally:
        tensor_files.save_file = original
    return outcome, any(Path(folder).glob("step_*"))


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    for outcome, is_there in run_ranks(2, late, str(tmp_path)):
        assert "rank 1 has not written its part within 1 s" in outcome.failure and not is_there


def alone(folder: str) -> Any:
    """Rank 1 does nothing of a save that rank 0 writes, as if it were gone."""
    saver = Saver(Path(folder), 3, None, 10)
    if distributed.rank() == 0:
        saver.begin(state(1), "", {"a": torch.arange(8.0)}, {})
        saver.wait()
    outcome, saver._outcome = saver._outcome, None
    distributed.barrier()
    return outcome


def test_rank_0_finishes_alone_what_it_writes_alone(tmp_path: Path) -> None:
    assert run_ranks(2, alone, str(tmp_path)) == [(1, ""), None]
    checkpoint.verify(tmp_path / "step_00000001")


def write_apart(folder: str) -> Any:
    """Each rank in a folder of its own, as on machines without a shared file system."""
    own = Path(folder) / str(distributed.rank())
    (own / ".step_00000001.part").mkdir(parents=True)
    saver = Saver(own, 3, None, 20)
    saver.begin(state(1), "", {"a": _laid_out(torch.arange(8.0), (2,))}, {})
    return saver.take()


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    for outcome in run_ranks(2, write_apart, str(tmp_path)):
        assert "rank 1 has written" in outcome.failure
        assert "run_dir must be on a file system that all machines share" in outcome.failure


def test_a_failure_to_prune_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted", "step_00000001")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    saver = Saver(tmp_path, 1, None, 60)
    saver.begin(state(1), "", {"a": torch.zeros(3)}, {})
    assert saver.take() == (1, "")
    assert "older checkpoints could not be removed: step_00000001: Operation not permitted" in caplog.text


def test_a_copy_that_does_not_fit_is_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, 1, None, 60)
    huge = torch.zeros(1).expand(1 << 50)  # whose copy is 4 PB
    saver.begin(state(1), "", {"a": huge}, {})
    outcome = saver.take()
    assert outcome is not None and outcome.failure.startswith("rank 0: no memory for a copy of what it writes (")


@pytest.mark.gpu
def test_copies_of_cuda_tensors_are_of_the_moment(tmp_path: Path) -> None:
    weight = torch.zeros(1 << 24, device="cuda")
    saver = Saver(tmp_path, 9, None, 60)
    for step in range(1, 4):
        weight.fill_(step)
        saver.begin(state(step), "", {"a": weight}, {})
        weight.fill_(-1)
        assert saver.take() == (step, "")
        assert checkpoint.read_tensors(tmp_path / f"step_{step:08d}", "model")["a"].eq(step).all()
    assert all(buffer.is_pinned() for buffer in saver._buffers.values())
