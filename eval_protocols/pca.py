"""Principal components of the patch tokens as colours: which parts of an image does the encoder tell apart? No labels.

The encoder sees overlapping windows of the image, each as large as the view that evaluation shows it; a patch's tokens
are averaged over the windows that hold it, which takes out where in the window it lay. The first three principal
components over all patches become red, green and blue. Patches of like colour have like tokens; which colour, and
which sign, means nothing, and colours cannot be compared between panels.

what comes out:
  DIR/<name of the image>.png: the image, the tokens of the checkpoint, and those of the same network before its first
  step; and DIR/pca.json with the settings and the share of the variance that the three components hold.

examples:
  ssl-eval pca --checkpoint runs/skin/run --image section.tif --out figures
  ssl-eval pca --checkpoint runs/skin/run --image a.png b.png --stride 16 --region 0,0,640,960
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from sklearn.decomposition import PCA
from torch import Tensor

from eval_protocols import report
from eval_protocols.features import choose_device, positive, progress
from ssl_platform.encoder import Encoder
from ssl_platform.modalities.image import Image

Map = NDArray[np.float32]
"""(rows, columns, D): one vector for each patch of an image."""


# -- features --------------------------------------------------------------------------------------------------------


def patch_map(encoder: Encoder, image: Tensor, stride: int, batch_size: int = 64) -> Map:
    """Each patch's tokens, averaged over the windows that hold it; `image` (C, H, W) is cut to whole patches.

    Windows begin every `stride` pixels, a multiple of the patch size, and where the image ends. Raises ValueError if
    the image is smaller than a window.
    """
    modality = encoder.modality
    assert isinstance(modality, Image)
    window, patch = modality.evaluation_size, modality.patch_size
    size = [length // step * step for length, step in zip(image.shape[-2:], patch, strict=True)]
    if size[0] < window[0] or size[1] < window[1]:
        raise ValueError(
            f"{image.shape[-2]} x {image.shape[-1]} pixels are less than a window, {window[0]} x {window[1]}"
        )
    corners = [(y, x) for y in _starts(size[0], window[0], stride) for x in _starts(size[1], window[1], stride)]
    rows, columns = window[0] // patch[0], window[1] // patch[1]
    total = np.zeros((size[0] // patch[0], size[1] // patch[1], encoder.embed_dim), np.float32)
    count = np.zeros((*total.shape[:2], 1), np.float32)
    device = next(encoder.parameters()).device
    with progress(len(corners), "windows") as advance:
        for first in range(0, len(corners), batch_size):
            some = corners[first : first + batch_size]
            views = torch.stack([modality.normalized(image[:, y : y + window[0], x : x + window[1]]) for y, x in some])
            tokens = encoder(views.to(device)).patches.float().cpu().numpy()  # (B, N, D)
            for (y, x), grid in zip(some, tokens.reshape(-1, rows, columns, encoder.embed_dim), strict=True):
                place = np.s_[y // patch[0] : y // patch[0] + rows, x // patch[1] : x // patch[1] + columns]
                total[place] += grid
                count[place] += 1
            advance(len(some))
    return total / count


def _starts(length: int, window: int, stride: int) -> list[int]:
    return sorted({*range(0, length - window, stride), length - window})


def component_colours(features: Map) -> tuple[NDArray[np.uint8], list[float]]:
    """(rows, columns, 3) colours of the first three components, and the share of the variance that each holds.

    Each component runs from its 1st to its 99th percentile. Fewer than three that vary leave the rest grey.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    with np.errstate(invalid="ignore"):  # the share of no variance
        solver = PCA(min(3, *flat.shape), svd_solver="covariance_eigh").fit(flat)
    values = solver.transform(flat)  # (patches, 3)
    low, high = np.percentile(values, [1, 99], axis=0)
    spread = np.where(high > low, high - low, np.inf)
    colours = np.full((len(flat), 3), 0.5)
    colours[:, : values.shape[1]] = np.where(high > low, ((values - low) / spread).clip(0, 1), 0.5)
    shares = np.nan_to_num(solver.explained_variance_ratio_).tolist()
    return (colours * 255).round().astype(np.uint8).reshape(*features.shape[:2], 3), shares


# -- picture ---------------------------------------------------------------------------------------------------------


def visible(image: Tensor) -> NDArray[np.uint8]:
    """The image as 8-bit RGB: its first three channels, or its first one as grey."""
    values = image[: 3 if len(image) >= 3 else 1].float()
    values = values / (65535 if image.dtype == torch.uint16 else 255)
    shown: NDArray[np.uint8] = (values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown


def draw(panels: Sequence[tuple[str, NDArray[np.uint8]]], width: int) -> Pillow.Image:
    """Panels side by side, scaled to `width` pixels without smoothing, with their titles above them."""
    title, gap = 24, 8
    scaled = [
        (
            text,
            Pillow.fromarray(panel).resize(
                (width, round(panel.shape[0] * width / panel.shape[1])), Pillow.Resampling.NEAREST
            ),
        )
        for text, panel in panels
    ]
    sheet = Pillow.new("RGB", (len(panels) * (width + gap) - gap, title + max(p.height for _, p in scaled)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, (text, panel) in enumerate(scaled):
        pen.text((column * (width + gap), 2), text, fill="black", font=font)
        sheet.paste(panel, (column * (width + gap), title))
    return sheet


# -- the protocol ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="run folder (its latest), checkpoint or export"
    )
    parser.add_argument("--image", type=Path, nargs="+", required=True, metavar="FILE", help="images of any size")
    parser.add_argument("--network", default="teacher", metavar="NAME", help="which network (%(default)s)")
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="PIXELS",
        help="between windows, a multiple of the patch size (half a window)",
    )
    parser.add_argument("--region", metavar="X0,Y0,X1,Y1", help="the part of each image to show, in pixels (all)")
    parser.add_argument("--width", type=positive, default=480, metavar="PIXELS", help="of a panel (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="windows at once (%(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (a GPU if there is one)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the pictures (eval/ and the PATH with dashes)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes a picture for each image, and the facts beside them."""
    if missing := [str(file) for file in arguments.image if not file.is_file()]:
        raise ValueError(f"--image {missing[0]}: no such file; paths are relative to {Path.cwd()}")
    device = choose_device(arguments.device)
    folder = report.output_folder(arguments.out or report.default_folder(arguments.checkpoint))
    trained = Encoder.load(arguments.checkpoint, network=arguments.network).to(device)
    before = Encoder.load(arguments.checkpoint, network=arguments.network, random_init=True).to(device)
    if not isinstance(trained.modality, Image):
        raise ValueError(f"{arguments.checkpoint}: its modality is not an image, so there is no picture of its patches")
    stride = checked_stride(arguments.stride, trained.modality)
    encoders = {f"{arguments.network}, step {trained.config.step}": trained, "random initialisation": before}
    result: dict[str, Any] = {
        "protocol": "pca@1",
        "checkpoint": str(arguments.checkpoint),
        "stride": stride,
        "images": {},
    }
    if doubles := sorted(
        {file.stem for file in arguments.image if sum(o.stem == file.stem for o in arguments.image) > 1}
    ):
        raise ValueError(
            f"--image: {', '.join(doubles)}: two files of one name would write one picture; run them apart"
        )
    for file in arguments.image:
        image = cut(read_image(file, trained.modality), arguments.region)
        panels, shares = [("image", visible(image))], {}
        for name, encoder in encoders.items():
            try:
                colours, shares[name] = component_colours(patch_map(encoder, image, stride, arguments.batch_size))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            panels.append((f"{name}: {sum(shares[name]):.0%} of the variance", colours))
        picture = folder / f"{file.stem}.png"
        draw(panels, arguments.width).save(picture)
        result["images"][str(file)] = {"picture": str(picture), "variance_shares": shares}
        sys.stdout.write(f"written: {picture}\n")
    report.write_result(folder / "pca.json", result | {"versions": report.versions()})
    return 0


def checked_stride(stride: int | None, modality: Image) -> int:
    """The stride, half a window if it is None; raises ValueError if windows would not lie on patches, or leave gaps."""
    patch = int(np.lcm(*modality.patch_size))
    if stride is None:
        return max(min(modality.evaluation_size) // 2 // patch * patch, patch)
    if stride % patch or stride > min(modality.evaluation_size):
        raise ValueError(
            f"--stride {stride}: give a multiple of {patch} (the patch size) up to {min(modality.evaluation_size)}"
        )
    return stride


def read_image(file: Path, modality: Image) -> Tensor:
    """The pixels (C, H, W) as the modality reads them."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"--image {file}: cannot be read ({error.strerror})") from error
    try:
        return modality.decode({file.suffix.removeprefix(".").lower(): data})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def cut(image: Tensor, region: str | None) -> Tensor:
    """The region "x0,y0,x1,y1" of an image (C, H, W); raises ValueError if it does not lie inside."""
    if region is None:
        return image
    height, width = image.shape[-2:]
    numbers = region.split(",")
    if len(numbers) == 4 and all(number.strip().isdecimal() for number in numbers):
        x0, y0, x1, y1 = map(int, numbers)
        if x0 < x1 <= width and y0 < y1 <= height:
            return image[:, y0:y1, x0:x1]
    raise ValueError(f"--region {region}: give x0,y0,x1,y1 with x0 < x1 <= {width} and y0 < y1 <= {height}")
