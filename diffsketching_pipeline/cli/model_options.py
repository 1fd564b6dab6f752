# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that save a model, and the model."""

from typing import TYPE_CHECKING

import typer

from diffsketching_pipeline.cli.options import DtypeName
from diffsketching_pipeline.cli.running import load_pipeline


if TYPE_CHECKING:
    from diffsketching_pipeline.pipeline_diffsketching import DiffSketchingPipeline


MODEL_ARGUMENT = typer.Argument(help="Pipeline folder or hub id; `garments-64` is the bundled one.")
CARD_OPTION = typer.Option(help="Markdown file for README.md. [default: the model's own]")
METRICS_OPTION = typer.Option(help="metrics.json of training/evaluate.py, to be added to README.md.")
LICENSE_OPTION = typer.Option(help="Licence of the weights for a new README.md, e.g. apache-2.0.")
SHARD_OPTION = typer.Option(help="Largest weight file, e.g. 15MB.")
DTYPE_OPTION = typer.Option(help="Type of the saved weights.")
FP16_OPTION = typer.Option("--fp16-variant", help='Also write float16 weights, for `variant="fp16"`.')


def load_to_save(model: str, save_dtype: DtypeName) -> "DiffSketchingPipeline":
    """A pipeline on the CPU, in the type it is to be saved in."""
    return load_pipeline(model, "cpu", dtype=save_dtype)
