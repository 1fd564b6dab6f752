# Copyright 2026 The DiffSketching Pipeline Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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

from diffsketching_pipeline import DiffSketchingPipeline, bundled_checkpoint
from diffsketching_pipeline.demo.page import launch
from diffsketching_pipeline.demo.service import Studio


model = os.environ.get("DIFFSKETCHING_MODEL")
pipe = DiffSketchingPipeline.from_pretrained(model or bundled_checkpoint())
launch(Studio(pipe, model)).block_thread()
