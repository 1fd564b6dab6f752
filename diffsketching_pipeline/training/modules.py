# SPDX-License-Identifier: Apache-2.0
"""The modules that a run trains."""

import copy
import os
from typing import Any

from diffsketching_pipeline.lora import has_lora, save_lora


def load_pretrained(model_class: Any, name_or_path: str, subfolder: str, **kwargs: Any) -> Any:
    """Loads a component in float32 from a pipeline (folder or Hub id) or from a folder that holds just the model."""
    is_model_folder = os.path.isfile(os.path.join(name_or_path, "config.json"))
    location = {} if is_model_folder else {"subfolder": subfolder}
    return model_class.from_pretrained(name_or_path, **location, **kwargs).float()


def empty_clone(module: Any) -> Any:
    """An untrained copy of a diffusers or transformers model."""
    if hasattr(module, "register_to_config"):
        return type(module).from_config(module.config)
    return type(module)(copy.deepcopy(module.config))


def save_module(module: Any, folder: str) -> None:
    """Writes a model or, of one that carries an adapter, the adapter."""
    if has_lora(module):
        save_lora(module, folder)
    else:
        module.save_pretrained(folder)
