# SPDX-License-Identifier: Apache-2.0
"""The drawing page as a Hugging Face Space: `python app.py` serves it where `GRADIO_SERVER_NAME` says."""

import os


try:
    import diffsketching_pipeline  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "diffsketching_pipeline":
        raise
    raise SystemExit(
        "diffsketching_pipeline is not in this Space: put it beside app.py with `pip install --no-deps --target SPACE .` in"
        " a checkout of it, and push again."
    ) from None

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.demo.service import DemoService
from diffsketching_pipeline.demo.serving import launch
from diffsketching_pipeline.registry import find_checkpoint


model = os.environ.get("DIFFSKETCHING_MODEL") or None
pipe = DiffSketchingPipeline.from_pretrained(find_checkpoint(model))
launch(DemoService(pipe, model)).block_thread()
