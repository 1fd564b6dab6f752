# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of mtli/PhotoSketch (the ResNet generator with batch normalization) -> a [`PhotoSketcher`] folder."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from diffsketching_pipeline.converters.reading import read_checkpoint
from diffsketching_pipeline.files import check_output_dir, staged_folder
from diffsketching_pipeline.messages import brief_errors
from diffsketching_pipeline.modeling_photo_sketcher import PhotoSketcher


# Position of the first residual block in the file's layer list, after the padding and three conv-norm-relu groups.
FIRST_BLOCK = 10
_MAX_BLOCKS = 64  # theirs have 6 or 9


@brief_errors()
def convert_photosketch(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, statistics: str = "per_sample"
) -> Path:
    """
    Converts a Photo-Sketching generator to a folder that `PhotoSketcher.from_pretrained` loads, in float32.

    Args:
        checkpoint: `latest_net_G.pth` or the like (read without executing pickled code), or `.safetensors`.
        output_dir: The folder to write; it must not exist or be empty.
        statistics:
            What the normalization layers will use. `"per_sample"` is how the published tool runs (in train mode, on
            one image at a time); `"running"` is what the stored averages of training give.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if the file cannot be read or is not such a generator; nothing is written then.
    """
    check_output_dir(output_dir)
    sketcher = convert_photosketch_checkpoint(read_checkpoint(checkpoint, "checkpoint"), statistics)
    with staged_folder(output_dir) as folder:
        sketcher.save_pretrained(folder)
    return Path(output_dir)


def convert_photosketch_checkpoint(
    state_dict: Mapping[str, torch.Tensor], statistics: str = "per_sample"
) -> PhotoSketcher:
    """
    Photo-Sketching's `ResnetGenerator` as the [`PhotoSketcher`] that computes the same, in float32 and eval mode. Its
    widths, the number of blocks and where they hold a dropout layer are read off the parameters. A dropout layer has
    none, so the result has `dropout=0.0`.

    Args:
        state_dict: Its parameters and buffers under their own names, in any floating-point type.
        statistics: `"per_sample"` or `"running"`, see [`PhotoSketcher`].

    Raises:
        ValueError: if these are not the parameters of a ResNet generator with batch normalization.
    """
    _check_is_resnet_generator(state_dict)
    n_blocks = len({match[1] for name in state_dict if (match := re.match(r"model\.(\d+)\.conv_block\.", name))})
    if n_blocks > _MAX_BLOCKS:
        raise ValueError(f"`checkpoint` is not a Photo-Sketching generator, because it has {n_blocks} blocks.")
    last = f"model.{FIRST_BLOCK + n_blocks + 7}.weight"
    ngf, in_channels = state_dict["model.1.weight"].shape[:2]
    with torch.device("meta"):
        sketcher = PhotoSketcher(
            in_channels=in_channels,
            out_channels=state_dict[last].shape[0] if last in state_dict else 1,
            ngf=ngf,
            n_blocks=n_blocks,
            statistics=statistics,
        )
    expected = sketcher.state_dict()
    has_dropout_layer = f"model.{FIRST_BLOCK}.conv_block.5.weight" not in state_dict
    renamed = {
        f"{source}.{name.rpartition('.')[2]}": name
        for source, target in _layout(n_blocks, has_dropout_layer)
        for name in expected
        if name.rpartition(".")[0] == target
    }
    _check_fit(state_dict, renamed, expected)
    converted = {
        target: state_dict[source].to(expected[target].dtype, copy=True)
        # PyTorch before 0.4.1, which trained the published weights, did not count the batches.
        if source in state_dict
        else torch.zeros((), dtype=torch.int64)
        for source, target in renamed.items()
    }
    sketcher.load_state_dict(converted, strict=True, assign=True)
    return sketcher.eval()


def _layout(n_blocks: int, has_dropout_layer: bool) -> Iterator[tuple[str, str]]:
    """Module of the file -> module of [`PhotoSketcher`]."""
    yield from (("model.1", "conv_in"), ("model.2", "norm_in"))
    for i in range(2):
        yield from ((f"model.{4 + 3 * i}", f"down_convs.{i}"), (f"model.{5 + 3 * i}", f"down_norms.{i}"))
    second = 6 if has_dropout_layer else 5
    for i in range(n_blocks):
        source, target = f"model.{FIRST_BLOCK + i}.conv_block", f"resnets.{i}"
        yield from ((f"{source}.1", f"{target}.conv1"), (f"{source}.2", f"{target}.norm1"))
        yield from ((f"{source}.{second}", f"{target}.conv2"), (f"{source}.{second + 1}", f"{target}.norm2"))
    after = FIRST_BLOCK + n_blocks
    for i in range(2):
        yield from ((f"model.{after + 3 * i}", f"up_convs.{i}"), (f"model.{after + 1 + 3 * i}", f"up_norms.{i}"))
    yield f"model.{after + 7}", "conv_out"


def _check_is_resnet_generator(state_dict: Mapping[str, torch.Tensor]) -> None:
    first = state_dict.get("model.1.weight")
    if first is None or first.ndim != 4:
        raise ValueError(
            "`checkpoint` is not a Photo-Sketching generator of the kind `resnet_9blocks` or `resnet_6blocks`, whose "
            "first convolution is named `model.1.weight`."
        )
    if "model.1.bias" in state_dict:
        raise ValueError(
            "`checkpoint` is a generator with instance normalization (`--norm instance`), but only those with batch "
            "normalization (`--norm batch`), like the published one, can be converted."
        )


def _check_fit(
    state_dict: Mapping[str, torch.Tensor], renamed: Mapping[str, str], expected: Mapping[str, torch.Tensor]
) -> None:
    misfits = [f"also has `{source}`" for source in state_dict if source not in renamed]
    for source, target in renamed.items():
        if source not in state_dict:
            if not source.endswith("num_batches_tracked"):
                misfits.append(f"has no `{source}`")
        elif state_dict[source].shape != expected[target].shape:
            shapes = f"{tuple(state_dict[source].shape)}, where {tuple(expected[target].shape)} is expected"
            misfits.append(f"has `{source}` of shape {shapes}")
    if misfits:
        raise ValueError(f"`checkpoint` is not a Photo-Sketching generator, because it {misfits[0]}.")
