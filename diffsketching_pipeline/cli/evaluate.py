# SPDX-License-Identifier: Apache-2.0
"""The command `evaluate`."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from diffsketching_pipeline.cli.options import UserError


if TYPE_CHECKING:
    pass


def evaluate(context: typer.Context) -> None:
    """Score a model, or folders of images; --help lists the options."""
    script = Path(__file__).parents[2] / "training" / "evaluate.py"
    if not script.is_file():
        raise UserError(
            "the evaluation is a script of the source tree, which is not installed: clone it and install it with"
            ' `pip install -e ".[train]"`.'
        )
    raise typer.Exit(subprocess.call([sys.executable, str(script), *context.args]))
