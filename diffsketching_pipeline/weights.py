# SPDX-License-Identifier: Apache-2.0
"""What can be done with the weights of two UNets."""

from typing import Any

from diffusers import UNet2DModel


def _settings(unet: UNet2DModel) -> dict[str, Any]:
    """What a config says about the computation: not where it came from, and lists as JSON has them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dict(unet.config).items()
        if not key.startswith("_")
    }


def interpolate_unets(first: UNet2DModel, second: UNet2DModel, ratio: float) -> UNet2DModel:
    """
    A UNet between two of one architecture: (1 - ratio) of the first's weights and ratio of the second's.

    Between a pretrained and a fine-tuned network this is a slider from one's behaviour to the other's, because
    fine-tuning stays in the same basin (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).

    Args:
        first, second (`UNet2DModel`): unchanged; their configs have to agree.
        ratio (`float`): 0 is the first, 1 the second; in [0, 1].

    Returns:
        `UNet2DModel`: a new one, in the dtype and on the device of the first, in eval mode.

    Raises:
        ValueError: `ratio` is outside [0, 1], or the architectures differ; names the setting.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"`ratio` has to be in [0, 1] but is {ratio}.")
    settings = [_settings(first), _settings(second)]
    for key in sorted(settings[0].keys() | settings[1].keys()):
        values = [config.get(key) for config in settings]
        if values[0] != values[1]:
            raise ValueError(
                f"`first` and `second` have to be alike, but have the {key} {values[0]!r} and {values[1]!r}."
            )
    result = UNet2DModel.from_config(first.config)
    # In float32: a small step between float16 weights would be rounded away before it is taken.
    theirs = second.state_dict()
    state = {}
    for name, ours in first.state_dict().items():
        mixed = (1 - ratio) * ours.float() + ratio * theirs[name].to(ours.device).float()
        state[name] = mixed.to(ours.dtype) if ours.is_floating_point() else ours
    result.load_state_dict(state)
    return result.to(first.device, first.dtype).eval()
