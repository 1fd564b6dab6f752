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
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw


# The scripts import `trainer` and `data` as a script does: from their own folder.
TRAINING = Path(__file__).parents[2] / "training"
sys.path.insert(0, str(TRAINING))


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps its settings for the life of a process; one thread, because more may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture
def script_env():
    """The environment of a script that a test launches."""
    path = os.pathsep.join(filter(None, [str(TRAINING.parent), os.environ.get("PYTHONPATH")]))
    loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **loopback}


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """An imagefolder of coloured shapes on light paper: discs are red, squares are blue."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 8)):
        for i in range(count):
            name, color = (("disc", (200, 40, 40)), ("square", (40, 40, 200)))[i % 2]
            picture = Image.new("RGB", (64, 64), (240, 240, 240))
            draw = ImageDraw.Draw(picture)
            left, top, side = rng.integers(6, 20), rng.integers(6, 20), rng.integers(24, 36)
            shape = draw.ellipse if name == "disc" else draw.rectangle
            shape((left, top, left + side, top + side), fill=color)
            path = root / split / name / f"{name}-{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Contours that several tests need; the tests of the cache itself make their own."""
    return tmp_path_factory.mktemp("cache")
