# SPDX-License-Identifier: Apache-2.0
"""The server of the drawing page: its addresses, its limits, and the folders that it clears."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware

from diffsketching_pipeline.demo.guard import Guard, served_hosts
from diffsketching_pipeline.demo.page import CSS, DELETE_CACHE, build_page
from diffsketching_pipeline.demo.service import DemoService
from diffsketching_pipeline.deprecation import renamed_arguments


MAX_UPLOAD_BYTES = 16 * 2**20
# Of an uploaded picture: a phone's photos have no more. Others wait while it is decoded.
MAX_PICTURE_PIXELS = 25_000_000


@renamed_arguments(studio="service")
def launch(
    service: DemoService,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    allowed_hosts: Collection[str] = (),
    **kwargs: Any,
) -> gr.Blocks:
    """
    Serves the page in the background. Pillow's limit on the pixels of a picture is lowered for the whole process.

    Args:
        service ([`DemoService`]): the model.
        host (`str`, *optional*): address to listen on; `None` is `GRADIO_SERVER_NAME`, or else 127.0.0.1.
        port (`int`, *optional*): `None` is `GRADIO_SERVER_PORT`, or else the first free one from 7860.
        share (`bool`, defaults to `False`): whether to open a public address, too, through Gradio's servers.
        allowed_hosts (`Collection[str]`): further names under which browsers ask for the page, such as that of a proxy.
        kwargs: further arguments of `gradio.Blocks.launch`.

    Returns:
        [`gradio.Blocks`]: running; it has a `local_url`, and is ended by `close()`.

    Raises:
        OSError: if the port is taken.
    """
    # Gradio decodes pictures before we see them: it, too, is to refuse what unpacks to more than this. Pillow warns at
    # its limit and raises at twice that.
    Image.MAX_IMAGE_PIXELS = MAX_PICTURE_PIXELS // 2
    page = build_page(service)
    server_name = host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    hosts = served_hosts(server_name, allowed_hosts)
    guard = Middleware(Guard, hosts=hosts, max_upload_bytes=MAX_UPLOAD_BYTES)  # type: ignore[arg-type]
    page.launch(
        app_kwargs={"middleware": [guard], "lifespan": _sweep},
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=MAX_UPLOAD_BYTES,
        run_history=False,
        footer_links=["api"],
        enable_monitoring=False,
        ssr_mode=False,
        # The fonts of Gradio's themes may be Google's.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        **kwargs,
    )
    if share and page.share_url:
        hosts.add(str(urlsplit(page.share_url).hostname))
    return page


@asynccontextmanager
async def _sweep(app: Any) -> AsyncIterator[None]:
    """Remove the folders whose files Gradio has deleted, as often as it does that."""

    async def sweep() -> None:
        while True:
            remove_empty_folders(Path(get_upload_folder()), DELETE_CACHE[1])
            await asyncio.sleep(DELETE_CACHE[0])

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()


def remove_empty_folders(root: Path, seconds: float) -> None:
    """Remove the empty folders in `root` to which nothing was added, and from which nothing was taken, for so long."""
    for folder in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):
            if folder.is_dir() and time.time() - folder.stat().st_mtime >= seconds:
                folder.rmdir()
