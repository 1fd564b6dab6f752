# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters for a `UNet2DModel` (LoRA, Hu et al., 2022), which diffusers has for other UNets only.

An adapter is a few megabytes beside the weights that it changes. Needs `pip install peft`.

    add_lora(unet, rank=8)          # then train what requires a gradient
    save_lora(unet, "adapter")
    load_lora(pipe.unet, "adapter")  # in another process
    pipe.unet = fuse_lora(pipe.unet)  # a plain UNet that computes the same
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from diffsketching_pipeline.files import staged_file, write_file


LORA_CONFIG_NAME = "lora_config.json"
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
"""Attention projections and the convolutions of the residual blocks: a small UNet has little attention to adapt."""


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: `pip install peft`.") from error
    return peft


def _lora_layers(unet: UNet2DModel) -> dict[str, Any]:
    """The adapted layers by their names in the plain network."""
    return {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}


def has_lora(unet: Any) -> bool:
    """Return whether a UNet carries an adapter."""
    return any(hasattr(module, "lora_A") for module in unet.modules())


def add_lora(
    unet: UNet2DModel, rank: int, alpha: float | None = None, target_modules: Sequence[str] = TARGET_MODULES
) -> UNet2DModel:
    """
    Adds a fresh adapter, in place, and freezes everything else. The network computes what it did until it is trained.

    Args:
        unet (`UNet2DModel`): without an adapter.
        rank (`int`): of the change of each layer, at least 1.
        alpha (`float`, *optional*): the change is scaled by alpha / rank; `rank` if not given.
        target_modules (`Sequence[str]`): ends of the names of the layers to adapt.

    Returns:
        `UNet2DModel`: the same one.

    Raises:
        ValueError: `rank` is below 1, there is an adapter already, or no layer has such a name.
        ImportError: peft is not installed.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` has to be an integer of at least 1 but is {rank!r}.")
    if has_lora(unet):
        raise ValueError("`unet` has an adapter already: fuse it with `fuse_lora`, or take it off with `unload_lora`.")
    peft = _peft()
    alpha = rank if alpha is None else alpha
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), init_lora_weights=True)
    try:
        peft.inject_adapter_in_model(config, unet)
    except ValueError as error:
        raise ValueError(f"`target_modules` {list(target_modules)} names no layer of this UNet. ({error})") from error
    unet._lora_settings = {"rank": rank, "alpha": alpha, "target_modules": list(target_modules)}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return unet


def lora_state_dict(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors by name, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    return _peft().get_peft_model_state_dict(unet)


def load_lora_state_dict(unet: UNet2DModel, state: dict[str, torch.Tensor]) -> None:
    """
    Puts an adapter's tensors in the place of those that the UNet carries.

    Raises:
        ValueError: names or shapes are not those of this UNet's adapter.
    """
    own = lora_state_dict(unet)
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise ValueError(
            f"the adapter was made for another UNet: {len(wrong)} of its {len(state)} tensors do not fit, {wrong[0]!r} to"
            " begin with."
        )
    _peft().set_peft_model_state_dict(unet, state)


def save_lora(unet: UNet2DModel, folder: str | os.PathLike) -> None:
    """
    Writes the adapter, not the network it belongs to, into a folder.

    Raises:
        ValueError: there is no adapter.
    """
    if not has_lora(unet):
        raise ValueError("`unet` has no adapter: `add_lora` adds one.")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in lora_state_dict(unet).items()}
    with staged_file(path / LORA_WEIGHTS_NAME, durable=True) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_file(path / LORA_CONFIG_NAME, json.dumps(unet._lora_settings, indent=2) + "\n")


def load_lora(unet: UNet2DModel, folder: str | os.PathLike) -> UNet2DModel:
    """
    Adds the adapter that `save_lora` wrote, in place and frozen.

    Returns:
        `UNet2DModel`: the same one.

    Raises:
        ValueError: the folder holds no adapter, or one of another UNet; the UNet is then as it was.
        ImportError: peft is not installed.
    """
    path = Path(folder)
    if not (path / LORA_WEIGHTS_NAME).is_file() or not (path / LORA_CONFIG_NAME).is_file():
        raise ValueError(f"`folder` {str(folder)!r} has no {LORA_WEIGHTS_NAME} and {LORA_CONFIG_NAME}.")
    settings = json.loads((path / LORA_CONFIG_NAME).read_text(encoding="utf-8"))
    wanted_grad = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    add_lora(unet, settings["rank"], settings["alpha"], settings["target_modules"])
    try:
        load_lora_state_dict(unet, load_file(path / LORA_WEIGHTS_NAME))
    except ValueError as error:
        unload_lora(unet)
        raise ValueError(f"`folder` {str(folder)!r}: {error}") from error
    finally:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(wanted_grad.get(name.replace(".base_layer.", "."), False))
    return unet.eval()


def unload_lora(unet: UNet2DModel) -> UNet2DModel:
    """Takes the adapter off, in place: the network is what it was before `add_lora`, and needs gradients again."""
    for name, layer in _lora_layers(unet).items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.base_layer)
    for attribute in ("peft_config", "_lora_settings"):
        if attribute in unet.__dict__:
            delattr(unet, attribute)
    return unet.requires_grad_(True)


def fuse_lora(unet: UNet2DModel, scale: float = 1.0) -> UNet2DModel:
    """
    A plain UNet with the adapter added to its weights, which needs no peft.

    Args:
        unet (`UNet2DModel`): with an adapter; unchanged.
        scale (`float`): 0 leaves the adapter out, 1 is what was trained, between and beyond are less and more of it.

    Returns:
        `UNet2DModel`: a new one in eval mode, of the dtype and on the device of the given one.

    Raises:
        ValueError: there is no adapter.
    """
    layers = _lora_layers(unet)
    if not layers:
        raise ValueError("`unet` has no adapter: `load_lora` or `add_lora` adds one.")
    state = {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in unet.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in layers.items():
        weight = state[f"{name}.weight"]
        # In float32: a small change of float16 weights would be rounded away.
        change = layer.get_delta_weight("default").detach().float()
        state[f"{name}.weight"] = (weight.float() + scale * change).to(weight.dtype)
    fused = UNet2DModel.from_config(unet.config)
    fused.load_state_dict(state)
    return fused.to(unet.device, next(iter(state.values())).dtype).eval()
