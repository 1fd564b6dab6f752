# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
