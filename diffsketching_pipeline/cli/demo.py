# SPDX-License-Identifier: Apache-2.0
"""The command `demo`."""

import importlib.util
from typing import Annotated, Optional

import typer

from diffsketching_pipeline.cli.options import Device, Dtype, DtypeName, Model, UserError, user_errors
from diffsketching_pipeline.cli.running import load_pipeline


def demo(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(help="[default: the first free one from 7860]")] = None,
    allow_host: Annotated[
        Optional[list[str]], typer.Option(help="Further name under which browsers ask for the page, e.g. of a proxy.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also at a public address, by Gradio's servers.")] = False,
    device: Device = "auto",
    dtype: Dtype = DtypeName.float32,
) -> None:
    """A page to draw on, and to watch photos of the drawing appear; needs the extra `demo`."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("this needs Gradio: `pip install 'diffsketching_pipeline[demo]'`.")
    print(f"Loading {model or 'garments-64'} ...", flush=True)
    pipe = load_pipeline(model, device, dtype=dtype)
    from diffsketching_pipeline.demo.service import DemoService
    from diffsketching_pipeline.demo.serving import launch

    with user_errors((OSError,)):
        page = launch(DemoService(pipe, model), host, port, share, allow_host or ())
    print(f"Draw at {page.share_url or page.local_url}; Ctrl+C ends it.", flush=True)
    try:
        page.block_thread()
    finally:
        page.close()
