"""Six optimiser steps against DINOv2's own losses, heads, masks, parameter groups and outputs (tests/data/conformance)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssl_platform import optim
from ssl_platform.backbones import Input
from ssl_platform.backbones.vit import VisionTransformer
from ssl_platform.heads.projection import ProjectionHead
from ssl_platform.objectives import Forward, Objective
from ssl_platform.objectives._targets import build_targets
from ssl_platform.objectives.dino import Dino
from ssl_platform.objectives.ibot import Ibot
from ssl_platform.objectives.koleo import Koleo
from ssl_platform.patch_embed import GridPatchEmbed
from ssl_platform.step import Parts, train_step
from ssl_platform.student_teacher import Role, StudentTeacher
from ssl_platform.views import Batch, ViewGroup

FOLDER = Path(__file__).parent / "data" / "conformance"
CASES = ("dinov2_centering_shared", "dinov2_sinkhorn_separate_registers")


class Case:
    """One case's settings, tensors and our parts built for it."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.settings: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.steps: list[dict[str, Any]] = self.settings["steps"]
        self.step = -1
        self.parts = self._parts()

    def _vit(self) -> VisionTransformer:
        s = self.settings
        grid = (s["global_px"] // s["patch_size"],) * 2
        return VisionTransformer(
            GridPatchEmbed(3, s["embed_dim"], (s["patch_size"],) * 2, grid),
            grid,
            embed_dim=s["embed_dim"],
            depth=s["depth"],
            num_heads=s["num_heads"],
            hidden_dim=s["embed_dim"] * s["mlp_ratio"],
            num_registers=s["registers"],
            interpolation="dinov2",
            interpolation_offset=s["interpolate_offset"],
        )

    def _head(self) -> ProjectionHead:
        s = self.settings
        return ProjectionHead(
            s["embed_dim"], s["prototypes"], s["head_hidden"], s["head_bottleneck"], s["head_layers"], "weight_norm"
        )

    def weights(self, kind: str, part: str) -> dict[str, Tensor]:
        """`init` or `teacher_final` of `backbone`, `dino_head` or `ibot_head`, under our names."""
        prefix = f"{kind}/{part}."
        found = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        return {k.replace("register_tokens", "reg_token"): v for k, v in found.items()}

    def _parts(self) -> Parts:
        s = self.settings
        heads = ["dino"] + ["ibot"] * s["separate_ibot_head"]
        networks = {"student": self._vit(), "teacher": self._vit()}
        head_copies = {head: {name: self._head() for name in networks} for head in heads}
        for name, network in networks.items():
            network.load_state_dict(self.weights("init", "backbone"))
            for head in heads:
                head_copies[head][name].load_state_dict(self.weights("init", f"{head}_head"))
        self.student_teacher = StudentTeacher(
            networks,
            {"student": Role("grad"), "teacher": Role("ema", "student", lambda step: self.steps[step]["momentum"])},
            head_copies,
            self._objectives(heads[-1]),
            {"dino": lambda step: 1.0, "ibot": lambda step: 1.0, "koleo": lambda step: s["koleo_weight"]},
        )
        rules = list(self.student_teacher.trained_parameters(s["layerwise_decay"], s["patch_embed_lr_mult"]))
        self.rules = {name: rule for name, _, rule in rules}
        return Parts(
            student_teacher=self.student_teacher,
            module=self.student_teacher,
            optimizer=optim.build_optimizer(rules, name="adamw", betas=tuple(s["betas"]), eps=1e-8),
            trained=self.student_teacher.trained_modules(),
            lr=lambda step: self.steps[step]["lr"],
            weight_decay=lambda step: self.steps[step]["weight_decay"],
            clip_grad=s["clip_grad"],
            freeze_last_layer_steps=sum(step["freeze_last_layer"] for step in self.steps),
            accumulate=1,
            seed=0,
            device=torch.device("cpu"),
        )

    def _objectives(self, ibot_head: str) -> dict[str, Objective]:
        s = self.settings
        kind = "centering" if s["centering"] == "centering" else "sinkhorn"

        def targets() -> torch.nn.Module:
            return build_targets(kind, s["prototypes"], s["center_momentum"], s["sinkhorn_iterations"])

        student, teacher = Forward("student", "global", "block"), Forward("teacher", "global")
        temps = {"student_temp": s["student_temp"], "teacher_temp": lambda step: self.steps[step]["teacher_temp"]}
        return {
            "dino": Dino(
                head="dino",
                teacher=teacher,
                students=[student, Forward("student", "local")],
                pairs="other",
                targets=targets(),
                **temps,
            ),
            "ibot": Ibot(head=ibot_head, teacher=teacher, student=student, targets=targets(), **temps),
            "koleo": Koleo(student, everywhere=False),
        }

    def batch(self, step: int) -> Batch:
        """The crops of a step; the files hold them crop-major."""
        batch_size, num_local = self.settings["batch"], self.settings["n_local"]
        globals_ = self.tensors[f"step{step}/global_crops"].unflatten(0, (2, batch_size))
        locals_ = self.tensors[f"step{step}/local_crops"].unflatten(0, (num_local, batch_size))
        masks = self.tensors[f"step{step}/masks"].unflatten(0, (2, 1, batch_size))
        groups = {
            "global": ViewGroup(globals_, torch.arange(2), {"block": masks}),
            "local": ViewGroup(locals_, torch.arange(2, 2 + num_local)),
        }
        ids = torch.arange(batch_size)
        return Batch(groups, [str(i) for i in range(batch_size)], ids, ids - ids - 1, step)


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest) -> tuple[Case, list[Any]]:
    case = Case(request.param)
    results = [
        train_step(case.parts, iter([case.batch(step)]), step, ["dino", "ibot", "koleo"])
        for step in range(len(case.steps))
    ]
    return case, results


def test_every_loss_term_of_every_step(trained: tuple[Case, list[Any]]) -> None:
    case, results = trained
    assert len(results) == 6
    for expected, result in zip(case.steps, results, strict=True):
        found = {
            "dino_local": result.terms["dino_local"],
            "dino_global": result.terms["dino_global"],
            "ibot": result.terms["ibot"],
            "koleo_weighted": result.terms["koleo"] * case.settings["koleo_weight"],
            "total": result.loss,
        }
        for name, value in found.items():
            assert value.item() == pytest.approx(expected[name], rel=1e-4), name
        assert not result.skipped


def test_gradient_norms_before_clipping(trained: tuple[Case, list[Any]]) -> None:
    case, results = trained
    ours = {"backbone": "student", "dino_head": "dino_head", "ibot_head": "ibot_head"}
    for expected, result in zip(case.steps, results, strict=True):
        norms = expected["grad_norm_before_clip"]
        assert set(result.grad_norms) == {ours[name] for name in norms}
        for name, value in norms.items():
            assert result.grad_norms[ours[name]].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("name", CASES)
def test_parameter_groups_exactly(name: str) -> None:
    case = Case(name)
    expected = {
        entry["name"].replace("register_tokens", "reg_token"): (
            entry["lr_multiplier"],
            entry["wd_multiplier"],
            entry["is_last_layer"],
        )
        for entry in case.settings["param_groups"]
    }
    ours = {
        full.replace("networks.student.", "backbone.").replace("heads.", "").replace(".student.", "_head."): tuple(
            rule
        )[:3]
        for full, rule in case.rules.items()
    }
    assert ours.keys() == expected.keys()
    for key, rule in expected.items():
        assert ours[key] == pytest.approx(rule, rel=1e-12), key


def test_teacher_outputs_after_six_steps(trained: tuple[Case, list[Any]]) -> None:
    case, _ = trained
    teacher = case.student_teacher.networks["teacher"]
    for shape in ("square", "rect"):
        with torch.no_grad():
            [features] = teacher([Input(case.tensors[f"probe/{shape}"][None])])
        found = {"cls": features.cls[0], "patch": features.patches[0]}
        if case.settings["registers"]:
            assert features.registers is not None
            found["reg"] = features.registers[0]
        for name, value in found.items():
            torch.testing.assert_close(value, case.tensors[f"expected/{shape}_{name}"], atol=1e-4, rtol=0)


def test_teacher_weights_after_six_steps(trained: tuple[Case, list[Any]]) -> None:
    case, _ = trained
    parts = {"backbone": case.student_teacher.networks["teacher"]}
    parts |= {f"{head}_head": copies["teacher"] for head, copies in case.student_teacher.heads.items()}  # type: ignore[index]
    for part, module in parts.items():
        expected = case.weights("teacher_final", part)
        state = module.state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4, msg=f"{part}.{name}")
