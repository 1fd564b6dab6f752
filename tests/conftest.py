# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw
from testing_utils import (
    COMPONENTS,
    ID2LABEL,
    LATENT_COMPONENTS,
    LATENT_UNET,
    PIXEL_SIZE,
    ROOT,
    SIZE,
    make_scheduler,
    make_unet,
)

from diffsketching_pipeline import DiffSketchingPipeline


# Processes that share the tests share the cores, too: a thread each, and one for each process that a test starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Whoever asks for one of these starts a process that trains, pushes or loads, a browser, or a page and its queue.
SLOW_FIXTURES = {"script_env", "hub", "address", "browser", "start_browser"}


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **loopback}


@pytest.fixture(scope="session")
def drawings_dir(tmp_path_factory):
    """Six outlines of each class, all of different proportions."""
    root = tmp_path_factory.mktemp("drawings")
    for i in range(6):
        for label in ("disc", "square"):
            page = Image.new("L", (120, 120), 255)
            draw = ImageDraw.Draw(page)
            shape = draw.ellipse if label == "disc" else draw.rectangle
            shape(
                (10 + 7 * i, 10, 110 - 7 * i, 110) if i % 2 else (10, 10 + 7 * i, 110, 110 - 7 * i), outline=0, width=3
            )
            (root / label).mkdir(exist_ok=True)
            page.save(root / label / f"{label}{i}.png")
    return root


@pytest.fixture(scope="session")
def tiny_pipeline_factory():
    """
    `make(components=..., scheduler=..., id2label=..., recommended=..., prediction_type=..., **unet_options)`: a
    `DiffSketchingPipeline` of 16x16 pixels and random weights, the same ones for the same arguments.
    """

    def make(
        components=tuple(COMPONENTS),
        scheduler=None,
        id2label=ID2LABEL,
        recommended=None,
        prediction_type="v_prediction",
        **unet_options,
    ):
        modules = {}
        with torch.random.fork_rng(devices=[]):
            for seed, (name, build) in enumerate({"unet": lambda: make_unet(**unet_options), **COMPONENTS}.items()):
                torch.manual_seed(seed)
                if name == "unet" or name in components:
                    modules[name] = build().eval()
        scheduler = scheduler or make_scheduler(prediction_type=prediction_type)
        pipe = DiffSketchingPipeline(scheduler=scheduler, id2label=id2label, recommended=recommended, **modules)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def latent_pipeline_factory():
    """
    Make pipelines as `tiny_pipeline_factory` does, of 32x32 pixels in 8x8 latents of 4 channels, with trailing spacing; their
    UNet takes drawings and their abstraction.
    """

    def make(components=tuple(LATENT_COMPONENTS), scheduler=None, id2label=ID2LABEL, recommended=None, **unet_options):
        modules = {}
        builders = {"unet": lambda: make_unet(**{**LATENT_UNET, **unet_options}), **LATENT_COMPONENTS}
        with torch.random.fork_rng(devices=[]):
            for seed, (name, build) in enumerate(builders.items()):
                torch.manual_seed(seed)
                if name in ("unet", "vae") or name in components:
                    modules[name] = build().eval()
        scheduler = scheduler or make_scheduler(prediction_type="v_prediction", timestep_spacing="trailing")
        pipe = DiffSketchingPipeline(scheduler=scheduler, id2label=id2label, recommended=recommended, **modules)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def latent_pipeline(latent_pipeline_factory):
    """v-prediction on latents, with every optional component."""
    return latent_pipeline_factory()


@pytest.fixture
def large_sketches():
    """Three drawings at the size of the latent pipeline, `[3, 1, 32, 32]`."""
    sketches = torch.ones(3, 1, PIXEL_SIZE, PIXEL_SIZE)
    sketches[0, :, 8:24, 10] = -1
    sketches[1, :, 16, 4:28] = -1
    sketches[2, :, 6:26, [6, 24]] = -1
    sketches[2, :, [6, 24], 6:25] = -1
    return sketches


@pytest.fixture
def tiny_pipeline(tiny_pipeline_factory):
    """v-prediction, 4 input channels, the classes a, b and c and "no class", every optional component."""
    return tiny_pipeline_factory()


@pytest.fixture
def tiny_unet(tiny_pipeline):
    """`UNet2DModel` with 4 input channels (photo + sketch), 4 class embeddings and 3 output channels."""
    return tiny_pipeline.unet


@pytest.fixture
def sketches():
    """Three drawings in the sketch convention, `[3, 1, 16, 16]`."""
    sketches = torch.ones(3, 1, SIZE, SIZE)
    sketches[0, :, 4:12, 5] = -1
    sketches[1, :, 8, 2:14] = -1
    sketches[2, :, 3:13, [3, 12]] = -1
    sketches[2, :, [3, 12], 3:13] = -1
    return sketches


@pytest.fixture
def generators():
    """`make(n, first=0)`: n generators with the seeds first, first + 1, ..."""

    def make(n, first=0):
        return [torch.Generator().manual_seed(first + i) for i in range(n)]

    return make


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """An imagefolder of colored shapes on light paper: discs are red, squares are blue."""
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
