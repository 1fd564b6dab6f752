# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of other projects without executing any code of theirs."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file


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
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
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
    return state_dict
