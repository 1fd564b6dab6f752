# SPDX-License-Identifier: Apache-2.0
"""The command `evaluate`."""

import typer

from diffsketching_pipeline.cli.options import UserError


def evaluate(context: typer.Context) -> None:
    """Score a model, or folders of images; --help lists the options. Needs the extra `evaluate`."""
    try:
        from diffsketching_pipeline.evaluation.run import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "diffsketching_pipeline":
            raise
        raise UserError(f"this needs {error.name}: `pip install 'diffsketching_pipeline[evaluate]'`.") from error
    run(context.args, "diffsketching evaluate")
