# SPDX-License-Identifier: Apache-2.0
"""Records of how a picture was made, and pictures of several: `metadata.json` and contact sheets."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsketching_pipeline import __version__
from diffsketching_pipeline.manifest import weights_sha256


if TYPE_CHECKING:
    from PIL import Image

    from diffsketching_pipeline.pipeline_base import DiffSketchingMixin


_SHEET_TILE = 192
_SHEET_COLUMNS = 5
_CAPTION_HEIGHT = 22


def file_record(role: str, path: Path | None) -> dict[str, Any]:
    """A file that a result was made from, by name and content."""
    if path is None:
        return {}
    return {role: str(path), f"{role}_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def sampling_record(pipe: "DiffSketchingMixin", settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the last call, with what the checkpoint recommends filled in."""
    return {
        **settings,
        "num_inference_steps": pipe.resolve_num_inference_steps(settings.get("num_inference_steps")),
        **pipe.guidance_scales,
        "sketch_abstraction": pipe.sketch_abstraction,
        "eta": pipe.eta,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }


def class_record(label: Any, out: Any) -> dict[str, Any]:
    """Return the class that the (first) result was made with, and whether it was guessed."""
    used = out.class_labels[0]
    probability = None if out.class_probabilities is None else float(out.class_probabilities[0].max())
    return {
        "class_label": used,
        "class_predicted": label is None and used is not None,
        "class_probability": probability,
    }


def metadata(model: dict[str, Any], records: list[dict[str, Any]]) -> bytes:
    """The content of a metadata.json."""
    return json.dumps({"model": model, "versions": _versions(), "images": records}, indent=2).encode()


def model_record(pipe: "DiffSketchingMixin", model: str | None) -> dict[str, Any]:
    """Name the weights that results were made with."""
    return {"name": model or "garments-64", "unet_sha256": weights_sha256(pipe.unet)}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "numpy", "pillow", "scikit-image")
    return {"diffsketching_pipeline": __version__, **{name: version(name) for name in packages}}


def png(image: "Image.Image") -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def caption(name: str, record: dict[str, Any]) -> str:
    """Return the heading of a sheet: the input, and the class it was made with."""
    used, probability = record["class_label"], record["class_probability"]
    if used is None:
        return name
    if record["class_predicted"] and probability is not None:
        return f"{name}: {used} ({probability:.0%} sure)"
    return f"{name}: {used}"


def sketch_image(sketch: Any) -> "Image.Image":
    """A drawing `[1, 1, height, width]` as the model sees it."""
    from PIL import Image

    return Image.fromarray(((sketch[0, 0].numpy() + 1) * 127.5).astype("uint8")).convert("RGB")


def contact_sheet(
    tiles: Sequence[tuple["Image.Image", str]], heading: str, columns: int = _SHEET_COLUMNS
) -> "Image.Image":
    """Pictures with a line of text below each, enlarged to be looked at."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(len(tiles), columns)
    rows = -(-len(tiles) // columns)
    tallest = max(round(_SHEET_TILE * image.height / max(image.size)) for image, _ in tiles)
    cell = tallest + _CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * (_SHEET_TILE + 4), _CAPTION_HEIGHT + rows * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((4, 3), heading, fill="black", font=font)
    for index, (image, text) in enumerate(tiles):
        x, y = index % columns * (_SHEET_TILE + 4) + 2, _CAPTION_HEIGHT + index // columns * cell
        scale = _SHEET_TILE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        tile = image.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
        sheet.paste(tile, (x, y), tile)
        draw.text((x + 2, y + tallest + 2), text, fill="black", font=font)
    return sheet
