# SPDX-License-Identifier: Apache-2.0
"""The command `info`."""

from typing import Annotated, Optional

import typer

from diffsketching_pipeline.cli.running import load_pipeline


def info(
    model: Annotated[
        Optional[str], typer.Argument(help="Folder, hub id or a bundled model. [default: garments-64]")
    ] = None,
) -> None:
    """A checkpoint's components, sizes, classes and recommended settings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from diffsketching_pipeline.hub.model_card import input_names
    from diffsketching_pipeline.verification import COMPONENT_CLASSES

    pipe = load_pipeline(model, "cpu")
    console = Console(markup=False, emoji=False, highlight=False)
    # Names come from files: rich is to show what they are, and not what they say.
    table = Table(title=Text(model or "garments-64 (bundled)"), title_justify="left")
    for column in ("component", "class", "parameters"):
        table.add_column(column, justify="right" if column == "parameters" else "left", no_wrap=True)
    for name in COMPONENT_CLASSES:
        component = getattr(pipe, name)
        parameters = getattr(component, "parameters", None)
        count = f"{sum(p.numel() for p in parameters()):,}" if parameters else ""
        table.add_row(name, "not in this checkpoint" if component is None else type(component).__name__, count)
    console.print(table)
    prediction_type = pipe.scheduler.config.prediction_type
    inputs = input_names(pipe)
    kind = " + ".join(inputs) if len(inputs) > 1 else f"{inputs[0]} only"
    size = f"{pipe.height}x{pipe.width}"
    if pipe.vae is not None:
        size += f" (latents {pipe.sample_size[0]}x{pipe.sample_size[1]}, {pipe.sample_channels} channels)"
    console.print(f"size: {size}   input: {kind}   predicts: {prediction_type}")
    console.print(f"classes ({pipe.num_classes}): {', '.join(pipe.id2label.values()) or 'integers'}")
    recommended = "   ".join(f"{key}={value}" for key, value in pipe.recommended.items()) or "none"
    console.print(f"recommended: {recommended}")
