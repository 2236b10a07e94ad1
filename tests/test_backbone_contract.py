"""What every backbone of the folder promises: walks `ssl_platform.backbones`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_platform.backbones import Input
from ssl_platform.backbones.timm_models import Config as TimmConfig
from ssl_platform.config import ConfigError, plugin_class, plugin_names, to_yaml, validate
from ssl_platform.modalities import GroupSpec
from ssl_platform.modalities.image import Config as ImageConfig
from tests.speech import Speech

PACKAGE = "ssl_platform.backbones"

CASES: dict[str, list[dict[str, Any]]] = {
    "vit": [
        {"embed_dim": 24, "depth": 2, "num_heads": 2, "drop_path": 0.2, "drop_path_schedule": "linear"},
        {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_registers": 2, "ffn": "swiglu", "layer_scale": None},
        {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_registers": 1, "mask_k_bias": True}
        | {"position": {"kind": "rope", "shift": 0.1, "rescale": 2.0}, "untied_norms": {"cls": True}},
    ],
    "timm_models": [
        {"model": "resnet18"},
        {"model": "mobilenetv3_small_050"},
        {"model": "vit_tiny_patch16_224", "kwargs": {"depth": 2, "embed_dim": 24, "patch_size": 8}},
        {"model": "swin_tiny_patch4_window7_224", "kwargs": {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 24}},
    ],
    "ecapa": [
        {"channels": 16, "scale": 4, "squeeze_dim": 4, "pooled_channels": 24, "attention_dim": 4, "embed_dim": 12},
        {
            "channels": 8,
            "scale": 2,
            "dilations": [1],
            "pooled_channels": 8,
            "global_context": False,
            "embed_norm": False,
        },
    ],
    "resnet34": [
        {"channels": 4, "depths": [1, 2, 1, 1], "embed_dim": 12},
        {"channels": 4, "depths": [1, 1], "pooling": "attentive_statistics", "global_context": True},
    ],
}
"""Small settings of every backbone."""
OF_SOUND = ("ecapa", "resnet34")
"""Those whose views are filter banks, (1, frames, 16)."""


def test_every_backbone_has_cases() -> None:
    assert set(plugin_names(PACKAGE)) == set(CASES), "add settings for the new backbone"


@pytest.fixture(params=[(name, i) for name, cases in CASES.items() for i in range(len(cases))], ids=str)
def config(request: pytest.FixtureRequest) -> Any:
    name, i = request.param
    return validate(plugin_class(PACKAGE, name), {"name": name, **CASES[name][i]})


@pytest.fixture
def modality(request: pytest.FixtureRequest) -> Any:
    if "config" in request.fixturenames and request.getfixturevalue("config").name in OF_SOUND:
        return Speech(64, 32)
    crops = {"global": {"num": 2, "size": 64, "scale": [0.3, 1]}, "local": {"num": 2, "size": 32, "scale": [0.1, 0.3]}}
    return validate(ImageConfig, {"name": "image", "patch_size": 8, "crops": crops}).build(None)


@pytest.fixture
def backbone(config: Any, modality: Any) -> Any:
    torch.manual_seed(0)
    return config.build(modality)


Views = Callable[[int, int, int], Tensor]


def images(num_views: int, batch: int, size: int) -> Tensor:
    return torch.randn(num_views, batch, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.fixture
def views(config: Any) -> Views:
    """(views, samples, size) -> noise of the kind that the backbone takes."""

    def frames(num_views: int, batch: int, size: int) -> Tensor:
        return torch.randn(num_views, batch, 1, size, 16, generator=torch.Generator().manual_seed(size))

    return frames if config.name in OF_SOUND else images


def test_the_configuration_survives_yaml(config: Any) -> None:
    assert f"name: {config.name}" in to_yaml(config)
    assert validate(type(config), config.model_dump(mode="json")) == config


def test_building_is_a_function_of_the_seed(config: Any, modality: Any, backbone: Any) -> None:
    torch.manual_seed(0)
    again = config.build(modality).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in backbone.state_dict().items())


def test_features_have_the_promised_shapes(backbone: Any, views: Views) -> None:
    large, small = backbone.eval()([Input(views(2, 3, 64)), Input(views(4, 3, 32))])
    assert large.cls.shape == (2, 3, backbone.embed_dim) and small.cls.shape == (4, 3, backbone.embed_dim)
    assert large.patches.shape[:2] == (2, 3) and large.patches.ndim == 4
    assert large.patches.shape[2] > small.patches.shape[2] > 0
    assert large.patches.shape[3] == getattr(backbone, "patch_dim", backbone.embed_dim)
    assert large.cls.isfinite().all() and large.patches.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_one_call_gives_what_separate_calls_give(backbone: Any, training: bool, views: Views) -> None:
    inputs = [Input(views(2, 3, 64)), Input(views(2, 3, 32))]
    other = copy.deepcopy(backbone)
    torch.manual_seed(1)
    together = backbone.train(training)(inputs)
    torch.manual_seed(1)
    alone = [other.train(training)([item])[0] for item in inputs]
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.cls, theirs.cls) and torch.equal(ours.patches, theirs.patches)
    for buffer, same in zip(backbone.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, same)


def test_views_and_samples_do_not_mix(backbone: Any, views: Views) -> None:
    both = views(2, 3, 64)
    together = backbone.eval()([Input(both)])[0].cls
    for v in range(2):
        for b in range(3):
            (alone,) = backbone([Input(both[v : v + 1, b : b + 1])])
            torch.testing.assert_close(together[v, b], alone.cls[0, 0], atol=1e-5, rtol=1e-4)


def test_every_parameter_is_trained_and_has_a_layer(backbone: Any, views: Views) -> None:
    (features,) = backbone.train()([Input(views(2, 4, 64))])
    (features.cls.square().sum() + features.patches.square().sum()).backward()
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert min(layers.values()) == 0 and backbone.num_layers <= max(layers.values()) <= backbone.num_layers + 1
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without in ([], ["mask_token"])


def test_masks_are_used_or_refused(backbone: Any, views: Views) -> None:
    count = backbone.eval()([Input(views(1, 2, 64))])[0].patches.shape[2]
    masks = torch.zeros(1, 2, 2, count, dtype=torch.bool)
    masks[:, 1, :, : count // 2] = True
    item = Input(views(1, 2, 64), masks)
    if not hasattr(backbone, "mask_token"):
        with pytest.raises(ConfigError, match="need the backbone 'vit'"):
            backbone([item])
        return
    nn.init.normal_(backbone.mask_token)
    (features,) = backbone([item])
    assert features.cls.shape == (1, 2, 2, backbone.embed_dim)
    assert not torch.allclose(features.patches[:, 0], features.patches[:, 1])


# -- timm models ------------------------------------------------------------------------------------------------------


def test_a_timm_network_gives_timms_own_embedding_and_tokens(modality: Any) -> None:
    settings = {"depth": 2, "embed_dim": 24, "patch_size": 8}
    backbone = TimmConfig(model="vit_tiny_patch16_224", kwargs=settings).build(modality).eval()
    features = backbone([Input(images(1, 2, 64))])[0]
    tokens = backbone.model.forward_features(images(1, 2, 64)[0])
    assert torch.equal(features.cls[0], tokens[:, 0]) and torch.equal(features.patches[0], tokens[:, 1:])
    backbone = TimmConfig(model="resnet18").build(modality).eval()
    features = backbone([Input(images(1, 2, 64))])[0]
    places = backbone.model.forward_features(images(1, 2, 64)[0])  # (2, 512, 2, 2)
    torch.testing.assert_close(features.cls[0], places.mean((2, 3)))
    torch.testing.assert_close(features.patches[0, :, 1], places[:, :, 0, 1])  # raster order


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": "convnext_tinny"}, "model: timm has no model 'convnext_tinny'; did you mean 'convnext_tiny'?"),
        ({"model": "resnet18", "kwargs": {"num_classes": 3}}, "kwargs: num_classes cannot be set here"),
    ],
)
def test_wrong_settings_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(TimmConfig, {"name": "timm_models", **section})
    assert error.value.lines[0].startswith(message)


def test_what_timm_models_cannot_do_is_said(modality: Any) -> None:
    with pytest.raises(ValueError, match=r"backbone 'resnet18': timm refuses the arguments {'wings': 2}"):
        TimmConfig(model="resnet18", kwargs={"wings": 2}).build(modality)
    backbone = TimmConfig(model="resnet18").build(modality)
    with pytest.raises(ConfigError, match="layers and arch need the backbone 'vit'"):
        backbone([Input(images(1, 2, 64), layers=(1,))])
    mixer = TimmConfig(model="mixer_s32_224").build(modality)
    with pytest.raises(ConfigError, match=r"timm's mixer_s32_224 does not take views of size \(32, 32\): Input height"):
        mixer([Input(images(1, 2, 32))])
    modality.groups["global"] = GroupSpec(2, (1, 16000), (100,))
    with pytest.raises(ValueError, match=r"timm models take images \(C, H, W\), but views of 'global' have shape"):
        TimmConfig(model="resnet18").build(modality)
