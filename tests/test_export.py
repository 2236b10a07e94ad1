"""Encoders from checkpoints, and exports that timm loads with the same embeddings."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_platform import checkpoint, export
from ssl_platform.backbones import Input
from ssl_platform.checkpoint import TrainState
from ssl_platform.config import to_yaml, validate
from ssl_platform.encoder import Encoder
from ssl_platform.recipe import Recipe, build_networks

STATISTICS = {"mean": [0.6, 0.5, 0.4], "std": [0.2, 0.3, 0.1]}
VIT = {"name": "vit", "embed_dim": 24, "depth": 2, "num_heads": 2}


def recipe_of(backbone: dict[str, Any], **changes: Any) -> Recipe:
    modality = {
        "name": "image",
        "patch_size": 8,
        "crops": {
            "global": {"num": 2, "size": 32, "scale": [0.3, 1]},
            "local": {"num": 2, "size": 16, "scale": [0.1, 0.3]},
        },
    }
    data = {
        "run_dir": "unused",
        "steps": 10,
        "batch_size": 4,
        "seed": 3,
        "modality": modality,
        "data": {"shards": "unused"},
        "networks": {
            "student": {"backbone": backbone},
            "teacher": {"update": "ema", "of": "student", "buffers": "copy"},
        },
        "objectives": {},
    }
    return validate(Recipe, data | changes)


def write_run(run: Path, backbone: dict[str, Any], steps: tuple[int, ...] = (5,), **changes: Any) -> Recipe:
    """A run folder with checkpoints whose networks have moved off their initial values."""
    recipe = recipe_of(backbone, **changes)
    modality = recipe.modality.build(STATISTICS)
    for step in steps:
        networks = torch.nn.ModuleDict(build_networks(recipe.networks, recipe.seed, modality))
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in networks.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        state = TrainState(
            step=step, batch_size=4, accumulate=1, world_size=1, seed=recipe.seed, statistics=STATISTICS, versions={}
        )
        tensors = {f"networks.{key}": value for key, value in networks.state_dict().items()}
        tensors["heads.dino.student.weight"] = torch.zeros(3)
        checkpoint.save(run / "checkpoints", state, to_yaml(recipe), tensors, {})
    return recipe


def views(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def expected(run: Path, recipe: Recipe, step: int, network: str) -> Tensor:
    """The embeddings of a network of a checkpoint, without Encoder."""
    built = build_networks(recipe.networks, recipe.seed, recipe.modality.build(None))[network].eval()
    tensors = load_file(run / f"checkpoints/step_{step:08d}/model.safetensors")
    prefix = f"networks.{network}."
    built.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    with torch.inference_mode():
        return built([Input(views()[None])])[0].cls[0]


# -- Encoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_an_encoder_is_the_network_of_the_checkpoint(tmp_path: Path, network: str) -> None:
    recipe = write_run(tmp_path, VIT, steps=(5, 7))
    newest = Encoder.load(tmp_path, network=network)
    older = Encoder.load(tmp_path / "checkpoints/step_00000005", network=network)
    features = newest(views())
    assert features.cls.shape == (3, 24) and features.patches.shape == (3, 16, 24) and newest.embed_dim == 24
    assert torch.equal(features.cls, expected(tmp_path, recipe, 7, network))
    assert torch.equal(older(views()).cls, expected(tmp_path, recipe, 5, network))
    assert not newest.training and not any(p.requires_grad for p in newest.parameters())
    assert newest.modality.description()["mean"] == pytest.approx(STATISTICS["mean"])
    (layer,) = newest(views(), layers=[0]).layers
    assert layer[0].shape == (3, 24) and layer[1].shape == (3, 16, 24)


def test_the_random_baseline_is_the_runs_own_initialisation(tmp_path: Path) -> None:
    recipe = write_run(tmp_path, VIT)
    before = torch.get_rng_state()
    baseline = Encoder.load(tmp_path, random_init=True)
    assert torch.equal(before, torch.get_rng_state())
    initial = build_networks(recipe.networks, recipe.seed, recipe.modality.build(None))["teacher"].eval()
    assert torch.equal(baseline(views()).cls, initial([Input(views()[None])])[0].cls[0])
    assert export.main([str(tmp_path), "--format", "timm", "--out", str(tmp_path / "out")]) == 0
    exported = Encoder.load(tmp_path / "out", random_init=True)
    assert torch.equal(exported(views()).cls, baseline(views()).cls)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    recipe = write_run(tmp_path, VIT, steps=(5, 7))
    file = tmp_path / "checkpoints/step_00000007/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(Encoder.load(tmp_path)(views()).cls, expected(tmp_path, recipe, 5, "teacher"))
    with pytest.raises(ValueError, match="step_00000007"):
        Encoder.load(tmp_path / "checkpoints/step_00000007")


def test_folders_that_hold_no_encoder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        Encoder.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a run folder with a checkpoint .* nor an export"):
        Encoder.load(tmp_path)
    write_run(tmp_path / "run", VIT)
    with pytest.raises(ValueError, match="has no network 'techer', but student, teacher"):
        Encoder.load(tmp_path / "run", network="techer")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a whole export"):
        Encoder.load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no section 'ssl_platform', so it was not written by ssl-export"):
        Encoder.load(tmp_path)


# -- export -----------------------------------------------------------------------------------------------------------

BACKBONES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit with registers": VIT | {"num_registers": 2},
    "vit with SwiGLU": VIT | {"ffn": "swiglu", "num_registers": 1},
    "vit with SwiGLU and no LayerScale": VIT | {"ffn": "swiglu", "layer_scale": None},
    "resnet": {"name": "timm_models", "model": "resnet18"},
    "timm vit": {
        "name": "timm_models",
        "model": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "depth": 1, "embed_dim": 24},
    },
}


@pytest.mark.parametrize("name", BACKBONES)
def test_an_export_is_the_encoder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    recipe = write_run(run, BACKBONES[name])
    assert export.main([str(run), "--format", "timm", "--out", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    text = capsys.readouterr().out
    assert f"{out}: teacher after 5 steps" in text
    assert "loaded back by timm with strict keys; 8 random inputs differ by at most" in text
    again, wanted = Encoder.load(out), expected(run, recipe, 5, "teacher")
    torch.testing.assert_close(again(views()).cls, wanted, atol=1e-5, rtol=1e-5)
    assert again.config == Encoder.load(run).config
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(views()), wanted, atol=1e-4, rtol=1e-4)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["mean"] == pytest.approx(STATISTICS["mean"])
    assert config["crop_pct"] == pytest.approx(32 / 37) and config["interpolation"] == "bicubic"
    finetuned = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5)
    assert finetuned(views()).shape == (3, 5)


def test_the_snippet_runs_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", VIT)
    assert export.main([str(tmp_path / "run"), "--format", "timm", "--out", str(tmp_path / "it's here")]) == 0
    text = capsys.readouterr().out
    code = text[text.index("import timm") :]
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    assert names["embeddings"].shape == (2, 24)
    assert "note: images of exactly the input size were shown as they are" in text


def test_other_channel_counts_are_exported(tmp_path: Path) -> None:
    statistics = {"mean": [0.5, 0.4, 0.3, 0.2, 0.1], "std": [0.1] * 5}
    recipe = recipe_of(VIT)
    five = recipe.modality.model_dump(mode="json") | {"channels": 5, **statistics}
    write_run(tmp_path / "run", VIT, modality=five)
    assert export.main([str(tmp_path / "run"), "--format", "timm", "--out", str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model(torch.zeros(1, 5, 32, 32)).shape == (1, 24)
    assert timm.data.resolve_model_data_config(model)["mean"] == pytest.approx(statistics["mean"])


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_it_is_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, VIT)
    command = [str(run), "--format", "timm", "--out", str(out)]
    assert export.main(command) == 0
    capsys.readouterr()
    assert export.main(command) == 2
    assert "exists; choose another --out, or add --overwrite" in capsys.readouterr().err
    assert export.main([*command, "--overwrite", "--network", "student"]) == 0
    assert json.loads((out / "config.json").read_text())["ssl_platform"]["encoder"]["network"] == "student"
    with pytest.raises(ValueError, match="holds the network 'student', not 'teacher'"):
        Encoder.load(out)
    (out / "thesis.txt").write_text("precious")
    capsys.readouterr()
    assert export.main([*command, "--overwrite"]) == 2
    assert "is not replaced, because it is no export: it holds thesis.txt" in capsys.readouterr().err
    assert (out / "thesis.txt").exists()


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", VIT)
    original = export._timm_model

    def wrong(network: torch.nn.Module) -> Any:
        model = original(network)
        model.state["blocks.0.attn.proj.weight"] = model.state["blocks.0.attn.proj.weight"].flip(0) * 50
        model.state["blocks.0.ls1.gamma"] = torch.ones(24)
        return model

    monkeypatch.setattr(export, "_timm_model", wrong)
    assert export.main([str(tmp_path / "run"), "--format", "timm", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert (
        "ssl-export: timm.create_model with strict keys gives other embeddings than the checkpoint: cosine" in message
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_networks_that_timm_cannot_express_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signal = {"name": "tests.probes.toy", "groups": ["global", "signal"]}
    networks = {"teacher": {"backbone": VIT, "inputs": "signal"}}
    write_run(tmp_path / "run", VIT, modality=signal, networks=networks)
    assert export.main([str(tmp_path / "run"), "--format", "timm", "--out", str(tmp_path / "out")]) == 2
    assert "only networks on 2-D patches can be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_help_teaches_and_does_not_wait_for_torch() -> None:
    code = "import sys; from ssl_platform.export import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ssl-export runs/skin --format timm --out skin-vit" in done.stdout
