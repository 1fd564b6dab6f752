# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of other projects without executing any code of theirs."""

import os
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffsketching_pipeline.messages import brief


_MAX_ENTRIES = 10_000  # the largest of ADM's files hold a tenth


class _NotWhatItSays(ValueError):
    pass


def read_checkpoint(path: str | os.PathLike, argument: str) -> dict[str, torch.Tensor]:
    """
    Reads a state dict on the CPU from `.safetensors`, or else from what `torch.save` wrote, without executing any code
    a pickle may hold.

    Args:
        path: The file.
        argument: The argument of the caller that named it, for the error.

    Raises:
        ValueError: if there is no such file, it cannot be read, or it is no state dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{argument}` must be a file but there is none at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if len(entries) > _MAX_ENTRIES:
                raise _NotWhatItSays(f"`{argument}` {path} holds {len(entries)} tensors; {_MAX_ENTRIES} are the most.")
            _check_size(sum(entry.file_size for entry in entries), path, argument)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except _NotWhatItSays:
        raise
    # A damaged pickle can raise anything, and what torch says of a dangerous one is how to run it all the same.
    except Exception as error:
        raise ValueError(
            f"`{argument}` {path} cannot be read as a file of weights: it is damaged or holds more than tensors."
        ) from error
    is_state_dict = isinstance(state_dict, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    )
    if not is_state_dict or not state_dict:
        raise ValueError(f"`{argument}` {path} holds no state dict: it must map parameter names to tensors.")
    for name, tensor in state_dict.items():
        is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not is_plain or tensor.is_complex():
            raise ValueError(f"`{argument}` {path} has `{brief(name)}`, which is no plain tensor of numbers.")
    # A tensor may be a view of a storage that is much smaller, and grows when it is copied.
    _check_size(sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values()), path, argument)
    return state_dict


def _check_size(size: int, path: Path, argument: str) -> None:
    if size > 2 * path.stat().st_size + 2**20:
        raise _NotWhatItSays(
            f"`{argument}` {path} unfolds to {size} bytes from {path.stat().st_size}, so it is not what it says."
        )
