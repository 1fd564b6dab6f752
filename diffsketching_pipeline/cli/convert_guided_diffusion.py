# SPDX-License-Identifier: Apache-2.0
"""The command `convert-guided-diffusion`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from diffsketching_pipeline.cli.options import UserError, user_errors


def convert(
    unet_checkpoint: Annotated[Path, typer.Option(help="Diffusion model: state dict, .pt or .safetensors.")],
    output_dir: Annotated[Path, typer.Option(help="New pipeline folder.")],
    classifier_checkpoint: Annotated[
        Optional[Path], typer.Option(help="Noisy classifier of the same project.")
    ] = None,
    flags: Annotated[Optional[Path], typer.Option(help="JSON file with the flags that built the checkpoints.")] = None,
    preset: Annotated[Optional[str], typer.Option(help="64 | 128 | 256 | 512 | 256-uncond: published flags.")] = None,
    sketch_channel: Annotated[
        bool, typer.Option(help="Add an input channel for the drawing, to be fine-tuned.")
    ] = False,
) -> None:
    """Convert checkpoints of openai/guided-diffusion (ADM) to a pipeline folder."""
    if (flags is None) == (preset is None):
        raise UserError("give either `--flags` or `--preset`.")
    from diffsketching_pipeline.converters.guided_diffusion import convert_guided_diffusion

    with user_errors((ValueError, OSError)):
        convert_guided_diffusion(
            unet_checkpoint,
            classifier_checkpoint,
            flags=flags,
            preset=preset,
            sketch_channel=sketch_channel,
            output_dir=output_dir,
        )
    print(output_dir)
