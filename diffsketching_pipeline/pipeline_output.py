# SPDX-License-Identifier: Apache-2.0
"""The record that the calls of the pipelines return."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput


@dataclass
class DiffSketchingPipelineOutput(BaseOutput):
    """
    Output of the DiffSketching pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            `len(sketches) * num_images_per_sketch` images, all of sketch 0 first. `"np"` is
            `[batch, height, width, 3]` and `"pt"` `[batch, 3, height, width]`, both in [0, 1]; `"latent"` is x_0 as
            `[batch, 3, height, width]`, unclipped.
        class_labels (`list`):
            One per sketch: the class that was used, by name where the checkpoint has names, else by index; `None`
            without a class. The list can be given back to the call.
        class_probabilities (`torch.Tensor` of shape `[len(sketches), num_classes]`, *optional*):
            For a class that was predicted from the sketch, the prediction; for one that was given, 1 at that class; 0
            everywhere without a class. `None` if the checkpoint has no classes.
    """

    images: Any
    class_labels: list[Any]
    class_probabilities: torch.Tensor | None
