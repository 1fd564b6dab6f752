# SPDX-License-Identifier: Apache-2.0
"""Pictures of a validation."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from diffsketching_pipeline.files import staged_file


def image_grid(rows: Sequence[Tensor], scale: int = 1) -> Tensor:
    """Lays out rows of pictures `[N, 1 or 3, H, W]` in [-1, 1] (sketches or photos) as one `[3, H', W']`."""
    pictures = torch.cat([row.detach().float().cpu().expand(-1, 3, -1, -1) for row in rows])
    pictures = F.interpolate(pictures, scale_factor=float(scale))
    return make_grid(pictures, nrow=rows[0].shape[0], padding=2, pad_value=1.0).clamp(-1, 1)


def save_png(picture: Tensor, path: Path) -> None:
    """Writes a picture `[3, H, W]` in [-1, 1]; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    with staged_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
