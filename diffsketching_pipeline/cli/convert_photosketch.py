# SPDX-License-Identifier: Apache-2.0
"""The command `convert-photosketch`."""

from pathlib import Path
from typing import Annotated

import typer

from diffsketching_pipeline.cli.options import user_errors


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Generator of mtli/PhotoSketch: latest_net_G.pth.")],
    output_dir: Annotated[Path, typer.Option(help="New folder for `PhotoSketcher.from_pretrained`.")],
    statistics: Annotated[
        str, typer.Option(help="per_sample (how the published tool runs) or running.")
    ] = "per_sample",
) -> None:
    """Convert a Photo-Sketching generator to a PhotoSketcher folder."""
    from diffsketching_pipeline.converters.photosketch import convert_photosketch

    with user_errors((ValueError, OSError)):
        convert_photosketch(checkpoint, output_dir, statistics=statistics)
    print(output_dir)
