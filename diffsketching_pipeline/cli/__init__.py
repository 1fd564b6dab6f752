# SPDX-License-Identifier: Apache-2.0
"""The `diffsketching` command. An error is one line on stderr and exit code 2, before any work is done."""

import sys
from typing import Annotated

import typer

from diffsketching_pipeline import __version__
from diffsketching_pipeline.cli import (
    convert_guided_diffusion,
    convert_photosketch,
    demo,
    edit,
    evaluate,
    export,
    generate,
    info,
    interpolate,
    invert,
    matrix,
    push,
)
from diffsketching_pipeline.cli.options import UserError
from diffsketching_pipeline.cli.writing import RESCUED
from diffsketching_pipeline.deprecation import normalize_option
from diffsketching_pipeline.messages import brief
from diffsketching_pipeline.stopping import stoppable


app = typer.Typer(
    name="diffsketching",
    help="Photos from drawings (DiffSketching, BMVC 2022).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": normalize_option},
)


def main() -> None:
    """Entry point: turns what the user got wrong into one line on stderr and exit code 2."""
    try:
        with stoppable("diffsketching"):
            code = app(standalone_mode=False)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except Exception as error:
        # typer ships its own click or uses the installed one, depending on its version; both have this method.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_fail(error.format_message() or "see `diffsketching --help`"))
    if RESCUED:
        where = " and ".join(f"'{rescue}' instead of '{folder}'" for folder, rescue in RESCUED.items())
        sys.exit(_fail(f"what could not be written any more is in {where}."))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print("diffsketching: error: " + brief(message), file=sys.stderr)
    return 2


def _version(value: bool) -> None:
    if value:
        print(f"diffsketching {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(generate.generate)
app.command()(edit.edit)
app.command()(interpolate.interpolate)
app.command()(matrix.matrix)
app.command()(invert.invert)
app.command()(info.info)
app.command()(demo.demo)
app.command()(export.export)
app.command()(push.push)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)(evaluate.evaluate)
app.command("convert-guided-diffusion")(convert_guided_diffusion.convert)
app.command("convert-photosketch")(convert_photosketch.convert)
