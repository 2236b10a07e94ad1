"""ssl-export: turns a checkpoint into a folder that other tools load, and compares the two before it says so."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and timm take seconds to load, and --help should not
    from torch import nn

    from ssl_platform.backbones._conversion import TimmModel
    from ssl_platform.encoder import Encoder

FILES = ("config.json", "model.safetensors")
NUM_INPUTS = 8
SMALLEST_COSINE = 0.9999

DESCRIPTION = """\
Writes one network of a run as a folder that timm loads: config.json (architecture, preprocessing, and what ssl-eval
needs to rebuild the encoder) and model.safetensors. The folder appears only after timm has loaded it with strict keys
and has given the same embeddings as the checkpoint on random inputs.
"""

EXAMPLES = """\
examples:
  ssl-export runs/skin --format timm --out skin-vit
      the teacher of the newest checkpoint of a run
  ssl-export runs/skin/checkpoints/step_00010000 --format timm --out skin-10k --network student
      the student of one checkpoint

then, anywhere that timm is installed:
  model = timm.create_model("local-dir:skin-vit", pretrained=True)
or, with this platform:
  ssl-eval knn --checkpoint skin-vit --train SHARDS --test SHARDS
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for an error, after which there is no output folder."""
    parser = argparse.ArgumentParser(
        prog="ssl-export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="run folder (its newest usable checkpoint), checkpoint or export"
    )
    parser.add_argument("--format", required=True, choices=["timm"], help="what shall load it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--network", default="teacher", metavar="NAME", help="network of the run (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    arguments = parser.parse_args(argv)
    from ssl_platform.config import ConfigError
    from ssl_platform.encoder import Encoder
    from ssl_platform.log import set_up_logging

    set_up_logging()
    try:
        _check_free(arguments.out, arguments.overwrite)
        encoder = Encoder.load(arguments.path, network=arguments.network)
        difference = export_timm(encoder, arguments.out)
    except (ValueError, OSError, ConfigError) as error:
        sys.stderr.write(f"ssl-export: {error}\n")
        return 2
    sys.stdout.write(_report(encoder, arguments.out, difference))
    return 0


def export_timm(encoder: "Encoder", out: Path) -> float:
    """Writes the folder `out`, replacing one that exists; returns the largest difference of an embedding's element.

    Raises ValueError if timm has no such model or does not give the same embeddings; `out` is then as it was before.
    """
    from safetensors.torch import save_file

    from ssl_platform.checkpoint import CheckpointError

    model = _timm_model(encoder.network)
    temporary, replaced = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        text = json.dumps(_description(encoder, model), indent=2)
        (temporary / "config.json").write_text(text, encoding="utf-8")
        save_file(model.state, temporary / "model.safetensors", metadata={"format": "pt"})
        difference = _compare(encoder, model, temporary)
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return difference


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or add --overwrite to replace it")
    others = sorted(path.name for path in out.iterdir() if path.name not in FILES) if out.is_dir() else [out.name]
    if others:
        raise ValueError(f"{out} is not replaced, because it is no export: it holds {', '.join(others[:5])}")


# -- what is written ---------------------------------------------------------------------------------------------------


def _timm_model(network: "nn.Module") -> "TimmModel":
    from ssl_platform.backbones._conversion import TimmModel, to_timm
    from ssl_platform.backbones.timm_models import TimmBackbone
    from ssl_platform.backbones.vit import VisionTransformer

    if isinstance(network, VisionTransformer):
        return to_timm(network)
    if isinstance(network, TimmBackbone):
        state = {key: value.contiguous() for key, value in network.model.state_dict().items()}
        return TimmModel(network.model.pretrained_cfg["architecture"], network.model_args, state)
    raise ValueError(
        f"the network is a {type(network).__name__}, which timm does not have; ssl-eval and "
        "ssl_platform.encoder.Encoder.load take the checkpoint as it is"
    )


def _description(encoder: "Encoder", model: "TimmModel") -> dict[str, Any]:
    """config.json: timm's keys, and a section that `Encoder.load` reads and timm leaves alone."""
    from ssl_platform import __version__

    preprocessing = encoder.modality.description()
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    layers = getattr(encoder.network, "model", None)  # of a timm backbone
    facts = layers.pretrained_cfg if layers is not None else {"first_conv": "patch_embed.proj", "classifier": "head"}
    return {
        "architecture": model.architecture,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": model.model_args,
        "pretrained_cfg": {
            "input_size": list(encoder.modality.groups["global"].shape),
            **{key: preprocessing[key] for key in keys if key in preprocessing},
            "num_classes": 0,
            **{key: facts[key] for key in ("first_conv", "classifier", "pool_size") if facts.get(key)},
        },
        "ssl_platform": {
            "version": __version__,
            "preprocessing": preprocessing,
            "encoder": encoder.config.model_dump(mode="json"),
        },
    }


# -- comparison --------------------------------------------------------------------------------------------------------


def _compare(encoder: "Encoder", model: "TimmModel", folder: Path) -> float:
    """The largest difference between the checkpoint's embeddings and those of every way to load `folder`."""
    import timm
    import torch
    from safetensors.torch import load_file

    from ssl_platform.encoder import Encoder

    built = timm.create_model(model.architecture, **model.model_args)
    built.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    ways = {
        "timm.create_model with strict keys": built.eval(),
        "timm.create_model from local-dir": timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
    }
    again = Encoder.load(folder, network=encoder.config.network)
    inputs = torch.randn(NUM_INPUTS, *_native_shape(encoder), generator=torch.Generator().manual_seed(0))
    expected, largest = encoder(inputs).cls, 0.0  # (NUM_INPUTS, D)
    with torch.inference_mode():
        found = {name: loaded(inputs) for name, loaded in ways.items()} | {"Encoder.load": again(inputs).cls}
    for name, embeddings in found.items():
        cosine = torch.nn.functional.cosine_similarity(embeddings.double(), expected.double(), dim=-1).min().item()
        if not cosine >= SMALLEST_COSINE:
            raise ValueError(
                f"{name} gives other embeddings than the checkpoint: cosine {cosine:.6f} on random inputs, "
                f"{SMALLEST_COSINE} needed; nothing was written"
            )
        largest = max(largest, (embeddings - expected).abs().max().item())
    return largest


def _native_shape(encoder: "Encoder") -> tuple[int, ...]:
    """(C, H, W) at which no position embedding is interpolated: there, both sides must agree."""
    network: Any = encoder.network
    grid = getattr(network, "native_grid", None)
    if grid is None:
        return encoder.modality.groups["global"].shape
    size = (length * patch for length, patch in zip(grid, network.patch_embed.patch_size, strict=True))
    return (network.patch_embed.in_chans, *size)


# -- report ------------------------------------------------------------------------------------------------------------


def _report(encoder: "Encoder", out: Path, difference: float) -> str:
    lines = [
        f"{out}: {encoder.config.network} after {encoder.config.step} steps, embeddings of width {encoder.embed_dim}",
        f"loaded back by timm with strict keys; {NUM_INPUTS} random inputs differ by at most {difference:.1e}",
        *[f"note: {note}" for note in _notes(encoder)],
        "",
        snippet(encoder, out),
    ]
    return "\n".join(lines)


def snippet(encoder: "Encoder", out: Path) -> str:
    """Python that loads the export and embeds a batch of inputs; runs as it is."""
    facts = encoder.modality.description()
    shape = ", ".join(map(str, facts.get("input_size", _native_shape(encoder))))
    make = "timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # PIL image -> tensor"
    transform = f"transform = {make}\n" if facts.get("values", "pixels") == "pixels" else ""
    return f"""\
import timm
import torch

model = timm.create_model({f"local-dir:{out.resolve().as_posix()}"!r}, pretrained=True).eval()
{transform}with torch.inference_mode():
    embeddings = model(torch.randn(2, {shape}))  # (2, {encoder.embed_dim})
"""


def _notes(encoder: "Encoder") -> list[str]:
    """What timm does differently, beyond the weights."""
    facts, notes = encoder.modality.description(), []
    if facts.get("values") == "fbank":
        notes.append(
            "timm has no transform for sound: preprocessing in config.json says every step, and "
            "ssl_platform.encoder.Encoder does them"
        )
    if facts.get("normalize_per_sample"):
        notes.append("timm cannot normalise each image by its own mean and std: do it before the model")
    if facts.get("intensity_range"):
        notes.append(
            "timm's transform does not map intensities: map pixels from preprocessing.intensity_range in config.json to "
            "[0, 1] before it"
        )
    if facts.get("to_grey"):
        notes.append("timm's transform does not make images grey: do it before the model")
    if facts.get("keep_exact_size") and facts.get("crop_pct", 1) != 1:
        notes.append(
            "images of exactly the input size were shown as they are; timm's transform enlarges and crops them"
        )
    size = tuple(facts.get("input_size", ()))
    learned = getattr(encoder.network, "rope", None) is None
    interpolates = learned and getattr(encoder.network, "interpolation", "timm") == "dinov2"
    if size and size != _native_shape(encoder) and interpolates:
        notes.append("at another size than the native one, timm interpolates positions in its own way: nearly the same")
    return notes


if __name__ == "__main__":
    sys.exit(main())
