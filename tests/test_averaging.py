"""ssl-average against means in float64; what it cannot average; and that evaluation, export and `init` take the result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_platform import averaging, checkpoint, export
from ssl_platform.backbones import Input
from ssl_platform.encoder import Encoder
from ssl_platform.recipe import InitConfig, build_networks
from ssl_platform.weights import read
from tests.ranks import run_ranks
from tests.test_export import STATISTICS, VIT, views, write_run
from tests.test_speaker_training import trained, trained_on_ranks, write_config

RESNET = {"name": "timm_models", "model": "resnet10t"}


def models(run: Path) -> list[dict[str, Tensor]]:
    return [load_file(path / "model.safetensors") for path in checkpoint.checkpoints(run / "checkpoints")]


def ssl_average(*arguments: object) -> int:
    return averaging.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an ECAPA-TDNN with checkpoints after 2, 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("speakers")
    assert trained(str(write_config(folder)), str(folder / "run")) == 0
    return folder / "run"


def test_weights_and_running_statistics_are_means_and_the_rest_is_the_newest(speakers: Path, tmp_path: Path) -> None:
    out = tmp_path / "average"
    assert ssl_average(speakers, "--last", 2, "--out", out) == 0
    _, older, newest = models(speakers)
    found = load_file(out / "model.safetensors")
    assert found.keys() == newest.keys()
    for key, value in found.items():
        if key.startswith("objectives."):
            assert torch.equal(value, newest[key]), key
        elif key.endswith("num_batches_tracked"):
            assert torch.equal(value, newest[key]) and not torch.equal(value, older[key]), key
        else:
            expected = (older[key].double() + newest[key].double()) / 2
            assert torch.equal(value, expected.float()), key
    moved = "networks.teacher.stem.norm.running_var"
    assert not torch.equal(found[moved], newest[moved])
    state = checkpoint.read_state(out)
    assert state.averaged == [4, 6] and state.step == 6
    checkpoint.verify(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["average"]


def test_rounding_happens_once(tmp_path: Path) -> None:
    """In float32 a running sum of 1 and ten times 2^-24 would stay at 1."""
    run = tmp_path / "run"
    write_run(run, VIT, steps=tuple(range(1, 9)))
    for number, path in enumerate(checkpoint.checkpoints(run / "checkpoints")):
        rewrite(path, {"heads.dino.student.weight": torch.full((3,), 1.0 if number == 0 else 2**-24)})
    assert ssl_average(run, "--last", 8, "--out", tmp_path / "out") == 0
    found = load_file(tmp_path / "out/model.safetensors")["heads.dino.student.weight"]
    assert torch.equal(found, torch.full((3,), (1 + 7 * 2**-24) / 8, dtype=torch.float64).float())
    assert found[0] != 1 / 8


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces tensors of a checkpoint, which stays a whole one."""
    file = path / "model.safetensors"
    save_file(load_file(file) | tensors, file)
    state = json.loads((path / "state.json").read_text())
    state["files"]["model.safetensors"] = checkpoint.fingerprint(file)
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.slow
def test_checkpoints_in_shards_are_put_together(speakers: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    sharded = tmp_path / "sharded"
    run_ranks(2, trained_on_ranks, config, str(sharded), "parallel.method=fsdp", timeout=250)
    assert (sharded / "checkpoints/step_00000006/model-rank-00001.safetensors").is_file()
    assert ssl_average(sharded, "--last", 3, "--out", tmp_path / "out") == 0
    found = load_file(tmp_path / "out/model.safetensors")
    parts = [checkpoint.read_tensors(p, "model") for p in checkpoint.checkpoints(sharded / "checkpoints")]
    key = "networks.teacher.embed.weight"
    assert torch.equal(found[key], (sum(part[key].double() for part in parts) / 3).float())  # type: ignore[union-attr]
    assert found.keys() == models(speakers)[-1].keys()


# -- who takes it ------------------------------------------------------------------------------------------------------


def test_evaluation_and_export_take_it_like_any_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "average"
    recipe = write_run(run, RESNET, steps=(5, 7, 9))
    assert ssl_average(run, "--last", 3, "--out", out) == 0
    assert "average: the mean of 3 checkpoints, of steps 5, 7, 9" in capsys.readouterr().out
    expected = build_networks(recipe.networks, recipe.seed, recipe.modality.build(STATISTICS))["teacher"].eval()
    prefix, tensors = "networks.teacher.", load_file(out / "model.safetensors")
    expected.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    encoder = Encoder.load(out)
    with torch.inference_mode():
        assert torch.equal(encoder(views()).cls, expected([Input(views()[None])])[0].cls[0])
    assert not torch.equal(encoder(views()).cls, Encoder.load(run)(views()).cls)
    assert export.main([str(out), "--format", "timm", "--out", str(tmp_path / "timm")]) == 0
    assert torch.equal(Encoder.load(tmp_path / "timm")(views()).cls, encoder(views()).cls)


def test_a_run_can_start_from_it_and_cannot_be_resumed_from_it(
    speakers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "average"
    assert ssl_average(speakers, "--last", 3, "--out", out) == 0
    weights = read(InitConfig(path=out))
    assert weights.heads["dino"]["mlp.norm_0.running_mean"].isfinite().all()
    config = str(write_config(tmp_path / "new"))
    start = f"networks.student.init={{path: {out}, heads: true}}"
    assert trained(config, str(tmp_path / "new/run"), start, "optim.lr=0.0", "steps=2") == 0
    begun = load_file(tmp_path / "new/run/checkpoints/step_00000002/model.safetensors")
    averaged = load_file(out / "model.safetensors")
    for key in ("stem.conv.weight", "layers.1.res2.layers.0.norm.weight"):
        for network in ("student", "teacher"):
            torch.testing.assert_close(begun[f"networks.{network}.{key}"], averaged[f"networks.teacher.{key}"])
    resumed = tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    out.rename(resumed / "checkpoints/step_00000006")
    capsys.readouterr()
    assert trained(config, str(resumed)) == 1
    assert "is a mean made by ssl-average, without an optimiser's state" in capsys.readouterr().err


def test_ecapa_is_no_timm_model(speakers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(speakers), "--format", "timm", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        "the network is a EcapaTdnn, which timm does not have; ssl-eval and ssl_platform.encoder.Encoder.load" in error
    )
    assert not (tmp_path / "out").exists()
    encoder = Encoder.load(speakers)
    assert encoder(torch.zeros(2, 1, 24, 16)).cls.shape == (2, 10)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert ssl_average(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ssl-average: ") and "Traceback" not in error
    return error


def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, VIT, steps=(5, 7, 9))

    def error(path: Path, last: int, to: Path = out) -> str:
        return refused(path, "--last", last, "--out", to, capsys=capsys)

    expected = (
        "has 3 checkpoints (step_00000005 to step_00000009), --last 10 needs as many; ask for fewer, or train with"
    )
    assert expected in error(run, 10)
    assert "--last 0: expected 1 or more" in error(run, 0)
    assert "not a run folder with checkpoints" in error(tmp_path / "nowhere", 2)
    assert "step_00000005: is a checkpoint; name the run folder" in error(run / "checkpoints/step_00000005", 2)
    assert f"{run} exists; choose another --out" in error(run, 2, run)
    five, seven, nine = checkpoint.checkpoints(run / "checkpoints")
    rewrite(seven, {"networks.teacher.norm.weight": torch.ones(7)})
    assert (
        "step_00000007: holds other networks than step_00000009: networks.teacher.norm.weight is (7,) instead of (24,); "
        "only checkpoints of one run"
    ) in error(run, 2)
    rewrite(seven, {"networks.teacher.norm.weight": torch.full((24,), torch.nan)})
    assert "networks.teacher.norm.weight: has values that are not finite in one of the checkpoints" in error(run, 2)
    rewrite(seven, {"networks.teacher.norm.weight": torch.ones(24), "networks.extra.weight": torch.ones(2)})
    assert "networks.extra.weight is (2,) instead of missing" in error(run, 2)
    file = five / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "step_00000005/model.safetensors: " in error(run, 3)
    file.unlink()
    assert "step_00000005: model.safetensors is missing: copy the whole folder" in error(run, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and nine.is_dir()


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", VIT, steps=(5, 7))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    message = refused(tmp_path / "run", "--last", 2, "--out", tmp_path / "out", capsys=capsys)
    assert "No space left on device" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_help_teaches_and_does_not_wait_for_torch() -> None:
    code = "import sys; from ssl_platform.averaging import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ssl-average runs/voices --last 10 --out runs/voices/average" in done.stdout
