# SPDX-License-Identifier: Apache-2.0
"""LPIPS, where its weights are, and L_p of eq. 5: distances of images by networks that losses may have used."""

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from tqdm.auto import tqdm

from diffsketching_pipeline import DiffSketchingPipeline, SketchProcessor
from diffsketching_pipeline.evaluation.image_sets import Drawing, ImageSet, squash
from diffsketching_pipeline.evaluation.metrics import THIS_PROCESS
from diffsketching_pipeline.losses import SketchPerceptualLoss


def load_lpips(net: Literal["alex", "vgg", "squeeze"]) -> tuple[nn.Module | None, str | None]:
    """LPIPS on a pretrained backbone, or why there is none: its weights are never downloaded and never random."""
    model_name = {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet1_1"}[net]
    weights = getattr(torchvision.models, f"{model_name}_Weights").DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not path.is_file():
        return None, f"no backbone weights: {path.name} is not in `checkpoints` of the torch hub folder"
    return LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none", **THIS_PROCESS).eval(), None


@torch.no_grad()
def lpips_means(lpips: Any, images: ImageSet, device: torch.device | str) -> dict[int, float]:
    """Mean LPIPS between two images of a drawing, for each drawing with at least two."""
    lpips.to(device)
    means = {}
    for group in tqdm(np.unique(images.groups), desc="LPIPS", leave=False):
        pixels = images.pixels[torch.from_numpy(images.groups == group)].to(device).float() / 127.5 - 1
        if len(pixels) > 1:
            first, second = torch.triu_indices(len(pixels), len(pixels), offset=1)
            means[int(group)] = float(lpips(pixels[first], pixels[second]).mean())
    return means


def check_perceptual_components(pipeline: DiffSketchingPipeline) -> None:
    """Raises `ValueError` for a pipeline without the networks of L_p."""
    for name in ("sketcher", "sketch_encoder"):
        if getattr(pipeline, name) is None:
            raise ValueError(f"`perceptual_sketch_distance` needs a `model` with the component `{name}`.")


@torch.no_grad()
def perceptual_sketch_distances(
    pipeline: DiffSketchingPipeline,
    images: ImageSet,
    drawings: list[Drawing],
    batch_size: int,
    reader: SketchProcessor,
) -> np.ndarray:
    """
    L_p(P(x), s) of eq. 5 for each image and its drawing, `[N]`, by the pipeline's sketcher and sketch encoder. `reader` reads
    the drawings at the pipeline's longer side.
    """
    # In float32 whatever was sampled with.
    sketcher, sketch_encoder = (copy.deepcopy(net).float() for net in (pipeline.sketcher, pipeline.sketch_encoder))
    loss = SketchPerceptualLoss(sketch_encoder)
    device, side = next(sketcher.parameters()).device, max(pipeline.height, pipeline.width)
    distances = []
    for first in tqdm(range(0, len(images), batch_size), desc=f"L_p of {images.name}", leave=False):
        indices = range(first, min(first + batch_size, len(images)))
        photos = np.stack([np.asarray(squash(images.image(i), side)) for i in indices])
        pixels = torch.from_numpy(photos).permute(0, 3, 1, 2).to(device, torch.float32) / 127.5 - 1
        sketch = reader.preprocess([str(drawings[images.groups[i]].path) for i in indices]).to(device)
        distances.append(loss(sketcher(pixels), sketch).float().cpu())
    return torch.cat(distances).numpy()
